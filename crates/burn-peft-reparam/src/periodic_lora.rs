//! PeriodicLoRA: LoRA in stages, each of which begins anew over the sum of those before
//! (arXiv 2402.16141).

use crate::LoraAdapter;
use crate::common::{positive, probability};
use crate::low_rank::{LowRank, bounded, faces_by_lora, stored, taken};
use crate::random::uniform;
use crate::source::laid_out;
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Buffer, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
    site_rng,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// PeriodicLoRA (arXiv 2402.16141): `y = xW + b + s·dropout(x)·(A·B + Σ_k A_k·B_k)`, the sum over the stages
/// that have ended.
///
/// The training has `stages` stages of equal length. At the end of each but the last, `(1 - m)·A·B` goes
/// into the sum, `m` being the `momentum`, and the optimizer's state of `A` and `B` begins anew. Without
/// momentum `A` is drawn again and `B` is zero; with it `A` stays and `B` becomes `m·B`. Either way the
/// end of a stage changes no output. (The paper adds the sum to the base weights, where it cannot be taken
/// off again; here it stays beside them, a constant. The paper's momentum keeps a part of the stage; that
/// this part is left in `B` is our choice. It also begins the learning rate's schedule anew, which here
/// goes on over the whole training: a constant rate comes nearest.)
///
/// `A [fan_in, r] ~ U(±1/√fan_in)`, `B [r, fan_out]` zero at first; `A_k`, `B_k` are held side by side,
/// `[fan_in, r·(stages-1)]` and `[r·(stages-1), fan_out]`, zero until their stage ends;
/// `s = lora_alpha / r`. Dropout acts on the whole difference. Parameters: `r·(fan_in + fan_out)` a place.
/// Folds. The file holds one pair of factors of rank `r·stages`, `[A, A_1, ..]` and `[B; B_1; ..]`: a plain
/// LoRA of that rank and the same `s` (`lora_alpha·stages`, or `lora_alpha·√stages` with rsLoRA).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeriodicLora {
    /// Rank of one stage, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Stages of the training; default 4.
    pub stages: usize,
    /// Part of a stage's difference that the next goes on with, in [0, 1); default 0.
    pub momentum: f64,
    /// Steps of the whole training; default: as many as it has.
    pub total_step: Option<usize>,
    /// Seed of the factors that later stages begin with; default 0.
    pub stage_seed: u64,
}

impl Default for PeriodicLora {
    fn default() -> Self {
        Self {
            low_rank: LowRank::default(),
            stages: 4,
            momentum: 0.0,
            total_step: None,
            stage_seed: 0,
        }
    }
}

/// What PeriodicLoRA trains at one place.
#[derive(Module, Debug)]
pub struct PeriodicLoraAdapter {
    /// `A [fan_in, r]`.
    pub plora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub plora_b: Param<Tensor<2>>,
    /// The stages that have ended; none where there is one stage.
    pub past: Option<Past>,
    /// Drops inputs of all factors in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

/// The factors of stages that have ended, side by side.
#[derive(Module, Debug)]
pub struct Past {
    /// `[A_1, A_2, ..]`, `[fan_in, r·(stages-1)]`.
    pub a: Buffer<2>,
    /// `[B_1; B_2; ..]`, `[r·(stages-1), fan_out]`.
    pub b: Buffer<2>,
}

impl PeriodicLoraAdapter {
    fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.plora_a.val(), self.plora_b.val());
        match &self.past {
            Some(past) => {
                (Tensor::cat(vec![a, past.a.val()], 1), Tensor::cat(vec![b, past.b.val()], 0))
            }
            None => (a, b),
        }
    }

    fn lora(&self) -> LoraAdapter {
        let (a, b) = self.factors();
        crate::lora::LoraAdapter::of(a, b, self.scaling)
    }

    /// The same function with the stage's difference, but for `momentum` of it, in the sum at `ended`.
    fn unloaded(mut self, ended: usize, momentum: f64, rng: &mut ChaCha8Rng) -> Self {
        let Some(past) = &mut self.past else { return self };
        let device = self.plora_a.val().device();
        let [a, b] = [&self.plora_a, &self.plora_b].map(|factor| factor.val().without_autodiff());
        let ([fan_in, r], [_, fan_out]) = (a.dims(), b.dims());
        let there = ended * r..(ended + 1) * r;
        let kept = b.clone() * (1.0 - momentum);
        past.a = past.a.with(past.a.val().slice_assign([0..fan_in, there.clone()], a.clone()));
        past.b = past.b.with(past.b.val().slice_assign([there, 0..fan_out], kept));
        let (a, b) = match momentum > 0.0 {
            true => (laid_out(a, &device), laid_out(b * momentum, &device)),
            false => {
                let bound = (1.0 / fan_in as f32).sqrt();
                let a = uniform([fan_in, r], bound, rng, &device);
                (a, Tensor::zeros([r, fan_out], &device))
            }
        };
        // With new ids, by which the optimizer knows nothing of them.
        self.plora_a = Param::from_tensor(a);
        self.plora_b = Param::from_tensor(b);
        self
    }
}

