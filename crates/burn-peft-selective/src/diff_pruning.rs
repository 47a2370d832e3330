//! Diff pruning: a difference with gates that learn to close (arXiv 2012.07463).

use crate::mask::{Chosen, chosen_of, index_data, shape_data};
use crate::parameter::Parameter;
use crate::selected::fits;
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Buffer, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
    composed,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// The gates are stretched over `[-STRETCH, STRETCH]` before they are cut to `[0, 1]`: the paper's `l` and `r`.
const STRETCH: f64 = 1.5;

/// Diff pruning (arXiv 2012.07463) of weights: `W' = W + z ⊙ w`, with a hard-concrete gate for each number,
/// `z = min(1, max(0, 3·σ(log u - log(1-u) + α) - 1.5))`, `u ~ U(0, 1)` drawn in each training step, and in use
/// `z = min(1, max(0, 3·σ(α) - 1.5))`. The loss gets `λ·Σ σ(α)` beside, the expected number of open gates.
///
/// After step `prune_step` the gates give way: of all target places together the `⌊keep_ratio·n⌋` numbers with
/// the largest `|z·w|` are kept, begin at `z·w`, and are trained on alone; all others are zero for good. With
/// `structured` each weight has one more gate for all of it, `z = z_i·z_W`, and `λ·Σ σ(α_i)·σ(α_W)`.
///
/// `w [fan_in, fan_out]` begins at zero, `α` at `alpha_init`. Parameters: `2·fan_in·fan_out` a place (and one,
/// structured), in training, which is dense. The file holds what is kept as [`Selective`](crate::Selective)'s does;
/// of adapters from before `prune_step` (an evaluation found them best), `diff_w [n]`, `diff_alpha [n]` and
/// `diff_group [1]`. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiffPruning {
    /// Share of the numbers that is kept, in (0, 1]; default 0.005.
    pub keep_ratio: f64,
    /// `λ`; default 1.25e-7, the paper's.
    pub l0_lambda: f64,
    /// Where `α` begins; default 5.
    pub alpha_init: f64,
    /// One more gate a weight; default false.
    pub structured: bool,
    /// After which step the numbers are chosen; default: half of the training.
    pub prune_step: Option<usize>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for DiffPruning {
    fn default() -> Self {
        Self {
            keep_ratio: 0.005,
            l0_lambda: 1.25e-7,
            alpha_init: 5.0,
            structured: false,
            prune_step: None,
            targets: Targets::default(),
        }
    }
}

/// What diff pruning trains at one place, each number counted row by row through the weight as a matrix
/// `[fan_in, fan_out]`.
#[derive(Module, Debug)]
pub struct DiffPruningAdapter {
    /// `w [n]`.
    pub diff_w: Param<Tensor<1>>,
    /// `α [n]`.
    pub diff_alpha: Param<Tensor<1>>,
    /// `α_W [1]`, structured.
    pub diff_group: Option<Param<Tensor<1>>>,
    /// 1 where a number is kept, once that is decided, `[n]`.
    pub kept: Buffer<1>,
    /// Whether it is decided, 1 or 0, `[1]`.
    pub decided: Buffer<1>,
}

/// A hard-concrete gate: drawn where a training is on, else what it comes to without noise.
fn gate(alpha: Tensor<1>) -> Tensor<1> {
    let noisy = match alpha.is_autodiff() {
        true => {
            let u = alpha.clone().without_autodiff();
            let u = u.random_like(Distribution::Uniform(1e-6, 1.0 - 1e-6));
            alpha + (u.clone() / (u.neg() + 1.0)).log()
        }
        false => alpha,
    };
    (sigmoid(noisy) * (2.0 * STRETCH) - STRETCH).clamp(0.0, 1.0)
}

impl DiffPruningAdapter {
    fn gates(&self, value: impl Fn(&Param<Tensor<1>>) -> Tensor<1>) -> Tensor<1> {
        let own = gate(value(&self.diff_alpha));
        match &self.diff_group {
            Some(group) => own * gate(value(group)),
            None => own,
        }
    }

