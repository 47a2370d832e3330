//! The one error type: what was expected, what was found, where, and what to do.

use std::path::PathBuf;

/// Why an adapter could not be made, read, attached, merged or written.
///
/// Every message is one sentence that can be shown to a user as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file is there but is not what its format demands.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A field of a method's configuration has a value that cannot work.
    #[error("{field}: {reason}")]
    Config {
        /// The field, by its name in `adapter_config.json`.
        field: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A tensor is missing, superfluous, or has another shape or type than its place asks for.
    #[error("tensor `{tensor}`: expected {expected}, found {found}")]
    Tensor {
        /// The tensor's full name in the file.
        tensor: String,
        /// What the place asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// Names that match no place of the model.
    #[error("{field}: `{name}` matches no {what} of the model{}", near_names(.near))]
    NoMatch {
        /// The configuration field that held the name.
        field: &'static str,
        /// The name or pattern.
        name: String,
        /// What was searched, such as "linear layer".
        what: &'static str,
        /// The nearest names that exist.
        near: Vec<String>,
    },
    /// A method cannot be laid over a place of this kind.
    #[error("{path}: {reason}")]
    Place {
        /// The place.
        path: String,
        /// Why not.
        reason: String,
    },
    /// A named adapter that a bank does not hold.
    #[error("no adapter is named `{name}`; the bank holds {}", .held.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        held: Vec<String>,
    },
}

fn near_names(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; near names: {}", names.join(", ")) }
}

impl Error {
    /// An I/O error at `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A malformed file at `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), reason: reason.into() }
    }

    /// A configuration field that cannot work.
    pub fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { field: field.into(), reason: reason.into() }
    }

    /// A tensor that does not fit.
    pub fn tensor(
        tensor: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Tensor { tensor: tensor.into(), expected: expected.into(), found: found.into() }
    }

    /// A place that cannot carry the method.
    pub fn place(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Place { path: path.into(), reason: reason.into() }
    }

    /// A name that matches nothing among `candidates`, of which the nearest are listed.
    pub fn no_match<'a>(
        field: &'static str,
        name: &str,
        what: &'static str,
        candidates: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let mut scored: Vec<(usize, String)> = Vec::new();
        for candidate in candidates {
            // A user writes the last component; the whole path would drown the difference.
            let tail = candidate.rsplit('.').next().unwrap_or(candidate);
            let short = if name.contains('.') { candidate } else { tail };
            let distance = strsim::damerau_levenshtein(name, short);
            if !scored.iter().any(|(_, known)| known == short) {
                scored.push((distance, short.to_owned()));
            }
        }
        scored.sort();
        let near = scored.into_iter().take(5).map(|(_, name)| name).collect();
        Self::NoMatch { field, name: name.to_owned(), what, near }
    }
}
