//! Heads and masks of attention.

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Front, HIDDEN};

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
    let ([_, groups, total, _], n, device) = (k.dims(), prefix.scores.len(), k.device().inner());
    let mask = match mask {
        None if prefix.scores.iter().all(|score| *score == 0.0) => None,
        mask => {
            let mask = mask.unwrap_or_else(|| Tensor::zeros([1, 1, 1, total], &device));
            let [batch, _, rows, _] = mask.dims();
            let scores = TensorData::new(prefix.scores.clone(), [1, 1, 1, n]);
            let front = Tensor::<4>::from_data(scores, &device).expand([batch, 1, rows, n]);
            Some(Tensor::cat(vec![front, mask], 3))
        }
    };
    let [keys, values] = prefix.parts.clone().map(|part| split_heads(part, groups));
    (Tensor::cat(vec![keys, k], 2), Tensor::cat(vec![values, v], 2), mask)
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