    /// `z ⊙ w`, or what is kept of `w`.
    fn delta(&self) -> Tensor<1> {
        let decided = self.decided.val();
        let open = self.gates(Param::val) * (decided.clone().neg() + 1.0);
        self.diff_w.val() * (open + self.kept.val() * decided)
    }

    /// `z ⊙ w` without noise.
    fn still(&self) -> Tensor<1> {
        let z = self.gates(|alpha| alpha.val().without_autodiff());
        self.diff_w.val().without_autodiff() * z
    }

    fn is_decided(&self) -> bool {
        self.decided.val().into_scalar::<f32>() != 0.0
    }

    /// The same adapter over the numbers where `kept [n]` is 1, from where they stand.
    fn pruned(mut self, kept: Tensor<1>) -> Self {
        let now = self.still() * kept.clone();
        let training = self.diff_w.val().is_autodiff();
        let now = if training { Tensor::from_inner(now) } else { now };
        // With a new id, by which the optimizer knows nothing of it.
        self.diff_w = Param::from_tensor(now.detach());
        self.decided = self.decided.with(self.decided.val().ones_like());
        self.kept = self.kept.with(kept);
        self
    }
}

impl Adapter for DiffPruningAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        _y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        composed::embedding(self, layer, ids)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        composed::conv1d(self, layer, x)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, _y: &Tensor<4>) -> Option<Tensor<4>> {
        composed::conv2d(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for DiffPruningAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.delta().reshape(w.dims()))
    }
}

impl DiffPruning {
    fn adapter(
        &self,
        w: Tensor<1>,
        alpha: Tensor<1>,
        group: Option<Tensor<1>>,
    ) -> DiffPruningAdapter {
        DiffPruningAdapter {
            kept: Buffer::new(w.clone().zeros_like()),
            decided: Buffer::new(Tensor::zeros([1], &w.device())),
            diff_w: Param::from_tensor(w),
            diff_alpha: Param::from_tensor(alpha),
            diff_group: group.map(Param::from_tensor),
        }
    }
}

