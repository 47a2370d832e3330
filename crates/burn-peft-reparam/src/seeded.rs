//! Constants that files leave out and a seed in the configuration brings back: the words of ChaCha alone
//! decide them, so that they have the same bits in every version and on every machine.

use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand::rngs::ChaCha8Rng;

/// `U(-bound, bound)`.
pub(crate) fn uniform<const D: usize>(
    shape: [usize; D],
    bound: f32,
    rng: &mut ChaCha8Rng,
    device: &Device,
) -> Tensor<D> {
    const HALF: f32 = (1 << 23) as f32;
    let count = shape.iter().product();
    let values = (0..count).map(|_| ((rng.next_u32() >> 8) as f32 / HALF - 1.0) * bound).collect();
    Tensor::from_data(TensorData::new::<f32, _>(values, shape), device)
}

/// 1 or -1.
pub(crate) fn signs(count: usize, rng: &mut ChaCha8Rng, device: &Device) -> Tensor<1> {
    let values = (0..count).map(|_| if rng.next_u32() >> 31 == 0 { 1.0 } else { -1.0 }).collect();
    Tensor::from_data(TensorData::new::<f32, _>(values, [count]), device)
}

/// The numbers below `count` in a random order.
pub(crate) fn shuffled(count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, (rng.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}
