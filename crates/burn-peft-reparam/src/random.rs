//! Random matrices from a portable generator: the same numbers on every device.

use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use rand_distr::StandardNormal;

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// `U(-bound, bound)`.
pub(crate) fn uniform<const D: usize>(
    shape: [usize; D],
    bound: f32,
    rng: &mut ChaCha8Rng,
    device: &Device,
) -> Tensor<D> {
    let count = shape.iter().product();
    let values = (0..count).map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound).collect();
    tensor(values, shape, device)
}

/// `N(0, std²)`.
pub(crate) fn normal<const D: usize>(
    shape: [usize; D],
    std: f32,
    rng: &mut ChaCha8Rng,
    device: &Device,
) -> Tensor<D> {
    let count = shape.iter().product();
    let values = (0..count).map(|_| rng.sample::<f32, _>(StandardNormal) * std).collect();
    tensor(values, shape, device)
}
