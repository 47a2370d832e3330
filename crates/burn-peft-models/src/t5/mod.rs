//! T5 (arXiv 1910.10683), versions 1.0 and 1.1, laid out as in `transformers`.

mod config;
mod layers;
mod relative;

pub use config::T5Config;

use crate::attention::{causal_mask, padding_mask};
use crate::load::{Pretrained, config_of, linear, table, weight_files};
use crate::output::Output;
use crate::{KvCache, Tokens};
use burn::module::Module;
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::{Device, Int, Tensor};
use burn_peft_core::{Error, Front, Hidden, HiddenPlace, Scope, SeenTokens, TensorFile};
use layers::{T5Cross, T5Dense, T5Self, norm};
use relative::{Distances, Relative};
use std::path::Path;

/// One block of the encoder.
#[derive(Module, Debug)]
pub(crate) struct T5EncoderBlock {
    layer: (T5Self, T5Dense),
    place: HiddenPlace,
}

/// One block of the decoder.
#[derive(Module, Debug)]
pub(crate) struct T5DecoderBlock {
    layer: (T5Self, T5Cross, T5Dense),
    place: HiddenPlace,
}

/// The encoder.
#[derive(Module, Debug)]
pub(crate) struct T5Encoder {
    block: Vec<T5EncoderBlock>,
    final_layer_norm: RmsNorm,
}

/// The decoder.
#[derive(Module, Debug)]
pub(crate) struct T5Decoder {
    block: Vec<T5DecoderBlock>,
    final_layer_norm: RmsNorm,
}

/// T5 with an output over the vocabulary: a layer of its own, or the embedding once more.
///
/// Encoder and decoder share the embedding; a prompt stands in front of the encoder's tokens alone
/// (arXiv 2104.08691). The frozen base runs without its own dropout, in training too: only adapters drop.
#[derive(Module, Debug)]
pub struct T5ForConditionalGeneration {
    shared: Embedding,
    encoder: T5Encoder,
    decoder: T5Decoder,
    lm_head: Option<Linear>,
    #[module(skip)]
    facts: Facts,
}

#[derive(Debug, Clone, Copy)]
struct Facts {
    vocab: usize,
    start: u32,
    scaled: bool,
    distances: [Distances; 2],
}

/// What the encoder made of its tokens.
#[derive(Debug, Clone)]
pub struct EncoderOutput {
    /// States after the last norm, `[batch, n + seq, d_model]`, where the first `n` are those of virtual tokens.
    pub states: Tensor<3>,
    /// The tokens that they are the states of; its `scores` hide padding, from the decoder too.
    pub tokens: SeenTokens,
}

impl T5EncoderBlock {
    /// As block number `index` of the encoder at `cx`.
    fn forward(
        &self,
        index: usize,
        read: Tensor<3>,
        mask: Option<Tensor<4>>,
        relative: Option<&Relative>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let (at, relative) = (cx.block("block", index), relative.map(|relative| (relative, cx)));
        let x = self.layer.0.forward(read.clone(), mask, relative, None, &at.block("layer", 0));
        let x = self.layer.1.forward(x, &at.block("layer", 1));
        at.hidden(Hidden::block(read, x))
    }
}

impl T5DecoderBlock {
    /// As block number `index` of the decoder at `cx`.
    fn forward(
        &self,
        index: usize,
        read: Tensor<3>,
        (mask, relative): (Option<Tensor<4>>, Option<&Relative>),
        encoded: &EncoderOutput,
        mut cache: Option<&mut KvCache>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let (at, relative) = (cx.block("block", index), relative.map(|relative| (relative, cx)));
        let own = cache.as_deref_mut().map(|cache| (cache, index));
        let x = self.layer.0.forward(read.clone(), mask, relative, own, &at.block("layer", 0));
        let own = cache.map(|cache| (cache, index));
        let x = self.layer.1.forward(x, encoded, own, &at.block("layer", 1));
        let x = self.layer.2.forward(x, &at.block("layer", 2));
        at.hidden(Hidden::block(read, x))
    }
}

impl T5ForConditionalGeneration {
    /// What the decoder begins with.
    pub fn start(&self) -> u32 {
        self.facts.start
    }

    /// Number of tokens it knows.
    pub fn vocab(&self) -> usize {
        self.facts.vocab
    }

