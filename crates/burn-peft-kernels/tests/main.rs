//! Every fused form against its composition on the same device: values, and gradients of every input,
//! over shapes that fit no block, views that are not in order, and nothing at all.
#![cfg(feature = "flex")]
#![allow(missing_docs)]

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use burn_peft_kernels::{self as kernels, composed};
use proptest::prelude::*;

/// Rounding of f32, for each of `terms` numbers that were added up.
fn tolerance(terms: usize) -> f32 {
    4.0 * f32::EPSILON * (terms as f32).sqrt().max(4.0)
}

fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-2.0_f32..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
}

fn values<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().convert::<f32>().try_to_vec().expect("is f32")
}

/// Close in units of the largest number that there is, or of one.
fn close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    let unit = theirs.iter().fold(1.0_f32, |top, x| top.max(x.abs()));
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * unit,
            "{what}[{i}]: fused {a}, composed {b}, unit {unit}"
        );
    }
}

/// Compares output and gradients of two functions of the inputs. The loss weighs every element of the
/// output by another number, so that no error cancels out.
macro_rules! same {
    ($tolerance:expr, [$($input:ident),+], $fused:expr, $composed:expr) => {{
        let run = |fused: bool| {
            let y = if fused { $fused } else { $composed };
            let n: usize = y.dims().iter().product();
            let weights: Vec<f32> = (0..n).map(|i| ((i * 7 % 13) as f32 - 6.0) / 6.0).collect();
            let weights = Tensor::from_data(TensorData::new(weights, y.dims()), &Device::flex());
            let value = values(y.clone());
            let gradients = (y * weights).sum().backward();
            let all = vec![$((stringify!($input), $input.grad(&gradients).map(values))),+];
            (value, all)
        };
        let ((a, ours), (b, theirs)) = (run(true), run(false));
        close("output", &a, &b, $tolerance);
        for ((name, a), (_, b)) in ours.into_iter().zip(theirs) {
            let (Some(a), Some(b)) = (&a, &b) else { panic!("{name} has a gradient") };
            close(name, a, b, $tolerance);
        }
    }};
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn linear(batch in 1_usize..4, seq in 1_usize..40, fan_in in 1_usize..70, fan_out in 1_usize..70) {
        let (x, w) = (random([batch, seq, fan_in], 1), random([fan_in, fan_out], 2));
        let b = random([fan_out], 3);
        let t = tolerance(fan_in.max(batch * seq).max(fan_out));
        same!(t, [x, w, b], kernels::linear(x.clone(), w.clone(), Some(b.clone())),
            composed::linear(x.clone(), w.clone(), Some(b.clone())));
        same!(t, [x, w], kernels::linear(x.clone(), w.clone(), None),
            composed::linear(x.clone(), w.clone(), None));
        // A weight that lies transposed, and an input that is a view of another order.
        let w = random([fan_out, fan_in], 4);
        let x = random([seq, batch, fan_in], 5);
        same!(t, [x, w], kernels::linear(x.clone().swap_dims(0, 1), w.clone().transpose(), None),
            composed::linear(x.clone().swap_dims(0, 1), w.clone().transpose(), None));
    }

    #[test]
    fn low_rank(
        batch in 1_usize..4, seq in 1_usize..40, fan_in in 1_usize..50, fan_out in 1_usize..50, r in 1_usize..10,
    ) {
        let (x, w, bias) = (random([batch, seq, fan_in], 1), random([fan_in, fan_out], 2), random([fan_out], 3));
        let (a, b) = (random([fan_in, r], 4), random([r, fan_out], 5));
        // Sums of products of sums: each counts for as many terms as both have.
        let t = tolerance(fan_in.max(batch * seq).max(fan_out)) * tolerance(r) / f32::EPSILON;
        let pair = || (a.clone(), b.clone());
        same!(t, [x, w, bias, a, b], kernels::low_rank(x.clone(), w.clone(), Some(bias.clone()), pair(), 0.5),
            composed::low_rank(x.clone(), w.clone(), Some(bias.clone()), pair(), 0.5));
        same!(t, [x, w, a, b], kernels::low_rank(x.clone(), w.clone(), None, pair(), 2.0),
            composed::low_rank(x.clone(), w.clone(), None, pair(), 2.0));
        // A frozen layer: only what is trained and what lies before it has gradients.
        let w = w.inner();
        same!(t, [x, a, b], kernels::low_rank(x.clone(), w.clone(), None, pair(), 2.0),
            composed::low_rank(x.clone(), w.clone(), None, pair(), 2.0));
    }

    /// Over a weight in half precision, of as many rows as are taken one by one, and of more.
    #[test]
    fn half(
        rows in 1_usize..12, fan_in in 1_usize..70, fan_out in 1_usize..70, r in 1_usize..6, f16 in any::<bool>(),
        lies in 0_usize..3,
    ) {
        let dtype = if f16 { DType::F16 } else { DType::BF16 };
        let held = |shape: [usize; 2], seed| random(shape, seed).inner().cast(dtype);
        let w = match lies {
            0 => held([fan_in, fan_out], 2),
            1 => held([fan_out, fan_in], 2).transpose(),
            // With gaps.
            _ => held([fan_in + 2, fan_out + 3], 2).narrow(0, 1, fan_in).narrow(1, 2, fan_out),
        };
        let wide = || w.clone().cast(DType::F32);
        let x = random([rows, 1, fan_in], 1);
        let b = random([fan_out], 3).inner().cast(dtype);
        let bias = || b.clone().cast(DType::F32);
        let t = tolerance(fan_in.max(fan_out));
        same!(t, [x], kernels::linear(x.clone(), w.clone(), Some(b.clone())),
            composed::linear(x.clone(), wide(), Some(bias())));
        same!(t, [x], kernels::linear(x.clone(), w.clone(), None), composed::linear(x.clone(), wide(), None));
        // The composition meets it as well.
        same!(t, [x], composed::linear(x.clone(), w.clone(), Some(b.clone())),
            composed::linear(x.clone(), wide(), Some(bias())));
        let (down, up) = (random([fan_in, r], 4), random([r, fan_out], 5));
        let t = tolerance(fan_in.max(fan_out).max(rows)) * tolerance(r) / f32::EPSILON;
        same!(t, [x, down, up],
            kernels::low_rank(x.clone(), w.clone(), Some(b.clone()), (down.clone(), up.clone()), 0.5),
            composed::low_rank(x.clone(), wide(), Some(bias()), (down.clone(), up.clone()), 0.5));
        same!(t, [x, down, up],
            kernels::low_rank(x.clone(), w.clone(), None, (down.clone(), up.clone()), 0.5),
            composed::low_rank(x.clone(), wide(), None, (down.clone(), up.clone()), 0.5));
        let targets: Vec<i32> = (0..rows).map(|i| (i * 31 % fan_out) as i32).collect();
        let x = random([rows, fan_in], 6);
        let t = tolerance(fan_in.max(fan_out).max(rows));
        let (found, right) = kernels::cross_entropy(x.clone(), w.clone(), targets.clone());
        let plain = || composed::cross_entropy(composed::linear(x.clone(), wide(), None), targets.clone());
        prop_assert_eq!(right.into_scalar::<i32>(), plain().1.into_scalar::<i32>());
        same!(t, [x], found.clone(), plain().0);
    }

    #[test]
    fn pointwise(rows in 1_usize..70, width in 1_usize..600) {
        let (x, y) = (random([rows, width], 1) * 3.0, random([rows, width], 2));
        let (x, t) = (x.detach().require_grad(), tolerance(1));
        same!(t, [x], kernels::gelu(x.clone()), composed::gelu(x.clone()));
        same!(t, [x, y], kernels::silu_mul(x.clone(), y.clone()), composed::silu_mul(x.clone(), y.clone()));
        same!(t, [x], kernels::gelu(x.clone().transpose()), composed::gelu(x.clone().transpose()));
    }

    #[test]
    fn norms(batch in 1_usize..4, seq in 1_usize..50, width in 1_usize..100) {
        let x = random([batch, seq, width], 1);
        let (gamma, beta) = (random([width], 2), random([width], 3));
        // A width of 1 or 2 divides by a deviation that may be next to nothing: epsilon keeps it off.
        let (e, t) = (1e-2, 16.0 * tolerance(width.max(batch * seq)));
        same!(t, [x, gamma, beta], kernels::layer_norm(x.clone(), gamma.clone(), Some(beta.clone()), e),
            composed::layer_norm(x.clone(), gamma.clone(), Some(beta.clone()), e));
        same!(t, [x, gamma], kernels::rms_norm(x.clone(), gamma.clone(), e),
            composed::rms_norm(x.clone(), gamma.clone(), e));
        // Behind a residual, which may be read by others and lie transposed.
        let residual = random([batch, width, seq], 4);
        let rows = || residual.clone().swap_dims(1, 2);
        same!(t, [x, residual, gamma, beta],
            kernels::layer_norm_of_sum(x.clone(), rows(), gamma.clone(), Some(beta.clone()), e) + rows(),
            composed::layer_norm(x.clone() + rows(), gamma.clone(), Some(beta.clone()), e) + rows());
        // One for all rows is added as everywhere.
        let one = random([1, 1, width], 5);
        same!(t, [x, one], kernels::layer_norm_of_sum(x.clone(), one.clone(), gamma.clone(), None, e),
            composed::layer_norm(x.clone() + one.clone(), gamma.clone(), None, e));
        same!(t, [x, one], kernels::layer_norm_of_sum(x.clone(), one.clone(), gamma.clone(), Some(beta.clone()), e),
            composed::layer_norm(x.clone() + one.clone(), gamma.clone(), Some(beta.clone()), e));
    }

    #[test]
    fn cross_entropy(n in 1_usize..40, width in 1_usize..30, classes in 1_usize..90) {
        let targets: Vec<i32> = (0..n).map(|i| (i * 31 % classes) as i32).collect();
        let (x, w) = (random([n, width], 1), random([width, classes], 2));
        let t = tolerance(n.max(width).max(classes));
        let (fused, right) = kernels::cross_entropy(x.clone(), w.clone(), targets.clone());
        let plain = || composed::cross_entropy(composed::linear(x.clone(), w.clone(), None), targets.clone());
        let count = |t: Tensor<1, burn::tensor::Int>| t.into_data().convert::<i32>().try_to_vec::<i32>().expect("is i32");
        prop_assert_eq!(count(right), count(plain().1));
        same!(t, [x, w], fused.clone(), plain().0);
        // A weight that lies transposed, and rows that are picked out.
        let w = random([classes, width], 3);
        let x = random([width, n], 4);
        same!(t, [x, w], kernels::cross_entropy(x.clone().transpose(), w.clone().transpose(), targets.clone()).0,
            composed::cross_entropy(composed::linear(x.clone().transpose(), w.clone().transpose(), None), targets.clone()).0);
    }

    #[test]
    fn rotary(batch in 1_usize..4, heads in 1_usize..5, seq in 1_usize..30, half in 1_usize..20) {
        let x = random([batch, seq, heads, 2 * half], 1);
        let table = |seed| {
            let part = random([batch, 1, seq, half], seed).detach();
            Tensor::cat(vec![part.clone(), part], 3).inner()
        };
        let (cos, sin) = (table(2), table(3));
        same!(tolerance(2), [x], kernels::rotate(x.clone().swap_dims(1, 2), cos.clone(), sin.clone()),
            composed::rotate(x.clone().swap_dims(1, 2), cos.clone(), sin.clone()));
    }

    #[test]
    fn attention(
        batch in 1_usize..4, groups in 1_usize..3, share in 1_usize..4, seq in 1_usize..150, past in 0_usize..300,
        d in 1_usize..24, kind in 0_usize..4,
    ) {
        let total = seq + past;
        let q = random([batch, seq, groups * share, d], 1);
        let (k, v) = (random([batch, total, groups, d], 2), random([batch, total, groups, d], 3));
        let hidden = |hide: bool| if hide { -1e9_f32 } else { 0.0 };
        let plain = Device::flex();
        let mask: Option<Tensor<4>> = match kind {
            0 => None,
            // Padding at the end, other in each row; something is always seen.
            1 => {
                let values: Vec<f32> = (0..batch * total)
                    .map(|i| hidden(i % total > (i / total + 1) * total / 4)).collect();
                Some(Tensor::from_data(TensorData::new(values, [batch, 1, 1, total]), &plain))
            }
            // The future.
            2 => {
                let values: Vec<f32> =
                    (0..seq * total).map(|i| hidden(i % total > past + i / total)).collect();
                Some(Tensor::from_data(TensorData::new(values, [1, 1, seq, total]), &plain))
            }
            // Holes: every third key, but never one's own.
            _ => {
                let values: Vec<f32> = (0..batch * seq * total)
                    .map(|i| hidden(i % total % 3 == 0 && i % total != past + i / total % seq)).collect();
                Some(Tensor::from_data(TensorData::new(values, [batch, 1, seq, total]), &plain))
            }
        };
        let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
        same!(8.0 * tolerance(total.max(d)), [q, k, v],
            kernels::attention(heads(&q), heads(&k), heads(&v), mask.clone()),
            composed::attention(heads(&q), heads(&k), heads(&v), mask.clone()));
    }

    #[test]
    fn attention_of_rows(
        keys in prop::collection::vec(1_usize..60, 1..5), groups in 1_usize..3, share in 1_usize..4, d in 1_usize..24,
        first in any::<bool>(),
    ) {
        let total = keys.iter().sum::<usize>();
        let lengths: Vec<[usize; 2]> = keys.iter().map(|n| [if first { 1 } else { *n }, *n]).collect();
        let queries = lengths.iter().map(|row| row[0]).sum::<usize>();
        let q = random([1, queries, groups * share, d], 1);
        let (k, v) = (random([1, total, groups, d], 2), random([1, total, groups, d], 3));
        let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
        same!(8.0 * tolerance(total.max(d)), [q, k, v],
            kernels::attention_rows(heads(&q), heads(&k), heads(&v), lengths.clone()),
            composed::attention_rows(heads(&q), heads(&k), heads(&v), &lengths));
    }
}

