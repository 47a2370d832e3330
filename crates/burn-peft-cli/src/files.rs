//! The files of a run beside the adapter's own.

use crate::failure::Failure;
use burn_peft::core::{CONFIG_FILE, LIST_FILE, TENSORS_FILE, TensorFile, write_atomic};
use std::path::Path;

/// Names of the classes, in the order of their numbers: a JSON list.
pub(crate) const LABELS: &str = "labels.json";

/// What a run says of itself.
pub(crate) const SUMMARY: &str = "summary.json";

pub(crate) fn json_bytes(name: &str, value: &impl serde::Serialize) -> Result<Vec<u8>, Failure> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| Failure::new(format!("{name}: cannot be written: {e}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The class names that an adapter's folder holds.
pub(crate) fn read_labels(folder: &Path) -> Result<Option<Vec<String>>, Failure> {
    let path = folder.join(LABELS);
    match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::new(format!("{}: {e}", path.display()))),
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|e| {
            Failure::new(format!("{}: expected a list of names: {e}", path.display()))
        }),
    }
}

/// Number of classes of the head that an adapter's folder holds, if it holds one.
pub(crate) fn head_rows(folder: &Path, output: &str) -> Result<Option<usize>, Failure> {
    let file = TensorFile::open(folder.join(TENSORS_FILE))?;
    // Adapters of layers and what stands in front of a model have names of their own for the base.
    let names = ["base_model.model", "base_model"].map(|base| format!("{base}.{output}.weight"));
    let shape = names.iter().find_map(|name| file.shape(name));
    Ok(shape.and_then(|shape| shape.first().copied()))
}

/// Refuses a folder that already holds something, unless it may be replaced.
pub(crate) fn claim(folder: &Path, names: &[&str], overwrite: bool) -> Result<(), Failure> {
    let held = names.iter().map(|name| folder.join(name)).find(|path| path.exists());
    match held {
        Some(held) if !overwrite => Err(Failure::new(format!(
            "{} is already there; choose another --output-dir, or give --overwrite to replace it",
            held.display()
        ))),
        _ => {
            // Found out now and not after the training.
            std::fs::create_dir_all(folder)
                .map_err(|e| Failure::new(format!("{}: {e}", folder.display())))?;
            let probe = folder.join(".write-test");
            write_atomic(&probe, b"")?;
            let _ = std::fs::remove_file(probe);
            Ok(())
        }
    }
}

/// What an adapter's folder is made of.
pub(crate) const ADAPTER_FILES: &[&str] =
    &[CONFIG_FILE, TENSORS_FILE, LIST_FILE, "checkpoint/state.json"];

/// Largest resident memory of this process so far, in bytes, where the system says.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
