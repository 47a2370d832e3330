//! Child-tuning: each step moves a child network, drawn anew or chosen once (arXiv 2109.05687).

use crate::mask::Mask;
use crate::selected::{Entries, SelectedAdapter};
use crate::selective::{Criterion, Scored, Selective, highest, share};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Part, Policy, Slope, Statistic, site_rng};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// Child-tuning (arXiv 2109.05687), in its two forms. "ChildTuning-D" (by the task's data) trains the numbers
/// with the largest empirical Fisher information, as [`FishMask`](crate::FishMask) does with a smaller share.
/// "ChildTuning-F" (free of the task) trains all numbers of the target places, and each step a share
/// `p = keep_ratio` of them: the gradient becomes `g ⊙ m/p`, `m ~ Bernoulli(p)` drawn anew for each step.
///
/// `keep_ratio` is the paper's `reserve_p`, 0.3 by default. With F everything is held, trained and stored:
/// it regularizes, and saves nothing. Shapes, file, parameter count and errors are [`Selective`]'s.
pub type ChildTuning = Selective<Child>;

/// Which child network is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChildMode {
    /// Chosen once by the data; the default.
    #[default]
    #[serde(rename = "ChildTuning-D")]
    Driven,
    /// Drawn in each step.
    #[serde(rename = "ChildTuning-F")]
    Free,
}

/// The criterion of [`ChildTuning`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Child {
    /// "ChildTuning-D" (the default) or "ChildTuning-F".
    pub mode: ChildMode,
    /// Seed of what "ChildTuning-F" draws; default 0.
    pub mask_seed: u64,
}

impl Criterion for Child {
    const NAME: &'static str = "CHILDTUNING";
    const KEEP_RATIO: f64 = 0.3;

    fn wants(&self) -> Option<Statistic> {
        match self.mode {
            ChildMode::Driven => Some(Statistic::Slopes { part: Part::Whole, tuning: None }),
            ChildMode::Free => None,
        }
    }

    fn score(&self, base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        match self.mode {
            ChildMode::Driven => Some(slope?.square.clone()),
            ChildMode::Free => Some(base.zeros_like()),
        }
    }

    fn choose(&self, scored: &[Scored], keep_ratio: f64) -> Mask {
        match self.mode {
            ChildMode::Driven => highest(scored, share(scored, keep_ratio)),
            ChildMode::Free => scored.iter().filter_map(Scored::whole).collect(),
        }
    }

    fn policy(&self, keep_ratio: f64) -> Option<Box<dyn Policy<SelectedAdapter>>> {
        match self.mode {
            ChildMode::Driven => None,
            ChildMode::Free => Some(Box::new(Draws { p: keep_ratio, seed: self.mask_seed })),
        }
    }

    fn samples() -> Vec<(Self, f64)> {
        let free = Self { mode: ChildMode::Free, mask_seed: 3 };
        vec![(free, 0.25), (Self::default(), 0.5)]
    }
}

/// Draws the gradients that a step gets. It knows nothing but the configuration.
struct Draws {
    p: f64,
    seed: u64,
}

impl Policy<SelectedAdapter> for Draws {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<SelectedAdapter>,
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        let seed = self.seed ^ (step as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let scale = (1.0 / self.p) as f32;
        for (path, adapter) in adapters.iter() {
            let mut rng = site_rng(seed, path);
            let mut draw = |entries: &Entries| {
                let Some(gradient) = gradients.remove::<1>(entries.values.id) else { return };
                let [count] = gradient.dims();
                let mask: Vec<f32> =
                    (0..count).map(|_| if rng.random_bool(self.p) { scale } else { 0.0 }).collect();
                let mask = Tensor::from_data(TensorData::new(mask, [count]), &gradient.device());
                gradients.register(entries.values.id, gradient * mask);
            };
            adapter.weight.iter().chain(&adapter.bias).for_each(&mut draw);
        }
        gradients
    }

    fn adjust(
        &mut self,
        _step: usize,
        _learning_rate: f64,
        _adapters: &Adapters<SelectedAdapter>,
    ) -> Result<Option<Adapters<SelectedAdapter>>, Error> {
        Ok(None)
    }

    fn state(&self) -> Result<Json, Error> {
        Ok(Json::Null)
    }

    fn resume(&mut self, _state: Json, _device: &Device) -> Result<(), Error> {
        Ok(())
    }
}