/// Rows one after the other are the rows of a batch, and a row may be empty.
#[test]
fn rows_are_those_of_a_batch() {
    let part = |seed| random([3, 7, 2, 8], seed).inner();
    let (q, k, v) = (part(1), part(2), part(3));
    let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
    let batch = values(kernels::attention(heads(&q), heads(&k), heads(&v), None));
    let [q, k, v] = [q, k, v].map(|t| t.reshape([1, 21, 2, 8]));
    let rows = |lengths: &[[usize; 2]]| {
        values(kernels::attention_rows(heads(&q), heads(&k), heads(&v), lengths.to_vec()))
    };
    assert_eq!(rows(&[[7, 7]; 3]), batch);
    assert_eq!(rows(&[[7, 7], [0, 0], [7, 7], [7, 7]]), batch);
    let lost = std::panic::catch_unwind(|| rows(&[[7, 7]; 2])).expect_err("misses a row");
    let said = lost.downcast_ref::<String>().expect("says what is wrong");
    assert!(said.contains("rows of attention"), "{said}");
}

/// A row that sees nothing has the mean of all that is hidden, as in the composition, whatever the rows
/// beside it see.
#[test]
fn a_row_that_sees_nothing_is_as_composed() {
    for seq in [3, 70] {
        let part = |seed| random([2, seq, 3, 4], seed);
        let (q, k, v) = (part(1), part(2), part(3));
        // Left padding: the first two columns are hidden, and with the future so are the first two rows.
        let hidden = |i: usize, j: usize| if j < 2 || j > i { -1e9_f32 } else { 0.0 };
        let values: Vec<f32> = (0..seq * seq).map(|at| hidden(at / seq, at % seq)).collect();
        let mask = Tensor::from_data(TensorData::new(values, [1, 1, seq, seq]), &Device::flex());
        let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
        same!(
            8.0 * tolerance(seq),
            [q, k, v],
            kernels::attention(heads(&q), heads(&k), heads(&v), Some(mask.clone())),
            composed::attention(heads(&q), heads(&k), heads(&v), Some(mask.clone()))
        );
    }
}

