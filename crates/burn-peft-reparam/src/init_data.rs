//! LoRA's inits that look at data before they begin: what was asked for, and what was found.

use crate::corda::{self, CordaConfig, CordaMethod};
use crate::eva::{self, EvaConfig};
use crate::init::{Init, Pair, Place, SWEEPS, basis};
use crate::lora_ga::{self, Direction, GaScale, LoraGaConfig};
use burn::linalg::svd;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, Finding, Site, Statistic};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Options of the inits "eva", "corda" and "lora_ga", each without effect on the other inits, and what a
/// [`survey`](burn_peft_core::survey()) found for the one that is asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataInit {
    /// Of the init "eva"; none: its defaults.
    pub eva_config: Option<EvaConfig>,
    /// Of the init "corda"; none: its defaults.
    pub corda_config: Option<CordaConfig>,
    /// Of the init "lora_ga"; none: its defaults.
    pub lora_ga_config: Option<LoraGaConfig>,
    /// By path.
    #[serde(skip)]
    pub(crate) found: Arc<BTreeMap<String, Found>>,
}

/// The directions of a place that matter most to an init, kept on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    /// In the space of inputs, `[fan_in, k]`.
    pub(crate) left: TensorData,
    /// How much each matters, the most first; `k`.
    pub(crate) sizes: Vec<f32>,
    /// In the space of outputs, `[k, fan_out]`, where the init begins there too.
    pub(crate) right: Option<TensorData>,
}

impl DataInit {
    /// Every option at least once, each with its init.
    pub(crate) fn samples() -> Vec<(Init, Self)> {
        let eva = |config| Self { eva_config: Some(config), ..Self::default() };
        let whitened = EvaConfig { rho: 1.5, whiten: true, ..EvaConfig::default() };
        let (use_label_mask, adjust_scaling_factors) = (false, false);
        let all = EvaConfig { use_label_mask, adjust_scaling_factors, ..EvaConfig::default() };
        let kpm = CordaConfig { corda_method: CordaMethod::Kpm, ..CordaConfig::default() };
        let ga = |direction, scale| {
            let config = LoraGaConfig { direction, scale, ..LoraGaConfig::default() };
            (Init::LoraGa, Self { lora_ga_config: Some(config), ..Self::default() })
        };
        vec![
            (Init::Eva, eva(whitened)),
            (Init::Eva, eva(all)),
            (Init::Corda, Self::default()),
            (Init::Corda, Self { corda_config: Some(kpm), ..Self::default() }),
            (Init::LoraGa, Self::default()),
            ga(Direction::ArBr, GaScale::WeightSvd),
            ga(Direction::A2rBr, GaScale::GdScale),
            ga(Direction::Random, GaScale::Unit),
        ]
    }

    pub(crate) fn eva(&self) -> EvaConfig {
        self.eva_config.clone().unwrap_or_default()
    }

    fn corda(&self) -> CordaConfig {
        self.corda_config.clone().unwrap_or_default()
    }

    fn lora_ga(&self) -> LoraGaConfig {
        self.lora_ga_config.clone().unwrap_or_default()
    }

    /// What the init must know of the data.
    pub(crate) fn wants(&self, init: &Init) -> Option<Statistic> {
        match init {
            Init::Eva => Some(self.eva().statistic()),
            Init::Corda => Some(corda::STATISTIC),
            Init::LoraGa => Some(Statistic::Gradient),
            _ => None,
        }
    }

