//! Where things lie.

use crate::failure::Failure;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The repository.
pub(crate) fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), Path::to_owned)
}

/// The user's cache folder: models, data, the Python environment, tools.
pub(crate) fn cache() -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let found = set("BURN_PEFT_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("burn-peft")))
        .or_else(|| set("HOME").map(|home| home.join(".cache").join("burn-peft")))
        .or_else(|| set("LOCALAPPDATA").map(|base| base.join("burn-peft")));
    found.ok_or_else(|| Failure::new("no home folder is known; set BURN_PEFT_CACHE to a folder"))
}

/// Makes a folder and those above it.
pub(crate) fn make(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|e| Failure::at(folder, e))
}

/// A file that is whole or not there.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let fresh = tempfile::NamedTempFile::new_in(folder);
    let fresh = fresh.and_then(|mut file| file.write_all(bytes).map(|()| file));
    let done = fresh.and_then(|file| file.persist(path).map_err(std::io::Error::from));
    done.map(drop).map_err(|e| Failure::at(path, e))
}
