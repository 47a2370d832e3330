//! Bottleneck adapters over hidden states: serial, Pfeiffer's, parallel, and their kin (arXiv 1902.00751).

use crate::fields::{finite, probability};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::{Draw, dropped};
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Hidden, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// A bottleneck adapter: `y' = y + s·(f(h·D + d)·U + u)`, `D [hidden, r]`, `U [r, hidden]`, over hidden states:
/// `y` is what a sublayer or a block gives on, `h` what the options say.
///
/// Parameters: `2·r·hidden + r + hidden` a place, `r = hidden / reduction_factor`. It does not fold. Fields and
/// defaults are those of AdapterHub's `BnConfig`; the file is laid out as all others here, with `adapter_down.weight
/// (r, hidden)`, `adapter_up.weight (hidden, r)`, their biases, and `adapter_norm_before` and `scaling` where there are
/// such.
///
/// | named | options | paper |
/// |---|---|---|
/// | [`houlsby`](Self::houlsby) | serial, after attention and feed-forward part | 1902.00751 |
/// | [`pfeiffer`](Self::pfeiffer) | serial, after the feed-forward part, reads the normed sum | 2005.00247 |
/// | [`residual`](Self::residual) | over blocks, with a norm of its own | 2004.03829 |
/// | [`parallel`](Self::parallel), [`scaled_parallel`](Self::scaled_parallel) | reads the stream that the sublayer read | 2110.04366 |
/// | [`adapter_plus`](Self::adapter_plus) | a scale a channel, whole rows dropped | 2406.06820 |
/// | [`adapt_former`](Self::adapt_former) | parallel to the feed-forward part, `s = 0.1` | 2205.13535 |
/// | [`ciat`](Self::ciat) | parallel behind a norm, and a [`residual`](Self::residual) at the embeddings beside it | 2104.08154 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bottleneck {
    /// `hidden / r`, rounded so that `r` is whole and at least 1; default 16.
    pub reduction_factor: f64,
    /// `f`; default relu.
    pub non_linearity: Nonlinearity,
    /// `h` is the residual stream that the sublayer read, and not `y`; default false.
    pub is_parallel: bool,
    /// `h` is the sum of `y` and the residual stream, after the model's own norm where it has one there;
    /// default false. At a block, `y` is the sum already.
    pub original_ln_before: bool,
    /// `h` goes through a trained norm of the adapter's own, `2·hidden` more parameters; default false.
    pub ln_before: bool,
    /// `s`: a number, "learned" (one, from 1) or "channel" (`[hidden]`, from 1); default 1.
    pub scaling: Scaling,
    /// How `D` and `U` begin; default "bert".
    pub init_weights: BottleneckInit,
    /// Probability with which a number of the output is zeroed in training; default 0.
    pub dropout: f64,
    /// Probability with which a row of the batch goes without the adapter in training; default 0.
    pub stochastic_depth: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Bottleneck {
    fn default() -> Self {
        Self {
            reduction_factor: 16.0,
            non_linearity: Nonlinearity::Relu,
            is_parallel: false,
            original_ln_before: false,
            ln_before: false,
            scaling: Scaling::Fixed(1.0),
            init_weights: BottleneckInit::Bert,
            dropout: 0.0,
            stochastic_depth: 0.0,
            targets: Targets::default(),
        }
    }
}

/// The scale of a [`Bottleneck`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scaling {
    /// This number.
    Fixed(f64),
    /// Trained.
    Trained(TrainedScaling),
}

/// A scale that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainedScaling {
    /// One number.
    Learned,
    /// One for each channel.
    Channel,
}

/// How the matrices of a [`Bottleneck`] begin; biases begin as 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BottleneckInit {
    /// Both from `N(0, 0.02²)`.
    #[default]
    Bert,
    /// Both from `N(0, 0.01²)`, cut off at two standard deviations.
    Houlsby,
    /// `D ~ U(±1/√hidden)`, `U = 0`: an identity.
    MamAdapter,
}

