//! Heads and masks of attention.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Front, HIDDEN, Scope, Whole};
use burn_peft_kernels::{attention, composed};

/// `[batch, seq, heads · d]` → `[batch, heads, seq, d]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, heads, width / heads]).swap_dims(1, 2)
}

/// Keys, values and mask with what stands in front of them: `k`, `v [batch, groups, total, d]`,
/// `mask [batch or 1, 1, rows or 1, total]`.
pub(crate) fn behind(
    prefix: &Front<2>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>, Option<Tensor<4>>) {
    let [_, groups, total, _] = k.dims();
    let mask = columns_behind(&prefix.scores, mask, total, &k.device().inner());
    let [keys, values] = prefix.parts.clone().map(|part| split_heads(part, groups));
    (Tensor::cat(vec![keys, k], 2), Tensor::cat(vec![values, v], 2), mask)
}

/// What an attention at `cx` mixes: `q [batch, heads, rows, d]`, and `k`, `v [batch, groups, total, d]` behind what stands
/// in front of them.
pub(crate) fn mix(
    cx: &Scope<'_>,
    q: Tensor<4>,
    [k, v]: [Tensor<4>; 2],
    mask: Option<Tensor<4>>,
    prefix: Option<Front<2>>,
) -> Tensor<3> {
    let ([_, _, rows, d], [_, _, total, _]) = (q.dims(), k.dims());
    let front = prefix.as_ref().map_or(0, |prefix| prefix.scores.len());
    let (k, v, mask) = match &prefix {
        Some(prefix) => behind(prefix, k, v, mask),
        None => (k, v, mask),
    };
    let Some(added) = added(cx, [rows, total], front) else { return attention(q, k, v, mask) };
    // The fused form takes constants, and these are trained.
    let added = (added * (d as f64).powf(-0.5)).cast(q.dtype());
    let scores = mask.map_or(added.clone(), |mask| mask + added);
    composed::attention(q, k, v, Some(scores))
}

/// What `cx` adds to the products of queries and keys, `[batch or 1, 1, rows, front + total]`: nothing to the `front`.
pub(crate) fn added(cx: &Scope<'_>, [rows, total]: [usize; 2], front: usize) -> Option<Tensor<4>> {
    let own = cx.products(rows, total)?;
    let all = match front {
        0 => own,
        _ => {
            let [batch, rows, _] = own.dims();
            let none = Tensor::zeros([batch, rows, front], (&own.device().inner(), own.dtype()));
            Tensor::cat(vec![none, own], 2)
        }
    };
    Some(all.unsqueeze_dim(1))
}

/// The mask of `total` columns with those in front of them that have these scores.
pub(crate) fn columns_behind(
    scores: &[f32],
    mask: Option<Tensor<4>>,
    total: usize,
    device: &Device,
) -> Option<Tensor<4>> {
    if scores.is_empty() || (mask.is_none() && scores.iter().all(|score| *score == 0.0)) {
        return mask;
    }
    let mask = mask.unwrap_or_else(|| Tensor::zeros([1, 1, 1, total], device));
    let ([batch, _, rows, _], n) = (mask.dims(), scores.len());
    let front = Tensor::<4>::from_data(TensorData::new(scores.to_vec(), [1, 1, 1, n]), device);
    Some(Tensor::cat(vec![front.expand([batch, 1, rows, n]), mask], 3))
}

/// Puts `x [batch, seq, hidden]` through the blocks of an encoder, the list "layer" below `cx`, with what stands in front
/// of each, and each for all tokens or for some: `forward(block, x, whole, mask, cx)` is one of them, whose tokens see all
/// that `mask` does not hide, and whose keys and values are those of the `whole` where there is one.
///
/// Where the states of some tokens alone are read behind it, as many a row of `x`, the last block is run for these, and gives
/// on theirs: `read [count]` is where they stand among all of `x`, one after the other. All that lies over the model goes
/// [token by token](Scope::by_token) then.
pub(crate) fn through<L: Clone + 'static>(
    blocks: &[L],
    mut x: Tensor<3>,
    mask: Option<&Tensor<4>>,
    read: Option<Tensor<1, Int>>,
    cx: &Scope<'_>,
    forward: impl Fn(&L, Tensor<3>, Option<&Whole<'_>>, Option<Tensor<4>>, &Scope<'_>) -> Tensor<3>
    + Clone
    + 'static,
) -> Tensor<3> {
    let list = cx.at("layer");
    let mut carried = list.carried();
    for (index, block) in blocks.iter().enumerate() {
        let (block, forward, mut mask, mut n) = (block.clone(), forward.clone(), mask.cloned(), 0);
        let read = read.clone().filter(|_| index + 1 == blocks.len());
        if let Some(Front { parts: [tokens], scores }) = carried.before(index, &x) {
            let ([_, seq, _], device) = (x.dims(), x.device().inner());
            mask = columns_behind(&scores, mask, seq, &device);
            (x, n) = (Tensor::cat(vec![tokens, x], 1), scores.len());
        }
        let run = move |[x]: [Tensor<3>; 1], cx: &Scope<'_>| {
            let (mut at, mask) = (cx.block("layer", index), mask.clone());
            if n > 0 {
                at = at.behind(n, mask.clone());
            }
            let run = |x: Tensor<3>, whole: Option<&Whole<'_>>, mask, cx: &Scope<'_>| {
                forward(&block, x, whole, mask, cx)
            };
            if let Some(read) = &read {
                let own = these(&x, read);
                return run(own, Some(&Whole { x, cx: at.clone() }), mask, &at);
            }
            cx.at("layer").routed(index, x, mask, &at, run)
        };
        x = carried.after(cx.run([x], run));
    }
    x
}

