//! Step times: a few steps of a row, LoRA's before them, so that both have the same machine.

use super::run::{Desk, Job, Side};
use crate::failure::Failure;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Optimizer steps of one timing, unless `--steps` or the row says otherwise.
const STEPS: usize = 12;

/// Step times of a row and of LoRA's row just before it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Times {
    pub(super) own: f64,
    pub(super) lora: f64,
}

/// Takes the times of `job`'s row, unless they were taken before.
pub(super) fn take(
    job: &Job<'_>,
    lora: &Job<'_>,
    steps: Option<usize>,
    desk: &Desk,
) -> Result<Times, Failure> {
    let steps = steps.or(job.row.timed_steps);
    let (job, lora) = (short(job, steps), short(lora, steps));
    if let Some(times) = finished(&job, desk)? {
        return Ok(times);
    }
    let lora = lora.step_seconds(desk)?;
    let times = Times { own: job.step_seconds(desk)?, lora };
    let file = job.file(desk, "times.json");
    crate::places::write(&file, format!("{:#}\n", json!(times)).as_bytes())?;
    Ok(times)
}

/// What an earlier call took of a job that is short already.
pub(super) fn finished(job: &Job<'_>, desk: &Desk) -> Result<Option<Times>, Failure> {
    let file = job.file(desk, "times.json");
    match std::fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| Failure::at(&file, format!("{e}; delete it to time anew"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::at(&file, e)),
    }
}

/// The job with so many steps, or as many as its row's timing takes.
pub(super) fn short<'r>(job: &Job<'r>, steps: Option<usize>) -> Job<'r> {
    let steps = steps.or(job.row.timed_steps).unwrap_or(STEPS);
    let mut training = job.training.clone();
    training.insert("max_steps".into(), steps.into());
    Job { row: job.row, training, seed: job.seed, side: Side::Ours }
}

/// What most of the rounds say: own time and the ratio to LoRA's, each the median.
pub(super) fn medians(times: &[Times]) -> Option<(f64, f64)> {
    let median = |of: fn(&Times) -> f64| {
        let mut all: Vec<f64> = times.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        let middle = all.get(all.len() / 2)?;
        Some((middle + all[(all.len() - 1) / 2]) / 2.0)
    };
    Some((median(|t| t.own)?, median(|t| t.own / t.lora)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_times_and_of_ratios() {
        let times = |own, lora| Times { own, lora };
        assert_eq!(medians(&[]), None);
        assert_eq!(medians(&[times(3.0, 2.0)]), Some((3.0, 1.5)));
        // The slow round was slow for both.
        let three = [times(9.0, 6.0), times(3.0, 2.0), times(4.0, 2.0)];
        assert_eq!(medians(&three), Some((4.0, 1.5)));
        assert_eq!(medians(&[times(2.0, 2.0), times(4.0, 2.0)]), Some((3.0, 1.5)));
    }
}
