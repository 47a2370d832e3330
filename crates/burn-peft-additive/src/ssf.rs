//! SSF: outputs scaled and shifted (arXiv 2210.08823).

use crate::numbers::Draw;
use crate::scale_shift::{self, ScaleShift};
use crate::source::{Source, by_source};
use burn::tensor::TensorData;
use burn_peft_core::{Error, Fold, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Scale and shift features (arXiv 2210.08823): `y' = y ⊙ γ + β`, `γ ~ N(1, 0.02²)` and `β ~ N(0, 0.02²)`,
/// each `[fan_out]`.
///
/// Over linear layers and convolutions; the paper has one after every operation. Where it follows a norm,
/// [`LnTuning`](crate::LnTuning) is the same function. Parameters: `2·fan_out` a place. Folds. HF PEFT does not
/// have it; the file holds `ssf_scale` and `ssf_shift`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ssf {
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

const NAMES: [&str; 2] = ["ssf_scale", "ssf_shift"];

impl Ssf {
    /// Over these layers.
    pub fn new(targets: Targets) -> Self {
        Self { targets }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ScaleShift, Error> {
        ScaleShift::build(site, NAMES, [Draw::Normal(1.0, 0.02), Draw::Normal(0.0, 0.02)], from)
    }
}

impl Method for Ssf {
    type Adapter = ScaleShift;
    type Shared = ();
    const NAME: &'static str = "SSF";
    const KINDS: &'static [Kind] = scale_shift::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(ScaleShift);

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn fold(adapter: &ScaleShift) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self::new(targets.clone())]
    }

    fn parameters(&self, site: &Site) -> usize {
        2 * site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &ScaleShift) -> Vec<(&'static str, TensorData)> {
        adapter.tensors(NAMES)
    }
}
