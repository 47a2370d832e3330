//! MAD-X's invertible adapter at the embeddings (arXiv 2005.00052).

use crate::bottleneck::check_factor;
use crate::fields::bounded;
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::module::linear;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Hidden, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// The invertible adapter of MAD-X (arXiv 2005.00052, section 3.2.3), a coupling of NICE's: of the two halves of
/// an embedding `e = (e₁, e₂)`, `o₁ = F(e₂) + e₁` and `o₂ = G(o₁) + e₂`.
///
/// `F(x) = f(x·D + d)·U + u`, `D [half, half/reduction_factor]`, and `G` likewise; matrices from `N(0, 0.02²)`, biases
/// 0 at first. It lies over `embeddings` in BERT, `embed_tokens` in Llama. The paper runs it backwards before the output
/// embedding of a language model, which has no place here; [`inverse`](InvertibleAdapter::inverse) is that function.
/// Parameters: those of the four matrices, `4·half²/reduction_factor`, and of their biases. It does not fold. Names in
/// the file and defaults are AdapterHub's for `inv_adapter = "nice"`, `F.0.weight (half/reduction_factor, half)` to
/// `G.2.bias`; HF PEFT does not have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Invertible {
    /// `half / r`, rounded so that `r` is whole and at least 1; default 2.
    pub reduction_factor: f64,
    /// `f`; default relu.
    pub non_linearity: Nonlinearity,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Invertible {
    fn default() -> Self {
        let non_linearity = Nonlinearity::Relu;
        Self { reduction_factor: 2.0, non_linearity, targets: Targets::default() }
    }
}

/// `F` or `G`: a small network from one half to the other.
#[derive(Module, Debug)]
pub struct Coupling {
    /// `Dᵀ`.
    pub down: Param<Tensor<2>>,
    /// `d`.
    pub down_bias: Param<Tensor<1>>,
    /// `Uᵀ`.
    pub up: Param<Tensor<2>>,
    /// `u`.
    pub up_bias: Param<Tensor<1>>,
}

impl Coupling {
    fn forward(&self, x: Tensor<3>, f: Nonlinearity) -> Tensor<3> {
        let h = linear(x, self.down.val().transpose(), Some(self.down_bias.val()));
        linear(f.apply(h), self.up.val().transpose(), Some(self.up_bias.val()))
    }
}

/// What an invertible adapter trains at one place.
#[derive(Module, Debug)]
pub struct InvertibleAdapter {
    /// `F`.
    pub first: Coupling,
    /// `G`.
    pub second: Coupling,
    /// `f`.
    #[module(skip)]
    pub non_linearity: Nonlinearity,
}

/// Both halves of the last axis; the second is the longer one.
fn halves(e: Tensor<3>) -> [Tensor<3>; 2] {
    let [_, _, width] = e.dims();
    [e.clone().narrow(2, 0, width / 2), e.narrow(2, width / 2, width - width / 2)]
}

impl InvertibleAdapter {
    /// `o - e`.
    fn difference(&self, e: &Tensor<3>) -> Tensor<3> {
        let f = self.non_linearity;
        let [e1, e2] = halves(e.clone().cast(self.first.down.val().dtype()));
        let d1 = self.first.forward(e2, f);
        let d2 = self.second.forward(e1 + d1.clone(), f);
        Tensor::cat(vec![d1, d2], 2).cast(e.dtype())
    }

    /// The embedding `e` out of `o`: `e₂ = o₂ - G(o₁)`, `e₁ = o₁ - F(e₂)`, `[batch, seq, hidden]`.
    pub fn inverse(&self, o: Tensor<3>) -> Tensor<3> {
        let f = self.non_linearity;
        let [o1, o2] = halves(o);
        let e2 = o2 - self.second.forward(o1.clone(), f);
        let e1 = o1 - self.first.forward(e2.clone(), f);
        Tensor::cat(vec![e1, e2], 2)
    }
}

impl Adapter for InvertibleAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        Some(self.difference(&at.y))
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        _ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        Some(self.difference(y))
    }

    fn by_token(&self) -> bool {
        true
    }
}

/// Names in the file: `Dᵀ`, `d`, `Uᵀ`, `u`.
const NAMES: [[&str; 4]; 2] = [
    ["F.0.weight", "F.0.bias", "F.2.weight", "F.2.bias"],
    ["G.0.weight", "G.0.bias", "G.2.weight", "G.2.bias"],
];

