//! Layer norm and root-mean-square norm over the last axis.
//!
//! `y = h·γ + β`, `h = (x − m)·r`, with `m` the mean and `r = 1/√(var + ε)`, or `m = 0` and
//! `r = 1/√(mean(x²) + ε)`. With `u = g·γ`: `dx = r·(u − mean(u) − h·mean(u·h))`, the middle term for the layer
//! norm only; `dγ = Σ g·h` and `dβ = Σ g` over the rows.
//!
//! Behind a residual, `x = a + b`, which is made in the same pass, and both have the gradient of `x`.
// Outputs are written whole; see `written`.
#![allow(unsafe_code)]

use super::math::{dot, spread, sum, vectorized};
use super::tensors::{dims, flat, in_order, make, written};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;

/// Rows that one task takes; sums over rows are added up task by task, in order.
const ROWS: usize = 32;

/// Mean and reciprocal deviation of each row; the mean is 0 for the root-mean-square norm.
type Moments = Vec<[f32; 2]>;

/// The output and the rows' moments; without `beta`, the root-mean-square norm.
pub(super) fn forward(
    x: &Dense,
    gamma: &Dense,
    beta: Option<&Dense>,
    epsilon: f64,
) -> (Dense, Moments) {
    let (x, gamma, beta) = (in_order(x), in_order(gamma), beta.map(in_order));
    let width = dims(&gamma)[0];
    let rows = flat(&x).len() / width.max(1);
    let mut moments = vec![[0.0_f32; 2]; rows];
    let (gamma, beta, epsilon) = (flat(&gamma), beta.as_ref().map(flat), epsilon as f32);
    let write = |out: &mut [f32]| {
        out.par_chunks_mut(ROWS * width.max(1))
            .zip(flat(&x).par_chunks(ROWS * width.max(1)))
            .zip(moments.par_chunks_mut(ROWS))
            .for_each(|((out, x), moments)| {
                let work = || {
                    let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((out, x), moments) in rows.zip(moments) {
                        *moments = row(out, x, gamma, beta, epsilon);
                    }
                };
                vectorized(work);
            });
    };
    // SAFETY: chunks are all rows, and a row is written whole.
    let y = unsafe { written(dims(&x), write) };
    (y, moments)
}

/// The layer norm of `a + b`, that sum, and the rows' moments.
fn of_sum(
    [a, b]: [&Dense; 2],
    gamma: &Dense,
    beta: &Dense,
    epsilon: f64,
) -> (Dense, Dense, Moments) {
    let [a, b, gamma, beta] = [a, b, gamma, beta].map(in_order);
    let width = dims(&gamma)[0];
    let mut moments = vec![[0.0_f32; 2]; flat(&a).len() / width.max(1)];
    let (gamma, beta, epsilon) = (flat(&gamma), flat(&beta), epsilon as f32);
    let chunk = ROWS * width.max(1);
    let mut x = None;
    let write = |out: &mut [f32]| {
        let write = |x: &mut [f32]| {
            let inputs = flat(&a).par_chunks(chunk).zip(flat(&b).par_chunks(chunk));
            let outputs = out.par_chunks_mut(chunk).zip(x.par_chunks_mut(chunk));
            outputs.zip(inputs).zip(moments.par_chunks_mut(ROWS)).for_each(
                |(((out, x), (a, b)), moments)| {
                    let work = || {
                        x.iter_mut().zip(a).zip(b).for_each(|((x, a), b)| *x = a + b);
                        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                        for ((out, x), moments) in rows.zip(moments) {
                            *moments = row(out, x, gamma, Some(beta), epsilon);
                        }
                    };
                    vectorized(work);
                },
            );
        };
        // SAFETY: as in `forward`.
        x = Some(unsafe { written(dims(&a), write) });
    };
    // SAFETY: as in `forward`.
    let y = unsafe { written(dims(&a), write) };
    (y, x.expect("is written with the output"), moments)
}

/// A row of the output, and its moments.
#[inline(always)]
fn row(out: &mut [f32], x: &[f32], gamma: &[f32], beta: Option<&[f32]>, epsilon: f32) -> [f32; 2] {
    let moments = row_moments(x, beta.is_some(), epsilon);
    let [mean, scale] = moments;
    match beta {
        Some(beta) => {
            for (((out, x), gamma), beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
                *out = (*x - mean) * scale * *gamma + *beta;
            }
        }
        None => {
            for ((out, x), gamma) in out.iter_mut().zip(x).zip(gamma) {
                *out = *x * scale * *gamma;
            }
        }
    }
    moments
}

#[inline(always)]
fn row_moments(x: &[f32], centred: bool, epsilon: f32) -> [f32; 2] {
    let n = x.len() as f32;
    if centred {
        let mean = sum(x) / n;
        [mean, 1.0 / (spread(x, mean) / n + epsilon).sqrt()]
    } else {
        [0.0, 1.0 / (dot(x, x) / n + epsilon).sqrt()]
    }
}

/// What backward needs.
#[derive(Debug, Clone)]
struct State {
    x: Dense,
    gamma: Dense,
    moments: Moments,
    centred: bool,
}

