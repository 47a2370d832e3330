//! MonteCLoRA (arXiv 2411.04358): `A` is the mean of a distribution that is learnt beside it, and training draws
//! from it.

use crate::common::{finite, positive};
use crate::init::Place;
use crate::lora::LoraAdapter;
use crate::lora_variant::LoraVariant;
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft_core::{Error, PlaceTensors};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const STD: &str = "lora_monteclora_sampler.std_prior";
const EXPERTS: &str = "lora_monteclora_sampler.expert_weights_prior";
const VARIANCE: &str = "lora_monteclora_sampler.gaussian_var_prior";
const WEIGHTS: &str = "lora_monteclora_sampler.expert_weights";

/// Options of MonteCLoRA (arXiv 2411.04358, section 4), as HF PEFT has it: in training `A` is
/// `Σₙ wₙ·(A + c·Zₙ·diag(√v))`, drawn anew at each pass, with `c` the `sample_scaler` and
///
/// - `Zₙ [fan_in, r]` from `N(0, 1)`, for each of `N` samples;
/// - `v = max(exp(σ)²·χ², 1e-3)` with `χ² [r]` the diagonal of a Wishart matrix, of `r` degrees of freedom each;
/// - `w [N] = softmax(μ + √τ·z)`, a Dirichlet's normal approximation: with `α = exp(ω)`, `μ = ln α - mean(ln α)` and
///   `τ = (1 - 2/N)/α + Σ(1/α)/N²`.
///
/// Trained beside LoRA's factors: `σ [r]` and `ω [N]`, both from `U(0, 1)`. The loss gains the mean over the places of
/// `kl_loss_weight·KL` (of the Dirichlet from its prior, the Wishart and the normal from those of the identity) and, with
/// `use_entropy`, of `Σ w²`, each of a draw of its own. Else it is LoRA: neither a merge nor a pass without gradients
/// draws, nor does a model that it is attached to. Parameters: `r + N` a place beside LoRA's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MontecloraConfig {
    /// `N`; default 8.
    pub num_samples: usize,
    /// Keep the samples' weights from falling on one; default false.
    pub use_entropy: bool,
    /// The Dirichlet prior's `α`, the same for all samples; default 0.1.
    pub dirichlet_prior: f64,
    /// `c`; default 1e-4.
    pub sample_scaler: f64,
    /// Default 1e-5.
    pub kl_loss_weight: f64,
    /// How many draws HF PEFT makes at a time, 150; of no effect here.
    pub buffer_size: usize,
}

impl Default for MontecloraConfig {
    fn default() -> Self {
        Self {
            num_samples: 8,
            use_entropy: false,
            dirichlet_prior: 0.1,
            sample_scaler: 1e-4,
            kl_loss_weight: 1e-5,
            buffer_size: 150,
        }
    }
}

impl MontecloraConfig {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let named = |result: Result<(), Error>| match result {
            Err(Error::Config { field, reason }) => {
                Err(Error::config("monteclora_config", format!("{field}: {reason}")))
            }
            other => other,
        };
        named(positive("num_samples", self.num_samples))?;
        named(positive("buffer_size", self.buffer_size))?;
        named(finite("sample_scaler", self.sample_scaler))?;
        named(finite("kl_loss_weight", self.kl_loss_weight))?;
        match self.dirichlet_prior.is_finite() && self.dirichlet_prior > 0.0 {
            true => Ok(()),
            false => {
                let reason = format!(
                    "dirichlet_prior: expected more than 0, found {}",
                    self.dirichlet_prior
                );
                Err(Error::config("monteclora_config", reason))
            }
        }
    }

    /// Whether the loss gains anything.
    pub(crate) fn has_penalty(&self) -> bool {
        self.use_entropy || self.kl_loss_weight != 0.0
    }

    /// What the loss gains.
    pub(crate) fn penalty<'a>(
        &self,
        adapters: impl IntoIterator<Item = &'a LoraAdapter>,
    ) -> Option<Tensor<1>> {
        let samplers = adapters.into_iter().filter_map(|adapter| match &adapter.variant {
            Some(LoraVariant::Monteclora(sampler)) => Some(sampler),
            _ => None,
        });
        let terms: Vec<_> = samplers.map(|sampler| self.of_place(sampler)).collect();
        (!terms.is_empty()).then(|| Tensor::cat(terms, 0).mean())
    }

    fn of_place(&self, sampler: &Monteclora) -> Tensor<1> {
        let (omega, sigma) = (sampler.expert_weights_prior.val(), sampler.std_prior.val());
        let kl = dirichlet(omega.exp(), self.dirichlet_prior)
            + wishart(sigma)
            + normal(sampler.variances(), self.num_samples);
        match self.use_entropy {
            true => kl * self.kl_loss_weight + sampler.weights().square().sum(),
            false => kl * self.kl_loss_weight,
        }
    }
}

