//! Attention by blocks of query rows, no `[seq, total]` matrix kept.
//!
//! The heads of a group stand one below the other in a block, so that their keys and values are packed for all of them at once.
//!
//! `P = softmax(s·Q·Kᵀ + mask)`, `O = P·V`. What is kept of `P` are two numbers a row, the largest score `m` and `w = 1/Σ exp(· − m)`,
//! so that backward makes `P = w·exp(s·Q·Kᵀ + mask − m)` again (arXiv 2205.14135, algorithm 4; its one number, `log Σ exp`, would
//! lose `w` where everything is hidden and `m` is large):
//! `dV = Pᵀ·dO`, `dP = dO·Vᵀ`, `dS = P∘(dP − rowsum(dO∘O))`, `dQ = s·dS·K`, `dK = s·dSᵀ·Q`.
// Tasks write their own heads of one output, interleaved; see `Parts`.
#![allow(unsafe_code)]

use super::math::{dot, exp, largest, sum, vectorized};
use super::matrix::{Parts, Shape, View, ViewMut, matmul};
use super::tensors::{Strided, flat, in_order, written};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a block, all heads of a group together, and columns of it that backward works on at once: two such parts are
/// what a core's cache holds.
const ROWS: usize = 192;
const COLS: usize = 256;

/// Numbers that rows of scores are filled up to: the widest vector, so that none is left to go one by one.
const LANES: usize = 16;

/// Tasks a core, so that none waits long for the last.
const TASKS: usize = 4;

/// What is below this hides a pair: beside one that is seen, it adds nothing to a sum of exponentials.
const HIDDEN: f32 = -1e8;

/// The inputs, and what follows from their shapes.
struct Inputs {
    q: Strided,
    k: Strided,
    v: Strided,
    mask: Option<Strided>,
    scale: f32,
    rows: Vec<Row>,
    /// Those of each row's groups, `[rows · groups]`.
    blocks: Vec<Vec<Block>>,
}

/// Where the queries and the keys of a row stand: in a row of the batch, all of it, or some neighbours in the only one.
#[derive(Debug, Clone)]
struct Row {
    batch: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

/// Some query positions of a row, in all heads of a group, and the columns of its keys that any of them sees.
struct Block {
    batch: usize,
    group: usize,
    rows: Range<usize>,
    seen: Range<usize>,
}

/// How many queries and how many keys each row has, where rows lie one after the other.
pub(super) type Lengths = Vec<[usize; 2]>;

impl Inputs {
    fn new(q: &Dense, k: &Dense, v: &Dense, around: &Around) -> Self {
        let [q, k, v] = [q, k, v].map(Strided::new);
        let (heads, groups) = (q.dims[1], k.dims[1]);
        assert!(heads == 0 || heads.is_multiple_of(groups), "{heads} heads of {groups} groups");
        let scale = (q.dims[3] as f32).powf(-0.5);
        let mask = around.mask.as_ref().map(Strided::new);
        let rows = match &around.lengths {
            None => {
                let row = |batch| Row { batch, queries: 0..q.dims[2], keys: 0..k.dims[2] };
                (0..q.dims[0]).map(row).collect()
            }
            Some(lengths) => {
                let mut end = [0, 0];
                let row = |own: &[usize; 2]| {
                    let [queries, keys] = end;
                    end = [queries + own[0], keys + own[1]];
                    Row { batch: 0, queries: queries..end[0], keys: keys..end[1] }
                };
                lengths.iter().map(row).collect()
            }
        };
        let mut inputs = Self { q, k, v, mask, scale, rows, blocks: Vec::new() };
        inputs.blocks = inputs.cut();
        inputs
    }

    fn cut(&self) -> Vec<Vec<Block>> {
        let own = self.q.dims[1] / self.groups().max(1);
        let positions = (ROWS / own.max(1)).clamp(ROWS / 6, ROWS * 2 / 3);
        let parts = |row: &Row| {
            let Range { start, end } = row.queries;
            (start..end).step_by(positions).map(move |at| at..(at + positions).min(end))
        };
        // One mask for all rows is read once.
        let masked = &self.rows[..self.masks().min(self.rows.len())];
        let seen = masked.par_iter().map(|row| {
            let seen = |rows: Range<usize>| self.sees(row, &rows);
            parts(row).collect::<Vec<_>>().into_par_iter().map(seen).collect::<Vec<_>>()
        });
        let seen: Vec<Vec<Range<usize>>> = seen.collect();
        let mut blocks = Vec::with_capacity(self.rows.len() * self.groups());
        for (at, row) in self.rows.iter().enumerate() {
            let seen = match &self.mask {
                None => vec![row.keys.clone(); parts(row).count()],
                Some(_) => seen[if self.masks() == 1 { 0 } else { at }].clone(),
            };
            for group in 0..self.groups() {
                let block = |(rows, seen): (_, &Range<usize>)| Block {
                    batch: row.batch,
                    group,
                    rows,
                    seen: seen.clone(),
                };
                blocks.push(parts(row).zip(&seen).map(block).collect());
            }
        }
        blocks
    }

