//! Reading flex's tensors as memory with strides, and making new ones.

// Memory that is not cleared; see `written`.
#![allow(unsafe_code)]

use super::Dense;
use burn::tensor::{DType, Shape, TensorData};

/// A fresh tensor of zeros, filled by `fill`.
pub(super) fn make(shape: impl Into<Vec<usize>>, fill: impl FnOnce(&mut [f32])) -> Dense {
    let mut out = Dense::empty(Shape::from(shape.into()), DType::F32);
    fill(out.storage_mut::<f32>());
    out
}

/// A fresh tensor, written by `write`. Its memory is not cleared before: one core would pass over it while the others
/// wait.
///
/// # Safety
/// `write` writes every number, and reads none that it has not written.
pub(super) unsafe fn written(
    shape: impl Into<Vec<usize>>,
    write: impl FnOnce(&mut [f32]),
) -> Dense {
    let shape = Shape::from(shape.into());
    let count = shape.num_elements();
    let mut numbers = Vec::<f32>::with_capacity(count);
    // SAFETY: there is room for `count` numbers, and the caller promises that they are written before they are read.
    #[allow(clippy::uninit_vec)]
    unsafe {
        numbers.set_len(count);
    }
    write(&mut numbers);
    Dense::from_data(TensorData::new(numbers, shape))
}

/// The axes' lengths.
pub(super) fn dims(t: &Dense) -> Vec<usize> {
    t.layout().shape().iter().copied().collect()
}

/// All of it, one row after the other.
pub(super) fn flat(t: &Dense) -> &[f32] {
    t.as_slice::<f32>().unwrap_or(&[])
}

/// The same with its elements one row after the other: `t` itself where they are.
pub(super) fn in_order(t: &Dense) -> Dense {
    if t.layout().contiguous_offsets().is_some() { t.clone() } else { t.to_contiguous() }
}

/// Four axes over memory; elements of the last axis are neighbours.
pub(super) struct Strided {
    tensor: Dense,
    pub(super) dims: [usize; 4],
    strides: [usize; 4],
    start: usize,
}

impl Strided {
    /// Any view of positive strides as it lies; others are copied into order.
    pub(super) fn new(t: &Dense) -> Self {
        let neighbours = |t: &Dense| {
            let strides = t.layout().strides();
            strides.iter().all(|s| *s >= 0) && strides.last() == Some(&1)
        };
        let tensor = if neighbours(t) { t.clone() } else { t.to_contiguous() };
        let layout = tensor.layout();
        let axis = |i: usize| layout.strides()[i].unsigned_abs();
        Self {
            dims: std::array::from_fn(|i| layout.shape()[i]),
            strides: std::array::from_fn(axis),
            start: layout.start_offset(),
            tensor,
        }
    }

    pub(super) fn memory(&self) -> &[f32] {
        self.tensor.storage::<f32>()
    }

    /// Where the matrix of the last two axes begins, at these indices of the first two; an axis of
    /// length 1 serves every index.
    pub(super) fn at(&self, i: usize, j: usize) -> usize {
        let i = if self.dims[0] == 1 { 0 } else { i };
        let j = if self.dims[1] == 1 { 0 } else { j };
        self.start + i * self.strides[0] + j * self.strides[1]
    }

    /// How far rows of the last two axes' matrix are apart.
    pub(super) fn row_stride(&self) -> usize {
        self.strides[2]
    }

    /// The rows of the last two axes' matrix, at these indices of the first two: to get at the memory takes longer than to
    /// read a row.
    pub(super) fn rows(&self, i: usize, j: usize) -> Rows<'_> {
        let stride = if self.dims[2] == 1 { 0 } else { self.strides[2] };
        Rows { memory: &self.memory()[self.at(i, j)..], stride, width: self.dims[3] }
    }

    /// A row of the last axis; an axis of length 1 serves every index.
    pub(super) fn row(&self, i: usize, j: usize, k: usize) -> &[f32] {
        let k = if self.dims[2] == 1 { 0 } else { k };
        let start = self.at(i, j) + k * self.strides[2];
        &self.memory()[start..start + self.dims[3]]
    }
}

/// Rows in memory.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    memory: &'a [f32],
    stride: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    pub(super) fn row(&self, k: usize) -> &'a [f32] {
        &self.memory[k * self.stride..][..self.width]
    }
}