impl BottleneckInit {
    /// Beginnings of `D` and `U`.
    pub(crate) fn draws(self, hidden: usize) -> [Draw; 2] {
        match self {
            Self::Bert => [Draw::Normal(0.0, 0.02); 2],
            Self::Houlsby => [Draw::Truncated(0.01); 2],
            Self::MamAdapter => {
                let bound = (1.0 / hidden.max(1) as f32).sqrt();
                [Draw::Uniform(bound), Draw::Constant(0.0)]
            }
        }
    }
}

/// A trained norm over the last axis, as PyTorch's `LayerNorm`.
#[derive(Module, Debug)]
pub struct OwnNorm {
    /// `[hidden]`.
    pub weight: Param<Tensor<1>>,
    /// `[hidden]`.
    pub bias: Param<Tensor<1>>,
}

impl OwnNorm {
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() - x.mean_dim(2);
        let deviation = (x.clone().square().mean_dim(2) + 1e-5).sqrt();
        x / deviation * self.weight.val().unsqueeze() + self.bias.val().unsqueeze()
    }
}

/// What a bottleneck adapter trains at one place.
#[derive(Module, Debug)]
pub struct BottleneckAdapter {
    /// `Dᵀ [r, hidden]`.
    pub down: Param<Tensor<2>>,
    /// `d [r]`.
    pub down_bias: Param<Tensor<1>>,
    /// `Uᵀ [hidden, r]`.
    pub up: Param<Tensor<2>>,
    /// `u [hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// The norm before `D`.
    pub norm: Option<OwnNorm>,
    /// `s`, where it is trained: `[1]` or `[hidden]`.
    pub scaling: Option<Param<Tensor<1>>>,
    /// What was asked for.
    #[module(skip)]
    pub how: Bottleneck,
}

/// What an adapter reads: `y`, the stream that the sublayer read, or the sum of both.
pub(crate) fn read(at: &Hidden<'_>, is_parallel: bool, original_ln_before: bool) -> Tensor<3> {
    if is_parallel {
        return at.x.clone();
    }
    if !(original_ln_before && at.is_added) {
        return at.y.clone();
    }
    let sum = at.y.clone() + at.x.clone();
    at.norm.map_or(sum.clone(), |norm| norm.forward(sum))
}

impl Adapter for BottleneckAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let matrices = [self.down.val(), self.up.val()];
        let biases = [self.down_bias.val(), self.up_bias.val()];
        let trained = self.scaling.as_ref().map(Param::val);
        Some(self.how.difference(at, matrices, biases, self.norm.as_ref(), trained))
    }

    /// Stochastic depth draws a number for a row of the batch.
    fn by_token(&self) -> bool {
        self.how.stochastic_depth == 0.0
    }
}

impl Bottleneck {
    /// The serial adapter of Houlsby et al. (arXiv 1902.00751): swish, both matrices near 0. For
    /// `attention.output` and `output` in BERT, `self_attn` and `mlp` in Llama.
    pub fn houlsby(reduction_factor: f64, targets: Targets) -> Self {
        Self {
            reduction_factor,
            non_linearity: Nonlinearity::Swish,
            init_weights: BottleneckInit::Houlsby,
            targets,
            ..Self::default()
        }
    }

    /// The adapter of Pfeiffer et al. (arXiv 2005.00247), for the feed-forward part alone.
    pub fn pfeiffer(reduction_factor: f64, targets: Targets) -> Self {
        Self { reduction_factor, original_ln_before: true, targets, ..Self::default() }
    }

    /// The residual adapter of Lin et al. (arXiv 2004.03829), for blocks.
    pub fn residual(reduction_factor: f64, targets: Targets) -> Self {
        Self { reduction_factor, ln_before: true, targets, ..Self::default() }
    }

