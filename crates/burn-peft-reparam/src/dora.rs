//! DoRA (arXiv 2402.09353): a weight is the length of its columns times their direction; LoRA turns the
//! direction and the length is trained on its own.
//!
//! `W' = m / ‖V‖ · V` with `V = W + s·A·B` and `‖·‖` over each column, held constant in the gradient
//! (section 4.3). As a difference, with `c = m / ‖V‖`:
//!
//! on weights `Δ(W) = (c - 1)·W + c·s·A·B`, on activations `δ = (c - 1)·xW + c·s·x·A·B`.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

/// The trained length of each column.
#[derive(Module, Debug)]
pub struct Dora {
    /// `m [fan_out]`.
    pub magnitude: Param<Tensor<1>>,
    /// `‖W‖²` of each column, a constant: `[1, fan_out]`.
    squares: Tensor<2>,
}

impl Dora {
    /// For the frozen weight `w` and `s·A·B` at the start, where it changes nothing; trainable on `device`.
    pub(crate) fn new(
        w: Tensor<2>,
        factors: &(Tensor<2>, Tensor<2>),
        s: f64,
        device: &Device,
    ) -> Self {
        let squares = squares(&w);
        let lengths = lengths(&squares, &w, factors, s).flatten::<1>(0, 1);
        Self::with(Tensor::from_data(lengths.into_data(), device), squares)
    }

    /// With a length that was trained before.
    pub(crate) fn restored(w: &Tensor<2>, magnitude: Tensor<1>) -> Self {
        Self::with(magnitude, squares(w))
    }

    fn with(magnitude: Tensor<1>, squares: Tensor<2>) -> Self {
        Self { magnitude: Param::from_tensor(magnitude), squares }
    }

    /// `(c - 1)·base + c·delta`, where `base` is the frozen weight or what it makes of an input, `delta` the
    /// same of `s·A·B`, and their `axis` that of the outputs.
    pub(crate) fn turn<const D: usize>(
        &self,
        w: &Tensor<2>,
        factors: &(Tensor<2>, Tensor<2>),
        s: f64,
        (base, delta): (Tensor<D>, Tensor<D>),
        axis: usize,
    ) -> Tensor<D> {
        let c = self.magnitude.val().unsqueeze_dim(0) / lengths(&self.squares, w, factors, s);
        let mut shape = [1; D];
        shape[axis] = c.dims()[1];
        let c: Tensor<D> = c.reshape(shape);
        base.cast(delta.dtype()) * (c.clone() - 1.0) + delta * c
    }
}

/// What a layer gave, without its bias.
pub(crate) fn unbiased<const D: usize>(
    y: &Tensor<D>,
    bias: &Option<Param<Tensor<1>>>,
    axis: usize,
) -> Tensor<D> {
    let Some(bias) = bias else {
        return y.clone();
    };
    let mut shape = [1; D];
    shape[axis] = bias.dims()[0];
    y.clone() - bias.val().reshape(shape)
}

fn squares(w: &Tensor<2>) -> Tensor<2> {
    w.clone().cast(burn::tensor::DType::F32).square().sum_dim(0)
}

/// `‖W + s·A·B‖` of each column, a constant `[1, fan_out]`, without the dense sum:
/// `‖W‖² + 2s·Σᵣ B∘(AᵀW) + s²·Σᵣ B∘(AᵀA·B)`.
///
/// Where the difference cancels the column, the terms do too: a length is then no smaller than what
/// rounding leaves of `‖W‖`, so that nothing is divided by zero.
fn lengths(
    squares: &Tensor<2>,
    w: &Tensor<2>,
    (a, b): &(Tensor<2>, Tensor<2>),
    s: f64,
) -> Tensor<2> {
    let [a, b] = [a, b].map(|factor| factor.clone().without_autodiff());
    let at = a.clone().transpose();
    let aw = at.clone().matmul(w.clone().cast(a.dtype())); // [r, fan_out]
    let aab = at.matmul(a).matmul(b.clone());
    let cross = (b * (aw * (2.0 * s) + aab * (s * s))).sum_dim(0);
    let least = squares.clone() * f32::EPSILON + f32::MIN_POSITIVE;
    (squares.clone() + cross).max_pair(least).sqrt()
}
