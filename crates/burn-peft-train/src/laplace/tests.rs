//! Against dense matrices on a model of two layers, its gradients taken by differences.
//!
//! Central differences of step `h = 1e-2` over f32 logits near 1 are off by about `h²` and `1e-7/h`, so
//! by 1e-4; what is made of them is compared to 2e-3 of its largest number.
#![allow(clippy::unwrap_used)]

use super::factor::{Factor, Spectrum};
use super::*;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution};
use burn_peft_core::{Adapter, Laid, Strength};

const STEP: f64 = 1e-2;
const CLOSE: f64 = 2e-3;

#[derive(Debug, Clone)]
struct Pair(Product);

impl Adapter for Pair {
    fn linear(&self, _: &Linear, x: &Tensor<3>, _: &Tensor<3>) -> Option<Tensor<3>> {
        let [a, b] = [&self.0.a, &self.0.b].map(|factor| factor.clone().unsqueeze_dim::<3>(0));
        Some(x.clone().matmul(a).matmul(b) * self.0.scaling)
    }
}

#[derive(Debug, Clone)]
struct Pairs(BTreeMap<String, Pair>);

impl Overlay for Pairs {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if let Some(pair) = self.0.get(path) {
            laid.push(Laid { adapter: pair, strength: Strength::Scale(1.0) });
        }
    }
}

/// `head(mean over the first `read` positions of tanh(first(x)))`.
struct Toy {
    first: Linear,
    head: Linear,
    read: usize,
}

impl Toy {
    fn forward(&self, x: &Tensor<3>, cx: &Scope<'_>) -> Tensor<2> {
        let [batch, _, _] = x.dims();
        let h = cx.at("first").linear(&self.first, x.clone()).tanh();
        let [_, _, width] = h.dims();
        let h = h.slice([0..batch, 0..self.read]).mean_dim(1).reshape([batch, width]);
        cx.at("head").linear(&self.head, h)
    }
}

const IN: usize = 4;
const MIDDLE: usize = 5;
const CLASSES: usize = 3;

/// A model and adapters over both layers; the same numbers each time.
fn toy(read: usize) -> (Toy, Vec<(String, Product)>, Pairs) {
    let device = Device::flex();
    device.seed(7);
    let normal = |shape: [usize; 2], std: f64| {
        Tensor::<2>::random(shape, Distribution::Normal(0.0, std), &device)
    };
    let linear = |shape: [usize; 2]| {
        let mut layer = LinearConfig::new(shape[0], shape[1]).init(&device);
        layer.weight = layer.weight.map(|_| normal(shape, 0.6));
        layer
    };
    let toy = Toy { first: linear([IN, MIDDLE]), head: linear([MIDDLE, CLASSES]), read };
    let product = |fan_in, fan_out| Product {
        a: normal([fan_in, 2], 0.7),
        b: normal([2, fan_out], 0.7),
        scaling: 0.5,
    };
    let products = vec![
        ("first".to_owned(), product(IN, MIDDLE)),
        ("head".to_owned(), product(MIDDLE, CLASSES)),
    ];
    let pairs = products.iter().map(|(path, product)| (path.clone(), Pair(product.clone())));
    let pairs = Pairs(pairs.collect());
    (toy, products, pairs)
}

fn data(count: usize, seq: usize) -> Tensor<3> {
    let device = Device::flex();
    device.seed(11);
    Tensor::random([count, seq, IN], Distribution::Normal(0.0, 1.0), &device)
}

fn fitted(
    toy: &Toy,
    products: &[(String, Product)],
    pairs: &Pairs,
    batches: Vec<Tensor<3>>,
    settings: Settings,
) -> Result<Posterior, Error> {
    let labelled = batches.into_iter().map(|x| {
        let labels = (0..x.dims()[0] as i32).map(|i| i % CLASSES as i32).collect();
        (x, labels)
    });
    Posterior::fit(products.to_vec(), pairs, labelled, |x, cx| toy.forward(x, cx), settings)
}