    /// The same function with an output layer of its own where the embedding served as one; see
    /// [`LlamaForCausalLM::untied`](crate::LlamaForCausalLM::untied).
    pub fn untied(mut self) -> Self {
        let table = self.shared.weight.val(); // [vocab, d_model]
        let weight = || burn::module::Param::from_tensor(table.transpose());
        self.lm_head = self.lm_head.or_else(|| Some(Linear { weight: weight(), bias: None }));
        self
    }

    /// Refuses tokens, of the encoder or of the decoder, that a forward pass could not take. Positions are
    /// distances, so that no row is too long.
    ///
    /// # Errors
    /// As [`Tokens::check`]; several documents in a row; or an adapter in front of blocks, which T5 would not ask.
    pub fn check(&self, tokens: &Tokens, cx: &Scope<'_>) -> Result<(), Error> {
        for stack in ["encoder.block", "decoder.block"] {
            if !cx.at(stack).is_bare() {
                let reason = "T5 has no place for tokens in front of its blocks: prompt tuning and prefixes have";
                return Err(Error::place(stack, reason));
            }
        }
        for (name, part) in [("position_ids", &tokens.positions), ("segments", &tokens.segments)] {
            if part.is_some() {
                let reason = "expected none: T5 counts distances, in rows of one document each";
                return Err(Error::config(name, reason));
            }
        }
        tokens.check(self.facts.vocab, usize::MAX, 0)
    }

    /// Runs the encoder.
    pub fn encode(&self, tokens: &Tokens, cx: &Scope<'_>) -> EncoderOutput {
        let device = self.shared.weight.device();
        let (words, ids) = (cx.at("shared"), tokens.tensor(&tokens.ids, &device));
        let mut x = words.embedding(&self.shared, ids);
        x = words.positional(x, || tokens.tensor(&tokens.positions(0..0, 0, 0), &device));
        let mut front = Vec::new();
        if let Some(Front { parts: [prompt], scores }) =
            words.prompt(&x, || tokens.seen(0, &[], None, &device))
        {
            (x, front) = (Tensor::cat(vec![prompt, x], 1), scores);
        }
        let [batch, rows, _] = x.dims();
        let mask = padding_mask(&tokens.mask, &front, [batch, tokens.seq], &device);
        let seen = tokens.seen(front.len(), &[], mask.clone(), &device);
        let cx = &cx.reading(seen.clone()).at("encoder");
        let relative =
            self.encoder.block.first().and_then(|block| {
                block.layer.0.relative(self.facts.distances[0], [rows, rows], cx)
            });
        assert!(
            cx.at("block").is_bare(),
            "T5 sets nothing in front of its blocks: `check` says so"
        );
        for (index, block) in self.encoder.block.iter().enumerate() {
            let (block, mask, relative) = (block.clone(), mask.clone(), relative.clone());
            let run = move |[x]: [Tensor<3>; 1], cx: &Scope<'_>| {
                block.forward(index, x, mask.clone(), relative.as_ref(), cx)
            };
            x = cx.run([x], run);
        }
        // All blocks of the decoder read them, so that a block gives them on.
        let norm = self.encoder.final_layer_norm.clone();
        let run =
            move |[x]: [Tensor<3>; 1], cx: &Scope<'_>| cx.at("final_layer_norm").rms_norm(&norm, x);
        EncoderOutput { states: cx.run([x], run), tokens: seen }
    }

    /// Hidden states of the decoder after its last norm, `[batch, seq, d_model]`: what [`Self::logits`] reads. With a
    /// cache, `tokens` are those that follow what the cache holds, over the same encoder's output.
    pub fn hidden(
        &self,
        tokens: &Tokens,
        encoded: &EncoderOutput,
        cx: &Scope<'_>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let device = self.shared.weight.device();
        let mut x = cx.at("shared").embedding(&self.shared, tokens.tensor(&tokens.ids, &device));
        let scores = KvCache::scores_with(cache.as_deref(), tokens, &[]);
        let total = scores.first().map_or(0, Vec::len);
        let mask = causal_mask(&scores, tokens.seq, None, &device);
        let held = cache.as_ref().map_or(&[][..], |cache| cache.ids.as_slice());
        let cx = &cx.reading(tokens.seen(0, held, mask.clone(), &device)).at("decoder");
        let size = [tokens.seq, total];
        let relative = self
            .decoder
            .block
            .first()
            .and_then(|block| block.layer.0.relative(self.facts.distances[1], size, cx));
        assert!(
            cx.at("block").is_bare(),
            "T5 sets nothing in front of its blocks: `check` says so"
        );
        for (index, block) in self.decoder.block.iter().enumerate() {
            let (mask, relative) = (mask.clone(), relative.clone());
            if let Some(cache) = cache.as_deref_mut() {
                x = block.forward(index, x, (mask, relative.as_ref()), encoded, Some(cache), cx);
                continue;
            }
            let (block, tokens) = (block.clone(), encoded.tokens.clone());
            let run = move |[x, states]: [Tensor<3>; 2], cx: &Scope<'_>| {
                let encoded = EncoderOutput { states, tokens: tokens.clone() };
                block.forward(index, x, (mask.clone(), relative.as_ref()), &encoded, None, cx)
            };
            x = cx.run([x, encoded.states.clone()], run);
        }
        if let Some(cache) = cache {
            cache.hold(scores, &tokens.ids);
        }
        cx.at("final_layer_norm").rms_norm(&self.decoder.final_layer_norm, x)
    }

    fn output(&self) -> Output<'_> {
        Output { head: self.lm_head.as_ref(), table: &self.shared }
    }

    /// What the output layer reads: a tied one asks for states that are divided by `√d_model`.
    fn scaled<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        let width = hidden.dims()[D - 1] as f64;
        if self.facts.scaled { hidden * width.powf(-0.5) } else { hidden }
    }

    /// Logits of hidden states: `[batch, seq, d_model]` → `[batch, seq, vocab]`.
    pub fn logits(&self, hidden: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        self.output().logits(self.scaled(hidden), cx)
    }

    /// Cross-entropy of the logits of hidden states `[n, d_model]` with a token each: the sum, and how many have it
    /// on top. The logits are not kept, unless something lies over the output layer.
    pub fn cross_entropy(
        &self,
        hidden: Tensor<2>,
        targets: Vec<i32>,
        cx: &Scope<'_>,
    ) -> (Tensor<1>, Tensor<1, Int>) {
        self.output().cross_entropy(self.scaled(hidden), targets, cx)
    }

    /// Logits `[batch, decoder's seq, vocab]`: the encoder reads `tokens`, and the decoder what was written so far.
    pub fn forward(&self, tokens: &Tokens, decoder: &Tokens, cx: &Scope<'_>) -> Tensor<3> {
        self.logits(self.hidden(decoder, &self.encode(tokens, cx), cx, None), cx)
    }
}

