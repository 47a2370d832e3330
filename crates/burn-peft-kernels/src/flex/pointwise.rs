//! Element by element.
// Outputs are written whole; see `written`.
#![allow(unsafe_code)]

use super::math::{map, normal, sigmoid, zip, zip3};
use super::tensors::{dims, flat, in_order, written};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};

/// A fresh tensor of as many numbers as `like` has, of which `write` writes each.
fn every(like: &Dense, write: impl FnOnce(&mut [f32])) -> Dense {
    // SAFETY: the functions of `math` that take an output write each of its numbers from inputs of the same length.
    unsafe { written(dims(like), write) }
}

pub(super) fn gelu(x: &Dense) -> Dense {
    let x = in_order(x);
    every(&x, |out| {
        map(
            out,
            flat(&x),
            #[inline(always)]
            |x| x * normal(x).0,
        )
    })
}

/// `GELU'(x) = Φ(x) + x·φ(x)`
#[derive(Debug)]
struct Gelu;

impl Backward<Flex, 1> for Gelu {
    type State = Dense;
    fn backward(self, ops: Ops<Dense, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = in_order(&grads.consume::<Flex>(&ops.node));
        let x = in_order(&ops.state);
        if let [Some(node)] = &ops.parents {
            let dx = every(&x, |out| {
                zip(
                    out,
                    flat(&x),
                    flat(&g),
                    #[inline(always)]
                    |x, g| {
                        let (phi, bell) = normal(x);
                        g * (phi + x * bell)
                    },
                );
            });
            grads.register::<Flex>(node.id, dx);
        }
    }
}

pub(super) fn gelu_tracked<C: CheckpointStrategy>(x: Tracked) -> Tracked {
    let y = gelu(x.primitive());
    match Gelu.prepare::<C>([x.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(x.primitive().clone(), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

pub(super) fn silu_mul(gate: &Dense, up: &Dense) -> Dense {
    let (gate, up) = (in_order(gate), in_order(up));
    every(&gate, |out| {
        zip(
            out,
            flat(&gate),
            flat(&up),
            #[inline(always)]
            |z, up| z * sigmoid(z) * up,
        );
    })
}

/// `silu'(z) = σ(z)·(1 + z·(1 − σ(z)))`
#[derive(Debug)]
struct SiluMul;

impl Backward<Flex, 2> for SiluMul {
    type State = (Dense, Dense);
    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = in_order(&grads.consume::<Flex>(&ops.node));
        let (gate, up) = (in_order(&ops.state.0), in_order(&ops.state.1));
        let [to_gate, to_up] = &ops.parents;
        if let Some(node) = to_gate {
            let d = every(&g, |out| {
                zip3(
                    out,
                    [flat(&g), flat(&gate), flat(&up)],
                    #[inline(always)]
                    |g, z, up| {
                        let s = sigmoid(z);
                        g * up * (s * (1.0 + z * (1.0 - s)))
                    },
                );
            });
            grads.register::<Flex>(node.id, d);
        }
        if let Some(node) = to_up {
            let d = every(&g, |out| {
                zip(
                    out,
                    flat(&g),
                    flat(&gate),
                    #[inline(always)]
                    |g, z| g * z * sigmoid(z),
                );
            });
            grads.register::<Flex>(node.id, d);
        }
    }
}

pub(super) fn silu_mul_tracked<C: CheckpointStrategy>(gate: Tracked, up: Tracked) -> Tracked {
    let y = silu_mul(gate.primitive(), up.primitive());
    match SiluMul.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            prep.finish((gate.primitive().clone(), up.primitive().clone()), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
