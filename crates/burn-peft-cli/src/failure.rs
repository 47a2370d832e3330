//! How a verb ends other than well.

use burn_peft::train::TrainError;
use burn_peft::train::data::DataError;
use std::io::Write;

/// Why a verb did not finish.
#[derive(Debug)]
pub(crate) enum Failure {
    /// One sentence for the user.
    Said(String),
    /// Ctrl-C, after a checkpoint.
    Interrupted,
    /// Standard output is closed.
    ClosedPipe,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::Said(message.into())
    }
}

impl From<burn_peft::core::Error> for Failure {
    fn from(error: burn_peft::core::Error) -> Self {
        Self::Said(error.to_string())
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self::Said(error.to_string())
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Said(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::ClosedPipe,
            _ => Self::Said(format!("standard output: {error}")),
        }
    }
}

/// Prints to standard output; a closed pipe ends the program quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Tells the user something on standard error; nobody need listen.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
