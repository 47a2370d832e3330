//! FishMask: the numbers that the model's answers depend on most (arXiv 2111.09839).

use crate::selective::{Criterion, Selective};
use burn::tensor::Tensor;
use burn_peft_core::{Part, Slope, Statistic};
use serde::{Deserialize, Serialize};

/// FishMask, Fisher-induced sparse unchanging mask (arXiv 2111.09839): trains the numbers with the largest
/// empirical Fisher information, `F_i = (1/N)·Σ_n (∂L(x_n, y_n)/∂w_i)²` over `N` single examples at the base
/// model, the largest of all target places together.
///
/// The mask stays through the training. `keep_ratio` is 0.005 by default, as in the paper, whose 1,024
/// examples are the default here too, where a batch has 32 of them. Shapes, file, parameter count and errors
/// are [`Selective`]'s.
pub type FishMask = Selective<Fisher>;

/// The criterion of [`FishMask`]: the diagonal of the empirical Fisher information. It has no options.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fisher {}

impl Criterion for Fisher {
    const NAME: &'static str = "FISHMASK";
    const KEEP_RATIO: f64 = 0.005;

    fn wants(&self) -> Option<Statistic> {
        Some(Statistic::Slopes { part: Part::Whole, tuning: None })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(slope?.square.clone())
    }
}
