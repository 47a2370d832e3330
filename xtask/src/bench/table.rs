//! What the processes found, as Markdown and as JSON: medians and what they are of each other.

use super::case::Case;
use super::run::{Measure, Measured, Side};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// What holds for all rows.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) rounds: usize,
    pub(super) threads: usize,
    pub(super) warmup: usize,
    pub(super) processor: Option<String>,
    /// Of the other side's libraries.
    pub(super) versions: Option<Value>,
    /// The largest rate of matrix products of all sides, in operations a second.
    pub(super) rate: Option<f64>,
}

/// A measure of a case, with what is known of it so far.
#[derive(Debug)]
pub(super) struct Row<'c> {
    pub(super) case: &'c Case,
    pub(super) measure: Measure,
    /// Real tokens of a step.
    pub(super) tokens: usize,
    /// Operations of a step.
    pub(super) flops: f64,
    /// A process a round.
    pub(super) runs: Vec<(Side, Measured)>,
    pub(super) failures: Vec<String>,
}

/// The middle of numbers: with an even count, the mean of the two there.
pub(super) fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.len() % 2 {
        1 => Some(numbers[middle]),
        _ => Some((numbers.get(middle.checked_sub(1)?)? + numbers.get(middle)?) / 2.0),
    }
}

/// A number that is told.
struct Metric {
    name: &'static str,
    /// Its name in `bench.json`.
    key: &'static str,
    /// One a step, or one a process.
    of: fn(&Row<'_>, &Measured) -> Vec<f64>,
    shown: fn(f64) -> String,
}

const METRICS: &[Metric] = &[
    Metric { name: "step", key: "step_seconds", of: |_, m| m.step_seconds.clone(), shown: seconds },
    Metric {
        name: "one adapter for all",
        key: "one_seconds",
        of: |_, m| m.one_seconds.clone(),
        shown: seconds,
    },
    Metric {
        name: "tokens a second",
        key: "tokens_a_second",
        of: |row, m| m.step_seconds.iter().map(|s| row.tokens as f64 / s).collect(),
        shown: |x| format!("{x:.0}"),
    },
    Metric {
        name: "peak memory",
        key: "peak_memory_bytes",
        of: |_, m| m.peak_memory_bytes.iter().map(|b| *b as f64).collect(),
        shown: bytes,
    },
    Metric {
        name: "start to first step",
        key: "start_seconds",
        of: |_, m| vec![m.start_seconds],
        shown: seconds,
    },
    Metric {
        name: "adapter load",
        key: "load_seconds",
        of: |_, m| m.load_seconds.clone(),
        shown: seconds,
    },
    Metric {
        name: "adapter switch",
        key: "switch_seconds",
        of: |_, m| m.switch_seconds.clone(),
        shown: seconds,
    },
    Metric {
        name: "adapter file",
        key: "adapter_bytes",
        of: |_, m| m.adapter_bytes.iter().map(|b| *b as f64).collect(),
        shown: bytes,
    },
];

fn significant(x: f64) -> String {
    let decimals = if x >= 100.0 {
        0
    } else if x >= 10.0 {
        1
    } else {
        2
    };
    format!("{x:.decimals$}")
}

pub(super) fn seconds(s: f64) -> String {
    match s {
        s if s < 1e-3 => format!("{} µs", significant(1e6 * s)),
        s if s < 1.0 => format!("{} ms", significant(1e3 * s)),
        s => format!("{} s", significant(s)),
    }
}

pub(super) fn bytes(b: f64) -> String {
    match b {
        b if b < 1e6 => format!("{} kB", significant(b / 1e3)),
        b if b < 1e9 => format!("{} MB", significant(b / 1e6)),
        b => format!("{} GB", significant(b / 1e9)),
    }
}

/// A side's numbers: the median over all of all rounds, and that of each round.
pub(super) struct Middle {
    pub(super) all: f64,
    pub(super) rounds: Vec<f64>,
}

impl Middle {
    /// Of the numbers of each round; none where there are none.
    pub(super) fn of(rounds: Vec<Vec<f64>>) -> Option<Self> {
        let all = median(rounds.concat())?;
        Some(Self { all, rounds: rounds.into_iter().filter_map(median).collect() })
    }

