//! Selective prompt tuning: gates choose the blocks in front of which prompts are made (arXiv 2310.20127).

use crate::numbers::Draw;
use crate::prompt::{between, blocks, in_front, only_saved, saved_only, unread};
use crate::prompt_lpt::pooled;
use crate::prompt_selective_policy::Search;
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Error, Kind, Method, Policy, SeenTokens, Site, Sites, Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Selective prompt tuning (arXiv 2310.20127, section 4): block `l` reads `[p_l; X]` with
/// `p_l = (1 - τ·a_l)·p'_l + τ·a_l·PG_l(X)` and `a_l = σ(α_l)`, where `p'_l` is what the block before made of its prompt,
/// zeros if it had none, and `PG_l(X) = relu(pool(X·W₁ + b₁))·W₂ + b₂` the pooling network of [`Lpt`](crate::Lpt).
///
/// The training has two parts. For `search_steps` steps, each `selection_every`-th step moves the gates `α` alone and every
/// other one all else, each with the next batch: the bilevel problem to first order, as in AutoLoRA. Then the
/// `num_prompt_layers` blocks with the highest gates are kept, with `a_l = 1`; the other blocks read what the one before gave
/// on, those below the first nothing. The networks are drawn again, and the rest of the training is theirs. Where
/// `search_steps` are all steps, they stay what they are. The choice goes into the configuration as `prompt_layers`, and
/// the file holds what was kept.
///
/// `α = 0`; weights and biases `U(±1/√in)`, `W₁ [hidden, m]`, `W₂ [m, hidden]`. Parameters:
/// `L·(m·(hidden + 1) + hidden·(m + 1))`; in a search `L` is every block, and there are `L` gates more. Plain layers stand
/// for the paper's hypercomplex ones (PHM), and its term for the consistency of the gates (SPT-DARTS) is not here: it
/// compares two passes over each batch. That the pooling is LPT's, how all begins, and what is drawn again are as we
/// remember the paper, for want of its code. A model that predicts the words it reads is refused: the prompt would tell
/// it. It does not fold. HF PEFT does not have it: the same layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SelectivePromptTuning {
    /// Virtual tokens; default 10.
    pub num_virtual_tokens: usize,
    /// `m`; default 128.
    pub proj_down_size: usize,
    /// `τ`, how much of the prompt before a new one takes the place of; default 0.5. The paper has 0.5 and 1.
    pub tau: f64,
    /// How many blocks are kept; default half of them.
    pub num_prompt_layers: Option<usize>,
    /// The blocks that make a prompt, in ascending order; default: they are searched.
    pub prompt_layers: Option<Vec<usize>>,
    /// Steps before they are chosen; default half of all.
    pub search_steps: Option<usize>,
    /// In the search, every so many steps one is the gates'; default 2.
    pub selection_every: usize,
    /// Steps of the whole training; default: as many as it has.
    pub total_step: Option<usize>,
    /// Seed of the networks that are drawn again; default 0.
    pub second_seed: u64,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for SelectivePromptTuning {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 10,
            proj_down_size: 128,
            tau: 0.5,
            num_prompt_layers: None,
            prompt_layers: None,
            search_steps: None,
            selection_every: 2,
            total_step: None,
            second_seed: 0,
            targets: Targets::default(),
        }
    }
}

/// `α` of a block that was chosen: its `a` is 1.
pub(crate) const OPEN: f32 = 1e30;
/// And of one that was not: its `a` is 0.
pub(crate) const SHUT: f32 = -OPEN;

/// The networks that make prompts, of some blocks or of all.
#[derive(Module, Debug)]
pub struct SelectedPrompts {
    /// `α [L]`, where blocks are searched.
    pub gates: Option<Param<Tensor<1>>>,
    /// `W₁ [L, hidden, m]`.
    pub down: Param<Tensor<3>>,
    /// `b₁ [L, m]`.
    pub down_bias: Param<Tensor<2>>,
    /// `W₂ [L, m, hidden]`.
    pub up: Param<Tensor<3>>,
    /// `b₂ [L, hidden]`.
    pub up_bias: Param<Tensor<2>>,
    /// The blocks that these are of.
    #[module(skip)]
    pub layers: Vec<usize>,
    /// Virtual tokens.
    pub count: usize,
    /// `τ`.
    pub tau: f64,
}