    /// The parallel adapter of He et al. (arXiv 2110.04366).
    pub fn parallel(reduction_factor: f64, targets: Targets) -> Self {
        let init_weights = BottleneckInit::MamAdapter;
        Self { reduction_factor, is_parallel: true, init_weights, targets, ..Self::default() }
    }

    /// The layer adapters of CIAT (arXiv 2104.08154), parallel to attention and feed-forward part, behind a norm of
    /// their own. Its embedding adapter is a [`residual`](Self::residual) at the embeddings, which is trained together
    /// with them (`save_together` of the core).
    pub fn ciat(reduction_factor: f64, targets: Targets) -> Self {
        Self { ln_before: true, is_parallel: true, ..Self::residual(reduction_factor, targets) }
    }

    /// [`parallel`](Self::parallel) with `s = 4`.
    pub fn scaled_parallel(reduction_factor: f64, targets: Targets) -> Self {
        Self { scaling: Scaling::Fixed(4.0), ..Self::parallel(reduction_factor, targets) }
    }

    /// Adapter+ (arXiv 2406.06820).
    pub fn adapter_plus(reduction_factor: f64, targets: Targets) -> Self {
        Self {
            reduction_factor,
            non_linearity: Nonlinearity::Gelu,
            original_ln_before: true,
            scaling: Scaling::Trained(TrainedScaling::Channel),
            init_weights: BottleneckInit::Houlsby,
            stochastic_depth: 0.1,
            targets,
            ..Self::default()
        }
    }

    /// AdaptFormer (arXiv 2205.13535), for feed-forward parts.
    pub fn adapt_former(reduction_factor: f64, targets: Targets) -> Self {
        Self { scaling: Scaling::Fixed(0.1), ..Self::parallel(reduction_factor, targets) }
    }

    /// `s·(f(h·D + d)·U + u)` with `Dᵀ` and `Uᵀ`, `d` and `u`, and `s` where it is trained.
    pub(crate) fn difference(
        &self,
        at: &Hidden<'_>,
        [down, up]: [Tensor<2>; 2],
        [down_bias, up_bias]: [Tensor<1>; 2],
        norm: Option<&OwnNorm>,
        trained: Option<Tensor<1>>,
    ) -> Tensor<3> {
        let h = read(at, self.is_parallel, self.original_ln_before).cast(down.dtype());
        let h = norm.map_or(h.clone(), |norm| norm.forward(h));
        let [batch, seq, width] = h.dims();
        let h = linear(h, down.clone().transpose(), Some(down_bias)); // [batch, seq, r]
        let up = linear(self.non_linearity.apply(h), up.transpose(), Some(up_bias));
        let scaled = match (trained, self.scaling) {
            (Some(scaling), _) => up * scaling.unsqueeze(),
            (None, Scaling::Fixed(s)) if s != 1.0 => up * s,
            _ => up,
        };
        let kept = dropped(scaled, self.dropout, [batch, seq, width], &down);
        dropped(kept, self.stochastic_depth, [batch, 1, 1], &down).cast(at.y.dtype())
    }

