//! PyTorch's CPU generator: what HF PEFT draws again from a seed that stands in a file, this draws
//! too. `uniform` and `randperm` bit for bit; `normal` to a few units in the last place, because
//! PyTorch takes its own vectorised logarithm and sine where the machine has them.

use std::collections::BTreeMap;
use std::f64::consts::PI;

/// Words of the Mersenne Twister's state.
const WORDS: usize = 624;
/// Distance of the words that are mixed.
const SHIFT: usize = 397;
/// PyTorch fills this many normal numbers at once, in pairs of this half.
const BLOCK: usize = 16;

/// `torch.Generator().manual_seed(seed)`.
pub(crate) struct TorchRandom {
    state: [u32; WORDS],
    next: usize,
    /// The second number of a pair that `normal` drew one by one.
    spare: Option<f64>,
}

impl TorchRandom {
    /// mt19937 by the lower 32 bits of the seed, as PyTorch seeds it.
    pub(crate) fn manual_seed(seed: u64) -> Self {
        let mut state = [seed as u32; WORDS];
        for j in 1..WORDS {
            let last = state[j - 1] ^ (state[j - 1] >> 30);
            state[j] = last.wrapping_mul(1_812_433_253).wrapping_add(j as u32);
        }
        Self { state, next: WORDS, spare: None }
    }

    fn twist(&mut self) {
        for j in 0..WORDS {
            let (this, after) = (self.state[j], self.state[(j + 1) % WORDS]);
            let mixed = (this & 0x8000_0000) | (after & 0x7fff_ffff);
            let odd = if after & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[j] = self.state[(j + SHIFT) % WORDS] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn two_words(&mut self) -> u64 {
        let high = u64::from(self.word());
        (high << 32) | u64::from(self.word())
    }

    /// In [0, 1), by 24 bits.
    fn unit(&mut self) -> f32 {
        (self.word() & ((1 << 24) - 1)) as f32 / (1 << 24) as f32
    }

    /// In [0, 1), by 53 bits.
    fn wide_unit(&mut self) -> f64 {
        (self.two_words() & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }

    /// The first `count` numbers of `torch.randperm(n)`. The others are drawn and not kept: `n` is
    /// often the size of a weight.
    pub(crate) fn randperm(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut moved = BTreeMap::new();
        let mut drawn = Vec::with_capacity(count.min(n));
        for i in 0..n {
            let left = n - i;
            // PyTorch does not draw for the last place.
            let with = if left > 1 { i + self.word() as usize % left } else { i };
            if i < count {
                let here = moved.remove(&i).unwrap_or(i);
                drawn.push(if with == i { here } else { moved.insert(with, here).unwrap_or(with) });
            }
        }
        drawn
    }

    /// `tensor.uniform_(from, to)` of f32.
    pub(crate) fn uniform(&mut self, count: usize, from: f64, to: f64) -> Vec<f32> {
        let (from, to) = (from as f32, to as f32);
        // One rounding and not two, as PyTorch's kernels are compiled.
        (0..count).map(|_| self.unit().mul_add(to - from, from)).collect()
    }

    /// `torch.nn.init.kaiming_uniform_` of a tensor with `fan_in` numbers in a row.
    pub(crate) fn kaiming_uniform(&mut self, count: usize, fan_in: usize) -> Vec<f32> {
        let std = 2.0_f64.sqrt() / (fan_in as f64).sqrt();
        let bound = 3.0_f64.sqrt() * std;
        self.uniform(count, -bound, bound)
    }

    /// `tensor.normal_(mean, std)` of f32; `torch.randn` is that of 0 and 1.
    pub(crate) fn normal(&mut self, count: usize, mean: f64, std: f64) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| (self.one_normal() * std + mean) as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.unit()).collect();
        let (mean, std) = (mean as f32, std as f32);
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller(block, mean, std);
        }
        if !count.is_multiple_of(BLOCK) {
            // The last block ends where the tensor ends, and is drawn anew.
            let tail = &mut values[count - BLOCK..];
            tail.fill_with(|| self.unit());
            box_muller(tail, mean, std);
        }
        values
    }

    fn one_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.wide_unit(), self.wide_unit());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = 2.0 * PI * u1;
        self.spare = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

