//! How a command ends other than well.

use std::path::Path;
use std::process::{ExitCode, ExitStatus};

/// Why a command did not finish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// One sentence for the user.
    #[error("{0}")]
    Said(String),
    /// A program that was started has failed, and has said why itself.
    #[error("{what} failed ({status})")]
    Program {
        /// The program and its first argument.
        what: String,
        /// How it ended.
        status: ExitStatus,
    },
}

impl Failure {
    /// A sentence.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::Said(message.into())
    }

    /// A sentence about a file.
    pub(crate) fn at(path: &Path, why: impl std::fmt::Display) -> Self {
        Self::Said(format!("{}: {why}", path.display()))
    }

    /// The code to end with: that of the failed program, where there is one.
    pub(crate) fn exit_code(&self) -> ExitCode {
        let code = match self {
            Self::Said(_) => None,
            Self::Program { status, .. } => status.code().and_then(|code| u8::try_from(code).ok()),
        };
        code.map_or(ExitCode::FAILURE, ExitCode::from)
    }
}
