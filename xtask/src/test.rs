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
    let target = target()?;
    for manifest in examples {
        println!("\nExample outside the workspace: {}", manifest.display());
        let mut test = exec::cargo(["test", "--manifest-path"]);
        // The workspace's own profile and folder, so that Burn is not compiled once more.
        test.arg(&manifest).args(profile()?).env("CARGO_TARGET_DIR", &target);
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

/// The workspace's `profile.dev` as arguments for cargo in another one.
fn profile() -> Result<Vec<String>, Failure> {
    let path = places::root().join("Cargo.toml");
    let text = fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
    let manifest: toml::Table = text.parse().map_err(|e| Failure::at(&path, e))?;
    let dev = manifest.get("profile").and_then(|profiles| profiles.get("dev"));
    let mut settings = Vec::new();
    if let Some(dev) = dev {
        flatten("profile.dev", dev, &mut settings);
    }
    Ok(settings)
}

fn flatten(key: &str, value: &toml::Value, settings: &mut Vec<String>) {
    match value.as_table() {
        Some(table) => {
            for (name, value) in table {
                let bare = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
                let name = if bare { name.clone() } else { format!("{name:?}") };
                flatten(&format!("{key}.{name}"), value, settings);
            }
        }
        None => settings.extend(["--config".into(), format!("{key}={value}")]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_becomes_arguments() {
        let text = "[profile.dev]\nopt-level = 1\n[profile.dev.package.\"*\"]\ndebug = \"none\"\n";
        let table: toml::Table = text.parse().expect("is TOML");
        let mut settings = Vec::new();
        flatten("profile.dev", &table["profile"]["dev"], &mut settings);
        let package = r#"profile.dev.package."*".debug="none""#;
        assert_eq!(settings, ["--config", "profile.dev.opt-level=1", "--config", package]);
    }

    #[test]
    fn this_workspace_has_a_profile_to_share() {
        assert!(profile().is_ok_and(|settings| !settings.is_empty()));
    }
}
