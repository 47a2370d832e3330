//! `burn-peft combine`: several LoRAs as one.

use crate::args::{Finite, ModelArgs};
use crate::convert::OutputArgs;
use crate::failure::Failure;
use crate::model::{Bert, Dinov2, Ready, Task, Vision, Vit, causal, classifier};
use burn_peft::core::{Method, Sites, load};
use burn_peft::models::Pretrained;
use burn_peft::reparam::{Combination, Combine, Lora, MajoritySign, Weighted, combine};
use clap::Args;

#[derive(Debug, Args)]
#[command(
    after_help = "Rules: linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd,
magnitude_prune, magnitude_prune_svd. They work on the differences of the weights; cat loses nothing and
adds the ranks up, the others cut the result to --svd-rank. With hf_ before the name it is HF PEFT's own
arithmetic, of which some rules work on the factors by themselves.

Examples:
  burn-peft combine --model llama --adapter a --weight 0.7 --adapter b --weight 0.3 \\
      --combination ties --density 0.5 --output-dir both
  burn-peft combine --model llama --adapter a --adapter b --combination cat --output-dir both"
)]
pub(crate) struct CombineArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Weight of an adapter, one for each in their order [default: 1 each]
    #[arg(long, allow_negative_numbers = true)]
    weight: Vec<Finite>,
    /// The rule
    #[arg(long, value_name = "RULE")]
    combination: Combination,
    /// Rank of the result, for rules that cut it [default: the largest of the adapters']
    #[arg(long)]
    svd_rank: Option<usize>,
    /// Share of the numbers to keep, for rules that prune
    #[arg(long, value_name = "SHARE")]
    density: Option<Finite>,
    /// total or frequency, for rules that elect a sign [default: total]
    #[arg(long)]
    majority_sign_method: Option<MajoritySign>,
    /// Seed of DARE's draws
    #[arg(long, default_value_t = 42)]
    seed: u64,
    #[command(flatten)]
    output: OutputArgs,
}

impl CombineArgs {
    fn weights(&self) -> Result<Vec<f64>, Failure> {
        let adapters = self.model.folders()?.len();
        match self.weight.len() {
            _ if adapters == 0 => Err(Failure::new("nothing to combine: give --adapter")),
            0 => Ok(vec![1.0; adapters]),
            found if found != adapters => Err(Failure::new(format!(
                "--weight: expected one for each --adapter, {adapters}, found {found}"
            ))),
            _ => Ok(self.weight.iter().map(|weight| (*weight).into()).collect()),
        }
    }
}

fn made<M: Pretrained>(args: &CombineArgs, task: Task, ready: &Ready<M>) -> Result<(), Failure> {
    let weights = args.weights()?;
    let sites = Sites::of(&ready.model, Some(M::OUTPUT));
    let mut loras = Vec::with_capacity(weights.len());
    for (folder, adapters) in args.model.folders()?.iter().zip(&ready.adapters) {
        if adapters.name() != Lora::NAME {
            return Err(Failure::new(format!(
                "{}: expected a {} adapter to combine, found {}; make it one by burn-peft convert",
                folder.display(),
                Lora::NAME,
                adapters.name()
            )));
        }
        let (config, adapters) = load::<Lora>(folder, &sites, &ready.device)?;
        loras.push((adapters, config.method));
    }
    let parts: Vec<Weighted<'_>> =
        loras.iter().zip(weights).map(|((of, lora), weight)| (of, lora, weight)).collect();
    let how = Combine {
        svd_rank: args.svd_rank,
        density: args.density.map(f64::from),
        majority_sign_method: args.majority_sign_method,
        seed: args.seed,
        ..Combine::new(args.combination)
    };
    let made = combine(&sites, &parts, &how)?;
    args.output.write(&args.model, task, ready, &sites, made)
}

pub(crate) fn run(args: &CombineArgs) -> Result<(), Failure> {
    args.weights()?;
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