faces_by_lora!(PeriodicLoraAdapter, plora_a);

impl PeriodicLora {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        past: Option<Past>,
    ) -> Result<PeriodicLoraAdapter, Error> {
        let [_, r] = a.dims();
        Ok(PeriodicLoraAdapter {
            plora_a: Param::from_tensor(a),
            plora_b: Param::from_tensor(b),
            past,
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }

    /// The rank of all stages together.
    fn whole_rank(&self, site: &Site) -> Result<usize, Error> {
        let r = self.low_rank.rank(site)?;
        bounded("stages", &site.path, &[r, self.stages, site.fan_in() + site.fan_out()])?;
        Ok(r * self.stages)
    }

    /// After which steps a stage ends, the last stage aside.
    fn ends(&self) -> Result<Vec<usize>, Error> {
        let total = self.total_step.unwrap_or(0);
        if total == 0 {
            return Err(Error::config("total_step", "expected the number of training steps"));
        }
        if total < self.stages {
            let reason = format!(
                "expected at most one stage a step, which are {total}, found {}",
                self.stages
            );
            return Err(Error::config("stages", reason));
        }
        let end = |stage: usize| (stage as u128 * total as u128 / self.stages as u128) as usize;
        Ok((1..self.stages).map(end).collect())
    }
}

impl Method for PeriodicLora {
    type Adapter = PeriodicLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "PERIODICLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["plora_b"];
    const PAIR: Option<[&'static str; 2]> = Some(["plora_a", "plora_b"]);

    fn targets(&self) -> &Targets {
        &self.low_rank.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.low_rank.targets
    }

    fn biases(&self) -> Biases {
        self.low_rank.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        self.low_rank.check()?;
        positive("stages", self.stages)?;
        probability("momentum", self.momentum)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<PeriodicLoraAdapter, Error> {
        let pair = self.low_rank.drawn(site, rng, device)?;
        let past = self.whole_rank(site)? - pair.0.dims()[1];
        let past = (past > 0).then(|| Past {
            a: Buffer::new(Tensor::zeros([site.fan_in(), past], device)),
            b: Buffer::new(Tensor::zeros([past, site.fan_out()], device)),
        });
        self.adapter(site, pair, past)
    }

    fn fold(adapter: &PeriodicLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, momentum: 0.5, stage_seed: 3, ..Self::default() },
            Self { low_rank: patterned.clone(), stages: 1, ..Self::default() },
            Self { low_rank: patterned, stages: 3, total_step: Some(9), ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site)
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn policy(
        &self,
        adapters: &Adapters<PeriodicLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<PeriodicLoraAdapter>>>, Error> {
        let ends = self.ends()?;
        for (path, adapter) in adapters.iter() {
            let held = adapter.past.as_ref().map(|past| past.b.val().abs().sum());
            if held.is_some_and(|sum| sum.into_scalar::<f32>() != 0.0) {
                let reason = "holds the stages of a training that has ended, and this one has no room \
                              for more; merge the adapter and train a fresh one over the result";
                return Err(Error::place(path, reason));
            }
        }
        Ok(Some(Box::new(Stages { ends, momentum: self.momentum, seed: self.stage_seed })))
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &PeriodicLoraAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let (a, b) = adapter.factors();
        vec![("plora_A", stored(a)), ("plora_B", stored(b))]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<PeriodicLoraAdapter, Error> {
        let (r, whole) = (self.low_rank.rank(site)?, self.whole_rank(site)?);
        let plain = device.clone().inner();
        let a = taken("plora_A", [site.fan_in(), whole], file, &plain)?;
        let b = taken("plora_B", [whole, site.fan_out()], file, &plain)?;
        let part = |range: std::ops::Range<usize>| {
            let a = a.clone().slice([0..site.fan_in(), range.clone()]);
            let b = b.clone().slice([range, 0..site.fan_out()]);
            (laid_out(a, device), laid_out(b, device))
        };
        let past = (whole > r).then(|| part(r..whole));
        let past = past.map(|(a, b)| Past { a: Buffer::new(a), b: Buffer::new(b) });
        self.adapter(site, part(0..r), past)
    }
}

/// Ends the stages. It knows nothing but the configuration: which stage it is follows from the step.
struct Stages {
    ends: Vec<usize>,
    momentum: f64,
    seed: u64,
}

impl Policy<PeriodicLoraAdapter> for Stages {
    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<PeriodicLoraAdapter>,
    ) -> Result<Option<Adapters<PeriodicLoraAdapter>>, Error> {
        let Some(ended) = self.ends.iter().position(|end| *end == step) else { return Ok(None) };
        let seed = self.seed.wrapping_add(ended as u64);
        Ok(Some(adapters.clone().map_layers(|path, adapter| {
            adapter.unloaded(ended, self.momentum, &mut site_rng(seed, path))
        })))
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
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn_peft_core::{Sites, adapt};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    fn method(momentum: f64) -> PeriodicLora {
        let low_rank = LowRank::new(2, 4.0, Targets::list(["query"]));
        PeriodicLora {
            low_rank,
            stages: 3,
            momentum,
            total_step: Some(7),
            ..PeriodicLora::default()
        }
    }

    fn fresh(method: &PeriodicLora) -> Adapters<PeriodicLoraAdapter> {
        let device = Device::flex();
        let model = One { query: LinearConfig::new(5, 4).init(&device) };
        adapt(&Sites::of(&model, None), method, 1, &device.autodiff()).expect("fits")
    }

    fn at(adapters: &Adapters<PeriodicLoraAdapter>) -> &PeriodicLoraAdapter {
        adapters.get("query").expect("is there")
    }

    /// `Δ(W)`, towards which the tests train.
    fn delta(adapter: &PeriodicLoraAdapter) -> Tensor<2> {
        let nothing = Tensor::zeros([5, 4], &Device::flex());
        adapter.weight(&nothing).expect("folds")
    }

    fn gradients(adapters: &Adapters<PeriodicLoraAdapter>) -> GradientsParams {
        let wanted = Tensor::<2>::eye(5, &Device::flex()).slice([0..5, 0..4]);
        let off = delta(at(adapters)) - wanted;
        GradientsParams::from_grads(off.square().mean().backward(), adapters)
    }

    fn numbers(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().iter().collect()
    }

    fn trained(adapter: &PeriodicLoraAdapter) -> [Vec<f32>; 2] {
        [numbers(adapter.plora_a.val()), numbers(adapter.plora_b.val())]
    }

    #[test]
    fn the_end_of_a_stage_changes_no_output_and_the_optimizer_begins_anew() {
        for momentum in [0.0, 0.25] {
            let method = method(momentum);
            let mut adapters = fresh(&method);
            let mut policy = method.policy(&adapters).expect("fits").expect("is there");
            let adamw = AdamWConfig::new().with_weight_decay(0.0);
            let mut optimizer = adamw.init();
            let mut ended = Vec::new();
            for step in 1..=7 {
                let grads = gradients(&adapters);
                adapters = optimizer.step(0.1, adapters, grads);
                let adjusted = policy.adjust(step, 0.1, &adapters).expect("works");
                let Some(adjusted) = adjusted else { continue };
                ended.push(step);
                let [before, after] = [&adapters, &adjusted].map(|a| numbers(delta(at(a)).inner()));
                let far = before
                    .iter()
                    .zip(&after)
                    .map(|(a, b)| (a - b).abs())
                    .max_by(f32::total_cmp)
                    .unwrap_or_default();
                assert!(far < 1e-5, "differs by {far}");
                let (old, new) = (at(&adapters), at(&adjusted));
                assert!(old.plora_a.id != new.plora_a.id && old.plora_b.id != new.plora_b.id);
                let [[old_a, old_b], [new_a, new_b]] = [old, new].map(trained);
                match momentum > 0.0 {
                    true => assert!(
                        new_a == old_a && new_b.iter().zip(old_b).all(|(n, o)| *n == 0.25 * o)
                    ),
                    false => assert!(new_a != old_a && new_b.iter().all(|b| *b == 0.0)),
                }
                // A policy that was made anew, as a resumed run does, decides the same.
                let mut again = method.policy(&fresh(&method)).expect("fits").expect("is there");
                let again = again.adjust(step, 0.1, &adapters).expect("works").expect("ends");
                assert_eq!(trained(at(&again)), trained(new));
                // The same step as of an optimizer that never ran.
                let [mut used, mut unused] = [optimizer.clone(), adamw.init()];
                let [used, unused] = [&mut used, &mut unused]
                    .map(|o| trained(at(&o.step(0.1, adjusted.clone(), gradients(&adjusted)))));
                assert_eq!(used, unused);
                adapters = adjusted;
            }
            assert_eq!(ended, [2, 4]); // ⌊7/3⌋ and ⌊14/3⌋
            let refused = method.policy(&adapters).err().expect("holds stages").to_string();
            assert!(refused.contains("query") && refused.contains("merge"), "{refused}");
        }
    }

    #[test]
    fn an_optimizer_that_keeps_its_ids_does_remember() {
        // What the test above would see if the ids stayed.
        let method = method(0.0);
        let mut adapters = fresh(&method);
        let adamw = AdamWConfig::new().with_weight_decay(0.0);
        let mut used = adamw.init();
        for _ in 0..3 {
            let grads = gradients(&adapters);
            adapters = used.step(0.1, adapters, grads);
        }
        let mut unused = adamw.init();
        let [used, unused] = [&mut used, &mut unused]
            .map(|o| trained(at(&o.step(0.1, adapters.clone(), gradients(&adapters)))));
        assert_ne!(used, unused);
    }

    #[test]
    fn the_sum_outgrows_the_rank_of_a_stage() {
        let method = method(0.0);
        let mut adapters = fresh(&method);
        let mut policy = method.policy(&adapters).expect("fits").expect("is there");
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
        for step in 1..=7 {
            let grads = gradients(&adapters);
            adapters = optimizer.step(0.1, adapters, grads);
            adapters = policy.adjust(step, 0.1, &adapters).expect("works").unwrap_or(adapters);
        }
        let (_, singular, _) = burn::linalg::svd::<2, 1>(delta(at(&adapters)).inner(), 30);
        let singular: Vec<f32> = singular.into_data().iter().collect();
        assert!(singular[2] > 1e-3, "{singular:?}");
    }

    #[test]
    fn more_stages_than_steps_are_refused() {
        for (total_step, field) in [(None, "total_step"), (Some(2), "stages")] {
            let method = PeriodicLora { total_step, ..method(0.0) };
            let refused = method.policy(&fresh(&method)).err().expect("cannot work");
            assert!(refused.to_string().starts_with(field), "{refused}");
        }
    }
}
