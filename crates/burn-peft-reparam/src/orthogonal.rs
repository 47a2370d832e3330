//! Orthogonal matrices out of free numbers, and what rotates blocks of a vector with them.

use burn::module::Module;
use burn::nn::Dropout;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

/// How a skew-symmetric matrix is read out of the numbers above its diagonal, row by row.
#[derive(Module, Debug)]
pub(crate) struct Skew {
    /// For each place of the matrix, which number stands there.
    index: Tensor<1, Int>,
    /// 1 above the diagonal, 0 on it, -1 below.
    sign: Tensor<2>,
}

impl Skew {
    /// For matrices `[size, size]`, which are `size·(size - 1)/2` numbers.
    pub(crate) fn new(size: usize, device: &Device) -> Self {
        let mut index = vec![0_i32; size * size];
        let mut sign = vec![0.0_f32; size * size];
        let pairs = (0..size).flat_map(|row| (row + 1..size).map(move |column| (row, column)));
        for (number, (row, column)) in pairs.enumerate() {
            index[row * size + column] = number as i32;
            index[column * size + row] = number as i32;
            sign[row * size + column] = 1.0;
            sign[column * size + row] = -1.0;
        }
        let device = device.clone().inner();
        Self {
            index: Tensor::from_data(TensorData::new(index, [size * size]), &device),
            sign: Tensor::from_data(TensorData::new(sign, [size, size]), &device),
        }
    }

    /// `Q [n, size, size]` out of `numbers [n, size·(size - 1)/2]`.
    pub(crate) fn of(&self, numbers: Tensor<2>) -> Tensor<3> {
        let ([n, _], [size, _]) = (numbers.dims(), self.sign.dims());
        let places = numbers.select(1, self.index.clone()).reshape([n, size, size]);
        places * self.sign.clone().unsqueeze()
    }
}

/// `I [1, size, size]`, a constant.
pub(crate) fn identity(size: usize, device: &Device) -> Tensor<3> {
    Tensor::<2>::eye(size, &device.clone().inner()).unsqueeze()
}

/// Multiplications in a block's product up to which calling a matmul for each block costs more than they do.
const FEW: usize = 256;

/// `A·B` block by block, `[n, rows, size]·[n, size, columns]`; one of the `n` may be 1.
fn product(a: Tensor<3>, b: Tensor<3>) -> Tensor<3> {
    let ([_, rows, size], [_, _, columns]) = (a.dims(), b.dims());
    if rows * size * columns > FEW {
        return a.matmul(b);
    }
    let term = |k| a.clone().narrow(2, k, 1) * b.clone().narrow(1, k, 1);
    (1..size).fold(term(0), |sum, k| sum + term(k))
}

/// Cayley's orthogonal matrices `(I + Q)(I - Q)⁻¹` out of skew-symmetric `Q [n, size, size]`.
///
/// The inverse is found off the graph; one step of Newton's iteration `X(2I - AX)` on the graph then
/// gives its exact derivative `-A⁻¹·dA·A⁻¹`, and the inverse its last bits.
pub(crate) fn cayley(q: Tensor<3>) -> Tensor<3> {
    let [_, size, _] = q.dims();
    let eye = identity(size, &q.device());
    let a = eye.clone() - q;
    let x = inverse(&a);
    let x = product(x.clone(), eye.clone() * 2.0 - product(a, x));
    x * 2.0 - eye // (I + Q)(I - Q)⁻¹ = (2I - A)·A⁻¹
}

/// `A⁻¹`, a constant, by Gauss and Jordan on the host. `A = I - Q` with a skew-symmetric `Q` has the
/// symmetric part `I`, which each elimination keeps: every pivot is 1 or more, so none is sought.
fn inverse(a: &Tensor<3>) -> Tensor<3> {
    let (shape, dtype) = (a.dims(), a.dtype());
    let [_, size, _] = shape;
    let a = a.clone().without_autodiff();
    let device = a.device();
    let mut values: Vec<f64> = a.into_data().iter::<f64>().collect();
    let mut pivot_row = vec![0.0; size];
    for matrix in values.chunks_exact_mut(size * size) {
        for k in 0..size {
            let pivot = 1.0 / matrix[k * size + k];
            matrix[k * size + k] = 1.0;
            for (kept, value) in pivot_row.iter_mut().zip(&mut matrix[k * size..(k + 1) * size]) {
                *value *= pivot;
                *kept = *value;
            }
            let others = matrix.chunks_exact_mut(size).enumerate().filter(|(i, _)| *i != k);
            for (_, row) in others {
                let factor = std::mem::take(&mut row[k]);
                for (value, above) in row.iter_mut().zip(&pivot_row) {
                    *value -= factor * above;
                }
            }
        }
    }
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    Tensor::<3>::from_data(TensorData::new(values, shape), &device).cast(dtype)
}

