//! The table of a comparison, as Markdown and as JSON.

use super::Task;
use super::recipe::Row;
use super::run::{Measured, Side};
use super::times::{Times, medians};
use crate::summary::{duration, grouped};
use serde_json::{Value, json};
use std::fmt::Write;

/// A factored method may take this many times LoRA's step.
const SLOW: f64 = 1.5;

/// What is known of one row so far.
#[derive(Debug)]
pub(super) struct Line<'r> {
    pub(super) row: &'r Row,
    /// Seeds and what they came to.
    pub(super) ours: Vec<(u64, Measured)>,
    pub(super) python: Vec<(u64, Measured)>,
    /// Of `--times`.
    pub(super) times: Vec<Times>,
    pub(super) failures: Vec<(u64, Side, String)>,
}

/// What holds for all rows.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) task: Task,
    pub(super) model: String,
    pub(super) training: Value,
    pub(super) seeds: Vec<u64>,
    pub(super) held_out: usize,
    pub(super) threads: usize,
    pub(super) against: bool,
    pub(super) timed: bool,
    /// Of a table made of the record: how its runs were made, and the name of its picture.
    pub(super) published: Option<[String; 2]>,
}

/// Mean and, of two numbers or more, the standard deviation of a sample.
fn spread(of: impl Fn(&Measured) -> f64, runs: &[(u64, Measured)]) -> Option<(f64, Option<f64>)> {
    let numbers: Vec<f64> = runs.iter().map(|(_, run)| of(run)).collect();
    let count = numbers.len() as f64;
    let mean = (!numbers.is_empty()).then(|| numbers.iter().sum::<f64>() / count)?;
    let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
    Some((mean, (numbers.len() > 1).then(|| (squares / (count - 1.0)).sqrt())))
}

/// The mean over all seeds.
pub(super) fn mean(of: impl Fn(&Measured) -> f64, runs: &[(u64, Measured)]) -> Option<f64> {
    spread(of, runs).map(|(mean, _)| mean)
}

pub(super) fn accuracy(run: &Measured) -> f64 {
    100.0 * run.accuracy
}

fn step(run: &Measured) -> f64 {
    run.step_seconds
}

/// Of seeds that both sides have, ours less the reference's, in points.
fn difference(line: &Line<'_>) -> Option<f64> {
    let both = |one: &[(u64, Measured)], other: &[(u64, Measured)]| -> Vec<_> {
        let there = |seed: &u64| other.iter().any(|(found, _)| found == seed);
        one.iter().filter(|(seed, _)| there(seed)).cloned().collect()
    };
    let ours = mean(accuracy, &both(&line.ours, &line.python))?;
    Some(ours - mean(accuracy, &both(&line.python, &line.ours))?)
}

fn cell(value: Option<String>) -> String {
    value.unwrap_or_default()
}

fn percent(runs: &[(u64, Measured)]) -> Option<String> {
    let (mean, deviation) = spread(accuracy, runs)?;
    Some(match deviation {
        Some(deviation) => format!("{mean:.1} ± {deviation:.1}"),
        None => format!("{mean:.1}"),
    })
}

fn memory(runs: &[(u64, Measured)]) -> Option<String> {
    let known = runs.iter().all(|(_, run)| run.peak_memory_bytes.is_some());
    let bytes = mean(|run| run.peak_memory_bytes.unwrap_or(0) as f64, runs).filter(|_| known)?;
    Some(format!("{:.2} GB", bytes / 1e9))
}

fn milliseconds(runs: &[(u64, Measured)]) -> Option<String> {
    mean(step, runs).map(|seconds| format!("{:.0} ms", 1e3 * seconds))
}

fn forgetting(runs: &[(u64, Measured)]) -> Option<String> {
    let told: Vec<f64> = runs.iter().filter_map(|(_, run)| run.forgetting).collect();
    (!told.is_empty()).then(|| format!("{:.3}", told.iter().sum::<f64>() / told.len() as f64))
}

/// The columns: what they are called and what stands there.
type Column = (&'static str, fn(&Line<'_>, &Steps) -> String);

/// Where step times come from: all from one of these, so that none stands beside another's.
enum Steps {
    /// From the turns of `--times`.
    Turns,
    /// From the whole runs, LoRA's mean among them, in seconds.
    Runs(Option<f64>),
}