/// A batch of no rows is one too, forward and backward. (Burn's own product of nothing crashes on flex.)
#[test]
fn nothing_gives_nothing() {
    let (x, w, b) = (random([0, 5, 8], 1), random([8, 3], 2), random([3], 3));
    let h = kernels::gelu(kernels::linear(x.clone(), w.clone(), Some(b.clone())));
    let y = kernels::layer_norm(h, b.clone(), Some(b.clone()), 1e-5);
    assert_eq!(y.dims(), [0, 5, 3]);
    let gradients = y.sum().backward();
    assert_eq!(x.grad(&gradients).map(|g| g.dims()), Some([0, 5, 8]));
    assert_eq!(values(w.grad(&gradients).expect("is tracked")), vec![0.0; 24]);
    let rows = random([0, 8], 5);
    let (loss, right) = kernels::cross_entropy(rows.clone(), w.clone(), Vec::new());
    assert_eq!((values(loss.clone()), right.into_scalar::<i32>()), (vec![0.0], 0));
    let gradients = loss.backward();
    assert_eq!(rows.grad(&gradients).map(|g| g.dims()), Some([0, 8]));
    let q = random([2, 0, 3, 4], 4);
    assert_eq!(
        kernels::attention(
            q.clone().swap_dims(1, 2),
            q.clone().swap_dims(1, 2),
            q.swap_dims(1, 2),
            None
        )
        .dims(),
        [2, 0, 12]
    );
}