/// Most terms of Neumann's series that make sense: it is for small `Q`, where few are enough.
pub(crate) const MOST_TERMS: usize = 1000;

/// Cayley's matrices without an inverse: `(I + Q)(I - Q)⁻¹ ≈ I + 2Q + 2Q² + … + Qᵏ`, orthogonal only
/// nearly (arXiv 2506.19847). HF PEFT's count of `terms`: 1 is `I`, 2 is `I + 2Q`, and from 3 on the
/// last power is `max(3, terms - 1)` and counts once.
pub(crate) fn neumann(q: Tensor<3>, terms: usize) -> Tensor<3> {
    let [n, size, _] = q.dims();
    let eye = identity(size, &q.device()).repeat_dim(0, n);
    match terms {
        0 | 1 => return eye + q * 0.0,
        2 => return eye + q * 2.0,
        _ => {}
    }
    let mut sum = eye + q.clone() * 2.0;
    let mut power = q.clone();
    for _ in 2..(terms - 1).max(3) {
        power = product(power, q.clone());
        sum = sum + power.clone() * 2.0;
    }
    sum + product(power, q)
}

/// `x·diag(R₁ … Rₙ)`: block by block of the last axis, `x [batch, seq, n·size]`. One `R` serves
/// all blocks.
pub(crate) fn turn(x: Tensor<3>, r: &Tensor<3>) -> Tensor<3> {
    let shape = x.dims();
    let [n, size, _] = r.dims();
    let rows = shape.iter().product::<usize>() / (n * size);
    if n == 1 {
        return product(x.reshape([1, rows, size]), r.clone()).reshape(shape);
    }
    let blocks = x.reshape([rows, n, size]).swap_dims(0, 1);
    product(blocks, r.clone()).swap_dims(0, 1).reshape(shape)
}

/// `diag(R₁ … Rₙ)·W`: block by block of the rows of `W [n·size, out]`. One `R` serves all blocks.
pub(crate) fn turn_rows(w: Tensor<2>, r: &Tensor<3>) -> Tensor<2> {
    let [rows, out] = w.dims();
    let [_, size, _] = r.dims();
    product(r.clone(), w.reshape([rows / size, size, out])).reshape([rows, out])
}

/// Whether a multiplicative dropout acts: in training, and where there is something to learn.
fn drops<const D: usize>(dropout: &Dropout, factor: &Tensor<D>) -> bool {
    dropout.prob > 0.0 && dropout.training.is_enabled() && factor.is_autodiff()
}

