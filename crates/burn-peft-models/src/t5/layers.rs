//! The sublayers of a block: each gives the stream on with what it adds.
// Fields are named as in the checkpoint, where these are in capitals.
#![allow(non_snake_case)]

use super::EncoderOutput;
use super::config::T5Config;
use super::relative::{Distances, Relative};
use crate::activation::Activation;
use crate::attention::{added, behind, split_heads};
use crate::cache::{Cached, KvCache};
use crate::load::{linear, table};
use burn::module::Module;
use burn::nn::{Embedding, Linear, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, Hidden, HiddenPlace, Scope};
use burn_peft_kernels::{attention, composed};

/// Queries, keys, values and the output; in the first block of an encoder or decoder also the scores of
/// distances, which all its blocks add.
#[derive(Module, Debug)]
pub(crate) struct T5Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    relative_attention_bias: Option<Embedding>,
    place: HiddenPlace,
    #[module(skip)]
    heads: usize,
}

/// `wo(act(wi(x)))` in 1.0, `wo(act(wi_0(x)) · wi_1(x))` (arXiv 2002.05202) in 1.1: one struct, because Burn
/// puts the name of an enum's variant into the path.
#[derive(Module, Debug)]
pub(crate) struct T5FeedForward {
    wi: Option<Linear>,
    wi_0: Option<Linear>,
    wi_1: Option<Linear>,
    wo: Linear,
    place: HiddenPlace,
    #[module(skip)]
    activation: Activation,
}

/// Attention to the sequence itself.
#[derive(Module, Debug)]
pub(crate) struct T5Self {
    SelfAttention: T5Attention,
    layer_norm: RmsNorm,
}

/// Attention to what the encoder read.
#[derive(Module, Debug)]
pub(crate) struct T5Cross {
    EncDecAttention: T5Attention,
    layer_norm: RmsNorm,
}

/// The feed-forward part.
#[derive(Module, Debug)]
pub(crate) struct T5Dense {
    DenseReluDense: T5FeedForward,
    layer_norm: RmsNorm,
}

impl T5Attention {
    fn init(config: &T5Config, first: bool, device: &Device) -> Self {
        let (d, inner) = (config.d_model, config.num_heads * config.d_kv);
        let buckets = config.relative_attention_num_buckets;
        Self {
            q: linear(d, inner, false, device),
            k: linear(d, inner, false, device),
            v: linear(d, inner, false, device),
            o: linear(inner, d, false, device),
            relative_attention_bias: first.then(|| table(buckets, config.num_heads, device)),
            place: HiddenPlace::new(d),
            heads: config.num_heads,
        }
    }

    /// Keys and values of `states [batch, seq, d_model]`.
    fn keys_values(&self, states: Tensor<3>, cx: &Scope<'_>) -> [Tensor<4>; 2] {
        let k = cx.at("k").linear(&self.k, states.clone());
        let v = cx.at("v").linear(&self.v, states);
        [k, v].map(|part| split_heads(part, self.heads))
    }

    /// Reads `x`, the norm of the stream, and mixes what was `seen`, with the scores of distances where there
    /// are such, of the encoder or decoder at that scope.
    fn forward(
        &self,
        x: Tensor<3>,
        seen: Cached,
        mask: Option<Tensor<4>>,
        relative: Option<(&Relative, &Scope<'_>)>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let q = split_heads(cx.at("q").linear(&self.q, x.clone()), self.heads); // [b, n, s, d]
        let [_, _, rows, d] = q.dims();
        // T5 does not divide scores by √d, and attention does, here as in what lies over it.
        let q = q * (d as f64).sqrt();
        let Cached { k, v, prefix } = seen;
        let [_, _, total, _] = k.dims();
        let front = prefix.as_ref().map_or(0, |prefix| prefix.scores.len());
        let (k, v, mask) = match &prefix {
            Some(prefix) => behind(prefix, k, v, mask),
            None => (k, v, mask),
        };
        let mixed = match relative {
            // They differ by head and may be trained; the fused form takes constants that all heads share.
            Some((relative, stack)) => {
                let mut scores = relative.scores(front, stack); // [1, n, s, total]
                if let Some(added) = added(cx, [rows, total], front) {
                    scores = scores + added.cast(q.dtype());
                }
                let scores = mask.map_or(scores.clone(), |mask| scores + mask);
                composed::attention(q.clone(), k, v, Some(scores))
            }
            None => attention(q.clone(), k, v, mask),
        };
        let mixed = cx.attention(&x, &q, &self.k, &self.v, mixed);
        cx.at("o").linear(&self.o, mixed)
    }
}

impl T5FeedForward {
    fn init(config: &T5Config, device: &Device) -> Result<Self, Error> {
        let (activation, gated) = config.feed_forward()?;
        let wide = || linear(config.d_model, config.d_ff, false, device);
        Ok(Self {
            wi: (!gated).then(wide),
            wi_0: gated.then(wide),
            wi_1: gated.then(wide),
            wo: linear(config.d_ff, config.d_model, false, device),
            place: HiddenPlace::new(config.d_model),
            activation,
        })
    }

