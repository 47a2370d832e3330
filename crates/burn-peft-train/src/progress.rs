//! What a run tells while it goes on: a bar on a terminal, plain lines elsewhere, JSON lines on disk.

use crate::{Report, TrainError};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Something that happened in a run.
#[derive(Debug, Clone, Serialize, PartialEq)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Some optimizer steps were made.
    Train {
        /// Optimizer steps so far.
        step: usize,
        /// Epochs so far, with a fraction.
        epoch: f64,
        /// Mean loss since the last line.
        loss: f64,
        /// Share of right targets since the last line.
        accuracy: f64,
        /// Norm of all gradients before clipping, of the last step.
        grad_norm: f64,
        /// Learning rate of the last step.
        learning_rate: f64,
        /// Real tokens a second since the last line.
        tokens_per_second: f64,
        /// Share of padding in all tokens since the last line.
        padding: f64,
    },
    /// The validation data was evaluated.
    Eval {
        /// Optimizer steps so far.
        step: usize,
        /// Epochs so far, with a fraction.
        epoch: f64,
        /// Mean loss.
        loss: f64,
        /// Share of right targets.
        accuracy: f64,
        /// Whether it is the best so far.
        best: bool,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Optimizer steps so far.
        step: usize,
    },
    /// Evaluations did not get better for long enough.
    EarlyStop {
        /// Optimizer steps so far.
        step: usize,
    },
    /// Ctrl-C.
    Interrupted {
        /// Optimizer steps so far.
        step: usize,
    },
}

/// Hears of everything that happens in a run.
pub trait Observer: Send {
    /// The run begins: `done` of `total` optimizer steps were made before.
    fn start(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }
    /// An optimizer step was made.
    fn step(&mut self, step: usize, report: &Report) {
        let _ = (step, report);
    }
    /// Something worth a line happened.
    fn event(&mut self, event: &Event);
    /// The run is over.
    fn end(&mut self) {}
}

impl Observer for () {
    fn event(&mut self, _event: &Event) {}
}

impl Observer for Vec<Event> {
    fn event(&mut self, event: &Event) {
        self.push(event.clone());
    }
}

impl<A: Observer, B: Observer> Observer for (A, B) {
    fn start(&mut self, done: usize, total: usize) {
        self.0.start(done, total);
        self.1.start(done, total);
    }
    fn step(&mut self, step: usize, report: &Report) {
        self.0.step(step, report);
        self.1.step(step, report);
    }
    fn event(&mut self, event: &Event) {
        self.0.event(event);
        self.1.event(event);
    }
    fn end(&mut self) {
        self.0.end();
        self.1.end();
    }
}

/// A bar on a terminal; plain lines where standard error is no terminal.
#[derive(Debug)]
pub struct Console {
    bar: ProgressBar,
    plain: bool,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// On standard error.
    pub fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        Self { bar: ProgressBar::hidden(), plain }
    }

    fn line(&self, text: &str) {
        if self.plain {
            // A closed pipe must not end a training.
            let _ = writeln!(std::io::stderr(), "{text}");
        } else {
            self.bar.println(text);
        }
    }
}

impl Observer for Console {
    fn start(&mut self, done: usize, total: usize) {
        if self.plain {
            return;
        }
        self.bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
        let template = "{bar:32} {pos}/{len} steps, {elapsed} gone, {eta} to go  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_position(done as u64);
        self.bar.reset_eta();
    }

    fn step(&mut self, step: usize, report: &Report) {
        self.bar.set_position(step as u64);
        self.bar.set_message(format!("loss {:.4}", report.loss));
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Train { step, epoch, loss, accuracy, learning_rate, tokens_per_second, .. } => {
                if self.plain {
                    self.line(&format!(
                        "step {step} (epoch {epoch:.2}): loss {loss:.4}, accuracy {accuracy:.3}, \
                         learning rate {learning_rate:.2e}, {tokens_per_second:.0} tokens/s"
                    ));
                }
            }
            Event::Eval { step, epoch, loss, accuracy, best } => self.line(&format!(
                "step {step} (epoch {epoch:.2}): validation loss {loss:.4}, accuracy {accuracy:.3}{}",
                if *best { " (best so far)" } else { "" }
            )),
            Event::Checkpoint { .. } => {}
            Event::EarlyStop { step } => {
                self.line(&format!("step {step}: stopped early, validation does not improve any more"));
            }
            Event::Interrupted { step } => {
                self.line(&format!("step {step}: interrupted; continue with --resume"));
            }
        }
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Appends each event as a line of JSON.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    /// The first write that failed; a full disk is told once and training goes on.
    failed: bool,
}

impl MetricsFile {
    /// Appends to `path` when `resume`, else begins anew. When resuming, lines after `step` are
    /// dropped: those steps are made again.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path, resume: Option<usize>) -> Result<Self, TrainError> {
        let io = |e| TrainError::Core(burn_peft_core::Error::io(path, e));
        let mut kept = String::new();
        if let Some(step) = resume
            && let Ok(text) = std::fs::read_to_string(path)
        {
            for line in text.lines() {
                let value: Option<serde_json::Value> = serde_json::from_str(line).ok();
                let at = value.as_ref().and_then(|v| v.get("step")?.as_u64());
                if at.is_some_and(|at| at <= step as u64) {
                    kept.push_str(line);
                    kept.push('\n');
                }
            }
        }
        burn_peft_core::write_atomic(path, kept.as_bytes())?;
        let file = File::options().append(true).open(path).map_err(io)?;
        Ok(Self { path: path.to_owned(), file, failed: false })
    }
}

impl Observer for MetricsFile {
    fn event(&mut self, event: &Event) {
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        if let Err(e) = self.file.write_all(&line)
            && !std::mem::replace(&mut self.failed, true)
        {
            log::error!("{}: metrics cannot be written any more: {e}", self.path.display());
        }
    }
}