/// The gradients of a row's logits by all numbers of one factor, `[classes][numbers]`.
fn jacobian(toy: &Toy, pairs: &Pairs, x: &Tensor<3>, path: &str, second: bool) -> Vec<Vec<f64>> {
    let count = {
        let product = &pairs.0[path].0;
        if second { product.b.dims() } else { product.a.dims() }.iter().product::<usize>()
    };
    let moved = |index: usize, step: f64| {
        let mut pairs = pairs.clone();
        let product = &mut pairs.0.get_mut(path).unwrap().0;
        let factor = if second { &mut product.b } else { &mut product.a };
        let mut values = numbers(factor.clone().into_data());
        values[index] += step;
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        *factor = Tensor::from_data(TensorData::new(values, factor.dims()), &factor.device());
        numbers(toy.forward(x, &Scope::new(&pairs)).into_data())
    };
    let moves: Vec<_> = (0..count).map(|at| (moved(at, STEP), moved(at, -STEP))).collect();
    let slope = |class: usize| {
        moves.iter().map(|(up, down)| (up[class] - down[class]) / (2.0 * STEP)).collect()
    };
    (0..CLASSES).map(slope).collect()
}

type Dense = Vec<Vec<f64>>;

/// `V·diag(v)·Vᵀ`.
fn matrix(spectrum: &Spectrum) -> Dense {
    let (width, kept) = (spectrum.width(), spectrum.values.len());
    let vectors = numbers(spectrum.vectors.clone().into_data());
    let cell = |i: usize, j: usize| {
        (0..kept)
            .map(|k| vectors[i * kept + k] * spectrum.values[k] * vectors[j * kept + k])
            .sum::<f64>()
    };
    (0..width).map(|i| (0..width).map(|j| cell(i, j)).collect()).collect()
}

fn kronecker(block: &Block) -> Dense {
    let (u, v) = (matrix(&block.inputs), matrix(&block.outputs));
    let size = u.len() * v.len();
    let at = |i: usize, j: usize| u[i / v.len()][j / v.len()] * v[i % v.len()][j % v.len()];
    (0..size).map(|i| (0..size).map(|j| at(i, j)).collect()).collect()
}

/// `(matrix + λ)⁻¹` and its determinant's logarithm, by elimination.
fn inverse(matrix: &Dense, precision: f64) -> (Dense, f64) {
    let size = matrix.len();
    let mut left = matrix.clone();
    let mut right = vec![vec![0.0; size]; size];
    for i in 0..size {
        left[i][i] += precision;
        right[i][i] = 1.0;
    }
    let mut log = 0.0;
    for i in 0..size {
        // Positive definite: no pivoting.
        let pivot = left[i][i];
        log += pivot.ln();
        for j in 0..size {
            left[i][j] /= pivot;
            right[i][j] /= pivot;
        }
        for k in (0..size).filter(|&k| k != i) {
            let by = left[k][i];
            for j in 0..size {
                left[k][j] -= by * left[i][j];
                right[k][j] -= by * right[i][j];
            }
        }
    }
    (right, log)
}

#[track_caller]
fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    let largest = expected.iter().fold(1e-9_f64, |most, v| most.max(v.abs()));
    let far = found
        .iter()
        .zip(expected)
        .map(|(f, e)| (f - e).abs())
        .max_by(f64::total_cmp)
        .unwrap_or_default();
    assert_eq!(found.len(), expected.len());
    assert!(far <= tolerance * largest, "{far} of {largest}: {found:?} {expected:?}");
}

fn times(a: &[f64], m: &Dense, b: &[f64]) -> f64 {
    a.iter().zip(m).map(|(a, row)| a * dot(row, b)).sum()
}

const FIXED: Settings = Settings { n_kfac: None, prior_precision: Some(0.3) };

#[test]
fn the_factors_of_one_example_are_its_fisher_information() {
    let (toy, products, pairs) = toy(1);
    let x = data(1, 1);
    let logits = numbers(toy.forward(&x, &Scope::new(&pairs)).into_data());
    let shares = softmax(&[logits])[0].clone();
    let posterior = fitted(&toy, &products, &pairs, vec![x.clone()], FIXED).unwrap();
    // Twice the same example is twice the information.
    let twice = fitted(&toy, &products, &pairs, vec![x.clone(), x.clone()], FIXED).unwrap();
    for path in ["first", "head"] {
        for second in [false, true] {
            let j = jacobian(&toy, &pairs, &x, path, second);
            // Σ_c p_c·J_cᵀJ_c - (Σ_c p_c·J_c)ᵀ(Σ_c p_c·J_c)
            let mean = |i: usize| (0..CLASSES).map(|c| shares[c] * j[c][i]).sum::<f64>();
            let cell = |i: usize, k: usize| {
                (0..CLASSES).map(|c| shares[c] * j[c][i] * j[c][k]).sum::<f64>() - mean(i) * mean(k)
            };
            let size = j[0].len();
            let dense: Vec<f64> = (0..size)
                .flat_map(|i| (0..size).map(move |k| (i, k)))
                .map(|(i, k)| cell(i, k))
                .collect();
            let block = usize::from(second);
            close(&kronecker(&posterior.places[path].blocks[block]).concat(), &dense, CLOSE);
            let doubled: Vec<f64> = dense.iter().map(|v| 2.0 * v).collect();
            close(&kronecker(&twice.places[path].blocks[block]).concat(), &doubled, CLOSE);
        }
    }
}