impl Invertible {
    /// With this reduction and AdapterHub's defaults for the rest.
    pub fn new(reduction_factor: f64, targets: Targets) -> Self {
        Self { reduction_factor, targets, ..Self::default() }
    }

    /// `[fan_in, r, fan_out]` of `F` and `G`.
    fn sizes(&self, site: &Site) -> [[usize; 3]; 2] {
        let (first, second) = (site.fan_out() / 2, site.fan_out() - site.fan_out() / 2);
        let r = |fan_in: usize| ((fan_in as f64 / self.reduction_factor) as usize).max(1);
        [[second, r(second), first], [first, r(first), second]]
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<InvertibleAdapter, Error> {
        if site.fan_out() < 2 {
            let reason = "expected two halves or more of its states, found a width below 2";
            return Err(Error::place(&site.path, reason));
        }
        let (near, zero) = (Draw::Normal(0.0, 0.02), Draw::Constant(0.0));
        let mut coupling = |at: usize| -> Result<Coupling, Error> {
            let ([fan_in, r, fan_out], names) = (self.sizes(site)[at], NAMES[at]);
            bounded("reduction_factor", &site.path, [r, fan_in.max(fan_out)])?;
            Ok(Coupling {
                down: from.take(names[0], [r, fan_in], near)?,
                down_bias: from.take(names[1], [r], zero)?,
                up: from.take(names[2], [fan_out, r], near)?,
                up_bias: from.take(names[3], [fan_out], zero)?,
            })
        };
        let (first, second) = (coupling(0)?, coupling(1)?);
        Ok(InvertibleAdapter { first, second, non_linearity: self.non_linearity })
    }
}

impl Method for Invertible {
    type Adapter = InvertibleAdapter;
    type Shared = ();
    const NAME: &'static str = "INVERTIBLE";
    const KINDS: &'static [Kind] = &[Kind::Hidden, Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(InvertibleAdapter);

    fn check(&self) -> Result<(), Error> {
        check_factor(self.reduction_factor)
    }

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let gelu = Nonlinearity::Gelu;
        vec![
            Self::new(0.5, targets.clone()),
            Self { non_linearity: gelu, ..Self::new(2.0, targets.clone()) },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let one = |[fan_in, r, fan_out]: [usize; 3]| fan_in * r + r + r * fan_out + fan_out;
        self.sizes(site).into_iter().map(one).sum()
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &InvertibleAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let both = [&adapter.first, &adapter.second].into_iter().zip(NAMES);
        both.flat_map(|(coupling, [down, down_bias, up, up_bias])| {
            [
                (down, coupling.down.val().into_data()),
                (down_bias, coupling.down_bias.val().into_data()),
                (up, coupling.up.val().into_data()),
                (up_bias, coupling.up_bias.val().into_data()),
            ]
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution};
    use burn_peft_core::{Value, site_rng};

    #[test]
    fn the_inverse_gives_the_embedding_back() {
        let device = Device::flex();
        // An odd width: halves of 3 and 4.
        let weight = Value::D1(Tensor::zeros([7], &device));
        let site =
            Site { path: "embeddings".into(), kind: Kind::Hidden, weight, bias: None, mask: None };
        let method = Invertible::new(0.5, Targets::default());
        let made = method.init(&site, &(), &mut site_rng(1, "embeddings"), &device).expect("fits");
        let large = |param: Param<Tensor<2>>| param.map(|p| p * 20.0);
        let grown = |c: Coupling| Coupling { down: large(c.down), up: large(c.up), ..c };
        let adapter =
            InvertibleAdapter { first: grown(made.first), second: grown(made.second), ..made };
        let e = Tensor::<3>::random([2, 3, 7], Distribution::Default, &device);
        let o = e.clone() + adapter.difference(&e);
        let [o, e, back] = [o.clone(), e, adapter.inverse(o)]
            .map(|t| t.into_data().try_to_vec::<f32>().expect("is f32"));
        let far = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or_default()
        };
        // Two subtractions of sums about 1.
        assert!(far(&back, &e) < 1e-5, "{}", far(&back, &e));
        assert!(far(&o, &e) > 0.05, "{}", far(&o, &e));
    }
}
