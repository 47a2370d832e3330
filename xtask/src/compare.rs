//! `cargo xtask compare`: every method on one task with one budget, and a reference in Python beside it.

mod picture;
pub(crate) mod recipe;
mod record;
pub(crate) mod run;
mod table;
mod times;

use crate::assets::MINILM;
use crate::failure::Failure;
use crate::summary::duration;
use crate::{demo, dinov2, exec, fashion, fetch, places, python};
use recipe::Recipe;
use record::Record;
use run::{Desk, Job, Side};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use table::{Head, Line};

/// What to do instead of downloading.
const REMEDY: &str = "point at folders: cargo xtask compare --model DIR --data FILE";

/// Sentences that have nothing to do with any task.
const NEUTRAL: &str = "xtask/compare/neutral.tsv";

/// The split of the data; what is drawn in a run depends on `--seeds`.
pub(crate) const SPLIT: u64 = 42;

/// Pictures of Fashion-MNIST to train on and to ask about, and the side to which they are enlarged.
const PICTURES: [usize; 2] = [2000, 1000];
const SIDE: usize = 56;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Task {
    /// MiniLM learns which movie review snippets are positive
    Sentiment,
    /// DINOv2-small learns the ten kinds of clothes of Fashion-MNIST
    Images,
}

impl Task {
    /// What is learned, and from what.
    fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::Sentiment => ("Positive or negative", "movie review snippets"),
            Self::Images => ("Ten kinds of clothes", "pictures of Fashion-MNIST"),
        }
    }

    /// Name of the folder of its runs.
    fn name(self) -> &'static str {
        match self {
            Self::Sentiment => "sentiment",
            Self::Images => "images",
        }
    }

    /// Its table in docs/, without the ending.
    fn document(self) -> &'static str {
        match self {
            Self::Sentiment => "compare",
            Self::Images => "compare-images",
        }
    }

    /// Whether the model reads sentences, so that neutral ones show what it forgets.
    fn has_sentences(self) -> bool {
        self == Self::Sentiment
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Against {
    /// HF PEFT where it has the method, or else plain torch, by interop/compare.py
    Python,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The rows and their settings are in xtask/compare/, a file a task. Finished runs are kept in
the output folder's runs/, and a later call with the same settings does not run them again:
broken off, start it once more. --against python needs an environment as `cargo xtask ci` makes it.

Examples:
  cargo xtask compare --task sentiment
  cargo xtask compare --task sentiment --methods lora,oft --steps 30
  cargo xtask compare --task sentiment --methods lora,dora,oft --seeds 1,2,3 --against python
  cargo xtask compare --task sentiment --times
  cargo xtask compare --task images
  cargo xtask compare --task sentiment --publish"
)]
pub(crate) struct CompareArgs {
    /// What the methods are trained for
    #[arg(long, value_enum)]
    task: Task,
    /// Rows of the table [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    methods: Vec<String>,
    /// A run for each; the table has their means
    #[arg(long, value_delimiter = ',', value_name = "N,...", default_value = "1")]
    seeds: Vec<u64>,
    /// Optimizer steps of a run [default: the recipe's]
    #[arg(long)]
    steps: Option<usize>,
    /// Train the rows that have a reference with that too, turn by turn
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// Train nothing anew, but take the step times: a few steps of each row, LoRA's before them; wants
    /// a machine that does nothing else
    #[arg(long, conflicts_with = "against")]
    times: bool,
    /// Run nothing, but write the table in docs/ of the output folder's runs and times and of those in its
    /// record there, which takes them up; runs whose settings are no more the recipe's leave it
    #[arg(long, conflicts_with_all = ["against", "times", "methods", "steps"])]
    publish: bool,
    /// Where table, picture and runs go [default: compare-output/TASK in the repository]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Folder of a BERT model, or for images of a ViT or DINOv2, in place of the download
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Ratings (id, mean, text between tabs), or a .tar.gz that holds them, or for images a folder of
    /// MNIST's four files, in place of the download
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// The program burn-peft, in place of building it
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

/// Runs what has not been run, and tells.
pub(crate) fn run(args: &CompareArgs) -> Result<(), Failure> {
    let mut recipe = match args.task {
        Task::Sentiment => Recipe::sentiment()?,
        Task::Images => Recipe::images()?,
    };
    if args.against.is_some() && !recipe.rows.iter().any(|row| row.reference.is_some()) {
        return Err(Failure::new(
            "no row of this task has a reference in Python; leave --against out",
        ));
    }
    if let Some(steps) = args.steps.filter(|_| !args.times) {
        recipe.training.insert("max_steps".into(), steps.into());
    }
    let rows = recipe.select(&args.methods)?;
    let (desk, held_out) = prepare(args)?;
    let line = |row| Line { row, ours: vec![], python: vec![], times: vec![], failures: vec![] };
    let mut lines: Vec<Line<'_>> = rows.into_iter().map(line).collect();
    let head = Head {
        task: args.task,
        model: name(&desk.model),
        training: Value::Object(recipe.training.clone()),
        seeds: args.seeds.clone(),
        held_out,
        threads: desk.threads,
        against: args.against.is_some(),
        timed: args.times,
        published: None,
    };
    if args.publish {
        return publish(args.task, head, &recipe, &mut lines, &desk);
    }
    desk.embed_base()?;
    if args.times {
        // What was run stands in the table from the first, and the times come in row by row.
        for line in &mut lines {
            for &seed in &args.seeds {
                let (row, side) = (line.row, Side::Ours);
                let job = Job { row, training: recipe.training(row), seed, side };
                line.ours.extend(job.finished(&desk)?.map(|run| (seed, run)));
            }
        }
    }
    // Seed by seed, so that there is a whole table early.
    for &seed in &args.seeds {
        for index in 0..lines.len() {
            for side in [Side::Ours, Side::Python] {
                let row = lines[index].row;
                if side == Side::Python && (args.against.is_none() || row.reference.is_none()) {
                    continue;
                }
                let job = Job { row, training: recipe.training(row), seed, side };
                if args.times {
                    let row = &recipe.select(&["lora".into()])?[0];
                    let lora = Job { row, training: recipe.training(row), seed, side };
                    time(&mut lines[index], &job, &lora, args.steps, &desk)?;
                } else {
                    take(&mut lines[index], &job, &desk)?;
                }
                report(&desk.output, &head, &lines)?;
            }
        }
    }
    println!("\nTable, runs and picture in {}", desk.output.display());
    match lines.iter().map(|line| line.failures.len()).sum() {
        0 => Ok(()),
        1 => Err(Failure::new("a run failed; the table says why")),
        several => Err(Failure::new(format!("{several} runs failed; the table says why"))),
    }
}

/// Runs a job, unless it was run before, and puts down how it ended.
fn take(line: &mut Line<'_>, job: &Job<'_>, desk: &Desk) -> Result<(), Failure> {
    let (side, seed) = (job.side, job.seed);
    print!("{:<18}{:<6}seed {seed:<4}", job.row.name, side.name());
    let _ = std::io::stdout().flush();
    let (measured, how) = match job.finished(desk)? {
        Some(measured) => (Ok(measured), "before"),
        None => (job.run(desk), "now"),
    };
    match measured {
        Ok(run) => {
            let told = format!(
                "{:.1} % right, {:.0} ms a step",
                100.0 * run.accuracy,
                1e3 * run.step_seconds
            );
            println!("{told}, run {how} in {}", duration(run.seconds));
            match side {
                Side::Ours => line.ours.push((seed, run)),
                Side::Python => line.python.push((seed, run)),
            }
        }
        Err(failure) => {
            println!("FAILED: {failure}");
            line.failures.push((seed, side, failure.to_string()));
        }
    }
    Ok(())
}

/// Times a row.
fn time(
    line: &mut Line<'_>,
    job: &Job<'_>,
    lora: &Job<'_>,
    steps: Option<usize>,
    desk: &Desk,
) -> Result<(), Failure> {
    print!("{:<18}", job.row.name);
    let _ = std::io::stdout().flush();
    match times::take(job, lora, steps, desk) {
        Ok(times) => {
            println!("{:.0} ms a step, {:.2} of LoRA's", 1e3 * times.own, times.own / times.lora);
            line.times.push(times);
        }
        // Some plans need more steps than these few; their cells stay empty.
        Err(failure) => println!("not timed: {failure}"),
    }
    Ok(())
}

/// Writes the table in docs/, and what it is made of.
fn publish(
    task: Task,
    head: Head,
    recipe: &Recipe,
    lines: &mut [Line<'_>],
    desk: &Desk,
) -> Result<(), Failure> {
    let at =
        |ending: &str| places::root().join("docs").join(format!("{}.{ending}", task.document()));
    let older = Record::read(&at("json"))?;
    let mut record = Record::after(&older);
    for line in &mut *lines {
        for &seed in &head.seeds {
            let training = recipe.training(line.row);
            let job = |side| Job { row: line.row, training: training.clone(), seed, side };
            line.ours.extend(record.run(&job(Side::Ours), &older, desk)?.map(|run| (seed, run)));
            line.python
                .extend(record.run(&job(Side::Python), &older, desk)?.map(|run| (seed, run)));
            line.times.extend(record.times(&job(Side::Ours), &older, desk)?);
        }
    }
    let head = Head {
        against: lines.iter().any(|line| !line.python.is_empty()),
        timed: true,
        published: Some([record.note.clone(), format!("{}.svg", task.document())]),
        ..head
    };
    record.write(&at("json"))?;
    places::write(&at("md"), table::markdown(&head, lines).as_bytes())?;
    if let Some(svg) = picture::svg(&format!("Methods on {}", head.model), lines)? {
        places::write(&at("svg"), svg.as_bytes())?;
    }
    println!("{}, and a picture and the record beside it", at("md").display());
    Ok(())
}

/// Writes what is known so far.
fn report(output: &Path, head: &Head, lines: &[Line<'_>]) -> Result<(), Failure> {
    places::write(&output.join("compare.md"), table::markdown(head, lines).as_bytes())?;
    let json = format!("{:#}\n", table::json(head, lines));
    places::write(&output.join("compare.json"), json.as_bytes())?;
    match picture::svg(&format!("Methods on {}", head.model), lines)? {
        Some(svg) => places::write(&output.join("compare.svg"), svg.as_bytes()),
        None => Ok(()),
    }
}

/// The last part of a folder's path.
fn name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| folder.display().to_string(), |n| n.display().to_string())
}

/// Everything that a run needs, and how many examples are held out.
fn prepare(args: &CompareArgs) -> Result<(Desk, usize), Failure> {
    let python = match args.against {
        None => None,
        Some(Against::Python) => {
            Some((python::with_peft()?, places::root().join("interop/compare.py")))
        }
    };
    let output = args
        .output_dir
        .clone()
        .unwrap_or_else(|| places::root().join("compare-output").join(args.task.name()));
    places::make(&output.join("runs"))?;
    let data = args.data.as_deref();
    let (model, neutral, [train, held_out], count) = match args.task {
        Task::Sentiment => {
            let split = demo::data(data, SPLIT, REMEDY)?;
            // Nothing is chosen by the validation data, so that it may be asked about as well.
            let (held_out, count) = together(&split.folder, &output.join("held-out.tsv"))?;
            let model = args.model.clone().map_or_else(|| fetch::fetch(&MINILM, REMEDY), Ok)?;
            let files = [split.folder.join("train.tsv"), held_out];
            (model, Some(places::root().join(NEUTRAL)), files, count)
        }
        Task::Images => {
            let [train, test] = PICTURES;
            let folder = fashion::folder(data, train, test, REMEDY)?;
            let model = args.model.clone().map_or_else(|| dinov2::folder(SIDE, REMEDY), Ok)?;
            let files =
                ["train", "t10k"].map(|name| folder.join(format!("{name}-images-idx3-ubyte")));
            (model, None, files, test)
        }
    };
    let program = match &args.program {
        Some(program) => program.clone(),
        // Nothing is run.
        None if args.publish => PathBuf::new(),
        None => {
            println!(
                "Building burn-peft; the first time compiles all of Burn, which takes minutes"
            );
            exec::build_program(&[])?
        }
    };
    let sum = |path: &PathBuf| fetch::sha256(path).map_err(|e| Failure::at(path, e));
    let files = [&train, &held_out].into_iter().chain(&neutral);
    let sums = files.map(sum).collect::<Result<_, _>>()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let desk = Desk { program, python, model, train, held_out, neutral, sums, output, threads };
    Ok((desk, count))
}

/// `validation.tsv` and `test.tsv` in one file, and the number of their rows.
pub(crate) fn together(folder: &Path, file: &Path) -> Result<(PathBuf, usize), Failure> {
    let read = |part: &str| {
        let path = folder.join(part);
        std::fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))
    };
    let (mut text, more) = (read("validation.tsv")?, read("test.tsv")?);
    text.extend(more.split_inclusive('\n').skip(1));
    places::write(file, text.as_bytes())?;
    Ok((file.to_owned(), text.lines().count() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_become_one_with_one_first_line() {
        let folder = tempfile::tempdir().expect("makes a folder");
        for (name, rows) in [("validation.tsv", "a\tpositive\n"), ("test.tsv", "b\tnegative\n")] {
            std::fs::write(folder.path().join(name), format!("text\tlabel\n{rows}"))
                .expect("writes");
        }
        let (file, count) =
            together(folder.path(), &folder.path().join("both.tsv")).expect("writes");
        let text = std::fs::read_to_string(file).expect("is written");
        assert_eq!((text.as_str(), count), ("text\tlabel\na\tpositive\nb\tnegative\n", 2));
    }

    #[test]
    fn neutral_sentences_are_many_and_plain() {
        let text = std::fs::read_to_string(places::root().join(NEUTRAL)).expect("is committed");
        let mut lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.remove(0), lines.len()), ("text", 64));
        assert!(lines.iter().all(|line| !line.contains('\t') && line.len() > 10));
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), 64);
    }
}
