//! A frozen base with adapters over it, as burn-train's learner wants a model.

use crate::optim::clip;
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, ExecutionError, Int, Tensor};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use burn_peft_core::{
    Adapters, AnyAdapter, Batch, Beside, Blocks, Counted, Error, Guide, Passes, Scope, untracked,
};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

/// The loss of a batch before it is divided by the number of targets.
#[derive(Debug)]
pub struct Loss {
    /// Sum of the negative log likelihoods of all targets, `[1]`.
    pub sum: Tensor<1>,
    /// How many targets were right, `[1]`.
    pub correct: Tensor<1, Int>,
}

/// A base model and what it is trained for: a loss out of a batch.
pub trait Objective: Clone + Debug + Send + Sync + 'static {
    /// One forward pass worth of data, on the host.
    type Batch: Clone + Debug + Send + Sync + 'static;

    /// Runs the model with what `cx` lays over it.
    fn loss(&self, batch: &Self::Batch, device: &Device, cx: &Scope<'_>) -> Loss;

    /// Refuses a batch that the model cannot take with what `cx` lays over it.
    ///
    /// # Errors
    /// What is wrong with it, or how long it may be.
    fn check(&self, batch: &Self::Batch, cx: &Scope<'_>) -> Result<(), Error>;

    /// Number of targets in a batch: what the loss is a mean over.
    fn targets(batch: &Self::Batch) -> usize;

    /// Tokens (images, where it reads these) without padding and with it, for the padding's share.
    fn tokens(batch: &Self::Batch) -> (usize, usize);

    /// The positions that are no padding and, with `targets_only`, at which a target is learnt, where
    /// targets have positions. Of layers that see another number of positions, all count.
    fn counted(batch: &Self::Batch, targets_only: bool) -> Counted;
}

/// One optimizer step worth of data: the batches whose gradients are added up.
#[derive(Debug, Clone)]
pub struct Step<B> {
    /// Counted from 0 over the whole run.
    pub index: usize,
    /// Counted from 0.
    pub epoch: usize,
    /// Whether the epoch ends with it.
    pub ends_epoch: bool,
    /// The forward passes.
    pub batches: Vec<B>,
}

/// What came out of a step or an evaluation batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Mean negative log likelihood of a target, without what methods add to it.
    pub loss: f64,
    /// Targets that were right.
    pub correct: usize,
    /// Targets.
    pub targets: usize,
    /// Tokens that are no padding.
    pub tokens: usize,
    /// Tokens with padding.
    pub padded: usize,
    /// Norm of all gradients before clipping; 0 in evaluation.
    pub grad_norm: f64,
}

impl Report {
    /// Share of right targets.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }

    /// The two together, the loss weighted by targets.
    pub fn and(self, other: Self) -> Self {
        let targets = self.targets + other.targets;
        let sum = self.loss * self.targets as f64 + other.loss * other.targets as f64;
        Self {
            loss: sum / targets.max(1) as f64,
            correct: self.correct + other.correct,
            targets,
            tokens: self.tokens + other.tokens,
            padded: self.padded + other.padded,
            grad_norm: other.grad_norm,
        }
    }
}

impl ItemLazy for Report {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// What a step needs to know besides the data.
#[derive(Debug, Clone)]
pub struct StepSettings {
    /// The plain device of the base.
    pub device: Device,
    /// Largest norm of all gradients together; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Seed of dropout, together with the numbers of the step, its batch and the block.
    pub seed: u64,
    /// Whether blocks are [run again](Blocks::recomputed) for their gradients; the further passes of a
    /// [`Beside`] are not.
    pub gradient_checkpointing: bool,
}

/// A frozen base with adapters over it. Its parameters, and so its checkpoint, are the adapters'.
///
/// The adapters' type is erased: a method is compiled once, and not once for each model and its training.
#[derive(Module, Debug)]
pub struct Tuned<B: Objective> {
    /// The base model, on the plain device. To Burn it is no part of this module, so that an
    /// optimizer, a gradient or a checkpoint never meets it.
    #[module(skip)]
    pub base: Arc<B>,
    /// What is trained, by method.
    pub adapters: Vec<Adapters<AnyAdapter>>,
    #[module(skip)]
    settings: StepSettings,
    #[module(skip)]
    terms: Vec<Terms>,
    /// Why the last step could not be made, which a [`TrainStep`] has no word for.
    #[module(skip)]
    failure: Arc<Mutex<Option<Error>>>,
}

/// What a method adds to the loss.
#[derive(Clone)]
struct Terms {
    penalty: Option<Arc<Made<Tensor<1>>>>,
    beside: Option<Arc<Made<Box<dyn Beside>>>>,
}

type Made<T> = dyn Fn(&Adapters<AnyAdapter>) -> Option<T> + Send + Sync;

impl Debug for Terms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries([self.penalty.is_some(), self.beside.is_some()]).finish()
    }
}

/// The one batch of a pass that a term asks for.
struct One<'a, B: Objective> {
    base: &'a B,
    device: &'a Device,
    batch: &'a B::Batch,
}

impl<B: Objective> Passes for One<'_, B> {
    fn batches(&self) -> usize {
        1
    }

    fn loss(&self, _batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.base.loss(self.batch, self.device, cx).sum / B::targets(self.batch).max(1) as f64
    }

    fn counted(&self, _batch: usize, targets_only: bool) -> Counted {
        B::counted(self.batch, targets_only)
    }
}

