//! In how many bits a model's weights are held.

use burn::tensor::{DType, Device, TensorData, f16};
use burn_peft_core::Error;

/// In which precision the weights are held: those of linear layers and embeddings, which are nearly all of a model.
/// Biases, norms, convolutions and what else there is stay in f32, and so do parameters that the checkpoint lacks.
///
/// Whatever is chosen here, activations are f32 and so are adapters, their gradients and the optimizer's state: a weight
/// in half precision is widened where it is used (`burn_peft_kernels`), which rounds nothing. A model in half
/// precision is thus the f32 model of the rounded weights, at half of the memory. It is what HF PEFT's users get by
/// `dtype=torch.bfloat16` and `autocast_adapter_dtype=True`, but for activations, which are bf16 there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// f32, whatever the file has.
    #[default]
    F32,
    /// bf16, whatever the file has: f32's range, 8 significant bits. Rounds to nearest, even at ties.
    Bf16,
    /// f16, whatever the file has: 11 significant bits up to 65504; a weight beyond is refused.
    F16,
    /// As in the file.
    Keep,
}

impl Precision {
    /// In which type a tensor is held that the file has in another; `matrix` says whether it is the weight of a linear layer
    /// or an embedding.
    fn of(self, stored: DType, matrix: bool) -> DType {
        match (self, matrix) {
            (Self::Bf16, true) => DType::BF16,
            (Self::F16, true) => DType::F16,
            (Self::Keep, true) => stored,
            (Self::Keep, false) if !matches!(stored, DType::BF16 | DType::F16) => stored,
            _ => DType::F32,
        }
    }

    /// A tensor of the file as it is held on `device`.
    ///
    /// # Errors
    /// A number that has no place in f16, or a device without the type.
    pub(crate) fn held(
        self,
        name: &str,
        data: TensorData,
        matrix: bool,
        device: &Device,
    ) -> Result<TensorData, Error> {
        let (stored, held) = (data.dtype(), self.of(data.dtype(), matrix));
        if !device.supports_dtype(held) {
            let reason = format!(
                "expected a type that the device computes with, found {} of `{name}`; load the model in float32, or \
                 on flex",
                held.name()
            );
            return Err(Error::config("dtype", reason));
        }
        if stored == held {
            return Ok(data);
        }
        let data = data.convert_dtype(held);
        let beyond = |numbers: &[f16]| numbers.iter().any(|number| !number.is_finite());
        match held == DType::F16 && data.as_slice::<f16>().is_ok_and(beyond) {
            false => Ok(data),
            true => Err(Error::tensor(
                name,
                "numbers that float16 holds, up to 65504",
                "larger ones, infinity or NaN; load the model in bfloat16 or float32",
            )),
        }
    }
}