    /// Refuses options that cannot work on any model.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.eva().check()?;
        self.lora_ga().check()
    }

    /// Whether the seed decides anything beside the data.
    pub(crate) fn draws(&self, init: &Init) -> bool {
        *init == Init::LoraGa && self.lora_ga().draws()
    }

    /// Keeps what the init needs at a place, of rank `r`, out of what was found there.
    pub(crate) fn learn(
        &mut self,
        init: &Init,
        site: &Site,
        r: usize,
        finding: Finding,
    ) -> Result<(), Error> {
        let found = match (init, finding) {
            (Init::Eva, Finding::Inputs(moments)) => self.eva().find(site, r, &moments)?,
            (Init::Corda, Finding::Inputs(moments)) => self.corda().find(site, r, &moments)?,
            (Init::LoraGa, Finding::Gradient(gradient)) => lora_ga::find(site, r, gradient)?,
            _ => return Ok(()), // another statistic than was asked for
        };
        Arc::make_mut(&mut self.found).insert(site.path.clone(), found);
        Ok(())
    }

    /// The factors at the start, where an init of data has found something for the place.
    pub(crate) fn factors(
        &self,
        init: &Init,
        place: &Place<'_>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Option<Pair>, Error> {
        let Some(found) = self.found.get(&place.site.path) else {
            return Ok(None);
        };
        found.fits(place)?;
        Ok(match init {
            Init::Eva => Some(eva::factors(place, found)),
            Init::Corda => Some(corda::factors(place, found)?),
            Init::LoraGa => Some(self.lora_ga().factors(place, found, rng)?),
            _ => None,
        })
    }
}

impl Found {
    /// Out of directions on any device.
    pub(crate) fn new(left: Tensor<2>, sizes: Vec<f32>, right: Option<Tensor<2>>) -> Self {
        Self { left: left.into_data(), sizes, right: right.map(Tensor::into_data) }
    }

    /// Refuses a place of other sizes than the one that was looked at.
    fn fits(&self, place: &Place<'_>) -> Result<(), Error> {
        let (site, k) = (place.site, self.sizes.len());
        let outputs = self.right.as_ref().is_none_or(|right| right.shape()[1] == site.fan_out());
        if self.left.shape()[0] != site.fan_in() || !outputs {
            let reason = "has other sizes than when the data was looked at";
            return Err(Error::place(&site.path, reason));
        }
        match place.r <= k {
            true => Ok(()),
            false => {
                let (r, path) = (place.r, &site.path);
                let reason = format!("is {r} and {k} directions were found at {path}");
                Err(Error::config("r", reason))
            }
        }
    }

    /// `[fan_in, k]`.
    pub(crate) fn left(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(self.left.clone(), device)
    }

    /// `[k, fan_out]`; of no rows where there is none.
    pub(crate) fn right(&self, fan_out: usize, device: &Device) -> Tensor<2> {
        match &self.right {
            Some(right) => Tensor::from_data(right.clone(), device),
            None => Tensor::zeros([0, fan_out], device),
        }
    }

    /// `[k]`.
    pub(crate) fn sizes(&self, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(self.sizes.clone(), [self.sizes.len()]), device)
    }
}

/// Numbers of a tensor on the host.
pub(crate) fn numbers(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().iter::<f32>().collect()
}

/// The `k` largest of `w = U·S·Vᵀ`: `U [m, k]`, `S [k]` and `Vᵀ [k, n]`, each row of `Vᵀ` turned so that its
/// largest number is positive. Seen through a [`basis`] of `seen` directions where `w` has more.
pub(crate) fn leading(w: Tensor<2>, k: usize, seen: usize) -> (Tensor<2>, Tensor<1>, Tensor<2>) {
    /// Rounds of iteration; HF PEFT's `niter`.
    const ROUNDS: usize = 4;
    let [m, n] = w.dims();
    let (u, sizes, vt) = if seen < m.min(n) {
        // Another seed would find the same directions, up to what the iteration leaves.
        let q = basis(&w, seen, ROUNDS, &mut ChaCha8Rng::seed_from_u64(0));
        let (u, sizes, vt) = svd::<2, 1>(q.clone().transpose().matmul(w), SWEEPS);
        (q.matmul(u), sizes, vt)
    } else {
        svd::<2, 1>(w, SWEEPS)
    };
    let k = k.min(m).min(n).min(seen);
    let (u, sizes, vt) = (u.narrow(1, 0, k), sizes.narrow(0, 0, k), vt.narrow(0, 0, k));
    let largest = vt.clone().abs().argmax(1);
    let signs = vt.clone().gather(1, largest).sign(); // [k, 1]
    (u * signs.clone().transpose(), sizes, vt * signs)
}
