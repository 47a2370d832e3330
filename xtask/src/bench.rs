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
    // The profile that the tests use, so that Burn is not compiled once more.
    let bench = ["bench", "--workspace", "--profile", "dev", "--bench", "factored", "--"];
    exec::run(exec::cargo(bench).args(&args.rest))
}
