//! A training run on burn-train's learner: steps, evaluations, checkpoints, and how it ends.

use crate::checkpoint::{Actions, Checkpoint, State};
use crate::optim::{Warmup, adamw};
use crate::parts::Policies;
use crate::silent::Silent;
use crate::{
    BestBy, EvalFeed, Event, Objective, Observer, Options, Part, Report, Sample, StepSettings,
    TrainError, TrainFeed, Tuned,
};
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::tensor::{Device, Tensor};
use burn::train::checkpoint::{CheckpointingAction, FileCheckpointer};
use burn::train::logger::InMemoryMetricLogger;
use burn::train::{
    InferenceStep, Learner, SupervisedLearningStrategy, SupervisedTraining,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingStrategy,
    ValidLoader,
};
use burn_peft_core::{Adapters, AnyAdapter};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A run that is set up: data, options, and where its files go.
pub struct Run<B: Objective> {
    /// The frozen base, on the plain device `device`.
    pub base: Arc<B>,
    /// The plain device; adapters live on its autodiff twin.
    pub device: Device,
    /// Training data.
    pub train: TrainFeed<B::Batch>,
    /// Validation data; may be empty, then the last step is the best.
    pub valid: EvalFeed<B::Batch>,
    /// How to train.
    pub options: Options,
    /// Folder for checkpoints; without one there are none.
    pub folder: Option<PathBuf>,
    /// What the run is, in words that must be equal for a checkpoint to be continued.
    pub fingerprint: String,
    /// Continue from the folder's checkpoint.
    pub resume: bool,
    /// Set it to stop after the step at hand, with a checkpoint.
    pub stop: Arc<AtomicBool>,
}

/// What a run ends with.
#[derive(Debug)]
pub struct Fitted {
    /// The best adapters of each part by the validation data; the last ones where there is none.
    pub adapters: Vec<Adapters<AnyAdapter>>,
    /// Optimizer steps made, with those before a resume.
    pub steps: usize,
    /// Seconds spent training and evaluating, with those before a resume.
    pub seconds: f64,
    /// Step of the best evaluation.
    pub best: Option<usize>,
    /// Whether it was stopped from outside; a checkpoint was written then.
    pub interrupted: bool,
    /// All tokens of the training steps made now, real and padded.
    pub tokens: (usize, usize),
}

