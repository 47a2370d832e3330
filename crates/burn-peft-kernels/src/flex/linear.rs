//! `y = x·W + b`; `dx = g·Wᵀ`, `dW = xᵀ·g`, `db = Σ g`.
// Outputs are written whole; see `written`.
#![allow(unsafe_code)]

use super::matrix::{Shape, View};
use super::product::{Factor, Start, Term, sum};
use super::tensors::{dims, flat, in_order, make, written};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::DType;

/// A tensor as a matrix.
pub(super) struct Matrix {
    tensor: Dense,
    start: usize,
    shape: Shape,
}

impl Matrix {
    /// All axes but the last are rows, one after the other.
    pub(super) fn rows(t: &Dense) -> Self {
        let tensor = in_order(t);
        let dims = dims(&tensor);
        let cols = dims.last().copied().unwrap_or(1);
        let shape = Shape::rows(dims[..dims.len() - 1].iter().product(), cols);
        Self { start: tensor.layout().start_offset(), tensor, shape }
    }

    /// A weight as it lies where that is without gaps, transposed or not. Others are copied into order, so that a
    /// part of a larger matrix gives the numbers of the same matrix alone, bit for bit.
    pub(super) fn weight(w: &Dense) -> Self {
        let dense = |t: &Dense| t.layout().contiguous_offsets().is_some();
        let w = if dense(w) || dense(&w.transpose(0, 1)) { w.clone() } else { w.to_contiguous() };
        let layout = w.layout();
        let [rows, cols] = [layout.shape()[0], layout.shape()[1]];
        let [row_stride, col_stride] = [0, 1].map(|axis| layout.strides()[axis].unsigned_abs());
        let start = layout.start_offset();
        Self { tensor: w, start, shape: Shape { rows, cols, row_stride, col_stride } }
    }

    pub(super) fn view(&self) -> View<'_> {
        View::new(self.tensor.storage::<f32>(), self.start, self.shape)
    }

    /// In the precision in which it is held.
    pub(super) fn factor(&self) -> Factor<'_> {
        let (tensor, start, shape) = (&self.tensor, self.start, self.shape);
        match tensor.dtype() {
            DType::BF16 => Factor::Bf16(View::new(tensor.storage(), start, shape)),
            DType::F16 => Factor::F16(View::new(tensor.storage(), start, shape)),
            _ => Factor::F32(self.view()),
        }
    }

    pub(super) fn dims(&self) -> [usize; 2] {
        [self.shape.rows, self.shape.cols]
    }
}

/// The axes of `x` with another width.
fn widened(x: &Dense, width: usize) -> Vec<usize> {
    let mut dims = dims(x);
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    dims
}

/// `bias + Σ scale·a·b` of that shape, whose last axis is the columns.
pub(super) fn combined(
    shape: impl Into<Vec<usize>>,
    bias: Option<&Dense>,
    terms: &[Term<'_>],
) -> Dense {
    let (shape, bias) = (shape.into(), bias.map(in_order));
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape[..shape.len() - 1].iter().product();
    let start = bias.as_ref().map_or(Start::Nothing, |bias| Start::Row(flat(bias)));
    let write = |out: &mut [f32]| sum(out, [rows, cols], start, terms);
    match terms.first() {
        // SAFETY: each number is replaced, by the bias or by the first product.
        Some(first) if bias.is_some() || first.a.width() > 0 => unsafe { written(shape, write) },
        _ => make(shape, write), // a product of nothing writes nothing
    }
}

/// The output; `more` is added to it.
pub(super) fn forward(x: &Dense, w: &Dense, b: Option<&Dense>, more: Option<Term<'_>>) -> Dense {
    let (rows, weight) = (Matrix::rows(x), Matrix::weight(w));
    let first = Term::product(rows.view(), weight.factor());
    let [_, cols] = weight.dims();
    combined(widened(x, cols), b, &[Some(first), more].into_iter().flatten().collect::<Vec<_>>())
}

/// `g·Wᵀ`; `more` is added to it.
pub(super) fn input_gradient(g: &Dense, w: &Dense, more: Option<Term<'_>>) -> Dense {
    forward(g, &w.transpose(0, 1), None, more)
}

/// `xᵀ·g`
pub(super) fn weight_gradient(x: &Dense, g: &Dense) -> Dense {
    let (x, g) = (Matrix::rows(x), Matrix::rows(g));
    let term = Term::product(x.view().transposed(), g.factor());
    combined([x.dims()[1], g.dims()[1]], None, &[term])
}

/// `Σ g` over the rows, in their order.
pub(super) fn bias_gradient(g: &Dense) -> Dense {
    let g = in_order(g);
    let width = dims(&g).last().copied().unwrap_or(1);
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
        grads.register::<Flex>(node.id, input_gradient(&g, w, None));
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
    let y = forward(x.primitive(), w.primitive(), None, None);
    let state = state(&x, &w);
    let step = Backward::<Flex, 2>::prepare::<C>(Step, [x.node(), w.node()]);
    match step.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn biased<C: CheckpointStrategy>(x: Tracked, w: Tracked, b: Tracked) -> Tracked {
    let y = forward(x.primitive(), w.primitive(), Some(b.primitive()), None);
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
