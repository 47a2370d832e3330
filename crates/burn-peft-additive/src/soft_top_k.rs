//! The `k` highest scores of each row, hard and soft, with `k = ⌈n/r⌉` of the `n` that are seen.

use burn::tensor::activation::relu;
use burn::tensor::{Bool, Int, Tensor};
use burn_peft_core::HIDDEN;

/// Where ε-scaling begins, and by what it falls each time.
const FROM: f64 = 4.0;
const FALL: f64 = 0.7;

/// Which of a row's tokens are seen by one at least, `[batch, seq]`, where `mask [batch or 1, 1, seq or 1, seq]` hides some.
pub(crate) fn seen(mask: &Tensor<4>, [batch, seq]: [usize; 2]) -> Tensor<2, Bool> {
    let best = mask.clone().max_dim(2);
    let [rows, _, _, total] = best.dims();
    best.reshape([rows, total]).expand([batch, seq]).greater_elem(HIDDEN / 2.0)
}

/// `n` and `k` of each row, `[batch, 1]`.
fn counts(seen: &Tensor<2, Bool>, r: usize) -> [Tensor<2, Int>; 2] {
    let n = seen.clone().int().sum_dim(1);
    let k = (n.clone() + (r as i64 - 1)).div_scalar(r as i64);
    [n, k]
}

/// `λ [batch, seq]` of `s [batch, seq]`; of a token that is not seen it says nothing.
pub(crate) fn soft_top_k(
    s: Tensor<2>,
    seen: Option<&Tensor<2, Bool>>,
    r: usize,
    epsilon: f64,
    iterations: usize,
) -> Tensor<2> {
    let ([batch, seq], constants) = (s.dims(), (&s.device().inner(), s.dtype()));
    let all = || Tensor::<2>::full([batch, seq], 1.0, &s.device().inner()).greater_elem(0.5);
    let seen = seen.cloned().unwrap_or_else(all);
    let [n, k] = counts(&seen, r);
    let hidden = Tensor::<2>::zeros([batch, seq], constants).mask_fill(seen.bool_not(), HIDDEN);
    let ln_k = k.clone().clamp_min(1).float().cast(s.dtype()).log();
    let mut a = Tensor::<2>::zeros([batch, 1], constants);
    let mut now = FROM.max(epsilon);
    for round in 0..iterations {
        if round > 0 {
            now = (now * FALL).max(epsilon);
        }
        let b = -relu(s.clone() + a);
        let z = (s.clone() + b) / now + hidden.clone();
        let top = z.clone().without_autodiff().max_dim(1);
        let sum = (z - top.clone()).exp().sum_dim(1);
        a = (ln_k.clone() - top - sum.log()) * now;
    }
    let lambda = (-relu(-(s + a)) / now).exp();
    lambda.mask_fill(k.greater_equal(n).expand([batch, seq]), 1.0)
}

