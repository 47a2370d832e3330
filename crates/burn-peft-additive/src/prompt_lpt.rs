//! LPT: a prompt that stands in front of the upper blocks alone (arXiv 2210.11292).

use crate::nonlinearity::Nonlinearity;
use crate::numbers::{Draw, STANDARD};
use crate::prompt::{between, blocks, first, in_front, only_saved, own, saved_only, unread};
use crate::prompt_idpg::PromptGenerator;
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Sites, Targets};
use serde::{Deserialize, Serialize};

/// Late prompt tuning (arXiv 2210.11292, section 4): the blocks from number `l` on read `[P; X]`, with `n` tokens in front
/// of the states of the sequence. `P` is trained, or a network makes it of the states `h` that block `l` reads:
/// - `NPG`, naive: `P = relu(h₁·W₁ + b₁)·W₂ + b₂` of the first token's state;
/// - `APPG`, pooling: `P = relu(pool(h·W₁ + b₁))·W₂ + b₂` with the mean of each of `n` stretches of the sequence, padding
///   left out, which overlap as PyTorch's `AdaptiveAvgPool1d` has them.
///
/// What lies below block `l` needs no backward pass. `P ~ N(0, 1)`; `W₁ [hidden, m]`, `W₂ [m, n·hidden]` (pooling: `[m,
/// hidden]`) and their biases `U(±1/√in)`. Parameters: `n·hidden`; naive `m·(hidden + 1) + n·hidden·(m + 1)`; pooling
/// `m·(hidden + 1) + hidden·(m + 1)`. The paper's other pooling, by the largest, is not here, nor its dropout. Where the
/// authors read a mask, a classifier here reads the token that it reads without. With a network, a model that predicts the
/// words it reads is refused: the prompt would tell it. It does not fold. HF PEFT does not have it: the same layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lpt {
    /// `n`; default 5, as in the authors' runs with a network.
    pub num_virtual_tokens: usize,
    /// `l`, the number of blocks that read no prompt; default half of them.
    pub add_prompt_layer: Option<usize>,
    /// What makes the prompt; default `NPG`. Null: it is trained itself.
    pub generator_type: Option<GeneratorType>,
    /// `m`; default 128.
    pub proj_down_size: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

/// What makes the prompt of [`Lpt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum GeneratorType {
    /// A network over the first token's state.
    Npg,
    /// A network over means of stretches of the sequence.
    Appg,
}

impl Default for Lpt {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 5,
            add_prompt_layer: None,
            generator_type: Some(GeneratorType::Npg),
            proj_down_size: 128,
            targets: Targets::default(),
        }
    }
}

/// A network over means of stretches of a sequence.
#[derive(Module, Debug)]
pub struct PooledGenerator {
    /// `W₁ [hidden, m]`.
    pub down: Param<Tensor<2>>,
    /// `b₁ [m]`.
    pub down_bias: Param<Tensor<1>>,
    /// `W₂ [m, hidden]`.
    pub up: Param<Tensor<2>>,
    /// `b₂ [hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// `n`.
    pub count: usize,
}

/// Names of its tensors in the file.
const NAMES: [&str; 4] = ["pooling_down", "pooling_down_bias", "pooling_up", "pooling_up_bias"];

/// Means of `n` stretches of the sequence's own tokens, as weights `[batch, n, seq]`: of `L` tokens, stretch `j` goes from
/// `⌊j·L/n⌋` to `⌈(j + 1)·L/n⌉`.
fn stretches(x: &Tensor<3>, n: usize, tokens: Option<&SeenTokens>) -> Tensor<3> {
    let [batch, seq, _] = x.dims();
    let own: Tensor<2, Int> = own(x, tokens).reshape([batch, seq]).int();
    let (length, at) = (own.clone().sum_dim(1), own.clone().cumsum(1) - 1); // [batch, 1], [batch, seq]
    let j = Tensor::<1, Int>::arange(0..n as i64, &own.device()).unsqueeze::<2>(); // [1, n]
    let (length, from) = (length.expand([batch, n]), j.expand([batch, n]));
    let lower = (length.clone() * from.clone()).div_scalar(n as i64);
    let upper = (length * (from + 1) + (n as i64 - 1)).div_scalar(n as i64);
    let over = |bound: Tensor<2, Int>| bound.unsqueeze_dim::<3>(2).expand([batch, n, seq]);
    let at = at.unsqueeze_dim::<3>(1).expand([batch, n, seq]);
    let own = own.unsqueeze_dim::<3>(1).expand([batch, n, seq]).float();
    let within = at.clone().greater_equal(over(lower)).bool_and(at.lower(over(upper)));
    let within = within.float() * own;
    within.clone() / within.sum_dim(2).clamp_min(1.0)
}

/// `relu(pool(x·W₁ + b₁))·W₂ + b₂` over means of `n` stretches: `[batch, seq, hidden]` → `[batch, n, hidden]`.
pub(crate) fn pooled(
    x: &Tensor<3>,
    n: usize,
    tokens: Option<&SeenTokens>,
    [down, up]: [Tensor<2>; 2],
    [down_bias, up_bias]: [Tensor<1>; 2],
) -> Tensor<3> {
    let weights = stretches(x, n, tokens).cast(down.dtype());
    let h = linear(x.clone().cast(down.dtype()), down, Some(down_bias));
    let pooled = Nonlinearity::Relu.apply(weights.matmul(h)); // [batch, n, m]
    linear(pooled, up, Some(up_bias))
}

