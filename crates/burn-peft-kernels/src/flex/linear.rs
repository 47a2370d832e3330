//! `y = x·W + b`; `dx = g·Wᵀ`, `dW = xᵀ·g`, `db = Σ g`.
// Outputs are written whole; see `written`.
#![allow(unsafe_code)]

use super::half::{self, is_half};
use super::matrix::{Shape, View, ViewMut, matmul};
use super::tensors::{dims, flat, in_order, make, written};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;

/// A weight as it lies where that is without gaps, transposed or not. Others are copied into order, so that a
/// part of a larger matrix gives the numbers of the same matrix alone, bit for bit.
pub(super) fn weight(w: &Dense) -> (Dense, usize, Shape) {
    let dense = |t: &Dense| t.layout().contiguous_offsets().is_some();
    let w = if dense(w) || dense(&w.transpose(0, 1)) { w.clone() } else { w.to_contiguous() };
    let layout = w.layout();
    let [rows, cols] = [layout.shape()[0], layout.shape()[1]];
    let [row_stride, col_stride] = [0, 1].map(|axis| layout.strides()[axis].unsigned_abs());
    let start = layout.start_offset();
    (w, start, Shape { rows, cols, row_stride, col_stride })
}

/// Output of a product that is a sum over `k` numbers.
///
/// # Safety
/// `write` replaces every number, by a product or before one is added.
unsafe fn output(shape: impl Into<Vec<usize>>, k: usize, write: impl FnOnce(&mut [f32])) -> Dense {
    match k {
        0 => make(shape, write), // a product of nothing writes nothing
        // SAFETY: as is promised.
        _ => unsafe { written(shape, write) },
    }
}

/// All leading axes are rows.
fn rows(dims: &[usize]) -> (usize, usize) {
    let width = dims.last().copied().unwrap_or(1);
    (dims[..dims.len() - 1].iter().product(), width)
}

/// `out = scale·x·W`, or `out += scale·x·W`, or the same with `Wᵀ`: `x` lies in order.
pub(super) fn multiply(
    out: &mut [f32],
    add: bool,
    scale: f32,
    x: &Dense,
    w: &Dense,
    transposed: bool,
) {
    let (n, width) = rows(&dims(x));
    if is_half(w) {
        return half::multiply(out, add, scale, (flat(x), n), w, transposed);
    }
    let (w, start, shape) = weight(w);
    let view = View::new(w.storage::<f32>(), start, shape);
    let (view, cols) =
        if transposed { (view.transposed(), shape.rows) } else { (view, shape.cols) };
    let x = View::new(flat(x), 0, Shape::rows(n, width));
    matmul(&mut ViewMut::new(out, Shape::rows(n, cols)), add, scale, x, view, false);
}

/// The axes of `x` with another width.
fn widened(x: &Dense, width: usize) -> Vec<usize> {
    let mut dims = dims(x);
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    dims
}

pub(super) fn forward(x: &Dense, w: &Dense, b: Option<&Dense>) -> Dense {
    let (x, [k, cols], b) = (in_order(x), [0, 1].map(|axis| dims(w)[axis]), b.map(in_order));
    // SAFETY: the product replaces what it is not added to, and the bias is all of that.
    unsafe {
        output(widened(&x, cols), k, |out| {
            if let (Some(b), true) = (&b, cols > 0) {
                let rows = out.par_chunks_exact_mut(cols).with_min_len(16);
                rows.for_each(|row| row.copy_from_slice(flat(b)));
            }
            multiply(out, b.is_some(), 1.0, &x, w, false);
        })
    }
}

/// `scale·x·W`, or with `Wᵀ`.
pub(super) fn product(scale: f32, x: &Dense, w: &Dense, transposed: bool) -> Dense {
    let (x, [fan_in, fan_out]) = (in_order(x), [0, 1].map(|axis| dims(w)[axis]));
    let (k, cols) = if transposed { (fan_out, fan_in) } else { (fan_in, fan_out) };
    let write = |out: &mut [f32]| multiply(out, false, scale, &x, w, transposed);
    // SAFETY: the product replaces all of it.
    unsafe { output(widened(&x, cols), k, write) }
}

/// `g·Wᵀ`
pub(super) fn input_gradient(g: &Dense, w: &Dense) -> Dense {
    product(1.0, g, w, true)
}

/// `xᵀ·g`
pub(super) fn weight_gradient(x: &Dense, g: &Dense) -> Dense {
    let (x, g) = (in_order(x), in_order(g));
    let ((n, fan_in), (_, fan_out)) = (rows(&dims(&x)), rows(&dims(&g)));
    let write = |out: &mut [f32]| {
        let x = View::new(flat(&x), 0, Shape::rows(n, fan_in)).transposed();
        let g = View::new(flat(&g), 0, Shape::rows(n, fan_out));
        matmul(&mut ViewMut::new(out, Shape::rows(fan_in, fan_out)), false, 1.0, x, g, false);
    };
    // SAFETY: the product replaces all of it.
    unsafe { output([fan_in, fan_out], n, write) }
}

/// `Σ g` over the rows, in their order.
pub(super) fn bias_gradient(g: &Dense) -> Dense {
    let g = in_order(g);
    let (_, width) = rows(&dims(&g));
    make([width], |out| {
        for row in flat(&g).chunks_exact(width.max(1)) {
            out.iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
        }
    })
}

#[derive(Debug)]
struct Step;

/// What backward needs: the input for the weight's gradient, the weight for the input's.
type State = (Option<Dense>, Option<Dense>);

fn backward<const N: usize>(ops: Ops<State, N>, grads: &mut Gradients) {
    let g = grads.consume::<Flex>(&ops.node);
    let (x, w) = ops.state;
    if let (Some(node), Some(w)) = (&ops.parents[0], &w) {
        grads.register::<Flex>(node.id, input_gradient(&g, w));
    }
    if let (Some(node), Some(x)) = (&ops.parents[1], &x) {
        grads.register::<Flex>(node.id, weight_gradient(x, &g));
    }
    if let Some(Some(node)) = ops.parents.get(2) {
        grads.register::<Flex>(node.id, bias_gradient(&g));
    }
}

impl Backward<Flex, 2> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, grads);
    }
}

impl Backward<Flex, 3> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, grads);
    }
}

pub(super) fn plain<C: CheckpointStrategy>(x: Tracked, w: Tracked) -> Tracked {
    let y = forward(x.primitive(), w.primitive(), None);
    let state = state(&x, &w);
    let step = Backward::<Flex, 2>::prepare::<C>(Step, [x.node(), w.node()]);
    match step.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn biased<C: CheckpointStrategy>(x: Tracked, w: Tracked, b: Tracked) -> Tracked {
    let y = forward(x.primitive(), w.primitive(), Some(b.primitive()));
    let state = state(&x, &w);
    let step = Backward::<Flex, 3>::prepare::<C>(Step, [x.node(), w.node(), b.node()]);
    match step.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

fn state(x: &Tracked, w: &Tracked) -> State {
    let keep = |t: &Tracked, other: &Tracked| other.is_tracked().then(|| t.primitive().clone());
    (keep(x, w), keep(w, x))
}