#[test]
fn the_variance_of_logits_is_that_of_the_dense_posterior() {
    let (toy, products, pairs) = toy(3);
    let train = vec![data(6, 3)];
    let x = data(8, 3).narrow(0, 7, 1);
    for n_kfac in [None, Some(2)] {
        let settings = Settings { n_kfac, ..FIXED };
        let posterior = fitted(&toy, &products, &pairs, train.clone(), settings).unwrap();
        assert_eq!(posterior.places["first"].blocks[0].inputs.is_whole(), n_kfac.is_none());
        let found = posterior.logits(&pairs, &|cx| toy.forward(&x, cx)).unwrap();
        let mut expected = vec![0.0; CLASSES * CLASSES];
        for (path, place) in &posterior.places {
            for (block, second) in place.blocks.iter().zip([false, true]) {
                let (covariance, _) = inverse(&kronecker(block), 0.3);
                let j = jacobian(&toy, &pairs, &x, path, second);
                for (at, sum) in expected.iter_mut().enumerate() {
                    *sum += times(&j[at / CLASSES], &covariance, &j[at % CLASSES]);
                }
            }
        }
        close(&found.covariance[0], &expected, CLOSE);
        close(&found.mean[0], &numbers(toy.forward(&x, &Scope::new(&pairs)).into_data()), 1e-6);
    }
}

#[test]
fn the_evidence_is_the_dense_one_and_largest_where_it_says() {
    let (toy, products, pairs) = toy(2);
    let settings = Settings::default();
    let posterior = fitted(&toy, &products, &pairs, vec![data(9, 2)], settings).unwrap();
    let dense = |precision: f64| {
        let volume = |block: &Block| {
            let matrix = kronecker(block);
            matrix.len() as f64 * precision.ln() - inverse(&matrix, precision).1
        };
        let volume: f64 = posterior.blocks().map(volume).sum();
        let squares = products.iter().map(|(_, product)| squares(product)).sum::<f64>();
        posterior.log_likelihood - 0.5 * precision * squares + 0.5 * volume
    };
    for precision in [0.01, 0.7, 30.0] {
        let (found, expected) = (posterior.evidence(precision), dense(precision));
        // Eigenvalues in f32, 56 logarithms of them.
        assert!((found - expected).abs() < 1e-4 * expected.abs(), "{found} {expected}");
    }
    let best = posterior.prior_precision();
    for other in [0.01, 0.5, 0.98, 1.02, 2.0, 100.0] {
        assert!(posterior.evidence(best) > posterior.evidence(best * other), "{best} {other}");
    }
}

#[test]
fn a_strong_prior_gives_the_plain_answers_and_a_weak_one_less_sure_ones() {
    let (toy, products, pairs) = toy(2);
    let posterior = fitted(&toy, &products, &pairs, vec![data(5, 2)], FIXED).unwrap();
    let x = data(4, 2);
    let run = |cx: &Scope<'_>| toy.forward(&x, cx);
    let plain = softmax(&rows(run(&Scope::new(&pairs)).into_data(), CLASSES));
    let most = |rows: &[Vec<f64>]| {
        rows.iter().map(|row| row.iter().copied().fold(0.0, f64::max)).sum::<f64>()
    };
    let strong = posterior.clone().with_prior_precision(1e9);
    let strong = strong.logits(&pairs, &run).unwrap().probabilities();
    // A standard deviation of 1e-4 at most, of which mirrored draws leave the square.
    close(&strong.concat(), &plain.concat(), 1e-6);
    let weak = posterior.logits(&pairs, &run).unwrap().probabilities();
    assert!(most(&weak) < most(&plain) - 1e-2, "{weak:?} {plain:?}");
    for row in &weak {
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }
}