impl Steps {
    fn of(head: &Head, lines: &[Line<'_>]) -> Self {
        if head.timed {
            return Self::Turns;
        }
        let lora = lines.iter().find(|line| line.row.name == "lora");
        Self::Runs(lora.and_then(|line| mean(step, &line.ours)))
    }

    /// A line's, in seconds.
    fn time(&self, line: &Line<'_>) -> Option<f64> {
        match self {
            Self::Turns => medians(&line.times).map(|(own, _)| own),
            Self::Runs(_) => mean(step, &line.ours),
        }
    }

    /// A line's over LoRA's.
    fn ratio(&self, line: &Line<'_>) -> Option<f64> {
        match self {
            Self::Turns => medians(&line.times).map(|(_, ratio)| ratio),
            Self::Runs(lora) => Some(mean(step, &line.ours)? / (*lora)?),
        }
    }
}

const OWN: &[Column] = &[
    ("method", |line, _| line.row.name.clone()),
    ("trained", |line, _| {
        cell(mean(|run| run.trainable_parameters as f64, &line.ours).map(grouped))
    }),
    ("adapter", |line, _| {
        cell(mean(|run| run.adapter_bytes as f64, &line.ours).map(|b| format!("{:.0} kB", b / 1e3)))
    }),
    ("accuracy", |line, _| match percent(&line.ours) {
        None if line.failures.iter().any(|(_, side, _)| *side == Side::Ours) => "failed".into(),
        told => cell(told),
    }),
    ("step", |line, steps| cell(steps.time(line).map(|s| format!("{:.0} ms", 1e3 * s)))),
    ("× LoRA", |line, steps| cell(steps.ratio(line).map(|ratio| format!("{ratio:.2}")))),
    ("memory", |line, _| cell(memory(&line.ours))),
    ("forgetting", |line, _| cell(forgetting(&line.ours))),
];

const THEIRS: &[Column] = &[
    ("reference: accuracy", |line, _| match percent(&line.python) {
        None if line.failures.iter().any(|(_, side, _)| *side == Side::Python) => "failed".into(),
        told => cell(told),
    }),
    ("difference", |line, _| cell(difference(line).map(|points| format!("{points:+.1}")))),
    ("step", |line, _| cell(milliseconds(&line.python))),
    ("memory", |line, _| cell(memory(&line.python))),
    ("forgetting", |line, _| cell(forgetting(&line.python))),
];

/// The table with what must be known to read it. Families follow each other as in the recipe.
pub(super) fn markdown(head: &Head, lines: &[Line<'_>]) -> String {
    let steps = Steps::of(head, lines);
    let columns = OWN.iter().chain(if head.against { THEIRS } else { &[] });
    // Times of several machines do not stand beside each other; their ratios do.
    let told = |name: &str| match name {
        "forgetting" => head.task.has_sentences(),
        "step" => head.published.is_none(),
        _ => true,
    };
    let columns: Vec<&Column> = columns.filter(|(name, _)| told(name)).collect();
    let mut text = introduction(head);
    for block in lines.chunk_by(|one, other| one.row.family == other.row.family) {
        let block: Vec<_> = block.iter().filter(|line| line.begun()).collect();
        let Some(first) = block.first() else { continue };
        let names: Vec<_> = columns.iter().map(|(name, _)| *name).collect();
        let rule = names.iter().map(|_| "---").collect::<Vec<_>>().join("|");
        let _ = write!(text, "\n## {}\n\n| {} |\n|{rule}|\n", first.row.family, names.join(" | "));
        for line in block {
            let cells: Vec<_> = columns.iter().map(|(_, value)| value(line, &steps)).collect();
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
    }
    text + &verdicts(head, lines, &steps)
}

fn introduction(head: &Head) -> String {
    let of = |name: &str| head.training[name].to_string();
    let seeds = head.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let (taught, things) = head.task.told();
    let mut text = format!(
        "# Methods, compared\n\n{taught}: {} is trained for {} steps of {} {things} and asked about {} others. \
         Seeds: {seeds}; numbers are their means, with the standard deviation. Threads: {}.\n\n\
         accuracy: % of the held-out {things}. trained: parameters, those of the head among \
         them. adapter: `adapter_model.safetensors`.{} memory: the training process's largest.",
        head.model,
        of("max_steps"),
        of("per_device_train_batch_size"),
        grouped(head.held_out as f64),
        head.threads,
        match head.published {
            Some(_) => " × LoRA: mean time of an optimizer step over LoRA's.",
            None => " step: mean time of an optimizer step.",
        },
    );
    if head.task.has_sentences() {
        text += " forgetting: 1 less the cosine of neutral sentences' embeddings before and after.";
    }
    if head.timed {
        text += " Steps were timed in short runs of their own, LoRA's before each.";
    }
    if head.against {
        text += " The reference (HF PEFT where it has the method, or else plain torch) begins at the same numbers and is \
                 trained with the same settings on the same batches, turn by turn.";
    }
    text.push('\n');
    if let Some([note, picture]) = &head.published {
        let _ = write!(text, "\n{note}\n\n![accuracy over trained parameters]({picture})\n");
    }
    text
}

/// What the columns say all in all, and what went wrong.
fn verdicts(head: &Head, lines: &[Line<'_>], steps: &Steps) -> String {
    let mut text = String::new();
    let apart = lines.iter().filter_map(|line| Some((line, difference(line)?)));
    let far = apart.max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    if let Some((line, points)) = far.filter(|_| head.against) {
        let name = &line.row.name;
        let _ = write!(
            text,
            "\nThe accuracy furthest from the reference's: {name}, {points:+.1} points.\n"
        );
    }
    let told = lines.iter().filter_map(|line| Some((&line.row.name, steps.ratio(line)?)));
    let told: Vec<_> = told.collect();
    let slow = told.iter().filter(|(_, ratio)| *ratio > SLOW);
    let slow: Vec<_> = slow.map(|(name, ratio)| format!("{name} {ratio:.2}")).collect();
    if !told.is_empty() {
        let slow = if slow.is_empty() { "none".into() } else { slow.join(", ") };
        let _ = write!(text, "\nSteps of more than {SLOW} times LoRA's: {slow}.\n");
    }
    let spent: f64 = lines
        .iter()
        .flat_map(|line| line.ours.iter().chain(&line.python))
        .map(|(_, run)| run.seconds)
        .sum();
    if head.published.is_none() {
        let _ = write!(text, "\nAll runs together took {}.\n", duration(spent));
    }
    let failed = lines.iter().flat_map(|line| line.failures.iter().map(move |f| (line, f)));
    let failed: Vec<_> = failed
        .map(|(line, (seed, side, why))| {
            format!("- {}, {}, seed {seed}: {why}\n", line.row.name, side.name())
        })
        .collect();
    if !failed.is_empty() {
        let _ = write!(text, "\n## Failed\n\n{}", failed.concat());
    }
    text
}

impl Line<'_> {
    /// Whether there is anything to say of it.
    fn begun(&self) -> bool {
        !(self.ours.is_empty()
            && self.python.is_empty()
            && self.times.is_empty()
            && self.failures.is_empty())
    }
}

/// The same for programs, with every run.
pub(super) fn json(head: &Head, lines: &[Line<'_>]) -> Value {
    let runs = |runs: &[(u64, Measured)]| -> Value {
        runs.iter().map(|(seed, measured)| json!({"seed": seed, "measured": measured})).collect()
    };
    let failure = |(seed, side, why): &(u64, Side, String)| json!({"seed": seed, "side": side.name(), "reason": why});
    let line = |line: &Line<'_>| {
        json!({
            "row": line.row, "ours": runs(&line.ours), "python": runs(&line.python),
            "times": line.times, "failures": line.failures.iter().map(failure).collect::<Value>(),
        })
    };
    json!({
        "model": head.model, "training": head.training, "seeds": head.seeds,
        "held_out": head.held_out, "threads": head.threads,
        "rows": lines.iter().map(line).collect::<Value>(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::compare::recipe::Recipe;

    pub(in crate::compare) fn measured(accuracy: f64, step_seconds: f64) -> Measured {
        Measured {
            accuracy,
            trainable_parameters: 74_498,
            adapter_bytes: 299_000,
            step_seconds,
            peak_memory_bytes: Some(1_250_000_000),
            forgetting: Some(0.0124),
            seconds: 61.0,
        }
    }

    fn head(against: bool) -> Head {
        let training = json!({"max_steps": 120, "per_device_train_batch_size": 32});
        Head {
            task: Task::Sentiment,
            model: "all-MiniLM-L6-v2".into(),
            training,
            seeds: vec![1, 2],
            held_out: 2114,
            threads: 2,
            against,
            timed: false,
            published: None,
        }
    }

    fn told(against: bool) -> String {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let of = |name: &str| recipe.rows.iter().find(|row| row.name == name).expect("is a row");
        let line = |name| Line {
            row: of(name),
            ours: vec![],
            python: vec![],
            times: vec![],
            failures: vec![],
        };
        let lora = Line {
            ours: vec![(1, measured(0.76, 0.4)), (2, measured(0.78, 0.6))],
            python: vec![(2, measured(0.77, 0.8))],
            ..line("lora")
        };
        let oft = Line { ours: vec![(1, measured(0.75, 0.8))], ..line("oft") };
        let why = (2, Side::Ours, "burn-peft train: no".to_owned());
        let boft = Line { failures: vec![why], ..line("boft") };
        markdown(&head(against), &[lora, line("dora"), oft, boft])
    }

    #[test]
    fn the_table_has_means_ratios_and_what_failed() {
        let text = told(false);
        for expected in [
            "## low rank\n\n| method | trained | adapter | accuracy | step | × LoRA | memory | forgetting |\n",
            "| lora | 74,498 | 299 kB | 77.0 ± 1.4 | 500 ms | 1.00 | 1.25 GB | 0.012 |\n",
            "| oft | 74,498 | 299 kB | 75.0 | 800 ms | 1.60 | 1.25 GB | 0.012 |\n",
            "| boft |  |  | failed |  |  |  |  |\n",
            "Steps of more than 1.5 times LoRA's: oft 1.60.",
            "- boft, ours, seed 2: burn-peft train: no\n",
            "asked about 2,114 others. Seeds",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(!text.contains("| dora |") && !text.contains("reference"), "{text}");
    }

    #[test]
    fn where_steps_were_timed_no_others_are_told() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let line = |row, seconds, times| Line {
            row: &recipe.rows[row],
            ours: vec![(1, measured(0.75, seconds))],
            python: vec![],
            times,
            failures: vec![],
        };
        let times = vec![Times { own: 0.6, lora: 0.5 }];
        let lines = [line(0, 0.4, vec![]), line(1, 0.8, times), line(2, 0.8, vec![])];
        let text = markdown(&Head { timed: true, ..head(false) }, &lines);
        for expected in ["| 600 ms | 1.20 |", "| 75.0 |  |  | 1.25 GB |", "LoRA's before each"] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn a_published_table_says_how_it_was_run_and_no_times_but_ratios() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let line = Line {
            row: &recipe.rows[1],
            ours: vec![(1, measured(0.75, 0.4))],
            python: vec![(1, measured(0.76, 0.4))],
            times: vec![Times { own: 0.6, lora: 0.5 }],
            failures: vec![],
        };
        let published = Some(["Run by hand.".into(), "compare.svg".into()]);
        let text = markdown(&Head { timed: true, published, ..head(true) }, &[line]);
        for expected in [
            "\nRun by hand.\n\n![accuracy over trained parameters](compare.svg)\n",
            "| method | trained | adapter | accuracy | × LoRA | memory |",
            "| 75.0 | 1.20 | 1.25 GB | 0.012 | 76.0 | -1.0 | 1.25 GB | 0.012 |\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(!text.contains("ms |") && !text.contains("together took"), "{text}");
    }

    #[test]
    fn differences_are_over_the_seeds_that_both_have() {
        let text = told(true);
        let expected = "| 0.012 | 77.0 | +1.0 | 800 ms | 1.25 GB | 0.012 |\n";
        assert!(text.contains(expected), "{text}");
        assert!(
            text.contains("The accuracy furthest from the reference's: lora, +1.0 points."),
            "{text}"
        );
        assert!(
            text.contains(
                "| oft | 74,498 | 299 kB | 75.0 | 800 ms | 1.60 | 1.25 GB | 0.012 |  |  |"
            )
        );
    }
}
