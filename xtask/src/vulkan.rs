//! A Vulkan driver that needs no GPU: Mesa's lavapipe.

use crate::exec;
use crate::failure::Failure;
use std::path::PathBuf;
use std::process::Command;

const PACKAGE: &str = "mesa-vulkan-drivers";

/// The file that tells Vulkan's loader of lavapipe; installs it where Debian's tools can.
pub(crate) fn lavapipe() -> Result<PathBuf, Failure> {
    if let Some(driver) = driver() {
        return Ok(driver);
    }
    let missing = || {
        let what = "lavapipe, Mesa's Vulkan driver for the CPU, is not installed";
        Failure::new(format!(
            "{what}; install {PACKAGE}, or leave this step out with --skip backends"
        ))
    };
    if !exec::works(Command::new("apt-get").arg("--version")) || !is_root() {
        return Err(missing());
    }
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        exec::run(apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let install = ["install", "--yes", "--quiet", "--no-install-recommends", PACKAGE, "libvulkan1"];
    apt(&["update", "--quiet"]).and_then(|()| apt(&install))?;
    driver().ok_or_else(missing)
}

fn driver() -> Option<PathBuf> {
    let folders = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let mut found: Vec<_> = files.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.to_string_lossy().contains("lvp_icd"));
    found.sort();
    found.into_iter().next()
}

fn is_root() -> bool {
    let id = exec::output(Command::new("id").arg("-u"));
    id.is_ok_and(|id| id.trim_ascii() == b"0")
}
