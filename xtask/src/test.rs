//! `cargo xtask test`: all tests, with nothing but cargo.

use crate::failure::Failure;
use crate::{exec, places};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug, Default, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask test
  cargo xtask test merge -- --nocapture")]
pub(crate) struct TestArgs {
    /// Passed on to cargo test
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Runs the tests of the workspace and of the examples outside it.
pub(crate) fn run(args: &TestArgs) -> Result<(), Failure> {
    // All at once: other sets of packages have other features, and compile Burn once more.
    exec::run(exec::cargo(["test", "--workspace"]).args(&args.rest))?;
    let examples = outside(&places::root().join("examples"))?;
    if examples.is_empty() {
        return Ok(());
    }
    // Unoptimised, because Burn is compiled once more, with the few features that they ask for.
    let target = target()?.join("unoptimised");
    for manifest in examples {
        println!("\nExample outside the workspace: {}", manifest.display());
        let mut test = exec::cargo(["test", "--manifest-path"]);
        test.arg(&manifest).args(["--locked", "--config", "profile.dev.debug=false"]);
        test.env("CARGO_TARGET_DIR", &target);
        exec::run(test.args(&args.rest))?;
    }
    Ok(())
}

/// Manifests of the example crates, each of which is a workspace of its own.
fn outside(examples: &Path) -> Result<Vec<PathBuf>, Failure> {
    if !examples.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(examples).map_err(|e| Failure::at(examples, e))?;
    let manifests = entries.flatten().map(|entry| entry.path().join("Cargo.toml"));
    let mut manifests: Vec<_> = manifests.filter(|path| path.is_file()).collect();
    manifests.sort();
    Ok(manifests)
}

/// The workspace's build folder.
pub(crate) fn target() -> Result<PathBuf, Failure> {
    let arguments = ["metadata", "--no-deps", "--format-version", "1"];
    let metadata = exec::output(&mut exec::cargo(arguments))?;
    let metadata: Value = serde_json::from_slice(&metadata)
        .map_err(|e| Failure::new(format!("cargo metadata: {e}")))?;
    let target = metadata["target_directory"].as_str().map(PathBuf::from);
    target.ok_or_else(|| Failure::new("cargo metadata names no target directory"))
}
