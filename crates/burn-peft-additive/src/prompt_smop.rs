//! SMoP: of several short prompts, the one that a router chooses for each row (EMNLP 2023, Choi and others).

use crate::numbers::{Draw, STANDARD};
use crate::prompt::{between, in_front, mean, only_saved, saved_only, words_to_read};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::module::linear;
use burn::tensor::{Distribution, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Sparse mixture of prompts (SMoP, EMNLP 2023, section 2.2): the model reads `[pᵢ·Pᵢ; E(x)]` with
/// `p = softmax(x̄·W ⊙ (1 + δ))` and `i` the largest of `p`.
///
/// The prompts `P [k, n, hidden] ~ N(0, 1)` and the router `W [hidden, k] ~ U(±1/√hidden)` are trained; the authors' router
/// begins orthogonal. `x̄` is the mean of the row's embedded words, padding left out; `δ ~ N(0, 1)`, through which no gradient
/// goes, shakes the router in training, so that all prompts learn. There is no loss that balances them. Parameters:
/// `k·n·hidden + hidden·k`. A model that predicts the words it reads is refused: the choice would tell of them. It does not
/// fold. HF PEFT does not have it: the same layout. All else is as in [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Smop {
    /// `k`; default 4, as in the paper.
    pub num_prompts: usize,
    /// `n`, of each prompt; default 5, as in the paper.
    pub num_virtual_tokens: usize,
    /// Whether the router is shaken in training; default true.
    pub perturb_router: bool,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for Smop {
    fn default() -> Self {
        Self::new(4, 5)
    }
}

/// The prompts and their router.
#[derive(Module, Debug)]
pub struct RoutedPrompts {
    /// `P [k, n, hidden]`.
    pub prompts: Param<Tensor<3>>,
    /// `W [hidden, k]`.
    pub router: Param<Tensor<2>>,
    /// Whether the router is shaken in training.
    pub perturb_router: bool,
}

impl RoutedPrompts {
    /// `p` where it is the largest of its row, and 0 elsewhere, `[batch, k]`.
    fn chosen(&self, x: Tensor<2>) -> Tensor<2> {
        let router = self.router.val();
        let mut logits = linear(x.cast(router.dtype()), router.clone(), None);
        if self.perturb_router && router.is_autodiff() {
            let (shape, normal) = (logits.dims(), Distribution::Normal(0.0, 1.0));
            let shaken = Tensor::<2>::random(shape, normal, &router.device().inner());
            logits = logits.clone() + logits.detach() * shaken;
        }
        let p = softmax(logits, 1);
        let [_, k] = p.dims();
        let largest = p.clone().argmax(1); // [batch, 1]
        let which = Tensor::arange(0..k as i64, &largest.device()).unsqueeze::<2>();
        let [batch, _] = p.dims();
        let is_it = which.expand([batch, k]).equal(largest.expand([batch, k]));
        p.clone() * is_it.float().cast(p.dtype())
    }
}

impl Adapter for RoutedPrompts {
    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        let prompts = self.prompts.val();
        let [k, n, hidden] = prompts.dims();
        let chosen = self.chosen(mean(x, tokens)); // [batch, k]
        let [batch, _] = chosen.dims();
        Some(chosen.matmul(prompts.reshape([k, n * hidden])).reshape([batch, n, hidden]))
    }

    fn virtual_tokens(&self) -> usize {
        self.prompts.dims()[1]
    }
}

impl Smop {
    /// This many prompts of this many virtual tokens.
    pub fn new(num_prompts: usize, num_virtual_tokens: usize) -> Self {
        Self { num_prompts, num_virtual_tokens, perturb_router: true, targets: Targets::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<RoutedPrompts, Error> {
        let (k, n, hidden) = (self.num_prompts, self.num_virtual_tokens, site.fan_out());
        let bound = (1.0 / hidden as f32).sqrt();
        Ok(RoutedPrompts {
            prompts: from.take("prompts", [k, n, hidden], STANDARD)?,
            router: from.take("router", [hidden, k], Draw::Uniform(bound))?,
            perturb_router: self.perturb_router,
        })
    }
}

impl Method for Smop {
    type Adapter = RoutedPrompts;
    type Shared = ();
    const NAME: &'static str = "SMOP";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(words_to_read);
    built!(RoutedPrompts);

    fn check(&self) -> Result<(), Error> {
        between("num_prompts", self.num_prompts, 2, 1 << 12)?;
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3, 2) };
        vec![Self { perturb_router: false, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (k, n, hidden) = (self.num_prompts, self.num_virtual_tokens, site.fan_out());
        k * n * hidden + hidden * k
    }

    fn tensors(&self, _site: &Site, adapter: &RoutedPrompts) -> Vec<(&'static str, TensorData)> {
        vec![
            ("prompts", adapter.prompts.val().into_data()),
            ("router", adapter.router.val().into_data()),
        ]
    }
}
