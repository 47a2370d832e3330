//! HiRA: `W' = W + W ⊙ (A·B)`, a thin product that scales each weight (Hadamard high-rank adaptation).

use crate::common::{drop, positive, probability};
use crate::lycoris::indexable;
use crate::source::{Draw, Drawn, Read, Source};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed, widened,
};
use burn_peft_kernels::linear;
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// HiRA (ICLR 2025, OpenReview TwJrTz9cRS): `Δ(W) = W ⊙ (A·B)`, of a rank up to `r` times `W`'s own.
///
/// `A [fan_in, r]`, `B [r, fan_out]`, without a scale. `A ~ U(±1/√fan_in)`, `B = 0`; in embeddings
/// `A = 0`, `B ~ N(0, 1)`. Parameters: `r·(fan_in + fan_out)` a place. Folds. Names and defaults are HF
/// PEFT's.
///
/// A Hadamard product with `W` has no cheaper way than the weight, so that linear layers and convolutions
/// compose it on each call; an embedding multiplies the rows that it looked up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hira {
    /// Rank of the product; default 32.
    pub r: usize,
    /// Probability with which an input of the difference is zeroed in training; default 0. As in HF
    /// PEFT, not in embeddings.
    pub hira_dropout: f64,
    /// How `A` and `B` begin; default `true`.
    pub init_weights: HiraInit,
    /// HF PEFT 0.21.2 reads other ranks here and gives every layer `r` all the same. So does loading here,
    /// for such files to fit; a new adapter refuses it.
    pub rank_pattern: IndexMap<String, usize>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Hira {
    fn default() -> Self {
        Self {
            r: 32,
            hira_dropout: 0.0,
            init_weights: HiraInit::Default(true),
            rank_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// How HiRA's factors begin: HF PEFT's `init_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HiraInit {
    /// `true`: an identity at the start. `false`: all of `N(0, 1)`, which serves tests.
    Default(bool),
    /// "gaussian": `A ~ N(0, 1/r²)` on linear layers, elsewhere as `true`.
    Named(String),
}

/// What HiRA trains at one place.
#[derive(Module, Debug)]
pub struct HiraAdapter {
    /// `A [fan_in, r]`.
    pub hira_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub hira_b: Param<Tensor<2>>,
    /// Drops inputs in training.
    pub dropout: Dropout,
}

impl HiraAdapter {
    fn drop<const D: usize>(&self, x: &Tensor<D>) -> Tensor<D> {
        drop(x, &self.dropout, &self.hira_a.val())
    }
}

impl Adapter for HiraAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let delta = self.weight(&widened(layer.weight.val()))?;
        Some(linear(self.drop(x), delta, None).cast(y.dtype()))
    }

    /// One matmul in place of two, where the difference sees the same input as the layer.
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let drops = self.dropout.prob > 0.0
            && self.dropout.training.is_enabled()
            && self.hira_a.val().is_autodiff();
        if drops { None } else { composed::linear(self, layer, x) }
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let h = embedding(self.hira_a.val(), ids.clone()); // [batch, seq, r]
        Some(y.clone() * linear(h, self.hira_b.val(), None).cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(composed::conv1d(self, layer, &self.drop(x))?.cast(y.dtype()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        Some(composed::conv2d(self, layer, &self.drop(x))?.cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for HiraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (a, b) = (self.hira_a.val(), self.hira_b.val());
        Some(w.clone().cast(a.dtype()) * a.matmul(b))
    }
}

impl Hira {
    /// With this rank and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<HiraAdapter, Error> {
        let (r, fan_in, out) = (self.r, site.fan_in(), site.fan_out());
        indexable(r, r.checked_mul(fan_in + out), site)?;
        let (a, b) = match *site.weight.shape().as_slice() {
            _ if site.kind == Kind::Embedding => (
                from.take("hira_embedding_A", [r, fan_in])?,
                from.take("hira_embedding_B", [out, r])?,
            ),
            [_, c, k] => (
                from.take("hira_A", [r, c, k])?.reshape([r, fan_in]),
                from.take("hira_B", [out, r, 1])?.reshape([out, r]),
            ),
            [_, c, h, w] => (
                from.take("hira_A", [r, c, h, w])?.reshape([r, fan_in]),
                from.take("hira_B", [out, r, 1, 1])?.reshape([out, r]),
            ),
            _ => (from.take("hira_A", [r, fan_in])?, from.take("hira_B", [out, r])?),
        };
        Ok(HiraAdapter {
            hira_a: Param::from_tensor(a.transpose()),
            hira_b: Param::from_tensor(b.transpose()),
            dropout: DropoutConfig::new(self.hira_dropout).init(),
        })
    }
}

impl Method for Hira {
    type Adapter = HiraAdapter;
    type Shared = ();
    const NAME: &'static str = "HIRA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];
    const FASTER: &'static [&'static str] = &["hira_b"];

    fn weight_only(&self) -> bool {
        true
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        if let HiraInit::Named(name) = &self.init_weights
            && !name.eq_ignore_ascii_case("gaussian")
        {
            let reason = format!("expected true, false or \"gaussian\", found `{name}`");
            return Err(Error::config("init_weights", reason));
        }
        positive("r", self.r)?;
        probability("hira_dropout", self.hira_dropout)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights != HiraInit::Default(false)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<HiraAdapter, Error> {
        if !self.rank_pattern.is_empty() {
            let reason = "expected none, for HF PEFT ignores it and could not load the adapter";
            return Err(Error::config("rank_pattern", reason));
        }
        let draw = |name: &str, shape: &[usize]| match (&self.init_weights, name) {
            (HiraInit::Default(false), _) | (_, "hira_embedding_B") => Draw::Normal(1.0),
            (_, "hira_B" | "hira_embedding_A") => Draw::Zeros,
            (HiraInit::Named(_), _) if site.kind == Kind::Linear => {
                Draw::Normal(1.0 / shape[0] as f32)
            }
            _ => Draw::kaiming(shape),
        };
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &HiraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, targets.clone());
        vec![
            Self { hira_dropout: 0.2, ..plain.clone() },
            Self { init_weights: HiraInit::Default(false), ..plain.clone() },
            Self { init_weights: HiraInit::Named("gaussian".into()), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r * (site.fan_in() + site.fan_out())
    }

    fn tensors(&self, site: &Site, adapter: &HiraAdapter) -> Vec<(&'static str, TensorData)> {
        let (a, b) = (adapter.hira_a.val().transpose(), adapter.hira_b.val().transpose());
        let r = a.dims()[0];
        let (a, b) = match *site.weight.shape().as_slice() {
            [out, c, k] => (a.reshape([r, c, k]).into_data(), b.reshape([out, r, 1]).into_data()),
            [out, c, h, w] => {
                (a.reshape([r, c, h, w]).into_data(), b.reshape([out, r, 1, 1]).into_data())
            }
            _ => (a.into_data(), b.into_data()),
        };
        match site.kind {
            Kind::Embedding => vec![("hira_embedding_A", a), ("hira_embedding_B", b)],
            _ => vec![("hira_A", a), ("hira_B", b)],
        }
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<HiraAdapter, Error> {
        self.adapter(site, &mut Read { file, device })
    }
}
