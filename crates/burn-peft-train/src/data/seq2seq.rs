//! Data for an encoder with a decoder: prompts, which are read, with completions, which are learnt.

use super::causal::string;
use super::error::read_text;
use super::text::json_lines;
use super::{DataError, IGNORED, TextTokenizer, pad};
use burn_peft_models::Tokens;
use std::path::Path;

/// What the encoder reads, and what the decoder learns to write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seq2SeqItem {
    /// Token ids of the prompt.
    pub input: Vec<u32>,
    /// Token ids of the completion, its end token with them.
    pub target: Vec<u32>,
}

/// A padded batch of both.
#[derive(Debug, Clone)]
pub struct Seq2SeqBatch {
    /// What the encoder reads.
    pub input: Tokens,
    /// What the decoder reads: its start token and the targets but for the last.
    pub decoder: Tokens,
    /// The token that follows, [`IGNORED`] at padding, `[batch · decoder's seq]`.
    pub targets: Vec<i32>,
}

/// Reads `.jsonl` of objects with `prompt` and `completion`. Each is encoded with the tokens that the tokenizer
/// adds and cut to `max_length`; a completion ends with the end token, where the model has one.
///
/// # Errors
/// A file that is missing, empty or not UTF-8; lines that are no such objects; a length too small for the
/// tokenizer's own tokens.
pub fn read_seq2seq(
    path: &Path,
    tokenizer: &TextTokenizer,
    max_length: usize,
) -> Result<Vec<Seq2SeqItem>, DataError> {
    let text = read_text(path)?;
    let objects = json_lines(path, &text)?;
    let encoded = |key: &str| {
        let texts: Vec<(&str, Option<&str>)> = objects
            .iter()
            .map(|(line, object)| Ok((string(path, *line, object, key)?, None)))
            .collect::<Result<_, DataError>>()?;
        tokenizer.encode(&texts, max_length)
    };
    let (prompts, completions) = (encoded("prompt")?, encoded("completion")?);
    let item = |(prompt, completion): (super::Encoded, super::Encoded)| {
        let mut target = completion.ids;
        if let Some(eos) = tokenizer.eos.filter(|eos| target.last() != Some(eos)) {
            target.truncate(max_length - 1);
            target.push(eos);
        }
        Seq2SeqItem { input: prompt.ids, target }
    };
    Ok(prompts.into_iter().zip(completions).map(item).collect())
}

/// A batch of the `picked` items, for a decoder that begins with `start`.
pub fn seq2seq_batch(
    items: &[Seq2SeqItem],
    picked: &[usize],
    start: u32,
    padding: u32,
) -> Seq2SeqBatch {
    let padded = |rows: Vec<Vec<u32>>| {
        let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|row| (&row[..], &[][..])).collect();
        Tokens { type_ids: None, ..pad(&rows, padding) }
    };
    let picked = || picked.iter().map(|&item| &items[item]);
    let shifted = |target: &[u32]| [&[start][..], &target[..target.len().max(1) - 1]].concat();
    let decoder = padded(picked().map(|item| shifted(&item.target)).collect());
    let fill = std::iter::repeat(IGNORED);
    let row = |item: &Seq2SeqItem| {
        let target: Vec<i32> = item.target.iter().map(|id| *id as i32).collect();
        target.into_iter().chain(fill.clone()).take(decoder.seq)
    };
    let targets = picked().flat_map(row).collect();
    Seq2SeqBatch {
        input: padded(picked().map(|item| item.input.clone()).collect()),
        decoder,
        targets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decoder_reads_the_start_and_the_targets_before() {
        let item = |input: &[u32], target: &[u32]| Seq2SeqItem {
            input: input.to_vec(),
            target: target.to_vec(),
        };
        let items = [item(&[5, 6], &[7, 8, 1]), item(&[9], &[]), item(&[4], &[3, 1])];
        let batch = seq2seq_batch(&items, &[0, 2], 0, 99);
        assert_eq!(batch.input.ids, [5, 6, 4, 99]);
        assert_eq!(batch.input.mask, [1, 1, 1, 0]);
        assert_eq!(batch.decoder.ids, [0, 7, 8, 0, 3, 99]);
        assert_eq!(batch.decoder.mask, [1, 1, 1, 1, 1, 0]);
        assert_eq!(batch.targets, [7, 8, 1, 3, 1, IGNORED]);
        let empty = seq2seq_batch(&items, &[1], 0, 99);
        assert_eq!((empty.decoder.ids, empty.targets), (vec![0], vec![IGNORED]));
    }

    #[test]
    fn prompts_and_completions_are_read() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/t5");
        let tokenizer = TextTokenizer::load(&model).expect("is committed");
        let path = folder.path().join("pairs.jsonl");
        let write = |text: &str| std::fs::write(&path, text).expect("writes");
        write("{\"prompt\": \"w1 w2\", \"completion\": \"w3\"}\n");
        let id = |word| tokenizer.id_of(word).expect("is a word");
        let items = read_seq2seq(&path, &tokenizer, 16).expect("is whole");
        let [begin, end] = ["[CLS]", "[SEP]"].map(id);
        let expected = Seq2SeqItem {
            input: vec![begin, id("w1"), id("w2"), end],
            target: vec![begin, id("w3"), end],
        };
        assert_eq!(items, [expected]);
        let cut = read_seq2seq(&path, &tokenizer, 3).expect("is whole");
        assert_eq!(cut[0].input, [begin, id("w1"), end]);
        write("{\"prompt\": \"w1\"}\n");
        let said = read_seq2seq(&path, &tokenizer, 16).expect_err("lacks one").to_string();
        assert!(said.contains("completion"), "{said}");
    }
}
