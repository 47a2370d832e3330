//! SAM: the numbers by which a second-order step would gain most (arXiv 2211.15583).

use crate::selective::{Criterion, Selective};
use burn::tensor::Tensor;
use burn_peft_core::{Part, Slope, Statistic};
use serde::{Deserialize, Serialize};

/// SAM, the second-order approximation method (arXiv 2211.15583): trains the numbers with the largest
/// `g_i²/h_i`, where `g` is the gradient of the mean loss at the base model and `h` the diagonal of its Hessian:
/// by so much would the best step along `w_i` alone lower the loss, up to a factor.
///
/// With `hessian` "constant", `h` is one number for all, and the largest `g_i²` are chosen; with "fisher" it is
/// the empirical Fisher information, `h_i = (1/N)·Σ_n (∂L_n/∂w_i)²`, so that a number counts as its examples
/// agree. `keep_ratio` is 0.005 by default. The gradient is over single examples of `--init-batches`. Shapes,
/// file, parameter count and errors are [`Selective`]'s.
pub type Sam = Selective<SecondOrder>;

/// What stands for the diagonal of the Hessian.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hessian {
    /// The same number for all; the default.
    #[default]
    Constant,
    /// The empirical Fisher information.
    Fisher,
}

/// The criterion of [`Sam`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SecondOrder {
    /// "constant" (the default) or "fisher".
    pub hessian: Hessian,
}

impl Criterion for SecondOrder {
    const NAME: &'static str = "SAM";
    const KEEP_RATIO: f64 = 0.005;

    fn wants(&self) -> Option<Statistic> {
        Some(Statistic::Slopes { part: Part::Whole, tuning: None })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        let slope = slope?;
        let gain = slope.mean.clone().square();
        Some(match self.hessian {
            Hessian::Constant => gain,
            // Where no example slopes at all, there is nothing to gain.
            Hessian::Fisher => gain / slope.square.clone().clamp_min(f32::MIN_POSITIVE),
        })
    }

    fn samples() -> Vec<(Self, f64)> {
        vec![(Self { hessian: Hessian::Fisher }, 0.5), (Self::default(), 0.5)]
    }
}
