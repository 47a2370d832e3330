//! Texts with labels: TSV, CSV and JSON lines.

use super::error::read_text;
use super::{DataError, ImageExample};
use serde_json::Value;
use std::path::Path;

/// A text, perhaps with a second one, and its label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The text.
    pub text: String,
    /// A second text, for tasks over pairs.
    pub text_pair: Option<String>,
    /// The label as it stands in the file; empty where the file has none.
    pub label: String,
    /// Line of the file, counted from 1.
    pub line: usize,
}

/// Names of columns (TSV, CSV) or fields (JSON lines).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// Default "text".
    pub text: String,
    /// Default none.
    pub text_pair: Option<String>,
    /// Default "label".
    pub label: String,
}

impl Default for Columns {
    fn default() -> Self {
        Self { text: "text".into(), text_pair: None, label: "label".into() }
    }
}

/// Reads examples that all have labels. `.tsv` is split at tabs, `.csv` follows RFC 4180, both with
/// a first row of names; `.jsonl` and `.json` hold an object a line.
///
/// # Errors
/// A file that is missing, empty or not UTF-8, columns that are not there, and rows that are
/// ragged, blank or unlabelled, each with its line.
pub fn read_labelled(path: &Path, columns: &Columns) -> Result<Vec<Example>, DataError> {
    let examples = read_texts(path, columns)?;
    match examples.iter().find(|example| example.label.is_empty()) {
        Some(example) => {
            let reason = format!("has no `{}`; expected a label in every row", columns.label);
            Err(DataError::line(path, example.line, reason))
        }
        None => Ok(examples),
    }
}

/// Reads examples whose labels may be absent: what is predicted on.
///
/// # Errors
/// As [`read_labelled`], less those about labels.
pub fn read_texts(path: &Path, columns: &Columns) -> Result<Vec<Example>, DataError> {
    let text = read_text(path)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let examples = match extension.as_str() {
        "tsv" => rows(path, &text, columns, b'\t')?,
        "csv" => rows(path, &text, columns, b',')?,
        "jsonl" | "json" | "ndjson" => json(path, &text, columns)?,
        other => {
            let reason = format!("has the extension `{other}`; expected .tsv, .csv or .jsonl");
            return Err(DataError::file(path, reason));
        }
    };
    if examples.is_empty() {
        return Err(DataError::file(path, "has no rows of data below its first row"));
    }
    if let Some(blank) = examples.iter().find(|example| example.text.trim().is_empty()) {
        return Err(DataError::line(path, blank.line, format!("`{}` is blank", columns.text)));
    }
    Ok(examples)
}

fn rows(path: &Path, text: &str, columns: &Columns, comma: u8) -> Result<Vec<Example>, DataError> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(comma)
        .quoting(comma == b',')
        .flexible(true)
        .from_reader(text.as_bytes());
    let names: Vec<String> = match reader.headers() {
        Ok(names) => names.iter().map(|name| name.trim().to_owned()).collect(),
        Err(e) => return Err(DataError::file(path, format!("has no readable first row: {e}"))),
    };
    let find = |name: &str| names.iter().position(|found| found == name);
    let need = |name: &str| {
        find(name).ok_or_else(|| {
            let found = names.join(", ");
            let reason = format!("has no column `{name}`; its first row names {found}");
            DataError::line(path, 1, reason)
        })
    };
    let text_at = need(&columns.text)?;
    let pair_at = columns.text_pair.as_deref().map(need).transpose()?;
    let label_at = find(&columns.label);
    let mut examples = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| DataError::file(path, format!("cannot be read: {e}")))?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        if record.len() != names.len() {
            let (expected, found) = (names.len(), record.len());
            let reason = format!("expected {expected} fields as in the first row, found {found}");
            return Err(DataError::line(path, line, reason));
        }
        let field = |at: usize| record.get(at).unwrap_or_default().to_owned();
        examples.push(Example {
            text: field(text_at),
            text_pair: pair_at.map(field),
            label: label_at.map(field).unwrap_or_default().trim().to_owned(),
            line,
        });
    }
    Ok(examples)
}

fn json(path: &Path, text: &str, columns: &Columns) -> Result<Vec<Example>, DataError> {
    let mut examples = Vec::new();
    for (line, object) in json_lines(path, text)? {
        let string = |name: &str| match object.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => {
                let reason = format!("`{name}`: expected a string, found {other}");
                Err(DataError::line(path, line, reason))
            }
            None => {
                let found: Vec<&str> = object.keys().map(String::as_str).collect();
                let reason = format!("has no `{name}`, only {}", found.join(", "));
                Err(DataError::line(path, line, reason))
            }
        };
        let label = match object.get(&columns.label) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.trim().to_owned(),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
            Some(other) => {
                let reason = format!("`{}`: expected a label, found {other}", columns.label);
                return Err(DataError::line(path, line, reason));
            }
        };
        let text_pair = columns.text_pair.as_deref().map(string).transpose()?;
        examples.push(Example { text: string(&columns.text)?, text_pair, label, line });
    }
    Ok(examples)
}

/// A JSON object and the line it stands on, counted from 1.
type NumberedObject = (usize, serde_json::Map<String, Value>);