impl<B: Objective> Tuned<B> {
    /// Lays [erased](Adapters::erased) adapters of one method or several over `base`.
    pub fn new(base: Arc<B>, adapters: Vec<Adapters<AnyAdapter>>, settings: StepSettings) -> Self {
        Self { base, adapters, settings, terms: Vec::new(), failure: Arc::default() }
    }

    /// With what the methods, in the order of their adapters, add to the loss of a step.
    pub fn guided<'g>(self, guides: impl IntoIterator<Item = &'g Guide<AnyAdapter>>) -> Self {
        let of = |guide: &Guide<AnyAdapter>| Terms {
            penalty: guide.penalty.clone(),
            beside: guide.beside.clone(),
        };
        Self { terms: guides.into_iter().map(of).collect(), ..self }
    }

    /// Why the last step could not be made; its gradients are then none to take a step by.
    pub fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What methods add to the loss of `batch`, which has this `share` of the step's targets, `besides` having been over
    /// the model in its pass.
    fn beside(
        &self,
        besides: &[Box<dyn Beside>],
        batch: &B::Batch,
        share: f64,
    ) -> Result<Option<Tensor<1>>, Error> {
        if besides.is_empty() {
            return Ok(None);
        }
        let passes = One { base: &*self.base, device: &self.settings.device, batch };
        let still: Vec<_> = self.adapters.iter().map(Module::valid).collect();
        let at = Batch::new(&passes, &self.adapters, &still);
        let mut sum = None;
        for beside in besides {
            let term = beside.term(&at)? * share;
            sum = Some(match sum {
                Some(sum) => sum + term,
                None => term,
            });
        }
        Ok(sum)
    }

    /// Loss and accuracy on one batch, without gradients.
    pub fn evaluate(&self, batch: &B::Batch) -> Report {
        measure(&*self.base, batch, &self.settings.device, &Scope::new(&self.adapters))
    }
}

/// Loss and accuracy of a base with what `cx` lays over it, on one batch.
pub fn measure<B: Objective>(
    base: &B,
    batch: &B::Batch,
    device: &Device,
    cx: &Scope<'_>,
) -> Report {
    let loss = base.loss(batch, device, cx);
    let targets = B::targets(batch);
    let (tokens, padded) = B::tokens(batch);
    Report {
        loss: f64::from(loss.sum.into_scalar::<f32>()) / targets.max(1) as f64,
        correct: loss.correct.into_scalar::<i32>().try_into().unwrap_or(0),
        targets,
        tokens,
        padded,
        grad_norm: 0.0,
    }
}

impl<B: Objective> TrainStep for Tuned<B> {
    type Input = Step<B::Batch>;
    type Output = Report;

    /// Forward and backward over the step's batches. The loss is the mean over all their targets,
    /// so that accumulating changes nothing but the memory.
    fn step(&self, step: Self::Input) -> TrainOutput<Report> {
        // Dropout depends on the seed and on where it is alone: a resumed run draws what an
        // uninterrupted one draws, and a block that is run again what it drew before.
        let spread = |number: usize| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let own = self.settings.seed.wrapping_add(spread(step.index));
        let seed = |part: usize| own.wrapping_add(spread(part).rotate_left(32));
        let device = &self.settings.device;
        let still: Vec<_> = match self.settings.gradient_checkpointing {
            true => self.adapters.iter().map(untracked).collect(),
            false => Vec::new(),
        };

        let all: usize = step.batches.iter().map(B::targets).sum();
        let mut total = Report { targets: all, ..Report::default() };
        let mut accumulator = GradientsAccumulator::new();
        for (part, batch) in step.batches.iter().enumerate() {
            device.seed(seed(part));
            let made = self.terms.iter().zip(&self.adapters);
            let made = made.filter_map(|(of, adapters)| of.beside.as_ref()?(adapters));
            let laid = (&self.adapters, made.collect::<Vec<_>>());
            let mut blocks = Blocks::new(device, seed(part));
            if self.settings.gradient_checkpointing {
                blocks = blocks.recomputed(&still, &laid.1);
            }
            let loss = self.base.loss(batch, device, &Scope::new(&laid).running(&blocks));
            let mean = loss.sum / all.max(1) as f64;
            total.loss += f64::from(mean.clone().into_scalar::<f32>());
            total.correct += usize::try_from(loss.correct.into_scalar::<i32>()).unwrap_or(0);
            let (tokens, padded) = B::tokens(batch);
            total.tokens += tokens;
            total.padded += padded;
            let share = B::targets(batch) as f64 / all.max(1) as f64;
            // Before the terms are asked for: what was not shown to them they could not tell of.
            let terms = blocks.repeatable().and_then(|()| self.beside(&laid.1, batch, share));
            let done = terms.and_then(|terms| {
                let whole = match terms {
                    Some(terms) => mean + terms,
                    None => mean,
                };
                blocks.backward(&whole, &self.adapters, |grads| {
                    accumulator.accumulate(self, GradientsParams::from_grads(grads, self));
                })
            });
            if let Err(error) = done {
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                break;
            }
        }
        device.seed(seed(step.batches.len()));
        for (of, adapters) in self.terms.iter().zip(&self.adapters) {
            if let Some(penalty) = of.penalty.as_ref().and_then(|of| of(adapters)) {
                accumulator.accumulate(self, GradientsParams::from_grads(penalty.backward(), self));
            }
        }
        let (grads, norm) = clip(self, accumulator.grads(), self.settings.max_grad_norm);
        total.grad_norm = norm;
        TrainOutput { grads, item: total }
    }
}

impl<B: Objective> InferenceStep for Tuned<B> {
    type Input = B::Batch;
    type Output = Report;

    fn step(&self, batch: Self::Input) -> Report {
        self.evaluate(&batch)
    }
}
