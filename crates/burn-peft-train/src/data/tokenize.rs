//! Text to token ids and back, by the model's own `tokenizer.json`.

use super::{ChatTemplate, DataError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::{EncodeInput, PostProcessor, Tokenizer, TruncationParams};

/// A model's tokenizer with what its folder says about special tokens and chats.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
    /// Fills rows of a batch: the pad token, else the end token, else 0.
    pub pad: u32,
    /// Ends a text, if the model has such a token.
    pub eos: Option<u32>,
    /// The model's chat template, or why there is none to use.
    template: Result<ChatTemplate, String>,
}

/// One text as the model reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// 0 for the first text, 1 for the second.
    pub type_ids: Vec<u32>,
}

fn read_json(path: &Path) -> Result<Option<Value>, DataError> {
    match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(DataError::io(path, e)),
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| DataError::file(path, format!("is not JSON: {e}"))),
    }
}

/// A special token is a string or an object with its `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}

fn template_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default =
                named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first())?.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

impl TextTokenizer {
    /// Reads a model's folder.
    ///
    /// # Errors
    /// No `tokenizer.json`, or one that is broken.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let reason = "is missing; expected the tokenizer of the model beside its weights";
            return Err(DataError::file(&path, reason));
        }
        let mut inner = Tokenizer::from_file(&path)
            .map_err(|e| DataError::file(&path, format!("is not a tokenizer: {e}")))?;
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let special = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        let special =
            |name: &str| token_text(config.get(name)).or_else(|| token_text(special.get(name)));
        let id = |text: &Option<String>| text.as_deref().and_then(|t| inner.token_to_id(t));
        let (bos, eos, pad) = (special("bos_token"), special("eos_token"), special("pad_token"));
        let (eos_id, pad_id) = (id(&eos), id(&pad).or_else(|| inner.token_to_id("[PAD]")));
        let jinja = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let template = match jinja.or_else(|| template_text(config.get("chat_template"))) {
            Some(source) => {
                let (bos, eos) = (bos.unwrap_or_default(), eos.unwrap_or_default());
                ChatTemplate::new(&source, &bos, &eos)
            }
            None => Err("the model has no chat template".to_owned()),
        };
        let template = template.map_err(|e| format!("{}: {e}", folder.display()));
        Ok(Self { inner, path, pad: pad_id.or(eos_id).unwrap_or(0), eos: eos_id, template })
    }

    /// The model's chat template; it is in nobody's way who does not chat.
    ///
    /// # Errors
    /// A sentence: there is none, or it does not parse.
    pub fn template(&self) -> Result<&ChatTemplate, String> {
        self.template.as_ref().map_err(Clone::clone)
    }

    /// Number of tokens it knows.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    fn failed(&self, e: &tokenizers::Error) -> DataError {
        DataError::file(&self.path, format!("cannot encode: {e}"))
    }

    fn encode_all<'t>(
        &self,
        tokenizer: &Tokenizer,
        inputs: Vec<EncodeInput<'t>>,
        special: bool,
    ) -> Result<Vec<Encoded>, DataError> {
        let encodings = tokenizer.encode_batch(inputs, special).map_err(|e| self.failed(&e))?;
        let whole = |e: tokenizers::Encoding| Encoded {
            ids: e.get_ids().to_vec(),
            type_ids: e.get_type_ids().to_vec(),
        };
        Ok(encodings.into_iter().map(whole).collect())
    }

    /// Encodes texts or pairs with the model's special tokens, on all cores, cut to `max_length`
    /// (special tokens stay).
    ///
    /// # Errors
    /// What the tokenizer refuses, such as a length too small for its special tokens.
    pub fn encode(
        &self,
        texts: &[(&str, Option<&str>)],
        max_length: usize,
    ) -> Result<Vec<Encoded>, DataError> {
        let pairs = texts.iter().any(|(_, pair)| pair.is_some());
        let special = self.inner.get_post_processor().map_or(0, |added| added.added_tokens(pairs));
        if max_length <= special {
            let reason = format!(
                "max_length: expected more than the {special} special tokens that it adds, \
                 found {max_length}"
            );
            return Err(DataError::file(&self.path, reason));
        }
        let mut cutting = self.inner.clone();
        let truncation = TruncationParams { max_length, ..TruncationParams::default() };
        cutting.with_truncation(Some(truncation)).map_err(|e| self.failed(&e))?;
        let inputs = texts.iter().map(|(text, pair)| match pair {
            Some(pair) => EncodeInput::from((*text, *pair)),
            None => EncodeInput::from(*text),
        });
        self.encode_all(&cutting, inputs.collect(), true)
    }

    /// Encodes whole texts, with the tokens that the tokenizer adds by itself if `special`.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub fn encode_whole(&self, texts: &[&str], special: bool) -> Result<Vec<Vec<u32>>, DataError> {
        let inputs = texts.iter().map(|text| EncodeInput::from(*text)).collect();
        let encoded = self.encode_all(&self.inner, inputs, special)?;
        Ok(encoded.into_iter().map(|text| text.ids).collect())
    }

    /// The text of token ids, without special tokens.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.inner.decode(ids, true).map_err(|e| self.failed(&e))
    }

    /// Whether an id is one that [`Self::decode`] leaves out.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}
