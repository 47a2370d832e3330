//! CoDA: frozen blocks that run for some tokens alone, beside an adapter for all (arXiv 2304.04947).

use crate::fields::bounded;
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::prompt::{between, only_saved, predicted, saved_only};
use crate::soft_top_k::{chosen, seen, soft_top_k};
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, Routed, Site, Sites, Strictness, Targets};
use serde::{Deserialize, Serialize};

/// Conditional adapters (arXiv 2304.04947, section 3): of `n` tokens that a row has, block `F` runs for `k = ⌈n/r⌉`, and
/// `y = x + f(x·D + d)·U + u + λ ⊙ (F(x) - x)` with `λ` for these and 0 for the others, which the adapter alone changes.
///
/// A router says which: the `k` with the highest scores `s = x·w`; of equal ones the first. `λ` is the soft top-k of all
/// scores, `max s·λ + ε·H(λ)` with `0 ≤ λ ≤ 1` and `Σλ = k`, by coordinate descent on its dual: from `a = 0`, `T` times
/// `b = min(-(s + a), 0)` and `a = ε·ln k - ε·ln Σ exp((s + b)/ε)`, then `λ = exp(min(s + a, 0)/ε)`. In it `ε` falls from 4
/// by 0.7 a time to its own value (ε-scaling, as the paper has it by those who built on it). Where `k = n`, `λ = 1`.
/// Gradients reach `w` through `λ`.
///
/// In `F` the attention of the chosen reads all tokens of the row, or the chosen alone. Padding is never chosen and counts
/// for nothing; virtual tokens are tokens. No token is special: a class token may be left out of a block. What else lies
/// inside a block reads the chosen as a sequence: a patch has no neighbours there, and what
/// looks for a token by its id finds it among the chosen only.
///
/// For each block `w [hidden]`, `D [hidden, m]` and their kin are stacked, `[blocks, ..]`: parameters
/// `blocks·(2·m·hidden + m + 2·hidden)`. `w` and `D` begin as PyTorch's layers do, `U(±1/√hidden)`, and `U`, `d` and `u` at 0:
/// a choice of ours, as the adapter's reading of the stream as `F` reads it, where the paper's T5 reads its norm. It is no
/// identity at the start, but for `r = 1`. A model that predicts the words it reads is refused: which tokens are chosen
/// would tell of later ones. It does not fold. HF PEFT does not have it; the file holds `router`, `adapter_down`,
/// `adapter_down_bias`, `adapter_up` and `adapter_up_bias` of the list of blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Coda {
    /// `r`; default 3.
    pub reduction: usize,
    /// `m`; default 64.
    pub bottleneck: usize,
    /// `f`; default relu.
    pub non_linearity: Nonlinearity,
    /// Whom the chosen read; default all tokens.
    pub attention: CodaAttention,
    /// `ε`; default 1, a choice of ours: those who built on the paper tell of 0.02 to 1.
    pub epsilon: f64,
    /// `T`; default 20.
    pub iterations: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

/// Whom the chosen tokens of [`Coda`] read in a block's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodaAttention {
    /// All tokens, whose keys and values are computed: the paper's k-to-all.
    #[default]
    KToAll,
    /// Each other: k-to-k, which is faster.
    KToK,
}

impl Default for Coda {
    fn default() -> Self {
        Self {
            reduction: 3,
            bottleneck: 64,
            non_linearity: Nonlinearity::Relu,
            attention: CodaAttention::KToAll,
            epsilon: 1.0,
            iterations: 20,
            targets: Targets::default(),
        }
    }
}

/// The routers and adapters of all blocks.
#[derive(Module, Debug)]
pub struct ConditionalAdapters {
    /// `w [blocks, hidden]`.
    pub router: Param<Tensor<2>>,
    /// `D [blocks, hidden, m]`.
    pub down: Param<Tensor<3>>,
    /// `d [blocks, m]`.
    pub down_bias: Param<Tensor<2>>,
    /// `U [blocks, m, hidden]`.
    pub up: Param<Tensor<3>>,
    /// `u [blocks, hidden]`.
    pub up_bias: Param<Tensor<2>>,
    /// What was asked for.
    #[module(skip)]
    pub how: Coda,
}

/// Names of its tensors in the file.
const NAMES: [&str; 5] =
    ["router", "adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias"];

impl ConditionalAdapters {
    /// `f(x·D + d)·U + u`, `[batch, seq, hidden]`.
    fn beside(&self, block: usize, x: Tensor<3>) -> Tensor<3> {
        let matrix = |of: &Param<Tensor<3>>| of.val().narrow(0, block, 1).squeeze_dim::<2>(0);
        let bias = |of: &Param<Tensor<2>>| Some(of.val().narrow(0, block, 1).squeeze_dim::<1>(0));
        let h = linear(x, matrix(&self.down), bias(&self.down_bias));
        linear(self.how.non_linearity.apply(h), matrix(&self.up), bias(&self.up_bias))
    }

