//! LoKr: `W' = W + s·(W₁ ⊗ W₂)`, a Kronecker product of two small matrices (arXiv 2309.14859).

use crate::common::{finite, positive, probability};
use crate::lycoris::{Drops, core, rank, scaling, tucker};
use crate::source::{Draw, Drawn, Factor, Read, Source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::nn::conv::{Conv1d, Conv2d};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoKr (LyCORIS, arXiv 2309.14859): `Δ(W) = s·(W₁ ⊗ W₂)`, `s = alpha / r`.
///
/// With `fan_in = m·n` and `fan_out = l·k` (each as near to its square root as divisors allow, or as
/// `decompose_factor` says), `W₁ [m, l]` and `W₂ [n, k]`. Where `r < max(k, n) / 2`, `W₂` is a product
/// of two factors of rank `r`; with `decompose_both`, `W₁` likewise. For a convolution `m·n` are its
/// channels and `W₂ [n·kernel, k]`; thin, it is `[n·kernel, r]·[r, k]` or, with `use_effective_conv2d`,
/// a Tucker core `[r, r, kernel]` between `[r, n]` and `[r, k]`. All begin as `U(±1/√fan_in)` of their
/// own, but `W₁` (of two factors: the one of the outputs) is zero. Parameters: `l·m` or
/// `r·(l + m)`, and `k·n·kernel`, `r·(k + n·kernel)` or `r·(k + n + r·kernel)`. Folds. Names and
/// defaults are HF PEFT's.
///
/// On a linear layer `x·(W₁ ⊗ W₂)` is `W₂` along one axis of `x [m, n]` and `W₁` along the other, so that
/// the Kronecker product is never formed; convolutions compose `Δ(W)` on each call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lokr {
    /// Rank of the matrices that are decomposed; default 8.
    pub r: usize,
    /// Scale of the difference, divided by `r`; default 8.
    #[serde(serialize_with = "crate::common::number")]
    pub alpha: f64,
    /// Probability with which an output's difference is dropped in training; default 0.
    pub rank_dropout: f64,
    /// Probability with which a place's whole difference is dropped in training; default 0.
    pub module_dropout: f64,
    /// A Tucker core for convolutions whose kernel is larger than 1; default false.
    pub use_effective_conv2d: bool,
    /// Decompose `W₁` too, where `r < max(l, m) / 2`; default false.
    pub decompose_both: bool,
    /// The first of the two divisors, or where it divides nothing the largest for it; default -1, near
    /// the square root.
    pub decompose_factor: i64,
    /// Whether the outputs that `rank_dropout` leaves make up for the others; default false.
    pub rank_dropout_scale: bool,
    /// How the matrices begin; default `true`.
    pub init_weights: LokrInit,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Lokr {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            use_effective_conv2d: false,
            decompose_both: false,
            decompose_factor: -1,
            rank_dropout_scale: false,
            init_weights: LokrInit::Default(true),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// How LoKr's matrices begin: HF PEFT's `init_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LokrInit {
    /// `true`: `W₁`, or its factor of the outputs, is zero. `false`: nothing is, which is no identity.
    Default(bool),
    /// "lycoris": `W₂`, or its factor of the inputs, is zero.
    Named(String),
}

/// What LoKr trains at one place.
#[derive(Module, Debug)]
pub struct LokrAdapter {
    /// `W₁ [m, l]`, or `[m, r]·[r, l]`.
    pub w1: Factor,
    /// `W₂ [n · kernel, k]`, or `[n · kernel, r]·[r, k]`; beside a core `[n, r]` and `[r, k]`.
    pub w2: Factor,
    /// The Tucker core `[r, r, height, width]`.
    pub core: Option<Param<Tensor<4>>>,
    /// What is dropped in training.
    pub drops: Drops,
    /// `s`.
    pub scaling: f64,
    /// Kernel of a convolution over time with a whole `W₂`: there HF PEFT multiplies a matrix with a
    /// tensor of three axes, and PyTorch pairs the matrix with the last two of them.
    #[module(skip)]
    pub shifted: Option<usize>,
}

impl Adapter for LokrAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let ([batch, seq, _], [m, _], [n, _]) = (x.dims(), self.w1.dims(), self.w2.dims());
        let x = x.clone().cast(self.w1.a.val().dtype()).reshape([batch * seq, m, n]);
        let h = self.w2.after(x).swap_dims(1, 2); // [.., k, m]
        let delta = self.w1.after(h * self.scaling).swap_dims(1, 2); // [.., l, k]
        Some(self.drops.apply(delta.reshape(y.dims()), 2).cast(y.dtype()))
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

impl Fold for LokrAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let w1 = self.w1.matrix() * self.scaling;
        let w2 = match (&self.core, &self.w2.b) {
            (Some(core), Some(b)) => tucker(core.val(), b.val(), self.w2.a.val().transpose()),
            _ => self.w2.matrix(),
        };
        let ([m, l], [n, k]) = (w1.dims(), w2.dims()); // n with the kernel
        Some(match self.shifted {
            None => (w1.reshape([m, 1, l, 1]) * w2.reshape([1, n, 1, k])).reshape([m * n, l * k]),
            Some(kernel) => {
                let w1 = w1.transpose().reshape([1, l, 1, m, 1]);
                let w2 = w2.transpose().reshape([k, 1, n / kernel, 1, kernel]);
                (w1 * w2).reshape([l * k, m * n]).transpose()
            }
        })
    }
}