impl<B: Objective> Run<B> {
    /// Trains the adapters of one method, or of several together, and returns the best, which are
    /// [typed](Adapters::typed) again by who knows their method.
    ///
    /// # Errors
    /// Options that cannot work, a loss that is no number, a checkpoint that cannot be read or
    /// written, or one of another run.
    pub fn fit(self, parts: Vec<Part>, observer: Box<dyn Observer>) -> Result<Fitted, TrainError> {
        self.options.check()?;
        if self.valid.is_empty() {
            for (option, asked) in [
                ("eval-steps", self.options.eval_steps),
                ("early-stopping-patience", self.options.early_stopping_patience),
            ] {
                if asked.is_some() {
                    let reason = "needs validation data; there is none";
                    return Err(TrainError::option(option, reason));
                }
            }
        }
        let checkpoint = self.folder.as_deref().map(Checkpoint::of);
        let state = self.starting_state(checkpoint.as_ref())?;
        let settings = StepSettings {
            device: self.device.clone(),
            max_grad_norm: self.options.max_grad_norm,
            seed: self.options.seed,
            gradient_checkpointing: self.options.gradient_checkpointing,
        };
        let adapters = parts.iter().map(|part| part.adapters.clone()).collect();
        let guides = parts.iter().map(|part| &part.guide);
        let model = Tuned::new(self.base.clone(), adapters, settings).guided(guides);
        let faster: Vec<&[&str]> = parts.iter().map(|part| part.faster).collect();
        let optimizer = adamw(&model, &self.options, &faster);
        let mut policies = Policies(parts.into_iter().map(|part| part.guide.policy).collect());
        if let Some(state) = &state.policies {
            policies.resume(state.clone(), &self.device)?;
        }
        let schedule = Warmup::new(&self.options, self.train.steps());
        let scheduler = ModuleLrScheduler::new(schedule);
        let learner = Learner::new(model, optimizer, scheduler);

        let actions = Actions::default();
        let shared = Arc::new(Mutex::new(Shared { outcome: None, observer, policies }));
        let resumed = state.step;
        let strategy = Loop::<B> {
            options: self.options,
            device: self.device.clone(),
            feed: self.train.clone(),
            steps: (self.train.steps(), self.train.steps_per_epoch()),
            start: state,
            checkpoint: checkpoint.clone(),
            actions: actions.clone(),
            stop: self.stop,
            shared: shared.clone(),
        };
        let folder = self.folder.unwrap_or_default();
        let mut training =
            SupervisedTraining::new(&folder, Arc::new(self.train), Arc::new(self.valid))
                .with_application_logger(None)
                .with_metric_logger(InMemoryMetricLogger::default())
                .renderer(Box::new(Silent))
                .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
                .with_checkpointing_strategy(actions);
        if checkpoint.is_some() {
            let folder = folder.join(crate::CHECKPOINT_FOLDER);
            training = training.with_custom_checkpointers(
                FileCheckpointer::new(&folder, "model"),
                FileCheckpointer::new(&folder, "optim"),
                FileCheckpointer::new(&folder, "scheduler"),
            );
        }
        if resumed > 0 {
            training = training.checkpoint(resumed);
        }
        let result = training.launch(learner);
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.observer.end();
        let (state, tokens, interrupted) = match shared.outcome.take() {
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => return Err(error),
            None => return Err(TrainError::option("train", "the run ended without a result")),
        };
        Ok(Fitted {
            adapters: result.model.adapters,
            steps: state.step,
            seconds: state.seconds,
            best: state.best.map(|(step, _)| step),
            interrupted,
            tokens,
        })
    }

    fn starting_state(&self, checkpoint: Option<&Checkpoint>) -> Result<State, TrainError> {
        let fresh = State { fingerprint: self.fingerprint.clone(), ..State::default() };
        let (true, Some(checkpoint), Some(folder)) = (self.resume, checkpoint, &self.folder) else {
            return Ok(fresh);
        };
        let Some(state) = checkpoint.state()? else {
            let reason = "holds no checkpoint to resume from; start without --resume";
            return Err(TrainError::checkpoint(folder, reason));
        };
        if state.fingerprint != self.fingerprint {
            let reason = "its checkpoint was made with other options or data; give the same ones, or \
                          train anew with --overwrite";
            return Err(TrainError::checkpoint(folder, reason));
        }
        Ok(state)
    }
}

type Outcome = Result<(State, (usize, usize), bool), TrainError>;

struct Shared {
    outcome: Option<Outcome>,
    observer: Box<dyn Observer>,
    policies: Policies,
}

struct Loop<B: Objective> {
    options: Options,
    device: Device,
    /// Where policies look back.
    feed: TrainFeed<B::Batch>,
    /// In the run, and in an epoch.
    steps: (usize, usize),
    start: State,
    checkpoint: Option<Checkpoint>,
    actions: Actions,
    stop: Arc<AtomicBool>,
    shared: Arc<Mutex<Shared>>,
}

/// What the loop carries from step to step.
struct Progress<M> {
    state: State,
    policies: Policies,
    best: Option<M>,
    window_began: Instant,
    began: Instant,
    tokens: (usize, usize),
}

impl<B: Objective> SupervisedLearningStrategy<Tuned<B>> for Loop<B> {
    fn fit(
        &self,
        mut parts: TrainingComponents<Tuned<B>>,
        mut learner: Learner<Tuned<B>>,
        train: TrainLoader<Tuned<B>>,
        valid: ValidLoader<Tuned<B>>,
        _starting_epoch: usize,
    ) -> (Tuned<B>, SupervisedTrainingEventProcessor<Tuned<B>>) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let Shared { outcome, observer, policies } = &mut *shared;
        let mut progress = Progress {
            state: self.start.clone(),
            best: None,
            window_began: Instant::now(),
            began: Instant::now(),
            tokens: (0, 0),
            policies: Policies(std::mem::take(&mut policies.0)),
        };
        let ended =
            self.train(&mut parts, &mut learner, &train, &valid, &mut progress, observer.as_mut());
        progress.state.seconds += progress.began.elapsed().as_secs_f64();
        *outcome = Some(ended.map(|interrupted| (progress.state, progress.tokens, interrupted)));
        let model = progress.best.unwrap_or_else(|| learner.model());
        (model, parts.event_processor)
    }
}