/// Names of its tensors in the file.
const NAMES: [&str; 5] = [
    "prompt_gates",
    "generators_down",
    "generators_down_bias",
    "generators_up",
    "generators_up_bias",
];

/// How `W₁` and `W₂` begin, with their biases.
fn draws(hidden: usize, m: usize) -> [Draw; 2] {
    [hidden, m].map(|fan_in| Draw::Uniform((1.0 / fan_in as f32).sqrt()))
}

impl SelectedPrompts {
    /// The gates' numbers, where blocks are searched.
    pub(crate) fn alphas(&self) -> Option<Vec<f32>> {
        let alphas = self.gates.as_ref()?.val().into_data().convert::<f32>();
        Some(alphas.iter::<f32>().collect())
    }

    /// Which of the networks were kept, once a search has ended.
    pub(crate) fn kept(&self) -> Option<Vec<usize>> {
        let alphas = self.alphas()?;
        let kept = alphas.iter().enumerate().filter(|(_, alpha)| **alpha > 0.0).map(|(at, _)| at);
        let ended = alphas.iter().all(|alpha| alpha.abs() > OPEN / 2.0);
        ended.then(|| kept.collect())
    }

    /// With networks that begin anew, as other parameters: what the optimizer knows of the old ones is of no use.
    pub(crate) fn again(mut self, rng: &mut ChaCha8Rng, device: &Device) -> Self {
        let [_, hidden, m] = self.down.dims();
        let [first, second] = draws(hidden, m);
        self.down = Param::from_tensor(first.tensor(self.down.dims(), rng, device));
        self.down_bias = Param::from_tensor(first.tensor(self.down_bias.dims(), rng, device));
        self.up = Param::from_tensor(second.tensor(self.up.dims(), rng, device));
        self.up_bias = Param::from_tensor(second.tensor(self.up_bias.dims(), rng, device));
        self
    }

    /// `PG(x)` of the network number `at`, `[batch, n, hidden]`.
    fn made(&self, at: usize, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<3> {
        let weights = [&self.down, &self.up].map(|w| w.val().narrow(0, at, 1).squeeze_dim(0));
        let biases =
            [&self.down_bias, &self.up_bias].map(|b| b.val().narrow(0, at, 1).squeeze_dim(0));
        pooled(x, self.count, tokens, weights, biases)
    }
}

impl Adapter for SelectedPrompts {
    fn carried(
        &self,
        block: usize,
        x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        tokens: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        let at = self.layers.iter().position(|layer| *layer == block);
        let shut = |at: &usize| self.alphas().is_some_and(|alphas| alphas[*at] <= SHUT / 2.0);
        let Some(at) = at.filter(|at| !shut(at)) else { return held.cloned() };
        let new = self.made(at, x, tokens);
        let share = match &self.gates {
            Some(gates) => sigmoid(gates.val().narrow(0, at, 1)).reshape([1, 1, 1]) * self.tau,
            None => Tensor::full([1, 1, 1], self.tau, (&new.device().inner(), new.dtype())),
        };
        Some(match held {
            Some(held) => {
                let held = held.clone().cast(new.dtype());
                held.clone() + (new - held) * share
            }
            None => new * share,
        })
    }

    fn virtual_tokens(&self) -> usize {
        self.count
    }
}

impl SelectivePromptTuning {
    /// With this many virtual tokens, made by this many blocks.
    pub fn new(num_virtual_tokens: usize, num_prompt_layers: usize) -> Self {
        let num_prompt_layers = Some(num_prompt_layers);
        Self { num_virtual_tokens, num_prompt_layers, ..Self::default() }
    }

    fn places_of<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>, Error> {
        unread(sites)?;
        blocks(sites)
    }

