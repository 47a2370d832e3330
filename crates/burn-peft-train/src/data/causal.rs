//! Data for causal language modelling: plain text, prompts with completions, and chats.

use super::error::read_text;
use super::text::json_lines;
use super::{DataError, Message, TextTokenizer};
use burn_peft_models::Tokens;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The target of a position that has none, as in PyTorch.
pub const IGNORED: i32 = -100;

/// What one document of a plain text file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextUnit {
    /// A line.
    Line,
    /// What stands between blank lines.
    #[default]
    Paragraph,
    /// The file.
    File,
}

/// A token sequence, and which of its tokens are learnt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CausalItem {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether a token is a target: text all, completions and assistant turns only.
    pub learnt: Vec<bool>,
}

impl CausalItem {
    fn push(&mut self, ids: &[u32], learnt: bool) {
        self.ids.extend_from_slice(ids);
        self.learnt.extend(std::iter::repeat_n(learnt, ids.len()));
    }

    /// Targets: learnt tokens that something precedes.
    pub fn targets(&self) -> usize {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count()
    }
}

/// What was read, cut and left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CausalReport {
    /// Documents, completions or chats in the file.
    pub documents: usize,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Examples cut to the length.
    pub cut: usize,
    /// Examples left out because nothing to learn was left after the cut.
    pub dropped: usize,
}

/// Reads training data for a causal model. `.txt` (or any other extension) is plain text, cut into
/// sequences of `max_length` without losing a target; `.jsonl` holds objects with `text`, with
/// `prompt` and `completion`, or with `messages`, all of one kind.
///
/// # Errors
/// A file that is missing, empty or not UTF-8; lines that are no objects of the file's kind; chats
/// where the model has no chat template or the template refuses.
pub fn read_causal(
    path: &Path,
    tokenizer: &TextTokenizer,
    max_length: usize,
    unit: TextUnit,
) -> Result<(Vec<CausalItem>, CausalReport), DataError> {
    let text = read_text(path)?;
    let mut report = CausalReport::default();
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let items = if matches!(extension.as_str(), "jsonl" | "json" | "ndjson") {
        let objects = json_lines(path, &text)?;
        let has = |key| objects.first().is_some_and(|(_, first)| first.contains_key(key));
        if has("messages") {
            examples(path, &objects, max_length, &mut report, |line, o| {
                chat(path, line, o, tokenizer)
            })?
        } else if has("completion") {
            examples(path, &objects, max_length, &mut report, |line, o| {
                pair(path, line, o, tokenizer)
            })?
        } else if has("prompt") {
            let line = objects.first().map_or(1, |(line, _)| *line);
            let reason = "has a `prompt` and no `completion`; expected both, `text`, or `messages`";
            return Err(DataError::line(path, line, reason));
        } else {
            let texts: Vec<&str> = objects
                .iter()
                .map(|(line, o)| string(path, *line, o, "text"))
                .collect::<Result<_, _>>()?;
            chunks(&texts, tokenizer, max_length, &mut report)?
        }
    } else {
        let texts: Vec<&str> = match unit {
            TextUnit::File => vec![&text],
            TextUnit::Line => text.lines().collect(),
            TextUnit::Paragraph => {
                text.split("\n\n").flat_map(|part| part.split("\r\n\r\n")).collect()
            }
        };
        let texts: Vec<&str> =
            texts.into_iter().map(str::trim).filter(|text| !text.is_empty()).collect();
        chunks(&texts, tokenizer, max_length, &mut report)?
    };
    report.tokens = items.iter().map(|item| item.ids.len()).sum();
    if items.iter().all(|item| item.targets() == 0) {
        let reason = format!("holds nothing to learn within {max_length} tokens a sequence");
        return Err(DataError::file(path, reason));
    }
    Ok((items, report))
}

pub(super) fn string<'o>(
    path: &Path,
    line: usize,
    object: &'o Map<String, Value>,
    key: &str,
) -> Result<&'o str, DataError> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => {
            let reason = format!("`{key}`: expected a string, found {other}");
            Err(DataError::line(path, line, reason))
        }
        None => {
            let found: Vec<&str> = object.keys().map(String::as_str).collect();
            let reason =
                format!("has no `{key}` as the file's first line has, only {}", found.join(", "));
            Err(DataError::line(path, line, reason))
        }
    }
}

/// Whole texts, each ended by the end token, cut into pieces of at most `max_length`. A piece begins
/// with the last token of the one before, so that every token but a text's first is a target once.
fn chunks(
    texts: &[&str],
    tokenizer: &TextTokenizer,
    max_length: usize,
    report: &mut CausalReport,
) -> Result<Vec<CausalItem>, DataError> {
    report.documents = texts.len();
    let mut items = Vec::new();
    for mut ids in tokenizer.encode_whole(texts, true)? {
        ids.extend(tokenizer.eos.filter(|eos| ids.last() != Some(eos)));
        if ids.len() < 2 {
            report.dropped += 1;
            continue;
        }
        let stride = max_length.saturating_sub(1).max(1);
        for start in (0..ids.len() - 1).step_by(stride) {
            let mut item = CausalItem::default();
            item.push(&ids[start..ids.len().min(start + stride + 1)], true);
            items.push(item);
        }
    }
    Ok(items)
}

