//! The Llama family (arXiv 2302.13971), laid out as in `transformers`.

use crate::Tokens;
use crate::attention::{causal_mask, columns_behind, mix, rows_above, split_heads};
use crate::cache::{Cached, KvCache};
use crate::load::{Pretrained, linear, plausible, table};
use crate::output::Output;
use burn::module::Module;
use burn::nn::{Embedding, Linear, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Error, Front, Hidden, HiddenPlace, Scope};
use burn_peft_kernels::{rotate, silu_mul};
use serde::Deserialize;

/// The fields of `config.json` that shape the model, with `transformers`' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub hidden_act: String,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<RopeScaling>,
    /// Newer files hold `rope_theta` and the scaling together here.
    pub rope_parameters: Option<RopeScaling>,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            mlp_bias: false,
        }
    }
}

/// How rotary positions are stretched beyond the trained length.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct RopeScaling {
    pub rope_type: Option<String>,
    /// Older files' name of `rope_type`; newer ones may hold both.
    #[serde(rename = "type")]
    pub legacy_type: Option<String>,
    pub rope_theta: Option<f64>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<f64>,
}

/// Cosines and sines.
type Tables = (Tensor<4>, Tensor<4>);

/// Rotary position embeddings (arXiv 2104.09864): frequencies `θ^(-2i/d)`, stretched as the
/// configuration says.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians a position, `[d / 2]`.
    pub frequencies: Vec<f64>,
}