    /// The blocks that have a network.
    fn layers(&self, site: &Site) -> Result<Vec<usize>, Error> {
        let count = site.fan_in();
        if let Some(kept) = self.num_prompt_layers {
            between("num_prompt_layers", kept, 1, count)?;
        }
        let Some(layers) = &self.prompt_layers else { return Ok((0..count).collect()) };
        let ascending = layers.windows(2).all(|pair| pair[0] < pair[1]);
        match layers.last() {
            Some(last) if ascending && *last < count => Ok(layers.clone()),
            _ => {
                let reason = format!(
                    "expected numbers below {count}, the model's blocks, in ascending order; found {layers:?}"
                );
                Err(Error::config("prompt_layers", reason))
            }
        }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<SelectedPrompts, Error> {
        let layers = self.layers(site)?;
        let (l, hidden, m) = (layers.len(), site.fan_out(), self.proj_down_size);
        let [first, second] = draws(hidden, m);
        let searched = self.prompt_layers.is_none();
        let gates = searched.then(|| from.take(NAMES[0], [l], Draw::Constant(0.0))).transpose()?;
        Ok(SelectedPrompts {
            gates,
            down: from.take(NAMES[1], [l, hidden, m], first)?,
            down_bias: from.take(NAMES[2], [l, m], first)?,
            up: from.take(NAMES[3], [l, m, hidden], second)?,
            up_bias: from.take(NAMES[4], [l, hidden], second)?,
            layers,
            count: self.num_virtual_tokens,
            tau: self.tau,
        })
    }
}

impl Method for SelectivePromptTuning {
    type Adapter = SelectedPrompts;
    type Shared = ();
    const NAME: &'static str = "SELECTIVE_PROMPT_TUNING";
    const KINDS: &'static [Kind] = &[Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(self);
    built!(SelectedPrompts);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)?;
        between("proj_down_size", self.proj_down_size, 1, 1 << 12)?;
        between("selection_every", self.selection_every, 2, 1 << 16)?;
        match self.tau > 0.0 && self.tau <= 1.0 {
            true => Ok(()),
            false => {
                let reason = format!("expected a share in (0, 1], found {}", self.tau);
                Err(Error::config("tau", reason))
            }
        }
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn policy(
        &self,
        _adapters: &Adapters<SelectedPrompts>,
    ) -> Result<Option<Box<dyn Policy<SelectedPrompts>>>, Error> {
        match self.prompt_layers {
            Some(_) => Ok(None),
            None => Ok(Some(Box::new(Search::new(self)?))),
        }
    }

    /// With the blocks that were kept.
    fn finished(mut self, adapters: &Adapters<SelectedPrompts>) -> Self {
        if let Some(kept) = adapters.iter().next().and_then(|(_, adapter)| adapter.kept()) {
            self.prompt_layers = Some(kept);
        }
        self
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let targets = only_saved(targets);
        let plain = Self { targets, proj_down_size: 4, ..Self::new(3, 1) };
        let searched = Self {
            tau: 1.0,
            search_steps: Some(6),
            selection_every: 3,
            total_step: Some(10),
            second_seed: 5,
            ..plain.clone()
        };
        vec![searched, Self { prompt_layers: Some(vec![0]), ..plain }]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (hidden, m) = (site.fan_out(), self.proj_down_size);
        let network = m * (hidden + 1) + hidden * (m + 1);
        match &self.prompt_layers {
            Some(layers) => layers.len() * network,
            None => site.fan_in() * (network + 1),
        }
    }

    fn tensors(&self, _site: &Site, adapter: &SelectedPrompts) -> Vec<(&'static str, TensorData)> {
        let kept = adapter.kept();
        let gates = adapter.gates.as_ref().filter(|_| kept.is_none());
        let gates = gates.map(|gates| (NAMES[0], gates.val().into_data()));
        let networks = [
            (NAMES[1], only(&adapter.down, kept.as_deref())),
            (NAMES[2], only(&adapter.down_bias, kept.as_deref())),
            (NAMES[3], only(&adapter.up, kept.as_deref())),
            (NAMES[4], only(&adapter.up_bias, kept.as_deref())),
        ];
        gates.into_iter().chain(networks).collect()
    }
}

/// Of the networks' numbers, those of the networks that were kept; all where nothing was chosen.
fn only<const D: usize>(of: &Param<Tensor<D>>, kept: Option<&[usize]>) -> TensorData {
    let Some(kept) = kept else { return of.val().into_data() };
    let at: Vec<i32> = kept.iter().map(|&at| at as i32).collect();
    let data = TensorData::new(at, [kept.len()]);
    let at = Tensor::<1, Int>::from_data(data, &of.device().inner());
    of.val().without_autodiff().select(0, at).into_data()
}
