//! CorDA: the weight is split by the directions that the layer's inputs use (arXiv 2406.05223).

use crate::init::{Pair, Place, SWEEPS};
use crate::init_data::{Found, numbers};
use burn::linalg::{svd, trace};
use burn::tensor::Tensor;
use burn_peft_core::{Error, Moments, Site, Statistic};
use serde::{Deserialize, Serialize};

/// Which part of the weight is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CordaMethod {
    /// What the inputs use most: learns the task that the data show fastest.
    #[default]
    Ipm,
    /// What the inputs use least: keeps the knowledge that the data show.
    Kpm,
}

/// Options of the init "corda" (arXiv 2406.05223): with `C` the mean square of the layer's inputs,
/// `C·W = P·S·Q`, and of its first `r` directions (or last, by `corda_method`) `A = C⁻¹·P·√(S/s)` and
/// `B = √(S/s)·Q`, which are constants of the adapter too: `Δ(W) = s·(A·B - A0·B0)`.
///
/// Names and defaults are HF PEFT's. As there, the inputs of each text are first divided by the largest of
/// them, and a hundredth of `C`'s mean diagonal is added to its diagonal. The exact decompositions take
/// minutes for widths of thousands. Embeddings begin as by the init true.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CordaConfig {
    /// A file of HF PEFT's with decompositions; cannot be read here.
    pub cache_file: Option<String>,
    /// A file of HF PEFT's with `C` of each place; cannot be read here.
    pub covariance_file: Option<String>,
    /// "ipm" (the default) or "kpm".
    pub corda_method: CordaMethod,
    /// HF PEFT's progress bar; without effect.
    pub verbose: bool,
    /// `C` in half precision; is not done here.
    pub use_float16_for_covariance: bool,
    /// What HF PEFT leaves in memory; without effect.
    pub prune_temporary_fields: bool,
}

impl Default for CordaConfig {
    fn default() -> Self {
        Self {
            cache_file: None,
            covariance_file: None,
            corda_method: CordaMethod::default(),
            verbose: false,
            use_float16_for_covariance: false,
            prune_temporary_fields: true,
        }
    }
}

/// What it must know: the mean square of inputs.
pub(crate) const STATISTIC: Statistic = Statistic::Inputs { targets_only: false, even: true };

impl CordaConfig {
    /// `C⁻¹·P`, `S` and `Q` of the `r` directions that are trained.
    pub(crate) fn find(&self, site: &Site, r: usize, inputs: &Moments) -> Result<Found, Error> {
        let files = self.cache_file.is_some() || self.covariance_file.is_some();
        if files || self.use_float16_for_covariance {
            let reason = "cache_file, covariance_file and use_float16_for_covariance are not \
                          implemented; leave them out";
            return Err(Error::config("corda_config", reason));
        }
        let place = Place { site, r, scaling: 1.0, device: &site.device() };
        let w = place.weight()?;
        let square = inputs.square();
        let width = square.dims()[0];
        let damp: Tensor<1> = trace(square.clone()) * (0.01 / width as f64);
        let one = Tensor::<2>::eye(width, &square.device());
        let c = square + one * damp.unsqueeze::<2>();
        let (p, sizes, q) = svd::<2, 1>(c.clone().matmul(w), SWEEPS);
        let first = match self.corda_method {
            CordaMethod::Ipm => 0,
            CordaMethod::Kpm => sizes.dims()[0] - r,
        };
        let (p, sizes, q) =
            (p.narrow(1, first, r), sizes.narrow(0, first, r), q.narrow(0, first, r));
        // C⁻¹·P by C's own directions: it is symmetric, and its diagonal keeps it from being singular.
        let (u, values, vt) = svd::<2, 1>(c, SWEEPS);
        let solved = vt.transpose().matmul(u.transpose().matmul(p) / values.unsqueeze_dim(1));
        Ok(Found::new(solved, numbers(sizes), Some(q)))
    }
}

/// `A = C⁻¹·P·√(S/s)` and `B = √(S/s)·Q`.
pub(crate) fn factors(place: &Place<'_>, found: &Found) -> Result<Pair, Error> {
    place.scale()?;
    let device = place.device;
    let roots = (found.sizes(device) / place.scaling).sqrt();
    let a = found.left(device) * roots.clone().unsqueeze_dim(0);
    let b = found.right(place.site.fan_out(), device) * roots.unsqueeze_dim(1);
    Ok((a.narrow(1, 0, place.r), b.narrow(0, 0, place.r)))
}