/// The objects of a file of JSON lines, with their lines; blank lines are passed over.
pub(crate) fn json_lines(path: &Path, text: &str) -> Result<Vec<NumberedObject>, DataError> {
    let mut objects = Vec::new();
    for (index, row) in text.lines().enumerate() {
        if row.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(row) {
            Ok(Value::Object(object)) => objects.push((index + 1, object)),
            Ok(_) => return Err(DataError::line(path, index + 1, "expected a JSON object")),
            Err(e) => return Err(DataError::line(path, index + 1, format!("is not JSON: {e}"))),
        }
    }
    Ok(objects)
}

/// The names of the classes, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Name of each class.
    pub names: Vec<String>,
}

impl Labels {
    /// All labels of the training data: by value if all are whole numbers, else by letter.
    ///
    /// # Errors
    /// Fewer than two.
    pub fn of<'a>(
        path: &Path,
        labels: impl IntoIterator<Item = &'a String>,
    ) -> Result<Self, DataError> {
        let mut names: Vec<String> = labels.into_iter().cloned().collect();
        names.sort();
        names.dedup();
        if names.len() < 2 {
            let found = names.join(", ");
            let reason = format!("expected two labels or more, found only {found}");
            return Err(DataError::file(path, reason));
        }
        let number = |name: &String| name.parse::<i64>();
        if names.iter().all(|name| number(name).is_ok()) {
            // Their spelling stays: "+1" and "01" are names too.
            names.sort_by_key(|name| number(name).unwrap_or_default());
        }
        Ok(Self { names })
    }

    /// The class of an example.
    ///
    /// # Errors
    /// A label that was not seen in training, with file, line and the labels there are.
    pub fn id(&self, path: &Path, example: &Example) -> Result<i32, DataError> {
        self.class(&example.label).map_err(|reason| DataError::line(path, example.line, reason))
    }

    /// The class of an image.
    ///
    /// # Errors
    /// As [`id`](Self::id).
    pub fn of_image(&self, path: &Path, example: &ImageExample) -> Result<i32, DataError> {
        self.class(&example.label)
            .map_err(|reason| DataError::file(path, format!("{}: {reason}", example.name)))
    }

    fn class(&self, label: &str) -> Result<i32, String> {
        let found = self.names.iter().position(|name| name == label);
        found.and_then(|id| i32::try_from(id).ok()).ok_or_else(|| {
            let known: Vec<&str> = self.names.iter().take(10).map(String::as_str).collect();
            let known = known.join(", ");
            format!("label `{label}` was not seen in training; expected one of {known}")
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn read(name: &str, content: &[u8]) -> Result<Vec<Example>, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_labelled(&path, &Columns::default())
    }

    #[test]
    fn three_formats_read_alike() {
        let tsv = read("a.tsv", b"label\ttext\npos\tsays \"yes\"\n").unwrap();
        let csv = read("a.csv", b"label,text\npos,\"says \"\"yes\"\"\"\n").unwrap();
        let json = read("a.jsonl", br#"{"label": "pos", "text": "says \"yes\""}"#).unwrap();
        assert_eq!(tsv[0].text, "says \"yes\"");
        assert_eq!((&tsv[0].text, &tsv[0].label), (&csv[0].text, &csv[0].label));
        assert_eq!((&tsv[0].text, &tsv[0].label), (&json[0].text, &json[0].label));
    }

    #[test]
    fn each_fault_names_its_line() {
        let cases: [(&str, &[u8], &str); 8] = [
            ("a.tsv", b"", "is empty"),
            ("a.tsv", b"text\tlabel\n", "no rows"),
            (
                "a.tsv",
                b"text\tlabel\na\tx\nb\n",
                "line 3: expected 2 fields as in the first row, found 1",
            ),
            ("a.tsv", b"word\tlabel\na\tx\n", "no column `text`"),
            ("a.tsv", b"text\tlabel\na\t\n", "line 2: has no `label`"),
            ("a.tsv", b"text\tlabel\n\xff\tx\n", "line 2: is not UTF-8"),
            ("a.jsonl", b"{\"text\": \"a\", \"label\": 1}\n{", "line 2: is not JSON"),
            ("a.jsonl", b"{\"text\": 3, \"label\": 1}", "line 1: `text`: expected a string"),
        ];
        for (name, content, expected) in cases {
            let error = read(name, content).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} should contain {expected}");
        }
    }

    #[test]
    fn whole_numbers_are_ordered_by_value_and_strangers_refused() {
        let path = Path::new("a.tsv");
        let examples = read("a.tsv", b"text\tlabel\na\t10\nb\t9\n").unwrap();
        let labels = Labels::of(path, examples.iter().map(|e| &e.label)).unwrap();
        assert_eq!(labels.names, ["9", "10"]);
        let signed = read("a.tsv", b"text\tlabel\na\t+1\nb\t-1\n").unwrap();
        assert_eq!(Labels::of(path, signed.iter().map(|e| &e.label)).unwrap().names, ["-1", "+1"]);
        let stranger = Example { label: "8".into(), ..examples[0].clone() };
        let error = labels.id(path, &stranger).unwrap_err().to_string();
        assert!(error.contains("not seen in training; expected one of 9, 10"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for name in ["a.tsv", "a.csv", "a.jsonl"] {
                let _ = read(name, &bytes);
            }
        }
    }
}
