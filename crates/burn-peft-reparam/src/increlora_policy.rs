//! How IncreLoRA's ranks grow: section 3 of arXiv 2308.12043, with the schedule of its authors' program.

use crate::importance::{Importances, ImportancesState, gradients_of, renewed};
use crate::increlora::{IncreLora, IncreLoraAdapter, stages};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Adapters, Error, Policy};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// `E` of a triplet that learns in advance, and with which it begins when it comes.
pub(crate) const RESERVE: f64 = 1e-5;

/// What IncreLoRA knows between steps.
#[derive(Debug, Clone)]
pub(crate) struct GrowthPolicy {
    method: IncreLora,
    importance: Importances,
    /// Triplets that each place has, by path.
    ranks: BTreeMap<String, usize>,
}

/// A [`GrowthPolicy`] at rest, for a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct AtRest {
    importance: ImportancesState,
    ranks: BTreeMap<String, usize>,
}

impl GrowthPolicy {
    /// At the start of a training of `adapters`, by path.
    pub(crate) fn new<'a>(
        method: &IncreLora,
        adapters: impl IntoIterator<Item = (&'a str, &'a IncreLoraAdapter)>,
    ) -> Self {
        let rank = |(path, adapter): (&str, &IncreLoraAdapter)| (path.to_owned(), adapter.rank());
        Self {
            method: method.clone(),
            importance: Importances::new(method.beta1, method.beta2),
            ranks: adapters.into_iter().map(rank).collect(),
        }
    }

    /// Triplets that may still come.
    fn left(&self) -> usize {
        let target = self.method.target_r * self.ranks.len();
        target.saturating_sub(self.ranks.values().sum())
    }

    /// Whether ranks grow after this step.
    fn grows(&self, step: usize) -> bool {
        let IncreLora { init_warmup, incre_interval, .. } = self.method;
        step > init_warmup && step.is_multiple_of(incre_interval)
    }

    /// The new ranks of the places that grow, by how much the triplets of a place matter together; the
    /// path decides between equals.
    fn grown(&self, scores: &BTreeMap<String, Vec<f32>>) -> BTreeMap<String, usize> {
        let IncreLora { max_r, top_h, incre_rank_num, .. } = self.method;
        let score = |(path, rank): (&String, &usize)| {
            let all: &[f32] = scores.get(path).map_or(&[], Vec::as_slice);
            let score: f32 = all.iter().take(*rank).sum();
            (*rank < max_r).then(|| (score, path.clone(), *rank))
        };
        let mut places: Vec<(f32, String, usize)> = self.ranks.iter().filter_map(score).collect();
        places.sort_by(|a, b| b.0.total_cmp(&a.0)); // stable: by path where equal
        let mut left = self.left();
        let mut grown = BTreeMap::new();
        for (_, path, rank) in places.into_iter().take(top_h) {
            let more = incre_rank_num.min(max_r - rank).min(left);
            left -= more;
            if more > 0 {
                grown.insert(path, rank + more);
            }
        }
        grown
    }

    /// The adapter with `rank` triplets, of which those from `before` on are new.
    fn with_rank(&self, adapter: IncreLoraAdapter, before: usize, rank: usize) -> IncreLoraAdapter {
        let advance = self.method.advance_learn;
        let mut triplets = adapter.triplets;
        let e = triplets.lora_e.val().without_autodiff();
        let [r] = e.dims();
        if rank > before {
            let begin = if advance { RESERVE } else { 0.0 };
            let begin = Tensor::full([rank - before], begin, &e.device());
            triplets.lora_e = renewed(&triplets.lora_e, e.slice_assign(before..rank, begin));
        }
        let spare = if advance && self.left() > 0 { self.method.incre_rank_num } else { 0 };
        let stages = stages(rank, spare, r, &adapter.stages.val().device());
        IncreLoraAdapter { triplets, stages: adapter.stages.with(stages), ..adapter }
    }
}

