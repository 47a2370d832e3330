//! NOLA: `A` and `B` are linear combinations of frozen random bases; the coefficients are trained
//! (arXiv 2310.02556).

use crate::LoraAdapter;
use crate::common::positive;
use crate::low_rank::{LowRank, bounded, check_shape, faces_by_lora, shape};
use crate::random::normal;
use crate::seeded::uniform;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, site_rng};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// NOLA (arXiv 2310.02556): `y = xW + b + s·dropout(x)·(Σᵢ αᵢ·Aᵢ)·(Σⱼ βⱼ·Bⱼ)`, so that the number of trained
/// parameters depends on neither the rank nor the widths.
///
/// `Aᵢ [fan_in, r] ~ U(±1/√fan_in)` and `Bⱼ [r, fan_out] ~ U(±1/√r)` are constants out of `basis_seed`, the
/// same at all places of one shape, and not in the file; they are held in memory,
/// `ka·r·fan_in + kb·r·fan_out` numbers for each shape. `α [ka] ~ N(0, 1/ka)` (our choice: `A` then begins
/// as large as one basis), `β [kb]` zero at first; `s = lora_alpha / r`. Parameters: `ka + kb` a place. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nola {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Number of bases of `A`; default 1000.
    pub ka: usize,
    /// Number of bases of `B`; default 1000.
    pub kb: usize,
    /// Seed of the bases; default 0.
    pub basis_seed: u64,
}

impl Default for Nola {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), ka: 1000, kb: 1000, basis_seed: 0 }
    }
}

/// What NOLA trains at one place, and handles on its bases.
#[derive(Module, Debug)]
pub struct NolaAdapter {
    /// `α [ka]`.
    pub nola_alpha: Param<Tensor<1>>,
    /// `β [kb]`.
    pub nola_beta: Param<Tensor<1>>,
    /// All `Aᵢ`, `[ka, fan_in·r]`.
    pub bases_a: Tensor<2>,
    /// All `Bⱼ`, `[kb, r·fan_out]`.
    pub bases_b: Tensor<2>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// The rank.
    pub r: usize,
    /// `s`.
    pub scaling: f64,
}

/// `Σᵢ αᵢ·Aᵢ` as a row.
fn combined(coefficients: &Param<Tensor<1>>, bases: &Tensor<2>) -> Tensor<2> {
    coefficients.val().unsqueeze::<2>().matmul(bases.clone())
}

impl NolaAdapter {
    fn lora(&self) -> LoraAdapter {
        let (a, b) = (self.bases_a.dims()[1], self.bases_b.dims()[1]);
        let a = combined(&self.nola_alpha, &self.bases_a).reshape([a / self.r, self.r]);
        let b = combined(&self.nola_beta, &self.bases_b).reshape([self.r, b / self.r]);
        crate::lora::LoraAdapter::of(a, b, self.scaling)
    }
}

faces_by_lora!(NolaAdapter, nola_alpha);

/// The bases by their factor and its shape.
type Bases = BTreeMap<(&'static str, [usize; 2]), Tensor<2>>;

impl Nola {
    /// The keys of the bases of both factors at `site`.
    fn keys(&self, site: &Site) -> Result<[(&'static str, [usize; 2]); 2], Error> {
        let r = self.low_rank.rank(site)?;
        Ok([("A", [site.fan_in(), r]), ("B", [r, site.fan_out()])])
    }

    /// The bases of all `sites`, each shape once.
    fn bases(&self, sites: &[&Site], device: &Device) -> Result<Bases, Error> {
        let constants = device.clone().inner();
        let mut bases = Bases::new();
        for site in sites {
            for (key, k) in self.keys(site)?.into_iter().zip([self.ka, self.kb]) {
                let (factor, [rows, columns]) = key;
                let field = if factor == "A" { "ka" } else { "kb" };
                bounded(field, &site.path, &[k, rows, columns])?;
                bases.entry(key).or_insert_with(|| {
                    let name = format!("{factor} {rows}x{columns}");
                    let rng = &mut site_rng(self.basis_seed, &name);
                    let bound = (1.0 / rows as f32).sqrt();
                    uniform([k, rows * columns], bound, rng, &constants)
                });
            }
        }
        Ok(bases)
    }

    fn adapter(
        &self,
        site: &Site,
        shared: &Bases,
        [alpha, beta]: [Tensor<1>; 2],
    ) -> Result<NolaAdapter, Error> {
        let [a, b] = self.keys(site)?.map(|key| shared.get(&key).cloned());
        let (Some(bases_a), Some(bases_b)) = (a, b) else {
            return Err(Error::place(&site.path, "has no bases; expected those of its shape"));
        };
        let r = self.low_rank.rank(site)?;
        Ok(NolaAdapter {
            nola_alpha: Param::from_tensor(alpha),
            nola_beta: Param::from_tensor(beta),
            bases_a,
            bases_b,
            dropout: self.low_rank.dropout(),
            r,
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for Nola {
    type Adapter = NolaAdapter;
    type Shared = Bases;
    const NAME: &'static str = "NOLA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["nola_beta"];

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
        positive("ka", self.ka)?;
        positive("kb", self.kb)?;
        self.low_rank.check()
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Bases, Error> {
        self.bases(sites, device)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Bases,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<NolaAdapter, Error> {
        let alpha = normal([self.ka], (1.0 / self.ka as f32).sqrt(), rng, device);
        self.adapter(site, shared, [alpha, Tensor::zeros([self.kb], device)])
    }

    fn fold(adapter: &NolaAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, ka: 5, kb: 3, basis_seed: 7 },
            Self { low_rank: patterned, ka: 6, kb: 6, basis_seed: 0 },
        ]
    }

    fn parameters(&self, _site: &Site) -> usize {
        self.ka + self.kb
    }

    fn tensors(&self, site: &Site, adapter: &NolaAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("nola_alpha", adapter.nola_alpha.val().into_data()),
            ("nola_beta", adapter.nola_beta.val().into_data()),
            ("nola_shape", shape(site)),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Bases,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<NolaAdapter, Error> {
        check_shape("nola_shape", site, file)?;
        let alpha = file.take("nola_alpha", [self.ka], device)?;
        let beta = file.take("nola_beta", [self.kb], device)?;
        self.adapter(site, shared, [alpha, beta])
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        _file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Bases, Error> {
        self.bases(sites, device)
    }
}
