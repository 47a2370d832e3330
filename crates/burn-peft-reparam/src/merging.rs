//! Rules that make one tensor of several, number by number: pruning, election of signs, weighted sums.
//! HF PEFT's `merge_utils.py`, in its order of operations.

use crate::torch_random::TorchRandom;
use std::fmt;
use std::str::FromStr;

/// How the sign is elected that wins at each number: HF PEFT's `majority_sign_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// "total": that of the sum, so that large numbers count for more.
    #[default]
    Total,
    /// "frequency": that of most numbers.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            _ => Err(format!("expected total or frequency, found {name}")),
        }
    }
}

impl fmt::Display for MajoritySign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Total => "total",
            Self::Frequency => "frequency",
        })
    }
}

/// Which numbers of each tensor are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prune {
    /// All.
    Nothing,
    /// The largest.
    Smallest,
    /// Drawn ones, the rest made larger for what was lost (DARE, arXiv 2311.03099).
    Random,
}

/// A rule: prune each tensor, then add what is left, all of it or what agrees with the elected sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arithmetic {
    pub(crate) prune: Prune,
    /// TIES (arXiv 2306.01708).
    pub(crate) elect: bool,
}

/// The numbers that a rule works by.
pub(crate) struct Settings {
    /// Share of numbers that is kept.
    pub(crate) density: f64,
    pub(crate) majority_sign: MajoritySign,
    pub(crate) random: TorchRandom,
}

impl Settings {
    /// One tensor out of several of the same size, each with its weight.
    pub(crate) fn merged(
        &mut self,
        rule: Arithmetic,
        mut tensors: Vec<Vec<f32>>,
        weights: &[f64],
    ) -> Vec<f32> {
        for tensor in &mut tensors {
            match rule.prune {
                Prune::Nothing => {}
                // Nothing is drawn then, either.
                _ if self.density >= 1.0 => {}
                Prune::Smallest => keep_largest(tensor, self.density),
                Prune::Random => self.keep_drawn(tensor),
            }
        }
        let size = tensors.first().map_or(0, Vec::len);
        (0..size)
            .map(|at| self.one(rule, tensors.iter().map(|tensor| tensor[at]), weights))
            .collect()
    }

    fn one(
        &self,
        rule: Arithmetic,
        values: impl Iterator<Item = f32> + Clone,
        weights: &[f64],
    ) -> f32 {
        let weighted = values.clone().zip(weights).map(|(value, weight)| value * *weight as f32);
        if !rule.elect {
            return weighted.sum();
        }
        let sign = |value: f32| if value == 0.0 { 0.0 } else { value.signum() };
        // As in HF PEFT, the unweighted numbers vote.
        let votes: f32 = match self.majority_sign {
            MajoritySign::Total => values.clone().sum(),
            MajoritySign::Frequency => values.clone().map(sign).sum(),
        };
        let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
        let agree = values.map(|value| sign(value) == elected);
        let kept = weighted.zip(agree).filter(|(_, agrees)| *agrees);
        let (sum, count) = kept.fold((0.0, 0), |(sum, count), (value, _)| (sum + value, count + 1));
        sum / count.max(1) as f32
    }

    fn keep_drawn(&mut self, tensor: &mut [f32]) {
        let drawn = self.random.uniform(tensor.len(), 0.0, 1.0);
        let density = self.density as f32;
        for (value, drawn) in tensor.iter_mut().zip(drawn) {
            *value = if drawn < density { *value / density } else { 0.0 };
        }
    }
}

/// Zeroes all but the `⌊density·n⌋` largest in size; of equals, the first are kept.
fn keep_largest(tensor: &mut [f32], density: f64) {
    let kept = (density * tensor.len() as f64) as usize;
    let mut order: Vec<usize> = (0..tensor.len()).collect();
    order.sort_by(|&a, &b| tensor[b].abs().total_cmp(&tensor[a].abs()).then(a.cmp(&b)));
    for at in order.into_iter().skip(kept) {
        tensor[at] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::{Arithmetic, MajoritySign, Prune, Settings};
    use crate::torch_random::TorchRandom;

    fn settings(density: f64, majority_sign: MajoritySign) -> Settings {
        Settings { density, majority_sign, random: TorchRandom::manual_seed(1) }
    }

    #[test]
    fn signs_are_elected_by_sum_or_by_count() {
        let rule = Arithmetic { prune: Prune::Nothing, elect: true };
        let tensors = || vec![vec![3.0, 1.0], vec![-1.0, 0.0], vec![-1.0, -4.0]];
        let weights = [1.0, 2.0, 0.5];
        // Sums 1 and -3: the first number alone agrees, then the last.
        let found = settings(1.0, MajoritySign::Total).merged(rule, tensors(), &weights);
        assert_eq!(found, [3.0, -2.0]);
        // Counts -1 and 0: the mean of -2 and -0.5, and a tie is positive.
        let found = settings(1.0, MajoritySign::Frequency).merged(rule, tensors(), &weights);
        assert_eq!(found, [-1.25, 1.0]);
    }

    #[test]
    fn the_largest_are_kept() {
        let rule = Arithmetic { prune: Prune::Smallest, elect: false };
        let found = settings(0.5, MajoritySign::Total).merged(
            rule,
            vec![vec![1.0, -3.0, 2.0, -2.0, 0.5]],
            &[2.0],
        );
        assert_eq!(found, [0.0, -6.0, 4.0, 0.0, 0.0]);
    }

    #[test]
    fn drawn_numbers_keep_the_mean() {
        let rule = Arithmetic { prune: Prune::Random, elect: false };
        let (n, density) = (20_000, 0.3);
        let found = settings(density, MajoritySign::Total).merged(rule, vec![vec![1.0; n]], &[1.0]);
        let kept = found.iter().filter(|&&v| v != 0.0).count() as f64;
        assert!(found.iter().all(|&v| v == 0.0 || (v - 1.0 / 0.3).abs() < 1e-6));
        // Five standard deviations of a binomial count.
        let five = 5.0 * (n as f64 * density * (1.0 - density)).sqrt();
        assert!((kept - n as f64 * density).abs() < five, "{kept}");
    }
}
