//! Which numbers of a model are trained, as a value: it can be saved, read, and combined with others.

use burn::tensor::TensorData;
use burn_peft_core::{Error, TensorFile, write_tensors};
use std::collections::BTreeMap;
use std::path::Path;

/// What stands after a parameter's name in a mask's file, for the chosen numbers and for its sizes.
const PARTS: [&str; 2] = ["indices", "shape"];

/// The chosen numbers of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    shape: Vec<usize>,
    indices: Vec<u32>,
}

impl Chosen {
    /// Of a parameter of this shape, its numbers counted from 0 as the Hugging Face checkpoint lays them out,
    /// row by row; `None` where one lies outside. Order and repetition do not matter.
    pub fn new(shape: Vec<usize>, indices: impl IntoIterator<Item = u32>) -> Option<Self> {
        let size = shape.iter().try_fold(1_usize, |size, axis| size.checked_mul(*axis))?;
        let mut indices: Vec<u32> = indices.into_iter().collect();
        indices.sort_unstable();
        indices.dedup();
        let fits = indices.last().is_none_or(|last| (*last as usize) < size);
        fits.then_some(Self { shape, indices })
    }

    /// All numbers of a parameter of this shape; `None` where they cannot be counted in 32 bits.
    pub fn all(shape: Vec<usize>) -> Option<Self> {
        let size = shape.iter().try_fold(1_usize, |size, axis| size.checked_mul(*axis))?;
        Self::new(shape, 0..u32::try_from(size).ok()?)
    }

    /// Sizes of the parameter's axes in the Hugging Face checkpoint.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The chosen numbers, in order.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }
}

/// Which numbers of which parameters are chosen, by the parameters' names in the Hugging Face checkpoint, such
/// as `encoder.layer.0.attention.self.query.weight`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask {
    chosen: BTreeMap<String, Chosen>,
}

impl FromIterator<(String, Chosen)> for Mask {
    /// Parameters of which nothing is chosen are left out.
    fn from_iter<I: IntoIterator<Item = (String, Chosen)>>(parameters: I) -> Self {
        let some = |(_, chosen): &(String, Chosen)| !chosen.indices.is_empty();
        Self { chosen: parameters.into_iter().filter(some).collect() }
    }
}

impl Mask {
    /// What is chosen of the parameter of that name.
    pub fn get(&self, parameter: &str) -> Option<&Chosen> {
        self.chosen.get(parameter)
    }

    /// Parameters of which something is chosen, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Chosen)> {
        self.chosen.iter().map(|(name, chosen)| (name.as_str(), chosen))
    }

    /// How many numbers are chosen.
    pub fn count(&self) -> usize {
        self.chosen.values().map(|chosen| chosen.indices.len()).sum()
    }

    /// What either chooses.
    ///
    /// # Errors
    /// A parameter that has another shape in the other.
    pub fn union(&self, other: &Self) -> Result<Self, Error> {
        self.combined(other, |here, there| here || there)
    }

    /// What both choose.
    ///
    /// # Errors
    /// As [`Mask::union`].
    pub fn intersection(&self, other: &Self) -> Result<Self, Error> {
        self.combined(other, |here, there| here && there)
    }

    /// What this one chooses and the other does not.
    ///
    /// # Errors
    /// As [`Mask::union`].
    pub fn difference(&self, other: &Self) -> Result<Self, Error> {
        self.combined(other, |here, there| here && !there)
    }

    fn combined(&self, other: &Self, keep: impl Fn(bool, bool) -> bool) -> Result<Self, Error> {
        let mut names: Vec<&String> = self.chosen.keys().chain(other.chosen.keys()).collect();
        names.sort();
        names.dedup();
        let one = |name: &String| {
            let both = [self, other].map(|mask| mask.chosen.get(name));
            if let [Some(here), Some(there)] = both
                && here.shape != there.shape
            {
                let (expected, found) = (&here.shape, &there.shape);
                return Err(Error::tensor(
                    name,
                    format!("shape {expected:?}"),
                    format!("shape {found:?} in the other mask"),
                ));
            }
            let [here, there] = both.map(|chosen| chosen.map_or(&[][..], Chosen::indices));
            let mut all = [here, there].concat();
            all.sort_unstable();
            all.dedup();
            let has = |indices: &[u32], at: &u32| indices.binary_search(at).is_ok();
            all.retain(|at| keep(has(here, at), has(there, at)));
            let shape = both.into_iter().flatten().next().map_or(Vec::new(), |c| c.shape.clone());
            Ok((name.clone(), Chosen { shape, indices: all }))
        };
        names.into_iter().map(one).collect()
    }

    /// Writes the mask as a safetensors file: of each parameter the tensors `NAME.indices [n]` and
    /// `NAME.shape [axes]`, of type I32.
    ///
    /// # Errors
    /// What the operating system says; a parameter of more than 2³¹ numbers.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut tensors = Vec::new();
        for (name, chosen) in &self.chosen {
            let [indices, shape] = PARTS.map(|part| format!("{name}.{part}"));
            tensors.push((indices.clone(), index_data(&indices, &chosen.indices)?));
            tensors.push((shape, shape_data(&chosen.shape)));
        }
        write_tensors(path, tensors.iter().map(|(name, data)| (name.clone(), data)))
    }

    /// Reads what [`Mask::save`] wrote.
    ///
    /// # Errors
    /// A file that is no mask.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let mut file = TensorFile::open(path)?;
        let end = format!(".{}", PARTS[0]);
        let names: Vec<String> =
            file.names().filter_map(|name| name.strip_suffix(&end)).map(str::to_owned).collect();
        let mut chosen = BTreeMap::new();
        for name in names {
            let [indices, shape] = PARTS.map(|part| format!("{name}.{part}"));
            let (_, indices) = file.take_ints(&indices)?;
            let (_, shape) = file.take_ints(&shape)?;
            chosen.insert(name.clone(), chosen_of(&name, &shape, &indices)?);
        }
        match file.names().next() {
            Some(left) => Err(Error::tensor(left, "only the tensors of a mask", "it")),
            None => Ok(Self { chosen }),
        }
    }
}

