//! Tiny-Attention: an adapter that reads the tokens around (arXiv 2211.01979).

use crate::bottleneck::{OwnNorm, read};
use crate::fields::{bounded, positive};
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Adapters, Error, Hidden, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Tiny-Attention adapter (arXiv 2211.01979): `y' = y + 1/M·Σₘ softmax(qₘ·kₘᵀ/√d)·vₘ·Oₘ + o` with `M` heads of
/// `d` numbers, `(qₘ, kₘ, vₘ) = n·(Qₘ, Kₘ, Vₘ)`, `q` with a bias, and `n` a trained norm of `h`.
///
/// For attention: `attention.output` in BERT, `self_attn` in Llama, where `h` is its normed output; who sees whom is
/// the model's own mask. Matrices begin as PyTorch's layers do, `U(±1/√fan_in)`, and `O` at a hundredth of that. The
/// heads are a mixture of experts that one takes the place of afterwards, [`averaged`](Self::averaged). Biases of keys
/// and values would add nothing. Parameters: `4·M·d·hidden + M·d + 3·hidden` a place. It does not fold, and as no cache
/// holds hidden states, generation reads the whole sequence for each token. HF PEFT does not have it; the file holds
/// `tiny_qkv.weight (3·M·d, hidden)`, `tiny_q.bias (M·d)`, `tiny_out.weight (hidden, M·d)`, `tiny_out.bias` and
/// `tiny_norm`'s weight and bias.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TinyAttention {
    /// `M`; default 1.
    pub heads: usize,
    /// `d`; default 1.
    pub head_dim: usize,
    /// `h` is the sum of `y` and the residual stream, after the model's own norm where it has one there, which is the
    /// default; otherwise `y`.
    pub original_ln_before: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for TinyAttention {
    fn default() -> Self {
        Self { heads: 1, head_dim: 1, original_ln_before: true, targets: Targets::default() }
    }
}

/// What Tiny-Attention trains at one place.
#[derive(Module, Debug)]
pub struct TinyAttentionAdapter {
    /// `(Q, K, V)ᵀ [3·M·d, hidden]`, each head by head.
    pub qkv: Param<Tensor<2>>,
    /// Bias of the queries, `[M·d]`.
    pub q_bias: Param<Tensor<1>>,
    /// `Oᵀ [hidden, M·d]`.
    pub out: Param<Tensor<2>>,
    /// `o [hidden]`.
    pub out_bias: Param<Tensor<1>>,
    /// The norm.
    pub norm: OwnNorm,
    /// `M`.
    pub heads: usize,
    /// Whether the normed sum is read.
    pub original_ln_before: bool,
}

impl Adapter for TinyAttentionAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let qkv = self.qkv.val();
        let n = self.norm.forward(read(at, false, self.original_ln_before).cast(qkv.dtype()));
        let ([batch, seq, _], [wide, _], heads) = (n.dims(), qkv.dims(), self.heads);
        let d = wide / 3 / heads;
        let all = linear(n, qkv.transpose(), None); // [batch, seq, 3·M·d]
        let part = |at: usize| all.clone().narrow(2, at * heads * d, heads * d);
        let split = |x: Tensor<3>| x.reshape([batch, seq, heads, d]).swap_dims(1, 2);
        let q = split(part(0) + self.q_bias.val().unsqueeze());
        let mut scores = q.matmul(split(part(1)).swap_dims(2, 3)) / (d as f64).sqrt();
        if let Some(own) = at.tokens.as_ref().and_then(|tokens| tokens.scores.clone()) {
            scores = scores + own.cast(all.dtype());
        }
        let mixed = softmax(scores, 3).matmul(split(part(2))); // [batch, M, seq, d]
        let mixed = mixed.swap_dims(1, 2).reshape([batch, seq, heads * d]) / heads as f64;
        let y = linear(mixed, self.out.val().transpose(), Some(self.out_bias.val()));
        Some(y.cast(at.y.dtype()))
    }

    fn whole_sequence(&self) -> bool {
        true
    }
}

