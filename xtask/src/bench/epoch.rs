//! `cargo xtask bench --epoch`: an epoch of real data as one trains it, with our program and with HF PEFT.
//!
//! Three processes a round: ours, whose batches are of similar length, Python over the same batches in the same order, and
//! Python over rows in a random order, each batch padded to its longest. All begin at the same adapter.

mod told;

use super::BenchArgs;
use super::flops::Shape;
use super::run::{Measured, agree, tolerance};
use super::table::seconds;
use crate::assets::MINILM;
use crate::compare::recipe::Recipe;
use crate::compare::run::{Desk, Job, Side, number, summary};
use crate::compare::{SPLIT, together};
use crate::failure::Failure;
use crate::{demo, exec, fetch, places, python};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use told::Told;

/// What to do instead of downloading.
const REMEDY: &str = "set BURN_PEFT_CACHE to a cache that holds it";

/// The row of the recipe that is trained, and the seed of its adapter and its batches.
const ROW: &str = "lora";
const SEED: u64 = 1;

/// Who trains, and on which batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ours,
    Same,
    Shuffled,
}

impl Way {
    const ALL: [Self; 3] = [Self::Ours, Self::Same, Self::Shuffled];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Same => "same",
            Self::Shuffled => "shuffled",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Same => "Python, same batches",
            Self::Shuffled => "Python, shuffled",
        }
    }

    /// The largest share of this one's time in which ours shall train.
    fn target(self) -> Option<f64> {
        match self {
            Self::Ours => None,
            Self::Same => Some(0.7),
            Self::Shuffled => Some(0.5),
        }
    }
}

/// What a process came to: the words of `interop/epoch.py`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Trained {
    /// All training steps.
    train_seconds: f64,
    /// From the start of the process to the saved adapter: libraries, model, token ids, steps.
    total_seconds: f64,
    /// Share of padding in the tokens of all batches.
    padding: f64,
    /// Tokens of the data, which ours does not tell.
    tokens: Option<u64>,
    /// Mean over the epoch.
    loss: f64,
    first_loss: f64,
    first_norm: f64,
    /// Share of the held-out examples that are labelled right.
    accuracy: f64,
    trainable_parameters: u64,
    peak_memory_bytes: Option<u64>,
    versions: Option<Value>,
}

/// Everything that a process needs.
struct Epoch<'r> {
    desk: Desk,
    job: Job<'r>,
    /// Our adapter after a step at a rate of 0.
    start: PathBuf,
    steps: usize,
    output: PathBuf,
}

/// Trains turn by turn, and tells after each round.
pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let recipe = Recipe::sentiment()?;
    let row = recipe.select(&[ROW.into()])?.remove(0);
    let mut training = recipe.training(row);
    training.remove("max_steps");
    training.insert("num_train_epochs".into(), 1.into());
    let output = args.output_dir.clone().unwrap_or_else(|| places::root().join("bench-output"));
    places::make(&output.join("logs"))?;
    let (desk, rows, held_out) = prepare(args, &output)?;
    let batch = training.get("per_device_train_batch_size").and_then(Value::as_u64);
    let batch =
        batch.ok_or_else(|| Failure::new("the recipe has no per_device_train_batch_size"))?;
    let steps = rows.div_ceil(batch as usize);
    let job = Job { row, training, seed: SEED, side: Side::Ours };
    let fresh = tempfile::tempdir_in(&output).map_err(|e| Failure::at(&output, e))?;
    let start = job.start(&desk, fresh.path(), &log(&output, "start")?)?;
    let mut told = Told {
        rounds: 0,
        threads: desk.threads,
        processor: super::processor(),
        training: json!(job.training),
        rows,
        held_out,
        steps,
        runs: Vec::new(),
    };
    let epoch = Epoch { desk, job, start, steps, output };
    for round in 0..usize::from(args.rounds) {
        let mut ways = Way::ALL;
        ways.rotate_left(round % Way::ALL.len());
        for way in ways {
            print!("{:<22}", way.title());
            let _ = std::io::stdout().flush();
            let run = epoch.process(way, round)?;
            println!(
                "{} of steps, {} in all, {:.1} % right",
                seconds(run.train_seconds),
                seconds(run.total_seconds),
                100.0 * run.accuracy
            );
            told.runs.push((way, run));
        }
        epoch.compare(&told)?;
        told.rounds = round + 1;
        let output = &epoch.output;
        places::write(&output.join("epoch.md"), told.markdown().as_bytes())?;
        let text = format!("{:#}\n", told.json());
        places::write(&output.join("epoch.json"), text.as_bytes())?;
    }
    println!("\n{}\nTable and logs in {}", told.markdown(), epoch.output.display());
    Ok(())
}

