//! Several adapters that belong together: one folder that holds all, each in a subfolder that HF PEFT reads,
//! and a list of them.

use crate::{CONFIG_FILE, Error, write_together};
use std::path::{Path, PathBuf};

/// Name of the list in the folder of several adapters: a JSON list of subfolders, in the order in which the
/// adapters were laid.
pub const LIST_FILE: &str = "adapters.json";

/// A file that is to be written.
pub type Unwritten = (PathBuf, Vec<u8>);

/// Writes several adapters into one folder, all or none: `files` are those of
/// [`adapter_files`](crate::adapter_files) in the subfolders `names`, and what else belongs to them.
///
/// # Errors
/// A name that is no plain name or stands there twice; what the operating system says.
pub fn save_together(folder: &Path, names: &[&str], files: &[Unwritten]) -> Result<(), Error> {
    let list = folder.join(LIST_FILE);
    check(&list, names)?;
    let json = serde_json::to_vec_pretty(names)
        .map_err(|e| Error::format(&list, format!("cannot be written: {e}")))?;
    let mut all: Vec<(PathBuf, &[u8])> =
        files.iter().map(|(path, bytes)| (path.clone(), bytes.as_slice())).collect();
    all.push((list, &json));
    write_together(&all)
}

/// The folders of the adapters that a folder holds: itself, or those of its list, in the order of that.
///
/// # Errors
/// A list that cannot be read, is empty, or names what is no subfolder; a folder with a list and an adapter of its
/// own.
pub fn adapter_folders(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = folder.join(LIST_FILE);
    let text = match std::fs::read_to_string(&list) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![folder.to_owned()]),
        Err(e) => return Err(Error::io(list, e)),
        Ok(text) => text,
    };
    if folder.join(CONFIG_FILE).exists() {
        let reason = format!("stands beside {CONFIG_FILE}; expected one of them, remove the other");
        return Err(Error::format(list, reason));
    }
    let names: Vec<String> = serde_json::from_str(&text)
        .map_err(|e| Error::format(&list, format!("expected a list of subfolders: {e}")))?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    check(&list, &names)?;
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

/// Refuses names that lead out of the folder, or to one adapter twice.
fn check(list: &Path, names: &[&str]) -> Result<(), Error> {
    if names.is_empty() {
        return Err(Error::format(list, "is empty; expected the subfolder of one adapter or more"));
    }
    for (at, name) in names.iter().enumerate() {
        let plain =
            !name.is_empty() && *name != "." && *name != ".." && !name.contains(['/', '\\']);
        if !plain {
            let reason = format!("expected names of subfolders, found `{name}`");
            return Err(Error::format(list, reason));
        }
        if names[..at].contains(name) {
            return Err(Error::format(list, format!("names `{name}` twice")));
        }
    }
    Ok(())
}
