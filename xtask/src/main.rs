//! The repository's own commands: `cargo xtask demo`, `images`, `test`, `ci`, `bench` and `compare`.

mod assets;
mod bench;
mod ci;
mod compare;
mod demo;
mod dinov2;
mod exec;
mod failure;
mod fashion;
mod fetch;
mod images;
mod onnx;
mod places;
mod python;
mod reviews;
mod steps;
mod summary;
mod test;
mod vulkan;

use clap::{Parser, Subcommand};

use std::process::ExitCode;

/// What one does in this repository beside `cargo build`.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Fine-tune a real model on real reviews, from nothing
    Demo(demo::DemoArgs),
    /// Fine-tune a real vision transformer on real pictures, from nothing
    Images(images::ImagesArgs),
    /// Run all tests
    Test(test::TestArgs),
    /// Run every check that a change must pass
    Ci(ci::CiArgs),
    /// Measure steps: ours, Burn's own, and HF PEFT's
    Bench(bench::BenchArgs),
    /// Train every method on one task and tell how they fare
    Compare(compare::CompareArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Demo(args) => demo::run(&args),
        Verb::Images(args) => images::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Ci(args) => ci::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Compare(args) => compare::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            failure.exit_code()
        }
    }
}