/// Programs, model and data; the number of rows to train on, and of those held out.
fn prepare(args: &BenchArgs, output: &Path) -> Result<(Desk, usize, usize), Failure> {
    let python = (python::with_peft()?, places::root().join("interop/epoch.py"));
    let split = demo::data(None, SPLIT, REMEDY)?;
    let (held_out, held) = together(&split.folder, &output.join("held-out.tsv"))?;
    let (train, rows) =
        first_rows(&split.folder.join("train.tsv"), output, args.rows.map(|rows| rows as usize))?;
    let program = match &args.program {
        Some(program) => program.clone(),
        None => {
            println!("Building burn-peft for release, which takes many minutes the first time");
            exec::build_release()?
        }
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let desk = Desk {
        program,
        python: Some(python),
        model: fetch::fetch(&MINILM, REMEDY)?,
        train,
        held_out,
        neutral: None,
        sums: Vec::new(),
        output: output.to_owned(),
        threads: args.threads.map_or_else(cores, usize::from),
    };
    Ok((desk, rows, held))
}

/// The training data, or a file of so many of its first rows.
fn first_rows(
    file: &Path,
    output: &Path,
    asked: Option<usize>,
) -> Result<(PathBuf, usize), Failure> {
    let text = fs::read_to_string(file).map_err(|e| Failure::at(file, e))?;
    let all = text.lines().count().saturating_sub(1);
    match asked {
        None => Ok((file.to_owned(), all)),
        Some(rows) if rows > all => {
            Err(Failure::new(format!("--rows: expected at most {all}, found {rows}")))
        }
        Some(rows) => {
            let part: String = text.split_inclusive('\n').take(rows + 1).collect();
            let path = output.join("train.tsv");
            places::write(&path, part.as_bytes())?;
            Ok((path, rows))
        }
    }
}

/// An empty file for what a process says.
fn log(output: &Path, name: &str) -> Result<PathBuf, Failure> {
    let path = output.join("logs").join(format!("epoch-{name}.log"));
    fs::write(&path, b"").map_err(|e| Failure::at(&path, e))?;
    Ok(path)
}

/// The training lines of our metrics.
fn metrics(adapter: &Path) -> Result<Vec<Value>, Failure> {
    let path = adapter.join("metrics.jsonl");
    let text = fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
    let lines = lines.map_err(|e| Failure::at(&path, e))?;
    Ok(lines.into_iter().filter(|line| line["event"] == "train").collect())
}

/// The mean over all steps of means over windows that end at these steps.
fn mean(windows: &[(f64, f64)]) -> f64 {
    let before = std::iter::once(0.0).chain(windows.iter().map(|(step, _)| *step));
    let sum: f64 =
        windows.iter().zip(before).map(|((step, loss), from)| (step - from) * loss).sum();
    sum / windows.last().map_or(f64::NAN, |(step, _)| *step)
}

impl Epoch<'_> {
    fn process(&self, way: Way, round: usize) -> Result<Trained, Failure> {
        let log = log(&self.output, &format!("{}-{}", way.name(), round + 1))?;
        let folder =
            tempfile::tempdir_in(&self.output).map_err(|e| Failure::at(&self.output, e))?;
        match way {
            Way::Ours => self.ours(folder.path(), &log),
            Way::Same | Way::Shuffled => self.theirs(way, folder.path(), &log),
        }
    }

    /// `burn-peft train`, and what it left.
    fn ours(&self, folder: &Path, log: &Path) -> Result<Trained, Failure> {
        let Self { desk, job, .. } = self;
        let adapter = folder.join("adapter");
        let mut train = job.train(desk, &adapter);
        let began = Instant::now();
        exec::logged(exec::threads(&mut train, desk.threads), log)?;
        let total_seconds = began.elapsed().as_secs_f64();
        let summary = summary(&adapter)?;
        let found = number(&summary, "steps", &adapter)? as usize;
        if found != self.steps {
            return Err(Failure::new(format!(
                "steps of ours: expected {}, found {found}",
                self.steps
            )));
        }
        let start = metrics(&self.start)?;
        let first = start.first().ok_or_else(|| Failure::at(&self.start, "tells no step"))?;
        let window =
            |line: &Value| Ok((number(line, "step", &adapter)?, number(line, "loss", &adapter)?));
        let windows = metrics(&adapter)?.iter().map(window).collect::<Result<Vec<_>, Failure>>()?;
        Ok(Trained {
            train_seconds: number(&summary, "train_seconds", &adapter)?,
            total_seconds,
            padding: number(&summary, "padding", &adapter)?,
            tokens: None,
            loss: mean(&windows),
            first_loss: number(first, "loss", &self.start)?,
            first_norm: number(first, "grad_norm", &self.start)?,
            accuracy: job.accuracy(desk, &adapter, log)?,
            trainable_parameters: number(&summary, "trainable_parameters", &adapter)? as u64,
            peak_memory_bytes: summary["peak_memory_bytes"].as_u64(),
            versions: None,
        })
    }

    /// `interop/epoch.py`.
    fn theirs(&self, way: Way, folder: &Path, log: &Path) -> Result<Trained, Failure> {
        let Self { desk, job, .. } = self;
        let none = || Failure::new("there is no Python to train with");
        let (python, script) = desk.python.as_ref().ok_or_else(none)?;
        let [asked, told, adapter] =
            ["job.json", "measured.json", "adapter"].map(|name| folder.join(name));
        let mut training = job.training.clone();
        training.insert("max_steps".into(), self.steps.into());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let began = now.map_err(|e| Failure::new(format!("the clock is wrong: {e}")))?;
        let text = json!({
            "model": desk.model, "train_file": desk.train, "held_out_file": desk.held_out,
            "threads": desk.threads, "seed": job.seed, "row": job.row, "training": training,
            "start": self.start, "batches": way.name(), "adapter": adapter,
            "began": began.as_secs_f64(),
        });
        fs::write(&asked, text.to_string()).map_err(|e| Failure::at(&asked, e))?;
        let mut run = Command::new(python);
        run.arg(script).arg("--job").arg(&asked).arg("--output").arg(&told);
        exec::logged(exec::threads(&mut run, desk.threads).env("HF_HUB_OFFLINE", "1"), log)?;
        let text = fs::read_to_string(&told).map_err(|e| Failure::at(&told, e))?;
        serde_json::from_str(&text).map_err(|e| Failure::at(&told, e))
    }

    /// Whether the last round's two sides of the same batches did the same work.
    ///
    /// The first step shows it within rounding, as in `bench --against peft`; of the later ones, which rounding drives
    /// apart, that their batches are the same, by their padding.
    fn compare(&self, told: &Told) -> Result<(), Failure> {
        let last = |way| told.runs.iter().rev().find(|(of, _)| *of == way).map(|(_, run)| run);
        let (Some(ours), Some(same)) = (last(Way::Ours), last(Way::Same)) else { return Ok(()) };
        let path = self.desk.model.join("config.json");
        let text = fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
        let config = serde_json::from_str(&text).map_err(|e| Failure::at(&path, e))?;
        let longest = self.job.training.get("max_length").and_then(Value::as_u64);
        let longest = longest.ok_or_else(|| Failure::new("the recipe has no max_length"))?;
        let share = tolerance(&Shape::of(&config)?, longest as usize);
        let first = |run: &Trained| Measured {
            losses: vec![run.first_loss],
            grad_norm: Some(run.first_norm),
            trained_parameters: Some(run.trainable_parameters),
            ..Measured::default()
        };
        let apart = |why| Failure::new(format!("ours and Python are apart: {why}"));
        agree(share, 0.0, &first(ours), &first(same)).map_err(apart)?;
        // Both divide the same two numbers.
        if (ours.padding - same.padding).abs() > f64::EPSILON {
            return Err(apart(format!("padding: {} and {}", ours.padding, same.padding)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_count_by_their_steps() {
        assert_eq!(mean(&[(10.0, 0.5), (20.0, 0.25), (25.0, 0.5)]), 0.4);
        assert!(mean(&[]).is_nan());
    }

    #[test]
    fn the_first_rows_are_a_file_of_their_own() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let file = folder.path().join("all.tsv");
        fs::write(&file, "text\tlabel\na\tx\nb\ty\nc\tx\n").expect("writes");
        let rows = |asked| first_rows(&file, folder.path(), asked);
        assert_eq!(rows(None).expect("is read"), (file.clone(), 3));
        let (part, count) = rows(Some(2)).expect("is read");
        assert_eq!(fs::read_to_string(part).expect("is written"), "text\tlabel\na\tx\nb\ty\n");
        assert_eq!(count, 2);
        assert!(rows(Some(4)).is_err_and(|e| e.to_string().contains("at most 3, found 4")));
    }
}
