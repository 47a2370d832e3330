//! How AdaLoRA shares out the rank: sections 3.2 and 3.3 of arXiv 2303.10512, step by step as HF PEFT's
//! `update_and_allocate`.

use crate::adalora::{AdaLora, AdaLoraAdapter, Triplets};
use crate::importance::{
    Importances, ImportancesState, TripletGradients, cubic_left, gradients_of, off_orthogonal,
    renewed,
};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Policy};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// How many triplets the whole model may have at each step: all for `tinit` steps, then fewer along a
/// cubic curve, and the target for the last `tfinal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// At the start.
    pub initial: usize,
    /// In the end.
    pub target: usize,
    /// Steps before the first is taken away.
    pub tinit: usize,
    /// Steps after the last was taken away.
    pub tfinal: usize,
    /// Steps of the whole training.
    pub total_step: usize,
    /// Steps from one taking away to the next.
    pub delta_t: usize,
}

impl Budget {
    /// The step from which on nothing more is taken away.
    pub fn end(&self) -> usize {
        self.total_step.saturating_sub(self.tfinal)
    }

    /// The budget at `step`, counted from 1, and whether triplets are taken away at it.
    pub fn at(&self, step: usize) -> (usize, bool) {
        if step <= self.tinit {
            return (self.initial, false);
        }
        if step >= self.end() {
            return (self.target, true);
        }
        let left = cubic_left(step, self.tinit, self.end());
        let more = self.initial.saturating_sub(self.target) as f64;
        let budget = (more * left + self.target as f64) as usize;
        (budget, step.is_multiple_of(self.delta_t))
    }
}

/// Which triplets stay when the `fewer` that matter least in the whole model go, by place. Equals go
/// together.
pub fn keep_highest(
    scores: &BTreeMap<String, Vec<f32>>,
    fewer: usize,
) -> BTreeMap<String, Vec<bool>> {
    let mut all: Vec<f32> = scores.values().flatten().copied().collect();
    all.sort_by(f32::total_cmp);
    let threshold = fewer.checked_sub(1).and_then(|last| all.get(last));
    let stays = |score: &f32| threshold.is_none_or(|threshold| score > threshold);
    let kept = |scores: &Vec<f32>| scores.iter().map(stays).collect();
    scores.iter().map(|(path, scores)| (path.clone(), kept(scores))).collect()
}

/// The mean of `‖AᵀA - I‖` and `‖BBᵀ - I‖` over all places: what is added to the loss, times
/// `orth_reg_weight`, so that triplets stay apart. `None` where no triplet is left.
pub fn orthogonality<'a>(
    adapters: impl IntoIterator<Item = &'a AdaLoraAdapter>,
) -> Option<Tensor<1>> {
    let triplets = adapters.into_iter().filter_map(|adapter| adapter.triplets.as_ref());
    off_orthogonal(triplets.map(|Triplets { lora_a, lora_b, .. }| {
        let (a, b) = (lora_a.val(), lora_b.val());
        let identity = Tensor::eye(a.dims()[1], &a.device().inner());
        (a, b, identity)
    }))
}

/// What AdaLoRA knows between steps.
///
/// At each step, counted from 1, after the optimizer's: [`learn`](Self::learn) of every place while it
/// [`observes`](Self::observes), then [`allocate`](Self::allocate) and lay the masks that it gives over
/// the adapters with [`masked`].
#[derive(Debug, Clone)]
pub struct RankPolicy {
    budget: Budget,
    importance: Importances,
    kept: BTreeMap<String, Vec<bool>>,
    /// Of the step at hand.
    gradients: BTreeMap<String, TripletGradients>,
}

/// A [`RankPolicy`] at rest, for a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankPolicyState {
    importance: ImportancesState,
    kept: BTreeMap<String, Vec<bool>>,
}

