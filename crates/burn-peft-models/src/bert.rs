//! BERT (arXiv 1810.04805), laid out as in `transformers`.
// Fields are named as in the checkpoint, where this one is in capitals.
#![allow(non_snake_case)]

use crate::activation::Activation;
use crate::attention::{first_of_rows, mix, padding_mask, split_heads, through};
use crate::load::{Beside, Pretrained, config_of, linear, plausible, table};
use crate::masked::{Transform, mask_word, one_mask};
use crate::ragged::Ragged;
use crate::{Classes, Classifier, Tokens};
use burn::module::Module;
use burn::nn::{Embedding, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, Front, Hidden, HiddenPlace, MaskPlace, Scope, Whole};
use serde::Deserialize;
use std::path::Path;

/// The fields of `config.json` that shape the model, with `transformers`' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct BertConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: String,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub initializer_range: f64,
    pub position_embedding_type: Option<String>,
    #[serde(flatten)]
    pub classes: Classes,
    /// Number of the `[MASK]`, by the tokenizer's files beside `config.json`.
    #[serde(skip)]
    pub mask_word: Option<usize>,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            position_embedding_type: None,
            classes: Classes::default(),
            mask_word: None,
        }
    }
}

impl BertConfig {
    fn check(&self) -> Result<(), Error> {
        plausible(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
            ("num_labels", self.classes.count()),
        ])?;
        if let Some(other) = self.position_embedding_type.as_deref().filter(|t| *t != "absolute") {
            let reason = format!("`{other}` is not implemented; expected absolute");
            return Err(Error::config("position_embedding_type", reason));
        }
        if self.num_attention_heads == 0
            || !self.hidden_size.is_multiple_of(self.num_attention_heads)
        {
            let found =
                format!("{} does not divide by {}", self.hidden_size, self.num_attention_heads);
            return Err(Error::config("hidden_size", format!("{found}, the num_attention_heads")));
        }
        Activation::of(&self.hidden_act).map(drop)
    }
}

/// Words, positions and sentence numbers, summed and normalised.
#[derive(Module, Debug)]
pub(crate) struct BertEmbeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    LayerNorm: LayerNorm,
    #[module(skip)]
    epsilon: f64,
    place: HiddenPlace,
    mask: MaskPlace,
}

/// Queries, keys and values.
#[derive(Module, Debug)]
pub(crate) struct BertSelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    #[module(skip)]
    heads: usize,
}

/// A projection, the residual, and a norm.
#[derive(Module, Debug)]
pub(crate) struct BertOutput {
    dense: Linear,
    LayerNorm: LayerNorm,
    #[module(skip)]
    epsilon: f64,
    place: HiddenPlace,
}

/// Self-attention with its output.
#[derive(Module, Debug)]
pub(crate) struct BertAttention {
    self_: BertSelfAttention,
    output: BertOutput,
}

/// A projection alone.
#[derive(Module, Debug)]
pub(crate) struct BertDense {
    dense: Linear,
}

/// One block.
#[derive(Module, Debug)]
pub(crate) struct BertLayer {
    attention: BertAttention,
    intermediate: BertDense,
    output: BertOutput,
    place: HiddenPlace,
    #[module(skip)]
    activation: Activation,
}

/// The blocks.
#[derive(Module, Debug)]
pub(crate) struct BertEncoder {
    layer: Vec<BertLayer>,
}

/// The encoder with its embeddings and its pooler.
#[derive(Module, Debug)]
pub struct BertModel {
    embeddings: BertEmbeddings,
    encoder: BertEncoder,
    pooler: BertDense,
}

/// Where words are embedded, below a classifier.
const WORDS: &str = "bert.embeddings.word_embeddings";

/// BERT with a classifier on the pooled first token.
///
/// The frozen base runs without its own dropout, in training too: only adapters drop.
#[derive(Module, Debug)]
pub struct BertForSequenceClassification {
    bert: BertModel,
    classifier: Linear,
    #[module(skip)]
    limits: Limits,
    /// Of the masked language model that the encoder was, where the checkpoint has it.
    #[module(skip)]
    transform: Option<Transform>,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    vocab: usize,
    positions: usize,
    types: usize,
}

impl BertOutput {
    fn init(fan_in: usize, config: &BertConfig, device: &Device) -> Self {
        Self {
            dense: linear(fan_in, config.hidden_size, true, device),
            LayerNorm: norm(config, device),
            epsilon: config.layer_norm_eps,
            place: HiddenPlace::new(config.hidden_size),
        }
    }

