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
