//! `burn-peft train`.

use crate::args::TrainArgs;
use crate::failure::{Failure, print, tell};
use crate::files::{ADAPTER_FILES, LABELS, SUMMARY, claim, json_bytes, peak_memory};
use crate::images;
use crate::make::{Made, Make, save};
use crate::model::{Dinov2, Task, Vision, Vit};
use crate::options::{fingerprint, merged, need, part, precision};
use crate::prepare::{Prepared, causal, texts};
use burn::module::Module;
use burn::tensor::Device;
use burn_peft::core::{Scope, Sites};
use burn_peft::models::{Precision, Pretrained};
use burn_peft::train::checkpoint::{Checkpoint, past_events};
use burn_peft::train::{
    Console, EvalFeed, Event, MetricsFile, Objective, Observer, Options, Report, Run, Sample,
    measure,
};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Batches that an init sees before the training.
const INIT_BATCHES: usize = 32;

pub(crate) struct Setup {
    pub(crate) args: TrainArgs,
    fields: Map<String, Value>,
    pub(crate) options: Options,
    pub(crate) device: Device,
    pub(crate) precision: Precision,
    out: PathBuf,
    pub(crate) model: PathBuf,
    task: Task,
}

pub(crate) fn run(args: TrainArgs) -> Result<(), Failure> {
    let (args, fields) = merged(args)?;
    let model = need(&args.model, "model")?.to_owned();
    let out = need(&args.output_dir, "output-dir")?.to_owned();
    let options = part(&Options::default(), &fields, "training options")?;
    options.check()?;
    let task = Task::of(&model, args.task.as_deref())?;
    let device = burn_peft::device::by_name(args.device.as_deref().unwrap_or("flex"))?;
    let precision = precision(args.dtype.as_deref().unwrap_or("float32"))?;
    if args.resume && args.overwrite {
        return Err(Failure::new(
            "--resume continues a run and --overwrite replaces it; give one of them",
        ));
    }
    if args.resume {
        if Checkpoint::of(&out).state()?.is_none() {
            let reason = "holds no checkpoint to resume from; start without --resume";
            return Err(Failure::new(format!("{}: {reason}", out.display())));
        }
    } else {
        claim(&out, ADAPTER_FILES, args.overwrite)?;
        if args.overwrite {
            Checkpoint::of(&out).remove();
        }
    }
    let setup = Setup { args, fields, options, device, precision, out, model, task };
    match task {
        Task::Classification => texts(&setup),
        Task::Images(Vision::Vit) => images::train::<Vit>(&setup),
        Task::Images(Vision::Dinov2) => images::train::<Dinov2>(&setup),
        Task::CausalLm => causal(&setup),
    }
}

/// Keeps the events for the picture.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Event>>>);

impl Observer for Kept {
    fn event(&mut self, event: &Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
    }
}

fn evaluated<B: Objective>(
    base: &B,
    feed: &EvalFeed<B::Batch>,
    device: &Device,
    cx: &Scope<'_>,
) -> Report {
    feed.batches()
        .map(|(_, batch)| measure(base, &batch, device, cx))
        .fold(Report::default(), Report::and)
}

fn scores(report: Report) -> Value {
    json!({"accuracy": report.accuracy(), "loss": report.loss, "perplexity": report.loss.exp()})
}

