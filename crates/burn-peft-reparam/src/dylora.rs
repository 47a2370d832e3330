//! DyLoRA: one training for all ranks up to `r` (arXiv 2210.07558).

use crate::LoraAdapter;
use crate::common::positive;
use crate::dylora_policy::RankSampling;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Buffer, Error, Fold, Kind, Method, PlaceTensors, Policy, Product, Site,
    Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// DyLoRA, dynamic search-free LoRA (arXiv 2210.07558): `y = xW + b + s_b·dropout(x)·A[:, :b]·B[:b, :]` at
/// rank `b`, with `s_b = lora_alpha / b` (`lora_alpha / √b` with `use_rslora`).
///
/// Each step of training draws one `b ~ U{r_min..r}` for the whole model and updates the first `b` columns
/// of `A [fan_in, r]` and rows of `B [r, fan_out]`, or with `frozen` the `b`-th alone; what is not updated
/// keeps every bit. So the directions lie in the order of their use, and the trained file, which holds all
/// `r`, serves at every rank from `r_min` on: `rank_at_use` says at which. There it is plain LoRA of that
/// rank, a slice ([`DyLoraAdapter::at_rank`]). Inits are LoRA's. A place with a smaller rank by
/// `rank_pattern` uses all of it where `b` is larger. Parameters: `r·(fan_in + fan_out)` a place. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DyLora {
    /// Largest rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Smallest rank that is drawn; default 1.
    pub r_min: usize,
    /// Update only the `b`-th column of `A` and row of `B`; default false.
    pub frozen: bool,
    /// The rank outside of training; default `r`.
    pub rank_at_use: Option<usize>,
    /// Decides, with the step, which ranks are drawn; default 0.
    pub rank_seed: u64,
}

impl Default for DyLora {
    fn default() -> Self {
        let low_rank = LowRank::default();
        Self { low_rank, r_min: 1, frozen: false, rank_at_use: None, rank_seed: 0 }
    }
}

/// What DyLoRA trains at one place.
#[derive(Module, Debug)]
pub struct DyLoraAdapter {
    /// `A [fan_in, r]`.
    pub dylora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub dylora_b: Param<Tensor<2>>,
    /// `[2, r]`, 1 where a rank learns in the step at hand, and 1 where it is used and held.
    pub drawn: Buffer<2>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `lora_alpha` of the place.
    pub alpha: f64,
    /// Whether the scale is `1/√b` and not `1/b`.
    pub use_rslora: bool,
    /// The rank outside of training.
    pub rank_at_use: usize,
}

impl DyLoraAdapter {
    /// Plain LoRA of this rank: the first `rank` columns of `A` and rows of `B`.
    ///
    /// A rank beyond `r` is `r`.
    pub fn at_rank(&self, rank: usize) -> LoraAdapter {
        let Product { a, b, scaling } = self.product(rank);
        crate::lora::LoraAdapter::of(a, b, scaling)
    }

    fn product(&self, rank: usize) -> Product {
        let (a, b) = (self.dylora_a.val(), self.dylora_b.val());
        let rank = rank.min(a.dims()[1]);
        let used = rank as f64;
        let scaling = self.alpha / if self.use_rslora { used.sqrt() } else { used };
        Product { a: a.narrow(1, 0, rank), b: b.narrow(0, 0, rank), scaling }
    }

    /// The LoRA of the step at hand. By masks and not by slices, so that no device is asked for `b`.
    fn sampled(&self) -> LoraAdapter {
        let (a, b) = (self.dylora_a.val(), self.dylora_b.val());
        let drawn = self.drawn.val();
        let rank = drawn.clone().sum();
        let rank = if self.use_rslora { rank.sqrt() } else { rank };
        let scaling = rank.recip() * self.alpha;
        let [learned, held] = [0, 1].map(|row| drawn.clone().narrow(0, row, 1)); // [1, r] each
        let across = |mask: Tensor<2>| mask.transpose(); // [r, 1]
        // What is held is a constant: it takes part and gets no gradient.
        let (held_a, held_b) = (a.clone().detach(), b.clone().detach());
        let a = a * learned.clone() + held_a * held.clone();
        let b = b * across(learned) + held_b * across(held);
        crate::lora::LoraAdapter::of(a * scaling.unsqueeze(), b, 1.0)
    }

    fn lora(&self) -> LoraAdapter {
        match self.drawn.is_training() {
            true => self.sampled(),
            false => self.at_rank(self.rank_at_use),
        }
    }
}

faces_by_lora!(DyLoraAdapter, dylora_a);

impl DyLora {
    /// With this largest rank, alpha and targets, and the defaults for the rest.
    pub fn new(r: usize, lora_alpha: f64, targets: Targets) -> Self {
        Self { low_rank: LowRank::new(r, lora_alpha, targets), ..Self::default() }
    }

    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        device: &Device,
    ) -> Result<DyLoraAdapter, Error> {
        let [_, r] = a.dims();
        let rank_at_use = self.rank_at_use.unwrap_or(r).min(r);
        let drawn = crate::dylora_policy::mask(0..rank_at_use, 0..rank_at_use, r, device);
        Ok(DyLoraAdapter {
            dylora_a: Param::from_tensor(a),
            dylora_b: Param::from_tensor(b),
            drawn: Buffer::new(drawn),
            dropout: self.low_rank.dropout(),
            alpha: self.low_rank.scaling(site, 1)?,
            use_rslora: self.low_rank.use_rslora,
            rank_at_use,
        })
    }
}

impl Method for DyLora {
    type Adapter = DyLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "DYLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["dylora_b"];

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
        positive("r_min", self.r_min)?;
        let r = self.low_rank.r;
        for (field, rank) in [("r_min", Some(self.r_min)), ("rank_at_use", self.rank_at_use)] {
            if let Some(rank) = rank.filter(|rank| !(1..=r).contains(rank)) {
                let reason = format!("expected a rank from 1 to r = {r}, found {rank}");
                return Err(Error::config(field, reason));
            }
        }
        self.low_rank.check()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DyLoraAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?, device)
    }

    fn fold(adapter: &DyLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn product(adapter: &DyLoraAdapter) -> Option<Product> {
        Some(adapter.product(adapter.rank_at_use))
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, rank_at_use: Some(3), ..Self::default() },
            Self { low_rank: patterned, r_min: 2, frozen: true, rank_seed: 5, rank_at_use: None },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site)
    }

    fn policy(
        &self,
        _adapters: &Adapters<DyLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<DyLoraAdapter>>>, Error> {
        Ok(Some(Box::new(RankSampling::new(self))))
    }

    fn tensors(&self, _site: &Site, adapter: &DyLoraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("dylora_A", stored(adapter.dylora_a.val())),
            ("dylora_B", stored(adapter.dylora_b.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<DyLoraAdapter, Error> {
        let pair = self.low_rank.take(site, ["dylora_A", "dylora_B"], file, device)?;
        self.adapter(site, pair, device)
    }
}