impl PooledGenerator {
    fn forward(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<3> {
        let weights = [&self.down, &self.up].map(Param::val);
        let biases = [&self.down_bias, &self.up_bias].map(Param::val);
        pooled(x, self.count, tokens, weights, biases)
    }
}

/// The prompt, or what makes it.
#[derive(Module, Debug)]
pub struct LatePrompt {
    /// `P [n, hidden]`, where it is trained itself.
    pub prompt: Option<Param<Tensor<2>>>,
    /// The naive network.
    pub naive: Option<PromptGenerator>,
    /// The network with pooling.
    pub pooling: Option<PooledGenerator>,
    /// `l`.
    pub layer: usize,
}

impl Adapter for LatePrompt {
    fn carried(
        &self,
        block: usize,
        x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        tokens: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        if block != self.layer {
            return held.cloned();
        }
        let plain = || self.prompt.as_ref().map(|prompt| prompt.val().unsqueeze());
        let naive = || self.naive.as_ref().map(|network| network.forward(first(x, tokens)));
        let pooling = || self.pooling.as_ref().map(|network| network.forward(x, tokens));
        plain().or_else(naive).or_else(pooling)
    }

    fn virtual_tokens(&self) -> usize {
        let plain = self.prompt.as_ref().map(|prompt| prompt.dims()[0]);
        let made = || self.naive.as_ref().map(PromptGenerator::count);
        plain.or_else(made).or(self.pooling.as_ref().map(|network| network.count)).unwrap_or(0)
    }
}

impl Lpt {
    /// With this many tokens in front of the upper half of the blocks.
    pub fn new(num_virtual_tokens: usize, generator_type: Option<GeneratorType>) -> Self {
        Self { num_virtual_tokens, generator_type, ..Self::default() }
    }

    fn places_of<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>, Error> {
        if self.generator_type.is_some() {
            unread(sites)?;
        }
        blocks(sites)
    }

    fn sizes(&self, site: &Site) -> [usize; 3] {
        [site.fan_out(), self.proj_down_size, self.num_virtual_tokens]
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<LatePrompt, Error> {
        let ([hidden, m, n], count) = (self.sizes(site), site.fan_in());
        let layer = self.add_prompt_layer.unwrap_or(count / 2);
        if layer >= count {
            let reason = format!("expected less than {count}, the model's blocks, found {layer}");
            return Err(Error::config("add_prompt_layer", reason));
        }
        let mut made = LatePrompt { prompt: None, naive: None, pooling: None, layer };
        match self.generator_type {
            None => made.prompt = Some(from.take("prompt_embeddings", [n, hidden], STANDARD)?),
            Some(GeneratorType::Npg) => {
                let network = PromptGenerator::build([hidden, m, n], Nonlinearity::Relu, from)?;
                made.naive = Some(network);
            }
            Some(GeneratorType::Appg) => {
                let bound = |fan_in: usize| Draw::Uniform((1.0 / fan_in as f32).sqrt());
                made.pooling = Some(PooledGenerator {
                    down: from.take(NAMES[0], [hidden, m], bound(hidden))?,
                    down_bias: from.take(NAMES[1], [m], bound(hidden))?,
                    up: from.take(NAMES[2], [m, hidden], bound(m))?,
                    up_bias: from.take(NAMES[3], [hidden], bound(m))?,
                    count: n,
                });
            }
        }
        Ok(made)
    }
}

impl Method for Lpt {
    type Adapter = LatePrompt;
    type Shared = ();
    const NAME: &'static str = "LPT";
    const KINDS: &'static [Kind] = &[Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(self);
    built!(LatePrompt);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)?;
        between("proj_down_size", self.proj_down_size, 1, 1 << 12)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let of = |generator_type, add_prompt_layer| Self {
            targets: only_saved(targets),
            add_prompt_layer,
            proj_down_size: 4,
            ..Self::new(3, generator_type)
        };
        vec![
            of(None, Some(0)),
            of(Some(GeneratorType::Appg), None),
            of(Some(GeneratorType::Npg), None),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let [hidden, m, n] = self.sizes(site);
        match self.generator_type {
            None => n * hidden,
            Some(GeneratorType::Npg) => PromptGenerator::parameters([hidden, m, n]),
            Some(GeneratorType::Appg) => PromptGenerator::parameters([hidden, m, 1]),
        }
    }

    fn tensors(&self, _site: &Site, adapter: &LatePrompt) -> Vec<(&'static str, TensorData)> {
        let plain = adapter.prompt.iter().map(|p| ("prompt_embeddings", p.val().into_data()));
        let naive = adapter.naive.iter().flat_map(PromptGenerator::tensors);
        let pooling = adapter.pooling.iter().flat_map(|network| {
            [
                (NAMES[0], network.down.val().into_data()),
                (NAMES[1], network.down_bias.val().into_data()),
                (NAMES[2], network.up.val().into_data()),
                (NAMES[3], network.up_bias.val().into_data()),
            ]
        });
        plain.chain(naive).chain(pooling).collect()
    }
}
