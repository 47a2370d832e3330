//! Convpass: a bottleneck with a convolution in it, over tokens or over an image (arXiv 2207.07039).

use crate::fields::{bounded, finite, positive};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::module::{conv2d, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Grid, HIDDEN, Hidden, Kind, Method, SeenTokens, Site, Sites, Strictness,
    Targets,
};
use serde::{Deserialize, Serialize};

/// Convpass (arXiv 2207.07039, section 3.2): `y' = y + s·(f(c(f(x·D + d)))·U + u)`, parallel to the sublayer that read
/// `x`, `D [hidden, r]`, `U [r, hidden]`, and `c` a convolution of a token and its neighbours, each with its own
/// `C [r, r]`, and a bias `b`.
///
/// The paper's goes over the patches of an image, 3 by 3 (`image`), where a class token, or another that is no patch,
/// goes through the middle `C₀` alone. A text has a line: `c(z)ᵢ = z₍ᵢ₋₁₎·C₋ + zᵢ·C₀ + z₍ᵢ₊₁₎·C₊ + b`, where a neighbour that the
/// model's own attention hides (padding, what comes later, another document) counts 0. `D ~ U(±√(6/(hidden + r)))`, `C₀`
/// the identity, all else 0 at first: an identity. Parameters: `2·r·hidden + n·r² + 2·r + hidden` a place, `n` 9 or 3. It
/// does not fold, and as no cache holds hidden states, generation reads the whole sequence for each token. HF PEFT does not
/// have it; the file holds `adapter_down`, `adapter_up` (weight and bias), `adapter_conv.weight (n, r, r)`, row by row from
/// the top left and from inputs to outputs, less the identity, and `adapter_conv.bias`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Convpass {
    /// Width of the bottleneck; default 8.
    pub r: usize,
    /// `f`; default gelu.
    pub non_linearity: Nonlinearity,
    /// `s`; default 1.
    pub scaling: f64,
    /// Over the patches of an image, 3 by 3, for models that read images; default false.
    pub image: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Convpass {
    fn default() -> Self {
        let non_linearity = Nonlinearity::Gelu;
        Self { r: 8, non_linearity, scaling: 1.0, image: false, targets: Targets::default() }
    }
}

/// What Convpass trains at one place.
#[derive(Module, Debug)]
pub struct ConvpassAdapter {
    /// `Dᵀ [r, hidden]`.
    pub down: Param<Tensor<2>>,
    /// `d [r]`.
    pub down_bias: Param<Tensor<1>>,
    /// `(C₋, C₀, C₊) [3, r, r]`, or `[9, r, r]` over images, less the identity in `C₀`.
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

impl ConvpassAdapter {
    /// `C` of a neighbour.
    fn tap(&self, at: usize) -> Tensor<2> {
        let conv = self.conv.val();
        let [_, r, _] = conv.dims();
        conv.narrow(0, at, 1).reshape([r, r])
    }

    /// `z·C₀ + b`.
    fn alone(&self, z: Tensor<3>, middle: usize) -> Tensor<3> {
        z.clone() + linear(z, self.tap(middle), Some(self.conv_bias.val()))
    }

    /// `c` over a line of tokens.
    fn line(&self, z: Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<3> {
        let [_, seq, _] = z.dims();
        let mut mixed = self.alone(z.clone(), 1);
        for (tap, forth, distance) in [(0, true, -1), (2, false, 1)] {
            let mut near = shifted(&z, forth);
            if let Some(sees) = tokens.and_then(|t| visible(t, distance, seq)) {
                near = near * sees.cast(z.dtype());
            }
            mixed = mixed + linear(near, self.tap(tap), None);
        }
        mixed
    }

    /// `c` over the patches of an image.
    fn plane(&self, z: Tensor<3>, grid: Option<Grid>) -> Tensor<3> {
        let [batch, seq, r] = z.dims();
        let Grid { first, rows, columns } =
            grid.unwrap_or(Grid { first: seq, rows: 0, columns: 0 });
        let count = rows * columns;
        if count == 0 || first + count > seq {
            return self.alone(z, 4);
        }
        let patches = z.clone().narrow(1, first, count);
        let picture = patches.clone().swap_dims(1, 2).reshape([batch, r, rows, columns]);
        // [9, in, out] -> [out, in, 3, 3]
        let weight = self.conv.val().permute([2, 1, 0]).reshape([r, r, 3, 3]);
        let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
        let mixed = conv2d(picture, weight, Some(self.conv_bias.val()), options);
        let mixed = patches + mixed.reshape([batch, r, count]).swap_dims(1, 2);
        let mut parts = Vec::new();
        for (at, length, middle) in [
            (0, first, None),
            (first, count, Some(mixed)),
            (first + count, seq - first - count, None),
        ] {
            if length > 0 {
                parts
                    .push(middle.unwrap_or_else(|| self.alone(z.clone().narrow(1, at, length), 4)));
            }
        }
        Tensor::cat(parts, 1)
    }
}

impl Adapter for ConvpassAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let (f, down) = (self.non_linearity, self.down.val());
        let x = at.x.clone().cast(down.dtype());
        let z = f.apply(linear(x, down.transpose(), Some(self.down_bias.val())));
        let mixed = match self.conv.dims() {
            [9, ..] => self.plane(z, at.grid),
            _ => self.line(z, at.tokens.as_ref()),
        };
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

    /// The paper's own, for models that read images.
    pub fn over_images(r: usize, targets: Targets) -> Self {
        Self { image: true, ..Self::new(r, targets) }
    }

    /// Neighbours with the token itself.
    fn taps(&self) -> usize {
        if self.image { 9 } else { 3 }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ConvpassAdapter, Error> {
        let (r, hidden) = (self.r, site.fan_out());
        bounded("r", &site.path, [r, hidden.max(self.taps() * r)])?;
        let zero = Draw::Constant(0.0);
        let down = Draw::Uniform((6.0 / (hidden + r) as f32).sqrt());
        Ok(ConvpassAdapter {
            down: from.take("adapter_down.weight", [r, hidden], down)?,
            down_bias: from.take("adapter_down.bias", [r], zero)?,
            conv: from.take("adapter_conv.weight", [self.taps(), r, r], zero)?,
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

    fn places<'s>(&self, sites: &'s Sites, strictness: Strictness) -> Result<Vec<&'s Site>, Error> {
        if self.image && !sites.all.iter().any(|site| site.kind == Kind::Conv2d) {
            let reason = "expected a model that reads images, found none of its convolutions; for a text leave \
                          it out";
            return Err(Error::config("image", reason));
        }
        self.targets.select(sites, Self::KINDS, strictness)
    }

    fn check(&self) -> Result<(), Error> {
        finite("scaling", self.scaling)?;
        positive("r", self.r)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, targets.clone());
        let image = Self::over_images(2, targets.clone());
        let tanh = Self { scaling: 0.5, non_linearity: Nonlinearity::Tanh, ..plain.clone() };
        vec![tanh, Self { non_linearity: Nonlinearity::Tanh, ..image }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (r, hidden) = (self.r, site.fan_out());
        2 * r * hidden + self.taps() * r * r + 2 * r + hidden
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
