//! Scaled low rank: a method that burn-peft does not have, in this one file.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::rand::{RngExt, rngs::ChaCha8Rng};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use serde::{Deserialize, Serialize};

/// `y' = y + (alpha/r)·(x·A ⊙ s)·B`, `A [fan_in, r]`, `s [r]`, `B [r, fan_out]`.
///
/// `A ~ U(±1/√fan_in)`, `B ~ U(±1/√r)`, `s` zero at first: an identity. Parameters:
/// `r·(fan_in + fan_out + 1)` a place. Folds: `Δ(W) = (alpha/r)·A·diag(s)·B`. The file holds `scaled_A
/// (r, fan_in)`, `scaled_s (r)` and `scaled_B (fan_out, r)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scaled {
    /// Rank; default 8.
    pub r: usize,
    /// Scale, divided by the rank; default 8.
    pub alpha: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Scaled {
    fn default() -> Self {
        Self { r: 8, alpha: 8.0, targets: Targets::default() }
    }
}

/// What is trained at one place.
#[derive(Module, Debug)]
pub struct ScaledAdapter {
    /// `A [fan_in, r]`.
    pub a: Param<Tensor<2>>,
    /// `s [r]`.
    pub s: Param<Tensor<1>>,
    /// `B [r, fan_out]`.
    pub b: Param<Tensor<2>>,
    /// `alpha/r`.
    pub scaling: f64,
}

impl ScaledAdapter {
    /// `(alpha/r)·diag(s)·B`.
    fn right(&self) -> Tensor<2> {
        self.b.val() * self.s.val().unsqueeze_dim(1) * self.scaling
    }
}

impl Adapter for ScaledAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(linear(linear(x.clone(), self.a.val(), None), self.right(), None))
    }
}

impl Fold for ScaledAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.a.val().matmul(self.right()))
    }
}

/// Names in the file.
const A: &str = "scaled_A";
const S: &str = "scaled_s";
const B: &str = "scaled_B";

impl Scaled {
    /// Of this rank, with a scale of 1.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, alpha: r as f64, targets }
    }
}

impl Method for Scaled {
    type Adapter = ScaledAdapter;
    type Shared = ();
    const NAME: &'static str = "SCALED";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        match (self.r, self.alpha.is_finite()) {
            (0, _) => Err(Error::config("r", "expected 1 or more, found 0")),
            (_, false) => Err(Error::config("alpha", "expected a finite number")),
            _ => Ok(()),
        }
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<ScaledAdapter, Error> {
        let mut uniform = |[rows, columns]: [usize; 2], fan_in: usize| {
            let bound = 1.0 / (fan_in as f32).sqrt();
            let values: Vec<f32> =
                (0..rows * columns).map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound).collect();
            let values = TensorData::new(values, [rows, columns]);
            Param::from_tensor(Tensor::from_data(values, device))
        };
        Ok(ScaledAdapter {
            a: uniform([site.fan_in(), self.r], site.fan_in()),
            s: Param::from_tensor(Tensor::zeros([self.r], device)),
            b: uniform([self.r, site.fan_out()], self.r),
            scaling: self.alpha / self.r as f64,
        })
    }

    fn fold(adapter: &ScaledAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self { alpha: 4.0, ..Self::new(2, targets.clone()) }]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r * (site.fan_in() + site.fan_out() + 1)
    }

    fn tensors(&self, _site: &Site, adapter: &ScaledAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            (A, adapter.a.val().transpose().into_data()),
            (S, adapter.s.val().into_data()),
            (B, adapter.b.val().transpose().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<ScaledAdapter, Error> {
        let a: Tensor<2> = file.take(A, [self.r, site.fan_in()], device)?;
        let b: Tensor<2> = file.take(B, [site.fan_out(), self.r], device)?;
        Ok(ScaledAdapter {
            a: Param::from_tensor(a.transpose()),
            s: Param::from_tensor(file.take(S, [self.r], device)?),
            b: Param::from_tensor(b.transpose()),
            scaling: self.alpha / self.r as f64,
        })
    }
}
