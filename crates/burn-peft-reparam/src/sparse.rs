//! Differences of which a few numbers are not zero.

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// Indices as a constant.
pub(crate) fn indices(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &device.clone().inner())
}

/// The matrix with each value at its place, counted row by row; values at one place add up.
pub(crate) fn scatter(
    values: Tensor<1>,
    places: &Tensor<1, Int>,
    [rows, columns]: [usize; 2],
) -> Tensor<2> {
    let zeros = Tensor::<1>::zeros([rows * columns], &places.device());
    let flat =
        zeros.cast(values.dtype()).select_assign(0, places.clone(), values, IndexingUpdateOp::Add);
    flat.reshape([rows, columns])
}
