//! Attention by blocks of query rows, no `[seq, total]` matrix kept.
//!
//! `P = softmax(s·Q·Kᵀ + mask)`, `O = P·V`. What is kept of `P` are two numbers a row, the largest score `m` and `w = 1/Σ exp(· − m)`,
//! so that backward makes `P = w·exp(s·Q·Kᵀ + mask − m)` again (arXiv 2205.14135, algorithm 4; its one number, `log Σ exp`, would
//! lose `w` where everything is hidden and `m` is large):
//! `dV = Pᵀ·dO`, `dP = dO·Vᵀ`, `dS = P∘(dP − rowsum(P∘dP))`, `dQ = s·dS·K`, `dK = s·dSᵀ·Q`.
// Tasks write their own heads of one output, interleaved; see `Parts`.
#![allow(unsafe_code)]

use super::math::{dot, exp, largest, sum, vectorized};
use super::matrix::{Parts, Shape, View, ViewMut, matmul};
use super::tensors::{Strided, flat, make};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;
use std::ops::Range;

/// Query rows that are worked on at once.
const ROWS: usize = 64;

/// What is below this hides a pair: beside one that is seen, it adds nothing to a sum of exponentials.
const HIDDEN: f32 = -1e8;

/// The inputs, and what follows from their shapes.
struct Inputs {
    q: Strided,
    k: Strided,
    v: Strided,
    mask: Option<Strided>,
    scale: f32,
}

impl Inputs {
    fn new(q: &Dense, k: &Dense, v: &Dense, mask: Option<&Dense>) -> Self {
        let [q, k, v] = [q, k, v].map(Strided::new);
        let scale = (q.dims[3] as f32).powf(-0.5);
        Self { q, k, v, mask: mask.map(Strided::new), scale }
    }

    /// `[batch, heads, seq, d]`
    fn dims(&self) -> [usize; 4] {
        self.q.dims
    }

    fn total(&self) -> usize {
        self.k.dims[2]
    }

    /// The group whose keys and values a head reads.
    fn group(&self, head: usize) -> usize {
        head * self.k.dims[1] / self.q.dims[1]
    }

    /// A part of a matrix of queries, keys or values at a row of the batch and a head or group.
    fn part<'a>(of: &'a Strided, row: usize, head: usize, rows: &Range<usize>) -> View<'a> {
        let offset = of.at(row, head) + rows.start * of.row_stride();
        View::new(of.memory(), offset, Shape::spaced(rows.len(), of.dims[3], of.row_stride()))
    }

    /// The columns that any of these query rows sees; all, if one of them sees nothing, because its weights
    /// are those of a softmax over all that is hidden.
    fn seen(&self, row: usize, rows: &Range<usize>) -> Range<usize> {
        let total = self.total();
        let Some(mask) = &self.mask else { return 0..total };
        let (mut start, mut end) = (total, 0);
        let distinct = if mask.dims[2] == 1 { rows.start..rows.start + 1 } else { rows.clone() };
        for i in distinct {
            let line = mask.row(row, 0, i);
            let Some(first) = line.iter().position(|m| *m > HIDDEN) else { return 0..total };
            start = start.min(first);
            end = end.max(line.iter().rposition(|m| *m > HIDDEN).map_or(0, |last| last + 1));
        }
        start.min(end)..end
    }

    /// `s·Q·Kᵀ + mask` of a block, `[rows, seen]`, into `scores`.
    fn scores(
        &self,
        row: usize,
        head: usize,
        rows: &Range<usize>,
        seen: &Range<usize>,
        scores: &mut [f32],
    ) {
        let q = Self::part(&self.q, row, head, rows);
        let k = Self::part(&self.k, row, self.group(head), seen);
        let mut out = ViewMut::new(scores, Shape::rows(rows.len(), seen.len()));
        matmul(&mut out, false, self.scale, q, k.transposed());
        if let Some(mask) = &self.mask {
            for (i, scores) in rows.clone().zip(scores.chunks_exact_mut(seen.len())) {
                let mask = &mask.row(row, 0, i)[seen.clone()];
                scores.iter_mut().zip(mask).for_each(|(score, mask)| *score += mask);
            }
        }
    }
}

/// Blocks of the query rows.
fn blocks(seq: usize) -> impl Iterator<Item = Range<usize>> {
    (0..seq).step_by(ROWS).map(move |start| start..(start + ROWS).min(seq))
}

/// `m` and `w` of each row, `[batch, heads, seq]`.
type Sums = Vec<[f32; 2]>;

/// The output `[batch, seq, heads·d]`, and what backward needs of `P`.
pub(super) fn forward(q: &Dense, k: &Dense, v: &Dense, mask: Option<&Dense>) -> (Dense, Sums) {
    let inputs = Inputs::new(q, k, v, mask);
    let [batch, heads, seq, d] = inputs.dims();
    let mut sums = vec![[0.0_f32; 2]; batch * heads * seq];
    let out = make([batch, seq, heads * d], |out| {
        let out = Parts::new(out);
        sums.par_chunks_mut(seq.max(1)).enumerate().for_each(|(task, sums)| {
            let (row, head) = (task / heads, task % heads);
            let mut scores = vec![0.0_f32; ROWS.min(seq) * inputs.total()];
            for rows in blocks(seq) {
                let seen = inputs.seen(row, &rows);
                if seen.is_empty() {
                    continue; // there are no keys
                }
                let scores = &mut scores[..rows.len() * seen.len()];
                inputs.scores(row, head, &rows, &seen, scores);
                let sums = &mut sums[rows.clone()];
                for (line, sums) in scores.chunks_exact_mut(seen.len()).zip(sums.iter_mut()) {
                    *sums = vectorized(
                        #[inline(always)]
                        || soften(line),
                    );
                }
                let shape = Shape::spaced(rows.len(), d, heads * d);
                let offset = (row * seq + rows.start) * heads * d + head * d;
                // SAFETY: a task has a row of the batch and a head of its own, and its blocks other rows.
                let mut out = unsafe { out.view(offset, shape) };
                let p = View::new(scores, 0, Shape::rows(rows.len(), seen.len()));
                let v = Inputs::part(&inputs.v, row, inputs.group(head), &seen);
                matmul(&mut out, false, 1.0, p, v);
                for (i, [_, weight]) in sums.iter().enumerate() {
                    out.row(i).iter_mut().for_each(|x| *x *= weight);
                }
            }
        });
    });
    (out, sums)
}