    /// The median, and half of what lies between the rounds' as a share of it.
    pub(super) fn told(&self, shown: fn(f64) -> String) -> String {
        let ends = |pick: fn(f64, f64) -> f64| self.rounds.iter().copied().reduce(pick);
        let middle = shown(self.all);
        match (ends(f64::min), ends(f64::max)) {
            (Some(low), Some(high)) if self.rounds.len() > 1 => {
                format!("{middle} ± {:.0} %", 50.0 * (high - low) / self.all)
            }
            _ => middle,
        }
    }
}

impl Metric {
    fn middle(&self, row: &Row<'_>, side: Side) -> Option<Middle> {
        let own = row.runs.iter().filter(|(of, _)| *of == side);
        Middle::of(own.map(|(_, run)| (self.of)(row, run)).collect())
    }
}

impl Row<'_> {
    /// The median step of a side.
    pub(super) fn step(&self, side: Side) -> Option<f64> {
        METRICS[0].middle(self, side).map(|middle| middle.all)
    }

    /// The time of a step whose arithmetic is done at this rate.
    pub(super) fn floor(&self, rate: Option<f64>) -> Option<f64> {
        Some(self.flops / rate?)
    }
}

pub(super) fn ratio(one: Option<f64>, other: Option<f64>) -> String {
    one.zip(other).map_or_else(String::new, |(one, other)| format!("{:.2}", one / other))
}