/// Multiplicative dropout: in training, `I` in place of `⌊p·n⌋` of the `n` blocks that each of the
/// `factors` has. Of several factors one loses blocks, chosen at random.
pub(crate) fn drop_blocks(r: Tensor<3>, factors: usize, dropout: &Dropout) -> Tensor<3> {
    let [all, size, _] = r.dims();
    let n = all / factors;
    let count = (dropout.prob * n as f64) as i64;
    if n == 1 || count == 0 || !drops(dropout, &r) {
        return r;
    }
    let device = r.device().inner();
    // A random order: exactly `count` of its places hold one of the first numbers.
    let order = |n: usize| Tensor::<1>::random([n], Distribution::Default, &device).argsort(0);
    let blocks = order(n).lower_scalar(count).float().reshape([1, n]);
    let factor = order(factors).lower_scalar(1).float().reshape([factors, 1]);
    let dropped = (factor * blocks).reshape([all, 1, 1]).cast(r.dtype());
    let eye = identity(size, &device);
    r.clone() + (eye - r) * dropped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 % 23) as f32 / 11.5 - 1.0) * size).collect()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    fn device() -> Device {
        Device::flex().autodiff()
    }

    fn rotations(vector: &[f32], turned: impl Fn(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        let data = TensorData::new(vector.to_vec(), [2, vector.len() / 2]);
        turned(Skew::new(4, &device()).of(Tensor::from_data(data, &device().inner())))
    }

    fn is_near(a: &[f64], b: &[f64], bound: f64) {
        let far =
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f64::total_cmp).unwrap_or_default();
        assert!(a.len() == b.len() && far < bound, "{far}");
    }

    #[test]
    fn cayleys_matrices_are_orthogonal() {
        for size in [0.1, 1.0, 30.0] {
            let r = rotations(&numbers(12, size), cayley);
            let square = values(r.clone().swap_dims(1, 2).matmul(r));
            is_near(&square, &values(identity(4, &device()).repeat_dim(0, 2)), 1e-5);
        }
    }

    #[test]
    fn neumanns_series_nears_cayleys_matrices() {
        let small = numbers(12, 0.05);
        let exact = values(rotations(&small, cayley));
        is_near(&values(rotations(&small, |q| neumann(q, 12))), &exact, 1e-6);
        let q = rotations(&small, |q| q);
        let square = q.clone().matmul(q.clone());
        let three = identity(4, &device()) + q.clone() * 2.0 + square.clone() * 2.0;
        let three = values(three + square.matmul(q.clone()));
        is_near(&values(neumann(q.clone(), 3)), &three, 1e-7);
        is_near(&values(neumann(q.clone(), 4)), &three, 1e-7);
        assert_eq!(values(neumann(q.clone(), 1)), values(q.clone() * 0.0 + identity(4, &device())));
        is_near(&values(neumann(q.clone(), 2)), &values(identity(4, &device()) + q * 2.0), 1e-7);
    }

    /// A number that each entry of the rotations moves differently.
    fn weighed(r: Tensor<3>) -> Tensor<1> {
        let data = TensorData::new(numbers(32, 1.0), [2, 4, 4]);
        (r * Tensor::from_data(data, &device().inner())).sum()
    }

    fn gradients_are_differences(turned: impl Fn(Tensor<3>) -> Tensor<3> + Copy) {
        let point = numbers(12, 0.4);
        let leaf = Tensor::<2>::from_data(TensorData::new(point.clone(), [2, 6]), &device());
        let leaf = leaf.require_grad();
        let found = weighed(turned(Skew::new(4, &device()).of(leaf.clone()))).backward();
        let found = values(leaf.grad(&found).expect("is a leaf"));
        let step = 1e-2;
        let expected: Vec<f64> = (0..point.len())
            .map(|i| {
                let at = |step: f32| {
                    let mut moved = point.clone();
                    moved[i] += step;
                    values(weighed(rotations(&moved, turned)))[0]
                };
                (at(step) - at(-step)) / (2.0 * f64::from(step))
            })
            .collect();
        is_near(&found, &expected, 3e-3);
        assert!(found.iter().any(|g| g.abs() > 0.1));
    }

    #[test]
    fn gradients_are_the_slopes() {
        gradients_are_differences(cayley);
        gradients_are_differences(|q| neumann(q, 5));
        gradients_are_differences(|q| neumann(q, 2));
    }

    #[test]
    fn blocks_turn_as_the_whole_matrix_does() {
        let r = rotations(&numbers(12, 0.7), cayley);
        let data = TensorData::new(numbers(48, 1.0), [3, 2, 8]);
        let x = Tensor::<3>::from_data(data, &device().inner());
        let mut whole = Tensor::<2>::zeros([8, 8], &device().inner());
        for block in 0..2 {
            let range = block * 4..(block + 1) * 4;
            let one = r.clone().slice([block..block + 1, 0..4, 0..4]).squeeze_dim(0);
            whole = whole.slice_assign([range.clone(), range], one);
        }
        let expected = values(x.clone().matmul(whole.clone().unsqueeze()));
        is_near(&values(turn(x.clone(), &r)), &expected, 1e-6);
        let w = x.reshape([6, 8]).transpose();
        is_near(&values(turn_rows(w.clone(), &r)), &values(whole.matmul(w)), 1e-6);
    }

    #[test]
    fn small_products_are_products() {
        let tensor = |shape: [usize; 3]| {
            let data = TensorData::new(numbers(shape.iter().product(), 1.0), shape);
            Tensor::<3>::from_data(data, &device().inner())
        };
        for (a, b) in [([3, 2, 4], [3, 4, 5]), ([1, 2, 4], [3, 4, 5]), ([3, 9, 4], [1, 4, 9])] {
            let found = values(product(tensor(a), tensor(b)));
            is_near(&found, &values(tensor(a).matmul(tensor(b))), 1e-6);
        }
    }

    #[test]
    fn dropped_blocks_are_the_identity() {
        let dropout = burn::nn::DropoutConfig::new(0.5).init();
        let r = rotations(&numbers(12, 0.7), cayley).repeat_dim(0, 4);
        let eye = values(identity(4, &device()));
        let same = |r: Tensor<3>| {
            let blocks = values(r);
            blocks.chunks(16).filter(|block| *block == eye.as_slice()).count()
        };
        assert_eq!(same(drop_blocks(r.clone().autodiff(), 1, &dropout)), 4);
        assert_eq!(same(drop_blocks(r.clone().autodiff(), 2, &dropout)), 2);
        assert_eq!(same(drop_blocks(r, 1, &dropout)), 0, "is no training");
    }
}
