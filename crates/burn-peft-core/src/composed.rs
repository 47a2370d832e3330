//! The faces of a difference that has no cheaper way than its weight: the layer with `W + Δ(W)`,
//! composed on each call.
//!
//! For weight-only methods ([`Method::weight_only`](crate::Method::weight_only)): those whose effect on an
//! activation costs as much as the dense difference itself (a Hadamard product with `W`, a sparse mask, a
//! spectrum). Its backward forms a gradient as large as the weight.

use crate::{Fold, as_matrix, from_matrix, widened};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Int, Tensor};

fn bias<F: Fold + ?Sized>(fold: &F, base: Option<Tensor<1>>) -> Option<Tensor<1>> {
    base.map(widened).map(|b| match fold.bias(&b) {
        Some(delta) => b + delta,
        None => b,
    })
}

/// The whole output `x·(W + Δ(W)) + b + Δ(b)`, for [`Adapter::linear_whole`](crate::Adapter::linear_whole).
pub fn linear<F: Fold + ?Sized>(fold: &F, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
    let w = widened(layer.weight.val());
    let delta = fold.weight(&w)?;
    // Another base is met in the adapter's precision.
    let dtype = delta.dtype();
    let bias = bias(fold, layer.bias.as_ref().map(|b| b.val().cast(dtype)));
    let y = burn_peft_kernels::linear(x.clone().cast(dtype), w.cast(dtype) + delta, bias);
    Some(y.cast(x.dtype()))
}

/// `δ` of an embedding: the ids' rows of `Δ(W)`.
pub fn embedding<F: Fold + ?Sized>(
    fold: &F,
    layer: &Embedding,
    ids: &Tensor<2, Int>,
) -> Option<Tensor<3>> {
    let delta = fold.weight(&widened(layer.weight.val()))?;
    Some(burn::tensor::module::embedding(delta, ids.clone()))
}

/// `δ` of a convolution over time: one with the kernels `Δ(W)`.
pub fn conv1d<F: Fold + ?Sized>(fold: &F, layer: &Conv1d, x: &Tensor<3>) -> Option<Tensor<3>> {
    let w = layer.weight.val();
    let shape = w.dims();
    let mut copy = layer.clone();
    copy.weight = burn::module::Param::initialized(
        layer.weight.id,
        from_matrix(fold.weight(&as_matrix(w))?, shape),
    );
    copy.bias = None;
    Some(copy.forward(x.clone()))
}

/// `δ` of a convolution over images: one with the kernels `Δ(W)`.
pub fn conv2d<F: Fold + ?Sized>(fold: &F, layer: &Conv2d, x: &Tensor<4>) -> Option<Tensor<4>> {
    let w = layer.weight.val();
    let shape = w.dims();
    let mut copy = layer.clone();
    copy.weight = burn::module::Param::initialized(
        layer.weight.id,
        from_matrix(fold.weight(&as_matrix(w))?, shape),
    );
    copy.bias = None;
    Some(copy.forward(x.clone()))
}