impl RankPolicy {
    /// At the start of a training of `adapters`, by path.
    ///
    /// # Errors
    /// What [`AdaLora`]'s own check refuses.
    pub fn new<'a>(
        method: &AdaLora,
        adapters: impl IntoIterator<Item = (&'a str, &'a AdaLoraAdapter)>,
    ) -> Result<Self, Error> {
        burn_peft_core::Method::check(method)?;
        let ranks = adapters.into_iter().map(|(_, adapter)| match &adapter.triplets {
            Some(triplets) => triplets.lora_e.dims()[0],
            None => 0,
        });
        let ranks: Vec<usize> = ranks.collect();
        let budget = Budget {
            initial: ranks.iter().sum(),
            target: method.target_r * ranks.len(),
            tinit: method.tinit,
            tfinal: method.tfinal,
            total_step: method.total_step.unwrap_or_default(),
            delta_t: method.delta_t,
        };
        let importance = Importances::new(method.beta1, method.beta2);
        Ok(Self { budget, importance, kept: BTreeMap::new(), gradients: BTreeMap::new() })
    }

    /// The schedule.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Whether the gradients of `step` still count.
    pub fn observes(&self, step: usize) -> bool {
        step < self.budget.end()
    }

    /// Learns from the gradients `(∂A, ∂E, ∂B)` of one place.
    pub fn learn(
        &mut self,
        path: &str,
        triplets: &Triplets,
        gradients: (&Tensor<2>, &Tensor<1>, &Tensor<2>),
    ) {
        self.importance.learn(path, triplets, gradients);
    }

    /// Takes triplets away as the budget of `step` says. The masks that are to be laid over the adapters
    /// now, by path; none where nothing changes at this step.
    pub fn allocate(&mut self, step: usize) -> Option<&BTreeMap<String, Vec<bool>>> {
        let (budget, now) = self.budget.at(step);
        if now && step <= self.budget.end() {
            let fewer = self.budget.initial.saturating_sub(budget);
            self.kept = keep_highest(&self.importance.scores(), fewer);
        }
        if step >= self.budget.end() {
            self.importance.places.clear(); // decided
        }
        now.then_some(&self.kept)
    }

    /// The masks in force, as the adapters' file states them.
    pub fn rank_pattern(&self) -> Option<IndexMap<String, Vec<bool>>> {
        let named = self.kept.iter().map(|(path, kept)| (format!("{path}.lora_E"), kept.clone()));
        (!self.kept.is_empty()).then(|| named.collect())
    }

    /// What a checkpoint holds.
    pub fn at_rest(&self) -> RankPolicyState {
        RankPolicyState { importance: self.importance.state(), kept: self.kept.clone() }
    }

    /// Goes on where `state` was taken.
    ///
    /// # Errors
    /// A state whose tensors are of other ranks.
    pub fn continue_from(&mut self, state: RankPolicyState, device: &Device) -> Result<(), Error> {
        self.importance.resume(state.importance, device)?;
        self.kept = state.kept;
        Ok(())
    }
}

impl Policy<AdaLoraAdapter> for RankPolicy {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<AdaLoraAdapter>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        self.gradients.clear();
        if !self.observes(step) {
            return gradients;
        }
        for (path, adapter) in adapters.iter() {
            let found = adapter.triplets.as_ref().and_then(|t| gradients_of(t, &gradients));
            if let Some(found) = found {
                self.gradients.insert(path.to_owned(), found);
            }
        }
        gradients
    }

    /// As in HF PEFT, the gradients count with what the optimizer made of the triplets.
    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<AdaLoraAdapter>,
    ) -> Result<Option<Adapters<AdaLoraAdapter>>, Error> {
        if step == 0 {
            return Ok(None);
        }
        for (path, (a, e, b)) in std::mem::take(&mut self.gradients) {
            if let Some(triplets) = adapters.get(&path).and_then(|a| a.triplets.as_ref()) {
                self.learn(&path, triplets, (&a, &e, &b));
            }
        }
        let Some(kept) = self.allocate(step) else { return Ok(None) };
        let kept = kept.clone();
        Ok(Some(adapters.clone().map_layers(|path, adapter| match kept.get(path) {
            Some(kept) => masked(adapter, kept),
            None => adapter,
        })))
    }

    fn state(&self) -> Result<Json, Error> {
        serde_json::to_value(self.at_rest()).map_err(|e| Error::config("policy", e.to_string()))
    }

    fn resume(&mut self, state: Json, device: &Device) -> Result<(), Error> {
        let state = serde_json::from_value(state)
            .map_err(|e| Error::config("policy", format!("is not AdaLoRA's state: {e}")))?;
        self.continue_from(state, device)
    }
}

