//! Arithmetic on slices of f32 that compilers turn into vector instructions, compiled once for each
//! instruction set of the processor by `pulp` and chosen when it runs.
//!
//! No fused multiply-add is asked for: the same numbers come out on every processor.

use rayon::prelude::*;

/// Elements that one task takes: some ten microseconds of work, and the same cut on every machine.
const CHUNK: usize = 16 * 1024;

/// Runs `work` with the widest vectors of the processor.
#[inline(always)]
pub(super) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `out[i] = f(a[i])` on all cores.
pub(super) fn map(out: &mut [f32], a: &[f32], f: impl Fn(f32) -> f32 + Sync) {
    assert_eq!(out.len(), a.len(), "numbers of an output");
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).for_each(|(out, a)| {
        vectorized(
            #[inline(always)]
            || out.iter_mut().zip(a).for_each(|(out, a)| *out = f(*a)),
        );
    });
}

/// `out[i] = f(a[i], b[i])` on all cores.
pub(super) fn zip(out: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    assert_eq!([a.len(), b.len()], [out.len(); 2], "numbers of an output");
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(
        |((out, a), b)| {
            vectorized(
                #[inline(always)]
                || out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = f(*a, *b)),
            );
        },
    );
}

/// `out[i] = f(a[i], b[i], c[i])` on all cores.
pub(super) fn zip3(
    out: &mut [f32],
    [a, b, c]: [&[f32]; 3],
    f: impl Fn(f32, f32, f32) -> f32 + Sync,
) {
    assert_eq!([a.len(), b.len(), c.len()], [out.len(); 3], "numbers of an output");
    let inputs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).zip(c.par_chunks(CHUNK));
    out.par_chunks_mut(CHUNK).zip(inputs).for_each(|(out, ((a, b), c))| {
        vectorized(
            #[inline(always)]
            || {
                let inputs = a.iter().zip(b).zip(c);
                out.iter_mut().zip(inputs).for_each(|(out, ((a, b), c))| *out = f(*a, *b, *c));
            },
        );
    });
}

/// `e^x` to 2 units in the last place; 0 below -87.3, where f32 has no full precision left, and
/// the largest power of the range above 88.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r, |r| ≤ ln 2 / 2; the n is read off the low bits of a number that was rounded by
    // adding 1.5·2²³.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512, exact in few bits
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's series to the seventh power: 0.35⁸/8! is below a rounding.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * r) * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.3 { 0.0 } else { p * power }
}

/// `(Φ(x), φ(x))`, the normal distribution and its density, each to 2e-7.
///
/// `erfc(z) = e^{-z²}·q(t)`, `t = 1/(1 + 0.4·z)` for `z ≥ 0`: the form of Abramowitz and Stegun 7.1.26, with a
/// polynomial `q` of degree 8 that was fitted to it by weighted least squares (error 3e-9 before rounding).
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    const Q: [f32; 8] = [
        0.225_437_72,
        0.231_245_57,
        0.161_980_55,
        0.357_902_86,
        -0.307_033_66,
        0.633_402_8,
        -0.373_703_5,
        0.070_767_66,
    ];
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.4 * z);
    let mut q = Q[7];
    q = q * t + Q[6];
    q = q * t + Q[5];
    q = q * t + Q[4];
    q = q * t + Q[3];
    q = q * t + Q[2];
    q = q * t + Q[1];
    q = q * t + Q[0];
    let bell = exp(-0.5 * x * x);
    let tail = 0.5 * q * t * bell; // Φ(-|x|)
    let phi = if x < 0.0 { tail } else { 1.0 - tail };
    (phi, bell * 0.398_942_3)
}

/// `σ(x) = 1/(1 + e^{-x})`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Lanes of a sum: enough for the widest vectors, twice.
const LANES: usize = 32;

/// `Σ f(i)` over a slice, in lanes: the same order everywhere.
#[inline(always)]
fn lanes(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let whole = n / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(at + lane);
        }
        at += LANES;
    }
    for i in whole..n {
        sums[i - whole] += f(i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `Σ aᵢ`.
#[inline(always)]
pub(super) fn sum(a: &[f32]) -> f32 {
    lanes(a.len(), |i| a[i])
}

/// `Σ aᵢ·bᵢ` of slices of one length.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    lanes(n, |i| a[i] * b[i])
}

/// `Σ (aᵢ − mean)²`.
#[inline(always)]
pub(super) fn spread(a: &[f32], mean: f32) -> f32 {
    lanes(a.len(), |i| (a[i] - mean) * (a[i] - mean))
}

/// The largest; negative infinity of nothing.
#[inline(always)]
pub(super) fn largest(a: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (best, x) in best.iter_mut().zip(chunk) {
            *best = if *x > *best { *x } else { *best };
        }
    }
    for (best, x) in best.iter_mut().zip(rest) {
        *best = if *x > *best { *x } else { *best };
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = best[lane + width];
            best[lane] = if other > best[lane] { other } else { best[lane] };
        }
        width /= 2;
    }
    best[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place between two numbers of one sign.
    fn apart(a: f32, b: f64) -> f64 {
        let unit = f64::from(f32::EPSILON) * b.abs().max(f64::from(f32::MIN_POSITIVE));
        (f64::from(a) - b).abs() / unit
    }

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            assert!(apart(exp(x), f64::from(x).exp()) <= 2.0, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(-1e9), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    /// `Φ` by Simpson's rule on the density: a second way that shares nothing with the first.
    #[test]
    fn normal_is_the_integral_of_its_density() {
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (steps, mut at, mut integral) = (12_000, -12.0_f64, 0.0_f64);
        let width = 24.0 / f64::from(steps);
        for _ in 0..steps {
            let (phi, bell) = normal(at as f32);
            let true_at = f64::from(at as f32);
            let correction = (true_at - at) * density(at);
            assert!(
                (f64::from(phi) - integral - correction).abs() < 2e-7,
                "Φ({at}) = {phi}, {integral}"
            );
            assert!((f64::from(bell) - density(true_at)).abs() < 2e-7, "φ({at}) = {bell}");
            integral +=
                width / 6.0 * (density(at) + 4.0 * density(at + width / 2.0) + density(at + width));
            at += width;
        }
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0_usize, 1, 31, 32, 33, 64, 100] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum(&a), (n * n.max(1).saturating_sub(1)) as f32 / 2.0);
            assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
            assert_eq!(largest(&a), a.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
    }
}