fn input_gradient(g: &Dense, state: &State) -> Dense {
    let (g, x, gamma) = (in_order(g), in_order(&state.x), in_order(&state.gamma));
    let width = dims(&gamma)[0];
    let gamma = flat(&gamma);
    let write = |out: &mut [f32]| {
        out.par_chunks_mut(ROWS * width.max(1))
            .zip(flat(&x).par_chunks(ROWS * width.max(1)))
            .zip(flat(&g).par_chunks(ROWS * width.max(1)))
            .zip(state.moments.par_chunks(ROWS))
            .for_each(|(((out, x), g), moments)| {
                let work = || {
                    let mut scaled = vec![0.0_f32; width]; // u
                    let mut normal = vec![0.0_f32; width]; // h
                    let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for (((out, x), g), [mean, scale]) in
                        rows.zip(g.chunks_exact(width)).zip(moments)
                    {
                        for i in 0..width {
                            scaled[i] = g[i] * gamma[i];
                            normal[i] = (x[i] - mean) * scale;
                        }
                        let n = width as f32;
                        let flat = if state.centred { sum(&scaled) / n } else { 0.0 };
                        let along = dot(&scaled, &normal) / n;
                        for i in 0..width {
                            out[i] = scale * (scaled[i] - flat - normal[i] * along);
                        }
                    }
                };
                vectorized(work);
            });
    };
    // SAFETY: as in `forward`.
    unsafe { written(dims(&x), write) }
}

/// `[Σ g·h, Σ g]`
fn parameter_gradients(g: &Dense, state: &State) -> [Dense; 2] {
    let (g, x) = (in_order(g), in_order(&state.x));
    let width = dims(&state.gamma)[0];
    let parts: Vec<[Vec<f32>; 2]> = flat(&x)
        .par_chunks(ROWS * width.max(1))
        .zip(flat(&g).par_chunks(ROWS * width.max(1)))
        .zip(state.moments.par_chunks(ROWS))
        .map(|((x, g), moments)| {
            let work = || {
                let [mut scale_sum, mut shift_sum] = [vec![0.0_f32; width], vec![0.0_f32; width]];
                let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
                for ((x, g), [mean, scale]) in rows.zip(moments) {
                    for i in 0..width {
                        scale_sum[i] += g[i] * ((x[i] - mean) * scale);
                        shift_sum[i] += g[i];
                    }
                }
                [scale_sum, shift_sum]
            };
            vectorized(work)
        })
        .collect();
    [0, 1].map(|which| {
        make([width], |out| {
            for part in &parts {
                out.iter_mut().zip(&part[which]).for_each(|(sum, part)| *sum += part);
            }
        })
    })
}

#[derive(Debug)]
struct Step;

/// Of parents that are so many inputs, and then parameters.
fn backward<const N: usize>(ops: Ops<State, N>, inputs: usize, grads: &mut Gradients) {
    let g = grads.consume::<Flex>(&ops.node);
    let (inputs, parameters) = ops.parents.split_at(inputs);
    let mut inputs = inputs.iter().flatten().peekable();
    if inputs.peek().is_some() {
        let gradient = input_gradient(&g, &ops.state);
        inputs.for_each(|node| grads.register::<Flex>(node.id, gradient.clone()));
    }
    if parameters.iter().any(Option::is_some) {
        for (parent, gradient) in parameters.iter().zip(parameter_gradients(&g, &ops.state)) {
            if let Some(node) = parent {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

impl Backward<Flex, 2> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, 1, grads);
    }
}

impl Backward<Flex, 3> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, 1, grads);
    }
}

impl Backward<Flex, 4> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        backward(ops, 2, grads);
    }
}

pub(super) fn layer_norm<C: CheckpointStrategy>(
    x: Tracked,
    gamma: Tracked,
    beta: Tracked,
    epsilon: f64,
) -> Tracked {
    let (y, moments) = forward(x.primitive(), gamma.primitive(), Some(beta.primitive()), epsilon);
    let nodes = [x.node(), gamma.node(), beta.node()];
    match Backward::<Flex, 3>::prepare::<C>(Step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state(&x, &gamma, moments, true), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn layer_norm_of_sum(
    a: &Dense,
    b: &Dense,
    gamma: &Dense,
    beta: &Dense,
    epsilon: f64,
) -> Dense {
    of_sum([a, b], gamma, beta, epsilon).0
}

pub(super) fn tracked_layer_norm_of_sum<C: CheckpointStrategy>(
    inputs: [Tracked; 4],
    epsilon: f64,
) -> Tracked {
    let nodes = inputs.each_ref().map(Tracked::node);
    let [a, b, gamma, beta] = inputs.map(Tracked::into_primitive);
    let (y, x, moments) = of_sum([&a, &b], &gamma, &beta, epsilon);
    match Backward::<Flex, 4>::prepare::<C>(Step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { x, gamma, moments, centred: true }, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn rms_norm<C: CheckpointStrategy>(x: Tracked, gamma: Tracked, epsilon: f64) -> Tracked {
    let (y, moments) = forward(x.primitive(), gamma.primitive(), None, epsilon);
    let nodes = [x.node(), gamma.node()];
    match Backward::<Flex, 2>::prepare::<C>(Step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state(&x, &gamma, moments, false), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

fn state(x: &Tracked, gamma: &Tracked, moments: Moments, centred: bool) -> State {
    State { x: x.primitive().clone(), gamma: gamma.primitive().clone(), moments, centred }
}