/// `dimension` as a product of two: `factor` and the rest if it divides, else the pair with the smallest
/// sum whose first is at most `factor` (-1: whatever).
fn factorization(dimension: usize, factor: i64) -> (usize, usize) {
    let limit = usize::try_from(factor).unwrap_or(if factor == -1 { dimension } else { 0 });
    if limit > 0 && factor > 0 && dimension.is_multiple_of(limit) {
        return (limit, dimension / limit);
    }
    let (mut m, mut n) = (1, dimension);
    while m < n {
        let Some(next) = (m + 1..=dimension).find(|&next| dimension.is_multiple_of(next)) else {
            break;
        };
        if next + dimension / next > m + n || next > limit {
            break;
        }
        (m, n) = (next, dimension / next);
    }
    (m.min(n), m.max(n))
}

/// What a place's matrices look like.
struct Shape {
    /// `fan_in = m·n` (a convolution's channels), `fan_out = l·k`.
    m: usize,
    n: usize,
    l: usize,
    k: usize,
    /// Points that a convolution looks at.
    kernel: usize,
    r: usize,
    whole1: bool,
    whole2: bool,
}

impl Lokr {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, alpha: f64, targets: Targets) -> Self {
        Self { r, alpha, targets, ..Self::default() }
    }

    fn shape(&self, site: &Site) -> Result<Shape, Error> {
        let r = rank(self.r, &self.rank_pattern, site)?;
        let kernel = site.weight.shape().iter().skip(2).product();
        let (m, n) = factorization(site.fan_in() / kernel, self.decompose_factor);
        let (l, k) = factorization(site.fan_out(), self.decompose_factor);
        let thin = |one: usize, two: usize| r < one.max(two).div_ceil(2);
        let (whole1, whole2) = (!(self.decompose_both && thin(l, m)), !thin(k, n));
        Ok(Shape { m, n, l, k, kernel, r, whole1, whole2 })
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<LokrAdapter, Error> {
        let Shape { m, n, l, k, kernel, r, whole1, whole2 } = self.shape(site)?;
        let core = core(self.use_effective_conv2d && !whole2, site);
        let w1 = match whole1 {
            true => Factor::whole(from.take("lokr_w1", [l, m])?.transpose()),
            false => {
                let a = from.take("lokr_w1_a", [l, r])?;
                Factor::thin(from.take("lokr_w1_b", [r, m])?.transpose(), a.transpose())
            }
        };
        let w2 = match (whole2, core) {
            (true, _) => {
                let w2 = match *site.weight.shape().as_slice() {
                    [_, _, time] => from.take("lokr_w2", [k, n, time])?.reshape([k, n * time]),
                    [_, _, height, width] => {
                        from.take("lokr_w2", [k, n, height, width])?.reshape([k, n * kernel])
                    }
                    _ => from.take("lokr_w2", [k, n])?,
                };
                Factor::whole(w2.transpose())
            }
            (false, None) => {
                let a = from.take("lokr_w2_a", [k, r])?;
                let b = from.take("lokr_w2_b", [r, n * kernel])?;
                Factor::thin(b.transpose(), a.transpose())
            }
            (false, Some(_)) => {
                let a = from.take("lokr_w2_a", [r, k])?;
                Factor::thin(from.take("lokr_w2_b", [r, n])?.transpose(), a)
            }
        };
        let core = match core {
            Some([height, width]) => Some(from.take("lokr_t2", [r, r, height, width])?),
            None => None,
        };
        Ok(LokrAdapter {
            w1,
            w2,
            core: core.map(Param::from_tensor),
            drops: Drops::new(self.rank_dropout, self.module_dropout, self.rank_dropout_scale),
            scaling: scaling(self.alpha, &self.alpha_pattern, site, r)?,
            shifted: (site.kind == Kind::Conv1d && whole2).then_some(kernel),
        })
    }
}

