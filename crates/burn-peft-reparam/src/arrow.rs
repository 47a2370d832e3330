//! Arrow (arXiv 2405.11157): of several LoRAs that were trained apart, each token takes those that suit it.

use crate::common::positive;
use crate::init::Pair;
use crate::lora::LoraAdapter;
use crate::torch_random::TorchRandom;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_core::{Adapter, Adapters, Error};
use burn_peft_kernels::linear;
use serde::{Deserialize, Serialize};

/// How [`arrow`] routes; HF PEFT's names and defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ArrowConfig {
    /// How many experts a token takes; default 3.
    pub top_k: usize,
    /// Divides the scores before their softmax; default 1.
    pub router_temperature: f64,
    /// GenKnowSub (ACL 2025, short paper 54): the mean factors of general adapters are taken off each expert's first.
    pub use_gks: bool,
    /// Seed of the vector at which the search for a prototype begins; HF PEFT begins anywhere without one, here it is 0.
    pub rng_seed: Option<u64>,
}

impl Default for ArrowConfig {
    fn default() -> Self {
        Self { top_k: 3, router_temperature: 1.0, use_gks: false, rng_seed: None }
    }
}

/// Experts at one place, and how a token chooses among them: `y = y0 + Σₑ cₑ·sₑ·x·Aₑ·Bₑ` with `c` the softmax over the
/// `top_k` largest of `|x·pₑ| / temperature`, and 0 for the others. `pₑ` is the direction in which `Aₑ·Bₑ` reads
/// inputs most: its first left singular vector, by 15 rounds of power iteration, as in HF PEFT.
#[derive(Module, Debug)]
pub struct ArrowAdapter {
    /// The LoRAs.
    pub experts: Vec<LoraAdapter>,
    /// `[fan_in, experts]`, constant.
    pub prototypes: Tensor<2>,
    /// How many experts a token takes.
    pub top_k: usize,
    /// Divides the scores.
    pub router_temperature: f64,
}

impl Adapter for ArrowAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let scores = linear(x.clone().cast(self.prototypes.dtype()), self.prototypes.clone(), None);
        let (top, which) = scores.abs().topk_with_indices(self.top_k, 2); // [batch, seq, top_k]
        let shares = softmax(top / self.router_temperature, 2);
        let parts = self.experts.iter().enumerate().filter_map(|(expert, lora)| {
            let chosen = which.clone().equal_elem(expert as i64).float().cast(shares.dtype());
            let share = (shares.clone() * chosen).sum_dim(2); // [batch, seq, 1]
            Some(lora.linear(layer, x, y)? * share.cast(y.dtype()))
        });
        parts.reduce(|sum, part| sum + part)
    }
}

/// Routes each token among `tasks`, LoRAs over the same places of one model; `general` are what GenKnowSub takes
/// off them, with `use_gks`. What it gives is an overlay and no file: the experts keep theirs. It does not fold, since
/// each token has another difference.
///
/// # Errors
/// No expert, or fewer than `top_k`; a temperature that is not above 0; adapters of other places, ranks or kinds than
/// linear layers', or that change more than weights by `s·A·B` (DoRA, `lora_bias`, layers and biases trained whole).
pub fn arrow(
    tasks: &[&Adapters<LoraAdapter>],
    general: &[&Adapters<LoraAdapter>],
    config: &ArrowConfig,
) -> Result<Adapters<ArrowAdapter>, Error> {
    positive("top_k", config.top_k)?;
    if config.top_k > tasks.len() {
        let reason = format!("expected at most {} experts, found {}", tasks.len(), config.top_k);
        return Err(Error::config("top_k", reason));
    }
    if !(config.router_temperature.is_finite() && config.router_temperature > 0.0) {
        let reason = format!("expected more than 0, found {}", config.router_temperature);
        return Err(Error::config("router_temperature", reason));
    }
    if config.use_gks == general.is_empty() {
        let reason = "goes with general adapters, and they with it; expected both or neither";
        return Err(Error::config("use_gks", reason));
    }
    let Some(first) = tasks.first() else {
        return Err(Error::config("task_adapter_names", "expected at least one adapter"));
    };
    for adapters in tasks.iter().chain(general) {
        fits(first, adapters)?;
    }
    let seed = config.rng_seed.unwrap_or(0);
    let mut layers = Vec::new();
    for (path, _) in first.iter() {
        let known: Vec<Pair> =
            general.iter().filter_map(|of| Some(of.get(path)?.factors())).collect();
        let at = |of: &&Adapters<LoraAdapter>| Some(less(of.get(path)?, &known));
        let experts: Vec<LoraAdapter> = tasks.iter().filter_map(at).collect();
        let prototypes = experts.iter().map(|expert| prototype(expert, seed)).collect();
        layers.push((
            path.to_owned(),
            ArrowAdapter {
                experts,
                prototypes: Tensor::cat(prototypes, 1),
                top_k: config.top_k,
                router_temperature: config.router_temperature,
            },
        ));
    }
    Ok(Adapters::new(layers, []))
}

