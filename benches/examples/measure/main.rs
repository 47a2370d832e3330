//! One measurement of `cargo xtask bench --against peft` on our side, as `interop/bench.py` makes it on the other's:
//! reads what is asked for from `--job job.json` and writes what came out to `--output measured.json`.

mod job;
mod prepare;
mod steps;
mod trained;

use burn_peft_models::{
    BertForSequenceClassification, LlamaForCausalLM, Precision, Pretrained, model_type,
};
use job::{Failed, Job, Measured, What};
use std::process::ExitCode;
use steps::Peer;

fn measured<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    match job.measure {
        What::Prepare => prepare::prepare::<B>(job),
        What::Rate => steps::rate(job),
        What::Forward => steps::forward::<B>(job),
        What::Lora => trained::lora::<B>(job, Precision::F32, false),
        What::LoraBf16 => trained::lora::<B>(job, Precision::Bf16, false),
        What::LoraCheckpointed => trained::lora::<B>(job, Precision::F32, true),
        What::ApplyLora => trained::apply_lora::<B>(job),
        What::Full => trained::full::<B>(job),
        What::Generate => steps::generate::<B>(job),
        What::Mixed => steps::mixed::<B>(job),
        What::Loaded => steps::loaded::<B>(job),
    }
}

fn run() -> Result<(), Failed> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [asked, job, told, output] = &arguments[..] else {
        return Err("expected --job FILE --output FILE".into());
    };
    if (asked.as_str(), told.as_str()) != ("--job", "--output") {
        return Err(format!("expected --job and --output, found {asked} and {told}").into());
    }
    let said = |e: &dyn std::fmt::Display| format!("{job}: {e}");
    let text = std::fs::read_to_string(job).map_err(|e| said(&e))?;
    let job: Job = serde_json::from_str(&text).map_err(|e| said(&e))?;
    let measured = match model_type(job.source.as_ref().unwrap_or(&job.model))?.as_str() {
        BertForSequenceClassification::MODEL_TYPE => {
            measured::<BertForSequenceClassification>(&job)?
        }
        LlamaForCausalLM::MODEL_TYPE => measured::<LlamaForCausalLM>(&job)?,
        other => return Err(format!("model_type: expected bert or llama, found {other}").into()),
    };
    std::fs::write(output, serde_json::to_vec(&measured)?).map_err(|e| format!("{output}: {e}"))?;
    Ok(())
}

fn main() -> ExitCode {
    // As the program burn-peft does.
    burn_peft_kernels::keep_freed_memory();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