    /// `[batch, heads, seq, d]`
    fn dims(&self) -> [usize; 4] {
        self.q.dims
    }

    fn groups(&self) -> usize {
        self.k.dims[1]
    }

    /// The heads that read a group's keys and values.
    fn heads(&self, group: usize) -> Range<usize> {
        let own = self.q.dims[1] / self.groups();
        group * own..(group + 1) * own
    }

    /// Masks that differ: one a row of the batch, one for all, or none.
    fn masks(&self) -> usize {
        self.mask.as_ref().map_or(0, |mask| mask.dims[0])
    }

    /// The columns that any of these query positions sees; all, if one of them sees nothing, because its weights
    /// are those of a softmax over all that is hidden.
    fn sees(&self, row: &Row, rows: &Range<usize>) -> Range<usize> {
        let total = row.keys.end;
        let Some(mask) = &self.mask else { return row.keys.clone() };
        let (mut start, mut end) = (total, 0);
        let distinct = if mask.dims[2] == 1 { rows.start..rows.start + 1 } else { rows.clone() };
        for i in distinct {
            let line = mask.row(row.batch, 0, i);
            let Some(first) = line.iter().position(|m| *m > HIDDEN) else { return 0..total };
            start = start.min(first);
            end = end.max(line.iter().rposition(|m| *m > HIDDEN).map_or(0, |last| last + 1));
        }
        start.min(end)..end
    }

    /// Keys or values of a group at some columns, `[cols, d]`.
    fn part<'a>(of: &'a Strided, block: &Block, cols: &Range<usize>) -> View<'a> {
        let offset = of.at(block.batch, block.group) + cols.start * of.row_stride();
        View::new(of.memory(), offset, Shape::spaced(cols.len(), of.dims[3], of.row_stride()))
    }

    /// The head and the position of each line of a block.
    fn lines(&self, block: &Block) -> impl Iterator<Item = (usize, usize)> + use<> {
        let rows = block.rows.clone();
        self.heads(block.group).flat_map(move |head| rows.clone().map(move |i| (head, i)))
    }

    /// Copies the queries of a block into `to`, `[lines, d]`.
    fn queries(&self, block: &Block, to: &mut [f32]) {
        let mut to = to.chunks_exact_mut(self.q.dims[3]);
        for head in self.heads(block.group) {
            let from = self.q.rows(block.batch, head);
            for (i, to) in block.rows.clone().zip(to.by_ref()) {
                to.copy_from_slice(from.row(i));
            }
        }
    }

    /// What is added to the scores of a position at some columns.
    fn mask(&self, block: &Block, i: usize, cols: &Range<usize>) -> Option<&[f32]> {
        self.mask.as_ref().map(|mask| &mask.row(block.batch, 0, i)[cols.clone()])
    }
}

#[inline(always)]
fn add(to: &mut [f32], mask: Option<&[f32]>) {
    if let Some(mask) = mask {
        to.iter_mut().zip(mask).for_each(|(score, mask)| *score += mask);
    }
}

/// `m` and `w` of each row, `[batch, heads, seq, 2]`.
type Sums = Vec<f32>;

/// What is beside queries, keys and values: a mask, or the lengths of rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Around {
    pub(super) mask: Option<Dense>,
    pub(super) lengths: Option<Lengths>,
}

/// The output `[batch, seq, heads·d]`, and what backward needs of `P`.
pub(super) fn forward(q: &Dense, k: &Dense, v: &Dense, around: &Around) -> (Dense, Sums) {
    let inputs = Inputs::new(q, k, v, around);
    let [batch, heads, seq, d] = inputs.dims();
    let mut sums = vec![0.0_f32; batch * heads * seq * 2];
    let write = |out: &mut [f32]| {
        let (out, sums) = (Parts::new(out), Parts::new(&mut sums));
        let blocks: Vec<&Block> = inputs.blocks.iter().flatten().collect();
        blocks.par_iter().for_each_init(Room::default, |room, block| {
            // SAFETY: a task has positions and heads of its own.
            let place = |head: usize, i: usize| unsafe {
                let out = out.numbers((block.batch * seq + i) * heads * d + head * d, d);
                (out, sums.numbers(((block.batch * heads + head) * seq + i) * 2, 2))
            };
            room.mix(&inputs, block, place);
        });
    };
    // SAFETY: rows, groups and blocks are all positions in all heads.
    (unsafe { written([batch, seq, heads * d], write) }, sums)
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
    around: Around,
    out: Dense,
    sums: Sums,
}

