//! A base that is held in fewer bits than what is computed with.

use burn::tensor::{DType, Tensor};

pub(crate) fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// The numbers that a parameter of the base stands for, as all arithmetic over it takes them: bf16 and f16 are widened to
/// f32, which rounds nothing, and what is [quantized](crate::quantize) is read back. Others come as they are.
///
/// A method is handed weights like this ([`Site::matrix`](crate::Site::matrix), [`Fold`](crate::Fold)), and need not
/// know how the base is held. One that reads a layer's own in a forward pass goes through here, or through
/// `burn_peft_kernels`, whose products take half precision as it is.
pub fn widened<const D: usize>(parameter: Tensor<D>) -> Tensor<D> {
    let parameter = parameter.dequantize();
    if is_half(parameter.dtype()) { parameter.cast(DType::F32) } else { parameter }
}