fn box_muller(block: &mut [f32], mean: f32, std: f32) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let theta = 2.0 * std::f32::consts::PI * *b;
        *a = radius * theta.cos() * std + mean;
        *b = radius * theta.sin() * std + mean;
    }
}

#[cfg(test)]
mod tests {
    //! The numbers are those of PyTorch 2.15.0 on an x86 processor with AVX2: the result of the call
    //! in the comment, where `g(s)` is `torch.Generator().manual_seed(s)`, and `bits(t)` is
    //! `t.view(torch.int32).tolist()`.

    use super::TorchRandom;

    fn bits(values: &[f32]) -> Vec<i32> {
        values.iter().map(|value| value.to_bits() as i32).collect()
    }

    #[track_caller]
    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= 4.0 * f32::EPSILON * b.abs().max(1.0), "{a}, expected {b}");
        }
    }

    #[test]
    fn uniform_is_torchs() {
        // bits(torch.empty(5).uniform_(-0.3, 0.7, generator=g(7)))
        let found = bits(&TorchRandom::manual_seed(7).uniform(5, -0.3, 0.7));
        let expected =
            [1_047_564_168, -1_110_491_064, 1_052_240_536, 1_052_162_642, -1_115_048_880];
        assert_eq!(found, expected);
        // bits(torch.rand(3, generator=g(2**40 + 5))): the upper half of a seed has no part in it.
        let found = bits(&TorchRandom::manual_seed((1 << 40) + 5).uniform(3, 0.0, 1.0));
        assert_eq!(found, [1_062_505_315, 1_040_261_944, 1_063_800_815]);
        // w = bits(torch.nn.init.kaiming_uniform_(torch.empty(100, 48), generator=g(0)).flatten())
        // w[:3], sum(w)
        let found = bits(&TorchRandom::manual_seed(0).kaiming_uniform(100 * 48, 48));
        assert_eq!(found[..3], [-1_154_647_774, 1_044_526_748, -1_097_532_239]);
        assert_eq!(found.iter().map(|&bits| i64::from(bits)).sum::<i64>(), -203_403_283_504);
    }

    #[test]
    fn permutations_are_torchs() {
        // torch.randperm(10, generator=g(777)).tolist()
        let found = TorchRandom::manual_seed(777).randperm(10, 10);
        assert_eq!(found, [5, 9, 0, 3, 1, 7, 4, 8, 6, 2]);
        // torch.randperm(5_000_000, generator=g(777))[:6].tolist()
        let found = TorchRandom::manual_seed(777).randperm(5_000_000, 6);
        assert_eq!(found, [685_735, 1_481_115, 3_612_291, 2_113_197, 1_444_591, 2_694_112]);
        // torch.randperm(1000, generator=g(777))[-3:].tolist()
        let found = TorchRandom::manual_seed(777).randperm(1000, 2000);
        assert_eq!(found[997..], [73, 889, 284]);
        // t = g(5); torch.randperm(10, generator=t); bits(torch.rand(1, generator=t))
        let mut torch = TorchRandom::manual_seed(5);
        torch.randperm(10, 1);
        assert_eq!(bits(&torch.uniform(1, 0.0, 1.0)), [1_065_255_652]);
    }

    #[test]
    fn normal_is_torchs() {
        // t = g(3); torch.empty(5).normal_(1, 2, generator=t).tolist(), torch.randn(2, generator=t)
        let mut torch = TorchRandom::manual_seed(3);
        let expected = [2.606_552_1, 1.349_666_8, 1.177_956_2, -0.227_436_02, 1.092_364_9];
        close(&torch.normal(5, 1.0, 2.0), &expected);
        close(&torch.normal(2, 0.0, 1.0), &[-1.368_259_2, 0.337_495_1]);
        // torch.empty(19).normal_(0.5, 0.1, generator=g(3)).tolist()
        close(
            &TorchRandom::manual_seed(3).normal(19, 0.5, 0.1),
            &[
                0.492_335_56,
                0.535_988_15,
                0.421_798_32,
                0.334_833_44,
                0.604_602_3,
                0.552_218_7,
                0.483_319_07,
                0.505_303_3,
                0.540_460_7,
                0.561_13,
                0.576_039,
                0.380_476_56,
                0.599_792_24,
                0.545_918_05,
                0.743_639_7,
                0.485_319_17,
                0.548_511_4,
                0.520_523_4,
                0.533_842_8,
            ],
        );
    }
}
