//! `cargo xtask bench`: the factored step and Burn's own, and with `--against peft` real models beside HF PEFT.

mod case;
mod epoch;
mod flops;
mod growth;
mod picture;
mod run;
mod table;

use crate::failure::Failure;
use crate::{exec, places, python};
use case::Cases;
use run::{Desk, Measure, Side};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use table::{Head, Row};

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Against {
    /// HF PEFT, by interop/bench.py
    Peft,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without --against: two blocks, a LoRA step through the scope and through Burn's apply_lora.
With it: the cases of xtask/bench/cases.json on both sides, in one run; bench.md, bench.json and bench.svg in the
output folder. With --growth: ours alone, by tokens, rank and loaded adapters; growth.md, growth.json and growth.svg.
With --epoch: MiniLM is fine-tuned on real reviews, by burn-peft and by a loop over HF PEFT; epoch.md and epoch.json.
With --kernels: each fused operation and its plain composition.
Models are made, or downloaded, once and kept in the cache.

Examples:
  cargo xtask bench
  cargo xtask bench --against peft
  cargo xtask bench --against peft --cases minilm,bert-base --measures lora,full --rounds 5
  cargo xtask bench --growth
  cargo xtask bench --epoch
  cargo xtask bench --kernels -- attention"
)]
pub(crate) struct BenchArgs {
    /// Measure with this library too, turn by turn
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// Follow our cost as tokens, rank and the number of loaded adapters grow
    #[arg(long, conflicts_with_all = ["against", "cases", "measures"])]
    growth: bool,
    /// Train an epoch of real data, with HF PEFT beside it, turn by turn
    #[arg(long, conflicts_with_all = ["against", "cases", "measures", "growth", "steps"])]
    epoch: bool,
    /// An epoch of the first N rows of the data alone [default: all of them]
    #[arg(long, value_name = "N", requires = "epoch", value_parser = clap::value_parser!(u32).range(1..))]
    rows: Option<u32>,
    /// Measure each fused operation against its plain composition
    #[arg(long, conflicts_with_all = ["against", "cases", "measures", "growth", "epoch"])]
    kernels: bool,
    /// What is measured [default: all of xtask/bench/cases.json]
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", requires = "against")]
    cases: Vec<String>,
    /// What is measured of each [default: all that it has]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,...", requires = "against")]
    measures: Vec<Measure>,
    /// A process each for every measure and side; the table has the medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Steps of a process that count [default: the case's]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    steps: Option<u16>,
    /// Threads of each side [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Where table, picture and logs go [default: bench-output in the repository]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// The example `measure` of benches/, or for --epoch the program burn-peft, in place of building it
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Passed on to the benchmarks, alone or with --kernels
    #[arg(last = true)]
    rest: Vec<OsString>,
}

/// Runs the benchmarks.
pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    if let Some(Against::Peft) = args.against {
        return beside_peft(args);
    }
    if args.growth {
        let cases = Cases::read()?;
        return growth::run(&prepare(args, &cases)?, &cases, usize::from(args.rounds));
    }
    if args.epoch {
        return epoch::run(args);
    }
    let name = if args.kernels { "kernels" } else { "factored" };
    // The profile that the tests use, so that Burn is not compiled once more.
    let bench = ["bench", "--workspace", "--profile", "dev", "--bench", name, "--"];
    exec::run(exec::cargo(bench).args(&args.rest))
}

fn beside_peft(args: &BenchArgs) -> Result<(), Failure> {
    let cases = Cases::read()?;
    let chosen = cases.select(&args.cases)?;
    let desk = prepare(args, &cases)?;
    let rounds = usize::from(args.rounds);
    let mut head = Head {
        rounds,
        threads: desk.threads,
        warmup: desk.settings.warmup,
        processor: processor(),
        versions: None,
        rate: None,
    };
    let mut rows: Vec<Row<'_>> = Vec::new();
    for case in chosen {
        let asked = |measure: &Measure| args.measures.is_empty() || args.measures.contains(measure);
        let measures: Vec<Measure> = case.measures.iter().copied().filter(asked).collect();
        if measures.is_empty() {
            continue;
        }
        let made = desk.made(case)?;
        let first = rows.len();
        for measure in measures {
            let lengths = case.lengths(measure, &desk.settings);
            let (r, new) = (desk.settings.r, desk.settings.new_tokens);
            rows.push(Row {
                case,
                measure,
                tokens: if measure == Measure::Generate { new } else { lengths.iter().sum() },
                flops: made.shape.step(measure, &lengths, &case.target_modules, r, new),
                runs: Vec::new(),
                failures: Vec::new(),
            });
        }
        for round in 0..rounds {
            for side in [Side::Ours, Side::Peft] {
                let rate = desk.rate(case, &made, side, round)?;
                println!(
                    "{:<18}{:<17}{:<11}{:.1} GFLOP/s",
                    case.name,
                    "products",
                    side.name(),
                    rate / 1e9
                );
                head.rate = Some(head.rate.map_or(rate, |best| best.max(rate)));
            }
            for row in &mut rows[first..] {
                take(row, &desk, &made, round);
                let versions = row.runs.iter().find_map(|(_, run)| run.versions.clone());
                head.versions = head.versions.or(versions);
            }
            report(&desk.output, &head, &rows)?;
        }
    }
    if rows.is_empty() {
        return Err(Failure::new("none of the cases has one of the measures"));
    }
    println!(
        "\n{}\nTable, picture and logs in {}",
        table::markdown(&head, &rows),
        desk.output.display()
    );
    match rows.iter().filter(|row| !row.failures.is_empty()).count() {
        0 => Ok(()),
        1 => Err(Failure::new("a measure failed; the table says why")),
        several => Err(Failure::new(format!("{several} measures failed; the table says why"))),
    }
}