/// In half precision too, and norms of such parameters are those of the numbers that they stand for.
#[test]
fn half_of_nothing_and_of_norms() {
    for dtype in [DType::BF16, DType::F16] {
        let held = |shape, seed| random(shape, seed).inner().cast(dtype);
        let (x, w) = (random([0, 5, 8], 1), held([8, 3], 2));
        let y = kernels::linear(x.clone(), w.clone(), None);
        assert_eq!((y.dims(), y.dtype()), ([0, 5, 3], DType::F32));
        let gradients = y.sum().backward();
        assert_eq!(x.grad(&gradients).map(|g| g.dims()), Some([0, 5, 8]));
        let x = random([4, 5, 8], 1).inner();
        let [gamma, beta] = [3, 4].map(|seed| held([1, 8], seed).reshape([8]));
        let [wide, shift] = [&gamma, &beta].map(|half| half.clone().cast(DType::F32));
        assert_eq!(
            values(kernels::layer_norm(x.clone(), gamma.clone(), Some(beta), 1e-5)),
            values(kernels::layer_norm(x.clone(), wide.clone(), Some(shift), 1e-5))
        );
        assert_eq!(
            values(kernels::rms_norm(x.clone(), gamma, 1e-5)),
            values(kernels::rms_norm(x, wide, 1e-5))
        );
    }
}

