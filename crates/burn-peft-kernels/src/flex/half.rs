//! Weights that are held in half precision, bf16 or f16, under a product in f32: `x·W`, and `g·Wᵀ`, its gradient by `x`.
//!
//! A weight is widened a block at a time on all cores, into memory that the caches hold, and multiplied from there: no f32
//! copy of the whole is ever made. Both types are parts of f32, so that widening rounds nothing.
// The memory of a block is not cleared; see `Held::multiply`.
#![allow(unsafe_code)]

use super::Dense;
use super::linear::weight;
use super::math::{dot, vectorized};
use super::matrix::{Shape, View, ViewMut, matmul};
use burn::tensor::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Numbers of a block: 4 MiB of f32.
const BLOCK: usize = 1 << 20;
/// Least columns of a block, where there are as many: each product reads all of `x` once.
const COLS: usize = 512;
/// Numbers that a task widens at the least.
const TASK: usize = 16 * 1024;
/// So many rows of `x` are multiplied by a column of `W` as soon as it is widened: for these, writing blocks would take as
/// long as the arithmetic.
const FEW: usize = 4;

pub(super) fn is_half(w: &Dense) -> bool {
    matches!(w.dtype(), DType::BF16 | DType::F16)
}

/// `out = scale·x·W`, or `out += scale·x·W`, or the same with `Wᵀ`: `x` has `n` rows in order, `W` is in half precision.
pub(super) fn multiply(
    out: &mut [f32],
    add: bool,
    scale: f32,
    (x, n): (&[f32], usize),
    w: &Dense,
    transposed: bool,
) {
    let (w, start, shape) = weight(w);
    let shape = if transposed { shape.swapped() } else { shape };
    match w.dtype() {
        DType::F16 => {
            Held { numbers: w.storage::<f16>(), start, shape }.multiply(out, add, scale, x, n);
        }
        _ => Held { numbers: w.storage::<bf16>(), start, shape }.multiply(out, add, scale, x, n),
    }
}

trait Half: Copy + Sync {
    /// `to[i] = from[i]`, both of one length.
    fn widen(from: &[Self], to: &mut [f32]);
}

impl Half for bf16 {
    /// Its bits are the upper half of f32's.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        let both = to.iter_mut().zip(from);
        both.for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
}

impl Half for f16 {
    /// By the processor's own instruction, where it has one.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

/// A weight `[k, cols]` as it lies.
struct Held<'a, T> {
    numbers: &'a [T],
    start: usize,
    shape: Shape,
}