impl TinyAttentionAdapter {
    /// One head whose matrices are the means of all heads'.
    fn averaged(self) -> Self {
        let ([wide, hidden], heads) = (self.qkv.dims(), self.heads);
        let d = wide / 3 / heads;
        let mean = |x: Tensor<3>, shape: [usize; 2]| x.mean_dim(1).reshape(shape);
        Self {
            qkv: self.qkv.map(|qkv| mean(qkv.reshape([3, heads, d * hidden]), [3 * d, hidden])),
            q_bias: self.q_bias.map(|bias| bias.reshape([heads, d]).mean_dim(0).reshape([d])),
            out: self.out.map(|out| mean(out.reshape([hidden, heads, d]), [hidden, d])),
            heads: 1,
            ..self
        }
    }
}

impl TinyAttention {
    /// With `heads` heads of `head_dim` numbers.
    pub fn new(heads: usize, head_dim: usize, targets: Targets) -> Self {
        Self { heads, head_dim, targets, ..Self::default() }
    }

    /// The paper's adapter for inference, a head of the heads' mean weights, and its configuration. It is
    /// another function, near the one that was trained.
    pub fn averaged(
        &self,
        adapters: &Adapters<TinyAttentionAdapter>,
    ) -> (Self, Adapters<TinyAttentionAdapter>) {
        let adapters = adapters.clone().map_layers(|_, adapter| adapter.averaged());
        (Self { heads: 1, ..self.clone() }, adapters)
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<TinyAttentionAdapter, Error> {
        let (wide, hidden) = (self.heads * self.head_dim, site.fan_out());
        bounded("head_dim", &site.path, [3 * wide, hidden])?;
        let uniform = |fan_in: usize, scale: f32| Draw::Uniform(scale / (fan_in as f32).sqrt());
        let (zero, one) = (Draw::Constant(0.0), Draw::Constant(1.0));
        Ok(TinyAttentionAdapter {
            qkv: from.take("tiny_qkv.weight", [3 * wide, hidden], uniform(hidden, 1.0))?,
            q_bias: from.take("tiny_q.bias", [wide], uniform(hidden, 1.0))?,
            out: from.take("tiny_out.weight", [hidden, wide], uniform(self.head_dim, 0.01))?,
            out_bias: from.take("tiny_out.bias", [hidden], zero)?,
            norm: OwnNorm {
                weight: from.take("tiny_norm.weight", [hidden], one)?,
                bias: from.take("tiny_norm.bias", [hidden], zero)?,
            },
            heads: self.heads,
            original_ln_before: self.original_ln_before,
        })
    }
}

impl Method for TinyAttention {
    type Adapter = TinyAttentionAdapter;
    type Shared = ();
    const NAME: &'static str = "TINY_ATTENTION";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(TinyAttentionAdapter);

    fn check(&self) -> Result<(), Error> {
        for (field, size) in [("heads", self.heads), ("head_dim", self.head_dim)] {
            positive(field, size)?;
            if size > 1 << 10 {
                return Err(Error::config(field, format!("expected at most 1024, found {size}")));
            }
        }
        Ok(())
    }

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![
            Self { original_ln_before: false, ..Self::new(2, 3, targets.clone()) },
            Self::new(1, 1, targets.clone()),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (wide, hidden) = (self.heads * self.head_dim, site.fan_out());
        4 * wide * hidden + wide + 3 * hidden
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &TinyAttentionAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        vec![
            ("tiny_qkv.weight", adapter.qkv.val().into_data()),
            ("tiny_q.bias", adapter.q_bias.val().into_data()),
            ("tiny_out.weight", adapter.out.val().into_data()),
            ("tiny_out.bias", adapter.out_bias.val().into_data()),
            ("tiny_norm.weight", adapter.norm.weight.val().into_data()),
            ("tiny_norm.bias", adapter.norm.bias.val().into_data()),
        ]
    }
}
