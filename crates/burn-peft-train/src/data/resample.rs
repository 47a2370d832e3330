//! Resizing as Pillow does it, to the bit: that is what models of images were trained on. Pillow 13 begins with the
//! height where the width shrinks less, which can change a byte by one; before, it never did, and neither do we.

/// What the pixels around a place count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
}

impl Filter {
    /// How far it reaches, in pixels.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bicubic => 0.0,
        }
    }

    /// For each of `to` pixels the first of the `from` that count, and what they count, in units of 2^-22. A
    /// filter is as many times wider as there are pixels of the source in one of the target.
    fn windows(self, from: usize, to: usize) -> Vec<(usize, Vec<i64>)> {
        let scale = from as f64 / to as f64;
        let wide = scale.max(1.0);
        let reach = self.support() * wide;
        let window = |target: usize| {
            let centre = (target as f64 + 0.5) * scale;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let last = ((centre + reach + 0.5) as usize).min(from);
            let weight = |pixel: usize| self.weight((pixel as f64 - centre + 0.5) / wide);
            let weights: Vec<f64> = (first..last).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let unit = (1_i64 << BITS) as f64;
            let fixed = weights.iter().map(|weight| (weight / sum * unit).round() as i64);
            (first, fixed.collect())
        };
        (0..to).map(window).collect()
    }
}

/// Pillow counts in fixed point.
const BITS: u32 = 22;

/// One line of `channels` values a pixel, pixels `stride` values apart.
fn line(
    source: &[u8],
    target: &mut [u8],
    stride: usize,
    channels: usize,
    windows: &[(usize, Vec<i64>)],
) {
    for (at, (first, weights)) in windows.iter().enumerate() {
        for channel in 0..channels {
            let pixels = weights.iter().enumerate();
            let sum: i64 = pixels
                .map(|(i, weight)| weight * i64::from(source[(first + i) * stride + channel]))
                .sum();
            let rounded = (sum + (1 << (BITS - 1))) >> BITS;
            target[at * stride + channel] = rounded.clamp(0, 255) as u8;
        }
    }
}

/// `pixels [height][width][channels]` at another `[height, width]`: first in width, then in height, each only
/// where it changes.
pub(crate) fn resize(
    pixels: &[u8],
    [height, width]: [usize; 2],
    channels: usize,
    [tall, wide]: [usize; 2],
    filter: Filter,
) -> Vec<u8> {
    let mut pixels = pixels.to_vec();
    if wide != width {
        let windows = filter.windows(width, wide);
        let mut made = vec![0; height * wide * channels];
        let rows = pixels.chunks(width * channels).zip(made.chunks_mut(wide * channels));
        rows.for_each(|(row, made)| line(row, made, channels, channels, &windows));
        pixels = made;
    }
    if tall != height {
        let windows = filter.windows(height, tall);
        let mut made = vec![0; tall * wide * channels];
        for column in 0..wide {
            let first = column * channels;
            line(&pixels[first..], &mut made[first..], wide * channels, channels, &windows);
        }
        pixels = made;
    }
    pixels
}
