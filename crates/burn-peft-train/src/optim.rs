//! AdamW by parameter groups, the learning rate's schedule, and clipping by the global norm.

use crate::{Objective, Options, Schedule, Tuned};
use burn::module::{Module, ModuleVisitor, Param, ParamGroup};
use burn::optim::lr_scheduler::{LrScheduler, LrSchedulerRecord};
use burn::optim::{AdamW, AdamWConfig, GradientsParams, LearningRate, ModuleOptimizer, Optimizer};
use burn::tensor::{Device, Tensor};

/// An optimizer whose learning rate is a multiple of the schedule's: what LoRA+ asks for.
#[derive(Clone)]
struct Faster<O> {
    inner: O,
    ratio: f64,
}

impl<O: Optimizer> Optimizer for Faster<O> {
    type State<const D: usize> = O::State<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        self.inner.step(lr * self.ratio, tensor, grad, state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        O::to_device(state, device)
    }
}

/// Paths of parameters whose name is one of their part's `names`, and of those with one axis (biases,
/// norms). Paths and not ids: a resumed run brings the ids of the run before.
#[derive(Default)]
struct Groups<'n> {
    names: &'n [&'n [&'n str]],
    stack: Vec<String>,
    faster: Vec<String>,
    vectors: Vec<String>,
}

impl Groups<'_> {
    /// Whether LoRA+ makes the parameter that is met now faster: parts are a list, `adapters.0`.
    fn is_faster(&self) -> bool {
        let [_, part, .., name] = self.stack.as_slice() else { return false };
        let names = part.parse::<usize>().ok().and_then(|part| self.names.get(part));
        names.is_some_and(|names| names.contains(&name.as_str()))
    }
}

impl ModuleVisitor for Groups<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }
    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }
    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        if self.is_faster() {
            self.faster.push(self.stack.join("."));
        } else if D == 1 {
            self.vectors.push(self.stack.join("."));
        }
    }
}

/// AdamW with PyTorch's defaults (β 0.9 and 0.999, ε 1e-8). Vectors do not decay; with
/// `loraplus_lr_ratio`, the parameters of each part that are named `faster` learn that many times faster.
pub(crate) fn adamw<B: Objective>(
    module: &Tuned<B>,
    options: &Options,
    faster: &[&[&str]],
) -> ModuleOptimizer {
    let build = |decay: f64| -> AdamW {
        AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(decay as f32).build()
    };
    let mut groups = Groups { names: faster, ..Groups::default() };
    module.visit(&mut groups);
    let mut optimizer = ModuleOptimizer::from(build(options.weight_decay));
    if !groups.vectors.is_empty() {
        optimizer = optimizer.with_group(ParamGroup::from_paths(groups.vectors), build(0.0), None);
    }
    if let Some(ratio) = options.loraplus_lr_ratio
        && !groups.faster.is_empty()
    {
        let inner = build(options.weight_decay);
        let group = ParamGroup::from_paths(groups.faster);
        optimizer = optimizer.with_group(group, Faster { inner, ratio }, None);
    }
    optimizer
}

/// Rises in a straight line over `warmup` steps, then falls as the schedule says, to zero at
/// `total`: `transformers`' `get_linear_schedule_with_warmup` and its cosine sibling.
#[derive(Debug, Clone)]
pub(crate) struct Warmup {
    peak: f64,
    warmup: usize,
    total: usize,
    shape: Schedule,
    step: usize,
}

impl Warmup {
    pub(crate) fn new(options: &Options, total: usize) -> Self {
        let share = (options.warmup_ratio * total as f64).ceil() as usize;
        Self {
            peak: options.learning_rate,
            warmup: options.warmup_steps.unwrap_or(share),
            total,
            shape: options.lr_scheduler_type,
            step: 0,
        }
    }

    /// The rate at step `step`, counted from 0.
    pub(crate) fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let left = self.total.saturating_sub(step) as f64;
        let span = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.shape {
            Schedule::Constant => self.peak,
            Schedule::Linear => self.peak * left / span,
            Schedule::Cosine => {
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left / span)).cos())
            }
        }
    }
}

impl LrScheduler for Warmup {
    fn step(&mut self) -> LearningRate {
        let rate = self.rate(self.step);
        self.step += 1;
        rate
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar("step", self.step)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        if let Some(step) = record.scalar::<usize>("step") {
            self.step = step;
        }
    }
}

struct SquaredNorm<'g> {
    grads: &'g GradientsParams,
    sums: Vec<Tensor<1>>,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.sums.push(grad.square().sum());
        }
    }
}

struct Scale {
    grads: GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad * self.factor);
        }
    }
}

/// Scales all gradients so that their norm together, `√Σ g²`, is at most `max_norm`; returns the
/// norm before. Burn clips each parameter by itself, which is another method.
pub fn clip<M: Module>(
    module: &M,
    grads: GradientsParams,
    max_norm: f64,
) -> (GradientsParams, f64) {
    let mut squares = SquaredNorm { grads: &grads, sums: Vec::new() };
    module.visit(&mut squares);
    if squares.sums.is_empty() {
        return (grads, 0.0);
    }
    let norm = f64::from(Tensor::cat(squares.sums, 0).sum().into_scalar::<f32>()).sqrt();
    if max_norm == 0.0 || !norm.is_finite() || norm <= max_norm {
        return (grads, norm);
    }
    let mut scale = Scale { grads, factor: max_norm / (norm + 1e-6) };
    module.visit(&mut scale);
    (scale.grads, norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_to_zero_as_in_transformers() {
        let options = Options {
            learning_rate: 1.0,
            warmup_steps: Some(2),
            lr_scheduler_type: Schedule::Linear,
            ..Options::default()
        };
        let mut schedule = Warmup::new(&options, 6);
        let rates: Vec<f64> = (0..7).map(|_| schedule.step()).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
        let cosine = Warmup { shape: Schedule::Cosine, ..schedule };
        assert!((cosine.rate(4) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_schedule_goes_on_where_its_record_stopped() {
        let mut schedule = Warmup::new(&Options::default(), 10);
        schedule.step();
        schedule.step();
        let mut resumed = Warmup::new(&Options::default(), 10);
        resumed.load_record(schedule.to_record());
        assert_eq!(resumed.step(), schedule.step());
    }
}
