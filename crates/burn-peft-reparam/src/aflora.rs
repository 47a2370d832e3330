//! AFLoRA: `W' = W + s·A·diag(s_d)·B·diag(s_b)`, whose factors are frozen one by one in training
//! (arXiv 2403.13269).

use crate::LoraAdapter;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// AFLoRA (arXiv 2403.13269): `y = xW + b + s·dropout(x)·A·diag(s_d)·B·diag(s_b)`, which is
/// `W0 + diag(s_b)·B·diag(s_d)·A` in the paper's layout.
///
/// `A [fan_in, r] ~ U(±1/√fan_in)` and `B [r, fan_out] ~ U(±1/√r)`, Kaiming inits as in the paper's
/// figure 1; `s_d [r]` ones (our choice) and `s_b [fan_out]` zeros, so that it begins as an identity;
/// `s = lora_alpha / r`, which is 1 by default (the paper has none). Parameters:
/// `r·(fan_in + fan_out) + r + fan_out` a place. Folds.
///
/// The paper freezes `A` and `B` progressively by a score over their gradients. That is a policy of
/// the training loop; here all four are trained, and the loop decides which still are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AfLora {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
}

/// What AFLoRA trains at one place.
#[derive(Module, Debug)]
pub struct AfLoraAdapter {
    /// `A [fan_in, r]`.
    pub aflora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub aflora_b: Param<Tensor<2>>,
    /// `s_d [r]`.
    pub aflora_s_d: Param<Tensor<1>>,
    /// `s_b [fan_out]`.
    pub aflora_s_b: Param<Tensor<1>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl AfLoraAdapter {
    fn lora(&self) -> LoraAdapter {
        let a = self.aflora_a.val() * self.aflora_s_d.val().unsqueeze(); // A·diag(s_d)
        let b = self.aflora_b.val() * self.aflora_s_b.val().unsqueeze(); // B·diag(s_b)
        crate::lora::LoraAdapter::of(a, b, self.scaling)
    }
}

faces_by_lora!(AfLoraAdapter, aflora_a);

impl AfLora {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        (s_d, s_b): (Tensor<1>, Tensor<1>),
    ) -> Result<AfLoraAdapter, Error> {
        let [_, r] = a.dims();
        Ok(AfLoraAdapter {
            aflora_a: Param::from_tensor(a),
            aflora_b: Param::from_tensor(b),
            aflora_s_d: Param::from_tensor(s_d),
            aflora_s_b: Param::from_tensor(s_b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for AfLora {
    type Adapter = AfLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "AFLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["aflora_s_b"];

    fn targets(&self) -> &Targets {
        &self.low_rank.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.low_rank.targets
    }

    fn biases(&self) -> Biases {
        self.low_rank.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        self.low_rank.check()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<AfLoraAdapter, Error> {
        let (a, b) = self.low_rank.drawn(site, rng, device)?;
        let [r, fan_out] = b.dims();
        let b = uniform([r, fan_out], (1.0 / r as f32).sqrt(), rng, device);
        let scales = (Tensor::ones([r], device), Tensor::zeros([fan_out], device));
        self.adapter(site, (a, b), scales)
    }

    fn fold(adapter: &AfLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        LowRank::samples(targets).map(|low_rank| Self { low_rank }).to_vec()
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.low_rank.rank(site).unwrap_or(self.low_rank.r);
        self.low_rank.numbers(site) + r + site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &AfLoraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("aflora_A", stored(adapter.aflora_a.val())),
            ("aflora_B", stored(adapter.aflora_b.val())),
            ("aflora_s_d", adapter.aflora_s_d.val().into_data()),
            ("aflora_s_b", adapter.aflora_s_b.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<AfLoraAdapter, Error> {
        let pair = self.low_rank.take(site, ["aflora_A", "aflora_B"], file, device)?;
        let s_d = file.take("aflora_s_d", [self.low_rank.rank(site)?], device)?;
        let s_b = file.take("aflora_s_b", [site.fan_out()], device)?;
        self.adapter(site, pair, (s_d, s_b))
    }
}
