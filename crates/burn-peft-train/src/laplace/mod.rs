//! Laplace-LoRA (arXiv 2308.13111): how sure a trained adapter is of its answers, found after the training.
//!
//! The factors `A` and `B` of every adapted linear layer get a Gaussian posterior around what was
//! trained, `θ ~ N(θ*, (F + λ)⁻¹)`. `F` is the Fisher information of the training data, block by block
//! (an `A` or a `B` each) in Kronecker form, `F ≈ 1/N · Σ aaᵀ ⊗ Σ E[ggᵀ]`, `a` what goes into the
//! factor and `g` the gradient of the log likelihood at its output, its expectation over the model's
//! own classes and not over a sample. Logits are linear in `θ` around `θ*`, so that they are Gaussian
//! too: `f ~ N(f*, J·(F + λ)⁻¹·Jᵀ)`; probabilities are the mean of `softmax(f)` over draws.
//!
//! * The factor over a wide side may be kept at rank `n_kfac` by an incremental SVD, as in the paper, and
//!   is exact otherwise.
//! * A text is one example: over its positions `a` is the mean and `g` the sum, "KFAC-reduce"
//!   (arXiv 2311.00636), of the positions that any logit depends on. The paper's program looks at the
//!   last position alone, which is not what a classifier of whole texts answers from. The Jacobian `J` of
//!   a prediction is exact.
//! * `λ`, one for all parameters, is where the evidence of the training data is largest
//!   ([`Posterior::evidence`]): it has one maximum, at `Σ l/(l + λ) = λ·‖θ*‖²` over the eigenvalues `l`.
//! * A head that was trained along with the adapter stays what it is.

mod block;
mod factor;
mod file;
mod taps;
#[cfg(test)]
mod tests;

use crate::calibration::softmax;
use block::{Block, Gathered, active, squares, views};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Error, Overlay, Product, Scope};
use factor::numbers;
pub use file::{LAPLACE_FILE, LAPLACE_TENSORS};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;
use std::collections::BTreeMap;
use taps::observe;

/// Draws of logits that a prediction is the mean over: half of them, and their mirror images.
const DRAWS: usize = 4096;

/// How a posterior is fitted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Settings {
    /// Rank of the factors over sides wider than that; none: exact.
    pub n_kfac: Option<usize>,
    /// `λ`; none: where the evidence is largest.
    pub prior_precision: Option<f64>,
}

/// What is known of one place.
#[derive(Debug, Clone)]
struct Place {
    product: Product,
    /// Of `A` and of `B`.
    blocks: [Block; 2],
}

/// A Gaussian over the factors of the adapters of one model.
#[derive(Debug, Clone)]
pub struct Posterior {
    places: BTreeMap<String, Place>,
    /// `λ`.
    prior_precision: f64,
    settings: Settings,
    /// Examples that it was fitted on.
    examples: usize,
    /// Sum of their log likelihoods under the trained adapter.
    log_likelihood: f64,
}

/// The Gaussian of a batch's logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    /// Mean of each row: `[classes]`.
    pub mean: Vec<Vec<f64>>,
    /// Covariance of each row: `[classes · classes]`, row by row.
    pub covariance: Vec<Vec<f64>>,
}

fn rows(data: TensorData, width: usize) -> Vec<Vec<f64>> {
    numbers(data).chunks(width.max(1)).map(<[f64]>::to_vec).collect()
}

