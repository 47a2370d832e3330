//! The Hadamard adapter: outputs of attention scaled and shifted (arXiv 2407.11033).

use crate::numbers::Draw;
use crate::scale_shift::{self, ScaleShift};
use crate::source::{Source, by_source};
use burn::tensor::TensorData;
use burn_peft_core::{Error, Fold, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Hadamard adapter (arXiv 2407.11033): `y' = w ⊙ y + b`, `w` 1 and `b` 0 at first, each `[fan_out]`.
///
/// The paper lays it over the output layer of self-attention (`attention.output.dense` in BERT, `o_proj` in
/// Llama) and trains the norm after it too (`modules_to_save`). Parameters: `2·fan_out` a place. Folds. HF PEFT
/// does not have it; the file holds `hadamard_weight` and `hadamard_bias`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hadamard {
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

const NAMES: [&str; 2] = ["hadamard_weight", "hadamard_bias"];

impl Hadamard {
    /// Over these layers.
    pub fn new(targets: Targets) -> Self {
        Self { targets }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ScaleShift, Error> {
        ScaleShift::build(site, NAMES, [Draw::Constant(1.0), Draw::Constant(0.0)], from)
    }
}

impl Method for Hadamard {
    type Adapter = ScaleShift;
    type Shared = ();
    const NAME: &'static str = "HADAMARD";
    const KINDS: &'static [Kind] = scale_shift::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(ScaleShift);

    fn draws(&self) -> bool {
        false
    }

    fn fold(adapter: &ScaleShift) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let saved = Some(vec!["head".into()]);
        let saving = Targets { modules_to_save: saved, ..targets.clone() };
        vec![Self::new(saving), Self::new(targets.clone())]
    }

    fn parameters(&self, site: &Site) -> usize {
        2 * site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &ScaleShift) -> Vec<(&'static str, TensorData)> {
        adapter.tensors(NAMES)
    }
}