/// Gradients of queries, keys and values, each laid out as `[batch, seq, heads, d]` in memory.
fn gradients(g: &Dense, state: &State) -> [Dense; 3] {
    let inputs = Inputs::new(&state.q, &state.k, &state.v, &state.around);
    let [batch, heads, seq, d] = inputs.dims();
    let (groups, total) = (inputs.groups(), inputs.k.dims[2]);
    let (g, out) = (in_order(g), in_order(&state.out));
    // Blocks of a group are shared out among tasks where groups are few. Each adds up keys' and values' gradients of its own.
    let wanted = TASKS * rayon::current_num_threads();
    let blocks = inputs.blocks.iter().map(Vec::len).max().unwrap_or(0);
    let shares = wanted.div_ceil(inputs.blocks.len().max(1)).clamp(1, blocks.max(1));
    let mut added: Vec<[Vec<f32>; 2]> = Vec::new();
    let write = |dq: &mut [f32]| {
        let dq = Parts::new(dq);
        let tasks = (0..inputs.blocks.len() * shares).into_par_iter();
        let taken = tasks.map_init(Room::default, |room, task| {
            let (at, share) = (task / shares, task % shares);
            let row = &inputs.rows[at / groups];
            let mut sums = [0, 1].map(|_| vec![0.0_f32; row.keys.len() * d]);
            for block in inputs.blocks[at].iter().skip(share).step_by(shares) {
                let keys = row.keys.start;
                room.take(&inputs, block, keys, [flat(&g), flat(&out)], &state.sums, &mut sums);
                for (line, (head, i)) in inputs.lines(block).enumerate() {
                    let offset = (block.batch * seq + i) * heads * d + head * d;
                    let from = &room.dq[line * d..(line + 1) * d];
                    // SAFETY: a task has positions and heads of its own.
                    unsafe { dq.numbers(offset, d) }.copy_from_slice(from);
                }
            }
            sums
        });
        taken.collect_into_vec(&mut added);
    };
    // SAFETY: rows, groups and blocks are all positions in all heads.
    let dq = unsafe { written([batch, seq, heads, d], write) };
    let place = |(at, row): (usize, &Row)| (0..row.keys.len()).map(move |i| (at, i));
    let places: Vec<_> = inputs.rows.iter().enumerate().flat_map(place).collect();
    let [dk, dv] = [0, 1].map(|which| {
        let write = |to: &mut [f32]| {
            let lines = to.par_chunks_mut((groups * d).max(1)).zip(&places);
            lines.for_each(|(to, (row, i))| {
                for (group, to) in to.chunks_exact_mut(d.max(1)).enumerate() {
                    let own = &added[(row * groups + group) * shares..][..shares];
                    let [first, rest @ ..] = own else { return };
                    let line = i * d..(i + 1) * d;
                    to.copy_from_slice(&first[which][line.clone()]);
                    for parts in rest {
                        let part = &parts[which][line.clone()];
                        to.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                    }
                }
            });
        };
        // SAFETY: rows have all keys, and at least one share of each.
        unsafe { written([batch, total, groups, d], write) }
    });
    [dq, dk, dv].map(|d| d.transpose(1, 2))
}

/// What a task works in, with numbers of the task before.
#[derive(Default)]
struct Room {
    q: Vec<f32>,
    g: Vec<f32>,
    dq: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    /// `m`, `w` and `dO·O` of each line.
    of: Vec<[f32; 3]>,
}

