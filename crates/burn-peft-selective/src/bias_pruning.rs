//! U-BitFit and S-BitFit: BitFit pruned to the biases whose training pays (arXiv 2305.16597).

use crate::lt_sft::check_tuning;
use crate::mask::Mask;
use crate::selective::{Criterion, Scored, Selective, highest, share};
use burn::tensor::Tensor;
use burn_peft_core::{Error, Kind, Part, Slope, Statistic, Tuning};
use serde::{Deserialize, Serialize};

/// U-BitFit and S-BitFit (arXiv 2305.16597, neural architecture search for BitFit): all biases are trained
/// first, and pruned by how much the loss would rise without what was learnt, to first order:
/// `|δ_i·∂L/∂b_i|` of the number's difference `δ_i`. What is left is trained from the base model.
///
/// "unstructured" (U) chooses single numbers, "structured" (S) whole biases by the sum of their scores. The
/// first training is as in [`LtSft`](crate::LtSft), of biases alone, with the same options, and `∂L/∂b` its
/// mean gradient. The paper prunes in several rounds; this is one. `keep_ratio` is 0.5 of the biases' numbers by
/// default. Shapes, file, parameter count and errors are [`Selective`]'s, and a place without a bias is refused.
pub type BiasPruning = Selective<FirstOrder>;

/// What is chosen or left out as one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Structure {
    /// Single numbers; the default.
    #[default]
    Unstructured,
    /// Whole parameters.
    Structured,
}

/// The criterion of [`BiasPruning`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FirstOrder {
    /// "unstructured" (the default) or "structured".
    pub structure: Structure,
    /// Rate of the first step of the training before the choice; default 1e-3.
    pub full_learning_rate: f64,
    /// How often that training sees each batch; default 1.
    pub full_epochs: usize,
}

impl Default for FirstOrder {
    fn default() -> Self {
        Self { structure: Structure::default(), full_learning_rate: 1e-3, full_epochs: 1 }
    }
}

impl Criterion for FirstOrder {
    const NAME: &'static str = "USBITFIT";
    const KEEP_RATIO: f64 = 0.5;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d, Kind::Norm];
    const PART: Part = Part::Bias;

    fn check(&self) -> Result<(), Error> {
        check_tuning(self.full_learning_rate, self.full_epochs)
    }

    fn wants(&self) -> Option<Statistic> {
        let (learning_rate, epochs) = (self.full_learning_rate, self.full_epochs);
        let tuning = Some(Tuning { learning_rate, epochs });
        Some(Statistic::Slopes { part: Part::Bias, tuning })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        let slope = slope?;
        Some((slope.change.clone()? * slope.mean.clone()).abs())
    }

    fn choose(&self, scored: &[Scored], keep_ratio: f64) -> Mask {
        if self.structure == Structure::Unstructured {
            return highest(scored, share(scored, keep_ratio));
        }
        let sum = |one: &Scored| one.scores.iter().map(|score| f64::from(*score)).sum::<f64>();
        let mut order: Vec<&Scored> = scored.iter().collect();
        order.sort_by(|a, b| sum(b).total_cmp(&sum(a)).then(a.name.cmp(&b.name)));
        let mut room = share(scored, keep_ratio);
        let fits = |one: &&Scored| {
            let fits = one.scores.len() <= room;
            room = room.saturating_sub(one.scores.len());
            fits
        };
        order.into_iter().take_while(fits).filter_map(Scored::whole).collect()
    }

    fn samples() -> Vec<(Self, f64)> {
        let whole = Self { structure: Structure::Structured, full_epochs: 2, ..Self::default() };
        vec![(whole, 1.0), (Self::default(), 0.75)]
    }
}
