//! What adapters do between their two matrices, by AdapterHub's names.

use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, gelu_approximate, relu, sigmoid, silu};
use serde::{Deserialize, Serialize};

/// A function of each number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// `x·Φ(x)`.
    Gelu,
    /// [`Gelu`](Self::Gelu) by `tanh`.
    GeluNew,
    /// `x`.
    Linear,
    /// `max(x, 0)`.
    Relu,
    /// `1/(1 + e⁻ˣ)`.
    Sigmoid,
    /// `x/(1 + e⁻ˣ)`.
    Swish,
    /// `tanh(x)`.
    Tanh,
}

impl Nonlinearity {
    pub(crate) fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Gelu => gelu(x),
            Self::GeluNew => gelu_approximate(x),
            Self::Linear => x,
            Self::Relu => relu(x),
            Self::Sigmoid => sigmoid(x),
            Self::Swish => silu(x),
            Self::Tanh => x.tanh(),
        }
    }
}
