//! Which ranks of a place are left after a training that took some away.

use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::Error;

/// Indices of the ranks that are left of `r` at `path`: those where the mask is true, all without one.
///
/// # Errors
/// A mask of another length, with the `field` that holds it.
pub(crate) fn kept(
    field: &'static str,
    mask: Option<&Vec<bool>>,
    r: usize,
    path: &str,
) -> Result<Vec<i32>, Error> {
    let Some(mask) = mask else {
        return Ok((0..r as i32).collect());
    };
    if mask.len() != r {
        let reason = format!("expected {r} values for {path}, found {}", mask.len());
        return Err(Error::config(field, reason));
    }
    Ok((0..).zip(mask).filter_map(|(index, kept)| kept.then_some(index)).collect())
}

/// Those of `tensor` along `axis` that are `kept`, where it holds more: masked in training and not yet cut
/// out.
pub(crate) fn cut<const D: usize>(tensor: Tensor<D>, axis: usize, kept: &[i32]) -> Tensor<D> {
    let tensor = tensor.without_autodiff();
    if kept.len() >= tensor.dims()[axis] {
        return tensor;
    }
    let kept = TensorData::new(kept.to_vec(), [kept.len()]);
    let kept = Tensor::<1, Int>::from_data(kept, &tensor.device());
    tensor.select(axis, kept)
}
