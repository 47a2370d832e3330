//! Fashion-MNIST: 70,000 grey pictures of ten kinds of clothes, of which one takes some.

use crate::assets::{FASHION, FASHION_SHA256, FASHION_VERSION};
use crate::failure::Failure;
use crate::{exec, fetch, places};
use flate2::read::GzDecoder;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The four files, each with how many bytes a picture has in it.
const FILES: [(&str, usize); 4] = [
    ("train-images-idx3-ubyte", 28 * 28),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 28 * 28),
    ("t10k-labels-idx1-ubyte", 1),
];

/// A folder in the cache with the first `train` and `test` pictures, which are in no order.
pub(crate) fn folder(
    given: Option<&Path>,
    train: usize,
    test: usize,
    remedy: &str,
) -> Result<PathBuf, Failure> {
    let source = given.map_or_else(|| downloaded(remedy), |folder| Ok(folder.to_owned()))?;
    let cache = places::cache()?.join("data");
    places::make(&cache)?;
    let folder = cache.join(format!("fashion-mnist-{train}-{test}"));
    places::make(&folder)?;
    for (name, size) in FILES {
        let count = if name.starts_with("train") { train } else { test };
        let packed = source.join(format!("{name}.gz"));
        let file = if packed.is_file() { packed } else { source.join(name) };
        let bytes = read(&file).and_then(|bytes| first(&bytes, count, size));
        let bytes = bytes.map_err(|e| Failure::at(&file, e))?;
        let path = folder.join(name);
        fs::write(&path, bytes).map_err(|e| Failure::at(&path, e))?;
    }
    Ok(folder)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path)?;
    match path.extension().is_some_and(|ending| ending == "gz") {
        true => GzDecoder::new(io::BufReader::new(file)).read_to_end(&mut bytes)?,
        false => { file }.read_to_end(&mut bytes)?,
    };
    Ok(bytes)
}

/// The same idx file with the first `count` things in it, of `size` bytes each.
fn first(bytes: &[u8], count: usize, size: usize) -> io::Result<Vec<u8>> {
    let wrong = |said: String| io::Error::new(io::ErrorKind::InvalidData, said);
    let head = if size == 1 { 8 } else { 16 };
    let end = head + count * size;
    if bytes.len() < end {
        let found = bytes.len().saturating_sub(head) / size;
        return Err(wrong(format!("expected {count} of them or more, found {found}")));
    }
    let mut cut = bytes[..end].to_vec();
    let count = u32::try_from(count).map_err(|e| wrong(e.to_string()))?;
    cut[4..8].copy_from_slice(&count.to_be_bytes());
    Ok(cut)
}

/// Debian's package of it, downloaded by apt and unpacked without being installed.
fn downloaded(remedy: &str) -> Result<PathBuf, Failure> {
    let assets = places::cache()?.join("assets");
    let folder = assets.join(format!("{FASHION}-{FASHION_SHA256:.12}"));
    let inside = Path::new("usr/share/datasets/fashion-mnist");
    if folder.is_dir() {
        return Ok(folder.join(inside));
    }
    places::make(&assets)?;
    let part = tempfile::Builder::new().prefix(".part-").tempdir_in(&assets);
    let part = part.map_err(|e| Failure::at(&assets, e))?;
    println!("Downloading Fashion-MNIST, 31 MB ({FASHION} {FASHION_VERSION})");
    let mut apt = Command::new("apt-get");
    apt.args(["download", "--quiet=2"]).arg(format!("{FASHION}={FASHION_VERSION}"));
    let failed = |e: Failure| Failure::new(format!("{FASHION} was not downloaded: {e}; {remedy}"));
    exec::run(apt.current_dir(part.path())).map_err(failed)?;
    let entries = fs::read_dir(part.path()).map_err(|e| Failure::at(part.path(), e))?;
    let archive = entries.flatten().map(|entry| entry.path()).next();
    let archive = archive.ok_or_else(|| failed(Failure::new("apt-get left no package")))?;
    let found = fetch::sha256(&archive).map_err(|e| Failure::at(&archive, e))?;
    if found != FASHION_SHA256 {
        return Err(Failure::new(format!(
            "{FASHION} {FASHION_VERSION}: the package's sha256 should be {FASHION_SHA256} and is {found}; it \
             was not used"
        )));
    }
    let fresh = part.path().join("unpacked");
    exec::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&fresh)).map_err(failed)?;
    match fs::rename(&fresh, &folder) {
        Err(_) if folder.is_dir() => {}
        done => done.map_err(|e| Failure::at(&folder, e))?,
    }
    Ok(folder.join(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_file_are_a_file() {
        let labels = [0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9];
        assert_eq!(first(&labels, 2, 1).expect("fits"), [0, 0, 8, 1, 0, 0, 0, 2, 7, 8]);
        let error = first(&labels, 4, 1).expect_err("has three").to_string();
        assert!(error.contains("expected 4 of them or more, found 3"), "{error}");
    }
}
