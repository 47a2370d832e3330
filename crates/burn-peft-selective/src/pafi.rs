//! PaFi: the numbers that are smallest already, whatever the task (arXiv 2305.16742).

use crate::mask::Mask;
use crate::selective::{Criterion, Scored, Selective, highest, share};
use burn::tensor::Tensor;
use burn_peft_core::{Kind, Slope};
use serde::{Deserialize, Serialize};

/// PaFi, pruning-and-finetuning (arXiv 2305.16742): trains the `⌊keep_ratio·n⌋` smallest numbers `|w|` of each
/// parameter with `n` of them. No data are needed, so that all tasks of a base model share one mask.
///
/// Norms among the target places are trained whole, unless `norms` is off. `keep_ratio` is 0.005 by default,
/// as in the paper. Shapes, file, parameter count and errors are [`Selective`]'s.
pub type PaFi = Selective<Smallest>;

/// The criterion of [`PaFi`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Smallest {
    /// Train norms whole, as the paper does; default true.
    pub norms: bool,
}

impl Default for Smallest {
    fn default() -> Self {
        Self { norms: true }
    }
}

impl Criterion for Smallest {
    const NAME: &'static str = "PAFI";
    const KEEP_RATIO: f64 = 0.005;

    fn score(&self, base: Tensor<1>, _slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(base.abs().neg())
    }

    fn choose(&self, scored: &[Scored], keep_ratio: f64) -> Mask {
        let one = |parameter: &Scored| {
            if self.norms && parameter.kind == Kind::Norm {
                return parameter.whole();
            }
            let alone = std::slice::from_ref(parameter);
            let mask = highest(alone, share(alone, keep_ratio));
            Some((parameter.name.clone(), mask.get(&parameter.name)?.clone()))
        };
        scored.iter().filter_map(one).collect()
    }

    fn samples() -> Vec<(Self, f64)> {
        vec![(Self { norms: false }, 0.5), (Self::default(), 0.1)]
    }
}
