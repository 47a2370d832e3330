//! Weights that are held in half precision, bf16 or f16, under a product in f32: `x·W`, and `g·Wᵀ`, its gradient by `x`.
//!
//! A weight is widened a block at a time, into memory that a core's cache holds, and multiplied from there: no f32 copy of
//! the whole is ever made. Both types are parts of f32, so that widening rounds nothing.
// The memory of a block is not cleared; see `multiply`.
#![allow(unsafe_code)]

use super::math::{dot, vectorized};
use super::matrix::{Shape, View, ViewMut, matmul};
use half::{bf16, f16};

/// Numbers of a block: 1 MiB of f32.
const BLOCK: usize = 1 << 18;
/// Least columns of a block, where there are as many: each product reads all of `x` once.
const COLS: usize = 192;
/// So many rows of `x` are multiplied by a column of `W` as soon as it is widened: for these, writing blocks would take as
/// long as the arithmetic.
const FEW: usize = 4;

pub(super) trait Half: Copy + Sync {
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
    /// Exponents count from 15 there and from 127 here; what has none is a fraction of the smallest power.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        const SHIFT: u32 = f32::MANTISSA_DIGITS - f16::MANTISSA_DIGITS;
        const BIAS: u32 = (127 - 15) << 23;
        const SMALLEST: u32 = BIAS + (1 << 23);
        for (to, from) in to.iter_mut().zip(from) {
            let bits = u32::from(from.to_bits());
            let (sign, size) = ((bits & 0x8000) << 16, (bits & 0x7fff) << SHIFT);
            let whole = f32::from_bits(size + BIAS);
            let fraction = f32::from_bits(size + SMALLEST) - f32::from_bits(SMALLEST);
            let none = f32::from_bits(size | f32::INFINITY.to_bits());
            let value = match bits & 0x7c00 {
                0 => fraction,
                0x7c00 => none,
                _ => whole,
            };
            *to = f32::from_bits(value.to_bits() | sign);
        }
    }
}

/// `out = scale·x·W`, or `out += scale·x·W`, on one core: `x [n, k]`, `W [k, cols]`.
pub(super) fn multiply<T: Half>(
    out: &mut ViewMut<'_>,
    add: bool,
    scale: f32,
    x: View<'_>,
    w: View<'_, T>,
) {
    let (n, Shape { rows: k, cols, .. }) = (x.shape.rows, w.shape);
    if n == 0 || k == 0 || cols == 0 {
        return; // as `matmul` does
    }
    if n <= FEW && w.shape.row_stride == 1 && x.shape.col_stride == 1 {
        return few(out, add, scale, x, w);
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
            let wide = widen(block, w.rows(&rows).cols(&columns));
            matmul(&mut out.cols(&columns), add || top > 0, scale, x.cols(&rows), wide);
        }
    }
}

/// `w`, written into `block` widened, neighbours staying neighbours.
fn widen<'a, T: Half>(block: &'a mut [f32], w: View<'_, T>) -> View<'a> {
    let by_rows = w.shape.col_stride == 1;
    let lines = if by_rows { w } else { w.transposed() };
    let Shape { rows, cols, .. } = lines.shape;
    vectorized(
        #[inline(always)]
        || {
            let out = block.chunks_exact_mut(cols).enumerate();
            out.for_each(|(line, out)| T::widen(lines.row(line), out));
        },
    );
    let wide = View::new(block, 0, Shape::rows(rows, cols));
    if by_rows { wide } else { wide.transposed() }
}

/// For few rows, and columns whose numbers are neighbours.
fn few<T: Half>(out: &mut ViewMut<'_>, add: bool, scale: f32, x: View<'_>, w: View<'_, T>) {
    let columns = w.transposed();
    let mut wide = vec![0.0_f32; columns.shape.cols];
    for column in 0..columns.shape.rows {
        vectorized(
            #[inline(always)]
            || {
                T::widen(columns.row(column), &mut wide);
                for row in 0..x.shape.rows {
                    let sum = scale * dot(x.row(row), &wide);
                    let out = &mut out.row(row)[column];
                    *out = if add { *out + sum } else { sum };
                }
            },
        );
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
                let held = View::new(&numbers, 0, shape);
                let Shape { row_stride, col_stride, .. } = shape;
                let n = FEW + 1;
                let x: Vec<f32> = (0..n * k).map(|i| (i * 7 % 5) as f32 - 2.0).collect();
                let mut out = vec![1.0_f32; n * cols];
                let product = |out: &mut [f32], n: usize| {
                    let x = View::new(&x, 0, Shape::rows(n, k));
                    multiply(&mut ViewMut::new(out, Shape::rows(n, cols)), true, 0.5, x, held);
                };
                product(&mut out, n);
                let mut few = vec![1.0_f32; n * cols];
                product(&mut few, FEW);
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
