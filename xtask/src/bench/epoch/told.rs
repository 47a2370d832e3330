//! What the processes of an epoch came to, as Markdown and as JSON.

use super::super::table::{Middle, bytes, ratio, seconds};
use super::{Trained, Way};
use crate::summary::grouped;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// What is told.
pub(super) struct Told {
    pub(super) rounds: usize,
    pub(super) threads: usize,
    pub(super) processor: Option<String>,
    pub(super) training: Value,
    pub(super) rows: usize,
    pub(super) held_out: usize,
    pub(super) steps: usize,
    pub(super) runs: Vec<(Way, Trained)>,
}

/// A number that is told.
struct Figure {
    name: &'static str,
    key: &'static str,
    of: fn(&Trained, tokens: f64) -> Option<f64>,
    shown: fn(f64) -> String,
    /// Whether one side's as a share of the other's says something.
    share: bool,
}

const FIGURES: &[Figure] = &[
    Figure {
        name: "the epoch's steps",
        key: "train_seconds",
        of: |run, _| Some(run.train_seconds),
        shown: seconds,
        share: true,
    },
    Figure {
        name: "process, to the saved adapter",
        key: "total_seconds",
        of: |run, _| Some(run.total_seconds),
        shown: seconds,
        share: true,
    },
    Figure {
        name: "tokens a second",
        key: "tokens_a_second",
        of: |run, tokens| Some(tokens / run.train_seconds),
        shown: grouped,
        share: true,
    },
    Figure {
        name: "peak memory",
        key: "peak_memory_bytes",
        of: |run, _| run.peak_memory_bytes.map(|bytes| bytes as f64),
        shown: bytes,
        share: true,
    },
    Figure {
        name: "padding in the batches, tokens",
        key: "padding_tokens",
        of: |run, tokens| Some(tokens * run.padding / (1.0 - run.padding)),
        shown: grouped,
        share: false,
    },
    Figure {
        name: "the same, of all tokens",
        key: "padding",
        of: |run, _| Some(run.padding),
        shown: |share| format!("{:.1} %", 100.0 * share),
        share: false,
    },
    Figure {
        name: "mean loss of the epoch",
        key: "loss",
        of: |run, _| Some(run.loss),
        shown: |loss| format!("{loss:.4}"),
        share: false,
    },
    Figure {
        name: "held-out accuracy",
        key: "accuracy",
        of: |run, _| Some(run.accuracy),
        shown: |accuracy| format!("{:.2} %", 100.0 * accuracy),
        share: false,
    },
];

impl Told {
    /// Tokens of the data: whoever counts them, they are the same.
    fn tokens(&self) -> f64 {
        self.runs.iter().find_map(|(_, run)| run.tokens).map_or(f64::NAN, |tokens| tokens as f64)
    }

    fn middle(&self, figure: &Figure, way: Way) -> Option<Middle> {
        let own = self.runs.iter().filter(|(of, _)| *of == way);
        let tokens = self.tokens();
        Middle::of(own.map(|(_, run)| (figure.of)(run, tokens).into_iter().collect()).collect())
    }

    /// Ours as a share of another's.
    fn share(&self, figure: &Figure, way: Way) -> Option<f64> {
        let [ours, other] = [Way::Ours, way].map(|way| self.middle(figure, way));
        Some(ours?.all / other?.all)
    }

