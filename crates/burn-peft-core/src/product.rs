//! A difference that is a product of two thin matrices and nothing more.

use burn::tensor::Tensor;

/// `Δ(W) = s·A·B`, on activations `δ = s·x·A·B`, as plain numbers: what is done to LoRA's factors after a
/// training needs to know no more of the method ([`Method::product`](crate::Method::product)).
#[derive(Debug, Clone)]
pub struct Product {
    /// `A [fan_in, r]`.
    pub a: Tensor<2>,
    /// `B [r, fan_out]`.
    pub b: Tensor<2>,
    /// `s`.
    pub scaling: f64,
}