    /// The end of a sublayer that read `residual`.
    fn forward(&self, x: Tensor<3>, residual: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let y = cx.at("dense").linear(&self.dense, x);
        let y = cx.hidden(Hidden::sublayer(&residual, y).before(&self.LayerNorm));
        cx.at("LayerNorm").layer_norm_of_sum(&self.LayerNorm, self.epsilon, y, residual)
    }
}

fn norm(config: &BertConfig, device: &Device) -> LayerNorm {
    LayerNormConfig::new(config.hidden_size).with_epsilon(config.layer_norm_eps).init(device)
}

impl BertLayer {
    /// `x [batch, seq, hidden]`, or `[1, tokens, hidden]` of a batch without its padding. Keys and values are those of the
    /// `whole` where there is one; without padding, `x` is the first token of each row then.
    fn forward(
        &self,
        x: Tensor<3>,
        whole: Option<&Whole<'_>>,
        mask: Option<Tensor<4>>,
        ragged: Option<&Ragged>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let (own, at) = (&self.attention.self_, cx.at("attention.self"));
        let (all, there) = match whole {
            Some(whole) => (whole.x.clone(), whole.cx.at("attention.self")),
            None => (x.clone(), at.clone()),
        };
        let q = at.at("query").linear(&own.query, x.clone()); // [b, s, h]
        let k = there.at("key").linear(&own.key, all.clone());
        let v = there.at("value").linear(&own.value, all.clone());
        let [q, k, v] = [q, k, v].map(|part| split_heads(part, own.heads)); // [b, n, s, d]
        let read = q.clone();
        let mixed = match ragged {
            Some(ragged) => ragged.mix(q, k, v, whole.is_some()),
            None => mix(&at, q, [k, v], mask, there.prefix(&all)),
        };
        let mixed = at.attention(&x, &read, &own.key, &own.value, mixed);
        let h = self.attention.output.forward(mixed, x.clone(), &cx.at("attention.output"));
        let wide = cx.at("intermediate.dense").linear(&self.intermediate.dense, h.clone());
        let y = self.output.forward(self.activation.apply(wide), h, &cx.at("output"));
        cx.hidden(Hidden::block(x, y))
    }
}

impl BertModel {
    fn init(config: &BertConfig, device: &Device) -> Result<Self, Error> {
        config.check()?;
        let h = config.hidden_size;
        let layer = |_| -> Result<BertLayer, Error> {
            Ok(BertLayer {
                attention: BertAttention {
                    self_: BertSelfAttention {
                        query: linear(h, h, true, device),
                        key: linear(h, h, true, device),
                        value: linear(h, h, true, device),
                        heads: config.num_attention_heads,
                    },
                    output: BertOutput::init(h, config, device),
                },
                intermediate: BertDense {
                    dense: linear(h, config.intermediate_size, true, device),
                },
                output: BertOutput::init(config.intermediate_size, config, device),
                place: HiddenPlace::new(h),
                activation: Activation::of(&config.hidden_act)?,
            })
        };
        Ok(Self {
            embeddings: BertEmbeddings {
                word_embeddings: table(config.vocab_size, h, device),
                position_embeddings: table(config.max_position_embeddings, h, device),
                token_type_embeddings: table(config.type_vocab_size, h, device),
                LayerNorm: norm(config, device),
                epsilon: config.layer_norm_eps,
                place: HiddenPlace::new(h),
                mask: MaskPlace { word: config.mask_word, missing: Transform::tensors() },
            },
            encoder: BertEncoder {
                layer: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            },
            pooler: BertDense { dense: linear(h, h, true, device) },
        })
    }

    fn device(&self) -> Device {
        self.embeddings.word_embeddings.weight.device()
    }

    /// Keys and values in front of the first block's, by which all positions move, as in `transformers`.
    fn prefix(cx: &Scope<'_>) -> usize {
        cx.at("encoder").block("layer", 0).at("attention.self").virtual_tokens()
    }

    /// Positions that are taken by what stands in front of a sequence.
    fn virtual_tokens(cx: &Scope<'_>) -> usize {
        cx.at("embeddings.word_embeddings").virtual_tokens() + Self::prefix(cx)
    }