impl Rope {
    /// Of a configuration.
    ///
    /// # Errors
    /// A scaling that is not implemented, or one whose numbers are missing.
    pub fn new(config: &LlamaConfig) -> Result<Self, Error> {
        let scaling = config.rope_parameters.as_ref().or(config.rope_scaling.as_ref());
        let theta = scaling.and_then(|s| s.rope_theta).or(config.rope_theta).unwrap_or(10000.0);
        let d = config.head_dim();
        let plain = (0..d / 2).map(|i| theta.powf(-2.0 * i as f64 / d as f64));
        let Some(scaling) = scaling else { return Ok(Self { frequencies: plain.collect() }) };
        let number = |name: &str, value: Option<f64>| {
            value.ok_or_else(|| Error::config(format!("rope_scaling.{name}"), "is missing"))
        };
        let kind =
            scaling.rope_type.as_deref().or(scaling.legacy_type.as_deref()).unwrap_or("default");
        let frequencies = match kind {
            "default" => plain.collect(),
            "linear" => {
                let factor = number("factor", scaling.factor)?;
                plain.map(|frequency| frequency / factor).collect()
            }
            "llama3" => {
                let factor = number("factor", scaling.factor)?;
                let low = number("low_freq_factor", scaling.low_freq_factor)?;
                let high = number("high_freq_factor", scaling.high_freq_factor)?;
                let name = "original_max_position_embeddings";
                let trained = number(name, scaling.original_max_position_embeddings)?;
                // Long waves are stretched, short ones left, those between blended.
                let stretch = |frequency: f64| {
                    let wave = 2.0 * std::f64::consts::PI / frequency;
                    if wave > trained / low {
                        frequency / factor
                    } else if wave < trained / high {
                        frequency
                    } else {
                        let smooth = (trained / wave - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                plain.map(stretch).collect()
            }
            other => {
                let reason =
                    format!("`{other}` is not implemented; expected default, linear or llama3");
                return Err(Error::config("rope_scaling.rope_type", reason));
            }
        };
        Ok(Self { frequencies })
    }

    /// Cosines and sines for positions `[batch · seq]`: each `[batch, 1, seq, d]`, both halves alike.
    fn tables(&self, positions: &[i32], [batch, seq]: [usize; 2], device: &Device) -> Tables {
        let d = 2 * self.frequencies.len();
        let table = |f: fn(f64) -> f64| {
            let mut values = Vec::with_capacity(positions.len() * d);
            for &position in positions {
                let angles = self.frequencies.iter().map(|w| f(f64::from(position) * w) as f32);
                values.extend(angles.clone().chain(angles));
            }
            Tensor::from_data(TensorData::new(values, [batch, 1, seq, d]), device)
        };
        (table(f64::cos), table(f64::sin))
    }

    /// With `n` positions below 0 before those of these tables: what stands in front of a block alone moves nobody.
    fn before(&self, n: usize, tables: Tables) -> Tables {
        let [batch, _, _, d] = tables.0.dims();
        let positions: Vec<i32> = (-(n as i32)..0).collect();
        let front = self.tables(&positions, [1, n], &tables.0.device());
        let join =
            |front: Tensor<4>, own| Tensor::cat(vec![front.expand([batch, 1, n, d]), own], 2);
        (join(front.0, tables.0), join(front.1, tables.1))
    }
}

impl LlamaConfig {
    fn groups(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    fn check(&self) -> Result<(), Error> {
        let (heads, groups) = (self.num_attention_heads, self.groups());
        plausible(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", groups),
            ("head_dim", self.head_dim()),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        if heads == 0 || groups == 0 || !heads.is_multiple_of(groups) {
            let found = format!("{groups} does not divide num_attention_heads, {heads}");
            return Err(Error::config("num_key_value_heads", found));
        }
        if !self.head_dim().is_multiple_of(2) || self.head_dim() == 0 {
            let found = format!("expected an even number, found {}", self.head_dim());
            return Err(Error::config("head_dim", found));
        }
        if self.hidden_act != "silu" {
            let reason = format!("`{}` is not implemented; expected silu", self.hidden_act);
            return Err(Error::config("hidden_act", reason));
        }
        Ok(())
    }
}

/// Grouped-query attention (arXiv 2305.13245).
#[derive(Module, Debug)]
pub(crate) struct LlamaAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    place: HiddenPlace,
    #[module(skip)]
    heads: (usize, usize),
}

/// `down(silu(gate(x)) · up(x))` (SwiGLU, arXiv 2002.05202).
#[derive(Module, Debug)]
pub(crate) struct LlamaMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    place: HiddenPlace,
}

/// One block.
#[derive(Module, Debug)]
pub(crate) struct LlamaLayer {
    self_attn: LlamaAttention,
    mlp: LlamaMlp,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
    place: HiddenPlace,
}

/// The decoder without its output layer.
#[derive(Module, Debug)]
pub struct LlamaModel {
    embed_tokens: Embedding,
    layers: Vec<LlamaLayer>,
    norm: RmsNorm,
    #[module(skip)]
    rope: Rope,
}

/// Llama with an output over the vocabulary: a layer of its own, or the embedding once more.
#[derive(Module, Debug)]
pub struct LlamaForCausalLM {
    model: LlamaModel,
    lm_head: Option<Linear>,
    #[module(skip)]
    limits: (usize, usize),
}

impl LlamaLayer {
    fn forward(
        &self,
        x: Tensor<3>,
        tables: &Tables,
        mask: Option<Tensor<4>>,
        cache: Option<(&mut KvCache, usize)>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let norm = cx.at("input_layernorm").rms_norm(&self.input_layernorm, x.clone());
        let (own, at) = (&self.self_attn, cx.at("self_attn"));
        let (heads, groups) = own.heads;
        let q = at.at("q_proj").linear(&own.q_proj, norm.clone()); // [b, s, n·d]
        let k = at.at("k_proj").linear(&own.k_proj, norm.clone()); // [b, s, g·d]
        let v = at.at("v_proj").linear(&own.v_proj, norm.clone());
        let q = rotate(split_heads(q, heads), tables.0.clone(), tables.1.clone()); // [b, n, s, d]
        let k = rotate(split_heads(k, groups), tables.0.clone(), tables.1.clone());
        let v = split_heads(v, groups);
        let Cached { k, v, prefix } = match cache {
            Some((cache, layer)) => cache.extend(layer, [k, v], || at.prefix(&norm)),
            None => Cached { k, v, prefix: at.prefix(&norm) },
        };
        let mixed = mix(&at, q.clone(), [k, v], mask, prefix);
        let mixed = at.attention(&norm, &q, &own.k_proj, &own.v_proj, mixed);
        let y = at.at("o_proj").linear(&own.o_proj, mixed);
        let h = x.clone() + at.hidden(Hidden::sublayer(&x, y));

        let after = &self.post_attention_layernorm;
        let norm = cx.at("post_attention_layernorm").rms_norm(after, h.clone());
        let (mlp, at) = (&self.mlp, cx.at("mlp"));
        let gate = at.at("gate_proj").linear(&mlp.gate_proj, norm.clone());
        let up = at.at("up_proj").linear(&mlp.up_proj, norm);
        let y = at.at("down_proj").linear(&mlp.down_proj, silu_mul(gate, up));
        let y = h.clone() + at.hidden(Hidden::sublayer(&h, y));
        cx.hidden(Hidden::block(x, y))
    }
}

impl LlamaModel {
    fn init(config: &LlamaConfig, device: &Device) -> Result<Self, Error> {
        config.check()?;
        let (h, wide, d) = (config.hidden_size, config.intermediate_size, config.head_dim());
        let (heads, groups) = (config.num_attention_heads, config.groups());
        let norm = || RmsNormConfig::new(h).with_epsilon(config.rms_norm_eps).init(device);
        let (bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        let layer = |_| LlamaLayer {
            self_attn: LlamaAttention {
                q_proj: linear(h, heads * d, bias, device),
                k_proj: linear(h, groups * d, bias, device),
                v_proj: linear(h, groups * d, bias, device),
                o_proj: linear(heads * d, h, bias, device),
                place: HiddenPlace::new(h),
                heads: (heads, groups),
            },
            mlp: LlamaMlp {
                gate_proj: linear(h, wide, mlp_bias, device),
                up_proj: linear(h, wide, mlp_bias, device),
                down_proj: linear(wide, h, mlp_bias, device),
                place: HiddenPlace::new(h),
            },
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
            place: HiddenPlace::new(h),
        };
        Ok(Self {
            embed_tokens: table(config.vocab_size, h, device),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: norm(),
            rope: Rope::new(config)?,
        })
    }

    /// Keys and values in front of the first block's, by which all positions move, as in `transformers`.
    fn prefix(cx: &Scope<'_>) -> usize {
        cx.block("layers", 0).at("self_attn").virtual_tokens()
    }

    /// Positions that are taken by what stands in front of a sequence.
    fn virtual_tokens(cx: &Scope<'_>) -> usize {
        cx.at("embed_tokens").virtual_tokens() + Self::prefix(cx)
    }

    /// Hidden states after the last norm, `[batch, seq, hidden]`: those of virtual tokens that a prompt sets
    /// in front are left out. With a cache, `tokens` are those that follow what the cache holds, and the
    /// prompt stands in front of the first of them alone.
    pub fn forward(
        &self,
        tokens: &Tokens,
        cx: &Scope<'_>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let device = self.embed_tokens.weight.device();
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let (words, ids) = (cx.at("embed_tokens"), tokens.tensor(&tokens.ids, &device));
        let mut x = words.embedding(&self.embed_tokens, ids);
        let read = past.saturating_sub(words.virtual_tokens()); // of the sequence's own
        x = words.positional(x, || tokens.tensor(&tokens.positions(0..0, read, 0), &device));
        let mut front = Vec::new();
        let prompt = || words.prompt(&x, || tokens.seen(0, &[], None, &device));
        if let Some(Front { parts: [prompt], scores }) = (past == 0).then(prompt).flatten() {
            (x, front) = (Tensor::cat(vec![prompt, x], 1), scores);
        }
        let scores = KvCache::scores_with(cache.as_deref(), tokens, &front);
        let n = front.len();
        let rows = n + tokens.seq;
        let mask = causal_mask(&scores, rows, tokens.segments.as_deref(), &device);
        let first = Self::prefix(cx);
        let positions =
            tokens.positions(first..first + n, first + past + n, Self::virtual_tokens(cx));
        let tables = self.rope.tables(&positions, [tokens.batch, rows], &device);
        let held = cache.as_ref().map_or(&[][..], |cache| cache.ids.as_slice());
        let cx = &cx.reading(tokens.seen(n, held, mask.clone(), &device));
        let mut carried = cx.at("layers").carried();
        for (index, layer) in self.layers.iter().enumerate() {
            let (mut at, mut mask, mut tables) =
                (cx.block("layers", index), mask.clone(), tables.clone());
            if past > 0 {
                let held = cache.as_ref().and_then(|cache| cache.carried.get(index));
                let (held, total) = (held.map_or(&[][..], Vec::as_slice), past + rows);
                mask = columns_behind(held, mask, total, &device);
            } else {
                let mut front = Vec::new();
                if let Some(Front { parts: [tokens], scores }) = carried.before(index, &x) {
                    mask = rows_above(&scores, mask, rows, &device);
                    at = at.behind(scores.len(), mask.clone());
                    tables = self.rope.before(scores.len(), tables);
                    (x, front) = (Tensor::cat(vec![tokens, x], 1), scores);
                }
                if let Some(cache) = &mut cache {
                    cache.carried.push(front);
                }
            }
            let y = match cache.as_deref_mut() {
                Some(cache) => layer.forward(x, &tables, mask, Some((cache, index)), &at),
                None => {
                    let layer = layer.clone();
                    let run = move |[x]: [Tensor<3>; 1], at: &Scope<'_>| {
                        layer.forward(x, &tables, mask.clone(), None, at)
                    };
                    at.run([x], run)
                }
            };
            x = carried.after(y);
        }
        if let Some(cache) = cache {
            cache.hold(scores, &tokens.behind(n, -1, &tokens.ids));
        }
        let x = if n == 0 { x } else { x.narrow(1, n, tokens.seq) };
        cx.at("norm").rms_norm(&self.norm, x)
    }
}

impl LlamaForCausalLM {
    /// Path of the embedding.
    pub const EMBEDDING: &str = "model.embed_tokens";

    /// The same function with an output layer of its own where the embedding served as one: what a
    /// merge needs, when an adapter changes the embedding and not the output.
    pub fn untied(mut self) -> Self {
        let table = self.model.embed_tokens.weight.val(); // [vocab, hidden]
        let weight = || burn::module::Param::from_tensor(table.transpose());
        self.lm_head = self.lm_head.or_else(|| Some(Linear { weight: weight(), bias: None }));
        self
    }

    /// Most tokens that a sequence may have, virtual ones counted in.
    pub fn max_positions(&self) -> usize {
        self.limits.1
    }

    /// Positions that are taken by what `cx` sets in front of a sequence.
    pub fn virtual_tokens(&self, cx: &Scope<'_>) -> usize {
        LlamaModel::virtual_tokens(&cx.at("model"))
    }

    /// Number of tokens it knows.
    pub fn vocab(&self) -> usize {
        self.limits.0
    }

    /// Refuses what a forward pass with what `cx` lays over it could not take; see [`Tokens::check`].
    ///
    /// # Errors
    /// As [`Tokens::check`].
    pub fn check(&self, tokens: &Tokens, cx: &Scope<'_>) -> Result<(), Error> {
        tokens.check(self.limits.0, self.limits.1, self.virtual_tokens(cx))
    }

    /// Hidden states, `[batch, seq, hidden]`: what [`Self::logits`] reads.
    pub fn hidden(
        &self,
        tokens: &Tokens,
        cx: &Scope<'_>,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        self.model.forward(tokens, &cx.at("model"), cache)
    }

    fn output(&self) -> Output<'_> {
        Output { head: self.lm_head.as_ref(), table: &self.model.embed_tokens }
    }

    /// Logits of hidden states: `[batch, seq, hidden]` → `[batch, seq, vocab]`.
    pub fn logits(&self, hidden: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        self.output().logits(hidden, cx)
    }

    /// Cross-entropy of the logits of hidden states `[n, hidden]` with a token each: the sum, and how many have it
    /// on top. The logits are not kept, unless something lies over the output layer.
    pub fn cross_entropy(
        &self,
        hidden: Tensor<2>,
        targets: Vec<i32>,
        cx: &Scope<'_>,
    ) -> (Tensor<1>, Tensor<1, Int>) {
        self.output().cross_entropy(hidden, targets, cx)
    }

    /// Logits `[batch, seq, vocab]`.
    pub fn forward(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<3> {
        self.logits(self.hidden(tokens, cx, None), cx)
    }
}

impl Pretrained for LlamaForCausalLM {
    type Config = LlamaConfig;
    const MODEL_TYPE: &'static str = "llama";
    const OUTPUT: &'static str = "lm_head";
    const PREFIX: &'static str = "model.";
    const MAY_BE_FRESH: &'static [&'static str] = &[];
    const IGNORED: &'static [&'static str] = &["rotary_emb.inv_freq", "lm_head.weight"];

    fn init(config: &LlamaConfig, device: &Device) -> Result<Self, Error> {
        let head = || linear(config.hidden_size, config.vocab_size, false, device);
        Ok(Self {
            model: LlamaModel::init(config, device)?,
            lm_head: (!config.tie_word_embeddings).then(head),
            limits: (config.vocab_size, config.max_position_embeddings),
        })
    }

    fn initializer_range(config: &LlamaConfig) -> f64 {
        config.initializer_range
    }
}
