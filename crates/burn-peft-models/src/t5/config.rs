//! What shapes a T5.

use super::relative::Distances;
use crate::activation::Activation;
use crate::load::plausible;
use burn_peft_core::Error;
use serde::Deserialize;

/// The fields of `config.json` that shape the model, with `transformers`' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct T5Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_decoder_layers: Option<usize>,
    pub num_heads: usize,
    pub relative_attention_num_buckets: usize,
    pub relative_attention_max_distance: usize,
    pub layer_norm_epsilon: f64,
    pub initializer_factor: f64,
    /// `relu` in 1.0, `gated-gelu` in 1.1.
    pub feed_forward_proj: String,
    pub pad_token_id: u32,
    /// What the decoder begins with; default: `pad_token_id`.
    pub decoder_start_token_id: Option<u32>,
    /// In the files of 1.1 false, which means as well that states are not scaled before the output.
    pub tie_word_embeddings: bool,
    /// Newer files say here what older ones mean by `tie_word_embeddings`.
    pub scale_decoder_outputs: Option<bool>,
    /// Whether the output is a layer of its own: whether the checkpoint has one, as in `transformers`.
    #[serde(skip)]
    pub own_output: bool,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            initializer_factor: 1.0,
            feed_forward_proj: "relu".into(),
            pad_token_id: 0,
            decoder_start_token_id: None,
            tie_word_embeddings: true,
            scale_decoder_outputs: None,
            own_output: false,
        }
    }
}

impl T5Config {
    pub(super) fn check(&self) -> Result<(), Error> {
        plausible(&[
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_decoder_layers", self.decoders()),
            ("num_heads", self.num_heads),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets),
            ("relative_attention_max_distance", self.relative_attention_max_distance),
        ])?;
        let start = self.start() as usize;
        if start >= self.vocab_size {
            let reason =
                format!("expected an id below vocab_size, {}, found {start}", self.vocab_size);
            return Err(Error::config("decoder_start_token_id", reason));
        }
        self.feed_forward()?;
        self.distances(true).check()
    }

    pub(super) fn decoders(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    pub(super) fn start(&self) -> u32 {
        self.decoder_start_token_id.unwrap_or(self.pad_token_id)
    }

    /// The activation, and whether it gates.
    pub(super) fn feed_forward(&self) -> Result<(Activation, bool), Error> {
        let name = self.feed_forward_proj.as_str();
        let (own, gated) = name.strip_prefix("gated-").map_or((name, false), |own| (own, true));
        // Where it gates, T5 means the approximation by gelu.
        let own = if gated && own == "gelu" { "gelu_new" } else { own };
        match Activation::of(own) {
            Ok(activation) => Ok((activation, gated)),
            Err(_) => {
                let reason = format!(
                    "`{name}` is not implemented; expected relu, gelu or gelu_new, alone or behind `gated-`"
                );
                Err(Error::config("feed_forward_proj", reason))
            }
        }
    }

    pub(super) fn distances(&self, both_ways: bool) -> Distances {
        Distances {
            buckets: self.relative_attention_num_buckets,
            farthest: self.relative_attention_max_distance,
            both_ways,
        }
    }
}
