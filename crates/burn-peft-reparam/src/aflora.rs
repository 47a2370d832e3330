//! AFLoRA: `W' = W + s·A·diag(s_d)·B·diag(s_b)`, whose factors are frozen one by one in training
//! (arXiv 2403.13269).

use crate::LoraAdapter;
use crate::aflora_policy::Freezing;
use crate::importance::check_betas;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
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
/// Training freezes `A` and `B` one after the other, whole tensors, until `tfinal` steps before the end all
/// of them are: each time those with the lowest score, the mean of `Ī·Ū` over the tensor with `I = |∂w|`.
/// The share of frozen ones is `1 - (1 - t)³`, `t` going from 0 at `tinit` to 1. What is frozen gets no
/// gradient any more and stays so; `s_d` and `s_b` are trained to the end. Score and schedule are
/// written down from memory of the paper, and that the same `beta1` and `beta2` as AdaLoRA's are defaults is
/// our choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AfLora {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Steps before the first factor is frozen; default 0.
    pub tinit: usize,
    /// Steps of training after the last was; default 0.
    pub tfinal: usize,
    /// Steps of the whole training; by default those that the trainer plans.
    pub total_step: Option<usize>,
    /// How slowly the sensitivity of a parameter forgets; default 0.85.
    pub beta1: f64,
    /// How slowly its uncertainty forgets; default 0.85.
    pub beta2: f64,
}

impl Default for AfLora {
    fn default() -> Self {
        Self {
            low_rank: LowRank::default(),
            tinit: 0,
            tfinal: 0,
            total_step: None,
            beta1: 0.85,
            beta2: 0.85,
        }
    }
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
        check_betas(self.beta1, self.beta2)?;
        if let Some(total) = self.total_step
            && self.tinit >= total.saturating_sub(self.tfinal)
        {
            let reason = format!(
                "{} and tfinal {} leave none of total_step {total} for freezing",
                self.tinit, self.tfinal
            );
            return Err(Error::config("tinit", reason));
        }
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
        let [dropping, patterned] = LowRank::samples(targets);
        let late = Self { tinit: 10, tfinal: 10, total_step: Some(100), ..Self::default() };
        vec![
            Self { low_rank: dropping, beta1: 0.5, beta2: 0.9, ..late },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn policy(
        &self,
        adapters: &Adapters<AfLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<AfLoraAdapter>>>, Error> {
        Ok(Some(Box::new(Freezing::new(self, 2 * adapters.iter().count())?)))
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
