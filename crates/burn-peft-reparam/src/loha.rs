//! LoHa: `W' = W + s·(B₁A₁ ⊙ B₂A₂)`, a Hadamard product of two thin products (arXiv 2108.06098).

use crate::common::{finite, positive, probability};
use crate::lycoris::{Drops, core, indexable, rank, scaling, tucker};
use crate::source::{Draw, Drawn, Read, Source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::nn::conv::{Conv1d, Conv2d};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed, widened,
};
use burn_peft_kernels::linear;
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoHa (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859): `Δ(W) = s·(B₁A₁ ⊙ B₂A₂)`, of rank up to
/// `r²`.
///
/// `Bᵢ [fan_in, r]`, `Aᵢ [r, fan_out]`, `s = alpha / r`; all begin as `U(±1/√fan_in)` of their own, but
/// `B₂ = 0`. Parameters: `2r·(fan_in + fan_out)` a place. With `use_effective_conv2d` a convolution of
/// kernel `k` has Tucker factors `Tᵢ [r, r, k]` between `[r, channels]` and `[r, fan_out]`:
/// `2r·(channels + fan_out + r·k)`. Folds. Names and defaults are HF PEFT's.
///
/// On a linear layer the Hadamard product is one pair of factors of rank `r²` (their Khatri-Rao
/// products), and no weight is formed, as long as `r²·(fan_in + fan_out) < fan_in · fan_out`; larger
/// ranks, and convolutions, compose `Δ(W)` on each call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loha {
    /// Rank of each product; default 8.
    pub r: usize,
    /// Scale of the difference, divided by `r`; default 8.
    #[serde(serialize_with = "crate::common::number")]
    pub alpha: f64,
    /// Probability with which an output's difference is dropped in training; default 0.
    pub rank_dropout: f64,
    /// Probability with which a place's whole difference is dropped in training; default 0.
    pub module_dropout: f64,
    /// Tucker factors for convolutions whose kernel is larger than 1; default false.
    pub use_effective_conv2d: bool,
    /// `true` (default): an identity at the start. `false`: `B₂` is drawn too.
    pub init_weights: bool,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Loha {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            use_effective_conv2d: false,
            init_weights: true,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// One of the two factors of the Hadamard product.
#[derive(Module, Debug)]
pub struct LohaFactor {
    /// `A [r, fan_out]`.
    pub a: Param<Tensor<2>>,
    /// `Bᵀ [r, fan_in]`, or `[r, channels]` beside a core.
    pub b: Param<Tensor<2>>,
    /// The Tucker core `[r, r, height, width]`.
    pub core: Option<Param<Tensor<4>>>,
}

impl LohaFactor {
    /// `B·A`, `[fan_in, fan_out]`.
    fn matrix(&self) -> Tensor<2> {
        match &self.core {
            None => self.b.val().transpose().matmul(self.a.val()),
            Some(core) => tucker(core.val(), self.a.val(), self.b.val()),
        }
    }
}

/// What LoHa trains at one place.
#[derive(Module, Debug)]
pub struct LohaAdapter {
    /// `B₁A₁`.
    pub w1: LohaFactor,
    /// `B₂A₂`.
    pub w2: LohaFactor,
    /// What is dropped in training.
    pub drops: Drops,
    /// `s`.
    pub scaling: f64,
}

/// `[r, n] × [r, n] → [r², n]`: every product of a row of one with a row of the other.
fn khatri_rao(one: Tensor<2>, two: Tensor<2>) -> Tensor<2> {
    let [r, n] = one.dims();
    (one.reshape([r, 1, n]) * two.reshape([1, r, n])).reshape([r * r, n])
}

impl Adapter for LohaAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (one, two) = (&self.w1, &self.w2);
        let ([r, fan_in], [_, fan_out]) = (one.b.dims(), one.a.dims());
        let x = x.clone().cast(one.a.val().dtype());
        let factored = r.saturating_mul(r).saturating_mul(fan_in + fan_out) < fan_in * fan_out;
        let delta = if factored {
            let b = khatri_rao(one.b.val(), two.b.val()).transpose(); // [fan_in, r²]
            let a = khatri_rao(one.a.val(), two.a.val()); // [r², fan_out]
            linear(linear(x, b, None) * self.scaling, a, None)
        } else {
            linear(x, self.weight(&widened(layer.weight.val()))?, None)
        };
        Some(self.drops.apply(delta, 2).cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let x = x.clone().cast(self.w1.a.val().dtype());
        Some(self.drops.apply(composed::conv1d(self, layer, &x)?, 1).cast(y.dtype()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let x = x.clone().cast(self.w1.a.val().dtype());
        Some(self.drops.apply(composed::conv2d(self, layer, &x)?, 1).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for LohaAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.w1.matrix() * self.w2.matrix() * self.scaling)
    }
}

impl Loha {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, alpha: f64, targets: Targets) -> Self {
        Self { r, alpha, targets, ..Self::default() }
    }

    /// Numbers of one factor of the Hadamard product.
    fn numbers(&self, site: &Site, r: usize) -> Option<usize> {
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        match core(self.use_effective_conv2d, site) {
            None => r.checked_mul(fan_in + fan_out),
            Some([height, width]) => {
                let kernel = height * width;
                r.checked_mul(kernel)?.checked_add(fan_in / kernel + fan_out)?.checked_mul(r)
            }
        }
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<LohaAdapter, Error> {
        let r = rank(self.r, &self.rank_pattern, site)?;
        indexable(r, self.numbers(site, r), site)?;
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        let mut factor = |a, b, t| {
            let (a, b, core) = match core(self.use_effective_conv2d, site) {
                None => (from.take(a, [fan_out, r])?.transpose(), from.take(b, [r, fan_in])?, None),
                Some([height, width]) => (
                    from.take(a, [r, fan_out])?,
                    from.take(b, [r, fan_in / (height * width)])?,
                    Some(Param::from_tensor(from.take(t, [r, r, height, width])?)),
                ),
            };
            Ok(LohaFactor { a: Param::from_tensor(a), b: Param::from_tensor(b), core })
        };
        Ok(LohaAdapter {
            w1: factor("hada_w1_a", "hada_w1_b", "hada_t1")?,
            w2: factor("hada_w2_a", "hada_w2_b", "hada_t2")?,
            drops: Drops::new(self.rank_dropout, self.module_dropout, true),
            scaling: scaling(self.alpha, &self.alpha_pattern, site, r)?,
        })
    }
}

impl Method for Loha {
    type Adapter = LohaAdapter;
    type Shared = ();
    const NAME: &'static str = "LOHA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        finite("alpha", self.alpha)?;
        probability("rank_dropout", self.rank_dropout)?;
        probability("module_dropout", self.module_dropout)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LohaAdapter, Error> {
        let zeros: &[&str] = if self.init_weights { &["hada_w2_b"] } else { &[] };
        let draw = |name: &str, shape: &[usize]| Draw::kaiming_but(zeros, name, shape);
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &LohaAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(2, 6.0, targets.clone());
        vec![
            Self { rank_dropout: 0.05, ..plain.clone() },
            // So rarely that no law meets it: a place that is dropped has no gradient.
            Self { module_dropout: 1e-6, ..plain.clone() },
            Self { use_effective_conv2d: true, ..plain.clone() },
            Self { init_weights: false, r: 1, ..plain.clone() }, // factored also on narrow layers
            Self {
                rank_pattern: IndexMap::from([("query".into(), 3)]),
                alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = rank(self.r, &self.rank_pattern, site).unwrap_or(self.r);
        self.numbers(site, r).unwrap_or(0).saturating_mul(2)
    }

    fn tensors(&self, _site: &Site, adapter: &LohaAdapter) -> Vec<(&'static str, TensorData)> {
        let names = [
            (&adapter.w1, ["hada_w1_a", "hada_w1_b", "hada_t1"]),
            (&adapter.w2, ["hada_w2_a", "hada_w2_b", "hada_t2"]),
        ];
        let mut tensors = Vec::new();
        for (factor, [a, b, t]) in names {
            let stored = factor.a.val();
            match &factor.core {
                None => tensors.push((a, stored.transpose().into_data())),
                Some(core) => {
                    tensors.push((a, stored.into_data()));
                    tensors.push((t, core.val().into_data()));
                }
            }
            tensors.push((b, factor.b.val().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LohaAdapter, Error> {
        self.adapter(site, &mut Read { file, device })
    }
}