/// Indices as a file holds them.
pub(crate) fn index_data(name: &str, indices: &[u32]) -> Result<TensorData, Error> {
    let held: Option<Vec<i32>> = indices.iter().map(|at| i32::try_from(*at).ok()).collect();
    let count = indices.len();
    match held {
        Some(held) => Ok(TensorData::new(held, [count])),
        None => Err(Error::tensor(name, "indices below 2^31", "a larger one")),
    }
}

/// A shape as a file holds it.
pub(crate) fn shape_data(shape: &[usize]) -> TensorData {
    let axes: Vec<i32> =
        shape.iter().map(|axis| i32::try_from(*axis).unwrap_or(i32::MAX)).collect();
    let count = axes.len();
    TensorData::new(axes, [count])
}

/// What a file holds of a parameter, refused unless its indices rise and lie within.
pub(crate) fn chosen_of(name: &str, shape: &[i64], indices: &[i64]) -> Result<Chosen, Error> {
    let axes: Option<Vec<usize>> = shape.iter().map(|axis| usize::try_from(*axis).ok()).collect();
    let within: Option<Vec<u32>> = indices.iter().map(|at| u32::try_from(*at).ok()).collect();
    let rising = indices.windows(2).all(|pair| pair[0] < pair[1]);
    let chosen = axes.zip(within).and_then(|(axes, within)| Chosen::new(axes, within));
    match chosen.filter(|_| rising) {
        Some(chosen) => Ok(chosen),
        None => Err(Error::tensor(
            format!("{name}.indices"),
            format!("rising indices within a parameter of shape {shape:?}"),
            "others",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(parameters: &[(&str, &[u32])]) -> Mask {
        let one = |(name, indices): &(&str, &[u32])| {
            let chosen = Chosen::new(vec![2, 4], indices.iter().copied()).expect("lies within");
            ((*name).to_owned(), chosen)
        };
        parameters.iter().map(one).collect()
    }

    #[test]
    fn masks_combine_as_sets_do() {
        let a = mask(&[("a.weight", &[5, 1, 3, 1]), ("b.weight", &[0])]);
        let b = mask(&[("a.weight", &[3, 7]), ("c.weight", &[2])]);
        assert_eq!(a.get("a.weight").expect("is there").indices(), [1, 3, 5]);
        let all = mask(&[("a.weight", &[1, 3, 5, 7]), ("b.weight", &[0]), ("c.weight", &[2])]);
        assert_eq!(a.union(&b).expect("fit"), all);
        assert_eq!(a.intersection(&b).expect("fit"), mask(&[("a.weight", &[3])]));
        let left = mask(&[("a.weight", &[1, 5]), ("b.weight", &[0])]);
        assert_eq!(a.difference(&b).expect("fit"), left);
        assert_eq!((a.count(), all.count()), (4, 6));
        // |A| + |B| = |A ∪ B| + |A ∩ B|, and A is what is left of it and what both have.
        assert_eq!(left.union(&a.intersection(&b).expect("fit")).expect("fit"), a);
        let other = Chosen::new(vec![8], [1]).expect("lies within");
        let other: Mask = [("a.weight".to_owned(), other)].into_iter().collect();
        let said = a.union(&other).expect_err("has another shape").to_string();
        assert!(said.contains("a.weight") && said.contains("[2, 4]"), "{said}");
        assert!(Chosen::new(vec![2, 4], [8]).is_none());
    }

    #[test]
    fn a_mask_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let path = folder.path().join("mask.safetensors");
        let a = mask(&[("a.weight", &[5, 1, 3]), ("b.weight", &[0])]);
        a.save(&path).expect("is written");
        assert_eq!(Mask::load(&path).expect("is whole"), a);
        let broken = [("a.weight.indices".to_owned(), TensorData::new(vec![3, 1], [2]))];
        let shape = ("a.weight.shape".to_owned(), TensorData::new(vec![2, 4], [2]));
        let tensors: Vec<_> = broken.into_iter().chain([shape]).collect();
        write_tensors(&path, tensors.iter().map(|(n, d)| (n.clone(), d))).expect("is written");
        let said = Mask::load(&path).expect_err("does not rise").to_string();
        assert!(said.contains("a.weight.indices") && said.contains("rising"), "{said}");
    }
}
