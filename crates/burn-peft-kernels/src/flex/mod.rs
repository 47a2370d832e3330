//! The fused forms on flex, registered as an extension of its backend: values in `Flex`, the backward in
//! `Autodiff<Flex>`.

mod attention;
mod cross_entropy;
mod half;
mod linear;
mod low_rank;
mod math;
mod matrix;
mod norm;
mod pointwise;
mod product;
mod rotary;
mod tensors;

use attention::{Around, Lengths};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

/// A tensor of flex.
type Dense = FloatTensor<Flex>;

/// What each function of the crate is to a backend.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait Kernels: Backend {
    /// `x·W`
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `x·W + b`
    fn fused_linear_biased(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `x·W + s·x·A·B`
    fn fused_low_rank(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// `x·W + bias + s·x·A·B`
    fn fused_low_rank_biased(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// `x·Φ(x)`
    fn fused_gelu(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `silu(gate)·up`
    fn fused_silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `(x − mean)/√(var + ε)·γ + β`
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// The same of `x + residual`
    fn fused_layer_norm_of_sum(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// `x/√(mean(x²) + ε)·γ`
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// `x·cos + rotate_half(x)·sin`
    fn fused_rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `[Σ −log softmax(x·W)[t], how many are right]`
    fn fused_cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Vec<i32>,
    ) -> FloatTensor<Self>;

    /// `softmax(q·kᵀ/√d)·v`
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `softmax(q·kᵀ/√d + mask)·v`
    fn fused_attention_masked(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The same of rows one after the other, `[queries, keys]` of each.
    fn fused_attention_rows(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        lengths: Vec<[usize; 2]>,
    ) -> FloatTensor<Self>;
}

impl Kernels for Flex {
    fn fused_linear(x: Dense, w: Dense) -> Dense {
        linear::forward(&x, &w, None, None)
    }

    fn fused_linear_biased(x: Dense, w: Dense, b: Dense) -> Dense {
        linear::forward(&x, &w, Some(&b), None)
    }

    fn fused_low_rank(x: Dense, w: Dense, a: Dense, b: Dense, scale: f64) -> Dense {
        low_rank::forward(&x, &w, None, (&a, &b, scale)).0
    }

    fn fused_low_rank_biased(
        x: Dense,
        w: Dense,
        bias: Dense,
        a: Dense,
        b: Dense,
        scale: f64,
    ) -> Dense {
        low_rank::forward(&x, &w, Some(&bias), (&a, &b, scale)).0
    }

    fn fused_gelu(x: Dense) -> Dense {
        pointwise::gelu(&x)
    }

    fn fused_silu_mul(gate: Dense, up: Dense) -> Dense {
        pointwise::silu_mul(&gate, &up)
    }

    fn fused_layer_norm(x: Dense, gamma: Dense, beta: Dense, epsilon: f64) -> Dense {
        norm::forward(&x, &gamma, Some(&beta), epsilon).0
    }

    fn fused_layer_norm_of_sum(
        x: Dense,
        residual: Dense,
        gamma: Dense,
        beta: Dense,
        epsilon: f64,
    ) -> Dense {
        norm::layer_norm_of_sum(&x, &residual, &gamma, &beta, epsilon)
    }

    fn fused_rms_norm(x: Dense, gamma: Dense, epsilon: f64) -> Dense {
        norm::forward(&x, &gamma, None, epsilon).0
    }

    fn fused_rotate(x: Dense, cos: Dense, sin: Dense) -> Dense {
        rotary::turn(&x, &cos, &sin, 1.0)
    }

    fn fused_cross_entropy(x: Dense, w: Dense, targets: Vec<i32>) -> Dense {
        cross_entropy::forward(&x, &w, &targets)
    }

    fn fused_attention(q: Dense, k: Dense, v: Dense) -> Dense {
        attention::forward(&q, &k, &v, &Around::default()).0
    }

    fn fused_attention_masked(q: Dense, k: Dense, v: Dense, mask: Dense) -> Dense {
        attention::forward(&q, &k, &v, &Around { mask: Some(mask), lengths: None }).0
    }

    fn fused_attention_rows(q: Dense, k: Dense, v: Dense, lengths: Lengths) -> Dense {
        attention::forward(&q, &k, &v, &Around { mask: None, lengths: Some(lengths) }).0
    }
}

/// A tensor with its place in the graph.
type Tracked = FloatTensor<Autodiff<Flex>>;

impl<C: CheckpointStrategy> Kernels for Autodiff<Flex, C> {
    fn fused_linear(x: Tracked, w: Tracked) -> Tracked {
        linear::plain::<C>(x, w)
    }

    fn fused_linear_biased(x: Tracked, w: Tracked, b: Tracked) -> Tracked {
        linear::biased::<C>(x, w, b)
    }

    fn fused_low_rank(x: Tracked, w: Tracked, a: Tracked, b: Tracked, scale: f64) -> Tracked {
        low_rank::plain::<C>([x, w, a, b], scale)
    }

    fn fused_low_rank_biased(
        x: Tracked,
        w: Tracked,
        bias: Tracked,
        a: Tracked,
        b: Tracked,
        scale: f64,
    ) -> Tracked {
        low_rank::biased::<C>([x, w, a, b], bias, scale)
    }

    fn fused_gelu(x: Tracked) -> Tracked {
        pointwise::gelu_tracked::<C>(x)
    }

    fn fused_silu_mul(gate: Tracked, up: Tracked) -> Tracked {
        pointwise::silu_mul_tracked::<C>(gate, up)
    }

    fn fused_layer_norm(x: Tracked, gamma: Tracked, beta: Tracked, epsilon: f64) -> Tracked {
        norm::layer_norm::<C>(x, gamma, beta, epsilon)
    }

    fn fused_layer_norm_of_sum(
        x: Tracked,
        residual: Tracked,
        gamma: Tracked,
        beta: Tracked,
        epsilon: f64,
    ) -> Tracked {
        norm::tracked_layer_norm_of_sum::<C>([x, residual, gamma, beta], epsilon)
    }

    fn fused_rms_norm(x: Tracked, gamma: Tracked, epsilon: f64) -> Tracked {
        norm::rms_norm::<C>(x, gamma, epsilon)
    }

    fn fused_rotate(x: Tracked, cos: Tracked, sin: Tracked) -> Tracked {
        rotary::tracked::<C>(x, cos, sin)
    }

    fn fused_cross_entropy(x: Tracked, w: Tracked, targets: Vec<i32>) -> Tracked {
        cross_entropy::tracked::<C>(x, w, &targets)
    }

    fn fused_attention(q: Tracked, k: Tracked, v: Tracked) -> Tracked {
        attention::tracked::<C>(q, k, v, Around::default())
    }

    fn fused_attention_masked(q: Tracked, k: Tracked, v: Tracked, mask: Tracked) -> Tracked {
        let mask = Some(mask.into_primitive());
        attention::tracked::<C>(q, k, v, Around { mask, lengths: None })
    }

    fn fused_attention_rows(q: Tracked, k: Tracked, v: Tracked, lengths: Lengths) -> Tracked {
        attention::tracked::<C>(q, k, v, Around { mask: None, lengths: Some(lengths) })
    }
}

macro_rules! wrap {
    ($name:ident = $kernel:ident($($input:ident [$rank:tt]),+ $(; $scalar:ident)?) -> [$out:tt]) => {
        pub(crate) fn $name<const D: usize>($($input: Tensor<$rank>),+ $(, $scalar: f64)?) -> Tensor<$out> {
            let out = <Dispatch as Kernels>::$kernel($($input.into_dispatch()),+ $(, $scalar)?);
            Tensor::from_dispatch(out)
        }
    };
    (ranked $name:ident = $kernel:ident($($input:ident [$rank:tt]),+) -> [$out:tt]) => {
        pub(crate) fn $name($($input: Tensor<$rank>),+) -> Tensor<$out> {
            let out = <Dispatch as Kernels>::$kernel($($input.into_dispatch()),+);
            Tensor::from_dispatch(out)
        }
    };
}

/// `[sum, correct]`
pub(crate) fn cross_entropy(x: Tensor<2>, w: Tensor<2>, targets: Vec<i32>) -> Tensor<1> {
    let (x, w) = (x.into_dispatch(), w.into_dispatch());
    Tensor::from_dispatch(<Dispatch as Kernels>::fused_cross_entropy(x, w, targets))
}

/// `[1, tokens, heads·d]`
pub(crate) fn attention_rows(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    lengths: Lengths,
) -> Tensor<3> {
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as Kernels>::fused_attention_rows(q, k, v, lengths))
}

wrap!(linear = fused_linear(x [D], w [2]) -> [D]);
wrap!(linear_biased = fused_linear_biased(x [D], w [2], b [1]) -> [D]);
wrap!(low_rank = fused_low_rank(x [D], w [2], a [2], b [2]; scale) -> [D]);
wrap!(low_rank_biased = fused_low_rank_biased(x [D], w [2], bias [1], a [2], b [2]; scale) -> [D]);
wrap!(gelu = fused_gelu(x [D]) -> [D]);
wrap!(silu_mul = fused_silu_mul(gate [D], up [D]) -> [D]);
wrap!(layer_norm = fused_layer_norm(x [D], gamma [1], beta [1]; epsilon) -> [D]);
wrap!(layer_norm_of_sum = fused_layer_norm_of_sum(x [D], residual [D], gamma [1], beta [1]; epsilon) -> [D]);
wrap!(rms_norm = fused_rms_norm(x [D], gamma [1]; epsilon) -> [D]);
wrap!(ranked rotate = fused_rotate(x [4], cos [4], sin [4]) -> [4]);
wrap!(ranked attention = fused_attention(q [4], k [4], v [4]) -> [3]);
wrap!(ranked attention_masked = fused_attention_masked(q [4], k [4], v [4], mask [4]) -> [3]);