/// A weight in half precision that is tracked has the gradient of the composition.
#[test]
fn a_tracked_half_has_a_gradient() {
    let (x, w) = (random([6, 8], 1).inner(), random([8, 3], 2));
    let gradient = |y: Tensor<2>| values(w.grad(&y.sum().backward()).expect("is tracked"));
    let half = || w.clone().cast(DType::BF16);
    let found = gradient(kernels::linear(x.clone(), half(), None));
    assert_eq!(found, gradient(composed::linear(x, half(), None)));
    assert!(found.iter().any(|g| *g != 0.0));
}

/// Constants get no gradient, and plain tensors stay plain.
#[test]
fn plain_tensors_are_constants() {
    let x = random([2, 5, 8], 1);
    let w = Tensor::<2>::random([8, 3], Distribution::Default, &Device::flex());
    let y = kernels::linear(x.clone(), w.clone(), None);
    assert!(y.device().is_autodiff());
    let gradients = y.sum().backward();
    assert!(x.grad(&gradients).is_some());
    let plain = kernels::linear(x.inner(), w, None);
    assert!(!plain.device().is_autodiff());
}

/// The same numbers on every run, and for a row whatever else is in its batch.
#[test]
fn rows_do_not_depend_on_their_batch() {
    let (x, w) = (random([7, 33, 48], 1).inner(), random([48, 40], 2).inner());
    let whole = kernels::gelu(kernels::linear(x.clone(), w.clone(), None));
    for row in 0..7 {
        let part = x.clone().narrow(0, row, 1);
        let part = kernels::gelu(kernels::linear(part, w.clone(), None));
        let alike = whole.clone().narrow(0, row, 1);
        close("row", &values(part), &values(alike), tolerance(48));
    }
    let again = kernels::gelu(kernels::linear(x, w, None));
    assert_eq!(values(whole), values(again));
}

/// Other float types and what is not fused run as compositions.
#[test]
fn other_types_run() {
    let x = random([2, 3, 8], 1).inner().cast(burn::tensor::DType::F64);
    let y = kernels::gelu(x.clone());
    assert_eq!(y.dtype(), burn::tensor::DType::F64);
    close("f64", &values(y), &values(composed::gelu(x)), tolerance(1));
}