/// Turns scores into `exp(score − m)`; returns `m` and `w`.
#[inline(always)]
fn soften(line: &mut [f32]) -> [f32; 2] {
    let top = largest(line);
    line.iter_mut().for_each(|score| *score = exp(*score - top));
    [top, 1.0 / sum(line)]
}

/// What backward needs.
#[derive(Debug, Clone)]
struct State {
    q: Dense,
    k: Dense,
    v: Dense,
    mask: Option<Dense>,
    sums: Sums,
}

/// Gradients of queries, keys and values, each laid out as `[batch, seq, heads, d]` in memory.
fn gradients(g: &Dense, state: &State) -> [Dense; 3] {
    let inputs = Inputs::new(&state.q, &state.k, &state.v, state.mask.as_ref());
    let [batch, heads, seq, d] = inputs.dims();
    let (groups, total) = (inputs.k.dims[1], inputs.total());
    let g = super::tensors::in_order(g);
    let g = flat(&g);
    let mut dq = make([batch, seq, heads, d], |_| ());
    let mut dk = make([batch, total, groups, d], |_| ());
    let mut dv = make([batch, total, groups, d], |_| ());
    {
        let dq = Parts::new(dq.storage_mut::<f32>());
        let dk = Parts::new(dk.storage_mut::<f32>());
        let dv = Parts::new(dv.storage_mut::<f32>());
        // A task has a group, whose heads add up in its keys' and values' gradients, in order.
        (0..batch * groups).into_par_iter().for_each(|task| {
            let (row, group) = (task / groups, task % groups);
            let mut p = vec![0.0_f32; ROWS.min(seq) * total];
            let mut dp = vec![0.0_f32; ROWS.min(seq) * total];
            let own = (0..heads).filter(|head| inputs.group(*head) == group);
            for (head, rows) in own.flat_map(|head| blocks(seq).map(move |rows| (head, rows))) {
                let seen = inputs.seen(row, &rows);
                if seen.is_empty() {
                    continue;
                }
                let (p, dp) =
                    (&mut p[..rows.len() * seen.len()], &mut dp[..rows.len() * seen.len()]);
                inputs.scores(row, head, &rows, &seen, p);
                let offset = (row * seq + rows.start) * heads * d + head * d;
                let g = View::new(g, offset, Shape::spaced(rows.len(), d, heads * d));
                let [q, k, v] = [
                    (&inputs.q, head, &rows),
                    (&inputs.k, group, &seen),
                    (&inputs.v, group, &seen),
                ]
                .map(|(of, at, range)| Inputs::part(of, row, at, range));
                let block = Shape::rows(rows.len(), seen.len());
                matmul(&mut ViewMut::new(dp, block), false, 1.0, g, v.transposed());
                let sums = &state.sums[(row * heads + head) * seq..][rows.clone()];
                vectorized(
                    #[inline(always)]
                    || {
                        for (line, [top, weight]) in p.chunks_exact_mut(seen.len()).zip(sums) {
                            line.iter_mut().for_each(|score| *score = exp(*score - top) * weight);
                        }
                        for (p, dp) in
                            p.chunks_exact(seen.len()).zip(dp.chunks_exact_mut(seen.len()))
                        {
                            let mean = dot(p, dp);
                            dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - mean));
                        }
                    },
                );
                let key_rows = Shape::spaced(seen.len(), d, groups * d);
                let key_offset = (row * total + seen.start) * groups * d + group * d;
                // SAFETY: a task has a row of the batch and a group of its own, and with it the group's
                // heads; one block's views end before the next one's begin.
                let (mut dq, mut dk, mut dv) = unsafe {
                    (
                        dq.view(offset, Shape::spaced(rows.len(), d, heads * d)),
                        dk.view(key_offset, key_rows),
                        dv.view(key_offset, key_rows),
                    )
                };
                let [p, ds] = [View::new(p, 0, block), View::new(dp, 0, block)];
                matmul(&mut dv, true, 1.0, p.transposed(), g);
                matmul(&mut dq, false, inputs.scale, ds, k);
                matmul(&mut dk, true, inputs.scale, ds.transposed(), q);
            }
        });
    }
    [dq, dk, dv].map(|d| d.transpose(1, 2))
}

#[derive(Debug)]
struct Step;

impl Backward<Flex, 3> for Step {
    type State = State;
    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = grads.consume::<Flex>(&ops.node);
        for (parent, gradient) in ops.parents.iter().zip(gradients(&g, &ops.state)) {
            if let Some(node) = parent {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

pub(super) fn tracked<C: CheckpointStrategy>(
    q: Tracked,
    k: Tracked,
    v: Tracked,
    mask: Option<Dense>,
) -> Tracked {
    let (y, sums) = forward(q.primitive(), k.primitive(), v.primitive(), mask.as_ref());
    let nodes = [q.node(), k.node(), v.node()];
    match Step.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let [q, k, v] = [q, k, v].map(Tracked::into_primitive);
            prep.finish(State { q, k, v, mask, sums }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