impl<T: Half> Held<'_, T> {
    /// `x [n, k]` in order, `out [n, cols]`.
    fn multiply(&self, out: &mut [f32], add: bool, scale: f32, x: &[f32], n: usize) {
        let Shape { rows: k, cols, .. } = self.shape;
        if n == 0 || k == 0 || cols == 0 {
            return; // as `matmul` does
        }
        if n <= FEW && self.shape.row_stride == 1 {
            return self.few(out, add, scale, x, n);
        }
        // Whole sums in a block where that leaves columns enough, and else equal parts of them.
        let width = (BLOCK / k).max(COLS).min(cols);
        let depth = k.div_ceil(k.div_ceil(BLOCK / width));
        let mut memory = Vec::<f32>::with_capacity(depth * width);
        // SAFETY: there is room for as many, and `widen` writes all of a block before the product reads it.
        #[allow(clippy::uninit_vec)]
        unsafe {
            memory.set_len(depth * width);
        }
        for first in (0..cols).step_by(width) {
            let columns = first..(first + width).min(cols);
            for top in (0..k).step_by(depth) {
                let rows = top..(top + depth).min(k);
                let block = &mut memory[..rows.len() * columns.len()];
                let shape = self.widen(block, &rows, &columns);
                let x = View::new(x, top, Shape::spaced(n, rows.len(), k));
                let out = &mut out[first..];
                let mut out = ViewMut::new(out, Shape::spaced(n, columns.len(), cols));
                matmul(&mut out, add || top > 0, scale, x, View::new(block, 0, shape), false);
            }
        }
    }

    /// Writes a part into `block`, neighbours staying neighbours; how it lies there.
    fn widen(&self, block: &mut [f32], rows: &Range<usize>, columns: &Range<usize>) -> Shape {
        let Shape { row_stride, col_stride, .. } = self.shape;
        let by_rows = Shape::rows(rows.len(), columns.len());
        let (lines, stride, at, shape) = match col_stride {
            1 => (rows, row_stride, columns, by_rows),
            _ => (columns, col_stride, rows, Shape::rows(columns.len(), rows.len()).swapped()),
        };
        let least = (TASK / at.len()).max(1);
        block.par_chunks_exact_mut(at.len()).with_min_len(least).zip(lines.clone()).for_each(
            |(out, line)| {
                let from = self.start + line * stride + at.start;
                let from = &self.numbers[from..from + at.len()];
                vectorized(
                    #[inline(always)]
                    || T::widen(from, out),
                );
            },
        );
        shape
    }

    /// For few rows, and columns whose numbers are neighbours.
    fn few(&self, out: &mut [f32], add: bool, scale: f32, x: &[f32], n: usize) {
        let Shape { rows: k, cols, col_stride, .. } = self.shape;
        let mut sums = vec![0.0_f32; cols * n];
        let least = (TASK / k).max(1);
        sums.par_chunks_exact_mut(n).with_min_len(least).enumerate().for_each_init(
            || vec![0.0_f32; k],
            |wide, (column, sums)| {
                let from = self.start + column * col_stride;
                let from = &self.numbers[from..from + k];
                vectorized(
                    #[inline(always)]
                    || {
                        T::widen(from, wide);
                        let rows = sums.iter_mut().zip(x.chunks_exact(k));
                        rows.for_each(|(sum, x)| *sum = scale * dot(x, wide));
                    },
                );
            },
        );
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            for (out, sums) in out.iter_mut().zip(sums.chunks_exact(n)) {
                *out = if add { *out + sums[row] } else { sums[row] };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of both types, but for those that are none.
    #[test]
    fn widening_loses_nothing() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let mut wide = vec![0.0_f32; all.len()];
        let half: Vec<bf16> = all.iter().map(|bits| bf16::from_bits(*bits)).collect();
        bf16::widen(&half, &mut wide);
        for (half, wide) in half.iter().zip(&wide).filter(|(half, _)| !half.is_nan()) {
            assert_eq!(half.to_f32().to_bits(), wide.to_bits());
        }
        let half: Vec<f16> = all.iter().map(|bits| f16::from_bits(*bits)).collect();
        f16::widen(&half, &mut wide);
        for (half, wide) in half.iter().zip(&wide).filter(|(half, _)| !half.is_nan()) {
            assert_eq!(half.to_f64(), f64::from(*wide));
        }
    }

    /// A weight of more than a block, in either order: each number of the output is the sum over all of it.
    #[test]
    fn blocks_are_the_whole() {
        let number = |i: usize| bf16::from_f32(((i * 37 % 29) as f32 - 14.0) / 16.0);
        for (k, cols) in [(3 * BLOCK / COLS + 5, COLS + 3), (7, BLOCK / 7 + 100)] {
            let numbers: Vec<bf16> = (0..k * cols).map(number).collect();
            let by_rows = Shape::rows(k, cols);
            for shape in [by_rows, Shape::rows(cols, k).swapped()] {
                let held = Held { numbers: &numbers, start: 0, shape };
                let Shape { row_stride, col_stride, .. } = shape;
                let n = FEW + 1;
                let x: Vec<f32> = (0..n * k).map(|i| (i * 7 % 5) as f32 - 2.0).collect();
                let mut out = vec![1.0_f32; n * cols];
                held.multiply(&mut out, true, 0.5, &x, n);
                let mut few = vec![1.0_f32; n * cols];
                held.multiply(&mut few[..FEW * cols], true, 0.5, &x[..FEW * k], FEW);
                for (row, column) in
                    [(0, 0), (1, cols - 1), (n - 1, cols / 2), (3, COLS.min(cols - 1))]
                {
                    let weight = |i: usize| numbers[i * row_stride + column * col_stride].to_f64();
                    let sum = (0..k).map(|i| f64::from(x[row * k + i]) * weight(i)).sum::<f64>();
                    // Sixteenths up to 2^13 or so: exact in f32, in whatever order they are added.
                    assert_eq!(f64::from(out[row * cols + column]), 1.0 + 0.5 * sum);
                    if row < FEW {
                        assert_eq!(few[row * cols + column], out[row * cols + column]);
                    }
                }
            }
        }
    }
}
