//! Heads and masks of attention.

use burn::tensor::{Device, Tensor, TensorData};

/// What is added to the score of a pair that must not see each other: finite, so that a row of
/// padding stays a number.
const HIDDEN: f32 = -1e9;

/// `[batch, seq, heads · d]` → `[batch, heads, seq, d]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, heads, width / heads]).swap_dims(1, 2)
}

/// Hides padding from everyone: `[batch, 1, 1, seq]`; `None` where there is no padding.
pub(crate) fn padding_mask(
    mask: &[i32],
    [batch, seq]: [usize; 2],
    device: &Device,
) -> Option<Tensor<4>> {
    if mask.iter().all(|&kept| kept != 0) {
        return None;
    }
    let values: Vec<f32> = mask.iter().map(|&kept| if kept == 0 { HIDDEN } else { 0.0 }).collect();
    Some(Tensor::from_data(TensorData::new(values, [batch, 1, 1, seq]), device))
}

/// Hides the future, padding, and other documents: `[batch or 1, 1, seq, total]`, where the last
/// `seq` of the `total` columns are the rows themselves.
///
/// `kept [batch][total]` is 0 for padding; `segments [batch · seq]` only without a past.
pub(crate) fn causal_mask(
    kept: &[Vec<i32>],
    seq: usize,
    segments: Option<&[i32]>,
    device: &Device,
) -> Option<Tensor<4>> {
    let total = kept.first().map_or(0, Vec::len);
    let past = total - seq;
    let uniform = segments.is_none() && kept.iter().flatten().all(|&kept| kept != 0);
    if uniform && seq == 1 {
        return None;
    }
    let rows = if uniform { &kept[..1] } else { kept };
    let mut values = Vec::with_capacity(rows.len() * seq * total);
    for (row, kept) in rows.iter().enumerate() {
        let document = |column: usize| segments.map(|s| s[row * seq + column - past]);
        for i in 0..seq {
            for (j, &kept) in kept.iter().enumerate() {
                let sees =
                    j <= past + i && kept != 0 && (j < past || document(j) == document(past + i));
                values.push(if sees { 0.0_f32 } else { HIDDEN });
            }
        }
    }
    let shape = [rows.len(), 1, seq, total];
    Some(Tensor::from_data(TensorData::new(values, shape), device))
}
