//! Operations that a fine-tuning step is made of, fused.
//!
//! Each function computes what its documentation's formula says on any device and any float type. On
//! the CPU backend flex and in f32 (feature `flex`) it is one pass over memory on all cores with a
//! hand-written backward; elsewhere it is the plain composition of Burn's operations, which is also the
//! reference that tests compare values and gradients with ([`composed`]).
//!
//! Parameters may be held in half precision, bf16 or f16, under an input in f32: each is widened where it is used, which
//! loses nothing, and all arithmetic is f32's. On flex the weight of a product that is a constant is widened a block at
//! a time; in a composition there is an f32 copy of it while the operation runs.
//!
//! Plain tensors among the inputs are constants, as everywhere in Burn: no gradient is formed for them.

pub mod composed;
#[cfg(feature = "flex")]
mod flex;
mod memory;

pub use memory::keep_freed_memory;

use burn::tensor::{Device, Int, Tensor};

/// Whether the fused form serves: flex, and f32 throughout.
#[cfg(feature = "flex")]
fn fused(devices: &[Device], types: &[burn::tensor::DType]) -> bool {
    let flex = Device::flex();
    types.iter().all(|t| *t == burn::tensor::DType::F32)
        && devices.iter().all(|d| d.clone().without_autodiff() == flex)
}

/// Whether a product's weight is read as it is held: in f32, or in half precision as a constant. One on the autodiff
/// device may be tracked, and its gradient is the composition's.
#[cfg(feature = "flex")]
fn held(w: &Tensor<2>) -> bool {
    use burn::tensor::DType;
    match w.dtype() {
        DType::F32 => true,
        DType::BF16 | DType::F16 => !w.device().is_autodiff(),
        _ => false,
    }
}

/// Whether one shape costs on this device what the next one does: on flex. A GPU's kernels are compiled and tuned for
/// shapes.
pub fn any_shape(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return device.clone().without_autodiff() == Device::flex();
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

macro_rules! on_flex {
    ([$($tensor:expr),*] => $fused:expr) => {
        #[cfg(feature = "flex")]
        if fused(&[$($tensor.device()),*], &[$($tensor.dtype()),*]) {
            return $fused;
        }
    };
    ([$($tensor:expr),*], over $w:expr => $fused:expr) => {
        #[cfg(feature = "flex")]
        if fused(&[$w.device(), $($tensor.device()),*], &[$($tensor.dtype()),*]) && held(&$w) {
            return $fused;
        }
    };
}

/// `y = x·W + b`: `x [.., in]`, `W [in, out]`, `b [out]` → `[.., out]`.
///
/// All leading axes of `x` are rows of one product, and the bias is where the product is added up. `W` and `b` may be in
/// half precision.
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    match b.map(|b| composed::met(b, &x)) {
        Some(b) => {
            on_flex!([x, b], over w => flex::linear_biased(x, w, b));
            composed::linear(x, w, Some(b))
        }
        None => {
            on_flex!([x], over w => flex::linear(x, w));
            composed::linear(x, w, None)
        }
    }
}

/// A linear layer with a difference of low rank, `y = x·W + bias + s·x·A·B` (arXiv 2106.09685): `x [.., in]`,
/// `W [in, out]`, `bias [out]`, `A [in, r]`, `B [r, out]` → `[.., out]`.
///
/// Fused, what the factors give is added up in the layer's own output, and in the gradient of `x`. `W` and `bias` may be
/// in half precision.
pub fn low_rank<const D: usize>(
    x: Tensor<D>,
    w: Tensor<2>,
    bias: Option<Tensor<1>>,
    (a, b): (Tensor<2>, Tensor<2>),
    scale: f64,
) -> Tensor<D> {
    match bias.map(|bias| composed::met(bias, &x)) {
        Some(bias) => {
            on_flex!([x, bias, a, b], over w => flex::low_rank_biased(x, w, bias, a, b, scale));
            composed::low_rank(x, w, Some(bias), (a, b), scale)
        }
        None => {
            on_flex!([x, a, b], over w => flex::low_rank(x, w, a, b, scale));
            composed::low_rank(x, w, None, (a, b), scale)
        }
    }
}

/// `GELU(x) = x·Φ(x)` (arXiv 1606.08415), with the error function and not its `tanh` approximation.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    on_flex!([x] => flex::gelu(x));
    composed::gelu(x)
}

/// SwiGLU's middle, `silu(gate)·up` (arXiv 2002.05202), `silu(z) = z·σ(z)`: both of one shape.
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    on_flex!([gate, up] => flex::silu_mul(gate, up));
    composed::silu_mul(gate, up)
}

/// Layer norm over the last axis (arXiv 1607.06450): `(x − mean)/√(var + ε)·γ + β`,
/// `x [.., dim]`, `γ`, `β [dim]`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<D> {
    let (gamma, beta) = (composed::met(gamma, &x), beta.map(|beta| composed::met(beta, &x)));
    match beta {
        Some(beta) => {
            on_flex!([x, gamma, beta] => flex::layer_norm(x, gamma, beta, epsilon));
            composed::layer_norm(x, gamma, Some(beta), epsilon)
        }
        None => composed::layer_norm(x, gamma, None, epsilon),
    }
}