/// The adapter with `E = 0` where `kept` is false: a triplet without effect, which may come back.
pub fn masked(mut adapter: AdaLoraAdapter, kept: &[bool]) -> AdaLoraAdapter {
    let Some(triplets) = &mut adapter.triplets else {
        return adapter;
    };
    let mask: Vec<f32> = kept.iter().map(|kept| f32::from(u8::from(*kept))).collect();
    let e = triplets.lora_e.val();
    let mask = Tensor::<1>::from_data(TensorData::new(mask, [kept.len()]), &e.device().inner());
    triplets.lora_e = renewed(&triplets.lora_e, e.without_autodiff() * mask);
    adapter
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Param;
    use burn_peft_core::Targets;

    /// Numbers that look drawn, by formula; the same stood in the script that asked HF PEFT.
    fn filled<const D: usize>(shape: [usize; D], seed: usize, step: usize) -> Tensor<D> {
        let count: usize = shape.iter().product();
        let value = |k: usize| (((k * 7 + seed * 5 + step * 3) % 13) as f32 - 6.0) / 6.0;
        let data = TensorData::new((0..count).map(value).collect::<Vec<f32>>(), shape);
        Tensor::from_data(data, &Device::flex())
    }

    fn places() -> Vec<(&'static str, AdaLoraAdapter, [usize; 2])> {
        [("one", [4, 3]), ("two", [3, 2])]
            .into_iter()
            .enumerate()
            .map(|(i, (path, [fan_in, fan_out]))| {
                let triplets = Triplets {
                    lora_a: Param::from_tensor(filled([fan_in, 3], 3 * i, 0)),
                    lora_b: Param::from_tensor(filled([3, fan_out], 3 * i + 1, 0)),
                    lora_e: Param::from_tensor(filled([3], 3 * i + 2, 0)),
                };
                let dropout = burn::nn::DropoutConfig::new(0.0).init();
                let adapter = AdaLoraAdapter { triplets: Some(triplets), dropout, scaling: 1.0 };
                (path, adapter, [fan_in, fan_out])
            })
            .collect()
    }

    fn method() -> AdaLora {
        AdaLora {
            tinit: 2,
            tfinal: 3,
            delta_t: 2,
            beta1: 0.8,
            beta2: 0.7,
            ..AdaLora::new(3, 1, 12, Targets::list(["one", "two"]))
        }
    }

    /// What HF PEFT 0.21.2 said of the same numbers, step by step.
    #[test]
    fn allocates_as_hf_peft() {
        let mut places = places();
        let all = |places: &[(&'static str, AdaLoraAdapter, [usize; 2])]| -> Vec<f32> {
            let e = |a: &AdaLoraAdapter| a.triplets.as_ref().map(|t| t.lora_e.val().into_data());
            places.iter().filter_map(|p| e(&p.1)?.try_to_vec::<f32>().ok()).flatten().collect()
        };
        let by_path = places.iter().map(|(path, adapter, _)| (*path, adapter));
        let mut policy = RankPolicy::new(&method(), by_path).expect("is sound");
        let budgets = [6, 6, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2];
        let kept = |step| match step {
            1..4 => [1, 1, 1, 1, 1, 1],
            4 | 5 => [1, 0, 1, 1, 0, 0],
            _ => [0, 0, 1, 1, 0, 0],
        };
        for step in 1..=13 {
            if policy.observes(step) {
                for (i, (path, adapter, [fan_in, fan_out])) in places.iter().enumerate() {
                    let triplets = adapter.triplets.as_ref().expect("has some");
                    let gradients = (
                        &filled([*fan_in, 3], 3 * i + 1, step),
                        &filled([3], 3 * i + 3, step),
                        &filled([3, *fan_out], 3 * i + 2, step),
                    );
                    policy.learn(path, triplets, gradients);
                }
            }
            assert_eq!(policy.budget().at(step).0, budgets[step - 1], "step {step}");
            if step == 4 {
                let expected = [
                    ("one", [0.127_684_88, 0.072_435_886, 0.147_734_34]),
                    ("two", [0.156_216_17, 0.067_072_2, 0.126_661_33]),
                ];
                for (path, scores) in expected {
                    for (found, expected) in
                        policy.importance.places[path].triplets().iter().zip(scores)
                    {
                        assert!((found - expected).abs() < 1e-6, "{path}: {found} and {expected}");
                    }
                }
            }
            // A run that is cut off here goes on the same.
            let state = policy.at_rest();
            policy.continue_from(state, &Device::flex()).expect("is its own");
            if let Some(masks) = policy.allocate(step).cloned() {
                places = places
                    .into_iter()
                    .map(|(path, adapter, sizes)| (path, masked(adapter, &masks[path]), sizes))
                    .collect();
            }
            let alive: Vec<i32> = all(&places).iter().map(|e| i32::from(*e != 0.0)).collect();
            // The second number of the second place is 0 from the start.
            let expected: Vec<i32> =
                kept(step).iter().enumerate().map(|(i, k)| if i == 4 { 0 } else { *k }).collect();
            assert_eq!(alive, expected, "step {step}");
        }
        let pattern = policy.rank_pattern().expect("has taken some away");
        assert_eq!(pattern["one.lora_E"], [false, false, true]);
        assert_eq!(pattern["two.lora_E"], [true, false, false]);
    }

    #[test]
    fn orthogonality_is_that_of_hf_peft() {
        let places = places();
        let found = orthogonality(places.iter().map(|p| &p.1)).expect("has triplets");
        let found = found.into_scalar::<f32>();
        assert!((found - 2.195_337_8).abs() < 1e-5, "{found}");
        let none = AdaLoraAdapter { triplets: None, ..places[0].1.clone() };
        assert!(orthogonality([&none]).is_none());
    }

    #[test]
    fn nothing_goes_before_its_time() {
        let scores =
            BTreeMap::from([("a".to_owned(), vec![1.0, 2.0]), ("b".to_owned(), vec![2.0])]);
        assert!(keep_highest(&scores, 0).values().flatten().all(|kept| *kept));
        assert_eq!(keep_highest(&scores, 1)["a"], [false, true]);
        assert!(
            keep_highest(&scores, 2).values().flatten().all(|kept| !*kept),
            "equals go together"
        );
    }
}