/// The table with what must be known to read it.
pub(super) fn markdown(head: &Head, rows: &[Row<'_>]) -> String {
    let mut text = introduction(head);
    for block in rows.chunk_by(|one, other| one.case.name == other.case.name) {
        let Case { name, what, .. } = block[0].case;
        let _ = write!(
            text,
            "\n## {name}\n\n{what}; LoRA on {}.\n\n| measure | | ours | `peft` | ours ÷ `peft` | \
             `apply_lora` | ours ÷ `apply_lora` | floor | ours ÷ floor |\n|---|---|---|---|---|---|---|---|---|\n",
            block[0].case.target_modules.join(", ")
        );
        for row in block {
            text += &lines(head, row);
        }
    }
    let failed: Vec<String> = rows
        .iter()
        .flat_map(|row| row.failures.iter().map(move |why| (row, why)))
        .map(|(row, why)| format!("- {}, {}: {why}\n", row.case.name, row.measure.title()))
        .collect();
    if !failed.is_empty() {
        let _ = write!(text, "\n## Failed\n\n{}", failed.concat());
    }
    text
}

fn introduction(head: &Head) -> String {
    let versions = head.versions.as_ref().and_then(Value::as_object);
    let versions = versions.map(|all| {
        let one = |(name, version): (&String, &Value)| {
            format!("{name} {}", version.as_str().unwrap_or_default())
        };
        format!(" Against {}.", all.iter().map(one).collect::<Vec<_>>().join(", "))
    });
    let rate = head.rate.map(|rate| {
        format!(" Largest rate of matrix products, of all sides: {:.1} GFLOP/s.", rate / 1e9)
    });
    format!(
        "# Ours and `peft`, side by side\n\nThe same weights, batches and threads, f32 (bf16: our matrices held in it, arithmetic in f32); turn by turn in one run, a \
         process a round and side. Rounds: {}; steps of a process before those that count: {}; threads: {}{}.{}{}\n\n\
         Numbers are medians over steps and rounds, ± half of what lies between the rounds' medians; a ratio below \
         1 means that ours takes less (of tokens a second: that it makes fewer). A side's losses and gradients are compared with ours before its numbers \
         count. floor: the arithmetic of the step's matrix products alone, at the largest rate. start to first step: \
         from the start of the process. adapter switch: the call alone.\n",
        head.rounds,
        head.warmup,
        head.threads,
        head.processor.as_ref().map_or_else(String::new, |name| format!(" of {name}")),
        versions.unwrap_or_default(),
        rate.unwrap_or_default(),
    )
}

/// A row's lines, one a number that some side has.
fn lines(head: &Head, row: &Row<'_>) -> String {
    let mut text = String::new();
    if !row.failures.is_empty() {
        return format!("| {} | failed | | | | | | | |\n", row.measure.title());
    }
    let mut title = row.measure.title();
    for metric in METRICS {
        let [ours, peft, burn] =
            [Side::Ours, Side::Peft, Side::ApplyLora].map(|side| metric.middle(row, side));
        if ours.is_none() && peft.is_none() && burn.is_none() {
            continue;
        }
        let [a, b, c] = [&ours, &peft, &burn].map(|middle| middle.as_ref().map(|m| m.all));
        let floor = row.floor(head.rate).filter(|_| metric.key == "step_seconds");
        let cell = |middle: &Option<Middle>| {
            middle.as_ref().map_or_else(String::new, |m| m.told(metric.shown))
        };
        let _ = writeln!(
            text,
            "| {title} | {} | {} | {} | {} | {} | {} | {} | {} |",
            metric.name,
            cell(&ours),
            cell(&peft),
            ratio(a, b),
            cell(&burn),
            ratio(a, c),
            floor.map_or_else(String::new, seconds),
            ratio(a.filter(|_| floor.is_some()), floor),
        );
        title = "";
    }
    text
}

/// The same for programs, with every process.
pub(super) fn json(head: &Head, rows: &[Row<'_>]) -> Value {
    let side = |row: &Row<'_>, side: Side| -> Value {
        let medians: Map<String, Value> = METRICS
            .iter()
            .filter_map(|metric| {
                let middle = metric.middle(row, side)?;
                Some((metric.key.into(), json!({"median": middle.all, "rounds": middle.rounds})))
            })
            .collect();
        let own = row.runs.iter().filter(|(of, _)| *of == side);
        json!({"medians": medians, "runs": own.map(|(_, run)| json!(run)).collect::<Value>()})
    };
    let row = |row: &Row<'_>| {
        let sides: Map<String, Value> =
            row.measure.sides().iter().map(|of| (of.name().to_owned(), side(row, *of))).collect();
        json!({
            "case": row.case.name, "measure": row.measure, "tokens": row.tokens, "flops": row.flops,
            "floor_seconds": row.floor(head.rate), "sides": sides, "failures": row.failures,
        })
    };
    json!({
        "rounds": head.rounds, "threads": head.threads, "warmup": head.warmup,
        "processor": head.processor, "versions": head.versions, "rate": head.rate,
        "rows": rows.iter().map(row).collect::<Value>(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::case::Cases;

    pub(in crate::bench) fn head() -> Head {
        Head {
            rounds: 2,
            threads: 2,
            warmup: 2,
            processor: None,
            versions: Some(json!({"torch": "2.15.0"})),
            rate: Some(1e11),
        }
    }

    fn run(step_seconds: &[f64]) -> Measured {
        Measured {
            step_seconds: step_seconds.to_vec(),
            start_seconds: 2.0,
            peak_memory_bytes: Some(1_250_000_000),
            ..Measured::default()
        }
    }

    pub(in crate::bench) fn row(case: &Case) -> Row<'_> {
        let ours = [[0.1, 0.2, 0.3], [0.2, 0.2, 0.9]].map(|steps| (Side::Ours, run(&steps)));
        let peft = [[0.4, 0.4, 0.4], [0.6, 0.4, 0.4]].map(|steps| (Side::Peft, run(&steps)));
        Row {
            case,
            measure: Measure::Lora,
            tokens: 100,
            flops: 5e9,
            runs: ours.into_iter().chain(peft).collect(),
            failures: Vec::new(),
        }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!((median(vec![7.0]), median(vec![])), (Some(7.0), None));
    }

    #[test]
    fn numbers_have_units() {
        let told =
            [seconds(1.234_5e-5), seconds(0.012_34), seconds(12.34), bytes(299e3), bytes(1.25e9)];
        assert_eq!(told, ["12.3 µs", "12.3 ms", "12.3 s", "299 kB", "1.25 GB"]);
    }

    #[test]
    fn the_table_has_medians_ratios_and_the_floor() {
        let cases = Cases::read().expect("is well formed");
        let text = markdown(&head(), &[row(&cases.cases[0])]);
        for expected in [
            "## minilm\n",
            // Rounds of 0.2 and 0.2; the floor is 5 GFLOP at 100 GFLOP/s.
            "| LoRA step | step | 200 ms ± 0 % | 400 ms ± 0 % | 0.50 |  |  | 50.0 ms | 4.00 |\n",
            "|  | tokens a second | 500 ± 0 % | 250 ± 0 % | 2.00 |  |  |  |  |\n",
            "|  | peak memory | 1.25 GB ± 0 % | 1.25 GB ± 0 % | 1.00 |",
            "Against torch 2.15.0.",
            "100.0 GFLOP/s",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        let json = json(&head(), &[row(&cases.cases[0])]);
        let ours = &json["rows"][0]["sides"]["ours"];
        assert_eq!(ours["medians"]["step_seconds"], json!({"median": 0.2, "rounds": [0.2, 0.2]}));
        assert_eq!(json["rows"][0]["floor_seconds"], 0.05);
    }

    #[test]
    fn what_does_not_agree_has_no_numbers() {
        let cases = Cases::read().expect("is well formed");
        let mut row = row(&cases.cases[0]);
        row.failures.push("the first loss: 1 and 2".into());
        let text = markdown(&head(), &[row]);
        assert!(text.contains("| LoRA step | failed |") && !text.contains("200 ms"), "{text}");
        assert!(text.contains("- minilm, LoRA step: the first loss: 1 and 2\n"), "{text}");
    }
}
