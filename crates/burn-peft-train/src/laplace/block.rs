//! The posterior over one factor of a difference, as if it were a layer of its own: `A` with the inputs
//! `x` and `B` with the inputs `s·x·A`.

use super::factor::{Factor, Spectrum, numbers};
use super::taps::Seen;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Error, Product};

/// What a linear map `[p, q]` saw of a batch: `inputs [batch, seq, p]` and for each class the gradients
/// of its logit at the output, `[batch, seq, q]`.
pub(crate) struct View {
    inputs: Tensor<3>,
    gradients: Vec<Tensor<3>>,
}

/// What `A` and `B` of `δ = s·x·A·B` saw, from what the place saw.
pub(crate) fn views(product: &Product, seen: &Seen) -> [View; 2] {
    let plain = |factor: &Tensor<2>| factor.clone().without_autodiff().unsqueeze_dim::<3>(0);
    let (a, b) = (plain(&product.a), plain(&product.b));
    let back = |g: &Tensor<3>| g.clone().matmul(b.clone().swap_dims(1, 2)) * product.scaling;
    [
        View {
            inputs: seen.inputs.clone(),
            gradients: seen.gradients.iter().map(back).collect(), // s·g·Bᵀ
        },
        View {
            inputs: seen.inputs.clone().matmul(a) * product.scaling,
            gradients: seen.gradients.clone(),
        },
    ]
}

/// Positions that any logit depends on, `[batch, seq, 1]` of ones and zeros. Padding is not among them,
/// nor are the words of a last block whose first word alone is read.
pub(crate) fn active(seen: &Seen) -> Tensor<3> {
    let size = |g: &Tensor<3>| g.clone().abs().sum_dim(2);
    let sum = seen.gradients.iter().map(size).reduce(|sum, part| sum + part);
    let sum = sum.unwrap_or_else(|| seen.inputs.clone().sum_dim(2).zeros_like());
    sum.greater_elem(0.0).float()
}

impl View {
    /// The rows that the factors of the Fisher information are sums over, `[batch, p]` and
    /// `[batch · classes, q]`: the mean of the inputs over active positions, and the sums of the
    /// gradients `√p_y·(g_y - Σ_c p_c·g_c)`, of which the outer products are the expected one over
    /// `y ~ p`. `shares [batch, classes]` are the `p`.
    pub(crate) fn rows(&self, active: &Tensor<3>, shares: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let [batch, _, p] = self.inputs.dims();
        let count = active.clone().sum_dim(1).clamp_min(1.0);
        let inputs = (self.inputs.clone() * active.clone()).sum_dim(1) / count;
        let sums = self.gradients.iter().map(|g| g.clone().sum_dim(1)).collect();
        let sums = Tensor::cat(sums, 1); // [batch, classes, q]
        let [_, classes, q] = sums.dims();
        let shares = shares.clone().reshape([batch, classes, 1]);
        let mean = (sums.clone() * shares.clone()).sum_dim(1);
        let rows = (sums - mean) * shares.sqrt();
        (inputs.reshape([batch, p]), rows.reshape([batch * classes, q]))
    }
}

/// The two factors of a block's Fisher information while data comes.
#[derive(Debug)]
pub(crate) struct Gathered {
    inputs: Factor,
    outputs: Factor,
}

impl Gathered {
    /// For a map of the shape of `weight`.
    pub(crate) fn new(weight: &Tensor<2>, n_kfac: Option<usize>) -> Self {
        let ([p, q], device) = (weight.dims(), weight.device().inner());
        Self { inputs: Factor::new(p, n_kfac, &device), outputs: Factor::new(q, n_kfac, &device) }
    }

    /// With the [`View::rows`] of a batch at `path`.
    pub(crate) fn add(
        self,
        path: &str,
        (inputs, outputs): (Tensor<2>, Tensor<2>),
    ) -> Result<Self, Error> {
        let finite = |rows: &Tensor<2>| rows.clone().is_finite().all().into_scalar::<bool>();
        match finite(&inputs) && finite(&outputs) {
            true => {
                Ok(Self { inputs: self.inputs.add(inputs), outputs: self.outputs.add(outputs) })
            }
            false => {
                let reason =
                    "expected activations and gradients that are numbers, found NaN or infinity";
                Err(Error::place(path, reason))
            }
        }
    }

    /// The Fisher information of all `examples` that were added: `1/examples · Σaaᵀ ⊗ Σggᵀ`.
    pub(crate) fn finish(self, examples: usize) -> Block {
        let mut inputs = self.inputs.spectrum();
        inputs.values.iter_mut().for_each(|value| *value /= examples.max(1) as f64);
        Block { inputs, outputs: self.outputs.spectrum() }
    }
}

/// `F = U·diag(u)·Uᵀ ⊗ V·diag(v)·Vᵀ` over a map `[p, q]`.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) inputs: Spectrum,
    pub(crate) outputs: Spectrum,
}

impl Block {
    /// Eigenvalues `u_i·v_j` of `F`, those that are kept.
    pub(crate) fn curvatures(&self) -> impl Iterator<Item = f64> {
        self.inputs.values.iter().flat_map(|u| self.outputs.values.iter().map(move |v| u * v))
    }

    /// `J_c·(F + λ)⁻¹·J_c'ᵀ` of each row, `[batch, classes, classes]`, `J_c` the gradient of a logit by
    /// the map: `Σ_t x_t ⊗ g_ct`, exactly.
    pub(crate) fn covariance(&self, view: &View, precision: f64) -> Tensor<3> {
        let jacobian = |u: Option<&Tensor<2>>, v: Option<&Tensor<2>>| {
            let turned = |x: &Tensor<3>, by: Option<&Tensor<2>>| match by {
                Some(by) => x.clone().matmul(by.clone().unsqueeze_dim(0)),
                None => x.clone(),
            };
            let inputs = turned(&view.inputs, u).swap_dims(1, 2); // [batch, p, seq]
            let of = |g: &Tensor<3>| {
                let j = inputs.clone().matmul(turned(g, v));
                let [batch, p, q] = j.dims();
                j.reshape([batch, 1, p * q])
            };
            Tensor::cat(view.gradients.iter().map(of).collect(), 1) // [batch, classes, p · q]
        };
        let gram = |a: Tensor<3>, b: Tensor<3>| a.matmul(b.swap_dims(1, 2));
        let (u, v) = (&self.inputs, &self.outputs);
        let turned = jacobian(Some(&u.vectors), Some(&v.vectors));
        let variances: Vec<f32> =
            self.curvatures().map(|curvature| (curvature + precision).recip() as f32).collect();
        let count = variances.len();
        let data = TensorData::new(variances, [1, 1, count]);
        let variances = Tensor::<3>::from_data(data, &turned.device());
        let kept = gram(turned.clone() * variances, turned.clone());
        match u.is_whole() && v.is_whole() {
            true => kept,
            // Where no eigenvector is kept the prior alone says how sure one is.
            false => {
                let whole = jacobian(None, None);
                kept + (gram(whole.clone(), whole) - gram(turned.clone(), turned)) / precision
            }
        }
    }
}

/// `‖A‖² + ‖B‖²`.
pub(crate) fn squares(product: &Product) -> f64 {
    let all = |factor: &Tensor<2>| numbers(factor.clone().into_data());
    all(&product.a).iter().chain(&all(&product.b)).map(|value| value * value).sum()
}
