//! SHiRA: a few numbers of the weight itself are trained (arXiv 2406.13175).

use crate::common::positive;
use crate::random::normal;
use crate::sparse::{indices, scatter};
use crate::torch_random::TorchRandom;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The seed of a PyTorch generator that nobody seeded.
const UNSEEDED: u64 = 67_280_421_310_721;

/// SHiRA (arXiv 2406.13175): `W' = W + S`, where `S` is zero but for `r·(fan_in + fan_out)` trained
/// numbers: as many as LoRA of rank `r` has, and a difference of any rank.
///
/// Which numbers, a permutation by `random_seed` decides: PyTorch's, so that HF PEFT draws the same;
/// the file says it too. They begin at zero. Parameters: `r·(fan_in + fan_out)` a place. Folds: `Δ(W) =
/// S`, through which it acts on activations too. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shira {
    /// How many numbers are trained, in LoRA's measure; default 32.
    pub r: usize,
    /// How they are chosen; "random" is all that there is to begin with, and a file may name any.
    pub mask_type: String,
    /// Decides which are chosen; default none, which is PyTorch's own seed.
    pub random_seed: Option<i64>,
    /// Begin at zero, which is the default; otherwise as `N(0, 1)`, which serves tests.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Shira {
    fn default() -> Self {
        Self {
            r: 32,
            mask_type: "random".into(),
            random_seed: None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What SHiRA trains at one place.
#[derive(Module, Debug)]
pub struct ShiraAdapter {
    /// The numbers that are not zero, in the order of PyTorch's weight: output by output.
    pub values: Param<Tensor<1>>,
    /// Where each stands in the weight `[fan_in, fan_out]`, counted row by row.
    pub places: Tensor<1, Int>,
}

impl Adapter for ShiraAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for ShiraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(scatter(self.values.val(), &self.places, w.dims()))
    }
}

impl Shira {
    /// With as many numbers as LoRA of rank `r`, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn count(&self, site: &Site) -> Result<usize, Error> {
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        match self.r.checked_mul(fan_in + fan_out) {
            Some(count) if count <= fan_in * fan_out => Ok(count),
            _ => {
                let (most, r) = (fan_in * fan_out / (fan_in + fan_out), self.r);
                let reason = format!(
                    "r: expected at most {most}, as r·(fan_in + fan_out) numbers of its weight are \
                     trained, found {r}"
                );
                Err(Error::place(&site.path, reason))
            }
        }
    }

    /// The chosen places of a weight of this shape.
    fn mask(&self, [fan_in, fan_out]: [usize; 2], count: usize, device: &Device) -> Tensor<1, Int> {
        let seed = self.random_seed.map_or(UNSEEDED, |seed| seed as u64);
        let mut chosen = TorchRandom::manual_seed(seed).randperm(fan_out * fan_in, count);
        chosen.sort_unstable();
        let places = chosen.into_iter().map(|at| at % fan_in * fan_out + at / fan_in).collect();
        indices(places, device)
    }
}

impl Method for Shira {
    type Adapter = ShiraAdapter;
    /// The chosen places by the shape of the weight.
    type Shared = BTreeMap<[usize; 2], Tensor<1, Int>>;
    const NAME: &'static str = "SHIRA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let mut shared = BTreeMap::new();
        for site in sites {
            let (shape, count) = ([site.fan_in(), site.fan_out()], self.count(site)?);
            shared.entry(shape).or_insert_with(|| self.mask(shape, count, device));
        }
        Ok(shared)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<ShiraAdapter, Error> {
        if self.mask_type != "random" {
            let reason = format!("`{}` is not implemented; expected random", self.mask_type);
            return Err(Error::config("mask_type", reason));
        }
        let (shape, count) = ([site.fan_in(), site.fan_out()], self.count(site)?);
        let values = match self.init_weights {
            true => Tensor::zeros([count], device),
            false => normal([count], 1.0, rng, device),
        };
        let places = shared.get(&shape).cloned();
        Ok(ShiraAdapter {
            values: Param::from_tensor(values),
            places: places.unwrap_or_else(|| self.mask(shape, count, device)),
        })
    }

    fn fold(adapter: &ShiraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(2, targets.clone());
        vec![
            Self { random_seed: Some(7), init_weights: false, ..plain.clone() },
            // Every number of a square weight.
            Self { r: 4, random_seed: Some(-7), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.count(site).unwrap_or(0)
    }

    fn tensors(&self, site: &Site, adapter: &ShiraAdapter) -> Vec<(&'static str, TensorData)> {
        let fan_out = site.fan_out() as i64;
        let [count] = adapter.places.dims();
        let places: Vec<i64> = adapter.places.to_data().iter::<i64>().collect();
        let rows = places.iter().map(|place| (place % fan_out) as i32);
        let columns = places.iter().map(|place| (place / fan_out) as i32);
        let both: Vec<i32> = rows.chain(columns).collect();
        vec![
            ("shira_indices", TensorData::new(both, [2, count])), // in a weight (fan_out, fan_in)
            ("shira_weight", adapter.values.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<ShiraAdapter, Error> {
        let count = self.count(site)?;
        let values = file.take("shira_weight", [count], device)?;
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        let (shape, both) = file.take_ints("shira_indices")?;
        let name = format!("{}.shira_indices", site.path);
        if shape != [2, count] {
            let found = format!("shape {shape:?}");
            return Err(Error::tensor(name, format!("shape {:?}", [2, count]), found));
        }
        let (rows, columns) = both.split_at(count);
        let within = |index: &i64, size: usize| usize::try_from(*index).ok().filter(|i| *i < size);
        let places: Option<Vec<usize>> = rows
            .iter()
            .zip(columns)
            .map(|(row, column)| Some(within(column, fan_in)? * fan_out + within(row, fan_out)?))
            .collect();
        let Some(places) = places else {
            let expected = format!("indices within a weight ({fan_out}, {fan_in})");
            return Err(Error::tensor(name, expected, "some outside it"));
        };
        Ok(ShiraAdapter { values: Param::from_tensor(values), places: indices(places, device) })
    }
}