/// One item an object, in their order: `read` runs on all cores, and of several refusals the first is told.
fn examples(
    path: &Path,
    objects: &[(usize, Map<String, Value>)],
    max_length: usize,
    report: &mut CausalReport,
    read: impl Fn(usize, &Map<String, Value>) -> Result<CausalItem, DataError> + Sync,
) -> Result<Vec<CausalItem>, DataError> {
    report.documents = objects.len();
    let encoded: Vec<_> = objects.par_iter().map(|(line, object)| read(*line, object)).collect();
    let mut items = Vec::with_capacity(objects.len());
    for ((line, _), item) in objects.iter().zip(encoded) {
        let mut item = item?;
        if item.ids.len() > max_length {
            item.ids.truncate(max_length);
            item.learnt.truncate(max_length);
            report.cut += 1;
        }
        if item.targets() == 0 {
            log::warn!(
                "{}, line {line}: nothing to learn within {max_length} tokens; left out",
                path.display()
            );
            report.dropped += 1;
        } else {
            items.push(item);
        }
    }
    Ok(items)
}

/// Prompt and completion are encoded apart, so that the border lies between tokens.
fn pair(
    path: &Path,
    line: usize,
    object: &Map<String, Value>,
    tokenizer: &TextTokenizer,
) -> Result<CausalItem, DataError> {
    let prompt = tokenizer.encode_whole(&[string(path, line, object, "prompt")?], true)?;
    let completion = tokenizer.encode_whole(&[string(path, line, object, "completion")?], false)?;
    let mut item = CausalItem::default();
    item.push(&prompt.concat(), false);
    item.push(&completion.concat(), true);
    item.push(tokenizer.eos.as_slice(), true);
    Ok(item)
}

/// A chat is rendered turn by turn; what an assistant's turn adds is learnt.
fn chat(
    path: &Path,
    line: usize,
    object: &Map<String, Value>,
    tokenizer: &TextTokenizer,
) -> Result<CausalItem, DataError> {
    let wrong = |reason: String| DataError::line(path, line, reason);
    let template = tokenizer
        .template()
        .map_err(|e| wrong(format!("holds a chat, but {e}; use prompt and completion")))?;
    let messages: Vec<Message> = match object.get("messages") {
        Some(list) => serde_json::from_value(list.clone()).map_err(|e| {
            wrong(format!("`messages`: expected objects with role and content: {e}"))
        })?,
        None => return Err(wrong("has no `messages` as the file's first line has".into())),
    };
    let mut item = CausalItem::default();
    let mut before = String::new();
    for (index, message) in messages.iter().enumerate() {
        let assistant = message.role == "assistant";
        if assistant {
            let prompt = template.render(&messages[..index], true).map_err(wrong)?;
            let added = rest(&prompt, &before).map_err(wrong)?;
            item.push(&tokenizer.encode_whole(&[added], false)?.concat(), false);
            before = prompt;
        } else if index + 1 < messages.len() {
            // Turns that are not learnt are rendered together with what follows.
            continue;
        }
        let whole = template.render(&messages[..=index], false).map_err(wrong)?;
        let added = rest(&whole, &before).map_err(wrong)?;
        item.push(&tokenizer.encode_whole(&[added], false)?.concat(), assistant);
        before = whole;
    }
    Ok(item)
}

fn rest<'w>(whole: &'w str, before: &str) -> Result<&'w str, String> {
    whole.strip_prefix(before).ok_or_else(|| {
        "the chat template changes earlier turns when a later one is added, so that the assistant's \
         part cannot be told; use prompt and completion"
            .to_owned()
    })
}

/// Puts sequences together into rows of at most `max_length` tokens (best fit, longest first), so
/// that little is padded. Each row is a list of items; every item is in one row.
pub fn pack(items: &[CausalItem], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(items[i].ids.len()));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for item in order {
        let length = items[item].ids.len();
        let fit = room.range(length..).next().map(|(space, _)| *space);
        let (row, space) = match fit {
            Some(space) => {
                let waiting = room.entry(space).or_default();
                let row = waiting.pop().unwrap_or_default();
                if waiting.is_empty() {
                    room.remove(&space);
                }
                (row, space)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, max_length.max(length))
            }
        };
        rows[row].push(item);
        room.entry(space - length).or_default().push(row);
    }
    rows
}

