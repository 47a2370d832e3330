//! Sums of products, cut into parts for all cores.
//!
//! A part is a block of the output, which one core takes from its start to its last term, while it lies in that core's cache.
//! `gemm`'s own way with several cores packs what needs it on one of them, while the others wait, and meets after each product.
// Parts write their own blocks of one output; see `Parts`.
#![allow(unsafe_code)]

use super::half;
use super::matrix::{Parts, Shape, View, ViewMut, matmul};
use ::half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// The right side of a product, in the precision in which it is held.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a> {
    F32(View<'a>),
    Bf16(View<'a, bf16>),
    F16(View<'a, f16>),
}

impl Factor<'_> {
    pub(super) fn transposed(self) -> Self {
        match self {
            Self::F32(w) => Self::F32(w.transposed()),
            Self::Bf16(w) => Self::Bf16(w.transposed()),
            Self::F16(w) => Self::F16(w.transposed()),
        }
    }

    /// `out = scale·a·b`, or `out += scale·a·b`, with some columns of it, on one core.
    fn multiply(
        self,
        out: &mut ViewMut<'_>,
        add: bool,
        scale: f32,
        a: View<'_>,
        cols: &Range<usize>,
    ) {
        match self {
            Self::F32(w) => matmul(out, add, scale, a, w.cols(cols)),
            Self::Bf16(w) => half::multiply(out, add, scale, a, w.cols(cols)),
            Self::F16(w) => half::multiply(out, add, scale, a, w.cols(cols)),
        }
    }
}

/// `scale·a·b`
pub(super) struct Term<'a> {
    pub(super) scale: f32,
    pub(super) a: View<'a>,
    pub(super) b: Factor<'a>,
}

impl<'a> Term<'a> {
    /// `a·b`
    pub(super) fn product(a: View<'a>, b: Factor<'a>) -> Self {
        Self { scale: 1.0, a, b }
    }
}

/// What an output is before products are added.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing: the first product replaces what lies there.
    Nothing,
    /// What lies there.
    Kept,
    /// A bias, in each row.
    Row(&'a [f32]),
}

/// From so many multiplications, or numbers of `b`, on a product is worth all cores.
const MULTIPLICATIONS: usize = 128 * 128 * 128;
const NUMBERS: usize = 1 << 18;

/// Columns of a part are a multiple of this, and rows of that, so that `gemm`'s blocks of registers are full, with
/// AVX-512 (64 by 6) and, in columns, with AVX2 (24).
const COLS: usize = 192;
const ROWS: usize = 6;

/// In how many parts the rows and the columns of a product are cut for so many cores.
///
/// Cut columns are best: each core packs what it needs of `b`, and no two the same. Where they do not come out even, rows are
/// cut too.
fn parts(rows: usize, cols: usize, cores: usize) -> (usize, usize) {
    let units = cols / COLS;
    if rows < ROWS * cores {
        return (1, cores.min(cols).max(1)); // a generated token: all of it is reading `b`
    }
    let across = common(units, cores);
    match cores / across {
        // Smaller parts stay in the cache, and leave less to wait for at the end.
        1 if units.is_multiple_of(2 * cores) => (1, 2 * cores),
        down => (down, across),
    }
}

/// The greatest common divisor; of nothing and `b`, 1.
fn common(a: usize, b: usize) -> usize {
    match (a, b) {
        (0, _) => 1,
        (a, b) if b % a == 0 => a,
        (a, b) => common(b % a, a),
    }
}

/// Part `index` of `count` of so many numbers, which are cut at multiples of `unit` where there are enough of them.
fn range(index: usize, count: usize, all: usize, unit: usize) -> Range<usize> {
    let unit = if all >= unit * count { unit } else { 1 };
    let units = all / unit;
    let cut = |at: usize| if at == count { all } else { (units * at + count / 2) / count * unit };
    cut(index)..cut(index + 1)
}

/// `out = start + Σ scale·a·b`, `out [rows, cols]` one row after the other, on all cores where it is large.
pub(super) fn sum(out: &mut [f32], [rows, cols]: [usize; 2], start: Start<'_>, terms: &[Term<'_>]) {
    let block = Parts::new(out);
    let part = |rows: Range<usize>, part_cols: Range<usize>| {
        let offset = rows.start * cols + part_cols.start;
        // SAFETY: no two parts share a row and a column.
        let mut out =
            unsafe { block.view(offset, Shape::spaced(rows.len(), part_cols.len(), cols)) };
        if let Start::Row(bias) = start {
            (0..rows.len()).for_each(|i| out.row(i).copy_from_slice(&bias[part_cols.clone()]));
        }
        let mut add = !matches!(start, Start::Nothing);
        for Term { scale, a, b } in terms {
            b.multiply(&mut out, add, *scale, a.rows(&rows), &part_cols);
            add = true;
        }
    };
    let inner = terms.iter().map(|term| term.a.width()).max().unwrap_or(0);
    let numbers = inner.saturating_mul(cols);
    let cores = match numbers >= NUMBERS || numbers.saturating_mul(rows) >= MULTIPLICATIONS {
        true => rayon::current_num_threads(),
        false => 1,
    };
    if cores == 1 {
        return part(0..rows, 0..cols);
    }
    let (down, across) = parts(rows, cols, cores);
    (0..down * across).into_par_iter().for_each(|task| {
        let (i, j) = (task / across, task % across);
        part(range(i, down, rows, ROWS), range(j, across, cols, COLS));
    });
}