impl Pretrained for T5ForConditionalGeneration {
    type Config = T5Config;
    const MODEL_TYPE: &'static str = "t5";
    const OUTPUT: &'static str = "lm_head";
    const PREFIX: &'static str = "";
    const MAY_BE_FRESH: &'static [&'static str] = &[];
    // Copies of the embedding, and a table that the first checkpoints have without a use.
    const IGNORED: &'static [&'static str] =
        &["embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight"];

    fn read_config(folder: &Path) -> Result<T5Config, Error> {
        let config: T5Config = config_of::<Self>(folder)?;
        let file = TensorFile::open_shards(weight_files(folder)?)?;
        Ok(T5Config { own_output: file.has("lm_head.weight"), ..config })
    }

    fn init(config: &T5Config, device: &Device) -> Result<Self, Error> {
        config.check()?;
        let d = config.d_model;
        let encoder = |index| -> Result<T5EncoderBlock, Error> {
            let own = T5Self::init(config, index == 0, device);
            let layer = (own, T5Dense::init(config, device)?);
            Ok(T5EncoderBlock { layer, place: HiddenPlace::new(d) })
        };
        let decoder = |index| -> Result<T5DecoderBlock, Error> {
            let own = T5Self::init(config, index == 0, device);
            let layer = (own, T5Cross::init(config, device), T5Dense::init(config, device)?);
            Ok(T5DecoderBlock { layer, place: HiddenPlace::new(d) })
        };
        Ok(Self {
            shared: table(config.vocab_size, d, device),
            encoder: T5Encoder {
                block: (0..config.num_layers).map(encoder).collect::<Result<_, _>>()?,
                final_layer_norm: norm(config, device),
            },
            decoder: T5Decoder {
                block: (0..config.decoders()).map(decoder).collect::<Result<_, _>>()?,
                final_layer_norm: norm(config, device),
            },
            lm_head: config.own_output.then(|| linear(d, config.vocab_size, false, device)),
            facts: Facts {
                vocab: config.vocab_size,
                start: config.start(),
                scaled: config.scale_decoder_outputs.unwrap_or(config.tie_word_embeddings),
                distances: [config.distances(true), config.distances(false)],
            },
        })
    }

    fn initializer_range(config: &T5Config) -> f64 {
        config.initializer_factor
    }
}