/// A padded batch with the next token to predict at each position.
#[derive(Debug, Clone)]
pub struct CausalBatch {
    /// What the model reads. Documents in one row have positions of their own and do not see each
    /// other.
    pub tokens: Tokens,
    /// The token that follows, [`IGNORED`] where nothing is learnt, `[batch · seq]`.
    pub targets: Vec<i32>,
}

/// A batch of rows, each of one item or, packed, of several.
pub fn causal_batch(items: &[CausalItem], rows: &[&[usize]], padding: u32) -> CausalBatch {
    let length = |row: &&[usize]| row.iter().map(|&i| items[i].ids.len()).sum::<usize>();
    let seq = rows.iter().map(length).max().unwrap_or(0);
    let mut tokens = Tokens { batch: rows.len(), seq, ..Tokens::default() };
    let (mut positions, mut segments) = (Vec::new(), Vec::new());
    let mut targets = Vec::with_capacity(rows.len() * seq);
    for row in rows {
        for (segment, &index) in row.iter().enumerate() {
            let item = &items[index];
            for (i, id) in item.ids.iter().enumerate() {
                tokens.ids.push(*id as i32);
                tokens.mask.push(1);
                positions.push(i as i32);
                segments.push(segment as i32);
                let next = item.ids.get(i + 1).filter(|_| item.learnt[i + 1]);
                targets.push(next.map_or(IGNORED, |next| *next as i32));
            }
        }
        for _ in length(row)..seq {
            tokens.ids.push(padding as i32);
            tokens.mask.push(0);
            positions.push(0);
            segments.push(-1);
            targets.push(IGNORED);
        }
    }
    if rows.iter().any(|row| row.len() > 1) {
        tokens.positions = Some(positions);
        tokens.segments = Some(segments);
    }
    CausalBatch { tokens, targets }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(ids: &[u32], learnt: &[bool]) -> CausalItem {
        CausalItem { ids: ids.to_vec(), learnt: learnt.to_vec() }
    }

    #[test]
    fn targets_are_the_next_tokens_that_are_learnt_and_never_cross_documents() {
        let items = [item(&[1, 2, 3], &[false, false, true]), item(&[7, 8], &[true, true])];
        let batch = causal_batch(&items, &[&[0, 1], &[1]], 0);
        let x = IGNORED;
        assert_eq!(batch.targets, [x, 3, x, 8, x, 8, x, x, x, x]);
        assert_eq!(batch.tokens.positions, Some(vec![0, 1, 2, 0, 1, 0, 1, 0, 0, 0]));
        assert_eq!(batch.tokens.segments, Some(vec![0, 0, 0, 1, 1, 0, 0, -1, -1, -1]));
        assert_eq!(batch.tokens.mask, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn lines_are_read_on_all_cores_and_stay_in_order() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models/llama");
        let tokenizer = TextTokenizer::load(Path::new(model)).expect("is a tokenizer");
        let folder = tempfile::tempdir().expect("makes a folder");
        let read = |lines: &[String]| {
            let path = folder.path().join("pairs.jsonl");
            std::fs::write(&path, lines.concat()).expect("writes");
            read_causal(&path, &tokenizer, 16, TextUnit::default())
        };
        let words = |i: usize| vec![format!("w{}", i % 40); 1 + i % 5].join(" ");
        let line =
            |i| format!("{{\"prompt\": \"{}\", \"completion\": \"w{}\"}}\n", words(i), i % 7);
        let mut lines: Vec<String> = (0..300).map(line).collect();
        let (items, report) = read(&lines).expect("is well formed");
        let alone = |line: &String| read(std::slice::from_ref(line)).expect("is well formed").0;
        assert_eq!(items, lines.iter().flat_map(alone).collect::<Vec<_>>());
        assert_eq!((report.documents, report.cut, report.dropped), (300, 0, 0));
        for broken in [200, 100] {
            lines[broken] = "{\"prompt\": \"w1\", \"completion\": 1}\n".into();
            let told = read(&lines).expect_err("is no text").to_string();
            assert!(told.contains(&format!("line {}", broken + 1)), "{told}");
        }
    }

    proptest! {
        #[test]
        fn packing_loses_no_item_and_keeps_the_length(
            lengths in prop::collection::vec(1usize..40, 0..120),
        ) {
            let items: Vec<CausalItem> =
                lengths.iter().map(|&n| item(&vec![1; n], &vec![true; n])).collect();
            let rows = pack(&items, 40);
            let mut all: Vec<usize> = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.iter().map(|&i| lengths[i]).sum::<usize>() <= 40);
            }
            // Best fit leaves at most one row half empty.
            let half = |row: &&Vec<usize>| row.iter().map(|&i| lengths[i]).sum::<usize>() <= 20;
            prop_assert!(rows.iter().filter(half).count() <= 1);
        }
    }
}