impl Policy<IncreLoraAdapter> for GrowthPolicy {
    fn gradients(
        &mut self,
        _step: usize,
        adapters: &Adapters<IncreLoraAdapter>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        if self.left() == 0 {
            return gradients; // decided
        }
        for (path, adapter) in adapters.iter() {
            if let Some((a, e, b)) = gradients_of(&adapter.triplets, &gradients) {
                self.importance.learn(path, &adapter.triplets, (&a, &e, &b));
            }
        }
        gradients
    }

    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<IncreLoraAdapter>,
    ) -> Result<Option<Adapters<IncreLoraAdapter>>, Error> {
        if step == 0 || self.left() == 0 || !self.grows(step) {
            return Ok(None);
        }
        let before = self.ranks.clone();
        self.ranks.extend(self.grown(&self.importance.scores()));
        let ended = self.left() == 0;
        if ended {
            self.importance.places.clear();
        }
        Ok(Some(adapters.clone().map_layers(|path, adapter| {
            match (before.get(path), self.ranks.get(path)) {
                // At the end, the next triplets of all places go.
                (Some(before), Some(rank)) if rank > before || ended => {
                    self.with_rank(adapter, *before, *rank)
                }
                _ => adapter,
            }
        })))
    }

    fn state(&self) -> Result<Json, Error> {
        let state = AtRest { importance: self.importance.state(), ranks: self.ranks.clone() };
        serde_json::to_value(state).map_err(|e| Error::config("policy", e.to_string()))
    }

    fn resume(&mut self, state: Json, device: &Device) -> Result<(), Error> {
        let state: AtRest = serde_json::from_value(state)
            .map_err(|e| Error::config("policy", format!("is not IncreLoRA's state: {e}")))?;
        self.importance.resume(state.importance, device)?;
        self.ranks = state.ranks;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adalora::Triplets;
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Adapter, Method, Sites, Targets, adapt};

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    fn method() -> IncreLora {
        IncreLora {
            top_h: 2,
            init_warmup: 2,
            incre_interval: 2,
            ..IncreLora::new(1, 2, 3, Targets::list(["0", "1", "2"]))
        }
    }

    fn layers() -> Vec<Linear> {
        (0..3).map(|_| LinearConfig::new(4, 3).init(&Device::flex())).collect()
    }

    fn adapters(method: &IncreLora) -> Adapters<IncreLoraAdapter> {
        let sites = Sites::of(&layers(), None);
        adapt(&sites, method, 0, &Device::flex().autodiff()).expect("fits")
    }

    /// Gradients as if each place's `E` had this one, and `A` and `B` none to speak of.
    fn gradients(adapters: &Adapters<IncreLoraAdapter>, sizes: [f32; 3]) -> GradientsParams {
        let mut grads = GradientsParams::new();
        let device = Device::flex();
        for ((_, adapter), size) in adapters.iter().zip(sizes) {
            let Triplets { lora_a, lora_e, lora_b } = &adapter.triplets;
            grads.register(lora_a.id, Tensor::<2>::zeros(lora_a.dims(), &device));
            grads.register(lora_e.id, Tensor::<1>::full(lora_e.dims(), size, &device));
            grads.register(lora_b.id, Tensor::<2>::zeros(lora_b.dims(), &device));
        }
        grads
    }

    /// As after a few steps: with `E` of 1.
    fn moved(adapters: Adapters<IncreLoraAdapter>) -> Adapters<IncreLoraAdapter> {
        adapters.map_layers(|_, mut adapter| {
            let e = &adapter.triplets.lora_e;
            adapter.triplets.lora_e = renewed(e, Tensor::ones(e.dims(), &Device::flex()));
            adapter
        })
    }

    fn ranks(adapters: &Adapters<IncreLoraAdapter>) -> Vec<usize> {
        adapters.iter().map(|(_, adapter)| adapter.rank()).collect()
    }

    #[test]
    fn those_that_matter_most_grow_until_the_budget_is_used() {
        let method = method();
        let mut at = moved(adapters(&method));
        let mut policy = GrowthPolicy::new(&method, at.iter());
        let mut seen = Vec::new();
        for step in 0..=8 {
            if step > 0 {
                let grads = gradients(&at, [1.0, 3.0, 2.0]);
                let same = policy.gradients(step, &at, grads);
                assert_eq!(same.len(), 9);
            }
            // A run that is cut off here goes on the same.
            let state = policy.state().expect("is JSON");
            policy = GrowthPolicy::new(&method, at.iter());
            policy.resume(state.clone(), &Device::flex()).expect("is its own");
            assert_eq!(policy.state().expect("is JSON"), state);
            if let Some(grown) = policy.adjust(step, 0.1, &at).expect("can") {
                at = grown;
            }
            seen.push(ranks(&at));
        }
        let [start, first, last] = [vec![1, 1, 1], vec![1, 2, 2], vec![1, 3, 2]];
        // Six in all: two at step 4, the one that is left at step 6, and nothing after that.
        let expected = [&start, &start, &start, &start, &first, &first, &last, &last, &last];
        assert_eq!(seen.iter().collect::<Vec<_>>(), expected);
        let adapter = |path| at.get(path).expect("is there");
        // What came begins at the reserve's; what was there kept its own.
        assert_eq!(numbers(adapter("1").triplets.lora_e.val()), [1.0, 1e-5, 1e-5]);
        assert_eq!(numbers(adapter("2").triplets.lora_e.val()), [1.0, 1e-5, 1.0]);
        assert!(adapter("1").triplets.lora_e.val().is_require_grad());
        for (_, adapter) in at.iter() {
            assert_eq!(numbers(adapter.stages.val())[3..], [0.0; 3], "none learns in advance now");
        }
        let decided = method.finished(&at).rank_pattern.expect("was decided");
        assert_eq!(decided.values().copied().collect::<Vec<_>>(), [1, 3, 2]);
        assert!(policy.resume(Json::Null, &Device::flex()).is_err());
    }

    #[test]
    fn nobody_grows_beyond_the_most() {
        let method = IncreLora { top_h: 1, incre_rank_num: 2, ..method() };
        let at = moved(adapters(&method));
        let mut policy = GrowthPolicy::new(&method, at.iter());
        let scores = |s: [f32; 3]| -> BTreeMap<String, Vec<f32>> {
            (0..3).map(|i| (i.to_string(), vec![s[i]; 3])).collect()
        };
        let mut steps = Vec::new();
        for _ in 0..3 {
            let grown = policy.grown(&scores([3.0, 2.0, 2.0]));
            policy.ranks.extend(grown.clone());
            steps.push(grown.into_iter().collect::<Vec<_>>());
        }
        // The first is full at once, then the lower path of two equals takes what is left of six.
        assert_eq!(steps, [vec![("0".to_owned(), 3)], vec![("1".to_owned(), 2)], vec![]]);
    }

    #[test]
    fn the_next_triplet_learns_and_has_no_effect_outside_of_training() {
        let method = IncreLora { advance_learn: true, ..method() };
        let at = adapters(&method);
        let layer = &layers()[0];
        let x = Tensor::<3>::ones([1, 2, 4], &Device::flex());
        let y = layer.forward(x.clone());
        let (_, adapter) = at.iter().next().expect("is one");
        let effect = |adapter: &IncreLoraAdapter| adapter.linear(layer, &x, &y).expect("is linear");
        assert!(numbers(effect(&adapter.valid())).iter().all(|v| *v == 0.0));
        let grads = GradientsParams::from_grads(effect(adapter).sum().backward(), adapter);
        let a: Tensor<2> = grads.get(adapter.triplets.lora_a.id).expect("has one");
        let moves: Vec<bool> = numbers(a.abs().sum_dim(0)).iter().map(|v| *v > 0.0).collect();
        assert_eq!(moves, [false, true, false], "E is 0 at first, so that its A waits for it");
        let e: Tensor<1> = grads.get(adapter.triplets.lora_e.id).expect("has one");
        let moves: Vec<bool> = numbers(e).iter().map(|v| *v != 0.0).collect();
        assert_eq!(moves, [true, false, false], "the next one's E waits for its time");
        // Both are kept apart, and nothing is asked of the third.
        let penalty = method.penalty(&at).expect("has one");
        let grads = GradientsParams::from_grads(penalty.backward(), adapter);
        let a: Tensor<2> = grads.get(adapter.triplets.lora_a.id).expect("has one");
        let moves: Vec<bool> = numbers(a.abs().sum_dim(0)).iter().map(|v| *v > 0.0).collect();
        assert_eq!(moves, [true, true, false]);
    }
}
