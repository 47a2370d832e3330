//! Convpass over tokens: a bottleneck with a convolution in it (arXiv 2207.07039).

use crate::fields::{bounded, finite, positive};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, HIDDEN, Hidden, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Convpass (arXiv 2207.07039, section 3.2) in one dimension: `y' = y + s·(f(c(f(x·D + d)))·U + u)`, parallel to the
/// sublayer that read `x`, `D [hidden, r]`, `U [r, hidden]`, and `c(z)ᵢ = z₍ᵢ₋₁₎·C₋ + zᵢ·C₀ + z₍ᵢ₊₁₎·C₊ + b` over a token and
/// its neighbours, each `C [r, r]`.
///
/// The paper's convolution goes over an image, 3 by 3; a text has a line. A neighbour that the model's own attention
/// hides (padding, what comes later, another document) counts 0. `D ~ U(±√(6/(hidden + r)))`, `C₀` the identity,
/// all else 0 at first: an identity. Parameters: `2·r·hidden + 3·r² + 2·r + hidden` a place. It does not fold, and as no
/// cache holds hidden states, generation reads the whole sequence for each token. HF PEFT does not have it; the file
/// holds `adapter_down`, `adapter_up` (weight and bias), `adapter_conv.weight (3, r, r)`, less the identity, and `adapter_conv.bias`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Convpass {
    /// Width of the bottleneck; default 8.
    pub r: usize,
    /// `f`; default gelu.
    pub non_linearity: Nonlinearity,
    /// `s`; default 1.
    pub scaling: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Convpass {
    fn default() -> Self {
        let non_linearity = Nonlinearity::Gelu;
        Self { r: 8, non_linearity, scaling: 1.0, targets: Targets::default() }
    }
}

/// What Convpass trains at one place.
#[derive(Module, Debug)]
pub struct ConvpassAdapter {
    /// `Dᵀ [r, hidden]`.
    pub down: Param<Tensor<2>>,
    /// `d [r]`.
    pub down_bias: Param<Tensor<1>>,
    /// `(C₋, C₀, C₊) [3, r, r]`, less the identity in `C₀`.
    pub conv: Param<Tensor<3>>,
    /// `b [r]`.
    pub conv_bias: Param<Tensor<1>>,
    /// `Uᵀ [hidden, r]`.
    pub up: Param<Tensor<2>>,
    /// `u [hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// `f`.
    #[module(skip)]
    pub non_linearity: Nonlinearity,
    /// `s`.
    pub scaling: f64,
}

/// Each row's states one token further: of the token before where `forth`, of the one behind otherwise; 0 at the end.
fn shifted(z: &Tensor<3>, forth: bool) -> Tensor<3> {
    let [_, seq, _] = z.dims();
    if seq == 1 {
        return z.zeros_like();
    }
    let end = z.clone().narrow(1, 0, 1).zeros_like();
    match forth {
        true => Tensor::cat(vec![end, z.clone().narrow(1, 0, seq - 1)], 1),
        false => Tensor::cat(vec![z.clone().narrow(1, 1, seq - 1), end], 1),
    }
}

/// 1 where a token sees the one at this distance from it, `[batch or 1, seq, 1]`.
fn visible(tokens: &SeenTokens, distance: i64, seq: usize) -> Option<Tensor<3>> {
    let scores = tokens.scores.clone()?;
    let [batch, _, _, total] = scores.dims();
    let at = |i: i64| (i + distance).clamp(0, seq as i64 - 1) as i32;
    let columns: Vec<i32> = (0..seq as i64).map(at).collect();
    let columns = TensorData::new(columns, [1, 1, seq, 1]);
    let columns = Tensor::<4, Int>::from_data(columns, &scores.device());
    let pairs = scores.expand([batch, 1, seq, total]).gather(3, columns.expand([batch, 1, seq, 1]));
    Some(pairs.greater_elem(HIDDEN / 2.0).float().reshape([batch, seq, 1]))
}

impl Adapter for ConvpassAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let (f, conv) = (self.non_linearity, self.conv.val());
        let x = at.x.clone().cast(conv.dtype());
        let ([_, seq, _], [_, r, _]) = (x.dims(), conv.dims());
        let z = f.apply(linear(x, self.down.val().transpose(), Some(self.down_bias.val())));
        let tap = |at: usize| conv.clone().narrow(0, at, 1).reshape([r, r]);
        let mut mixed = z.clone() + linear(z.clone(), tap(1), Some(self.conv_bias.val()));
        for (tap_at, forth, distance) in [(0, true, -1), (2, false, 1)] {
            let mut near = shifted(&z, forth);
            if let Some(sees) = at.tokens.as_ref().and_then(|t| visible(t, distance, seq)) {
                near = near * sees.cast(conv.dtype());
            }
            mixed = mixed + linear(near, tap(tap_at), None);
        }
        let y = linear(f.apply(mixed), self.up.val().transpose(), Some(self.up_bias.val()));
        Some((y * self.scaling).cast(at.y.dtype()))
    }

    fn whole_sequence(&self) -> bool {
        true
    }
}

impl Convpass {
    /// With a bottleneck of this width.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ConvpassAdapter, Error> {
        let (r, hidden) = (self.r, site.fan_out());
        bounded("r", &site.path, [r, hidden.max(3 * r)])?;
        let zero = Draw::Constant(0.0);
        let down = Draw::Uniform((6.0 / (hidden + r) as f32).sqrt());
        Ok(ConvpassAdapter {
            down: from.take("adapter_down.weight", [r, hidden], down)?,
            down_bias: from.take("adapter_down.bias", [r], zero)?,
            conv: from.take("adapter_conv.weight", [3, r, r], zero)?,
            conv_bias: from.take("adapter_conv.bias", [r], zero)?,
            up: from.take("adapter_up.weight", [hidden, r], zero)?,
            up_bias: from.take("adapter_up.bias", [hidden], zero)?,
            non_linearity: self.non_linearity,
            scaling: self.scaling,
        })
    }
}

impl Method for Convpass {
    type Adapter = ConvpassAdapter;
    type Shared = ();
    const NAME: &'static str = "CONVPASS";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const FASTER: &'static [&'static str] = &["up"];

    by_source!(ConvpassAdapter);

    fn check(&self) -> Result<(), Error> {
        finite("scaling", self.scaling)?;
        positive("r", self.r)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, targets.clone());
        vec![Self { scaling: 0.5, non_linearity: Nonlinearity::Tanh, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (r, hidden) = (self.r, site.fan_out());
        2 * r * hidden + 3 * r * r + 2 * r + hidden
    }

    fn tensors(&self, _site: &Site, adapter: &ConvpassAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("adapter_down.weight", adapter.down.val().into_data()),
            ("adapter_down.bias", adapter.down_bias.val().into_data()),
            ("adapter_conv.weight", adapter.conv.val().into_data()),
            ("adapter_conv.bias", adapter.conv_bias.val().into_data()),
            ("adapter_up.weight", adapter.up.val().into_data()),
            ("adapter_up.bias", adapter.up_bias.val().into_data()),
        ]
    }
}
