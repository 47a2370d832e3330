//! LoRA-FA: LoRA with a frozen random `A`; only `B` is trained (arXiv 2308.03303).

use crate::LoraAdapter;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoRA-FA (arXiv 2308.03303): `y = xW + b + s·dropout(x)·A·B` with `A` frozen, so that training keeps
/// `x·A [.., r]` and not `x` for the backward pass.
///
/// `A [fan_in, r]` a random constant, `U(±1/√fan_in)`; `B [r, fan_out]` zero at first;
/// `s = lora_alpha / r`. Parameters: `r·fan_out` a place. Folds. The file holds `A` too.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraFa {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
}

/// What LoRA-FA trains at one place.
#[derive(Module, Debug)]
pub struct LoraFaAdapter {
    /// `A [fan_in, r]`, frozen.
    pub lorafa_a: Tensor<2>,
    /// `B [r, fan_out]`.
    pub lorafa_b: Param<Tensor<2>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl LoraFaAdapter {
    fn lora(&self) -> LoraAdapter {
        crate::lora::LoraAdapter::of(self.lorafa_a.clone(), self.lorafa_b.val(), self.scaling)
    }
}

faces_by_lora!(LoraFaAdapter, lorafa_b);

impl LoraFa {
    fn adapter(&self, site: &Site, (a, b): (Tensor<2>, Tensor<2>)) -> Result<LoraFaAdapter, Error> {
        let [_, r] = a.dims();
        Ok(LoraFaAdapter {
            lorafa_a: a.without_autodiff(),
            lorafa_b: Param::from_tensor(b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for LoraFa {
    type Adapter = LoraFaAdapter;
    type Shared = ();
    const NAME: &'static str = "LORAFA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn draws(&self) -> bool {
        false
    }

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
    ) -> Result<LoraFaAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?)
    }

    fn fold(adapter: &LoraFaAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        LowRank::samples(targets).map(|low_rank| Self { low_rank }).to_vec()
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.rank(site).unwrap_or(self.low_rank.r) * site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &LoraFaAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("lorafa_A", stored(adapter.lorafa_a.clone())),
            ("lorafa_B", stored(adapter.lorafa_b.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraFaAdapter, Error> {
        let pair = self.low_rank.take(site, ["lorafa_A", "lorafa_B"], file, device)?;
        self.adapter(site, pair)
    }
}
