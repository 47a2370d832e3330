//! Images with labels: a folder for each class, or the idx files that MNIST comes in.

use super::error::DataError;
use super::{ClassBatch, Preprocessor};
use burn_peft_models::Images;
use flate2::read::GzDecoder;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// An image in bytes, `[height][width][channels]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) pixels: Vec<u8>,
    /// Height and width.
    pub(crate) sides: [usize; 2],
    /// 1 or 3.
    pub(crate) channels: usize,
}

impl Picture {
    /// Of a PNG or JPEG file. What it says of transparency is left out.
    fn open(path: &Path) -> Result<Self, DataError> {
        let wrong = |e: &dyn std::fmt::Display| {
            DataError::file(path, format!("is not a whole PNG or JPEG image: {e}"))
        };
        let file = File::open(path).map_err(|e| DataError::io(path, e))?;
        // By what it holds, not by its name.
        let reader = image::ImageReader::new(BufReader::new(file));
        let reader = reader.with_guessed_format().map_err(|e| DataError::io(path, e))?;
        let image = reader.decode().map_err(|e| wrong(&e))?;
        let sides = [image.height() as usize, image.width() as usize];
        let (pixels, channels) = match image.color().has_color() {
            true => (image.into_rgb8().into_raw(), 3),
            false => (image.into_luma8().into_raw(), 1),
        };
        Ok(Self { pixels, sides, channels })
    }

    /// The middle, black where it is larger than the picture. With an odd rest the larger half is below and to
    /// the right; that of a black margin, above and to the left.
    pub(crate) fn middle(&self, sides: [usize; 2]) -> Self {
        let [height, width] = self.sides;
        let first = |own: usize, cut: usize| (own as isize - cut as isize).div_euclid(2);
        let (top, left) = (first(height, sides[0]), first(width, sides[1]));
        let mut pixels = Vec::with_capacity(sides[0] * sides[1] * self.channels);
        for row in 0..sides[0] {
            for column in 0..sides[1] {
                let row = row.checked_add_signed(top).filter(|row| *row < height);
                let column = column.checked_add_signed(left).filter(|column| *column < width);
                match (row, column) {
                    (Some(row), Some(column)) => {
                        let at = (row * width + column) * self.channels;
                        pixels.extend_from_slice(&self.pixels[at..at + self.channels]);
                    }
                    _ => pixels.extend(std::iter::repeat_n(0, self.channels)),
                }
            }
        }
        Self { pixels, sides, channels: self.channels }
    }
}

/// An image, perhaps with its label.
#[derive(Debug, Clone)]
pub struct ImageExample {
    /// Its file, or its number in one.
    pub name: String,
    /// The label; empty where there is none.
    pub label: String,
    picture: Picture,
    /// Whether it is resized and cut already: whichever is smaller is kept.
    fitted: bool,
}

impl ImageExample {
    fn new(name: String, label: String, picture: Picture, preprocessor: &Preprocessor) -> Self {
        let size = |sides: [usize; 2]| sides[0].saturating_mul(sides[1]);
        let fitted = size(preprocessor.sides(picture.sides)) <= size(picture.sides);
        let picture = if fitted { preprocessor.fit(picture) } else { picture };
        Self { name, label, picture, fitted }
    }

    fn fit(&self, preprocessor: &Preprocessor) -> Picture {
        let picture = self.picture.clone();
        if self.fitted { picture } else { preprocessor.fit(picture) }
    }
}

/// Reads images that all have labels, as [`read_images`] does.
///
/// # Errors
/// As there, and an image without a label.
pub fn read_labelled_images(
    path: &Path,
    preprocessor: &Preprocessor,
) -> Result<Vec<ImageExample>, DataError> {
    let examples = read_images(path, preprocessor)?;
    match examples.iter().find(|example| example.label.is_empty()) {
        None => Ok(examples),
        Some(example) => Err(DataError::file(
            path,
            format!(
                "{} has no label; expected a folder for each class, or idx images beside a file of labels",
                example.name
            ),
        )),
    }
}

