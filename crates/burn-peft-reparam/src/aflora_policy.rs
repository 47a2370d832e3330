//! How AFLoRA freezes its factors, by their scores and a cubic schedule (arXiv 2403.13269).

use crate::aflora::{AfLora, AfLoraAdapter};
use crate::importance::{Sensitivity, SensitivityState, cubic_left};
use burn::optim::GradientsParams;
use burn::tensor::Device;
use burn_peft_core::{Adapters, Error, Method, Policy};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};

/// A factor: the path of its place, and its name.
type Factor = (String, &'static str);

/// What AFLoRA knows between steps.
#[derive(Debug, Clone)]
pub(crate) struct Freezing {
    method: AfLora,
    /// Steps of the whole training.
    total_step: usize,
    /// Factors of the whole model.
    count: usize,
    /// Of those that are not frozen.
    scores: BTreeMap<Factor, Sensitivity<2>>,
    frozen: BTreeSet<Factor>,
}

/// A [`Freezing`] at rest, for a checkpoint: by factor, `Ī` and `Ū`; and those that are frozen.
#[derive(Debug, Serialize, Deserialize)]
struct AtRest {
    scores: Vec<(String, String, SensitivityState)>,
    frozen: Vec<(String, String)>,
}

/// The names of the factors that are ever frozen.
const NAMES: [&str; 2] = ["aflora_a", "aflora_b"];

impl Freezing {
    /// At the start of a training with so many factors in the whole model.
    ///
    /// # Errors
    /// What [`AfLora`]'s own check refuses; no `total_step`.
    pub(crate) fn new(method: &AfLora, count: usize) -> Result<Self, Error> {
        method.check()?;
        let Some(total_step) = method.total_step else {
            return Err(Error::config("total_step", "expected the number of training steps"));
        };
        let (scores, frozen) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { method: method.clone(), total_step, count, scores, frozen })
    }

    /// How many factors are frozen at this step.
    fn due(&self, step: usize) -> usize {
        let end = self.total_step.saturating_sub(self.method.tfinal);
        let share = 1.0 - cubic_left(step, self.method.tinit, end);
        (share * self.count as f64) as usize
    }

    /// Freezes those with the lowest scores until as many are as are due.
    fn freeze(&mut self, step: usize) {
        let more = self.due(step).saturating_sub(self.frozen.len());
        if more == 0 {
            return;
        }
        let mean = |(factor, known): (&Factor, &Sensitivity<2>)| {
            let score = known.score().mean().into_data().iter::<f32>().next();
            (score.unwrap_or_default(), factor.clone())
        };
        let mut scores: Vec<(f32, Factor)> = self.scores.iter().map(mean).collect();
        scores.sort_by(|a, b| a.0.total_cmp(&b.0)); // stable: by path and name where equal
        for (_, factor) in scores.into_iter().take(more) {
            self.scores.remove(&factor);
            self.frozen.insert(factor);
        }
    }
}