impl Posterior {
    /// Fits it to the training data: `batches` with the class of each row, `forward` running the model
    /// on one with what a scope lays over it, logits `[batch, classes]` out. `overlay` is what was
    /// trained, `products` its factors by path. The rows of a batch must not see each other.
    ///
    /// # Errors
    /// No data; a place that is no linear layer which the model runs; numbers that are none; a
    /// `prior_precision` that is not positive, or none that explains the data best because the model is
    /// certain of all of it.
    pub fn fit<B>(
        products: Vec<(String, Product)>,
        overlay: &dyn Overlay,
        batches: impl Iterator<Item = (B, Vec<i32>)>,
        forward: impl Fn(&B, &Scope<'_>) -> Tensor<2>,
        settings: Settings,
    ) -> Result<Self, Error> {
        if let Some(rank) = settings.n_kfac.filter(|rank| *rank == 0) {
            return Err(Error::config("n_kfac", format!("expected 1 or more, found {rank}")));
        }
        let gather = |(path, product): (String, Product)| {
            let of = |weight: &Tensor<2>| Gathered::new(weight, settings.n_kfac);
            let gathered = [of(&product.a), of(&product.b)];
            (path, (product, gathered))
        };
        let mut places: BTreeMap<String, (Product, [Gathered; 2])> =
            products.into_iter().map(gather).collect();
        let (mut examples, mut log_likelihood) = (0, 0.0);
        for (batch, labels) in batches {
            let run = |cx: &Scope<'_>| forward(&batch, cx);
            let (logits, mut seen) = observe(places.keys().map(String::as_str), overlay, &run)?;
            let [_, classes] = logits.dims();
            let device = logits.device();
            let shares = softmax(&rows(logits.into_data(), classes));
            for (row, &label) in shares.iter().zip(&labels) {
                let right = usize::try_from(label).ok().and_then(|class| row.get(class));
                log_likelihood += right.copied().unwrap_or(0.0).max(f64::MIN_POSITIVE).ln();
            }
            examples += labels.len();
            let flat: Vec<f32> = shares.concat().into_iter().map(|share| share as f32).collect();
            let shares = Tensor::from_data(TensorData::new(flat, [labels.len(), classes]), &device);
            let mut after = BTreeMap::new();
            for (path, (product, [a, b])) in places {
                if let Some(seen) = seen.remove(&path) {
                    let (active, [view_a, view_b]) = (active(&seen), views(&product, &seen));
                    let both = [
                        a.add(&path, view_a.rows(&active, &shares))?,
                        b.add(&path, view_b.rows(&active, &shares))?,
                    ];
                    after.insert(path, (product, both));
                }
            }
            places = after;
        }
        if examples == 0 {
            return Err(Error::config("train_file", "expected examples to fit to, found none"));
        }
        let finish = |(path, (product, [a, b])): (String, (Product, [Gathered; 2]))| {
            (path, Place { product, blocks: [a.finish(examples), b.finish(examples)] })
        };
        let places = places.into_iter().map(finish).collect();
        let mut posterior =
            Self { places, prior_precision: f64::NAN, settings, examples, log_likelihood };
        posterior.prior_precision = match settings.prior_precision {
            None => posterior.likeliest_precision()?,
            Some(found) if found.is_finite() && found > 0.0 => found,
            Some(found) => {
                let reason = format!("expected a positive number, found {found}");
                return Err(Error::config("prior_precision", reason));
            }
        };
        Ok(posterior)
    }

    /// `λ`.
    pub fn prior_precision(&self) -> f64 {
        self.prior_precision
    }

    /// The same with another `λ`.
    pub fn with_prior_precision(self, prior_precision: f64) -> Self {
        Self { prior_precision, ..self }
    }

    /// Examples that it was fitted on.
    pub fn examples(&self) -> usize {
        self.examples
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.places.values().flat_map(|place| &place.blocks)
    }

    fn squares(&self) -> f64 {
        self.places.values().map(|place| squares(&place.product)).sum()
    }

    /// Laplace's approximation of `log p(training data | λ)`, without the classifier's head:
    /// `log p(data | θ*) - λ/2·‖θ*‖² + ½·Σ log(λ / (l + λ))` over the eigenvalues `l` of `F`.
    pub fn evidence(&self, precision: f64) -> f64 {
        let curvatures = self.blocks().flat_map(Block::curvatures);
        let volume: f64 = curvatures.map(|l| -(l / precision).ln_1p()).sum();
        self.log_likelihood - 0.5 * precision * self.squares() + 0.5 * volume
    }

    /// Number of parameters that the data decides: `Σ l/(l + λ)`.
    pub fn decided(&self, precision: f64) -> f64 {
        self.blocks().flat_map(Block::curvatures).map(|l| l / (l + precision)).sum()
    }

    /// The root of `Σ l/(l + λ) = λ·‖θ*‖²`, whose left side falls and whose right side rises with `λ`.
    fn likeliest_precision(&self) -> Result<f64, Error> {
        let squares = self.squares();
        let falls = |log: f64| self.decided(log.exp()) < log.exp() * squares;
        let (mut low, mut high) = (-50.0_f64, 50.0_f64);
        if falls(low) || !falls(high) {
            let reason = "no value explains the training data best, because the model is certain of all \
                          of it or was not trained; give one";
            return Err(Error::config("prior_precision", reason));
        }
        while high - low > 1e-12 {
            let middle = 0.5 * (low + high);
            match falls(middle) {
                true => high = middle,
                false => low = middle,
            }
        }
        Ok(high.exp())
    }

    /// The logits of a batch, linear in the factors around what was trained; arguments as those of
    /// [`Posterior::fit`].
    ///
    /// # Errors
    /// A place that is no linear layer which the model runs.
    pub fn logits(
        &self,
        overlay: &dyn Overlay,
        forward: &dyn Fn(&Scope<'_>) -> Tensor<2>,
    ) -> Result<Logits, Error> {
        let (mean, seen) = observe(self.places.keys().map(String::as_str), overlay, forward)?;
        let [batch, classes] = mean.dims();
        let mut covariance = Tensor::<3>::zeros([batch, classes, classes], &mean.device());
        for (path, place) in &self.places {
            let Some(seen) = seen.get(path) else { continue };
            for (block, view) in place.blocks.iter().zip(views(&place.product, seen)) {
                covariance = covariance + block.covariance(&view, self.prior_precision);
            }
        }
        Ok(Logits {
            mean: rows(mean.into_data(), classes),
            covariance: rows(covariance.into_data(), classes * classes),
        })
    }
}

impl Logits {
    /// The mean of `softmax` over draws, the same for every row and every call.
    pub fn probabilities(&self) -> Vec<Vec<f64>> {
        let classes = self.mean.first().map_or(0, Vec::len);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut draw = || (0..classes).map(|_| rng.sample(StandardNormal)).collect();
        let draws: Vec<Vec<f64>> = (0..DRAWS / 2).map(|_| draw()).collect();
        let of = |(mean, covariance): (&Vec<f64>, &Vec<f64>)| {
            let root = cholesky(covariance, classes);
            let mut sum = vec![0.0; classes];
            for draw in &draws {
                let step: Vec<f64> = root.iter().map(|row| dot(row, draw)).collect();
                let moved = |sign: f64| mean.iter().zip(&step).map(|(m, s)| m + sign * s).collect();
                for shares in softmax(&[moved(1.0), moved(-1.0)]) {
                    sum.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
                }
            }
            sum.into_iter().map(|sum| sum / (2 * draws.len()) as f64).collect()
        };
        self.mean.iter().zip(&self.covariance).map(of).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `L` with `L·Lᵀ` the matrix. A direction without variance, which rounding may leave a little below
/// zero, gets none.
fn cholesky(matrix: &[f64], size: usize) -> Vec<Vec<f64>> {
    let mut root = vec![vec![0.0; size]; size];
    let largest = (0..size).map(|i| matrix[i * size + i]).fold(0.0, f64::max);
    for i in 0..size {
        for j in 0..=i {
            let rest = matrix[i * size + j] - dot(&root[i][..j], &root[j][..j]);
            root[i][j] = match (i == j, root[j][j] > 0.0) {
                (true, _) if rest > largest * 1e-7 => rest.sqrt(),
                (false, true) => rest / root[j][j],
                _ => 0.0,
            };
        }
    }
    root
}