impl Room {
    /// A block's output and sums; `place(head, position)` is where they go.
    fn mix<'a>(
        &mut self,
        inputs: &Inputs,
        block: &Block,
        place: impl Fn(usize, usize) -> (&'a mut [f32], &'a mut [f32]),
    ) {
        let (seen, lines, d) = (block.seen.len(), inputs.lines(block).count(), inputs.dims()[3]);
        if seen == 0 || d == 0 {
            // There are no keys.
            return inputs.lines(block).for_each(|(head, i)| place(head, i).0.fill(0.0));
        }
        let filled = seen.next_multiple_of(LANES);
        self.q.resize(lines * d, 0.0);
        self.p.resize(lines * filled, 0.0);
        inputs.queries(block, &mut self.q);
        let (by_seen, by_d) = (Shape::spaced(lines, seen, filled), Shape::rows(lines, d));
        let [k, v] = [&inputs.k, &inputs.v].map(|of| Inputs::part(of, block, &block.seen));
        let mut scores = ViewMut::new(&mut self.p, by_seen);
        matmul(&mut scores, false, inputs.scale, View::new(&self.q, 0, by_d), k.transposed());
        vectorized(
            #[inline(always)]
            || {
                for (scores, (head, i)) in self.p.chunks_exact_mut(filled).zip(inputs.lines(block))
                {
                    add(scores, inputs.mask(block, i, &block.seen));
                    scores[seen..].fill(f32::NEG_INFINITY);
                    place(head, i).1.copy_from_slice(&soften(scores));
                }
            },
        );
        // What the queries needed holds the outputs now.
        let p = View::new(&self.p, 0, by_seen);
        matmul(&mut ViewMut::new(&mut self.q, by_d), false, 1.0, p, v);
        for (mixed, (head, i)) in self.q.chunks_exact(d).zip(inputs.lines(block)) {
            let (out, sums) = place(head, i);
            out.iter_mut().zip(mixed).for_each(|(out, mixed)| *out = mixed * sums[1]);
        }
    }

    /// A block's `dQ`, which is left in `dq`; its `dK` and `dV` are added to `sums`, which begin at key `start`.
    fn take(
        &mut self,
        inputs: &Inputs,
        block: &Block,
        start: usize,
        [g, out]: [&[f32]; 2],
        sums: &Sums,
        [dk, dv]: &mut [Vec<f32>; 2],
    ) {
        let [_, heads, seq, d] = inputs.dims();
        let lines = inputs.lines(block).count();
        let by_d = Shape::rows(lines, d);
        for room in [&mut self.q, &mut self.g, &mut self.dq] {
            room.resize(lines * d, 0.0);
        }
        if block.seen.is_empty() || d == 0 {
            return self.dq.fill(0.0);
        }
        for room in [&mut self.p, &mut self.ds] {
            room.resize(lines * block.seen.len().min(COLS).next_multiple_of(LANES), 0.0);
        }
        self.of.resize(lines, [0.0; 3]);
        inputs.queries(block, &mut self.q);
        let to = self.g.chunks_exact_mut(d).zip(&mut self.of);
        for ((to, of), (head, i)) in to.zip(inputs.lines(block)) {
            let at = (block.batch * seq + i) * heads * d + head * d;
            to.copy_from_slice(&g[at..at + d]);
            let sums = &sums[((block.batch * heads + head) * seq + i) * 2..][..2];
            *of = [sums[0], sums[1], dot(to, &out[at..at + d])];
        }
        for first in block.seen.clone().step_by(COLS) {
            let cols = first..(first + COLS).min(block.seen.end);
            let filled = cols.len().next_multiple_of(LANES);
            let shape = Shape::spaced(lines, cols.len(), filled);
            let [k, v] = [&inputs.k, &inputs.v].map(|of| Inputs::part(of, block, &cols));
            let (q, g) = (View::new(&self.q, 0, by_d), View::new(&self.g, 0, by_d));
            let (p, ds) = (&mut self.p, &mut self.ds);
            matmul(&mut ViewMut::new(p, shape), false, inputs.scale, q, k.transposed());
            matmul(&mut ViewMut::new(ds, shape), false, 1.0, g, v.transposed());
            vectorized(
                #[inline(always)]
                || {
                    let both = p.chunks_exact_mut(filled).zip(ds.chunks_exact_mut(filled));
                    for (((p, ds), of), (_, i)) in both.zip(&self.of).zip(inputs.lines(block)) {
                        let [top, weight, mean] = *of;
                        add(p, inputs.mask(block, i, &cols));
                        p.iter_mut().for_each(|score| *score = exp(*score - top) * weight);
                        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = *p * (*ds - mean));
                    }
                },
            );
            let (p, ds) = (View::new(p, 0, shape), View::new(ds, 0, shape));
            let keys = (cols.start - start) * d..(cols.end - start) * d;
            let by_cols = Shape::rows(cols.len(), d);
            let mut dv = ViewMut::new(&mut dv[keys.clone()], by_cols);
            matmul(&mut dv, true, 1.0, p.transposed(), g);
            let mut dk = ViewMut::new(&mut dk[keys], by_cols);
            matmul(&mut dk, true, inputs.scale, ds.transposed(), q);
            let mut dq = ViewMut::new(&mut self.dq, by_d);
            matmul(&mut dq, first > block.seen.start, inputs.scale, ds, k);
        }
    }
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
    around: Around,
) -> Tracked {
    let (y, sums) = forward(q.primitive(), k.primitive(), v.primitive(), &around);
    let nodes = [q.node(), k.node(), v.node()];
    match Step.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let [q, k, v] = [q, k, v].map(Tracked::into_primitive);
            prep.finish(State { q, k, v, around, out: y.clone(), sums }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
