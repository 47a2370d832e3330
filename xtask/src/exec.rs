//! Starting other programs.

use crate::failure::Failure;
use crate::places;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Cargo, started in the repository.
pub(crate) fn cargo<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(places::root());
    command
}

/// Runs a program to its end, its output being ours.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|e| not_started(command, &e))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::Program { what: name(command), status })
}

/// Whether a program can be started and ends well; its output is dropped.
pub(crate) fn works(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// A program's standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, Failure> {
    command.stderr(Stdio::inherit());
    let output = command.output().map_err(|e| not_started(command, &e))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Failure::Program { what: name(command), status: output.status })
}

/// A program's standard output; what it says beside that goes to a file, and its last words into the error.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<Vec<u8>, Failure> {
    let open = File::options().create(true).append(true).open(log);
    command.stdin(Stdio::null()).stderr(open.map_err(|e| Failure::at(log, e))?);
    let output = command.output().map_err(|e| not_started(command, &e))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = std::fs::read(log).map_err(|e| Failure::at(log, e))?;
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty());
    let last = last.map_or_else(|| output.status.to_string(), str::to_owned);
    Err(Failure::new(format!("{}: {last}", name(command))))
}

/// So many threads, whatever a program makes them with.
pub(crate) fn threads(command: &mut Command, count: usize) -> &mut Command {
    let variables = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"];
    command.envs(variables.map(|variable| (variable, count.to_string())))
}

/// Builds the program `burn-peft` and says where it lies.
pub(crate) fn build_program(features: &[&str]) -> Result<PathBuf, Failure> {
    build("burn-peft", "bin", features)
}

/// Builds the program as its users have it, optimised throughout.
pub(crate) fn build_release() -> Result<PathBuf, Failure> {
    let build = ["build", "--release", "--quiet", "--package", "burn-peft-cli", MESSAGES];
    built(&mut cargo(build), "burn-peft", "bin")
}

/// Builds the example `measure` of the benchmarks and says where it lies.
pub(crate) fn build_measure() -> Result<PathBuf, Failure> {
    build("measure", "example", &[])
}

/// Has cargo say where what it built lies.
const MESSAGES: &str = "--message-format=json-render-diagnostics";

fn build(name: &str, kind: &str, features: &[&str]) -> Result<PathBuf, Failure> {
    // With the tests, whose dependencies ask for other features of Burn's: it is compiled once.
    let mut command = cargo(["test", "--no-run", "--quiet", "--workspace", MESSAGES]);
    if !features.is_empty() {
        let features: Vec<_> = features.iter().map(|f| format!("burn-peft-cli/{f}")).collect();
        command.arg("--features").arg(features.join(","));
    }
    built(&mut command, name, kind)
}

/// Runs a build and finds the program among cargo's messages.
fn built(command: &mut Command, name: &str, kind: &str) -> Result<PathBuf, Failure> {
    let messages = output(command)?;
    let messages = String::from_utf8_lossy(&messages);
    let built = messages.lines().rev().find_map(|line| executable(line, name, kind));
    built.ok_or_else(|| Failure::new(format!("cargo built {name} but did not say where it lies")))
}

fn executable(line: &str, name: &str, kind: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let asked = message["target"]["name"] == name && message["target"]["kind"][0] == kind;
    let tests = message["profile"]["test"] == true;
    message["executable"].as_str().filter(|_| asked && !tests).map(PathBuf::from)
}

fn not_started(command: &Command, error: &std::io::Error) -> Failure {
    Failure::new(format!("{} cannot be started: {error}", command.get_program().display()))
}

/// The program and the first of its arguments: enough to know it by.
fn name(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).display().to_string();
    match command.get_args().next() {
        Some(first) => format!("{program} {}", first.display()),
        None => program,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_program_is_found_among_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"burn-peft"},"executable":"/t/debug/burn-peft"}"#;
        let executable = |line: &str| executable(line, "burn-peft", "bin");
        assert_eq!(executable(line), Some(PathBuf::from("/t/debug/burn-peft")));
        let tests = line.replace("\"executable\"", "\"profile\":{\"test\":true},\"executable\"");
        assert_eq!(executable(&tests), None);
        assert_eq!(executable(&line.replace("burn-peft\"}", "other\"}")), None);
        assert_eq!(executable("not json"), None);
    }

    #[test]
    fn a_logged_program_fails_with_its_last_words() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let log = folder.path().join("log");
        let version = logged(&mut cargo(["--version"]), &log).expect("works");
        assert!(version.starts_with(b"cargo "), "{version:?}");
        let error = logged(&mut cargo(["no-such-verb"]), &log).expect_err("is no verb");
        let said = std::fs::read_to_string(&log).expect("is written");
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).expect("says why");
        assert!(error.to_string().ends_with(&format!(" no-such-verb: {}", last.trim())), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program")).expect_err("cannot start");
        assert!(error.to_string().starts_with("no-such-program cannot be started"), "{error}");
    }
}
