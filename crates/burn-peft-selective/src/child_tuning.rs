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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::{Module, Param};
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Method, Sites, Targets, adapt};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    #[test]
    fn each_step_draws_a_share_of_the_gradient_and_makes_up_for_the_rest() {
        let device = Device::flex();
        let model = One { query: LinearConfig::new(100, 100).init(&device) };
        let mut method = ChildTuning::new(0.25, Targets::list(["query"]));
        method.criterion = Child { mode: ChildMode::Free, mask_seed: 1 };
        let sites = Sites::of(&model, None);
        let adapters = adapt(&sites, &method, 0, &device.clone().autodiff()).expect("fits");
        let mut policy = method.policy(&adapters).expect("fits").expect("is there");
        let values: &Param<Tensor<1>> =
            &adapters.get("query").and_then(|a| a.weight.as_ref()).expect("is there").values;
        let mut drawn = |step: usize| -> Vec<f32> {
            let mut gradients = GradientsParams::new();
            gradients.register(values.id, Tensor::<1>::ones([10_000], &device));
            let left = policy.gradients(step, &adapters, gradients).remove::<1>(values.id);
            left.expect("is there").into_data().iter::<f32>().collect()
        };
        let [first, again, second] = [drawn(1), drawn(1), drawn(2)];
        assert!(first == again && first != second);
        let kept = first.iter().filter(|g| **g == 4.0).count();
        assert_eq!(first.iter().filter(|g| **g == 0.0).count(), 10_000 - kept);
        // Five standard deviations of a binomial count.
        let off = (kept as f64 - 2_500.0).abs();
        assert!(off < 5.0 * (10_000.0 * 0.25 * 0.75_f64).sqrt(), "{kept}");
    }
}
