//! What all classifiers have in common: classes with names, and scores of them.

use crate::load::Pretrained;
use burn::tensor::Tensor;
use burn_peft_core::{Error, Scope};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// The fields of `config.json` that say what a classifier tells apart.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Classes {
    pub id2label: Option<BTreeMap<String, String>>,
    pub num_labels: Option<usize>,
    pub problem_type: Option<String>,
}

impl Classes {
    /// Number of classes: as many as have names, or `num_labels`, or 2.
    pub fn count(&self) -> usize {
        self.id2label.as_ref().map(BTreeMap::len).or(self.num_labels).unwrap_or(2)
    }

    /// The name of each class, in the order of their numbers.
    pub fn names(&self) -> Vec<String> {
        let named = |id: usize| self.id2label.as_ref()?.get(&id.to_string()).cloned();
        (0..self.count()).map(|id| named(id).unwrap_or(format!("LABEL_{id}"))).collect()
    }

    /// As many, without names.
    pub fn resize(&mut self, count: usize) {
        self.id2label = None;
        self.num_labels = Some(count);
    }

    /// Refuses heads whose outputs are not the scores of classes that exclude each other.
    ///
    /// # Errors
    /// A `problem_type` of regression or of several labels at once, or a single label.
    pub fn check(&self) -> Result<(), Error> {
        const EXPECTED: &str = "single_label_classification";
        match self.problem_type.as_deref() {
            None | Some(EXPECTED) if self.count() > 1 => Ok(()),
            None | Some(EXPECTED) => {
                Err(Error::config("num_labels", "expected two classes or more, found 1"))
            }
            Some(other) => {
                let reason = format!("`{other}` is not implemented; expected {EXPECTED}");
                Err(Error::config("problem_type", reason))
            }
        }
    }
}

/// A model that gives each class a score.
pub trait Classifier: Pretrained {
    /// What it reads: a batch of it.
    type Input: Clone + Debug + Send + Sync + 'static;
    /// Its name among `architectures` of `config.json`.
    const ARCHITECTURE: &'static str;

    /// The classes of a configuration.
    fn classes(config: &Self::Config) -> &Classes;

    /// The same, to be changed before a model is made of it.
    fn classes_mut(config: &mut Self::Config) -> &mut Classes;

    /// Refuses what a forward pass with what `cx` lays over it could not take.
    ///
    /// # Errors
    /// What is wrong with it, or how large it may be.
    fn check(&self, input: &Self::Input, cx: &Scope<'_>) -> Result<(), Error>;

    /// Logits `[batch, classes]`.
    fn forward(&self, input: &Self::Input, cx: &Scope<'_>) -> Tensor<2>;
}
