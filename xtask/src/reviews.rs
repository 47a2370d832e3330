//! Movie review snippets as a classification task: `id, mean rating, text` becomes three TSV files.

use crate::assets::REVIEWS;
use crate::failure::Failure;
use crate::{fetch, places};
use flate2::read::GzDecoder;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

/// A text and whether it is positive.
#[derive(Debug, Clone, PartialEq)]
struct Review {
    text: String,
    positive: bool,
}

/// The files of a split.
#[derive(Debug)]
pub(crate) struct Split {
    /// Their folder.
    pub(crate) folder: PathBuf,
    /// Number of all reviews.
    pub(crate) reviews: usize,
    /// Number of those in `test.tsv`.
    pub(crate) tested: usize,
}

/// Splits the reviews of a file (the ratings themselves, or a `.tar.gz` with them inside) into
/// `train.tsv`, `validation.tsv` and `test.tsv`, in a folder of the cache.
pub(crate) fn prepare(source: &Path, seed: u64) -> Result<Split, Failure> {
    let bytes = read(source).map_err(|e| Failure::at(source, e))?;
    let reviews = labelled(&decode(&bytes)).map_err(|e| Failure::at(source, e))?;
    let sum = fetch::sha256(source).map_err(|e| Failure::at(source, e))?;
    let cache = places::cache()?.join("data");
    let folder = cache.join(format!("movie-reviews-{}-seed-{seed}", &sum[..12]));
    let count = reviews.len();
    let parts = split(reviews, seed);
    let done = Split { folder, reviews: count, tested: parts[2].1.len() };
    if !done.folder.is_dir() {
        places::make(&cache)?;
        write(&parts, &cache, &done.folder).map_err(|e| Failure::at(&done.folder, e))?;
    }
    Ok(done)
}

fn read(source: &Path) -> io::Result<Vec<u8>> {
    let file = BufReader::new(File::open(source)?);
    if source.extension().is_some_and(|ending| ending == "gz" || ending == "tgz") {
        let found = in_archive(GzDecoder::new(file))?;
        return found
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("holds no {REVIEWS}")));
    }
    let mut bytes = Vec::new();
    { file }.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The ratings in an archive, or in an archive inside it.
fn in_archive(tar: impl Read) -> io::Result<Option<Vec<u8>>> {
    for entry in tar::Archive::new(tar).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if path.ends_with(REVIEWS) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            return Ok(Some(bytes));
        }
        if path.extension().is_some_and(|ending| ending == "gz") {
            // Boxed, or the type would contain itself.
            let inner: Box<dyn Read> = Box::new(GzDecoder::new(entry));
            if let Some(bytes) = in_archive(inner)? {
                return Ok(Some(bytes));
            }
        }
    }
    Ok(None)
}

/// UTF-8 where the bytes are that, else latin-1, of which every byte is a character.
fn decode(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|&byte| char::from(byte)).collect(),
    }
}

fn labelled(text: &str) -> Result<Vec<Review>, String> {
    let mut reviews = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = index + 1;
        let expected =
            || format!("line {number}: expected an id, a number and a text between tabs");
        let mut fields = line.splitn(3, '\t').skip(1);
        let (Some(mean), Some(text)) = (fields.next(), fields.next()) else {
            return Err(expected());
        };
        let mean: f64 = mean.trim().parse().map_err(|_| expected())?;
        let text = text.replace('\t', " ").trim().to_owned();
        // Neither one nor the other teaches nothing.
        if mean != 0.0 && !text.is_empty() {
            reviews.push(Review { text, positive: mean > 0.0 });
        }
    }
    if reviews.len() < 10 {
        return Err(format!("expected at least 10 rated reviews, found {}", reviews.len()));
    }
    Ok(reviews)
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, seeded, and the same everywhere for ever.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, by the high half of a product.
    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }
}

type Parts = [(&'static str, Vec<Review>); 3];

/// Shuffles (Fisher and Yates, from the end) and takes 80, 10 and 10 percent.
fn split(mut reviews: Vec<Review>, seed: u64) -> Parts {
    let mut random = SplitMix64(seed);
    for last in (1..reviews.len()).rev() {
        reviews.swap(last, random.below(last + 1));
    }
    let tenth = reviews.len() / 10;
    let mut validation = reviews.split_off(reviews.len() * 8 / 10);
    let test = validation.split_off(tenth);
    [("train.tsv", reviews), ("validation.tsv", validation), ("test.tsv", test)]
}

/// Writes the files into a fresh folder that then gets its name: all of them or none.
fn write(parts: &Parts, above: &Path, folder: &Path) -> io::Result<()> {
    let fresh = tempfile::tempdir_in(above)?;
    for (name, reviews) in parts {
        let mut text = String::from("text\tlabel\n");
        for Review { text: review, positive } in reviews {
            let label = if *positive { "positive" } else { "negative" };
            text.push_str(&format!("{review}\t{label}\n"));
        }
        fs::write(fresh.path().join(name), text)?;
    }
    match fs::rename(fresh.path(), folder) {
        Err(_) if folder.is_dir() => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn many(count: usize) -> Vec<Review> {
        (0..count).map(|i| Review { text: format!("review {i}"), positive: i % 2 == 0 }).collect()
    }

    #[test]
    fn the_generator_is_splitmix64() {
        // The first numbers of the reference implementation for the seed 1234567.
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn splits_are_eighty_ten_ten_and_repeat() {
        let parts = split(many(10_568), 42);
        assert_eq!(parts.each_ref().map(|(_, part)| part.len()), [8_454, 1_056, 1_058]);
        assert_eq!(parts, split(many(10_568), 42));
        assert_ne!(parts, split(many(10_568), 43));
        let mut all: Vec<_> = parts.iter().flat_map(|(_, part)| part).map(|r| &r.text).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 10_568);
    }

    #[test]
    fn utf8_is_kept_and_latin1_is_read() {
        assert_eq!(decode("cliché –".as_bytes()), "cliché –");
        assert_eq!(decode(b"clich\xe9"), "cliché");
    }

    #[test]
    fn labels_are_signs_and_zeros_are_dropped() {
        let mut text: String = (1..=9).map(|i| format!("{i}\t1.5\tfine {i}\r\n")).collect();
        text.push_str("10\t0.0\tneither\n11\t-0.2\tbad\tvery\n");
        let reviews = labelled(&text).expect("is well formed");
        assert_eq!(reviews.len(), 10);
        assert_eq!(reviews[0], Review { text: "fine 1".into(), positive: true });
        assert_eq!(reviews[9], Review { text: "bad very".into(), positive: false });
    }

    #[test]
    fn other_files_are_refused_with_the_line() {
        assert!(labelled("1\t2.0\tgood\nnonsense\n").is_err_and(|e| e.starts_with("line 2:")));
        assert!(labelled("1\tmany\tgood\n").is_err_and(|e| e.starts_with("line 1:")));
        assert!(labelled("").is_err_and(|e| e.contains("found 0")));
    }
}
