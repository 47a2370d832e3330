//! `burn-peft inspect`.

use crate::failure::{Failure, print};
use burn_peft::core::{CONFIG_FILE, TENSORS_FILE, TensorFile, adapter_folders, grouped};
use burn_peft::models::weight_files;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

fn files(folder: &Path) -> Result<(PathBuf, Vec<PathBuf>), Failure> {
    let config = folder.join(CONFIG_FILE);
    if config.is_file() {
        return Ok((config, vec![folder.join(TENSORS_FILE)]));
    }
    let config = folder.join("config.json");
    if !config.is_file() {
        return Err(Failure::new(format!(
            "{}: holds neither {CONFIG_FILE} nor config.json; expected the folder of an adapter or a model",
            folder.display()
        )));
    }
    Ok((config, weight_files(folder)?))
}

/// `a.0.b` and `a.1.b` are one line.
fn starred(name: &str) -> String {
    let star =
        |part: &str| if part.parse::<usize>().is_ok() { "*".into() } else { part.to_owned() };
    name.split('.').map(star).collect::<Vec<_>>().join(".")
}

pub(crate) fn run(folder: &Path) -> Result<(), Failure> {
    adapter_folders(folder)?.iter().try_for_each(|folder| one(folder))
}

fn one(folder: &Path) -> Result<(), Failure> {
    let (config, shards) = files(folder)?;
    let text = std::fs::read_to_string(&config)
        .map_err(|e| Failure::new(format!("{}: {e}", config.display())))?;
    let json: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Failure::new(format!("{}: is not JSON: {e}", config.display())))?;
    let mut out = String::new();
    let _ = writeln!(out, "{}", config.display());
    for (name, value) in json.as_object().into_iter().flatten() {
        let empty = value.is_null()
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !empty {
            let _ = writeln!(out, "  {name}: {value}");
        }
    }
    let file = TensorFile::open_shards(shards)?;
    let mut groups: BTreeMap<(String, Vec<usize>, String), usize> = BTreeMap::new();
    let (mut count, mut parameters) = (0, 0);
    for name in file.names() {
        let shape = file.shape(name).unwrap_or_default().to_vec();
        count += 1;
        parameters += shape.iter().product::<usize>();
        let dtype = file.dtype(name).unwrap_or_default();
        *groups.entry((starred(name), shape, dtype)).or_default() += 1;
    }
    let _ = writeln!(
        out,
        "{count} tensors, {} parameters, {} bytes",
        grouped(parameters),
        grouped(file.bytes())
    );
    for ((name, shape, dtype), times) in groups {
        let _ = writeln!(out, "  {times:>3} x {name} {shape:?} {dtype}");
    }
    print(&out)
}
