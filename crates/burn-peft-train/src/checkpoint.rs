//! Where a run is: enough to go on to the same numbers.

use crate::{Event, Report, TrainError};
use burn::module::Module;
use burn::store::ModuleRecord;
use burn::train::checkpoint::{CheckpointingAction, CheckpointingStrategy};
use burn::train::metric::store::EventStoreClient;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Folder of the checkpoint inside a run's folder.
pub const CHECKPOINT_FOLDER: &str = "checkpoint";

/// What the learner's own records do not hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps that were made; also the number in the records' file names.
    pub step: usize,
    /// What the run was started with; a resumed run must be the same.
    pub fingerprint: String,
    /// The best evaluation so far: its step and what it is judged by (higher is better).
    pub best: Option<(usize, f64)>,
    /// Evaluations since the best.
    pub worse: usize,
    /// Step of the last evaluation.
    pub evaluated: Option<usize>,
    /// What the steps since the last line of metrics came to.
    pub window: Report,
    /// Training seconds before this checkpoint.
    pub seconds: f64,
    /// What the policies know, by part.
    #[serde(default)]
    pub policies: Option<Vec<serde_json::Value>>,
}

/// The files of one run's checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    folder: PathBuf,
}

impl Checkpoint {
    /// In a run's folder.
    pub fn of(run: &Path) -> Self {
        Self { folder: run.join(CHECKPOINT_FOLDER) }
    }

    fn state_path(&self) -> PathBuf {
        self.folder.join("state.json")
    }

    fn best_path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("best-{step}.bpk"))
    }

    /// The state, if there is a checkpoint.
    ///
    /// # Errors
    /// A state that cannot be read, or whose records are not there.
    pub fn state(&self) -> Result<Option<State>, TrainError> {
        let path = self.state_path();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(TrainError::Core(burn_peft_core::Error::io(path, e))),
        };
        let state: State = serde_json::from_str(&text).map_err(|e| {
            TrainError::checkpoint(&path, format!("is not a checkpoint's state: {e}"))
        })?;
        // The learner panics on a broken record, so each is tried first.
        for name in ["model", "optim", "scheduler"] {
            let path = self.folder.join(format!("{name}-{}.bpk", state.step));
            let broken = |e: String| {
                TrainError::checkpoint(
                    &path,
                    format!("is not a whole record ({e}); train anew with --overwrite"),
                )
            };
            match name {
                "model" => drop(ModuleRecord::load(&path).map_err(|e| broken(e.to_string()))?),
                "optim" => drop(
                    burn::optim::OptimizerRecord::load(&path).map_err(|e| broken(e.to_string()))?,
                ),
                _ => drop(
                    burn::optim::lr_scheduler::LrSchedulerRecord::load(&path)
                        .map_err(|e| broken(e.to_string()))?,
                ),
            }
        }
        Ok(Some(state))
    }

    pub(crate) fn write_state(&self, state: &State) -> Result<(), TrainError> {
        let path = self.state_path();
        let bytes = serde_json::to_vec_pretty(state)
            .map_err(|e| TrainError::checkpoint(&path, e.to_string()))?;
        Ok(burn_peft_core::write_atomic(&path, &bytes)?)
    }

    pub(crate) fn save_best<M: Module>(&self, step: usize, module: &M) -> Result<(), TrainError> {
        let path = self.best_path(step);
        let save = || {
            std::fs::create_dir_all(&self.folder).map_err(|e| e.to_string())?;
            module.clone().save_file(&path).map_err(|e| e.to_string())
        };
        save().map_err(|e| TrainError::checkpoint(&path, e))
    }

    pub(crate) fn load_best<M: Module>(&self, step: usize, module: M) -> Result<M, TrainError> {
        let path = self.best_path(step);
        module.try_load_file(&path).map_err(|e| TrainError::checkpoint(&path, e.to_string()))
    }

    /// Removes the records of all bests but one.
    pub(crate) fn forget_best_but(&self, step: Option<usize>) {
        let kept = step.map(|step| self.best_path(step));
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            if name.is_some_and(|name| name.starts_with("best-")) && Some(&path) != kept.as_ref() {
                // A leftover costs disk and nothing else.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Removes the checkpoint: the run is over.
    pub fn remove(&self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// What burn-train's checkpointer shall do next. The loop, not the strategy, knows when.
#[derive(Debug, Clone, Default)]
pub(crate) struct Actions(Arc<Mutex<Vec<CheckpointingAction>>>);

impl Actions {
    pub(crate) fn next(&self, action: CheckpointingAction) {
        match self.0.lock() {
            Ok(mut actions) => *actions = vec![action],
            Err(poisoned) => *poisoned.into_inner() = vec![action],
        }
    }
}

impl CheckpointingStrategy for Actions {
    fn checkpointing(
        &mut self,
        _epoch: usize,
        _collector: &EventStoreClient,
    ) -> Vec<CheckpointingAction> {
        self.0.lock().map(|mut actions| std::mem::take(&mut *actions)).unwrap_or_default()
    }
}

/// Reads the events of earlier parts of a run, for its picture.
pub fn past_events(metrics: &Path) -> Vec<Event> {
    #[derive(Deserialize)]
    struct Line {
        event: String,
        step: usize,
        #[serde(default)]
        epoch: f64,
        loss: Option<f64>,
        accuracy: Option<f64>,
    }
    let text = std::fs::read_to_string(metrics).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    lines
        .filter_map(|line| {
            let (loss, accuracy) = (line.loss?, line.accuracy?);
            let (step, epoch) = (line.step, line.epoch);
            match line.event.as_str() {
                "train" => Some(Event::Train {
                    step,
                    epoch,
                    loss,
                    accuracy,
                    grad_norm: 0.0,
                    learning_rate: 0.0,
                    tokens_per_second: 0.0,
                    padding: 0.0,
                }),
                "eval" => Some(Event::Eval { step, epoch, loss, accuracy, best: false }),
                _ => None,
            }
        })
        .collect()
}