/// Refuses adapters that are no experts beside `first`.
fn fits(first: &Adapters<LoraAdapter>, adapters: &Adapters<LoraAdapter>) -> Result<(), Error> {
    if let Some((path, _)) = adapters.copies().next() {
        let reason = "the layer or its bias is trained whole, and tokens are routed to factors alone; \
                      expected adapters without modules_to_save and bias";
        return Err(Error::place(path, reason));
    }
    let (expected, found) = (first.places(), adapters.places());
    if let Some(path) = expected
        .iter()
        .chain(&found)
        .find(|path| !(expected.contains(path) && found.contains(path)))
    {
        let reason = "one adapter lies here and another does not; expected the same places";
        return Err(Error::place(path, reason));
    }
    for (path, adapter) in adapters.iter() {
        let plain = adapter.variant.is_none() && adapter.lora_bias.is_none();
        if !plain || adapter.constant_a.is_some() {
            let reason = "the adapter is more than s·A·B; expected plain LoRAs";
            return Err(Error::place(path, reason));
        }
        let [expected, found] = [first.get(path), Some(adapter)]
            .map(|adapter| adapter.map(|adapter| adapter.lora_a.dims()));
        if expected != found {
            let reason = format!("expected factors of one rank, found {expected:?} and {found:?}");
            return Err(Error::place(path, reason));
        }
    }
    Ok(())
}

/// The adapter, the mean of the factors in `known` taken off its own.
fn less(adapter: &LoraAdapter, known: &[Pair]) -> LoraAdapter {
    let (mut a, mut b) = adapter.factors();
    let share = 1.0 / known.len().max(1) as f64;
    for (known_a, known_b) in known {
        a = a - known_a.clone() * share;
        b = b - known_b.clone() * share;
    }
    LoraAdapter::of(a, b, adapter.scaling)
}

/// `p [fan_in, 1]`: `v ← A·(B·Bᵀ)·Aᵀ·v`, of length 1.
fn prototype(expert: &LoraAdapter, seed: u64) -> Tensor<2> {
    /// HF PEFT's number of rounds.
    const ROUNDS: usize = 15;
    let (a, b) = expert.factors();
    let (a, b) = (a.without_autodiff().cast(DType::F32), b.without_autodiff().cast(DType::F32));
    let ([fan_in, _], device) = (a.dims(), a.device());
    let start = TorchRandom::manual_seed(seed).normal(fan_in, 0.0, 1.0);
    let unit = |v: Tensor<2>| {
        let length = v.clone().square().sum().sqrt() + 1e-8;
        v / length.unsqueeze()
    };
    let inner = b.clone().matmul(b.transpose()); // [r, r]
    let mut v = unit(Tensor::from_data(TensorData::new(start, [fan_in, 1]), &device));
    for _ in 0..ROUNDS {
        v = unit(a.clone().matmul(inner.clone().matmul(a.clone().transpose().matmul(v))));
    }
    v
}