/// The tokens of `x [batch, seq, hidden]` that stand at these places among all of them, `[batch, count / batch, hidden]`.
fn these(x: &Tensor<3>, places: &Tensor<1, Int>) -> Tensor<3> {
    let ([batch, seq, width], [count]) = (x.dims(), places.dims());
    let rows: Tensor<2> = x.clone().reshape([batch * seq, width]);
    rows.select(0, places.clone()).reshape([batch, count / batch.max(1), width])
}

/// Where the first token of each of so many rows stands among all tokens, `[batch]`.
pub(crate) fn first_of_rows([batch, seq]: [usize; 2], device: &Device) -> Tensor<1, Int> {
    Tensor::arange(0..batch as i64, &device.clone().inner()) * seq as i64
}

/// What is added to the score of a token or of padding.
pub(crate) fn score(kept: i32) -> f32 {
    if kept == 0 { HIDDEN } else { 0.0 }
}

/// Hides padding from everyone: `[batch, 1, 1, n + seq]`; `None` where there is none. `front` are the
/// scores of the `n` virtual tokens in front of each row.
pub(crate) fn padding_mask(
    mask: &[i32],
    front: &[f32],
    [batch, seq]: [usize; 2],
    device: &Device,
) -> Option<Tensor<4>> {
    let row = |mask: &[i32]| {
        let own = mask.iter().map(|&kept| score(kept));
        front.iter().copied().chain(own).collect::<Vec<f32>>()
    };
    let values = mask.chunks(seq).flat_map(row).collect::<Vec<f32>>();
    if values.iter().all(|score| *score == 0.0) {
        return None;
    }
    Some(Tensor::from_data(TensorData::new(values, [batch, 1, 1, front.len() + seq]), device))
}

/// Hides the future, padding, and other documents: `[batch or 1, 1, rows, total]`, where the last
/// `rows` of the `total` columns are the rows themselves.
///
/// `scores [batch][total]` is what is added for each column: 0, or [`HIDDEN`] for padding; `segments`
/// only without a past: those of the last columns of each row of the batch. What stands in front of them,
/// virtual tokens, is seen by all documents.
pub(crate) fn causal_mask(
    scores: &[Vec<f32>],
    rows: usize,
    segments: Option<&[i32]>,
    device: &Device,
) -> Option<Tensor<4>> {
    let total = scores.first().map_or(0, Vec::len);
    let past = total - rows;
    let uniform = segments.is_none() && scores.iter().flatten().all(|score| *score == 0.0);
    if uniform && rows == 1 {
        return None;
    }
    let own = segments.map_or(0, |segments| segments.len() / scores.len().max(1));
    let front = total - own;
    let batch = if uniform { &scores[..1] } else { scores };
    let mut values = Vec::with_capacity(batch.len() * rows * total);
    for (row, scores) in batch.iter().enumerate() {
        let document = |column: usize| segments.map(|s| s[row * own + column - front]);
        for i in 0..rows {
            for (j, &score) in scores.iter().enumerate() {
                let sees = j <= past + i && (j < front || document(j) == document(past + i));
                values.push(if sees { score } else { HIDDEN });
            }
        }
    }
    let shape = [batch.len(), 1, rows, total];
    Some(Tensor::from_data(TensorData::new(values, shape), device))
}

/// The mask of a decoder's `rows`, which have no past, with those above and columns before them that stand in front of a
/// block alone and have these scores: `[batch or 1, 1, n + rows, n + rows]`. All see those; they see no later one.
pub(crate) fn rows_above(
    scores: &[f32],
    mask: Option<Tensor<4>>,
    rows: usize,
    device: &Device,
) -> Option<Tensor<4>> {
    let n = scores.len();
    let own = mask.unwrap_or_else(|| Tensor::zeros([1, 1, 1, rows], device));
    let [batch, _, _, _] = own.dims();
    let own = own.expand([batch, 1, rows, rows]);
    let below = columns_behind(scores, Some(own), rows, device)?;
    let sees = |i: usize, j: usize| if j <= i { scores[j] } else { HIDDEN };
    let values = (0..n).flat_map(|i| (0..n + rows).map(move |j| (i, j)));
    let values: Vec<f32> = values.map(|(i, j)| sees(i, j)).collect();
    let above = Tensor::<4>::from_data(TensorData::new(values, [1, 1, n, n + rows]), device);
    Some(Tensor::cat(vec![above.expand([batch, 1, n, n + rows]), below], 2))
}