impl Method for Lokr {
    type Adapter = LokrAdapter;
    type Shared = ();
    const NAME: &'static str = "LOKR";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        if let LokrInit::Named(name) = &self.init_weights
            && name != "lycoris"
        {
            let reason = format!("expected true, false or \"lycoris\", found `{name}`");
            return Err(Error::config("init_weights", reason));
        }
        positive("r", self.r)?;
        finite("alpha", self.alpha)?;
        probability("rank_dropout", self.rank_dropout)?;
        probability("module_dropout", self.module_dropout)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights != LokrInit::Default(false)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LokrAdapter, Error> {
        let zeros: &[&str] = match &self.init_weights {
            LokrInit::Default(true) => &["lokr_w1", "lokr_w1_a"],
            LokrInit::Default(false) => &[],
            LokrInit::Named(_) => &["lokr_w2", "lokr_w2_b"],
        };
        let draw = |name: &str, shape: &[usize]| Draw::kaiming_but(zeros, name, shape);
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &LokrAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(1, 2.0, targets.clone());
        vec![
            Self { rank_dropout: 0.05, rank_dropout_scale: true, ..plain.clone() },
            Self { rank_dropout: 0.05, r: 2, ..plain.clone() },
            // So rarely that no law meets it: a place that is dropped has no gradient.
            Self { module_dropout: 1e-6, ..plain.clone() },
            Self { use_effective_conv2d: true, decompose_factor: 1, ..plain.clone() },
            Self { decompose_both: true, decompose_factor: 4, ..plain.clone() },
            Self { init_weights: LokrInit::Default(false), ..plain.clone() },
            Self { init_weights: LokrInit::Named("lycoris".into()), ..plain.clone() },
            Self {
                rank_pattern: IndexMap::from([("query".into(), 3)]),
                alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let Ok(Shape { m, n, l, k, kernel, r, whole1, whole2 }) = self.shape(site) else {
            return 0;
        };
        let w1 = if whole1 { l * m } else { r * (l + m) };
        w1 + match (whole2, core(self.use_effective_conv2d, site)) {
            (true, _) => k * n * kernel,
            (false, None) => r * (k + n * kernel),
            (false, Some(_)) => r * (k + n + r * kernel),
        }
    }

    fn tensors(&self, site: &Site, adapter: &LokrAdapter) -> Vec<(&'static str, TensorData)> {
        let transposed = |factor: &Param<Tensor<2>>| factor.val().transpose();
        let data = |factor: &Param<Tensor<2>>| transposed(factor).into_data();
        let (w1, w2) = (&adapter.w1, &adapter.w2);
        let mut tensors = match &w1.b {
            None => vec![("lokr_w1", data(&w1.a))],
            Some(b) => vec![("lokr_w1_a", data(b)), ("lokr_w1_b", data(&w1.a))],
        };
        match (&w2.b, &adapter.core, site.weight.shape().as_slice()) {
            (None, _, shape) => {
                let w2 = transposed(&w2.a);
                let [k, inputs] = w2.dims();
                let kernel: usize = shape.iter().skip(2).product();
                let data = match *shape {
                    [_, _, time] => w2.reshape([k, inputs / kernel, time]).into_data(),
                    [_, _, height, width] => {
                        w2.reshape([k, inputs / kernel, height, width]).into_data()
                    }
                    _ => w2.into_data(),
                };
                tensors.push(("lokr_w2", data));
            }
            (Some(b), None, _) => {
                tensors.extend([("lokr_w2_a", data(b)), ("lokr_w2_b", data(&w2.a))]);
            }
            (Some(b), Some(core), _) => {
                tensors.extend([("lokr_w2_a", b.val().into_data()), ("lokr_w2_b", data(&w2.a))]);
                tensors.push(("lokr_t2", core.val().into_data()));
            }
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LokrAdapter, Error> {
        self.adapter(site, &mut Read { file, device })
    }
}