/// A round of a measure: each side in a process of its own, another one first each time.
fn take(row: &mut Row<'_>, desk: &Desk, made: &run::Made, round: usize) {
    let mut sides = row.measure.sides().to_vec();
    let count = sides.len();
    sides.rotate_left(round % count);
    let mut came = Vec::new();
    for side in sides {
        print!("{:<18}{:<17}{:<11}", row.case.name, row.measure.title(), side.name());
        let _ = std::io::stdout().flush();
        match desk.measure(row.case, made, row.measure, side, round) {
            Ok(run) => {
                let step = table::median(run.step_seconds.clone());
                println!("{:.0} ms", 1e3 * step.unwrap_or(f64::NAN));
                came.push((side, run));
            }
            Err(failure) => {
                println!("FAILED: {failure}");
                row.failures.push(format!("{}: {failure}", side.name()));
            }
        }
    }
    let longest = row.case.lengths(row.measure, &desk.settings).into_iter().max().unwrap_or(0);
    let share = run::tolerance(&made.shape, longest);
    if let Some((_, ours)) = came.iter().find(|(side, _)| *side == Side::Ours) {
        for (side, other) in came.iter().filter(|(side, _)| *side != Side::Ours) {
            if let Err(why) = run::agree(share, desk.settings.learning_rate, ours, other) {
                println!("    ours and {} are apart: {why}", side.name());
                row.failures.push(format!("ours and {} are apart: {why}", side.name()));
            }
        }
    }
    row.runs.extend(came);
}

/// Writes what is known so far.
fn report(output: &Path, head: &Head, rows: &[Row<'_>]) -> Result<(), Failure> {
    places::write(&output.join("bench.md"), table::markdown(head, rows).as_bytes())?;
    let json = format!("{:#}\n", table::json(head, rows));
    places::write(&output.join("bench.json"), json.as_bytes())?;
    match picture::svg(head, rows)? {
        Some(svg) => places::write(&output.join("bench.svg"), svg.as_bytes()),
        None => Ok(()),
    }
}

/// Everything that a measurement needs.
fn prepare(args: &BenchArgs, cases: &Cases) -> Result<Desk, Failure> {
    let python = match args.against {
        Some(Against::Peft) => {
            Some((python::with_peft()?, places::root().join("interop/bench.py")))
        }
        None => None,
    };
    let output = args.output_dir.clone().unwrap_or_else(|| places::root().join("bench-output"));
    places::make(&output.join("logs"))?;
    let program = match &args.program {
        Some(program) => program.clone(),
        None => {
            println!(
                "Building what measures; the first time compiles all of Burn, which takes minutes"
            );
            exec::build_measure()?
        }
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Desk {
        program,
        python,
        settings: cases.settings.clone(),
        steps: args.steps.map(usize::from),
        threads: args.threads.map_or_else(cores, usize::from),
        output,
    })
}

/// What the system calls the processor, where it says.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    #[test]
    fn measures_are_known_by_name_and_belong_to_a_comparison() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        let parsed =
            parse("bench --against peft --measures lora,full --rounds 1").expect("is well formed");
        assert_eq!(parsed.args.measures, [Measure::Lora, Measure::Full]);
        let error = parse("bench --against peft --measures lora,tea").expect_err("is no measure");
        assert!(error.to_string().contains("tea"), "{error}");
        assert!(parse("bench --cases minilm").is_err());
        assert_eq!(parse("bench --epoch --rows 64").expect("is well formed").args.rows, Some(64));
        for line in ["--rows 64", "--epoch --rows 0", "--epoch --steps 3", "--epoch --kernels"] {
            assert!(parse(&format!("bench {line}")).is_err(), "{line}");
        }
        assert!(parse("bench --against peft --rounds 0").is_err());
        assert_eq!(parse("bench -- --noplot").expect("is passed on").args.rest, ["--noplot"]);
    }
}
