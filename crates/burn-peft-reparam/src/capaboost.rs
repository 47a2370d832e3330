//! CapaBoost: LoRA whose factors serve several times, each time under another fixed random mask
//! (arXiv 2407.01320).

use crate::LoraAdapter;
use crate::common::positive;
use crate::low_rank::{LowRank, bounded, faces_by_lora, stored};
use crate::seeded::shuffled;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, site_rng};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// CapaBoost on LoRA (arXiv 2407.01320): `y = xW + b + s·Σₖ dropout(x)·(A∘Mₖ)·(B∘M'ₖ)`, which is
/// `W0 + Σₖ (B∘M'ₖ)·(A∘Mₖ)` in the paper's layout. Rank up to `num_layer·r` at no more parameters.
///
/// `A [fan_in, r]` as in LoRA, `B [r, fan_out]` zero at first; `s = lora_alpha / r`. Each mask keeps
/// `mask_density` of a factor's entries, as many in each. Masks come out of `mask_seed` and the path and
/// are not in the file. Parameters: `r·(fan_in + fan_out)` a place. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapaBoost {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// How many masked copies are summed; default 2.
    pub num_layer: usize,
    /// Part of a factor's entries that a mask keeps, in (0, 1]; default 0.5.
    pub mask_density: f64,
    /// Seed of the masks; default 0.
    pub mask_seed: u64,
}

impl Default for CapaBoost {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), num_layer: 2, mask_density: 0.5, mask_seed: 0 }
    }
}

/// What CapaBoost trains at one place.
#[derive(Module, Debug)]
pub struct CapaBoostAdapter {
    /// `A [fan_in, r]`.
    pub capaboost_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub capaboost_b: Param<Tensor<2>>,
    /// `[M₁ .. Mₖ]`, `[fan_in, k·r]`.
    pub mask_a: Tensor<2>,
    /// `[M'₁; ..; M'ₖ]`, `[k·r, fan_out]`.
    pub mask_b: Tensor<2>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl CapaBoostAdapter {
    /// The sum over `k` is one product of factors side by side.
    fn lora(&self) -> LoraAdapter {
        let k = self.mask_a.dims()[1] / self.capaboost_a.dims()[1];
        let a = self.capaboost_a.val().repeat_dim(1, k) * self.mask_a.clone();
        let b = self.capaboost_b.val().repeat_dim(0, k) * self.mask_b.clone();
        crate::lora::LoraAdapter::of(a, b, self.scaling)
    }
}

faces_by_lora!(CapaBoostAdapter, capaboost_a);

impl CapaBoost {
    /// `num_layer` masks of `rows·columns` entries, one after the other.
    fn masks(&self, rows: usize, columns: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let entries = rows * columns;
        let kept = ((entries as f64 * self.mask_density) as usize).clamp(1, entries);
        let mut masks = vec![0.0; self.num_layer * entries];
        for mask in masks.chunks_exact_mut(entries) {
            for place in shuffled(entries, rng).into_iter().take(kept) {
                mask[place] = 1.0;
            }
        }
        masks
    }

    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        device: &Device,
    ) -> Result<CapaBoostAdapter, Error> {
        let ([fan_in, r], [_, fan_out]) = (a.dims(), b.dims());
        let k = self.num_layer;
        bounded("num_layer", &site.path, &[k, r, fan_in + fan_out])?;
        let constants = device.clone().inner();
        let rng = &mut site_rng(self.mask_seed, &site.path);
        let masks = self.masks(fan_in, r, rng);
        let mask_a = Tensor::<3>::from_data(TensorData::new(masks, [k, fan_in, r]), &constants);
        let masks = self.masks(r, fan_out, rng);
        let mask_b = TensorData::new(masks, [k * r, fan_out]);
        Ok(CapaBoostAdapter {
            capaboost_a: Param::from_tensor(a),
            capaboost_b: Param::from_tensor(b),
            mask_a: mask_a.swap_dims(0, 1).reshape([fan_in, k * r]),
            mask_b: Tensor::from_data(mask_b, &constants),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for CapaBoost {
    type Adapter = CapaBoostAdapter;
    type Shared = ();
    const NAME: &'static str = "CAPABOOST";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["capaboost_b"];

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
        positive("num_layer", self.num_layer)?;
        match self.mask_density > 0.0 && self.mask_density <= 1.0 {
            true => Ok(()),
            false => {
                let reason = format!("expected a part in (0, 1], found {}", self.mask_density);
                Err(Error::config("mask_density", reason))
            }
        }
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<CapaBoostAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?, device)
    }

    fn fold(adapter: &CapaBoostAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, num_layer: 3, mask_density: 0.7, mask_seed: 5 },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site)
    }

    fn tensors(&self, _site: &Site, adapter: &CapaBoostAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("capaboost_A", stored(adapter.capaboost_a.val())),
            ("capaboost_B", stored(adapter.capaboost_b.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<CapaBoostAdapter, Error> {
        let pair = self.low_rank.take(site, ["capaboost_A", "capaboost_B"], file, device)?;
        self.adapter(site, pair, device)
    }
}
