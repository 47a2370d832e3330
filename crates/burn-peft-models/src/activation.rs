//! What stands between the two layers of a feed-forward part.

use burn::tensor::Tensor;
use burn::tensor::activation::{gelu_approximate, relu};
use burn_peft_core::Error;
use burn_peft_kernels::gelu;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Activation {
    Gelu,
    GeluTanh,
    Relu,
}

impl Activation {
    /// By the name that `hidden_act` gives it.
    pub(crate) fn of(name: &str) -> Result<Self, Error> {
        match name {
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Self::GeluTanh),
            "relu" => Ok(Self::Relu),
            other => {
                let reason =
                    format!("`{other}` is not implemented; expected gelu, gelu_new or relu");
                Err(Error::config("hidden_act", reason))
            }
        }
    }

    pub(crate) fn apply(self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Gelu => gelu(x),
            Self::GeluTanh => gelu_approximate(x),
            Self::Relu => relu(x),
        }
    }
}
