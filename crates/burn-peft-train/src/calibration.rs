//! How far predicted probabilities can be believed.

/// Bins of the expected calibration error, as the papers choose it.
pub const BINS: usize = 15;

/// What probabilities are worth on data with known classes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Mean negative log likelihood of the right class, in nats.
    pub loss: f64,
    /// Share of items whose likeliest class is the right one.
    pub accuracy: f64,
    /// Expected calibration error (arXiv 1706.04599) with [`BINS`] bins, in [0, 1].
    pub ece: f64,
}

impl Scores {
    /// Of `probabilities`, a row an item that sums to 1, and the right class of each.
    pub fn of(probabilities: &[Vec<f64>], labels: &[i32]) -> Self {
        let count = probabilities.len().min(labels.len()).max(1) as f64;
        let mut sum = Self { loss: 0.0, accuracy: 0.0, ece: 0.0 };
        for (row, &label) in probabilities.iter().zip(labels) {
            let right = usize::try_from(label).ok().and_then(|class| row.get(class));
            // The smallest number there is, so that one hopeless item leaves the mean a number.
            sum.loss -= right.copied().unwrap_or(0.0).max(f64::MIN_POSITIVE).ln();
            sum.accuracy += f64::from(u8::from(is_right(row, label)));
        }
        Self {
            loss: sum.loss / count,
            accuracy: sum.accuracy / count,
            ece: expected_calibration_error(probabilities, labels, BINS),
        }
    }
}

/// The likeliest class of a row; the first among equals.
pub fn likeliest(row: &[f64]) -> usize {
    let better = |best: usize, class: usize| if row[class] > row[best] { class } else { best };
    (0..row.len()).reduce(better).unwrap_or(0)
}

fn is_right(row: &[f64], label: i32) -> bool {
    usize::try_from(label) == Ok(likeliest(row))
}

/// `Σ_b |b|/n · |accuracy(b) - confidence(b)|` over `bins` bins `(k/bins, (k+1)/bins]` of the likeliest
/// class's probability (arXiv 1706.04599).
pub fn expected_calibration_error(probabilities: &[Vec<f64>], labels: &[i32], bins: usize) -> f64 {
    let mut gaps = vec![0.0; bins.max(1)];
    for (row, &label) in probabilities.iter().zip(labels) {
        let confidence = row.get(likeliest(row)).copied().unwrap_or(0.0);
        let bin = (confidence * bins as f64).ceil() as usize;
        let last = gaps.len() - 1;
        gaps[bin.saturating_sub(1).min(last)] +=
            f64::from(u8::from(is_right(row, label))) - confidence;
    }
    let count = probabilities.len().min(labels.len()).max(1) as f64;
    gaps.iter().map(|gap: &f64| gap.abs()).sum::<f64>() / count
}

/// `softmax` of each row of logits.
pub fn softmax(logits: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let of = |row: &Vec<f64>| {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let parts: Vec<f64> = row.iter().map(|logit| (logit - most).exp()).collect();
        let sum: f64 = parts.iter().sum();
        parts.into_iter().map(|part| part / sum).collect()
    };
    logits.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Six items in three of five bins, by hand:
    /// (0.4, 0.6]: confidences 0.55, 0.6 (upper edges belong to a bin), one right: |1 - 1.15|
    /// (0.6, 0.8]: 0.7 right, 0.8 right: |2 - 1.5|; (0.8, 1]: 0.9 wrong, 1.0 right: |1 - 1.9|.
    #[test]
    fn the_calibration_error_is_the_one_by_hand() {
        let row = |p: f64| vec![p, 1.0 - p];
        let rows = [0.55, 0.6, 0.7, 0.8, 0.9, 1.0].map(row).to_vec();
        let labels = [0, 1, 0, 0, 1, 0];
        let ece = expected_calibration_error(&rows, &labels, 5);
        assert!((ece - (0.15 + 0.5 + 0.9) / 6.0).abs() < 1e-12, "{ece}");
        let scores = Scores::of(&rows, &labels);
        assert!((scores.accuracy - 4.0 / 6.0).abs() < 1e-12);
        let loss = -(0.55_f64 * 0.4 * 0.7 * 0.8 * 0.1).ln() / 6.0;
        assert!((scores.loss - loss).abs() < 1e-12);
    }

    #[test]
    fn what_is_as_right_as_it_is_sure_has_no_error_and_a_wrong_certainty_has_all() {
        let rows = vec![vec![0.25, 0.75]; 4];
        assert!(expected_calibration_error(&rows, &[1, 1, 0, 1], BINS) < 1e-12);
        let sure = vec![vec![1.0, 0.0]; 3];
        let scores = Scores::of(&sure, &[1, 1, 1]);
        assert!((scores.ece - 1.0).abs() < 1e-12 && scores.loss.is_finite(), "{scores:?}");
    }

    #[test]
    fn large_logits_are_no_trouble() {
        let shares = softmax(&[vec![1000.0, 1000.0, -1000.0]]);
        assert!((shares[0][0] - 0.5).abs() < 1e-12 && shares[0][2] < 1e-300);
    }
}