impl<B: Objective> Loop<B> {
    fn train(
        &self,
        parts: &mut TrainingComponents<Tuned<B>>,
        learner: &mut Learner<Tuned<B>>,
        train: &TrainLoader<Tuned<B>>,
        valid: &ValidLoader<Tuned<B>>,
        at: &mut Progress<Tuned<B>>,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let (total, per_epoch) = self.steps;
        observer.start(at.state.step, total);
        if let (Some((step, _)), Some(checkpoint)) = (at.state.best, &self.checkpoint) {
            at.best = Some(checkpoint.load_best(step, learner.model())?);
        }
        if at.state.step == 0 {
            self.adjust(&mut at.policies, learner, 0, 0.0)?;
        }
        for step in train.iter().skip(at.state.step) {
            let Ok(step) = step else { break };
            let (index, ends_epoch) = (step.index, step.ends_epoch);
            let output = learner.train_step(step);
            if let Some(error) = learner.model().failure() {
                return Err(error.into());
            }
            let report = output.item;
            learner.lr_step();
            let rate = learner.lr_current().base();
            let finite = |what, value: f64| match value.is_finite() {
                true => Ok(()),
                false => {
                    Err(TrainError::NotFinite { what, value, step: index + 1, learning_rate: rate })
                }
            };
            finite("the loss", report.loss)?;
            finite("the gradients' norm", report.grad_norm)?;
            let adapters = learner.model().adapters;
            let grads = at.policies.gradients(index + 1, &adapters, output.grads);
            learner.optimizer_step(grads);
            self.adjust(&mut at.policies, learner, index + 1, rate)?;
            at.state.step = index + 1;
            at.state.window = at.state.window.and(report);
            at.tokens.0 += report.tokens;
            at.tokens.1 += report.padded;
            observer.step(at.state.step, &report);

            let last = at.state.step == total;
            let ends = ends_epoch || last;
            if last {
                // After any other step, the next loss tells.
                finite("a trained parameter", size(&learner.model()))?;
            }
            let epoch = at.state.step as f64 / per_epoch as f64;
            if at.state.step.is_multiple_of(self.options.logging_steps) || ends {
                observer.event(&train_event(at, epoch, rate));
                at.state.window = Report::default();
                at.window_began = Instant::now();
            }
            let due =
                self.options.eval_steps.map_or(ends, |n| at.state.step.is_multiple_of(n) || last);
            if due && valid.num_items() > 0 {
                let loss = self.evaluate(learner, valid, at, epoch, observer)?;
                finite("the validation loss", loss)?;
                at.window_began = Instant::now();
            }
            let patience = self.options.early_stopping_patience;
            if due && patience.is_some_and(|patience| at.state.worse >= patience) {
                observer.event(&Event::EarlyStop { step: at.state.step });
                return Ok(false);
            }
            let stopping = self.stop.load(Ordering::Relaxed) && !last;
            let save = self.options.save_steps.map_or(ends, |n| at.state.step.is_multiple_of(n));
            if (save || stopping) && !last {
                self.save(parts, learner, at)?;
                observer.event(&Event::Checkpoint { step: at.state.step });
            }
            if stopping {
                parts.interrupter.stop(Some("interrupted"));
                observer.event(&Event::Interrupted { step: at.state.step });
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lets the policies look back and change the adapters: by a record, which brings the parameters' ids and so
    /// the optimizer's state.
    fn adjust(
        &self,
        policies: &mut Policies,
        learner: &mut Learner<Tuned<B>>,
        step: usize,
        rate: f64,
    ) -> Result<(), TrainError> {
        let mut model = learner.model();
        let (base, feed) = (model.base.clone(), &self.feed);
        policies.look(step, &model.adapters, |back| {
            Sample::of(&*base, &self.device, feed, feed.cut(step - back..step))
        })?;
        if policies.adjust(step, rate, &mut model.adapters)? {
            learner.load_model(model.into_record());
        }
        Ok(())
    }

    fn evaluate(
        &self,
        learner: &Learner<Tuned<B>>,
        valid: &ValidLoader<Tuned<B>>,
        at: &mut Progress<Tuned<B>>,
        epoch: f64,
        observer: &mut dyn Observer,
    ) -> Result<f64, TrainError> {
        let model = learner.model().valid();
        let batches = valid.iter().flatten();
        let report = batches
            .map(|batch| InferenceStep::step(&model, batch))
            .fold(Report::default(), Report::and);
        let step = at.state.step;
        let value = match self.options.metric_for_best_model {
            BestBy::Loss => -report.loss,
            BestBy::Accuracy => report.accuracy(),
        };
        let before = at.state.best;
        let best = value.is_finite() && before.is_none_or(|(_, best)| value > best);
        if best {
            if let Some(checkpoint) = &self.checkpoint {
                checkpoint.save_best(step, &learner.model())?;
            }
            at.best = Some(learner.model());
            at.state.best = Some((step, value));
            at.state.worse = 0;
        } else {
            at.state.worse += 1;
        }
        at.state.evaluated = Some(step);
        let (loss, accuracy) = (report.loss, report.accuracy());
        observer.event(&Event::Eval { step, epoch, loss, accuracy, best });
        Ok(loss)
    }

    fn save(
        &self,
        parts: &mut TrainingComponents<Tuned<B>>,
        learner: &Learner<Tuned<B>>,
        at: &Progress<Tuned<B>>,
    ) -> Result<(), TrainError> {
        let (Some(files), Some(checkpointer)) = (&self.checkpoint, &mut parts.checkpointer) else {
            return Ok(());
        };
        let step = at.state.step;
        let before = files.state().ok().flatten().map(|state| state.step);
        let mut act = |action| {
            self.actions.next(action);
            checkpointer.checkpoint(learner, step, &parts.event_store);
        };
        act(CheckpointingAction::Save);
        // Records are written on other threads, which take one order at a time: once a second
        // order was taken, the first is done. Only then the state may point at the records.
        act(CheckpointingAction::Delete(usize::MAX));
        if let Some(error) = parts.interrupter.error() {
            return Err(TrainError::checkpoint(crate::CHECKPOINT_FOLDER, error.to_string()));
        }
        let seconds = at.state.seconds + at.began.elapsed().as_secs_f64();
        let policies = at.policies.state()?;
        files.write_state(&State { seconds, policies, ..at.state.clone() })?;
        // Not before: the state that was in force named an older best.
        files.forget_best_but(at.state.best.map(|(step, _)| step));
        if let Some(before) = before.filter(|before| *before != step) {
            act(CheckpointingAction::Delete(before));
        }
        Ok(())
    }
}

/// Sum of the sizes of everything that is trained: no number if one of them is none.
fn size<M: Module>(module: &M) -> f64 {
    struct Sum(f64);
    impl ModuleVisitor for Sum {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let sum = param.val().without_autodiff().abs().sum();
            self.0 += f64::from(sum.into_scalar::<f32>());
        }
    }
    let mut sum = Sum(0.0);
    module.visit(&mut sum);
    sum.0
}

fn train_event<M>(at: &Progress<M>, epoch: f64, learning_rate: f64) -> Event {
    let seconds = at.window_began.elapsed().as_secs_f64().max(1e-9);
    let padded = at.state.window.padded.max(1) as f64;
    Event::Train {
        step: at.state.step,
        epoch,
        loss: at.state.window.loss,
        accuracy: at.state.window.accuracy(),
        grad_norm: at.state.window.grad_norm,
        learning_rate,
        tokens_per_second: at.state.window.tokens as f64 / seconds,
        padding: 1.0 - at.state.window.tokens as f64 / padded,
    }
}