    /// The table with what must be known to read it.
    pub(super) fn markdown(&self) -> String {
        let Told { rounds, threads, rows, held_out, steps, .. } = self;
        let versions = self.runs.iter().find_map(|(_, run)| run.versions.as_ref()?.as_object());
        let versions: Vec<String> = versions
            .into_iter()
            .flatten()
            .map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or_default()))
            .collect();
        let mut text = format!(
            "# An epoch of real data\n\nMiniLM learns which of {} movie review snippets are positive, by LoRA: {steps} steps, {} tokens. \
         `burn-peft train` against a loop in Python ({}), f32, turn by turn in one run, a process a round and side. Rounds: \
         {rounds}; threads: {threads}{}.\n\n\
         same batches: burn-peft's, of rows of similar length, in the same order. shuffled: rows in a random order, each batch padded \
         to its longest. Weights, first adapter, rates and threads are the same, the first loss and gradients are compared. Ours \
         computes padding in attention alone, Python everywhere. Numbers are medians over rounds, ± half of what lies between them.\n\n\
         | | {} | {} | ours ÷ that | {} | ours ÷ that |\n|---|---|---|---|---|---|\n",
            grouped(*rows as f64),
            grouped(self.tokens()),
            versions.join(", "),
            self.processor.as_ref().map_or_else(String::new, |name| format!(" of {name}")),
            Way::Ours.title(),
            Way::Same.title(),
            Way::Shuffled.title(),
        );
        for figure in FIGURES {
            let cells = Way::ALL.map(|way| {
                let middle = self.middle(figure, way);
                middle.map_or_else(String::new, |middle| middle.told(figure.shown))
            });
            let [same, shuffled] = [Way::Same, Way::Shuffled].map(|way| {
                let share = self.share(figure, way).filter(|_| figure.share);
                ratio(share, Some(1.0))
            });
            let [ours, python, plain] = cells;
            let _ = writeln!(
                text,
                "| {} | {ours} | {python} | {same} | {plain} | {shuffled} |",
                figure.name
            );
        }
        text.push('\n');
        for way in Way::ALL {
            let share = self.share(&FIGURES[0], way);
            let (Some(target), Some(share)) = (way.target(), share) else { continue };
            let met = if share <= target { "met" } else { "not met" };
            let _ = writeln!(
                text,
                "- The epoch's steps take {share:.2} of the time of {}; the target of at most {target} is {met}.",
                way.title()
            );
        }
        if let Some(accuracy) = self.runs.iter().map(|(_, run)| run.accuracy).reduce(f64::max) {
            // Of a difference of two independent shares; over the same examples it is smaller.
            let error = (2.0 * accuracy * (1.0 - accuracy) / *held_out as f64).sqrt();
            let _ = writeln!(
                text,
                "- Accuracies are of {} examples: differences up to {:.1} % are within twice their standard error.",
                grouped(*held_out as f64),
                200.0 * error
            );
        }
        text
    }

    /// The same for programs, with every process.
    pub(super) fn json(&self) -> Value {
        let way = |way: Way| -> (String, Value) {
            let medians: Map<String, Value> = FIGURES
                .iter()
                .filter_map(|figure| {
                    let middle = self.middle(figure, way)?;
                    Some((
                        figure.key.into(),
                        json!({"median": middle.all, "rounds": middle.rounds}),
                    ))
                })
                .collect();
            let own = self.runs.iter().filter(|(of, _)| *of == way);
            let runs: Value = own.map(|(_, run)| json!(run)).collect();
            let share = self.share(&FIGURES[0], way);
            let told = json!({
                "medians": medians, "runs": runs, "target": way.target(), "ours_of_it": share,
            });
            (way.name().to_owned(), told)
        };
        json!({
            "rounds": self.rounds, "threads": self.threads, "processor": self.processor,
            "training": self.training, "rows": self.rows, "held_out": self.held_out,
            "steps": self.steps, "ways": Way::ALL.map(way).into_iter().collect::<Map<_, _>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        let run = |train_seconds, padding, tokens| Trained {
            train_seconds,
            total_seconds: train_seconds + 2.0,
            padding,
            tokens,
            accuracy: 0.8,
            ..Trained::default()
        };
        Told {
            rounds: 1,
            threads: 2,
            processor: None,
            training: json!({}),
            rows: 960,
            held_out: 2000,
            steps: 30,
            runs: vec![
                (Way::Ours, run(60.0, 0.2, None)),
                (Way::Same, run(100.0, 0.2, Some(20_000))),
                (Way::Shuffled, run(110.0, 0.5, Some(20_000))),
            ],
        }
    }

    #[test]
    fn the_table_has_ratios_padding_and_targets() {
        let text = told().markdown();
        for expected in [
            "| the epoch's steps | 60.0 s | 100 s | 0.60 | 110 s | 0.55 |\n",
            "| tokens a second | 333 | 200 | 1.67 | 182 | 1.83 |\n",
            "| padding in the batches, tokens | 5,000 | 5,000 |  | 20,000 |  |\n",
            "0.60 of the time of Python, same batches; the target of at most 0.7 is met.",
            "0.55 of the time of Python, shuffled; the target of at most 0.5 is not met.",
            // 2 · √(2 · 0.8 · 0.2 / 2000)
            "2,000 examples: differences up to 2.5 % are",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        let json = told().json();
        assert_eq!(json["ways"]["same"]["ours_of_it"], 0.6);
        assert_eq!(json["ways"]["ours"]["medians"]["total_seconds"]["median"], 62.0);
    }
}
