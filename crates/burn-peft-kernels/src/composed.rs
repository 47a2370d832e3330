//! The same functions as compositions of Burn's operations: what runs where nothing is fused, and the
//! reference of the fused forms.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{DType, Int, Tensor, TensorData};

/// Whether it is bf16 or f16.
fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// A parameter as an input `x` meets it: in half precision it is made of `x`'s type.
pub(crate) fn met<const P: usize, const D: usize>(
    parameter: Tensor<P>,
    x: &Tensor<D>,
) -> Tensor<P> {
    if is_half(parameter.dtype()) { parameter.cast(x.dtype()) } else { parameter }
}

/// As [`linear`](crate::linear). A weight in half precision is widened whole, for as long as the product takes.
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    let (w, b) = (met(w, &x), b.map(|b| met(b, &x)));
    burn::tensor::module::linear(x, w, b)
}

/// As [`low_rank`](crate::low_rank).
pub fn low_rank<const D: usize>(
    x: Tensor<D>,
    w: Tensor<2>,
    bias: Option<Tensor<1>>,
    (a, b): (Tensor<2>, Tensor<2>),
    scale: f64,
) -> Tensor<D> {
    let h = linear(x.clone(), a, None) * scale; // [.., r]
    linear(x, w, bias) + linear(h, b, None)
}

/// As [`gelu`](crate::gelu).
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    burn::tensor::activation::gelu(x)
}

/// As [`silu_mul`](crate::silu_mul).
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}

/// As [`layer_norm`](crate::layer_norm); half precision is widened for the sums.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<D> {
    let own = x.dtype();
    let wide = if is_half(own) { DType::F32 } else { own };
    let beta = beta.map(|beta| beta.cast(wide));
    burn::tensor::module::layer_norm(x.cast(wide), gamma.cast(wide), beta, epsilon).cast(own)
}

/// As [`rms_norm`](crate::rms_norm); half precision is widened for the sum.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let own = x.dtype();
    let wide = if is_half(own) { DType::F32 } else { own };
    let gamma = met(gamma, &x);
    let rms = (x.clone().cast(wide).square().mean_dim(D - 1) + epsilon).sqrt();
    x / rms.cast(own) * gamma.unsqueeze()
}

/// As [`rotate`](crate::rotate).
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let [batch, heads, seq, d] = x.dims();
    let half = |range: std::ops::Range<usize>| x.clone().slice([0..batch, 0..heads, 0..seq, range]);
    let turned = Tensor::cat(vec![-half(d / 2..d), half(0..d / 2)], 3);
    x * cos + turned * sin
}

/// As [`cross_entropy`](crate::cross_entropy), of logits `[n, classes]` that are there.
pub fn cross_entropy(logits: Tensor<2>, targets: Vec<i32>) -> (Tensor<1>, Tensor<1, Int>) {
    let [rows, _] = logits.dims();
    let device = logits.device().without_autodiff();
    let targets: Tensor<1, Int> = Tensor::from_data(TensorData::new(targets, [rows]), &device);
    let best = logits.clone().without_autodiff().argmax(1).reshape([rows]);
    let correct = best.equal(targets.clone()).int().sum();
    let right = log_softmax(logits, 1).gather(1, targets.reshape([rows, 1])); // [n, 1]
    (-right.sum(), correct)
}

/// As [`attention_rows`](crate::attention_rows), with a mask that hides all other rows.
pub fn attention_rows(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    lengths: &[[usize; 2]],
) -> Tensor<3> {
    let of = |which: usize| {
        let rows = lengths.iter().enumerate();
        rows.flat_map(|(row, own)| vec![row; own[which]]).collect::<Vec<_>>()
    };
    let (queries, keys) = (of(0), of(1));
    let score = |q: &usize, k: &usize| if q == k { 0.0_f32 } else { -1e9 };
    let scores = queries.iter().flat_map(|q| keys.iter().map(move |k| score(q, k)));
    let scores = TensorData::new(scores.collect::<Vec<_>>(), [1, 1, queries.len(), keys.len()]);
    let mask = Tensor::<4>::from_data(scores, &q.device().without_autodiff()).cast(q.dtype());
    attention(q, k, v, Some(mask))
}

/// As [`attention`](crate::attention()).
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<3> {
    let [batch, heads, seq, d] = q.dims();
    let [_, groups, total, _] = k.dims();
    let share = heads / groups;
    // The scale goes on the smaller side; the heads of a group are rows of one product.
    let q = (q * (d as f64).powf(-0.5)).reshape([batch, groups, share * seq, d]);
    let mut scores = q.matmul(k.swap_dims(2, 3)).reshape([batch, heads, seq, total]);
    if let Some(mask) = mask {
        scores = scores + mask;
    }
    let weights = softmax(scores, 3).reshape([batch, groups, share * seq, total]);
    let mixed = weights.matmul(v).reshape([batch, heads, seq, d]);
    mixed.swap_dims(1, 2).reshape([batch, seq, heads * d])
}
