//! APT: prefix tuning with a gate for each token and each block (arXiv 2305.15212).

use crate::numbers::{Draw, STANDARD};
use crate::prompt::{attentions, between, first, in_front, only_saved, saved_only};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Adaptive prefix tuning (arXiv 2305.15212, section 3): every attention reads `[K'; K]` and `[V'; V]` with
/// `[K'; V'] = λ·α ⊙ P`, where `α = σ(h·W)` weighs each of the `n` tokens of the prefix and `λ` the prefix of the
/// block.
///
/// `P [n, 2·width] ~ N(0, 1)`, `W [hidden, n] ~ U(±1/√hidden)` and `λ`, 1 at first, are trained at each block. Three
/// things are our choice, for want of published code: how `W` and `λ` begin; that the gate has no bias; and that `h` is the
/// state that the attention reads of the sequence's first token, BERT's `[CLS]`, as a decoder's first token knows nothing
/// of those that it is to predict. Documents packed into one row have one gate, the first's. Parameters:
/// `2·n·width + n·hidden + 1` a block. It does not fold. HF PEFT does not have it: the same layout. All else is as in
/// [`PrefixTuning`](crate::PrefixTuning).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Apt {
    /// `n`; default 20.
    pub num_virtual_tokens: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for Apt {
    fn default() -> Self {
        Self::new(20)
    }
}

/// The prefix of one attention and its gates.
#[derive(Module, Debug)]
pub struct GatedPrefix {
    /// `P [n, 2·width]`, keys beside values.
    pub prefix: Param<Tensor<2>>,
    /// `W [hidden, n]`.
    pub token_gate: Param<Tensor<2>>,
    /// `λ [1]`.
    pub layer_gate: Param<Tensor<1>>,
}

impl Adapter for GatedPrefix {
    fn prefix(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        let gate = self.token_gate.val();
        let h = first(x, tokens).cast(gate.dtype()); // [batch, hidden]
        let alpha = sigmoid(linear(h, gate, None)); // [batch, n]
        let gates = alpha * self.layer_gate.val().unsqueeze();
        let both = gates.unsqueeze_dim::<3>(2) * self.prefix.val().unsqueeze(); // [batch, n, 2·width]
        let width = both.dims()[2] / 2;
        Some([0, 1].map(|part| both.clone().narrow(2, part * width, width)))
    }

    fn virtual_tokens(&self) -> usize {
        self.prefix.dims()[0]
    }
}

impl Apt {
    /// With this many keys and values at each block.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { num_virtual_tokens, targets: Targets::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<GatedPrefix, Error> {
        let (n, hidden, width) = (self.num_virtual_tokens, site.fan_in(), site.fan_out());
        let bound = (1.0 / hidden as f32).sqrt();
        Ok(GatedPrefix {
            prefix: from.take("prefix", [n, 2 * width], STANDARD)?,
            token_gate: from.take("token_gate", [hidden, n], Draw::Uniform(bound))?,
            layer_gate: from.take("layer_gate", [1], Draw::Constant(1.0))?,
        })
    }
}

impl Method for Apt {
    type Adapter = GatedPrefix;
    type Shared = ();
    const NAME: &'static str = "APT";
    const KINDS: &'static [Kind] = &[Kind::Attention];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(attentions);
    built!(GatedPrefix);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 16)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self { targets: only_saved(targets), ..Self::new(3) }]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (n, hidden, width) = (self.num_virtual_tokens, site.fan_in(), site.fan_out());
        2 * n * width + n * hidden + 1
    }

    fn tensors(&self, _site: &Site, adapter: &GatedPrefix) -> Vec<(&'static str, TensorData)> {
        vec![
            ("prefix", adapter.prefix.val().into_data()),
            ("token_gate", adapter.token_gate.val().into_data()),
            ("layer_gate", adapter.layer_gate.val().into_data()),
        ]
    }
}
