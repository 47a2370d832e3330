//! `cargo xtask bench`.

use crate::exec;
use crate::failure::Failure;
use std::ffi::OsString;

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// Passed on to the benchmarks
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Runs the benchmarks.
pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    exec::run(exec::cargo(["bench", "--package", "burn-peft-benches", "--"]).args(&args.rest))
}
