//! Why a training could not start or go on.

use crate::data::DataError;
use std::path::PathBuf;

/// Each message is one sentence that can be shown to a user as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Training or evaluation data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model, the adapters or their files.
    #[error(transparent)]
    Core(#[from] burn_peft_core::Error),
    /// An option that cannot work.
    #[error("{option}: {reason}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What was expected and what was found.
        reason: String,
    },
    /// The loss, or what is trained, is no number any more.
    #[error(
        "{what} is {value} at step {step}; training stopped and nothing was saved from this step. \
         Try a smaller learning rate (now {learning_rate:.2e}), a longer warm-up, or look at the data"
    )]
    NotFinite {
        /// The optimizer step, counted from 1.
        step: usize,
        /// What is no number: the loss, the gradients' norm, a trained parameter.
        what: &'static str,
        /// NaN or infinity.
        value: f64,
        /// The learning rate in force.
        learning_rate: f64,
    },
    /// A checkpoint that cannot be read, written, or does not belong to this run.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl TrainError {
    pub(crate) fn option(option: &'static str, reason: impl Into<String>) -> Self {
        Self::Option { option, reason: reason.into() }
    }

    pub(crate) fn checkpoint(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.into(), reason: reason.into() }
    }
}
