//! How DyLoRA draws a rank for each step: algorithm 1 of arXiv 2210.07558.

use crate::dylora::{DyLora, DyLoraAdapter};
use crate::importance::renewed;
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Policy, site_rng};
use rand::RngExt;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

/// `[2, r]`: 1 where a rank learns, and 1 where it is `used` and does not.
pub(crate) fn mask(
    learned: Range<usize>,
    used: Range<usize>,
    r: usize,
    device: &Device,
) -> Tensor<2> {
    let one = |is: bool| f32::from(u8::from(is));
    let learns = (0..r).map(|rank| one(learned.contains(&rank)));
    let holds = (0..r).map(|rank| one(used.contains(&rank) && !learned.contains(&rank)));
    let values: Vec<f32> = learns.chain(holds).collect();
    Tensor::from_data(TensorData::new(values, [2, r]), device)
}

/// Draws the ranks, and keeps what a step does not train as it was. What it draws depends on the seed and
/// the step alone, so that it knows nothing between steps.
#[derive(Debug, Clone)]
pub(crate) struct RankSampling {
    ranks: RangeInclusive<usize>,
    frozen: bool,
    seed: u64,
    /// `A` and `B` as they were before the optimizer's step at hand.
    before: BTreeMap<String, (Tensor<2>, Tensor<2>)>,
}

impl RankSampling {
    pub(crate) fn new(method: &DyLora) -> Self {
        Self {
            ranks: method.r_min..=method.low_rank.r,
            frozen: method.frozen,
            seed: method.rank_seed,
            before: BTreeMap::new(),
        }
    }

    /// `b` of this step.
    fn rank(&self, step: usize) -> usize {
        site_rng(self.seed, &step.to_string()).random_range(self.ranks.clone())
    }

    /// Which of `r` ranks learn in this step, and which are used.
    fn ranges(&self, step: usize, r: usize) -> (Range<usize>, Range<usize>) {
        let rank = self.rank(step).min(r);
        (if self.frozen { rank - 1 } else { 0 }..rank, 0..rank)
    }
}

impl Policy<DyLoraAdapter> for RankSampling {
    fn gradients(
        &mut self,
        _step: usize,
        adapters: &Adapters<DyLoraAdapter>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        let values = |a: &DyLoraAdapter| (a.dylora_a.val(), a.dylora_b.val());
        self.before = adapters.iter().map(|(path, a)| (path.to_owned(), values(a))).collect();
        gradients
    }

    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<DyLoraAdapter>,
    ) -> Result<Option<Adapters<DyLoraAdapter>>, Error> {
        let mut before = std::mem::take(&mut self.before);
        Ok(Some(adapters.clone().map_layers(|path, mut adapter| {
            let [fan_in, r] = adapter.dylora_a.dims();
            let [_, fan_out] = adapter.dylora_b.dims();
            if let Some((a, b)) = before.remove(path) {
                // An optimizer's momentum and decay move what got no gradient, too.
                let (learned, _) = self.ranges(step, r);
                let part = [0..fan_in, learned.clone()];
                adapter.dylora_a = only(&adapter.dylora_a, a, part);
                adapter.dylora_b = only(&adapter.dylora_b, b, [learned, 0..fan_out]);
            }
            let (learned, used) = self.ranges(step + 1, r);
            let device = adapter.drawn.val().device();
            adapter.drawn = adapter.drawn.with(mask(learned, used, r, &device));
            adapter
        })))
    }

    fn state(&self) -> Result<Json, Error> {
        Ok(Json::Null)
    }

    fn resume(&mut self, _state: Json, _device: &Device) -> Result<(), Error> {
        Ok(())
    }
}

