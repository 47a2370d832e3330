//! `burn-peft convert`: any adapter that is a difference of weights as a plain LoRA.

use crate::args::{Finite, ModelArgs};
use crate::failure::{Failure, print};
use crate::files::{ADAPTER_FILES, LABELS, claim, json_bytes, read_labels};
use crate::model::{Bert, Dinov2, Ready, Task, Vision, Vit, causal, classifier};
use burn_peft::core::{AdapterConfig, Sites, save_with};
use burn_peft::models::Pretrained;
use burn_peft::reparam::{Converted, Rank, convert};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(
    after_help = "Prints rank and error of each place: the length of what is lost, as a share of the whole.

Examples:
  burn-peft convert --model minilm --adapter oft --output-dir lora --rank 16
  burn-peft convert --model minilm --adapter oft --output-dir lora --energy 0.99 --max-rank 64"
)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    cut: CutArgs,
    /// With --energy: no rank is larger
    #[arg(long, requires = "energy", conflicts_with = "rank")]
    max_rank: Option<usize>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Where the differences are cut.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct CutArgs {
    /// Rank of the LoRA
    #[arg(long)]
    rank: Option<usize>,
    /// Share of the squared singular values to keep, place by place: each gets the rank that it needs
    #[arg(long, value_name = "SHARE")]
    energy: Option<Finite>,
}

/// Where an adapter goes that was made of others.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Where the LoRA goes
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Replace the adapter that the output folder holds
    #[arg(long)]
    overwrite: bool,
}

impl OutputArgs {
    /// Refuses a folder that holds an adapter.
    pub(crate) fn claim(&self) -> Result<(), Failure> {
        claim(&self.output_dir, ADAPTER_FILES, self.overwrite)
    }

    /// Writes the adapter with what travels along from those that it was made of, and tells of it.
    pub(crate) fn write<M: Pretrained>(
        &self,
        args: &ModelArgs,
        task: Task,
        ready: &Ready<M>,
        sites: &Sites,
        made: Converted,
    ) -> Result<(), Failure> {
        let Converted { method, adapters, fits } = made;
        let mut config = AdapterConfig::new(method);
        let own = ready.adapters.iter().find_map(|adapters| adapters.task_type());
        config.task_type = own.or(task.task_type()).map(str::to_owned);
        config.base_model_name_or_path = Some(args.model.display().to_string());
        let mut beside = Vec::new();
        for folder in &args.folders()? {
            if let (Some(labels), true) = (read_labels(folder)?, beside.is_empty()) {
                beside.push((LABELS, json_bytes(LABELS, &labels)?));
            }
        }
        save_with(&self.output_dir, &config, sites, &adapters, &beside)?;
        let told = if fits.0.is_empty() { String::new() } else { fits.to_string() };
        print(&format!("{told}adapter in {}\n", self.output_dir.display()))
    }
}

impl ConvertArgs {
    fn rank(&self) -> Rank {
        match (self.cut.rank, self.cut.energy) {
            (_, Some(share)) => Rank::Energy { share: share.into(), most: self.max_rank },
            (rank, None) => Rank::At(rank.unwrap_or_default()), // one of them is given
        }
    }
}

fn made<M: Pretrained>(args: &ConvertArgs, task: Task, ready: &Ready<M>) -> Result<(), Failure> {
    let [adapters] = &ready.adapters[..] else {
        let found = ready.adapters.len();
        return Err(Failure::new(format!("expected one --adapter to convert, found {found}")));
    };
    let name = adapters.name();
    let folds = adapters.folds().ok_or_else(|| {
        Failure::new(format!("{name} adapters act on activations and are no LoRA of any rank"))
    })?;
    let sites = Sites::of(&ready.model, Some(M::OUTPUT));
    let made = convert(&sites, folds.as_ref(), args.rank())?;
    args.output.write(&args.model, task, ready, &sites, made)
}

pub(crate) fn run(args: &ConvertArgs) -> Result<(), Failure> {
    args.output.claim()?;
    match Task::of(&args.model.model, args.model.task.as_deref())? {
        task @ Task::Classification => made(args, task, &classifier::<Bert>(&args.model)?.0),
        task @ Task::Images(Vision::Vit) => made(args, task, &classifier::<Vit>(&args.model)?.0),
        task @ Task::Images(Vision::Dinov2) => {
            made(args, task, &classifier::<Dinov2>(&args.model)?.0)
        }
        task @ Task::CausalLm => made(args, task, &causal(&args.model)?),
    }
}