/// Reads images, for a model whose preprocessor this is. A folder holds one for each class, with PNG and JPEG
/// files in them, in the order of their names; what lies beside these has no label. A file is one such image, or
/// idx images, packed by gzip or not, whose labels are in the file of the same name but for `labels` and `idx1` in
/// place of `images` and `idx3`, if there is one.
///
/// # Errors
/// What cannot be read, or not by this model, with its file.
pub fn read_images(
    path: &Path,
    preprocessor: &Preprocessor,
) -> Result<Vec<ImageExample>, DataError> {
    let examples = match path.is_dir() {
        true => {
            let mut examples = folder(path, "", preprocessor)?;
            for class in entries(path)?.iter().filter(|entry| entry.is_dir()) {
                examples.extend(folder(class, &file_name(class), preprocessor)?);
            }
            examples
        }
        false if is_idx(path)? => idx(path, preprocessor)?,
        false => vec![one(path, "", preprocessor)?],
    };
    let Some(first) = examples.first() else {
        return Err(DataError::file(path, "holds no images; expected PNG, JPEG or idx files"));
    };
    let sides = |example: &ImageExample| match example.fitted {
        true => example.picture.sides,
        false => preprocessor.sides(example.picture.sides),
    };
    for example in &examples {
        let colours = (example.picture.channels, preprocessor.colours());
        if colours == (3, 1) {
            let reason = format!("{} is in colours; the model reads grey images", example.name);
            return Err(DataError::file(path, reason));
        }
        if sides(example) != sides(first) {
            let ([a, b], [c, d]) = (sides(first), sides(example));
            return Err(DataError::file(
                path,
                format!(
                    "the model's preprocessor makes {} {a} by {b} and {} {c} by {d}; expected one size for \
                     all, as do_center_crop gives",
                    first.name, example.name
                ),
            ));
        }
    }
    Ok(examples)
}

/// All files that data are read from: the file itself, with its labels if it is one of idx images, or what a
/// folder and those in it hold, in the order in which they are read.
///
/// # Errors
/// What the operating system says.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !path.is_dir() {
        let labels = if is_idx(path)? { labels_of(path) } else { None };
        return Ok(std::iter::once(path.to_owned()).chain(labels).collect());
    }
    let (folders, mut files): (Vec<_>, Vec<_>) =
        entries(path)?.into_iter().partition(|entry| entry.is_dir());
    for folder in folders {
        files.extend(entries(&folder)?.into_iter().filter(|entry| entry.is_file()));
    }
    Ok(files)
}

/// The numbers that a model reads, of some of the images.
pub fn images(examples: &[&ImageExample], preprocessor: &Preprocessor) -> Images {
    let mut images = Images { batch: examples.len(), ..Images::default() };
    for example in examples {
        images.shape = preprocessor.numbers(&example.fit(preprocessor), &mut images.pixels);
    }
    images
}