#[test]
fn draws_have_the_covariance_that_is_asked_for() {
    let covariance = [2.0, 0.6, 0.6, 0.5];
    let root = cholesky(&covariance, 2);
    let product = |i: usize, j: usize| dot(&root[i], &root[j]);
    close(&[product(0, 0), product(0, 1), product(1, 0), product(1, 1)], &covariance, 1e-12);
    // Two classes that move as one: of rank 1.
    let root = cholesky(&[1.0, 1.0, 1.0, 1.0], 2);
    close(&[dot(&root[1], &root[1]), root[1][1]], &[1.0, 0.0], 1e-12);
    // Of N(0, v) over a difference of logits the mean of the logistic is the probit's to 0.01:
    // 1/(1 + exp(-m/√(1 + πv/8))).
    let logits = Logits { mean: vec![vec![1.5, 0.0]], covariance: vec![vec![4.0, 0.0, 0.0, 0.0]] };
    let expected = 1.0 / (1.0 + (-1.5 / (1.0 + std::f64::consts::PI * 4.0 / 8.0).sqrt()).exp());
    assert!((logits.probabilities()[0][0] - expected).abs() < 0.015, "{expected}");
}

#[test]
fn a_thin_factor_is_exact_where_its_rank_suffices() {
    let device = Device::flex();
    device.seed(3);
    let normal =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let plane = normal([2, 6]);
    let batches: Vec<Tensor<2>> = (0..3).map(|_| normal([4, 2]).matmul(plane.clone())).collect();
    let sum = |rank| {
        let factor = Factor::new(6, rank, &device);
        matrix(&batches.iter().cloned().fold(factor, Factor::add).spectrum()).concat()
    };
    close(&sum(Some(3)), &sum(None), 1e-5);
    // One batch, rank 1: no further from the sum than the eigenvalue that is left out.
    let whole = Factor::new(6, None, &device).add(batches[0].clone()).spectrum();
    let thin = Factor::new(6, Some(1), &device).add(batches[0].clone()).spectrum();
    close(&thin.values, &whole.values[..1], 1e-5);
    assert!(whole.values[1] > 0.05 * whole.values[0]);
}

#[test]
fn positions_that_nothing_depends_on_do_not_count() {
    let (toy, products, pairs) = toy(1);
    let long = fitted(&toy, &products, &pairs, vec![data(4, 3)], FIXED).unwrap();
    let short = data(4, 3).slice([0..4, 0..1]);
    let short = fitted(&toy, &products, &pairs, vec![short], FIXED).unwrap();
    for (one, other) in long.blocks().zip(short.blocks()) {
        close(&kronecker(one).concat(), &kronecker(other).concat(), 1e-5);
    }
}

#[test]
fn a_posterior_comes_back_from_its_files_and_belongs_to_its_adapter() {
    let (toy, products, pairs) = toy(2);
    let x = data(2, 2);
    for n_kfac in [None, Some(2)] {
        let settings = Settings { n_kfac, prior_precision: None };
        let posterior = fitted(&toy, &products, &pairs, vec![data(5, 2)], settings).unwrap();
        let folder = tempfile::tempdir().unwrap();
        posterior.save(folder.path()).unwrap();
        let again = Posterior::load(folder.path(), products.clone()).unwrap();
        let run = |cx: &Scope<'_>| toy.forward(&x, cx);
        assert_eq!(again.logits(&pairs, &run).unwrap(), posterior.logits(&pairs, &run).unwrap());
        assert_eq!(again.evidence(1.0), posterior.evidence(1.0));
        let mut other = products.clone();
        other[0].1.scaling = 2.0;
        let error = Posterior::load(folder.path(), other).unwrap_err().to_string();
        assert!(error.contains("another adapter"), "{error}");
    }
    let empty = tempfile::tempdir().unwrap();
    let error = Posterior::load(empty.path(), products).unwrap_err().to_string();
    assert!(error.contains("laplace.json: is not there"), "{error}");
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let (toy, products, pairs) = toy(2);
    let train = || vec![data(3, 2)];
    let refused = |products: &[(String, Product)], batches, settings| {
        fitted(&toy, products, &pairs, batches, settings).unwrap_err().to_string()
    };
    let strange = vec![("tail".to_owned(), products[0].1.clone())];
    let said = refused(&strange, train(), FIXED);
    assert!(said.contains("tail: expected a linear layer"), "{said}");
    assert!(refused(&products, vec![], FIXED).contains("found none"));
    let settings = Settings { n_kfac: Some(0), ..FIXED };
    assert!(refused(&products, train(), settings).contains("n_kfac"));
    let settings = Settings { prior_precision: Some(-1.0), ..FIXED };
    assert!(refused(&products, train(), settings).contains("prior_precision"));
    let broken = vec![data(3, 2) * f32::NAN];
    assert!(refused(&products, broken, FIXED).contains("NaN"));
}
