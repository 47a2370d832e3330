//! `cargo xtask ci`: what a change must pass. Cheap steps first; no set of features is built twice.

use crate::failure::Failure;
use crate::steps::{self, Step};
use crate::test::{self, TestArgs, target};
use crate::{exec, places, python, vulkan};
use std::process::Command;

/// The release of cargo-deny that is installed where there is none.
const CARGO_DENY: &str = "0.20.2";

const STEPS: &[Step] = &[
    Step { name: "format", what: "rustfmt has nothing to change", run: format },
    Step { name: "deny", what: "licences, sources and duplicates of the dependencies", run: deny },
    Step { name: "lints", what: "clippy has nothing to say", run: lints },
    Step { name: "docs", what: "the documentation builds without a warning", run: docs },
    Step { name: "test", what: "all tests on the default backend", run: tests },
    Step { name: "interop", what: "adapters go to HF PEFT and come from it", run: interop },
    Step { name: "gpus", what: "the CUDA and Vulkan backends type-check", run: gpus },
    Step {
        name: "backends",
        what: "the laws and the program on wgpu, by Mesa's lavapipe, and on ndarray",
        run: backends,
    },
];

#[derive(Debug, clap::Args)]
#[command(after_help = "Steps: format, deny, lints, docs, test, interop, gpus, backends.

Examples:
  cargo xtask ci
  cargo xtask ci --only format,lints
  cargo xtask ci --skip backends,interop")]
pub(crate) struct CiArgs {
    /// Steps to run
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    only: Vec<String>,
    /// Steps to leave out
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    skip: Vec<String>,
}

/// Runs the steps that are asked for.
pub(crate) fn run(args: &CiArgs) -> Result<(), Failure> {
    steps::run(&steps::select(STEPS, &args.only, &args.skip)?)
}

fn format() -> Result<(), Failure> {
    exec::run(&mut exec::cargo(["fmt", "--all", "--check"]))
}

fn deny() -> Result<(), Failure> {
    let mut deny = match exec::works(&mut exec::cargo(["deny", "--version"])) {
        true => exec::cargo(["deny"]),
        false => installed_deny()?,
    };
    exec::run(deny.args(["--all-features", "check", "licenses", "bans", "sources"]))
}

/// cargo-deny in the user's cache folder.
fn installed_deny() -> Result<Command, Failure> {
    let tools = places::cache()?.join("tools");
    let program = tools.join("bin").join(format!("cargo-deny{}", std::env::consts::EXE_SUFFIX));
    if !exec::works(Command::new(&program).arg("--version")) {
        let mut install = exec::cargo(["install", "--locked", "--quiet", "cargo-deny"]);
        exec::run(install.args(["--version", CARGO_DENY, "--root"]).arg(&tools))?;
    }
    let mut deny = Command::new(program);
    deny.current_dir(places::root());
    Ok(deny)
}

fn lints() -> Result<(), Failure> {
    let lints = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    exec::run(&mut exec::cargo(lints))
}

fn docs() -> Result<(), Failure> {
    let mut docs = exec::cargo(["doc", "--workspace", "--no-deps"]);
    exec::run(docs.env("RUSTDOCFLAGS", "--deny warnings"))
}

fn tests() -> Result<(), Failure> {
    test::run(&TestArgs::default())
}

fn interop() -> Result<(), Failure> {
    let python = python::with_peft()?;
    let program = exec::build_program(&[])?;
    let mut check = Command::new(python);
    check.arg(places::root().join("interop/check.py")).arg("--binary").arg(program);
    exec::run(&mut check)
}

/// Vulkan is not run: its shaders, which come as SPIR-V, crash the lavapipe of Debian 12 (Mesa 22.3).
fn gpus() -> Result<(), Failure> {
    let mut check = exec::cargo(["check", "--package", "burn-peft", "--features", "cuda,vulkan"]);
    // As on docs.rs, the build scripts then fetch no compiler.
    exec::run(check.env("DOCS_RS", "1"))
}

fn backends() -> Result<(), Failure> {
    let driver = vulkan::lavapipe()?;
    let packages = ["--package", "burn-peft", "--package", "burn-peft-cli"];
    let mut laws = exec::cargo(["test"]);
    laws.args(packages).args(["--test", "laws", "--test", "seeded", "--test", "program"]);
    // Small shapes: compiling fast is worth more than running fast. In a folder of its own, so
    // that the unoptimised Burn does not push the other one out.
    let features = ["ndarray", "wgpu"].map(|name| format!("burn-peft-cli/{name}"));
    laws.arg("--features").arg(features.join(","));
    laws.args(["--config", r#"profile.dev.package."*".opt-level=0"#]);
    laws.arg("--target-dir").arg(target()?.join("unoptimised"));
    laws.env("VK_DRIVER_FILES", &driver).env("VK_ICD_FILENAMES", &driver);
    exec::run(&mut laws)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args;

    #[test]
    fn the_help_lists_every_step() {
        let help = CiArgs::augment_args(clap::Command::new("ci")).render_help().to_string();
        let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        assert!(help.contains(&format!("Steps: {}.", names.join(", "))), "{help}");
    }
}
