//! How to train: Hugging Face's words and defaults where there are such.

use crate::TrainError;
use serde::{Deserialize, Serialize};

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls in a straight line to zero at the last step.
    #[default]
    Linear,
    /// Falls along half a cosine to zero at the last step.
    Cosine,
    /// Stays.
    Constant,
}

/// What decides which evaluation was the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestBy {
    /// The lowest validation loss.
    #[default]
    Loss,
    /// The highest validation accuracy.
    Accuracy,
}

/// Options of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Peak learning rate; default 2e-4.
    pub learning_rate: f64,
    /// Passes over the training data; default 3.
    pub num_train_epochs: usize,
    /// Make this many optimizer steps, whatever the epochs; default: as many as the epochs have.
    pub max_steps: Option<usize>,
    /// Examples a forward pass; default 8.
    pub per_device_train_batch_size: usize,
    /// Examples a forward pass in evaluation; default 32.
    pub per_device_eval_batch_size: usize,
    /// Forward passes an optimizer step; the loss is the mean over all their targets; default 1.
    pub gradient_accumulation_steps: usize,
    /// Keep one hidden state of each block and compute the rest of it again for its gradients (arXiv 1604.06174): less
    /// memory, and one more forward pass of the blocks a step. The same numbers; default false.
    pub gradient_checkpointing: bool,
    /// Largest norm of all gradients together; 0 turns clipping off; default 1.
    pub max_grad_norm: f64,
    /// AdamW's decoupled weight decay, not on biases and norms; default 0.
    pub weight_decay: f64,
    /// Share of all steps in which the rate rises from 0; default 0.
    pub warmup_ratio: f64,
    /// The same as a number of steps; wins over the share.
    pub warmup_steps: Option<usize>,
    /// Shape after the warm-up; default linear.
    pub lr_scheduler_type: Schedule,
    /// LoRA+ (arXiv 2402.12354): the zero-initialised factors learn this many times faster.
    pub loraplus_lr_ratio: Option<f64>,
    /// Batches of similar length, which pads less; default true.
    pub group_by_length: bool,
    /// Evaluate every so many steps; default: at the end of each epoch.
    pub eval_steps: Option<usize>,
    /// Stop after this many evaluations without a better one; default: never.
    pub early_stopping_patience: Option<usize>,
    /// What "better" means; default loss.
    pub metric_for_best_model: BestBy,
    /// Write a metrics line every so many steps; default 10.
    pub logging_steps: usize,
    /// Checkpoint every so many steps; default: at the end of each epoch and on Ctrl-C.
    pub save_steps: Option<usize>,
    /// Seed of everything random; default 42.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            num_train_epochs: 3,
            max_steps: None,
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 32,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: false,
            max_grad_norm: 1.0,
            weight_decay: 0.0,
            warmup_ratio: 0.0,
            warmup_steps: None,
            lr_scheduler_type: Schedule::default(),
            loraplus_lr_ratio: None,
            group_by_length: true,
            eval_steps: None,
            early_stopping_patience: None,
            metric_for_best_model: BestBy::default(),
            logging_steps: 10,
            save_steps: None,
            seed: 42,
        }
    }
}

impl Options {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// [`TrainError::Option`] with the option's name.
    pub fn check(&self) -> Result<(), TrainError> {
        let positive = [
            ("num-train-epochs", self.num_train_epochs),
            ("per-device-train-batch-size", self.per_device_train_batch_size),
            ("per-device-eval-batch-size", self.per_device_eval_batch_size),
            ("gradient-accumulation-steps", self.gradient_accumulation_steps),
            ("logging-steps", self.logging_steps),
            ("max-steps", self.max_steps.unwrap_or(1)),
            ("eval-steps", self.eval_steps.unwrap_or(1)),
            ("save-steps", self.save_steps.unwrap_or(1)),
            ("early-stopping-patience", self.early_stopping_patience.unwrap_or(1)),
        ];
        for (option, value) in positive {
            if value == 0 {
                return Err(TrainError::option(option, "expected 1 or more, found 0"));
            }
        }
        let finite = [
            ("learning-rate", self.learning_rate),
            ("max-grad-norm", self.max_grad_norm),
            ("weight-decay", self.weight_decay),
            ("warmup-ratio", self.warmup_ratio),
            ("loraplus-lr-ratio", self.loraplus_lr_ratio.unwrap_or(1.0)),
        ];
        for (option, value) in finite {
            if !value.is_finite() || value < 0.0 {
                let reason = format!("expected a number of 0 or more, found {value}");
                return Err(TrainError::option(option, reason));
            }
        }
        if self.warmup_ratio > 1.0 {
            let reason = format!("expected a share between 0 and 1, found {}", self.warmup_ratio);
            return Err(TrainError::option("warmup-ratio", reason));
        }
        Ok(())
    }
}