impl Policy<AfLoraAdapter> for Freezing {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<AfLoraAdapter>,
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        let [a, b] = NAMES;
        let factors =
            |adapter: &AfLoraAdapter| [(a, adapter.aflora_a.id), (b, adapter.aflora_b.id)];
        for (path, adapter) in adapters.iter() {
            for (name, id) in factors(adapter) {
                let factor = (path.to_owned(), name);
                let gradient = gradients.get::<2>(id).filter(|_| !self.frozen.contains(&factor));
                if let Some(gradient) = gradient {
                    let zeros = || Sensitivity::zeros(&gradient);
                    let known = self.scores.entry(factor).or_insert_with(zeros);
                    let AfLora { beta1, beta2, .. } = self.method;
                    known.observe(gradient.without_autodiff().abs(), beta1, beta2);
                }
            }
        }
        self.freeze(step);
        for (path, adapter) in adapters.iter() {
            for (name, id) in factors(adapter) {
                if self.frozen.contains(&(path.to_owned(), name)) {
                    gradients.remove::<2>(id);
                }
            }
        }
        gradients
    }

    fn adjust(
        &mut self,
        _step: usize,
        _learning_rate: f64,
        _adapters: &Adapters<AfLoraAdapter>,
    ) -> Result<Option<Adapters<AfLoraAdapter>>, Error> {
        Ok(None)
    }

    fn state(&self) -> Result<Json, Error> {
        let score = |((path, name), known): (&Factor, &Sensitivity<2>)| {
            (path.clone(), (*name).to_owned(), known.state())
        };
        let state = AtRest {
            scores: self.scores.iter().map(score).collect(),
            frozen: self.frozen.iter().map(|(p, name)| (p.clone(), (*name).to_owned())).collect(),
        };
        serde_json::to_value(state).map_err(|e| Error::config("policy", e.to_string()))
    }

    fn resume(&mut self, state: Json, device: &Device) -> Result<(), Error> {
        let state: AtRest = serde_json::from_value(state)
            .map_err(|e| Error::config("policy", format!("is not AFLoRA's state: {e}")))?;
        let known = |path: &str, name: &str| {
            let name = NAMES.into_iter().find(|known| *known == name);
            let reason = "the state names a factor that AFLoRA does not freeze";
            Ok((path.to_owned(), name.ok_or_else(|| Error::place(path, reason))?))
        };
        let mut scores = BTreeMap::new();
        for (path, name, state) in state.scores {
            let factor = known(&path, &name)?;
            let score = Sensitivity::restored(state, device);
            let reason = "the state's scores have not 2 axes";
            scores.insert(factor, score.ok_or_else(|| Error::place(path, reason))?);
        }
        self.frozen =
            state.frozen.iter().map(|(p, n)| known(p, n)).collect::<Result<_, Error>>()?;
        self.scores = scores;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Param;
    use burn::tensor::Tensor;

    fn method() -> AfLora {
        AfLora { tinit: 1, tfinal: 2, total_step: Some(7), ..AfLora::default() }
    }

    fn adapters() -> Adapters<AfLoraAdapter> {
        let device = Device::flex().autodiff();
        let adapter = || AfLoraAdapter {
            aflora_a: Param::from_tensor(Tensor::ones([3, 2], &device)),
            aflora_b: Param::from_tensor(Tensor::ones([2, 4], &device)),
            aflora_s_d: Param::from_tensor(Tensor::ones([2], &device)),
            aflora_s_b: Param::from_tensor(Tensor::ones([4], &device)),
            dropout: crate::LowRank::default().dropout(),
            scaling: 1.0,
        };
        Adapters::new(["one", "two"].map(|path| (path.to_owned(), adapter())), [])
    }

    /// Gradients of these sizes for `A` and `B` of each place.
    fn gradients(adapters: &Adapters<AfLoraAdapter>, sizes: [[f32; 2]; 2]) -> GradientsParams {
        let mut grads = GradientsParams::new();
        let device = Device::flex();
        for ((_, adapter), [a, b]) in adapters.iter().zip(sizes) {
            grads.register(adapter.aflora_a.id, Tensor::<2>::full([3, 2], a, &device));
            grads.register(adapter.aflora_b.id, Tensor::<2>::full([2, 4], b, &device));
            grads.register(adapter.aflora_s_d.id, Tensor::<1>::ones([2], &device));
            grads.register(adapter.aflora_s_b.id, Tensor::<1>::ones([4], &device));
        }
        grads
    }

    #[test]
    fn the_share_of_frozen_factors_is_cubic() {
        let policy = Freezing::new(&method(), 16).expect("is sound");
        // 16·(1 - (1 - t)³) for t = 0, 1/4, 1/2, 3/4, 1: 9.25, 14, 15.75.
        let due: Vec<usize> = (0..=8).map(|step| policy.due(step)).collect();
        assert_eq!(due, [0, 0, 9, 14, 15, 16, 16, 16, 16]);
        assert!(Freezing::new(&AfLora::default(), 16).is_err(), "nobody said how many steps");
        let none = AfLora { tinit: 5, ..method() };
        assert!(Freezing::new(&none, 16).is_err_and(|e| e.to_string().contains("tinit")));
    }

    #[test]
    fn the_lowest_scores_are_frozen_first_and_for_good() {
        let adapters = adapters();
        let mut policy = Freezing::new(&method(), 4).expect("is sound");
        let mut seen = Vec::new();
        for step in 1..=7 {
            // The order turns once the first are frozen; they stay so.
            let sizes = if step < 3 { [[1.0, 4.0], [2.0, 3.0]] } else { [[9.0, 0.1], [9.0, 0.2]] };
            let given = policy.gradients(step, &adapters, gradients(&adapters, sizes));
            let mut left = Vec::new();
            for (path, adapter) in adapters.iter() {
                for (name, id) in [("a", adapter.aflora_a.id), ("b", adapter.aflora_b.id)] {
                    if given.get::<2>(id).is_some() {
                        left.push(format!("{path}.{name}"));
                    }
                }
                for id in [adapter.aflora_s_d.id, adapter.aflora_s_b.id] {
                    assert!(given.get::<1>(id).is_some(), "scales are never frozen");
                }
            }
            seen.push(left.join(" "));
            assert!(policy.adjust(step, 0.1, &adapters).expect("can").is_none());
            // A run that is cut off here goes on the same.
            let state = policy.state().expect("is JSON");
            policy = Freezing::new(&method(), 4).expect("is sound");
            policy.resume(state.clone(), &Device::flex()).expect("is its own");
            assert_eq!(policy.state().expect("is JSON"), state);
        }
        // Due are 0, 2, 3, 3, 4 of four.
        let [all, two] = ["one.a one.b two.a two.b", "one.b two.b"];
        assert_eq!(&seen[..2], [all, two]);
        assert!(seen[2] == seen[3] && seen[2].len() == "one.b".len(), "{seen:?}");
        assert_eq!(&seen[4..], ["", "", ""]);
        let other = serde_json::json!({"scores": [], "frozen": [["one", "aflora_s_d"]]});
        assert!(policy.resume(other, &Device::flex()).is_err());
    }

    #[test]
    fn the_score_is_of_the_gradient_alone() {
        let adapters = adapters();
        let mut policy = Freezing::new(&method(), 4).expect("is sound");
        policy.gradients(1, &adapters, gradients(&adapters, [[2.0, 4.0], [1.0, 3.0]]));
        // I = 2, Ī = 0.15·2, Ū = 0.15·(2 - 0.3); to a few roundings.
        let score =
            policy.scores[&("one".to_owned(), NAMES[0])].score().mean().into_scalar::<f32>();
        assert!((score - 0.3 * 0.255).abs() < 8.0 * f32::EPSILON, "{score}");
    }
}
