//! A linear layer with a difference of low rank, `y = x·W + b + h·B`, `h = s·x·A`.
//!
//! With `u = s·g·Bᵀ`: `dx = g·Wᵀ + u·Aᵀ`, `dW = xᵀ·g`, `dA = xᵀ·u`, `dB = hᵀ·g`, `db = Σ g`. What is small is added up
//! where the large product lies, so that no second output and no second gradient of `x` is made.

use super::linear::{self, Matrix, bias_gradient, combined, input_gradient, weight_gradient};
use super::product::Term;
use super::tensors::in_order;
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};

/// `A [in, r]`, `B [r, out]` and `s`.
pub(super) type Factors<'a> = (&'a Dense, &'a Dense, f64);

/// The output, and `h`.
pub(super) fn forward(
    x: &Dense,
    w: &Dense,
    bias: Option<&Dense>,
    (a, b, scale): Factors<'_>,
) -> (Dense, Dense) {
    let h = scaled(scale, x, a);
    let (rows, matrix) = (Matrix::rows(&h), Matrix::weight(b));
    let more = Term::product(rows.view(), matrix.factor());
    let y = linear::forward(x, w, bias, Some(more));
    (y, h)
}

/// `s·x·A`
fn scaled(scale: f64, x: &Dense, a: &Dense) -> Dense {
    let (x, a) = (Matrix::rows(x), Matrix::weight(a));
    let term = Term { scale: scale as f32, a: x.view(), b: a.factor() };
    combined([x.dims()[0], a.dims()[1]], None, &[term])
}

/// What backward needs.
#[derive(Debug, Clone)]
struct State {
    /// For `dW` and `dA`.
    x: Option<Dense>,
    w: Dense,
    a: Dense,
    b: Dense,
    h: Dense,
    scale: f64,
}

#[derive(Debug)]
struct Step;

fn backward<const N: usize>(ops: Ops<State, N>, grads: &mut Gradients) {
    let g = in_order(&grads.consume::<Flex>(&ops.node));
    let State { x, w, a, b, h, scale } = ops.state;
    let u = scaled(scale, &g, &b.transpose(0, 1));
    let mut give = |parent: usize, gradient: &dyn Fn() -> Option<Dense>| {
        if let Some(Some(node)) = ops.parents.get(parent)
            && let Some(gradient) = gradient()
        {
            grads.register::<Flex>(node.id, gradient);
        }
    };
    give(0, &|| {
        let (rows, matrix) = (Matrix::rows(&u), Matrix::weight(&a));
        let more = Term::product(rows.view(), matrix.factor().transposed());
        Some(input_gradient(&g, &w, Some(more)))
    });
    give(1, &|| x.as_ref().map(|x| weight_gradient(x, &g)));
    give(2, &|| x.as_ref().map(|x| weight_gradient(x, &u)));
    give(3, &|| Some(weight_gradient(&h, &g)));
    give(4, &|| Some(bias_gradient(&g)));
}

impl Backward<Flex, 4> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, grads);
    }
}

impl Backward<Flex, 5> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, grads);
    }
}

pub(super) fn plain<C: CheckpointStrategy>([x, w, a, b]: [Tracked; 4], scale: f64) -> Tracked {
    let factors = (a.primitive(), b.primitive(), scale);
    let (y, h) = forward(x.primitive(), w.primitive(), None, factors);
    let nodes = [x.node(), w.node(), a.node(), b.node()];
    let state = state(&[x, w, a, b], h, scale);
    match Backward::<Flex, 4>::prepare::<C>(Step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn biased<C: CheckpointStrategy>(
    [x, w, a, b]: [Tracked; 4],
    bias: Tracked,
    scale: f64,
) -> Tracked {
    let factors = (a.primitive(), b.primitive(), scale);
    let (y, h) = forward(x.primitive(), w.primitive(), Some(bias.primitive()), factors);
    let nodes = [x.node(), w.node(), a.node(), b.node(), bias.node()];
    let state = state(&[x, w, a, b], h, scale);
    match Backward::<Flex, 5>::prepare::<C>(Step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

fn state([x, w, a, b]: &[Tracked; 4], h: Dense, scale: f64) -> State {
    let of = |t: &Tracked| t.primitive().clone();
    let x = (w.is_tracked() || a.is_tracked()).then(|| of(x));
    State { x, w: of(w), a: of(a), b: of(b), h, scale }
}
