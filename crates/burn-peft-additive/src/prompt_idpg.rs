//! IDPG: a prompt that a small network makes of the sentence (arXiv 2204.04497).

use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::prompt::{between, in_front, mean, only_saved, saved_only, words_to_read};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Instance-dependent prompt generation (arXiv 2204.04497, section 3.2): the model reads `[P(x); E(x)]` with
/// `P(x) = f(M(x)·W₁ + b₁)·W₂ + b₂`, a prompt `[n, hidden]` for each row.
///
/// `W₁ [hidden, m]`, `W₂ [m, n·hidden]`, both `U(±1/√in)` as their biases, are trained: the paper's S-IDPG with plain layers,
/// which is one prompt at the input. Neither its layers of hypercomplex products (PHM) nor its prompts in every block
/// (M-IDPG) are here. `M(x)` is the mean of the row's embedded words, padding left out: the paper's variant with GloVe, by
/// the model's own words, where its main one runs the model once more. Parameters: `m·(hidden + 1) + n·hidden·(m + 1)`. A
/// model that predicts the words it reads is refused: the prompt would tell it. It does not fold. HF PEFT does not have
/// it: the same layout. All else is as in [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Idpg {
    /// `n`; default 5, as in the authors' scripts.
    pub num_virtual_tokens: usize,
    /// `m`; default 16, as there.
    pub bottleneck: usize,
    /// `f`; default relu.
    pub non_linearity: Nonlinearity,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for Idpg {
    fn default() -> Self {
        Self::new(5, 16)
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct PromptGenerator {
    /// `W₁ [hidden, m]`.
    pub down: Param<Tensor<2>>,
    /// `b₁ [m]`.
    pub down_bias: Param<Tensor<1>>,
    /// `W₂ [m, n·hidden]`.
    pub up: Param<Tensor<2>>,
    /// `b₂ [n·hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// `f`.
    #[module(skip)]
    pub non_linearity: Nonlinearity,
}

/// Names of its tensors in the file.
const NAMES: [&str; 4] =
    ["generator_down", "generator_down_bias", "generator_up", "generator_up_bias"];

impl PromptGenerator {
    /// For `n` tokens of width `hidden`, through a bottleneck of `m`.
    pub(crate) fn build(
        [hidden, m, n]: [usize; 3],
        non_linearity: Nonlinearity,
        from: &mut impl Source,
    ) -> Result<Self, Error> {
        let bound = |fan_in: usize| Draw::Uniform((1.0 / fan_in as f32).sqrt());
        Ok(Self {
            down: from.take(NAMES[0], [hidden, m], bound(hidden))?,
            down_bias: from.take(NAMES[1], [m], bound(hidden))?,
            up: from.take(NAMES[2], [m, n * hidden], bound(m))?,
            up_bias: from.take(NAMES[3], [n * hidden], bound(m))?,
            non_linearity,
        })
    }

    /// Number of trained parameters, `m·(hidden + 1) + n·hidden·(m + 1)`.
    pub(crate) fn parameters([hidden, m, n]: [usize; 3]) -> usize {
        m * (hidden + 1) + n * hidden * (m + 1)
    }

    pub(crate) fn tensors(&self) -> Vec<(&'static str, TensorData)> {
        vec![
            (NAMES[0], self.down.val().into_data()),
            (NAMES[1], self.down_bias.val().into_data()),
            (NAMES[2], self.up.val().into_data()),
            (NAMES[3], self.up_bias.val().into_data()),
        ]
    }

    /// How many tokens it makes.
    pub(crate) fn count(&self) -> usize {
        let ([hidden, _], [_, all]) = (self.down.dims(), self.up.dims());
        all / hidden
    }

    /// `[batch, hidden]` → `[batch, n, hidden]`.
    pub(crate) fn forward(&self, sentence: Tensor<2>) -> Tensor<3> {
        let down = self.down.val();
        let [batch, hidden] = sentence.dims();
        let h = linear(sentence.cast(down.dtype()), down, Some(self.down_bias.val()));
        let h = self.non_linearity.apply(h);
        linear(h, self.up.val(), Some(self.up_bias.val())).reshape([batch, self.count(), hidden])
    }
}

impl Adapter for PromptGenerator {
    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.forward(mean(x, tokens)))
    }

    fn virtual_tokens(&self) -> usize {
        self.count()
    }
}

impl Idpg {
    /// With this many virtual tokens and this bottleneck.
    pub fn new(num_virtual_tokens: usize, bottleneck: usize) -> Self {
        let non_linearity = Nonlinearity::Relu;
        Self { num_virtual_tokens, bottleneck, non_linearity, targets: Targets::default() }
    }

    fn sizes(&self, site: &Site) -> [usize; 3] {
        [site.fan_out(), self.bottleneck, self.num_virtual_tokens]
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<PromptGenerator, Error> {
        PromptGenerator::build(self.sizes(site), self.non_linearity, from)
    }
}

impl Method for Idpg {
    type Adapter = PromptGenerator;
    type Shared = ();
    const NAME: &'static str = "IDPG";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(words_to_read);
    built!(PromptGenerator);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)?;
        between("bottleneck", self.bottleneck, 1, 1 << 12)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3, 4) };
        vec![Self { non_linearity: Nonlinearity::Tanh, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        PromptGenerator::parameters(self.sizes(site))
    }

    fn tensors(&self, _site: &Site, adapter: &PromptGenerator) -> Vec<(&'static str, TensorData)> {
        adapter.tensors()
    }
}