    /// Hidden states of the last block, `[batch, n + seq, hidden]`, where the first `n` are those of virtual
    /// tokens that a prompt sets in front. What stands at padding has no meaning.
    pub fn forward(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<3> {
        self.states(tokens, cx, false)
    }

    /// The same, or where only the first token of each row is `read`, `[batch, 1, hidden]` of these where nothing that lies
    /// over the model asks for more.
    fn states(&self, tokens: &Tokens, cx: &Scope<'_>, read: bool) -> Tensor<3> {
        let device = self.device();
        let (parts, at) = (&self.embeddings, cx.at("embeddings"));
        let ids = |values: &[i32]| tokens.tensor(values, &device);
        let words = at.at("word_embeddings");
        let mut embedded = words.embedding(&parts.word_embeddings, ids(&tokens.ids));
        embedded = words.positional(embedded, || ids(&tokens.positions(0..0, 0, 0)));
        let mut front = Vec::new();
        if let Some(Front { parts: [prompt], scores }) =
            words.prompt(&embedded, || tokens.seen(0, &[], None, &device))
        {
            embedded = Tensor::cat(vec![prompt, embedded], 1);
            front = scores;
        }
        let (n, first) = (front.len(), Self::prefix(cx));
        let positions = tokens.positions(first..first + n, first + n, first + n);
        let zeros = || vec![0; tokens.ids.len()];
        let types = tokens.behind(n, 0, &tokens.type_ids.clone().unwrap_or_else(zeros));
        let types =
            at.at("token_type_embeddings").embedding(&parts.token_type_embeddings, ids(&types));
        let places =
            at.at("position_embeddings").embedding(&parts.position_embeddings, ids(&positions));
        let sum = embedded + types + places;
        let mask = padding_mask(&tokens.mask, &front, [tokens.batch, tokens.seq], &device);
        let reading = cx.reading(tokens.seen(n, &[], mask.clone(), &device));
        let at = reading.at("embeddings");
        let y = at.at("LayerNorm").layer_norm(&parts.LayerNorm, parts.epsilon, sum.clone());
        let x = at.hidden(Hidden::block(sum, y));
        // What goes token by token asks for no ids, and these would lie as the padded batch does.
        let ragged = Ragged::of(&tokens.mask, [tokens.batch, tokens.seq], cx, &device);
        let (x, cx) = match &ragged {
            Some(ragged) => (ragged.pack(x), cx),
            None => (x, &reading),
        };
        let (mask, rows) = (mask.as_ref(), ragged.clone());
        let layer = move |layer: &BertLayer, x, whole: Option<&Whole<'_>>, mask, cx: &Scope<'_>| {
            layer.forward(x, whole, mask, rows.as_ref(), cx)
        };
        let first = match &ragged {
            _ if !read || !cx.by_token() || self.encoder.layer.is_empty() => None,
            Some(ragged) => Some(ragged.first_of_rows()),
            None => Some(first_of_rows([tokens.batch, tokens.seq], &device)),
        };
        let read = first.is_some();
        let y = through(&self.encoder.layer, x, mask, first, &cx.at("encoder"), layer);
        match &ragged {
            Some(_) if read => y.swap_dims(0, 1),
            Some(ragged) => ragged.unpack(y),
            None => y,
        }
    }

    /// `tanh` of a projection of the first token, `[batch, hidden]`: of the first virtual one where a prompt
    /// stands in front, as HF PEFT has it.
    pub fn pooled(&self, hidden: Tensor<3>, cx: &Scope<'_>) -> Tensor<2> {
        let [batch, _, width] = hidden.dims();
        let first = hidden.slice([0..batch, 0..1]).reshape([batch, width]);
        cx.at("pooler.dense").linear(&self.pooler.dense, first).tanh()
    }

    /// Sentence embeddings `[batch, hidden]`: the mean over all tokens that are no padding, with
    /// length 1, as the sentence-transformers models built on BERT make them.
    pub fn embed(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<2> {
        let hidden = self.forward(tokens, cx); // [b, n + s, h]
        let [batch, all, width] = hidden.dims();
        let seq = tokens.seq;
        let hidden = hidden.narrow(1, all - seq, seq);
        let kept: Vec<f32> = tokens.mask.iter().map(|&kept| kept as f32).collect();
        let kept = Tensor::<3>::from_data(TensorData::new(kept, [batch, seq, 1]), &self.device());
        let mean = (hidden * kept.clone()).sum_dim(1) / kept.sum_dim(1).clamp_min(1e-9);
        let mean: Tensor<2> = mean.reshape([batch, width]);
        let length = mean.clone().square().sum_dim(1).sqrt().clamp_min(1e-12);
        mean / length
    }
}

impl BertForSequenceClassification {
    /// Number of tokens it knows.
    pub fn vocab(&self) -> usize {
        self.limits.vocab
    }

    /// The encoder below the classifier.
    pub fn encoder(&self) -> &BertModel {
        &self.bert
    }

    /// Number of classes.
    pub fn labels(&self) -> usize {
        self.classifier.weight.shape().dims::<2>()[1]
    }

    /// Refuses what a forward pass with what `cx` lays over it could not take; see [`Tokens::check`].
    ///
    /// # Errors
    /// As [`Tokens::check`]; more than one `[MASK]` in front to read the class at, or one whose state is to go through a
    /// transform that the checkpoint lacks.
    pub fn check(&self, tokens: &Tokens, cx: &Scope<'_>) -> Result<(), Error> {
        one_mask(&cx.at(WORDS), self.transform.is_some())?;
        let front = BertModel::virtual_tokens(&cx.at("bert"));
        tokens.check(self.limits.vocab, self.limits.positions, front)?;
        let types = self.limits.types;
        match tokens.type_ids.iter().flatten().find(|&&id| id < 0 || id as usize >= types) {
            None => Ok(()),
            Some(id) => {
                let reason = format!("expected numbers below {types}, found {id}");
                Err(Error::config("token_type_ids", reason))
            }
        }
    }

    /// Logits `[batch, labels]`. The output layer reads the pooled first token, or the state at a `[MASK]` that stands in
    /// front.
    pub fn forward(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<2> {
        let at = cx.at("bert");
        let read = match cx.at(WORDS).masks().first() {
            None => self.bert.pooled(self.bert.states(tokens, &at, true), &at),
            Some(mask) => {
                let state = self.bert.forward(tokens, &at).narrow(1, mask.column, 1); // [b, 1, h]
                let state = match self.transform.as_ref().filter(|_| mask.transform) {
                    Some(transform) => transform.forward(state),
                    None => state,
                };
                state.squeeze_dim(1)
            }
        };
        cx.at("classifier").linear(&self.classifier, read)
    }
}

impl Pretrained for BertForSequenceClassification {
    type Config = BertConfig;
    const MODEL_TYPE: &'static str = "bert";
    const OUTPUT: &'static str = "classifier";
    const PREFIX: &'static str = "bert.";
    /// A checkpoint of the bare encoder has no classifier, and some have no pooler.
    const MAY_BE_FRESH: &'static [&'static str] = &["classifier.", "bert.pooler."];
    const IGNORED: &'static [&'static str] = &["embeddings.position_ids", "cls."];

    fn init(config: &BertConfig, device: &Device) -> Result<Self, Error> {
        Ok(Self {
            bert: BertModel::init(config, device)?,
            classifier: linear(config.hidden_size, config.classes.count(), true, device),
            limits: Limits {
                vocab: config.vocab_size,
                positions: config.max_position_embeddings,
                types: config.type_vocab_size,
            },
            transform: None,
        })
    }

    fn read_config(folder: &Path) -> Result<BertConfig, Error> {
        Ok(BertConfig { mask_word: mask_word(folder)?, ..config_of::<Self>(folder)? })
    }

    fn beside(&mut self, config: &BertConfig, from: &mut Beside<'_>) -> Result<(), Error> {
        let transform = Transform {
            dense: linear(config.hidden_size, config.hidden_size, true, from.device()),
            LayerNorm: norm(config, from.device()),
            epsilon: config.layer_norm_eps,
            activation: Activation::of(&config.hidden_act)?,
        };
        match from.read(Transform::PATH, transform)? {
            Ok(transform) => {
                self.transform = Some(transform);
                self.bert.embeddings.mask.missing.clear();
            }
            Err(missing) => self.bert.embeddings.mask.missing = missing,
        }
        Ok(())
    }

    fn initializer_range(config: &BertConfig) -> f64 {
        config.initializer_range
    }
}

impl Classifier for BertForSequenceClassification {
    type Input = Tokens;
    const ARCHITECTURE: &'static str = "BertForSequenceClassification";

    fn classes(config: &BertConfig) -> &Classes {
        &config.classes
    }

    fn classes_mut(config: &mut BertConfig) -> &mut Classes {
        &mut config.classes
    }

    fn check(&self, tokens: &Tokens, cx: &Scope<'_>) -> Result<(), Error> {
        self.check(tokens, cx)
    }

    fn forward(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<2> {
        self.forward(tokens, cx)
    }
}
