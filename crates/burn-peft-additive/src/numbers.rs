//! Random numbers from a portable generator: the same on every device.

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use rand_distr::StandardNormal;

fn drawn<const D: usize>(
    shape: [usize; D],
    device: &Device,
    draw: impl FnMut(usize) -> f32,
) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// How a trained tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Draw {
    /// All the same.
    Constant(f32),
    /// `U(±bound)`.
    Uniform(f32),
    /// `N(mean, std²)`.
    Normal(f32, f32),
    /// `N(0, std²)`, drawn again beyond two standard deviations.
    Truncated(f32),
}

/// `N(0, 1)`, as PyTorch draws an embedding.
pub(crate) const STANDARD: Draw = Draw::Normal(0.0, 1.0);

impl Draw {
    /// A tensor of this shape.
    pub(crate) fn tensor<const D: usize>(
        self,
        shape: [usize; D],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Tensor<D> {
        match self {
            Self::Constant(value) => Tensor::full(shape, value, device),
            Self::Uniform(bound) => {
                drawn(shape, device, |_| (2.0 * rng.random::<f32>() - 1.0) * bound)
            }
            Self::Normal(mean, std) => {
                drawn(shape, device, |_| mean + std * rng.sample::<f32, _>(StandardNormal))
            }
            Self::Truncated(std) => drawn(shape, device, |_| {
                loop {
                    let value: f32 = rng.sample(StandardNormal);
                    if value.abs() <= 2.0 {
                        return value * std;
                    }
                }
            }),
        }
    }
}

/// `x` with each number zeroed with probability `p` and the others grown by `1/(1 - p)`, where `trained`
/// is in training. The mask is drawn as `mask` has its shape: a 1 there is shared by all along that axis.
///
/// Not Burn's layer: the state at the first adapted place may be a plain tensor, where that believes it is
/// not training.
pub(crate) fn dropped<const F: usize>(
    x: Tensor<3>,
    p: f64,
    mask: [usize; 3],
    trained: &Tensor<F>,
) -> Tensor<3> {
    if p <= 0.0 || !trained.is_autodiff() {
        return x;
    }
    let kept =
        Tensor::<3>::random(mask, Distribution::Bernoulli(1.0 - p), &trained.device().inner());
    x * (kept / (1.0 - p))
}
