//! The multi-head parallel adapter: a bottleneck for each head of an attention (arXiv 2110.04366).

use crate::fields::{bounded, finite, positive};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::prompt::saved_only;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, Site, Sites, Strictness, Targets};
use serde::{Deserialize, Serialize};

/// The multi-head parallel adapter of He et al. (arXiv 2110.04366, section 4.6) at every attention:
/// `headᵢ' = headᵢ + s·(f(x·Dᵢ + dᵢ)·Uᵢ + uᵢ)` for each of `N` heads before the output layer, `x` what the attention
/// reads, `Dᵢ [hidden, r/N]`, `Uᵢ [r/N, hidden/N]`.
///
/// A head is a part of `hidden/N` channels of what the attention mixes, which is the model's own head where `num_heads`
/// is the model's. `D ~ U(±1/√hidden)`, `U` and biases 0: an identity. Parameters:
/// `r·hidden + r·hidden/N + r + hidden` a place. It does not fold. HF PEFT does not have it; the file holds
/// `adapter_down.weight (r, hidden)` and `adapter_up.weight (hidden, r/N)`, both head by head, and their biases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MultiHeadAdapter {
    /// Width of all heads' bottlenecks together; default 24.
    pub r: usize,
    /// `N`, which divides `r` and the model's width; default 12.
    pub num_heads: usize,
    /// `f`; default relu.
    pub non_linearity: Nonlinearity,
    /// `s`; default 1.
    pub scaling: f64,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for MultiHeadAdapter {
    fn default() -> Self {
        let (non_linearity, targets) = (Nonlinearity::Relu, Targets::default());
        Self { r: 24, num_heads: 12, non_linearity, scaling: 1.0, targets }
    }
}

/// What the multi-head adapter trains at one attention.
#[derive(Module, Debug)]
pub struct HeadsAdapter {
    /// `Dᵀ [r, hidden]`, head by head.
    pub down: Param<Tensor<2>>,
    /// `d [r]`.
    pub down_bias: Param<Tensor<1>>,
    /// `(U₁, …, U_N)ᵀ [hidden, r/N]`, head by head.
    pub up: Param<Tensor<2>>,
    /// `u [hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// `f`.
    #[module(skip)]
    pub non_linearity: Nonlinearity,
    /// `s`.
    pub scaling: f64,
}

impl Adapter for HeadsAdapter {
    fn attention(
        &self,
        x: &Tensor<3>,
        _q: &Tensor<4>,
        _key: &Linear,
        _value: &Linear,
    ) -> Option<Tensor<3>> {
        let (down, up) = (self.down.val(), self.up.val());
        let ([batch, seq, hidden], [r, _], [_, own]) = (x.dims(), down.dims(), up.dims());
        let (heads, dtype) = (r / own, x.dtype());
        let z = linear(x.clone().cast(down.dtype()), down.transpose(), Some(self.down_bias.val()));
        let z = self.non_linearity.apply(z).reshape([batch, seq, heads, own]).swap_dims(1, 2);
        let up = up.reshape([1, heads, hidden / heads, own]).swap_dims(2, 3);
        let y = z.matmul(up).swap_dims(1, 2).reshape([batch, seq, hidden]); // [b, n, s, d] before
        Some(((y + self.up_bias.val().unsqueeze()) * self.scaling).cast(dtype))
    }
}

/// Names of an attention's layer for queries.
const QUERIES: [&str; 2] = ["query", "q_proj"];

impl MultiHeadAdapter {
    /// With bottlenecks of this width, all heads' together.
    pub fn new(r: usize, num_heads: usize) -> Self {
        Self { r, num_heads, ..Self::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<HeadsAdapter, Error> {
        let (r, hidden, heads) = (self.r, site.fan_in(), self.num_heads);
        bounded("r", &site.path, [r, hidden])?;
        if !hidden.is_multiple_of(heads) {
            let reason = format!("expected a divisor of {hidden}, the width, found {heads}");
            return Err(Error::config("num_heads", reason));
        }
        let zero = Draw::Constant(0.0);
        let down = Draw::Uniform((1.0 / hidden.max(1) as f32).sqrt());
        Ok(HeadsAdapter {
            down: from.take("adapter_down.weight", [r, hidden], down)?,
            down_bias: from.take("adapter_down.bias", [r], zero)?,
            up: from.take("adapter_up.weight", [hidden, r / heads], zero)?,
            up_bias: from.take("adapter_up.bias", [hidden], zero)?,
            non_linearity: self.non_linearity,
            scaling: self.scaling,
        })
    }
}

impl Method for MultiHeadAdapter {
    type Adapter = HeadsAdapter;
    type Shared = ();
    const NAME: &'static str = "MULTI_HEAD_ADAPTER";
    const KINDS: &'static [Kind] = &[Kind::Attention];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const FASTER: &'static [&'static str] = &["up"];

    by_source!(HeadsAdapter);

    fn places<'s>(&self, sites: &'s Sites, _: Strictness) -> Result<Vec<&'s Site>, Error> {
        let attention = |site: &&Site| site.kind == Kind::Attention;
        let found: Vec<&Site> = sites.between.iter().filter(attention).collect();
        if found.is_empty() {
            return Err(Error::config("num_heads", "expected a model with attentions; found none"));
        }
        for site in &found {
            let queries =
                QUERIES.iter().find_map(|name| sites.get(&format!("{}.{name}", site.path)));
            if let Some(wide) = queries.map(Site::fan_out).filter(|wide| *wide != site.fan_in()) {
                let width = site.fan_in();
                let reason = format!(
                    "its heads are {wide} wide together; expected {width}, as wide as what it reads"
                );
                return Err(Error::place(&site.path, reason));
            }
        }
        Ok(found)
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        positive("num_heads", self.num_heads)?;
        finite("scaling", self.scaling)?;
        match self.r.is_multiple_of(self.num_heads) {
            true => Ok(()),
            false => {
                let reason = format!(
                    "expected a multiple of {}, the heads, found {}",
                    self.num_heads, self.r
                );
                Err(Error::config("r", reason))
            }
        }
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let targets = crate::prompt::only_saved(targets);
        let plain = Self { targets, ..Self::new(6, 2) };
        let other = Self { r: 4, num_heads: 4, scaling: 0.5, ..plain.clone() };
        vec![Self { non_linearity: Nonlinearity::Tanh, ..other }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (r, hidden) = (self.r, site.fan_in());
        r * hidden + r / self.num_heads * hidden + r + hidden
    }

    fn tensors(&self, _site: &Site, adapter: &HeadsAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("adapter_down.weight", adapter.down.val().into_data()),
            ("adapter_down.bias", adapter.down_bias.val().into_data()),
            ("adapter_up.weight", adapter.up.val().into_data()),
            ("adapter_up.bias", adapter.up_bias.val().into_data()),
        ]
    }
}