    /// `s = x·w`, `[batch, seq]`.
    fn scores(&self, block: usize, x: Tensor<3>) -> Tensor<2> {
        let router = self.router.val().narrow(0, block, 1).transpose(); // [hidden, 1]
        linear(x, router, None).squeeze_dim(2)
    }
}

impl Adapter for ConditionalAdapters {
    fn routed(&self, block: usize, x: &Tensor<3>, mask: Option<&Tensor<4>>) -> Option<Routed> {
        let ([blocks, _], [batch, seq, _]) = (self.router.dims(), x.dims());
        if block >= blocks {
            return None;
        }
        let Coda { reduction, epsilon, iterations, .. } = self.how;
        let x = x.clone().cast(self.router.val().dtype());
        let scores = self.scores(block, x.clone());
        let seen = mask.map(|mask| seen(mask, [batch, seq]));
        let lambda = soft_top_k(scores.clone(), seen.as_ref(), reduction, epsilon, iterations);
        let (chosen, real) = chosen(scores.without_autodiff(), seen, reduction);
        Some(Routed {
            share: lambda.gather(1, chosen.clone()),
            chosen,
            real,
            beside: self.beside(block, x),
            reads_all: self.how.attention == CodaAttention::KToAll,
        })
    }
}

impl Coda {
    /// With this `r` and this bottleneck.
    pub fn new(reduction: usize, bottleneck: usize) -> Self {
        Self { reduction, bottleneck, ..Self::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ConditionalAdapters, Error> {
        let (blocks, hidden, m) = (site.fan_in(), site.fan_out(), self.bottleneck);
        let [router, down, down_bias, up, up_bias] = NAMES;
        bounded("bottleneck", &site.path, [blocks * hidden, m])?;
        let (uniform, zero) =
            (Draw::Uniform((1.0 / hidden.max(1) as f32).sqrt()), Draw::Constant(0.0));
        Ok(ConditionalAdapters {
            router: from.take(router, [blocks, hidden], uniform)?,
            down: from.take(down, [blocks, hidden, m], uniform)?,
            down_bias: from.take(down_bias, [blocks, m], zero)?,
            up: from.take(up, [blocks, m, hidden], zero)?,
            up_bias: from.take(up_bias, [blocks, hidden], zero)?,
            how: self.clone(),
        })
    }
}

impl Method for Coda {
    type Adapter = ConditionalAdapters;
    type Shared = ();
    const NAME: &'static str = "CODA";
    const KINDS: &'static [Kind] = &[Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(ConditionalAdapters);

    fn places<'s>(&self, sites: &'s Sites, _: Strictness) -> Result<Vec<&'s Site>, Error> {
        if let Some(path) = predicted(sites) {
            let reason = "expected a model that does not predict the words it reads, since which tokens a block runs \
                          for depends on all of them; use an adapter that reads each token alone";
            return Err(Error::place(path, reason));
        }
        match sites.between.iter().find(|site| site.kind == Kind::Blocks) {
            Some(site) => Ok(vec![site]),
            None => {
                let reason = "expected a model with a list of blocks, which run for some tokens alone; found none";
                Err(Error::config("reduction", reason))
            }
        }
    }

    fn check(&self) -> Result<(), Error> {
        between("reduction", self.reduction, 1, 1 << 12)?;
        between("bottleneck", self.bottleneck, 1, 1 << 12)?;
        between("iterations", self.iterations, 1, 1 << 10)?;
        match (1e-3..=1e3).contains(&self.epsilon) {
            true => Ok(()),
            false => {
                let reason = format!("expected 0.001 to 1000, found {}", self.epsilon);
                Err(Error::config("epsilon", reason))
            }
        }
    }

    fn starts_as_identity(&self) -> bool {
        self.reduction == 1
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let of = |coda: Self| Self { targets: only_saved(targets), ..coda };
        vec![
            of(Self {
                non_linearity: Nonlinearity::Tanh,
                attention: CodaAttention::KToK,
                epsilon: 0.5,
                iterations: 5,
                ..Self::new(2, 4)
            }),
            of(Self::new(3, 3)),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (blocks, hidden, m) = (site.fan_in(), site.fan_out(), self.bottleneck);
        blocks * (2 * m * hidden + m + 2 * hidden)
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &ConditionalAdapters,
    ) -> Vec<(&'static str, TensorData)> {
        let [router, down, down_bias, up, up_bias] = NAMES;
        vec![
            (router, adapter.router.val().into_data()),
            (down, adapter.down.val().into_data()),
            (down_bias, adapter.down_bias.val().into_data()),
            (up, adapter.up.val().into_data()),
            (up_bias, adapter.up_bias.val().into_data()),
        ]
    }
}