/// Of a Dirichlet with these `α` from one with `prior` for each. As in HF PEFT the term `Σ ln Γ(α)` is added, which
/// the divergence subtracts.
fn dirichlet(alpha: Tensor<1>, prior: f64) -> Tensor<1> {
    let start = alpha.ones_like().without_autodiff() * prior;
    let (total, total_start) = (alpha.clone().sum(), start.clone().sum());
    let slopes = digamma(alpha.clone()) - digamma(total.clone());
    ln_gamma(total) - ln_gamma(total_start)
        + (ln_gamma(alpha.clone()) - ln_gamma(start.clone())).sum()
        + ((alpha - start) * slopes).sum()
}

/// `½·r·Σ(v - ln v - 1)` for `v = exp(σ)²`.
fn wishart(sigma: Tensor<1>) -> Tensor<1> {
    let r = sigma.dims()[0] as f64;
    ((sigma.clone() * 2.0).exp() - sigma * 2.0 - 1.0).sum() * (0.5 * r)
}

/// `½·N·Σ(v - ln v - 1)`.
fn normal(v: Tensor<1>, samples: usize) -> Tensor<1> {
    (v.clone() - v.log() - 1.0).sum() * (0.5 * samples as f64)
}

/// By how much an argument is shifted before Stirling's series.
const SHIFT: usize = 6;

/// `ln Γ(x)`, `x > 0`.
fn ln_gamma(x: Tensor<1>) -> Tensor<1> {
    let y = x.clone() + SHIFT as f64;
    let over = y.clone().recip();
    let squared = over.clone().square();
    let series = over * ((squared.clone() * (1.0 / 1260.0) - 1.0 / 360.0) * squared + 1.0 / 12.0);
    let stirling =
        (y.clone() - 0.5) * y.clone().log() - y + 0.5 * (2.0 * std::f64::consts::PI).ln();
    (0..SHIFT).fold(stirling + series, |sum, k| sum - (x.clone() + k as f64).log())
}

/// `ψ(x)`, the slope of `ln Γ`, `x > 0`.
fn digamma(x: Tensor<1>) -> Tensor<1> {
    let y = x.clone() + SHIFT as f64;
    let over = y.clone().recip();
    let squared = over.clone().square();
    let series = ((squared.clone() * (-1.0 / 252.0) + 1.0 / 120.0) * squared.clone() - 1.0 / 12.0)
        * squared
        - over * 0.5;
    (0..SHIFT).fold(y.log() + series, |sum, k| sum - (x.clone() + k as f64).recip())
}

/// What MonteCLoRA has at a place beside LoRA's factors.
#[derive(Module, Debug)]
pub struct Monteclora {
    /// `σ [r]`.
    pub std_prior: Param<Tensor<1>>,
    /// `ω [N]`.
    pub expert_weights_prior: Param<Tensor<1>>,
    /// HF PEFT's last draw of `diag(v) [r, r]`, which it writes and reads to no effect.
    last_variance: Tensor<2>,
    /// Its last draw of `w [N]`, likewise.
    last_weights: Tensor<1>,
    /// `c`.
    pub sample_scaler: f64,
}

impl Monteclora {
    pub(crate) fn new(config: &MontecloraConfig, place: &Place<'_>, rng: &mut ChaCha8Rng) -> Self {
        let (n, device) = (config.num_samples, place.device);
        let mut unit = |size: usize| (uniform([size], 1.0, rng, device) + 1.0) / 2.0;
        Self {
            std_prior: Param::from_tensor(unit(place.r)),
            expert_weights_prior: Param::from_tensor(unit(n)),
            last_variance: Tensor::eye(place.r, device).without_autodiff(),
            last_weights: Tensor::full([n], 1.0 / n as f64, device).without_autodiff(),
            sample_scaler: config.sample_scaler,
        }
    }

    pub(crate) fn restored(
        config: &MontecloraConfig,
        place: &Place<'_>,
        file: &mut PlaceTensors<'_>,
    ) -> Result<Self, Error> {
        let (r, n, device): (usize, usize, &Device) = (place.r, config.num_samples, place.device);
        Ok(Self {
            std_prior: Param::from_tensor(file.take(STD, [r], device)?),
            expert_weights_prior: Param::from_tensor(file.take(EXPERTS, [n], device)?),
            last_variance: file.take::<2>(VARIANCE, [r, r], device)?.without_autodiff(),
            last_weights: file.take::<1>(WEIGHTS, [n], device)?.without_autodiff(),
            sample_scaler: config.sample_scaler,
        })
    }

