//! KaSA (arXiv 2412.06071): the smallest singular directions of a weight are left out, and LoRA learns what
//! takes their place, in the form of a singular value decomposition.
//!
//! `W = U·S·Vᵀ`, `W' = W - U₋·S₋·V₋ᵀ + s·A·diag(d)·B` with the `r` smallest directions in `U₋·S₋·V₋ᵀ` (equations
//! 5 to 8).

use crate::importance::off_orthogonal;
use crate::init::{Place, decomposed};
use crate::lora::LoraAdapter;
use crate::lora_variant::LoraVariant;
use crate::random::normal;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_peft_core::{Error, PlaceTensors};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Name of the trained diagonal in the file.
pub(crate) const DIAGONAL: &str = "lora_diag";

/// Options of KaSA (arXiv 2412.06071): what is added to the loss, summed over the places (equations 9 to 11).
///
/// `d [r]` is drawn from `N(0, 1)` and `B = 0`. `r` parameters a place beside LoRA's. The difference is no identity
/// before the first step, because it takes the smallest directions off. HF PEFT takes them off the base for
/// good; here the base stays as it is, a place without its adapter is the frozen layer again, and adapters that are mixed
/// take them off as often as their weights say. The file is HF PEFT's: it does not hold the directions, which the
/// decomposition finds again (minutes for widths of thousands).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KasaConfig {
    /// Of `Σ d²`; default 1e-4.
    pub beta: f64,
    /// Of `‖AᵀA - I‖ + ‖BBᵀ - I‖`; default 1e-3.
    pub gamma: f64,
}

impl Default for KasaConfig {
    fn default() -> Self {
        Self { beta: 1e-4, gamma: 1e-3 }
    }
}

impl KasaConfig {
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (name, value) in [("beta", self.beta), ("gamma", self.gamma)] {
            if !(value.is_finite() && value >= 0.0) {
                let reason = format!("{name}: expected 0 or more, found {value}");
                return Err(Error::config("kasa_config", reason));
            }
        }
        Ok(())
    }

    /// `β·Σ d² + γ·(‖AᵀA - I‖ + ‖BBᵀ - I‖)`, summed over the places.
    pub(crate) fn penalty<'a>(
        &self,
        adapters: impl IntoIterator<Item = &'a LoraAdapter>,
    ) -> Option<Tensor<1>> {
        let (mut squares, mut pairs) = (Vec::new(), Vec::new());
        for adapter in adapters {
            let (Some(LoraVariant::Kasa(kasa)), Some(b)) = (&adapter.variant, &adapter.lora_b)
            else {
                continue;
            };
            let (a, b) = (adapter.lora_a.val(), b.val());
            let identity = Tensor::eye(a.dims()[1], &a.device().inner());
            squares.push(kasa.lora_diag.val().square().sum());
            pairs.push((a, b, identity));
        }
        let norms = 2.0 * pairs.len() as f64; // of which the mean is given
        let off = off_orthogonal(pairs)? * (self.gamma * norms);
        Some(Tensor::cat(squares, 0).sum() * self.beta + off)
    }
}

/// What KaSA has at a place beside LoRA's factors.
#[derive(Module, Debug)]
pub struct Kasa {
    /// `d [r]`.
    pub lora_diag: Param<Tensor<1>>,
    /// `U₋ [fan_in, r]`, constant.
    lost_u: Tensor<2>,
    /// `S₋·V₋ᵀ [r, fan_out]`, constant.
    lost_v: Tensor<2>,
}

impl Kasa {
    pub(crate) fn new(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Result<Self, Error> {
        Self::with(place, normal([place.r], 1.0, rng, place.device))
    }

    pub(crate) fn restored(place: &Place<'_>, file: &mut PlaceTensors<'_>) -> Result<Self, Error> {
        Self::with(place, file.take(DIAGONAL, [place.r], place.device)?)
    }

    fn with(place: &Place<'_>, diagonal: Tensor<1>) -> Result<Self, Error> {
        let (r, site) = (place.r, place.site);
        let directions = site.fan_in().min(site.fan_out());
        if r >= directions {
            let reason = format!(
                "is {r} and {} has {directions} directions, of which kasa_config leaves out as many as \
                 the rank; expected fewer",
                site.path
            );
            return Err(Error::config("r", reason));
        }
        let (u, values, vt) = decomposed(place.weight()?);
        let kept = directions - r;
        let lost_v = vt.narrow(0, kept, r) * values.narrow(0, kept, r).unsqueeze_dim(1);
        let (lost_u, lost_v) = place.here((u.narrow(1, kept, r), lost_v));
        Ok(Self {
            lora_diag: Param::from_tensor(diagonal),
            lost_u: lost_u.without_autodiff(),
            lost_v: lost_v.without_autodiff(),
        })
    }

    /// `A·diag(d)`.
    pub(crate) fn scaled(&self, a: Tensor<2>) -> Tensor<2> {
        a * self.lora_diag.val().unsqueeze_dim(0)
    }

    /// `U₋·S₋·V₋ᵀ`.
    pub(crate) fn lost(&self) -> Tensor<2> {
        self.lost_u.clone().matmul(self.lost_v.clone())
    }

    /// `x·U₋·S₋·V₋ᵀ`.
    pub(crate) fn lost_of(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.cast(self.lost_u.dtype());
        linear(linear(x, self.lost_u.clone(), None), self.lost_v.clone(), None)
    }
}
