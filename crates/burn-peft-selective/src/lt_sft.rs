//! LT-SFT: the numbers that go farthest when all are trained (arXiv 2110.07560).

use crate::selective::{Criterion, Selective};
use burn::tensor::Tensor;
use burn_peft_core::{Error, Part, Slope, Statistic, Tuning};
use serde::{Deserialize, Serialize};

/// LT-SFT, lottery-ticket sparse fine-tuning (arXiv 2110.07560): a full fine-tuning comes first; the
/// `⌊keep_ratio·n⌋` numbers that went farthest, `|w' - w|`, of all target places together, are then trained
/// alone, from where they stood. Differences of a task and of a language add up: mix or merge both.
///
/// The full fine-tuning is over the batches of the survey (`--init-batches`), `full_epochs` times, by AdamW
/// without decay at `full_learning_rate`, which falls in a straight line to zero; layers in `modules_to_save`
/// learn along. What it learnt is thrown away but for the mask, so that the training proper holds sparse
/// differences from its first step on. (The paper trains both phases over the same data.) `keep_ratio` is 0.05
/// by default. Shapes, file, parameter count and errors are [`Selective`]'s.
pub type LtSft = Selective<Change>;

/// The criterion of [`LtSft`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Change {
    /// Rate of the first step of the full fine-tuning; default 5e-5.
    pub full_learning_rate: f64,
    /// How often the full fine-tuning sees each batch; default 1.
    pub full_epochs: usize,
}

impl Default for Change {
    fn default() -> Self {
        Self { full_learning_rate: 5e-5, full_epochs: 1 }
    }
}

/// Refuses a full fine-tuning that does not move anything.
pub(crate) fn check_tuning(learning_rate: f64, epochs: usize) -> Result<(), Error> {
    if !(learning_rate.is_finite() && learning_rate > 0.0) {
        let reason = format!("expected a number above 0, found {learning_rate}");
        return Err(Error::config("full_learning_rate", reason));
    }
    match epochs {
        0 => Err(Error::config("full_epochs", "expected 1 or more, found 0")),
        _ => Ok(()),
    }
}

impl Criterion for Change {
    const NAME: &'static str = "LTSFT";
    const KEEP_RATIO: f64 = 0.05;

    fn check(&self) -> Result<(), Error> {
        check_tuning(self.full_learning_rate, self.full_epochs)
    }

    fn wants(&self) -> Option<Statistic> {
        let (learning_rate, epochs) = (self.full_learning_rate, self.full_epochs);
        let tuning = Some(Tuning { learning_rate, epochs });
        Some(Statistic::Slopes { part: Part::Whole, tuning })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(slope?.change.clone()?.abs())
    }

    fn samples() -> Vec<(Self, f64)> {
        let long = Self { full_learning_rate: 1e-2, full_epochs: 3 };
        vec![(long, 0.25), (Self::default(), 0.5)]
    }
}
