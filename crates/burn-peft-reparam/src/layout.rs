//! How LoRA's factors lie in HF PEFT's file and in a convolution.

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, Kind, PlaceTensors, Site};

/// Name of DoRA's tensor.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";

/// Names and shapes of a place's tensors in the file.
pub(crate) struct Layout {
    pub(crate) a: &'static str,
    pub(crate) b: &'static str,
    pub(crate) shape_a: Vec<usize>,
    pub(crate) shape_b: Vec<usize>,
    /// Of DoRA's magnitude.
    pub(crate) shape_m: Vec<usize>,
}

impl Layout {
    /// For factors of these shapes, `A`'s and `B`'s.
    pub(crate) fn new(site: &Site, [[rows_a, r], [rows_b, fan_out]]: [[usize; 2]; 2]) -> Self {
        let (a, b) = match site.kind {
            Kind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
            _ => ("lora_A.weight", "lora_B.weight"),
        };
        let (shape_a, shape_b, shape_m) = match site.weight.shape().as_slice() {
            [_, c, k] => (vec![r, *c, *k], vec![fan_out, r, 1], vec![1, fan_out, 1]),
            [_, c, h, w] => (vec![r, *c, *h, *w], vec![fan_out, r, 1, 1], vec![1, fan_out, 1, 1]),
            _ => (vec![r, rows_a], vec![fan_out, rows_b], vec![fan_out]),
        };
        Self { a, b, shape_a, shape_b, shape_m }
    }
}

/// The tensor's values in another shape.
pub(crate) fn shaped<const D: usize>(tensor: Tensor<D>, shape: Vec<usize>) -> TensorData {
    let (bytes, _, dtype) = tensor.into_data().into_parts();
    TensorData::from_bytes(bytes, shape, dtype)
}

/// Takes a tensor of any shape out, as a matrix.
pub(crate) fn take(
    file: &mut PlaceTensors<'_>,
    name: &str,
    shape: &[usize],
    matrix: [usize; 2],
    device: &Device,
) -> Result<Tensor<2>, Error> {
    Ok(match *shape {
        [n] => file.take(name, [n], device)?.reshape(matrix),
        [a, b, c] => file.take(name, [a, b, c], device)?.reshape(matrix),
        [a, b, c, d] => file.take(name, [a, b, c, d], device)?.reshape(matrix),
        _ => file.take(name, matrix, device)?,
    })
}

/// A convolution's kernels out of `A [fan_in, r]`: `[r, in, ..kernel]`.
pub(crate) fn kernel<const D: usize>(a: Tensor<2>, mut shape: [usize; D]) -> Tensor<D> {
    shape[0] = a.dims()[1];
    a.transpose().reshape(shape)
}

/// The 1x1 convolution that `B [r, fan_out]` is: `[fan_out, r, 1, ..]`.
pub(crate) fn expand<const D: usize>(b: Tensor<2>) -> Tensor<D> {
    let mut shape = [1; D];
    [shape[1], shape[0]] = b.dims();
    b.transpose().reshape(shape)
}