pub(crate) fn finish<B: Objective + Pretrained>(
    setup: &Setup,
    prepared: Prepared<B>,
) -> Result<(), Failure> {
    let (device, out) = (&setup.device, &setup.out);
    let base = Arc::new(prepared.loaded.model);
    let sites = Sites::of(&*base, Some(B::OUTPUT));
    let steps = prepared.train.steps();
    let batches = setup.args.init_batches.unwrap_or(INIT_BATCHES);
    let make = Make {
        args: &setup.args,
        fields: &setup.fields,
        model: &setup.model,
        task: setup.task,
        seed: setup.options.seed,
        device,
        saved: &prepared.saved,
        sites: &sites,
        steps,
        sample: &Sample::new(&*base, device, &prepared.train, batches),
    };
    let (mut trainable, mut parts, mut makers) = (0, Vec::new(), Vec::new());
    for Made { name, summary, part, files } in make.all()? {
        tell(summary.to_string().trim_end());
        trainable += summary.trainable;
        parts.push(part);
        makers.push((name, files));
    }
    let names: Vec<String> = makers.iter().map(|(name, _)| name.to_lowercase()).collect();
    let title = format!("{} on {}", names.join(", "), setup.model.display());
    let adapters: Vec<_> = parts.iter().map(|part| part.adapters.clone()).collect();
    let evaluated_on = [Some(&prepared.valid), prepared.test.as_ref()].into_iter().flatten();
    let batches = evaluated_on.flat_map(|feed| feed.batches().map(|(_, batch)| batch));
    for batch in batches.chain(prepared.train.longest()) {
        Objective::check(&*base, &batch, &Scope::new(&adapters))?;
    }
    let before = match (&prepared.test, setup.args.resume) {
        (Some(test), false) => {
            let report = evaluated(&*base, test, device, &Scope::new(&adapters.valid()));
            tell(&format!(
                "before training: test loss {:.4}, accuracy {:.4}",
                report.loss,
                report.accuracy()
            ));
            Some(scores(report))
        }
        _ => None,
    };

    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // A second Ctrl-C ends at once, without a checkpoint.
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    if let Err(e) = ctrlc::set_handler(handler) {
        log::warn!("Ctrl-C will end the run without a checkpoint: {e}");
    }
    let metrics = out.join("metrics.jsonl");
    let from = match setup.args.resume {
        true => Checkpoint::of(out).state()?.map(|state| state.step),
        false => None,
    };
    let metrics_file = MetricsFile::open(&metrics, from)?;
    let kept = Kept(Arc::new(Mutex::new(past_events(&metrics))));
    let run = Run {
        base: base.clone(),
        device: device.clone(),
        fingerprint: fingerprint(&setup.args, &setup.fields, steps)?,
        train: prepared.train,
        valid: prepared.valid,
        options: setup.options.clone(),
        folder: Some(out.clone()),
        resume: setup.args.resume,
        stop,
    };
    let observer = Box::new((Console::new(), (metrics_file, kept.clone())));
    let fitted = run.fit(parts, observer)?;
    let events = kept.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    burn_peft::train::plot::draw(&out.join("training.svg"), &title, &events)?;
    if fitted.interrupted {
        return Err(Failure::Interrupted);
    }

    let after = prepared
        .test
        .as_ref()
        .map(|test| scores(evaluated(&*base, test, device, &Scope::new(&fitted.adapters.valid()))));
    let labels = prepared.labels.as_ref().map(|labels| json_bytes(LABELS, labels)).transpose()?;
    let (tokens, padded) = fitted.tokens;
    let padding = 1.0 - tokens as f64 / padded.max(1) as f64;
    let summary_json = json!({
        "trainable_parameters": trainable,
        "total_parameters": sites.parameters + trainable,
        "train_seconds": fitted.seconds,
        "peak_memory_bytes": peak_memory(),
        "before": before,
        "after": after,
        "steps": fitted.steps,
        "best_step": fitted.best,
        "epochs": setup.options.num_train_epochs,
        "padding": padding,
    });
    let summary = (SUMMARY, json_bytes(SUMMARY, &summary_json)?);
    save(out, makers, &fitted.adapters, labels.map(|bytes| (LABELS, bytes)), summary)?;
    // The adapter is whole and in its place: the checkpoint has done its work.
    Checkpoint::of(out).remove();
    let mut text = format!("{} steps in {:.1} s", fitted.steps, fitted.seconds);
    text += &format!("; {:.1} % of the tokens were padding", 100.0 * padding);
    if let Some(after) = &after {
        text += &format!(
            "; test accuracy {:.4}, loss {:.4}",
            after["accuracy"].as_f64().unwrap_or(f64::NAN),
            after["loss"].as_f64().unwrap_or(f64::NAN)
        );
    }
    print(&format!("{text}\nadapter in {}\n", out.display()))
}
