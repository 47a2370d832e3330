//! LoftQ (arXiv 2310.08659): factors that make up for what quantization takes from a weight.
//!
//! `W ≈ Q + s·A·B`, where `Q` is the weight that a quantized base holds. What is missing without the factors,
//! `W - Q`, has full rank: it is no low-rank difference to the weight as it was, so LoftQ only makes sense
//! over a base that *is* quantized, and LoRA refuses the init "loftq" over one that is not. Whoever quantizes
//! a base takes `Q` and the factors from [`loftq`].

use crate::init::{Pair, truncated};
use burn::tensor::Tensor;

/// `Q [fan_in, fan_out]` and `A, B` of rank `r` with `w ≈ Q + s·A·B`: in each of `iterations` rounds
/// `Q` is `round_trip` (quantize, and back) of what the factors leave, and `s·A·B` the best
/// approximation of what `Q` leaves.
///
/// `w` must be finite and `r` no more than its smaller side, and `s` above 0. HF PEFT leaves `s` out, so that its
/// start is right for `lora_alpha = r` only.
pub fn loftq(
    w: &Tensor<2>,
    r: usize,
    s: f64,
    iterations: usize,
    round_trip: impl Fn(Tensor<2>) -> Tensor<2>,
) -> (Tensor<2>, Pair) {
    let step = |left: Tensor<2>| {
        let q = round_trip(left);
        let factors = truncated(w.clone() - q.clone(), r, s);
        (q, factors)
    };
    let mut found = step(w.clone());
    for _ in 1..iterations {
        let (_, (a, b)) = found;
        found = step(w.clone() - a.matmul(b) * s);
    }
    found
}

/// Quantiles of the normal distribution that the 16 codes of NF4 stand for (arXiv 2305.14314, appendix E).
#[allow(clippy::excessive_precision)]
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_74,
    -0.525_073_051_452_636_72,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_952,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_09,
    0.722_956_836_223_602_29,
    1.0,
];

/// What is left of a weight after NF4 with one scale for each 64 numbers of a row of PyTorch's
/// `[fan_out, fan_in]`.
pub fn nf4(w: Tensor<2>) -> Tensor<2> {
    const BLOCK: usize = 64;
    let [fan_in, fan_out] = w.dims();
    let count = fan_in * fan_out;
    let blocks = count.div_ceil(BLOCK);
    let flat = w.transpose().reshape([count]);
    let padding = Tensor::zeros([blocks * BLOCK - count], &flat.device());
    let flat = if blocks * BLOCK == count { flat } else { Tensor::cat(vec![flat, padding], 0) };
    let rows: Tensor<2> = flat.reshape([blocks, BLOCK]);
    let scale = rows.clone().max_abs_dim(1).clamp_min(f32::MIN_POSITIVE);
    let x = rows / scale.clone();
    let mut nearest = x.clone().zeros_like() + NF4[0];
    for pair in NF4.windows(2) {
        let above = x.clone().greater_elem((pair[0] + pair[1]) / 2.0);
        nearest = nearest.mask_fill(above, pair[1]);
    }
    let back = (nearest * scale).reshape([blocks * BLOCK]).narrow(0, 0, count);
    back.reshape([fan_out, fan_in]).transpose()
}

/// What is left of a weight after `bits`-bit integers with one scale for each output.
pub fn integers(w: Tensor<2>, bits: u32) -> Tensor<2> {
    let most = f64::from(bits.clamp(2, 16) - 1).exp2() - 1.0;
    let scale = w.clone().max_abs_dim(0).clamp_min(f32::MIN_POSITIVE) / most;
    (w / scale.clone()).round() * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn weight() -> Tensor<2> {
        let values: Vec<f32> =
            (0..24 * 16).map(|k| ((k * 37 % 101) as f32 - 50.0) / 50.0).collect();
        Tensor::from_data(TensorData::new(values, [24, 16]), &Device::flex())
    }

    fn size(t: Tensor<2>) -> f32 {
        t.square().sum().sqrt().into_scalar::<f32>()
    }

    #[test]
    fn round_trips_leave_what_they_can_hold() {
        let once = nf4(weight());
        let off = (once.clone() - weight()).abs().max().into_scalar::<f32>();
        assert!(off > 0.0 && off <= (1.0 - 0.696) / 2.0, "{off}");
        assert!(size(nf4(once.clone()) - once) < 1e-5);
        let off = (integers(weight(), 8) - weight()).abs().max().into_scalar::<f32>();
        assert!(off > 0.0 && off <= 0.51 / 127.0, "{off}");
        assert_eq!(size(nf4(weight() * 0.0)), 0.0);
    }

    #[test]
    fn factors_make_up_for_quantization() {
        let left = |r, iterations| {
            let (q, (a, b)) = loftq(&weight(), r, 2.0, iterations, nf4);
            size(weight() - q - a.matmul(b) * 2.0)
        };
        let nothing = size(weight() - nf4(weight()));
        assert!(left(4, 1) < 0.9 * nothing && left(4, 5) < 0.9 * nothing);
        assert_ne!(left(4, 5), left(4, 1));
        assert!(left(16, 1) < 1e-4, "the full rank makes up for all");
    }
}