/// Columns of the `k` highest of each row in their order, of equal ones the first, `[batch, ⌈seq/r⌉]`, and 1 for each
/// of these and 0 where the row has fewer, whose column is 0 then; `None` where all are seen.
pub(crate) fn chosen(
    s: Tensor<2>,
    seen: Option<Tensor<2, Bool>>,
    r: usize,
) -> (Tensor<2, Int>, Option<Tensor<2, Int>>) {
    let ([batch, seq], device) = (s.dims(), s.device());
    let most = seq.div_ceil(r);
    let square = [batch, seq, seq];
    // Who comes before whom: `[batch, one, another]`, whether the other does.
    let one = s.clone().unsqueeze_dim::<3>(2).expand(square);
    let other = s.unsqueeze_dim::<3>(1).expand(square);
    let earlier = Tensor::<2>::ones([seq, seq], &device).tril(-1).greater_elem(0.5);
    let earlier = earlier.unsqueeze::<3>().expand(square);
    let tie = other.clone().equal(one.clone()).bool_and(earlier);
    let mut before = other.greater(one).bool_or(tie);
    if let Some(seen) = &seen {
        before = before.bool_and(seen.clone().unsqueeze_dim::<3>(1).expand(square));
    }
    let rank: Tensor<2, Int> = before.int().sum_dim(2).squeeze_dim(2);
    let k = match &seen {
        Some(seen) => counts(seen, r)[1].clone().expand([batch, seq]),
        None => Tensor::full([batch, seq], most as i64, &device),
    };
    let mut is = rank.lower(k);
    if let Some(seen) = &seen {
        is = is.bool_and(seen.clone());
    }
    // The number of each among the chosen, and then who has each number.
    let number = (is.clone().int().cumsum(1) - 1).unsqueeze_dim::<3>(1);
    let numbers = Tensor::<1, Int>::arange(0..most as i64, &device).reshape([1, most, 1]);
    let shape = [batch, most, seq];
    let has = number.expand(shape).equal(numbers.expand(shape));
    let has = has.bool_and(is.unsqueeze_dim::<3>(1).expand(shape)).int();
    let columns = Tensor::<1, Int>::arange(0..seq as i64, &device).reshape([1, 1, seq]);
    let at = (has.clone() * columns.expand(shape)).sum_dim(2).squeeze_dim(2);
    (at, seen.map(|_| has.sum_dim(2).squeeze_dim(2)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn ints(tensor: Tensor<2, Int>) -> Vec<i64> {
        tensor.into_data().convert::<i64>().try_to_vec().expect("is i64")
    }

    fn floats(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    fn scores() -> Tensor<2> {
        let rows = [[0.1, 0.9, 0.5, 0.9, 0.2], [3.0, -1.0, 0.0, -1.0, 2.0], [0.0; 5]];
        Tensor::from_data(rows, &Device::flex())
    }

    /// Of the last row nothing is seen.
    fn some() -> Tensor<2, Bool> {
        let rows = [[true; 5], [false, true, true, true, false], [false; 5]];
        Tensor::from_data(rows, &Device::flex())
    }

    #[test]
    fn the_highest_are_chosen_in_their_order() {
        let (at, real) = chosen(scores(), None, 2);
        assert!(real.is_none());
        assert_eq!(ints(at), [1, 2, 3, 0, 2, 4, 0, 1, 2]);
        let (at, real) = chosen(scores(), Some(some()), 2);
        assert_eq!(ints(at), [1, 2, 3, 1, 2, 0, 0, 0, 0]);
        assert_eq!(ints(real.expect("says so")), [1, 1, 1, 1, 1, 0, 0, 0, 0]);
        let (at, _) = chosen(scores(), None, 1);
        assert_eq!(ints(at), [0, 1, 2, 3, 4].repeat(3));
        let (at, _) = chosen(scores() * f32::NAN, None, 3);
        assert_eq!(ints(at), [0, 1].repeat(3));
    }

    #[test]
    fn a_mask_of_any_shape_says_who_is_seen() {
        let device = Device::flex();
        let hides = Tensor::<4>::from_data([[[[0.0, HIDDEN, -3.0]]]], &device);
        let of = |mask: &Tensor<4>| ints(seen(mask, [2, 3]).int());
        assert_eq!(of(&hides), [1, 0, 1].repeat(2));
        let later = Tensor::<4>::full([2, 1, 3, 3], HIDDEN, &device).triu(1);
        assert_eq!(of(&later), [1; 6]);
    }

    /// Both duals by turns in f64, over the tokens that are seen.
    fn by_duals(s: &[f64], k: f64, epsilon: f64, iterations: usize) -> Vec<f64> {
        let (mut a, mut now) = (0.0, epsilon.max(FROM));
        let b = |a: f64| s.iter().map(|s| (-(s + a)).min(0.0)).collect::<Vec<f64>>();
        for round in 0..iterations {
            if round > 0 {
                now = (now * FALL).max(epsilon);
            }
            let sum: f64 = s.iter().zip(b(a)).map(|(s, b)| ((s + b) / now).exp()).sum();
            a = now * k.ln() - now * sum.ln();
        }
        s.iter().zip(b(a)).map(|(s, b)| ((s + a + b) / now).exp()).collect()
    }

    #[test]
    fn a_soft_choice_is_the_dual_ascents() {
        for (epsilon, iterations) in [(1.0, 20), (0.5, 4), (6.0, 3), (0.3, 200)] {
            let all = floats(soft_top_k(scores(), None, 2, epsilon, iterations));
            let few = floats(soft_top_k(scores(), Some(&some()), 2, epsilon, iterations));
            let rows = [
                (&all[..5], vec![0.1, 0.9, 0.5, 0.9, 0.2], 3.0),
                (&all[5..10], vec![3.0, -1.0, 0.0, -1.0, 2.0], 3.0),
                (&few[6..9], vec![-1.0, 0.0, -1.0], 2.0),
            ];
            for (found, s, k) in rows {
                let expected = by_duals(&s, k, epsilon, iterations);
                for (found, expected) in found.iter().zip(&expected) {
                    // A few roundings a round, of numbers up to 4 that are divided by ε.
                    let bound =
                        32.0 * f64::from(f32::EPSILON) * iterations as f64 / epsilon.min(1.0);
                    assert!(
                        (f64::from(*found) - expected).abs() <= bound,
                        "{found} and {expected}"
                    );
                    assert!((0.0..=1.0).contains(found));
                }
                let sum: f32 = found.iter().sum();
                assert!(iterations < 200 || (f64::from(sum) - k).abs() < 1e-3, "{sum} of {k}");
            }
            assert!(few.iter().all(|lambda| lambda.is_finite()));
        }
        assert_eq!(floats(soft_top_k(scores(), None, 1, 1.0, 20)), [1.0; 15]);
    }
}
