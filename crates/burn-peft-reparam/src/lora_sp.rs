//! LoRA-SP: LoRA with a random half of its factors' entries frozen (arXiv 2403.08822).

use crate::LoraAdapter;
use crate::common::probability;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use crate::seeded::shuffled;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, site_rng};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoRA-SP (arXiv 2403.08822): `y = xW + b + s·dropout(x)·A·B`, of which a random half of the entries of
/// `A [fan_in, r]` and of `B [r, fan_out]` keep their first values.
///
/// Inits and `s` as in LoRA, so that the frozen entries of `B` are zero. Which ones are frozen comes out
/// of `mask_seed` and the path; the file holds whole factors. Parameters:
/// `n - ⌊frozen·n⌋` a factor of `n = r·fan` entries, the trained ones alone. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraSp {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Part of each factor's entries that is frozen, in [0, 1); default 0.5.
    pub frozen: f64,
    /// Seed of the choice; default 0.
    pub mask_seed: u64,
}

impl Default for LoraSp {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), frozen: 0.5, mask_seed: 0 }
    }
}

/// A matrix of which some entries are trained.
#[derive(Module, Debug)]
pub struct Partial {
    /// The trained entries, `[n]`.
    pub trained: Param<Tensor<1>>,
    /// For each entry of the matrix, which trained one it is; any, where it is frozen.
    index: Tensor<1, Int>,
    /// 1 where an entry is trained.
    mask: Tensor<2>,
    /// The frozen entries in their places, zero elsewhere.
    frozen: Tensor<2>,
}

impl Partial {
    /// Trains what `frozen` leaves of the entries of `matrix`.
    fn new(matrix: Tensor<2>, frozen: f64, rng: &mut ChaCha8Rng) -> Self {
        let device = matrix.device();
        let constants = device.clone().inner();
        let shape = matrix.dims();
        let count = shape[0] * shape[1];
        let mut places = shuffled(count, rng);
        places.truncate(trained(count, frozen));
        let (mut index, mut mask) = (vec![0_i64; count], vec![0_f32; count]);
        for (i, place) in places.iter().enumerate() {
            index[*place] = i as i64;
            mask[*place] = 1.0;
        }
        let ints = |ints: Vec<i64>| {
            let shape = [ints.len()];
            Tensor::<1, Int>::from_data(TensorData::new(ints, shape), &constants)
        };
        let mask = Tensor::from_data(TensorData::new(mask, shape), &constants);
        let matrix = matrix.without_autodiff();
        let chosen = ints(places.iter().map(|place| *place as i64).collect());
        let entries = matrix.clone().reshape([count]).select(0, chosen);
        Self {
            trained: Param::from_tensor(Tensor::from_data(entries.into_data(), &device)),
            index: ints(index),
            frozen: matrix * (1.0 - mask.clone()),
            mask,
        }
    }

    /// The whole matrix.
    fn whole(&self) -> Tensor<2> {
        let entries = self.trained.val().select(0, self.index.clone());
        entries.reshape(self.mask.dims()) * self.mask.clone() + self.frozen.clone()
    }
}

/// How many of `count` entries are trained.
fn trained(count: usize, frozen: f64) -> usize {
    count - (count as f64 * frozen) as usize
}

/// What LoRA-SP trains at one place.
#[derive(Module, Debug)]
pub struct LoraSpAdapter {
    /// `A [fan_in, r]`.
    pub lorasp_a: Partial,
    /// `B [r, fan_out]`.
    pub lorasp_b: Partial,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl LoraSpAdapter {
    fn lora(&self) -> LoraAdapter {
        crate::lora::LoraAdapter::of(self.lorasp_a.whole(), self.lorasp_b.whole(), self.scaling)
    }
}

faces_by_lora!(LoraSpAdapter, lorasp_a.trained);

impl LoraSp {
    fn adapter(&self, site: &Site, (a, b): (Tensor<2>, Tensor<2>)) -> Result<LoraSpAdapter, Error> {
        let [_, r] = a.dims();
        let rng = &mut site_rng(self.mask_seed, &site.path);
        Ok(LoraSpAdapter {
            lorasp_a: Partial::new(a, self.frozen, rng),
            lorasp_b: Partial::new(b, self.frozen, rng),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for LoraSp {
    type Adapter = LoraSpAdapter;
    type Shared = ();
    const NAME: &'static str = "LORASP";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

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
        self.low_rank.check()?;
        probability("frozen", self.frozen)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LoraSpAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?)
    }

    fn fold(adapter: &LoraSpAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, frozen: 0.25, mask_seed: 3 },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.low_rank.rank(site).unwrap_or(self.low_rank.r);
        trained(r * site.fan_in(), self.frozen) + trained(r * site.fan_out(), self.frozen)
    }

    fn tensors(&self, _site: &Site, adapter: &LoraSpAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("lorasp_A", stored(adapter.lorasp_a.whole())),
            ("lorasp_B", stored(adapter.lorasp_b.whole())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraSpAdapter, Error> {
        self.adapter(site, self.low_rank.take(site, ["lorasp_A", "lorasp_B"], file, device)?)
    }
}
