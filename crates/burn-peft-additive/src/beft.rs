//! BEFT: a bias added to a layer's output (arXiv 2509.15974).

use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Bias-efficient fine-tuning (arXiv 2509.15974): `y = xW + b + b'`, `b' [fan_out]` zero at first.
///
/// Parameters: `fan_out` a place. Folds into the bias, where the layer has one: `Δ(b) = b'`. Names and
/// defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Beft {
    /// Begin with `b' = 0`, the default; otherwise with `N(0, 1)`.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Beft {
    fn default() -> Self {
        Self { init_weights: true, targets: Targets::default() }
    }
}

/// What BEFT trains at one place.
#[derive(Module, Debug)]
pub struct BeftAdapter {
    /// `b' [1, fan_out]`.
    pub beft_bias: Param<Tensor<2>>,
}

impl Adapter for BeftAdapter {
    fn linear(&self, _layer: &Linear, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(self.beft_bias.val().unsqueeze::<3>().expand(y.dims()).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for BeftAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    fn brings_bias(&self) -> bool {
        true
    }

    fn bias(&self, _b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.beft_bias.val().flatten(0, 1))
    }
}

impl Beft {
    /// Over these layers.
    pub fn new(targets: Targets) -> Self {
        Self { targets, ..Self::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<BeftAdapter, Error> {
        let std = if self.init_weights { 0.0 } else { 1.0 };
        let beft_bias = from.take("beft_bias", [1, site.fan_out()], Draw::Normal(0.0, std))?;
        Ok(BeftAdapter { beft_bias })
    }
}

impl Method for Beft {
    type Adapter = BeftAdapter;
    type Shared = ();
    const NAME: &'static str = "BEFT";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["beft_bias"];

    by_source!(BeftAdapter);

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn fold(adapter: &BeftAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(targets.clone());
        vec![Self { init_weights: false, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &BeftAdapter) -> Vec<(&'static str, TensorData)> {
        vec![("beft_bias", adapter.beft_bias.val().into_data())]
    }
}