/// Layer norm of `x + residual`, both `[.., dim]`; see [`layer_norm`]. Fused, the sum is made in the norm's pass, and both
/// have one gradient.
pub fn layer_norm_of_sum<const D: usize>(
    x: Tensor<D>,
    residual: Tensor<D>,
    gamma: Tensor<1>,
    beta: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<D> {
    let Some(beta) = beta else { return layer_norm(x + residual, gamma, None, epsilon) };
    let [gamma, beta] = [gamma, beta].map(|parameter| composed::met(parameter, &x));
    if x.dims() == residual.dims() {
        on_flex!([x, residual, gamma, beta] => flex::layer_norm_of_sum(x, residual, gamma, beta, epsilon));
    }
    composed::layer_norm(x + residual, gamma, Some(beta), epsilon)
}

/// Root-mean-square norm over the last axis (arXiv 1910.07467): `x/√(mean(x²) + ε)·γ`,
/// `x [.., dim]`, `γ [dim]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let gamma = composed::met(gamma, &x);
    on_flex!([x, gamma] => flex::rms_norm(x, gamma, epsilon));
    composed::rms_norm(x, gamma, epsilon)
}

/// Rotary positions (arXiv 2104.09864): `x·cos + rotate_half(x)·sin`, `rotate_half(x) = (−x₂, x₁)` of the
/// two halves of the last axis.
///
/// `x [batch, heads, seq, d]`; `cos`, `sin [batch or 1, 1, seq, d]`, constants whose halves are alike.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    on_flex!([x, cos, sin] => flex::rotate(x, cos, sin));
    composed::rotate(x, cos, sin)
}

/// Cross-entropy behind a product, `Σₙ −log softmax(xₙ·W)[tₙ]`, and how many rows have their target on top:
/// `x [n, in]`, `W [in, classes]`, a target a row → `[1]` and `[1]`.
///
/// Fused, no `[n, classes]` matrix is made, neither for the value nor for the gradients, which come out of the
/// same pass (arXiv 2410.10989). For a vocabulary of 49,152 and 1,024 tokens that matrix is 200 MB. `W` may be in half
/// precision.
///
/// # Panics
/// If there is not one target a row, or a target is no class.
pub fn cross_entropy(x: Tensor<2>, w: Tensor<2>, targets: Vec<i32>) -> (Tensor<1>, Tensor<1, Int>) {
    #[cfg(feature = "flex")]
    if fused(&[x.device(), w.device()], &[x.dtype()]) && held(&w) {
        let both = flex::cross_entropy(x, w, targets);
        let correct = both.clone().without_autodiff().narrow(0, 1, 1).int();
        return (both.narrow(0, 0, 1), correct);
    }
    composed::cross_entropy(composed::linear(x, w, None), targets)
}

/// Attention, `softmax(q·kᵀ/√d + mask)·v`, heads joined again: `[batch, seq, heads·d]`.
///
/// `q [batch, heads, seq, d]`; `k`, `v [batch, groups, total, d]`, where `heads` is a multiple of `groups`
/// (grouped-query attention, arXiv 2305.13245: neighbouring heads share a group's keys and values);
/// `mask [batch or 1, 1, seq or 1, total]` is a constant: 0 where a pair may see each other, a large
/// negative number where not.
///
/// Fused, no `[seq, total]` matrix is kept: what backward needs are `q`, `k`, `v` and two numbers a row
/// (arXiv 2205.14135), and what the mask hides at both ends of a row is not computed.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<3> {
    match mask {
        Some(mask) => {
            on_flex!([q, k, v, mask] => flex::attention_masked(q, k, v, mask));
            composed::attention(q, k, v, Some(mask))
        }
        None => {
            on_flex!([q, k, v] => flex::attention(q, k, v));
            composed::attention(q, k, v, None)
        }
    }
}

/// Attention of rows that lie one after the other, without padding: `q [1, heads, tokens, d]`, `k`, `v [1, groups, tokens,
/// d]` → `[1, tokens, heads·d]`. `lengths` has how many queries and how many keys each row has; its queries see all of its own
/// keys, and no other's.
///
/// # Panics
/// If the rows together have not as many queries and keys as there are, or one has queries and no keys.
pub fn attention_rows(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    lengths: Vec<[usize; 2]>,
) -> Tensor<3> {
    let ([q_batch, _, queries, _], [k_batch, _, keys, _]) = (q.dims(), k.dims());
    let sums = [0, 1].map(|which| lengths.iter().map(|row| row[which]).sum::<usize>());
    assert_eq!([1, queries, 1, keys], [q_batch, sums[0], k_batch, sums[1]], "rows of attention");
    assert!(lengths.iter().all(|row| row[0] == 0 || row[1] > 0), "a row without keys");
    on_flex!([q, k, v] => flex::attention_rows(q, k, v, lengths));
    composed::attention_rows(q, k, v, &lengths)
}
