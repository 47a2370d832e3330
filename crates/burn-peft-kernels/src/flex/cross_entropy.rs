//! Cross-entropy behind a product, `Σₙ −log softmax(xₙ·W)[tₙ]`, without a matrix of `[n, classes]`.
//!
//! Rows are taken some at a time. Where their logits lie, `p − 1ₜ` is formed, the softmax less one at the target,
//! and from it at once what backward needs but for the factor `g` of the sum, as in arXiv 2410.10989:
//! `dx = (p − 1ₜ)·Wᵀ·g`, `dW = xᵀ·(p − 1ₜ)·g`.

use super::linear::Matrix;
use super::math::{exp, largest, map, sum, vectorized};
use super::matrix::{Shape, View};
use super::product::{Factor, Start, Term, sum as products};
use super::tensors::{dims, flat, in_order, make};
use super::{Dense, Tracked};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use rayon::prelude::*;

/// Logits that are held at a time: 162 rows of a vocabulary of 49,152, since the weight is packed anew for each product, and
/// less than the 32 MiB from which on the C library maps fresh memory each time.
const LOGITS: usize = 8_000_000;

/// `dx` and `dW` for a factor of 1, where they are wanted.
type Slopes = [Option<Dense>; 2];

/// The sum over the rows and how many have their target on top: `[2]`.
pub(super) fn forward(x: &Dense, w: &Dense, targets: &[i32]) -> Dense {
    taken(x, w, targets, [false; 2], LOGITS).0
}

/// With slopes for `x` and `W` where `wanted`, so many `logits` at a time.
fn taken(
    x: &Dense,
    w: &Dense,
    targets: &[i32],
    wanted: [bool; 2],
    logits: usize,
) -> (Dense, Slopes) {
    let (x, weight) = (in_order(x), Matrix::weight(w));
    let (n, [width, classes]) = (targets.len(), weight.dims());
    assert_eq!(dims(&x), [n, width], "a row of x for each target");
    let zeros = |dims: [usize; 2]| make(dims, |out| out.fill(0.0));
    let mut slopes =
        [wanted[0].then(|| zeros([n, width])), wanted[1].then(|| zeros([width, classes]))];
    let most = (logits / classes.max(1)).clamp(1, n.max(1));
    let mut held = vec![0.0_f32; most * classes];
    let (mut loss, mut correct) = (0.0_f64, 0_usize);
    let w = weight.factor();
    for (part, targets) in targets.chunks(most).enumerate() {
        let (first, rows) = (part * most, targets.len());
        let held = &mut held[..rows * classes];
        let x = View::new(flat(&x), first * width, Shape::rows(rows, width));
        products(held, [rows, classes], Start::Nothing, &[Term::product(x, w)]);
        let each: Vec<(f32, bool)> = held
            .par_chunks_exact_mut(classes)
            .zip(targets)
            .map(|(row, target)| vectorized(|| errors(row, *target as usize)))
            .collect();
        for (part, right) in each {
            loss += f64::from(part);
            correct += usize::from(right);
        }
        let errors = View::new(held, 0, Shape::rows(rows, classes));
        if let Some(dx) = &mut slopes[0] {
            let dx = &mut dx.storage_mut::<f32>()[first * width..(first + rows) * width];
            products(dx, [rows, width], Start::Nothing, &[Term::product(errors, w.transposed())]);
        }
        if let Some(dw) = &mut slopes[1] {
            let dw = dw.storage_mut::<f32>();
            products(
                dw,
                [width, classes],
                Start::Kept,
                &[Term::product(x.transposed(), Factor::F32(errors))],
            );
        }
    }
    (make([2], |out| out.copy_from_slice(&[loss as f32, correct as f32])), slopes)
}

/// A row's loss, and whether its first largest logit is the target's; `p − 1ₜ` lies in the logits' place.
#[inline(always)]
fn errors(row: &mut [f32], target: usize) -> (f32, bool) {
    let (top, right) = (largest(row), row[target]);
    let correct = right == top && row.iter().position(|logit| *logit == top) == Some(target);
    row.iter_mut().for_each(|logit| *logit = exp(*logit - top));
    let total = sum(row);
    row.iter_mut().for_each(|power| *power /= total);
    row[target] -= 1.0;
    (total.ln() + (top - right), correct)
}

#[derive(Debug)]
struct Step;

impl Backward<Flex, 2> for Step {
    type State = Slopes;
    fn backward(self, ops: Ops<Slopes, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = in_order(&grads.consume::<Flex>(&ops.node));
        let g = flat(&g)[0];
        for (parent, slope) in ops.parents.iter().zip(ops.state) {
            if let (Some(node), Some(slope)) = (parent, slope) {
                let scaled = make(dims(&slope), |out| map(out, flat(&slope), |d| d * g));
                grads.register::<Flex>(node.id, scaled);
            }
        }
    }
}

pub(super) fn tracked<C: CheckpointStrategy>(x: Tracked, w: Tracked, targets: &[i32]) -> Tracked {
    let wanted = [x.is_tracked(), w.is_tracked()];
    let (y, slopes) = taken(x.primitive(), w.primitive(), targets, wanted, LOGITS);
    match Step.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(slopes, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many rows are taken at a time, the rows are the same.
    #[test]
    fn parts_are_the_whole() {
        let (n, width, classes) = (13, 5, 11);
        let numbers = |count: usize| (0..count).map(|i| ((i * 37 % 29) as f32 - 14.0) / 9.0);
        let filled = |dims: [usize; 2]| {
            make(dims, |out| {
                out.iter_mut().zip(numbers(dims[0] * dims[1])).for_each(|(o, v)| *o = v)
            })
        };
        let (x, w) = (filled([n, width]), filled([width, classes]));
        let targets: Vec<i32> = (0..n as i32).map(|i| i * 5 % classes as i32).collect();
        let (whole, slopes) = taken(&x, &w, &targets, [true; 2], LOGITS);
        for rows in [1, 4, 13] {
            let (parts, also) = taken(&x, &w, &targets, [true; 2], rows * classes);
            // Only what is added up over rows may round otherwise: 13 numbers of at most 1.6.
            let pairs = [
                (&whole, &parts),
                (slopes[0].as_ref().expect("is wanted"), also[0].as_ref().expect("is wanted")),
                (slopes[1].as_ref().expect("is wanted"), also[1].as_ref().expect("is wanted")),
            ];
            for (a, b) in pairs {
                for (a, b) in flat(a).iter().zip(flat(b)) {
                    assert!(
                        (a - b).abs() <= 13.0 * 1.6 * f32::EPSILON * a.abs().max(1.0),
                        "{a} {b}"
                    );
                }
            }
        }
    }
}