    fn width(&self, site: &Site) -> Result<usize, Error> {
        width(self.reduction_factor, site)
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<BottleneckAdapter, Error> {
        let (r, hidden) = (self.width(site)?, site.fan_out());
        let [down, up] = self.init_weights.draws(hidden);
        let (zero, one) = (Draw::Constant(0.0), Draw::Constant(1.0));
        let scaling = match self.scaling {
            Scaling::Fixed(_) => None,
            Scaling::Trained(TrainedScaling::Learned) => Some([1]),
            Scaling::Trained(TrainedScaling::Channel) => Some([hidden]),
        };
        Ok(BottleneckAdapter {
            down: from.take("adapter_down.weight", [r, hidden], down)?,
            down_bias: from.take("adapter_down.bias", [r], zero)?,
            up: from.take("adapter_up.weight", [hidden, r], up)?,
            up_bias: from.take("adapter_up.bias", [hidden], zero)?,
            norm: match self.ln_before {
                true => Some(OwnNorm {
                    weight: from.take("adapter_norm_before.weight", [hidden], one)?,
                    bias: from.take("adapter_norm_before.bias", [hidden], zero)?,
                }),
                false => None,
            },
            scaling: scaling.map(|shape| from.take("scaling", shape, one)).transpose()?,
            how: self.clone(),
        })
    }
}

/// `r` at a place, from 1 to a multiple of its width that a tensor holds.
pub(crate) fn width(reduction_factor: f64, site: &Site) -> Result<usize, Error> {
    let r = ((site.fan_out() as f64 / reduction_factor) as usize).max(1);
    crate::fields::bounded("reduction_factor", &site.path, [r, site.fan_out()])?;
    Ok(r)
}

/// Refuses what is no factor.
pub(crate) fn check_factor(reduction_factor: f64) -> Result<(), Error> {
    match reduction_factor.is_finite() && reduction_factor > 0.0 {
        true => Ok(()),
        false => {
            let reason = format!("expected a number above 0, found {reduction_factor}");
            Err(Error::config("reduction_factor", reason))
        }
    }
}

impl Method for Bottleneck {
    type Adapter = BottleneckAdapter;
    type Shared = ();
    const NAME: &'static str = "BOTTLENECK";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(BottleneckAdapter);

    fn check(&self) -> Result<(), Error> {
        check_factor(self.reduction_factor)?;
        if let Scaling::Fixed(scaling) = self.scaling {
            finite("scaling", scaling)?;
        }
        probability("dropout", self.dropout)?;
        probability("stochastic_depth", self.stochastic_depth)?;
        match self.is_parallel && self.original_ln_before {
            false => Ok(()),
            true => {
                let reason = "says to read the sum, and is_parallel the stream alone; expected one";
                Err(Error::config("original_ln_before", reason))
            }
        }
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights == BottleneckInit::MamAdapter
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let to = || targets.clone();
        let saved = Some(vec!["head".into()]);
        let learned = Scaling::Trained(TrainedScaling::Learned);
        vec![
            Self { dropout: 0.2, scaling: learned, ..Self::pfeiffer(4.0, to()) },
            Self { non_linearity: Nonlinearity::Tanh, ..Self::residual(0.5, to()) },
            Self { non_linearity: Nonlinearity::Linear, ..Self::parallel(3.0, to()) },
            Self::scaled_parallel(2.0, Targets { modules_to_save: saved, ..to() }),
            Self::adapter_plus(2.0, to()),
            Self { non_linearity: Nonlinearity::GeluNew, ..Self::adapt_former(2.0, to()) },
            Self::ciat(2.0, to()),
            Self::houlsby(2.0, to()),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (r, hidden) = (self.width(site).unwrap_or(0), site.fan_out());
        let norm = if self.ln_before { 2 * hidden } else { 0 };
        let scaling = match self.scaling {
            Scaling::Fixed(_) => 0,
            Scaling::Trained(TrainedScaling::Learned) => 1,
            Scaling::Trained(TrainedScaling::Channel) => hidden,
        };
        2 * r * hidden + r + hidden + norm + scaling
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &BottleneckAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![
            ("adapter_down.weight", adapter.down.val().into_data()),
            ("adapter_down.bias", adapter.down_bias.val().into_data()),
            ("adapter_up.weight", adapter.up.val().into_data()),
            ("adapter_up.bias", adapter.up_bias.val().into_data()),
        ];
        if let Some(norm) = &adapter.norm {
            tensors.push(("adapter_norm_before.weight", norm.weight.val().into_data()));
            tensors.push(("adapter_norm_before.bias", norm.bias.val().into_data()));
        }
        if let Some(scaling) = &adapter.scaling {
            tensors.push(("scaling", scaling.val().into_data()));
        }
        tensors
    }
}