impl Method for DiffPruning {
    type Adapter = DiffPruningAdapter;
    type Shared = ();
    const NAME: &'static str = "DIFFPRUNING";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        if !(self.keep_ratio > 0.0 && self.keep_ratio <= 1.0) {
            let reason =
                format!("expected a share above 0 and at most 1, found {}", self.keep_ratio);
            return Err(Error::config("keep_ratio", reason));
        }
        if !(self.l0_lambda.is_finite() && self.l0_lambda >= 0.0) {
            let reason = format!("expected a number of at least 0, found {}", self.l0_lambda);
            return Err(Error::config("l0_lambda", reason));
        }
        match self.alpha_init.is_finite() {
            true => Ok(()),
            false => {
                let reason = format!("expected a finite number, found {}", self.alpha_init);
                Err(Error::config("alpha_init", reason))
            }
        }
    }

    fn planned(self, steps: usize) -> Self {
        Self { prune_step: self.prune_step.or(Some(steps / 2)), ..self }
    }

    fn has_penalty(&self) -> bool {
        self.l0_lambda > 0.0
    }

    fn penalty(&self, adapters: &Adapters<DiffPruningAdapter>) -> Option<Tensor<1>> {
        let one = |(_, adapter): (&str, &DiffPruningAdapter)| {
            let open = sigmoid(adapter.diff_alpha.val()).sum();
            let open = match &adapter.diff_group {
                Some(group) => open * sigmoid(group.val()),
                None => open,
            };
            open * (adapter.decided.val().neg() + 1.0)
        };
        Some(adapters.iter().map(one).reduce(|sum, one| sum + one)? * self.l0_lambda)
    }

    fn policy(
        &self,
        _adapters: &Adapters<DiffPruningAdapter>,
    ) -> Result<Option<Box<dyn Policy<DiffPruningAdapter>>>, Error> {
        match self.prune_step {
            Some(step) if step > 0 => {
                Ok(Some(Box::new(Prune { step, keep_ratio: self.keep_ratio })))
            }
            _ => {
                let reason = "expected a step of the training, 1 or later";
                Err(Error::config("prune_step", reason))
            }
        }
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DiffPruningAdapter, Error> {
        let size = site.fan_in() * site.fan_out();
        let alpha = |n: usize| Tensor::full([n], self.alpha_init, device);
        let group = self.structured.then(|| alpha(1));
        Ok(self.adapter(Tensor::zeros([size], device), alpha(size), group))
    }

    fn fold(adapter: &DiffPruningAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    // Not structured: a single gate is shut or wide open at most draws, where no gradient passes.
    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        let (l0_lambda, prune_step) = (1e-3, Some(3));
        vec![
            Self { keep_ratio: 0.5, alpha_init: 1.0, l0_lambda, prune_step, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        2 * site.fan_in() * site.fan_out() + usize::from(self.structured)
    }

    fn tensors(
        &self,
        site: &Site,
        adapter: &DiffPruningAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let ordered = |numbers: Tensor<1>| {
            Parameter::Weight.in_checkpoint_order(site, numbers.without_autodiff())
        };
        let data = |numbers: Vec<f32>| {
            let count = numbers.len();
            TensorData::new(numbers, [count])
        };
        let w = ordered(adapter.diff_w.val());
        if !adapter.is_decided() {
            let mut tensors =
                vec![("diff_w", data(w)), ("diff_alpha", data(ordered(adapter.diff_alpha.val())))];
            tensors.extend(adapter.diff_group.iter().map(|g| ("diff_group", g.val().into_data())));
            return tensors;
        }
        let kept = ordered(adapter.kept.val());
        let indices: Vec<u32> =
            (0..).zip(&kept).filter(|(_, kept)| **kept != 0.0).map(|(at, _)| at).collect();
        let values = indices.iter().filter_map(|at| w.get(*at as usize).copied()).collect();
        let shape = Parameter::Weight.shape(site).unwrap_or_default();
        let Ok(indices) = index_data("weight.indices", &indices) else { return Vec::new() };
        vec![
            ("weight.values", data(values)),
            ("weight.indices", indices),
            ("weight.shape", shape_data(&shape)),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<DiffPruningAdapter, Error> {
        let size = site.fan_in() * site.fan_out();
        let weight = Parameter::Weight;
        let plain = device.clone().inner();
        if !file.has("weight.values") {
            let mut read = |name: &str| -> Result<Tensor<1>, Error> {
                let stored = file.take(name, [size], &plain)?.into_data().convert::<f32>();
                let stored: Vec<f32> = stored.iter::<f32>().collect();
                Ok(weight.in_our_order(site, stored, device))
            };
            let (w, alpha) = (read("diff_w")?, read("diff_alpha")?);
            let group = match self.structured {
                true => Some(file.take("diff_group", [1], device)?),
                false => None,
            };
            return Ok(self.adapter(w, alpha, group));
        }
        let (_, indices) = file.take_ints("weight.indices")?;
        let (_, shape) = file.take_ints("weight.shape")?;
        let chosen: Chosen = chosen_of(&weight.name(site), &shape, &indices)?;
        fits(site, weight, &chosen)?;
        let values = file.take("weight.values", [chosen.indices().len()], &plain)?;
        let values: Vec<f32> = values.into_data().convert::<f32>().iter::<f32>().collect();
        let (mut w, mut kept) = (vec![0.0; size], vec![0.0; size]);
        for (at, value) in chosen.indices().iter().zip(values) {
            w[*at as usize] = value;
            kept[*at as usize] = 1.0;
        }
        let alpha = |n: usize| Tensor::full([n], self.alpha_init, device);
        let group = self.structured.then(|| alpha(1));
        let w = weight.in_our_order(site, w, device);
        let mut adapter = self.adapter(w, alpha(size), group);
        adapter.kept = Buffer::new(weight.in_our_order(site, kept, device));
        adapter.decided = Buffer::new(Tensor::ones([1], device));
        Ok(adapter)
    }
}

/// Chooses once what is kept. Which stage it is, the adapters say.
struct Prune {
    step: usize,
    keep_ratio: f64,
}

impl Policy<DiffPruningAdapter> for Prune {
    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<DiffPruningAdapter>,
    ) -> Result<Option<Adapters<DiffPruningAdapter>>, Error> {
        if step != self.step {
            return Ok(None);
        }
        let size = |adapter: &DiffPruningAdapter| -> Vec<f32> {
            adapter.still().abs().into_data().convert::<f32>().iter::<f32>().collect()
        };
        let mut all: Vec<f32> = adapters.iter().flat_map(|(_, adapter)| size(adapter)).collect();
        let count = (self.keep_ratio * all.len() as f64) as usize;
        if count == 0 {
            let reason =
                format!("{} of {} numbers is none; expected more", self.keep_ratio, all.len());
            return Err(Error::config("keep_ratio", reason));
        }
        let least = *all.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1;
        // Numbers at zero are not worth a place in the file, whatever room there is.
        let least = f64::from(least.max(f32::MIN_POSITIVE));
        Ok(Some(adapters.clone().map_layers(|_, adapter| {
            let kept = adapter.still().abs().greater_equal_elem(least).float();
            adapter.pruned(kept)
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
    use burn::nn::LinearConfig;
    use burn_peft_core::{Sites, adapt};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    fn numbers(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter().collect()
    }

    #[test]
    fn the_largest_differences_are_kept_where_they_stand() {
        for structured in [false, true] {
            let device = Device::flex().autodiff();
            let model = One { query: LinearConfig::new(3, 2).init(&Device::flex()) };
            let targets = Targets::list(["query"]);
            let method =
                DiffPruning { structured, keep_ratio: 0.5, targets, ..DiffPruning::default() };
            let method = method.planned(8);
            let sites = Sites::of(&model, None);
            let adapters =
                adapt(&sites, &method, 0, &device).expect("fits").map_layers(|_, mut one| {
                    let w = [0.5, -2.0, 1.0, 0.25, -0.75, 0.0];
                    one.diff_w = Param::from_tensor(Tensor::from_floats(w, &device));
                    // The second gate is shut.

                    let alpha = [5.0, 0.0, 5.0, 5.0, 5.0, 5.0];
                    one.diff_alpha = Param::from_tensor(Tensor::from_floats(alpha, &device));
                    one
                });
            let mut policy = method.policy(&adapters).expect("fits").expect("is there");
            assert!(policy.adjust(3, 0.1, &adapters).expect("can").is_none());
            let after = policy.adjust(4, 0.1, &adapters).expect("can").expect("prunes");
            let (old, new) = (&adapters.get("query").expect("is"), after.get("query").expect("is"));
            // 3·σ(0) - 1.5 = 0, whatever lies behind the gate.
            assert_eq!(numbers(new.kept.val()), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
            assert_eq!(numbers(new.delta().inner()), [0.5, 0.0, 1.0, 0.0, -0.75, 0.0]);
            assert!(old.diff_w.id != new.diff_w.id && new.diff_w.val().is_require_grad());
            // Nothing is said of gates that have given way.
            let term = |a| numbers(method.penalty(a).expect("is there").inner())[0];
            let open = 5.0 * 0.993_307 + 0.5;
            let open = 1.25e-7 * if structured { open * 0.993_307 } else { open };
            assert!((term(&adapters) - open).abs() < 1e-12 && term(&after) == 0.0);
            let site = sites.get("query").expect("is there");
            let stored = method.tensors(site, new);
            assert_eq!((stored[0].0, stored[0].1.shape().to_vec()), ("weight.values", vec![3]));
        }
    }
}
