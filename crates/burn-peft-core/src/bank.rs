//! Several named adapters over one model, and which of them count.

use crate::{Adapter, Adapters, Error, Laid, Overlay, Strength};
use burn::module::{Module, ModuleDisplay};
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::collections::BTreeMap;

/// The name of "no adapter" in [`Bank::rows`], as HF PEFT writes it.
pub const BASE: &str = "__base__";

/// Named adapters over one model.
#[derive(Debug, Clone)]
pub struct Bank<A: Module + ModuleDisplay> {
    adapters: BTreeMap<String, Adapters<A>>,
}

impl<A: Module + ModuleDisplay> Default for Bank<A> {
    fn default() -> Self {
        Self { adapters: BTreeMap::new() }
    }
}

impl<A: Module + ModuleDisplay + Adapter> Bank<A> {
    /// An empty bank.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts adapters in under a name; returns those that had it before.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        adapters: Adapters<A>,
    ) -> Option<Adapters<A>> {
        self.adapters.insert(name.into(), adapters)
    }

    /// Takes adapters out.
    pub fn remove(&mut self, name: &str) -> Option<Adapters<A>> {
        self.adapters.remove(name)
    }

    /// The adapters of that name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names there are.
    pub fn get(&self, name: &str) -> Result<&Adapters<A>, Error> {
        self.adapters.get(name).ok_or_else(|| Error::Unknown {
            name: name.to_owned(),
            held: self.adapters.keys().cloned().collect(),
        })
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// One adapter, fully.
    ///
    /// # Errors
    /// A name that the bank does not hold.
    pub fn only(&self, name: &str) -> Result<Selection<'_, A>, Error> {
        self.mix(&[(name, 1.0)])
    }

    /// A weighted sum of effects: `y0 + Σ wᵢ·δᵢ`. Exact, whatever the ranks. What stands in front of a
    /// sequence counts `wᵢ` times in every attention, and all of it stands there.
    ///
    /// # Errors
    /// A name that the bank does not hold; a weight below 0 for what stands in front of a sequence.
    pub fn mix(&self, parts: &[(&str, f64)]) -> Result<Selection<'_, A>, Error> {
        let parts = parts.iter().filter(|(_, weight)| *weight != 0.0);
        let parts = parts.map(|(name, weight)| {
            let adapters = self.get(name)?;
            match in_front(adapters).filter(|_| weight.is_nan() || *weight < 0.0) {
                None => Ok((adapters, Share::Scale(*weight))),
                Some(path) => {
                    let reason = format!(
                        "`{name}` stands in front of the sequence, where it may count 0 times or more; \
                         found the weight {weight}"
                    );
                    Err(Error::place(path, reason))
                }
            }
        });
        Ok(Selection { parts: parts.collect::<Result<_, Error>>()? })
    }

    /// One adapter a row of the batch, by name; [`BASE`] for none.
    ///
    /// # Errors
    /// A name that the bank does not hold; adapters of some rows only that stand in front of sequences, whose
    /// tokens would then have other positions than those of the rows beside them.
    pub fn rows(&self, names: &[&str], device: &Device) -> Result<Selection<'_, A>, Error> {
        let mut by_name: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
        for (row, name) in names.iter().enumerate() {
            if *name != BASE {
                let row = i32::try_from(row)
                    .map_err(|_| Error::config("adapter_names", "has more than 2^31 rows"))?;
                by_name.entry(name).or_default().push(row);
            }
        }
        let device = device.clone().inner();
        let parts = by_name.into_iter().map(|(name, rows)| {
            let adapters = self.get(name)?;
            if rows.len() == names.len() {
                return Ok((adapters, Share::Scale(1.0)));
            }
            let shape = [rows.len()];
            if let Some(path) = in_front(adapters) {
                let reason = format!(
                    "`{name}` stands in front of the sequence, which all rows of a batch have in common; \
                     give it to every row, or run rows with other adapters apart"
                );
                return Err(Error::place(path, reason));
            }
            Ok((
                adapters,
                Share::Rows(Box::new(Tensor::from_data(TensorData::new(rows, shape), &device))),
            ))
        });
        Ok(Selection { parts: parts.collect::<Result<_, Error>>()? })
    }
}

/// The first place, if any, where something stands in front of the sequence.
fn in_front<A: Module + ModuleDisplay + Adapter>(adapters: &Adapters<A>) -> Option<&str> {
    adapters.iter().find(|(_, adapter)| adapter.virtual_tokens() > 0).map(|(path, _)| path)
}

#[derive(Debug, Clone)]
enum Share {
    Scale(f64),
    Rows(Box<Tensor<1, Int>>),
}

/// Some adapters of a bank, each with its strength: an [`Overlay`].
#[derive(Debug, Clone)]
pub struct Selection<'b, A: Module + ModuleDisplay> {
    parts: Vec<(&'b Adapters<A>, Share)>,
}

impl<A: Module + ModuleDisplay + Adapter> Overlay for Selection<'_, A> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        for (adapters, share) in &self.parts {
            let strength = || match share {
                Share::Scale(weight) => Strength::Scale(*weight),
                Share::Rows(rows) => Strength::Rows(rows),
            };
            if let Some(adapter) = adapters.get(path) {
                laid.push(Laid { adapter, strength: strength() });
            }
            if let Some(copy) = adapters.copy(path) {
                laid.push(Laid { adapter: copy, strength: strength() });
            }
        }
    }

    fn by_token(&self) -> bool {
        self.parts.iter().all(|(adapters, _)| adapters.by_token())
    }

    fn rows_alike(&self) -> bool {
        self.parts.iter().all(|(_, share)| matches!(share, Share::Scale(_)))
    }
}
