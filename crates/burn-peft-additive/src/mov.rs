//! MoV: a mixture of (IA)³ vectors, routed by token (arXiv 2309.05444).

use crate::fields::{bounded, positive};
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Mixture of vectors (arXiv 2309.05444): `y' = y ⊙ Σᵢ pᵢ·lᵢ` with `p = softmax(x·G)`, for each token `x`.
///
/// `l [num_experts, fan_out]` begins as 1, `G [fan_in, num_experts] ~ N(0, 0.02²)`. Parameters:
/// `num_experts·(fan_in + fan_out)` a place. It depends on the token, so it does not fold. HF PEFT does not have
/// it; the file holds `mov_vectors` and `mov_router [num_experts, fan_in]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mov {
    /// Number of vectors; default 10.
    pub num_experts: usize,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Mov {
    fn default() -> Self {
        Self { num_experts: 10, targets: Targets::default() }
    }
}

/// What MoV trains at one place.
#[derive(Module, Debug)]
pub struct MovAdapter {
    /// `l [num_experts, fan_out]`.
    pub mov_vectors: Param<Tensor<2>>,
    /// `Gᵀ [num_experts, fan_in]`.
    pub mov_router: Param<Tensor<2>>,
}

impl Adapter for MovAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (vectors, router) = (self.mov_vectors.val(), self.mov_router.val());
        let dtype = vectors.dtype();
        let p = softmax(linear(x.clone().cast(dtype), router.transpose(), None), 2); // [batch, seq, experts]
        // The probabilities add up to 1: what is mixed are the differences from 1.
        let scale = linear(p, vectors - 1.0, None);
        Some((y.clone().cast(dtype) * scale).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Mov {
    /// With this many vectors.
    pub fn new(num_experts: usize, targets: Targets) -> Self {
        Self { num_experts, targets }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<MovAdapter, Error> {
        let (n, fan_in, fan_out) = (self.num_experts, site.fan_in(), site.fan_out());
        bounded("num_experts", &site.path, [n, fan_in.max(fan_out)])?;
        Ok(MovAdapter {
            mov_vectors: from.take("mov_vectors", [n, fan_out], Draw::Constant(1.0))?,
            mov_router: from.take("mov_router", [n, fan_in], Draw::Normal(0.0, 0.02))?,
        })
    }
}

impl Method for Mov {
    type Adapter = MovAdapter;
    type Shared = ();
    const NAME: &'static str = "MOV";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(MovAdapter);

    fn check(&self) -> Result<(), Error> {
        positive("num_experts", self.num_experts)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self::new(3, targets.clone())]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.num_experts * (site.fan_in() + site.fan_out())
    }

    fn tensors(&self, _site: &Site, adapter: &MovAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("mov_vectors", adapter.mov_vectors.val().into_data()),
            ("mov_router", adapter.mov_router.val().into_data()),
        ]
    }
}
