//! What is left of a masked language model under a classifier: its `[MASK]`, and the transform of the states that its output
//! layer read.
// Fields are named as in the checkpoint, where this one is in capitals.
#![allow(non_snake_case)]

use crate::activation::Activation;
use burn::module::Module;
use burn::nn::{LayerNorm, Linear};
use burn::tensor::Tensor;
use burn_peft_core::{Error, Scope};
use serde_json::Value;
use std::path::Path;

/// `LayerNorm(activation(x·W + b))`, frozen.
#[derive(Module, Debug)]
pub(crate) struct Transform {
    pub(crate) dense: Linear,
    pub(crate) LayerNorm: LayerNorm,
    #[module(skip)]
    pub(crate) epsilon: f64,
    #[module(skip)]
    pub(crate) activation: Activation,
}

impl Transform {
    /// Where `transformers` has it in a checkpoint.
    pub(crate) const PATH: &'static str = "cls.predictions.transform";

    /// The tensors that it is made of.
    pub(crate) fn tensors() -> Vec<String> {
        let names = ["dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"];
        names.map(|name| format!("{}.{name}", Self::PATH)).into()
    }

    /// `[batch, seq, hidden]`, each token by itself. No adapter lies over it: it is no place.
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let cx = Scope::plain();
        let x = self.activation.apply(cx.linear(&self.dense, x));
        cx.layer_norm(&self.LayerNorm, self.epsilon, x)
    }
}

/// Refuses more than one `[MASK]` in front of the words at `cx`, and one whose state is to go through a transform that the
/// model does not have.
///
/// # Errors
/// How many there are, or that it is missing.
pub(crate) fn one_mask(cx: &Scope<'_>, has_transform: bool) -> Result<(), Error> {
    let masks = cx.masks();
    if masks.len() > 1 {
        let reason = format!(
            "expected one [MASK] in front at which the class is read, found {}; lay one adapter that brings one over \
             the model at a time",
            masks.len()
        );
        return Err(Error::place(cx.path(), reason));
    }
    if !has_transform && masks.iter().any(|mask| mask.transform) {
        let reason = "expected the transform of a masked language model for the state at a [MASK], found a checkpoint \
                      without; load a BertForMaskedLM";
        return Err(Error::place(Transform::PATH, reason));
    }
    Ok(())
}

/// A file of JSON, if it is there.
fn json(folder: &Path, name: &str) -> Result<Option<Value>, Error> {
    let path = folder.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    match serde_json::from_str(&text) {
        Ok(value) => Ok(Some(value)),
        Err(e) => Err(Error::format(path, format!("is not JSON: {e}"))),
    }
}

/// The number of the `[MASK]` by the tokenizer's files in a folder: what `tokenizer_config.json` or
/// `special_tokens_map.json` call `mask_token`, or "`[MASK]`", as BERT's tokenizer does, in `tokenizer.json` or `vocab.txt`.
/// `None` where these name none.
///
/// # Errors
/// A file that cannot be read, or is no JSON.
pub(crate) fn mask_word(folder: &Path) -> Result<Option<usize>, Error> {
    let mut named = None;
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let said = json(folder, file)?;
        let token = said.as_ref().and_then(|said| said.get("mask_token"));
        // An added token is an object with its text.
        let text = token.and_then(|token| token.get("content").unwrap_or(token).as_str());
        named = named.or(text.map(str::to_owned));
    }
    let name = named.as_deref().unwrap_or("[MASK]");
    let number = |id: &Value| usize::try_from(id.as_u64()?).ok();
    if let Some(tokenizer) = json(folder, "tokenizer.json")? {
        let added = tokenizer.get("added_tokens").and_then(Value::as_array);
        let added = added.into_iter().flatten();
        let called = |token: &&Value| token.get("content").and_then(Value::as_str) == Some(name);
        let added = added.clone().find(called).and_then(|token| token.get("id"));
        let vocabulary = tokenizer.get("model").and_then(|model| model.get("vocab"));
        let known = vocabulary.and_then(|words| words.get(name));
        return Ok(added.or(known).and_then(number));
    }
    let path = folder.join("vocab.txt");
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    Ok(text.lines().position(|word| word.trim_end() == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_found_in_each_of_the_files() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).expect("is writable");
        };
        let found = || mask_word(folder.path()).expect("is readable");
        assert_eq!(found(), None);
        write("vocab.txt", "[PAD]\n[MASK]\n<m>\n");
        assert_eq!(found(), Some(1));
        write("special_tokens_map.json", r#"{"mask_token": {"content": "<m>", "lstrip": true}}"#);
        assert_eq!(found(), Some(2));
        write("tokenizer_config.json", r#"{"mask_token": "[M]"}"#);
        assert_eq!(found(), None);
        write(
            "tokenizer.json",
            r#"{"added_tokens": [], "model": {"vocab": {"[M]": 7, "<m>": 8}}}"#,
        );
        assert_eq!(found(), Some(7));
        write(
            "tokenizer.json",
            r#"{"added_tokens": [{"id": 9, "content": "[M]"}], "model": {"vocab": {"a": 7}}}"#,
        );
        assert_eq!(found(), Some(9));
        write("tokenizer.json", "{");
        let said = mask_word(folder.path()).expect_err("is no JSON").to_string();
        assert!(said.contains("tokenizer.json"), "{said}");
    }
}