/// The parameter as it was `before`, but for this part of it.
fn only(param: &Param<Tensor<2>>, before: Tensor<2>, part: [Range<usize>; 2]) -> Param<Tensor<2>> {
    let learned = param.val().without_autodiff().slice(part.clone());
    renewed(param, before.without_autodiff().slice_assign(part, learned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::AdamWConfig;
    use burn_peft_core::{Adapter, Sites, Targets, adapt};

    const R: usize = 4;

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    /// A layer, inputs, and the outputs of the layer with another weight: a task of full rank.
    struct Task {
        layer: Vec<Linear>,
        x: Tensor<3>,
        y: Tensor<3>,
    }

    impl Task {
        fn new() -> Self {
            let device = Device::flex();
            let mut rng = site_rng(1, "task");
            let mut normal =
                |shape: [usize; 2]| crate::random::normal(shape, 1.0, &mut rng, &device);
            let mut layer = LinearConfig::new(6, 5).with_bias(false).init(&device);
            layer.weight = Param::from_tensor(normal([6, 5]));
            let x = normal([40, 6]).unsqueeze::<3>();
            let other = layer.weight.val() + normal([6, 5]);
            let y = x.clone().matmul(other.unsqueeze());
            Self { layer: vec![layer], x, y }
        }

        fn adapters(&self, method: &DyLora) -> Adapters<DyLoraAdapter> {
            let sites = Sites::of(&self.layer, None);
            adapt(&sites, method, 3, &Device::flex().autodiff()).expect("fits")
        }

        fn loss(&self, adapter: &impl Adapter) -> Tensor<1> {
            let y = self.layer[0].forward(self.x.clone());
            let more = adapter.linear(&self.layer[0], &self.x, &y).expect("is linear");
            (y + more - self.y.clone()).square().mean()
        }

        fn trained(&self, method: &DyLora, steps: usize) -> Adapters<DyLoraAdapter> {
            let mut adapters = self.adapters(method);
            let mut policy = RankSampling::new(method);
            let mut optimizer = AdamWConfig::new().with_weight_decay(0.1).init();
            adapters = policy.adjust(0, 0.0, &adapters).expect("can").expect("draws");
            for step in 1..=steps {
                let before = adapters.clone();
                let (_, adapter) = adapters.iter().next().expect("is one");
                let grads = GradientsParams::from_grads(self.loss(adapter).backward(), &adapters);
                let grads = policy.gradients(step, &adapters, grads);
                adapters = optimizer.step(0.02, adapters, grads);
                adapters = policy.adjust(step, 0.02, &adapters).expect("can").expect("draws");
                let (learned, _) = policy.ranges(step, R);
                let moved = moved(&before, &adapters);
                let expected: Vec<bool> = (0..R).map(|rank| learned.contains(&rank)).collect();
                assert_eq!(moved, expected, "step {step}");
            }
            adapters
        }
    }

    /// Which ranks are others now.
    fn moved(before: &Adapters<DyLoraAdapter>, after: &Adapters<DyLoraAdapter>) -> Vec<bool> {
        let [before, after] = [before, after].map(|a| a.iter().next().expect("is one").1);
        let rank = |adapter: &DyLoraAdapter, rank: usize| {
            let a = adapter.dylora_a.val().narrow(1, rank, 1);
            let b = adapter.dylora_b.val().narrow(0, rank, 1);
            [numbers(a), numbers(b)].concat()
        };
        (0..R).map(|k| rank(before, k) != rank(after, k)).collect()
    }

    fn method(frozen: bool) -> DyLora {
        DyLora { frozen, ..DyLora::new(R, 4.0, Targets::list(["0"])) }
    }

    #[test]
    fn every_rank_of_one_training_is_better_than_none() {
        let task = Task::new();
        for frozen in [false, true] {
            let untrained = task.layer[0].forward(task.x.clone()) - task.y.clone();
            let untrained = untrained.square().mean().into_scalar::<f32>();
            let trained = task.trained(&method(frozen), 300).valid();
            let (_, adapter) = trained.iter().next().expect("is one");
            for rank in 1..=R {
                let loss = task.loss(&adapter.at_rank(rank)).into_scalar::<f32>();
                assert!(loss < untrained, "rank {rank}, frozen {frozen}: {loss} and {untrained}");
            }
        }
    }

    #[test]
    fn a_rank_at_use_is_the_slice_and_the_step_its_mask() {
        let task = Task::new();
        for (rank, use_rslora) in [(1, false), (2, true), (3, false), (R, true)] {
            let mut method = DyLora { rank_at_use: Some(rank), ..method(false) };
            method.low_rank.use_rslora = use_rslora;
            let trained = task.trained(&method, 6);
            let (_, at_use) = trained.iter().next().expect("is one");
            let (mut learning, at_use) = (at_use.clone(), at_use.valid());
            // Plain LoRA of that rank, bit for bit.
            let a = at_use.dylora_a.val().narrow(1, 0, rank);
            let b = at_use.dylora_b.val().narrow(0, 0, rank);
            let scale = 4.0 / if use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            let plain = crate::lora::LoraAdapter::of(a, b, scale);
            let loss = task.loss(&plain).into_scalar::<f32>();
            assert_eq!(task.loss(&at_use).into_scalar::<f32>(), loss);
            // And a step that draws that rank computes the same, but for rounding.
            for held in [0, rank - 1] {
                let device = learning.drawn.val().device();
                let drawn = mask(held..rank, 0..rank, R, &device);
                learning.drawn = learning.drawn.with(drawn);
                let found = task.loss(&learning).into_scalar::<f32>();
                assert!((found - loss).abs() < 64.0 * f32::EPSILON * loss, "{found} and {loss}");
            }
        }
    }

    #[test]
    fn draws_are_uniform_within_their_bounds_and_the_same_again() {
        let policy = RankSampling::new(&DyLora { r_min: 2, ..method(false) });
        let mut counts = [0_usize; R + 1];
        for step in 1..=3000 {
            assert_eq!(policy.rank(step), policy.clone().rank(step));
            counts[policy.rank(step)] += 1;
        }
        // A thousand each, with a standard deviation of √(3000·2/9) = 26.
        assert!(counts[..2] == [0, 0] && counts[2..].iter().all(|c| c.abs_diff(1000) < 130));
        let other = RankSampling::new(&DyLora { rank_seed: 1, r_min: 2, ..method(false) });
        assert!((1..=50).any(|step| policy.rank(step) != other.rank(step)));
    }

    #[test]
    fn what_is_held_gets_no_gradient() {
        let task = Task::new();
        let method = method(true);
        let trained = task.trained(&method, 5);
        let (_, adapter) = trained.iter().next().expect("is one");
        let mut adapter = adapter.clone();
        let device = adapter.drawn.val().device();
        adapter.drawn = adapter.drawn.with(mask(2..3, 0..3, R, &device));
        let grads = GradientsParams::from_grads(task.loss(&adapter).backward(), &adapter);
        let a: Tensor<2> = grads.get(adapter.dylora_a.id).expect("has one");
        let b: Tensor<2> = grads.get(adapter.dylora_b.id).expect("has one");
        let sizes = |t: Tensor<2>, axis| numbers(t.abs().sum_dim(axis));
        for sizes in [sizes(a, 0), sizes(b, 1)] {
            let moved: Vec<bool> = sizes.iter().map(|size| *size > 0.0).collect();
            assert_eq!(moved, [false, false, true, false]);
        }
    }
}
