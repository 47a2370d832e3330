//! The program `burn-peft`.

mod args;
mod combine;
mod convert;
mod evaluate;
mod failure;
mod files;
mod forward;
mod images;
mod inspect;
mod laplace;
mod make;
mod model;
mod options;
mod prepare;
mod train;

use args::{Cli, Verb};
use clap::Parser;
use failure::Failure;
use std::process::ExitCode;

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.verb {
        Verb::Train(args) => train::run(*args),
        Verb::Eval(args) => evaluate::eval(&args),
        Verb::Predict(args) => evaluate::predict(&args),
        Verb::Laplace(args) => laplace::fit(&args),
        Verb::Embed(args) => evaluate::embed(&args),
        Verb::Generate(args) => forward::generate(&args),
        Verb::Forward(args) => forward::forward(&args),
        Verb::Merge(args) => forward::merge(&args),
        Verb::Convert(args) => convert::run(&args),
        Verb::Combine(args) => combine::run(&args),
        Verb::Inspect(args) => inspect::run(&args.path),
    }
}

fn main() -> ExitCode {
    burn_peft::kernels::keep_freed_memory();
    env_logger::Builder::from_env(
        env_logger::Env::default().default_filter_or("warn,burn_train=off"),
    )
    .format_timestamp(None)
    .format_target(false)
    .init();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Interrupted) => ExitCode::from(130),
        // Whoever read our output has gone; that is no fault.
        Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Err(Failure::Said(message)) => {
            log::error!("{message}");
            ExitCode::FAILURE
        }
    }
}