    pub(crate) fn tensors(&self) -> [(&'static str, TensorData); 4] {
        [
            (STD, self.std_prior.val().into_data()),
            (EXPERTS, self.expert_weights_prior.val().into_data()),
            (VARIANCE, self.last_variance.clone().into_data()),
            (WEIGHTS, self.last_weights.clone().into_data()),
        ]
    }

    /// `A`, or in training a draw of it.
    pub(crate) fn sampled(&self, a: Tensor<2>) -> Tensor<2> {
        if !a.is_autodiff() {
            return a;
        }
        let [fan_in, r] = a.dims();
        let weights = self.weights();
        let [n] = weights.dims();
        let z = noise([n, fan_in * r], &a);
        let mixed = weights.unsqueeze_dim::<2>(0).matmul(z).reshape([fan_in, r]); // Σ wₙ·Zₙ
        a + mixed * self.variances().sqrt().unsqueeze_dim(0) * self.sample_scaler
    }

    /// A draw of `v`.
    fn variances(&self) -> Tensor<1> {
        let sigma = self.std_prior.val();
        let [r] = sigma.dims();
        let squares: Tensor<1> = noise([r, r], &sigma).square().sum_dim(0).flatten(0, 1);
        ((sigma * 2.0).exp() * squares).clamp_min(1e-3)
    }

    /// A draw of `w`.
    fn weights(&self) -> Tensor<1> {
        let omega = self.expert_weights_prior.val();
        let n = omega.dims()[0] as f64;
        let least = 1e-6;
        let alpha = omega.exp().clamp_min(least);
        let (logs, over) = (alpha.clone().log(), alpha.recip());
        let mu = logs.clone() - logs.mean();
        let spread = over.clone() * (1.0 - 2.0 / n) + over.sum() / (n * n);
        let tau = spread.clamp_min(least) + least;
        let z: Tensor<1> = noise([1, n as usize], &mu).flatten(0, 1);
        softmax(mu + tau.sqrt() * z, 0)
    }
}

/// `N(0, 1)` in the type and on the device of `like`.
fn noise<const D: usize>(shape: [usize; 2], like: &Tensor<D>) -> Tensor<2> {
    let plain: Tensor<2> =
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &like.device().inner());
    plain.cast(like.dtype())
}

#[cfg(test)]
mod tests {
    use super::{Monteclora, digamma, dirichlet, ln_gamma, normal, wishart};
    use burn::module::Param;
    use burn::tensor::{Device, Tensor};

    fn one(values: &[f32]) -> Tensor<1> {
        Tensor::from_floats(values, &Device::flex())
    }

    /// Within the roundings of a sum of a dozen terms, of which the largest are about 50.
    #[track_caller]
    fn near(found: Tensor<1>, expected: &[f64]) {
        let bound = 12.0 * 50.0 * f64::from(f32::EPSILON);
        for (a, b) in found.into_data().iter::<f64>().zip(expected) {
            assert!((a - b).abs() <= bound, "found {a}, expected {b}");
        }
    }

    /// The numbers are PyTorch's, and `peft`'s `MontecloraSampler`'s.
    #[test]
    fn divergences_are_those_of_peft() {
        let x = one(&[0.1, 0.5, 1.0, 2.5, 22.0]);
        near(ln_gamma(x.clone()), &[2.2527127, 0.5723649, 0.0, 0.2846829, 45.3801389]);
        near(digamma(x), &[-10.4237549, -1.96351, -0.5772157, 0.7031566, 3.068143]);
        near(dirichlet(one(&[-0.3, 0.2, 0.9]).exp(), 0.1), &[-10.1660515]);
        near(wishart(one(&[-0.3, 0.2, 0.9])), &[5.2354257]);
        near(normal(one(&[0.4, 1.5, 2.0]), 3), &[1.0765177]);
    }

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let device = Device::flex();
        let sampler = Monteclora {
            std_prior: Param::from_tensor(one(&[0.0, 0.5])),
            expert_weights_prior: Param::from_tensor(one(&[0.1, 0.6, 0.2])),
            last_variance: Tensor::eye(2, &device),
            last_weights: one(&[0.0; 3]),
            sample_scaler: 1.0,
        };
        let count = 4000;
        let (mut variances, mut weights) = ([0.0; 2], [0.0; 3]);
        for _ in 0..count {
            for (sum, v) in variances.iter_mut().zip(sampler.variances().into_data().iter::<f64>())
            {
                *sum += v / f64::from(count);
            }
            let drawn: Vec<f64> = sampler.weights().into_data().iter::<f64>().collect();
            assert!((drawn.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{drawn:?}");
            for (sum, w) in weights.iter_mut().zip(drawn) {
                *sum += w / f64::from(count);
            }
        }
        // χ² of 2 degrees of freedom has mean 2 and variance 4: six standard errors.
        let error = 6.0 * 2.0 / f64::from(count).sqrt();
        for (found, scale) in variances.iter().zip([1.0, 1.0_f64.exp()]) {
            assert!((found / scale - 2.0).abs() < error, "{variances:?}");
        }
        assert!(weights[1] > weights[0] && weights[1] > weights[2], "{weights:?}");
        // Without gradients nothing is drawn; with them, something.
        let a = Tensor::<2>::ones([4, 2], &device);
        assert!(sampler.sampled(a.clone()).equal(a).all().into_scalar::<bool>());
        let trained = Tensor::<2>::ones([4, 2], &device.autodiff());
        let [x, y] = [(); 2].map(|()| sampler.sampled(trained.clone()).without_autodiff());
        assert!(x.not_equal(y).any().into_scalar::<bool>());
    }
}
