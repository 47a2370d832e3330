//! Python: pip for the demo's downloads, and an environment with `peft` for the interop check.

use crate::exec;
use crate::failure::Failure;
use crate::places;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that names the interpreter to use.
pub(crate) const VARIABLE: &str = "BURN_PEFT_PYTHON";

/// What the interop check installs.
const REQUIREMENTS: &str = include_str!("../../interop/requirements.txt");

fn chosen() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// An interpreter, if there is one.
pub(crate) fn find() -> Option<PathBuf> {
    let candidates = chosen().map_or_else(|| vec!["python3".into(), "python".into()], |p| vec![p]);
    candidates.into_iter().find(|python| exec::works(Command::new(python).arg("--version")))
}

/// Whether the interpreter has pip.
pub(crate) fn has_pip(python: &Path) -> bool {
    exec::works(Command::new(python).args(["-m", "pip", "--version"]))
}

/// An interpreter that has `peft`: the one that is chosen, or an environment of ours.
pub(crate) fn with_peft() -> Result<PathBuf, Failure> {
    if let Some(python) = chosen() {
        if exec::works(Command::new(&python).args(["-c", "import peft, transformers, safetensors"]))
        {
            return Ok(python);
        }
        let said =
            "cannot import peft, transformers and safetensors; install interop/requirements.txt";
        return Err(Failure::at(&python, format!("{said}, or unset {VARIABLE}")));
    }
    environment(&places::cache()?.join("venv"))
}

fn environment(folder: &Path) -> Result<PathBuf, Failure> {
    let python = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    // Written last, so that an environment half made is made again.
    let stamp = folder.join("installed.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|text| text == REQUIREMENTS) {
        return Ok(python);
    }
    let remedy =
        format!("install Python 3 with venv and pip, or set {VARIABLE} to one that has peft");
    let base = find().ok_or_else(|| Failure::new(format!("no Python was found; {remedy}")))?;
    if exec::run(Command::new(&base).args(["-m", "venv", "--clear"]).arg(folder)).is_err() {
        return Err(Failure::at(&base, format!("cannot make an environment; {remedy}")));
    }
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]);
    exec::run(pip.arg("--requirement").arg(places::root().join("interop/requirements.txt")))?;
    std::fs::write(&stamp, REQUIREMENTS).map_err(|e| Failure::at(&stamp, e))?;
    Ok(python)
}