    fn forward(&self, x: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let mut wide = x.clone();
        for (name, first) in [("wi", &self.wi), ("wi_0", &self.wi_0)] {
            if let Some(first) = first {
                wide = self.activation.apply(cx.at(name).linear(first, x.clone()));
            }
        }
        if let Some(up) = &self.wi_1 {
            wide = wide * cx.at("wi_1").linear(up, x);
        }
        cx.at("wo").linear(&self.wo, wide)
    }
}

/// A norm of the stream, without a mean.
pub(super) fn norm(config: &T5Config, device: &Device) -> RmsNorm {
    RmsNormConfig::new(config.d_model).with_epsilon(config.layer_norm_epsilon).init(device)
}

impl T5Self {
    /// That of the `first` block has the scores of distances.
    pub(super) fn init(config: &T5Config, first: bool, device: &Device) -> Self {
        let attention = T5Attention::init(config, first, device);
        Self { SelfAttention: attention, layer_norm: norm(config, device) }
    }

    /// The scores of distances in a pass of `[rows, total]` tokens, which the first block of the encoder or decoder at `cx`
    /// has.
    pub(super) fn relative(
        &self,
        distances: Distances,
        size: [usize; 2],
        cx: &Scope<'_>,
    ) -> Option<Relative> {
        const PATH: &str = "block.0.layer.0.SelfAttention.relative_attention_bias";
        let table = self.SelfAttention.relative_attention_bias.as_ref()?;
        Some(Relative::new(table, distances, size, (PATH, cx)))
    }

    /// The stream `x` with what the attention adds.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        mask: Option<Tensor<4>>,
        relative: Option<(&Relative, &Scope<'_>)>,
        cache: Option<(&mut KvCache, usize)>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let norm = cx.at("layer_norm").rms_norm(&self.layer_norm, x.clone());
        let (own, at) = (&self.SelfAttention, cx.at("SelfAttention"));
        let [k, v] = own.keys_values(norm.clone(), &at);
        let seen = match cache {
            Some((cache, block)) => cache.extend(block, [k, v], || at.prefix(&norm)),
            None => Cached { k, v, prefix: at.prefix(&norm) },
        };
        let y = own.forward(norm, seen, mask, relative, &at);
        x.clone() + at.hidden(Hidden::sublayer(&x, y))
    }
}

impl T5Cross {
    pub(super) fn init(config: &T5Config, device: &Device) -> Self {
        let attention = T5Attention::init(config, false, device);
        Self { EncDecAttention: attention, layer_norm: norm(config, device) }
    }

    /// The stream `x` with what the attention adds.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        encoded: &EncoderOutput,
        cache: Option<(&mut KvCache, usize)>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let norm = cx.at("layer_norm").rms_norm(&self.layer_norm, x.clone());
        let (own, at) = (&self.EncDecAttention, cx.at("EncDecAttention"));
        let seen = || {
            // Keys and values are those of the encoder's tokens.
            let reading = at.reading(encoded.tokens.clone());
            let [k, v] = own.keys_values(encoded.states.clone(), &reading);
            Cached { k, v, prefix: at.prefix(&encoded.states) }
        };
        let seen = match cache {
            Some((cache, block)) => cache.encoded(block, seen),
            None => seen(),
        };
        let y = own.forward(norm, seen, encoded.tokens.scores.clone(), None, &at);
        x.clone() + at.hidden(Hidden::sublayer(&x, y))
    }
}

impl T5Dense {
    pub(super) fn init(config: &T5Config, device: &Device) -> Result<Self, Error> {
        let feed_forward = T5FeedForward::init(config, device)?;
        Ok(Self { DenseReluDense: feed_forward, layer_norm: norm(config, device) })
    }

    /// The stream `x` with what the feed-forward part adds.
    pub(super) fn forward(&self, x: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let norm = cx.at("layer_norm").rms_norm(&self.layer_norm, x.clone());
        let at = cx.at("DenseReluDense");
        let y = self.DenseReluDense.forward(norm, &at);
        x.clone() + at.hidden(Hidden::sublayer(&x, y))
    }
}
