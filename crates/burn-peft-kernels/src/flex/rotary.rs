//! Rotary positions: `(x₁·c − x₂·s, x₂·c + x₁·s)`, whose backward is the turn the other way.

use super::math::vectorized;
use super::tensors::{Strided, make};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;

/// `x` turned by `sign` times its angles. The output lies as `[batch, seq, heads, d]` in memory, which is
/// how projections come and attention reads them.
pub(super) fn turn(x: &Dense, cos: &Dense, sin: &Dense, sign: f32) -> Dense {
    let [x, cos, sin] = [x, cos, sin].map(Strided::new);
    let [batch, heads, seq, d] = x.dims;
    let out = make([batch, seq, heads, d], |out| {
        out.par_chunks_mut((heads * d).max(1)).enumerate().for_each(|(place, out)| {
            let (row, position) = (place / seq, place % seq);
            let (cos, sin) = (cos.row(row, 0, position), sin.row(row, 0, position));
            vectorized(
                #[inline(always)]
                || {
                    for (head, out) in out.chunks_exact_mut(d).enumerate() {
                        let x = x.row(row, head, position);
                        let half = d / 2;
                        let (x1, x2) = x.split_at(half);
                        let (y1, y2) = out.split_at_mut(half);
                        for i in 0..half {
                            let (c, s) = (cos[i], sign * sin[i]);
                            y1[i] = x1[i] * c - x2[i] * s;
                            y2[i] = x2[i] * c + x1[i] * s;
                        }
                    }
                },
            );
        });
    });
    out.transpose(1, 2)
}

#[derive(Debug)]
struct Step;

impl Backward<Flex, 1> for Step {
    type State = (Dense, Dense);
    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = grads.consume::<Flex>(&ops.node);
        if let [Some(node)] = &ops.parents {
            grads.register::<Flex>(node.id, turn(&g, &ops.state.0, &ops.state.1, -1.0));
        }
    }
}

pub(super) fn tracked<C: CheckpointStrategy>(x: Tracked, cos: Tracked, sin: Tracked) -> Tracked {
    let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
    let y = turn(x.primitive(), &cos, &sin, 1.0);
    match Step.prepare::<C>([x.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((cos, sin), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