/// A batch of labelled images.
pub fn image_batch(
    examples: &[ImageExample],
    labels: &[i32],
    picked: &[usize],
    preprocessor: &Preprocessor,
) -> ClassBatch<Images> {
    let chosen: Vec<&ImageExample> = picked.iter().map(|&i| &examples[i]).collect();
    ClassBatch {
        input: images(&chosen, preprocessor),
        labels: picked.iter().map(|&i| labels[i]).collect(),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What a folder holds, in the order of the names, less what is hidden.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let wrong = |e| DataError::io(folder, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(wrong)? {
        let path = entry.map_err(wrong)?.path();
        if !file_name(&path).starts_with('.') {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn folder(
    path: &Path,
    label: &str,
    preprocessor: &Preprocessor,
) -> Result<Vec<ImageExample>, DataError> {
    let mut examples = Vec::new();
    for file in entries(path)?.iter().filter(|entry| entry.is_file()) {
        let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match ["png", "jpg", "jpeg"].contains(&ending.as_str()) {
            true => examples.push(one(file, label, preprocessor)?),
            false => log::warn!("{} is no image and is passed over", file.display()),
        }
    }
    Ok(examples)
}

fn one(path: &Path, label: &str, preprocessor: &Preprocessor) -> Result<ImageExample, DataError> {
    let name = path.display().to_string();
    Ok(ImageExample::new(name, label.to_owned(), Picture::open(path)?, preprocessor))
}

/// The first bytes of idx files of bytes: no dimension, as many follow, is said in the last of the four.
const IDX: [u8; 3] = [0, 0, 8];
const GZIP: [u8; 2] = [0x1f, 0x8b];

fn begin<const N: usize>(path: &Path) -> Result<[u8; N], DataError> {
    let mut first = Vec::new();
    let file = File::open(path).map_err(|e| DataError::io(path, e))?;
    file.take(N as u64).read_to_end(&mut first).map_err(|e| DataError::io(path, e))?;
    first.resize(N, 0xff);
    Ok(std::array::from_fn(|i| first[i]))
}

fn is_idx(path: &Path) -> Result<bool, DataError> {
    Ok(begin::<3>(path)? == IDX || begin::<2>(path)? == GZIP)
}

/// The sizes and the bytes of an idx file with `D` dimensions.
fn read_idx<const D: usize>(path: &Path) -> Result<([usize; D], Vec<u8>), DataError> {
    let wrong = |e| DataError::io(path, e);
    let file = BufReader::new(File::open(path).map_err(wrong)?);
    let mut reader: Box<dyn Read> = match begin::<2>(path)? == GZIP {
        true => Box::new(GzDecoder::new(file)),
        false => Box::new(file),
    };
    let mut word = || -> Result<[u8; 4], DataError> {
        let mut word = [0; 4];
        reader.read_exact(&mut word).map_err(wrong)?;
        Ok(word)
    };
    let magic = word()?;
    if magic[..3] != IDX || usize::from(magic[3]) != D {
        let reason = format!("expected an idx file of bytes in {D} dimensions, found {magic:02x?}");
        return Err(DataError::file(path, reason));
    }
    let mut sizes = [0; D];
    for size in &mut sizes {
        *size = u32::from_be_bytes(word()?) as usize;
    }
    let count = sizes.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
    let count = count.filter(|count| *count > 0 && *count < 1 << 40);
    let Some(count) = count else {
        return Err(DataError::file(path, format!("says that it holds {sizes:?}")));
    };
    let mut bytes = Vec::new();
    // One more than there should be, to see whether there is one.
    reader.take(count as u64 + 1).read_to_end(&mut bytes).map_err(wrong)?;
    match bytes.len() == count {
        true => Ok((sizes, bytes)),
        false => Err(DataError::file(
            path,
            format!("expected {count} bytes for {sizes:?}, found {}", bytes.len()),
        )),
    }
}

/// The file of labels that belongs to one of images, if it is there.
fn labels_of(path: &Path) -> Option<PathBuf> {
    let name = file_name(path).replace("images", "labels").replace("idx3", "idx1");
    let beside = path.with_file_name(name);
    (beside != path && beside.is_file()).then_some(beside)
}

fn idx(path: &Path, preprocessor: &Preprocessor) -> Result<Vec<ImageExample>, DataError> {
    let ([count, height, width], pixels) = read_idx(path)?;
    let name = file_name(path);
    let labels = match labels_of(path) {
        None => None,
        Some(beside) => {
            let ([found], labels) = read_idx(&beside)?;
            if found != count {
                let reason =
                    format!("expected {count} labels, as {name} has images, found {found}");
                return Err(DataError::file(&beside, reason));
            }
            Some(labels)
        }
    };
    let example = |(at, pixels): (usize, &[u8])| {
        let picture = Picture { pixels: pixels.to_vec(), sides: [height, width], channels: 1 };
        let label = labels.as_ref().map_or(String::new(), |labels| labels[at].to_string());
        ImageExample::new(format!("{name} #{at}"), label, picture, preprocessor)
    };
    Ok(pixels.chunks(height * width).enumerate().map(example).collect())
}

#[cfg(test)]
mod tests;
