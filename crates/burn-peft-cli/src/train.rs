//! `burn-peft train`.

use crate::args::TrainArgs;
use crate::failure::{Failure, print, tell};
use crate::files::{ADAPTER_FILES, LABELS, SUMMARY, claim, json_bytes, peak_memory};
use crate::model::{Task, causal_length, own_labels};
use crate::options::{configure, fingerprint, merged, need, part, text_unit};
use burn::module::Module;
use burn::tensor::Device;
use burn_peft::core::{
    AdapterConfig, Adapters, AnyAdapter, Guide, Method, Passes, Scope, Sites, Summary, adapt,
    save_with, survey,
};
use burn_peft::models::{
    BertConfig, BertForSequenceClassification, LlamaForCausalLM, Loaded, Precision, Pretrained,
};
use burn_peft::registry::{Job, with_method};
use burn_peft::train::checkpoint::{Checkpoint, past_events};
use burn_peft::train::data::{
    CausalItem, ClassItem, Columns, Example, Labels, TextTokenizer, causal_batch, class_batch,
    hold_out, pack, read_causal, read_labelled,
};
use burn_peft::train::{
    Collate, Console, EvalFeed, Event, MetricsFile, Objective, Observer, Options, Report, Run,
    Sample, TrainFeed, measure,
};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Batches that an init sees before the training.
const INIT_BATCHES: usize = 32;

struct Setup {
    args: TrainArgs,
    fields: Map<String, Value>,
    options: Options,
    device: Device,
    out: PathBuf,
    model: PathBuf,
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
    let setup = Setup { args, fields, options, device, out, model, task };
    match task {
        Task::Classification => classification(&setup),
        Task::CausalLm => causal(&setup),
    }
}

/// What a task hands to the part that is the same for all.
struct Prepared<B: Objective + Pretrained> {
    loaded: Loaded<B>,
    train: TrainFeed<B::Batch>,
    valid: EvalFeed<B::Batch>,
    test: Option<EvalFeed<B::Batch>>,
    /// Layers that must be trained whole.
    saved: Vec<String>,
    labels: Option<Vec<String>>,
}

fn class_items(
    path: &Path,
    examples: &[Example],
    labels: &Labels,
    tokenizer: &TextTokenizer,
    max_length: usize,
) -> Result<Arc<Vec<ClassItem>>, Failure> {
    let ids = examples.iter().map(|e| labels.id(path, e)).collect::<Result<Vec<_>, _>>()?;
    let texts: Vec<_> = examples.iter().map(|e| (&*e.text, e.text_pair.as_deref())).collect();
    let encoded = tokenizer.encode(&texts, max_length)?;
    let item = |(e, label): (burn_peft::train::data::Encoded, i32)| ClassItem {
        ids: e.ids,
        type_ids: e.type_ids,
        label,
    };
    Ok(Arc::new(encoded.into_iter().zip(ids).map(item).collect()))
}

fn classification(setup: &Setup) -> Result<(), Failure> {
    let args = &setup.args;
    let path = need(&args.train_file, "train-file")?;
    let columns = Columns {
        text: args.text_column.clone().unwrap_or("text".into()),
        text_pair: args.text_pair_column.clone(),
        label: args.label_column.clone().unwrap_or("label".into()),
    };
    let mut examples = read_labelled(path, &columns)?;
    let labels = in_the_models_order(Labels::of(path, &examples)?, &setup.model)?;
    let mut valid = match &args.validation_file {
        Some(file) => read_labelled(file, &columns)?,
        None => Vec::new(),
    };
    if let Some(share) = held_out(args)? {
        (examples, valid) = hold_out(examples, share, setup.options.seed).ok_or_else(|| {
            Failure::new(format!(
                "{}: too few examples to hold {share} of them out",
                path.display()
            ))
        })?;
    }
    let tokenizer = TextTokenizer::load(&setup.model)?;
    let max_length = args.max_length.unwrap_or(128);
    let pad = tokenizer.pad;
    let items = |path: &Path, examples: &[Example]| {
        class_items(path, examples, &labels, &tokenizer, max_length)
    };
    let collate = |items: &Arc<Vec<ClassItem>>| {
        let items = items.clone();
        let make = move |picked: &[usize]| class_batch(&items, picked, pad);
        Arc::new(make) as Collate<_>
    };
    let lengths = |items: &[ClassItem]| items.iter().map(|item| item.ids.len()).collect::<Vec<_>>();
    let size = setup.options.per_device_eval_batch_size;
    let feed = |items: &Arc<Vec<ClassItem>>| EvalFeed::new(&lengths(items), size, collate(items));

    let train = items(path, &examples)?;
    let valid = items(args.validation_file.as_deref().unwrap_or(path), &valid)?;
    let test = match &args.test_file {
        Some(file) => Some(items(file, &read_labelled(file, &columns)?)?),
        None => None,
    };
    let count = labels.names.len();
    let edit = |config: &mut BertConfig| {
        config.id2label = None;
        config.num_labels = Some(count);
    };
    let seed = setup.options.seed;
    let loaded = BertForSequenceClassification::load(
        &setup.model,
        Precision::F32,
        seed,
        &setup.device,
        edit,
    )?;
    belongs(&tokenizer, pad, loaded.model.vocab(), &setup.model)?;
    for item in [Some(&train), Some(&valid), test.as_ref()].into_iter().flatten().flat_map(|i| &**i)
    {
        loaded
            .model
            .check(&class_batch(std::slice::from_ref(item), &[0], pad).tokens, &Scope::plain())?;
    }
    // Whatever nobody trained before is trained now, and travels with the adapter.
    let fresh = |name: &String| name.rsplit_once('.').map(|(place, _)| place.to_owned());
    let mut saved: Vec<String> = loaded.fresh.iter().filter_map(fresh).collect();
    saved.push(BertForSequenceClassification::OUTPUT.into());
    saved.sort();
    saved.dedup();
    finish(
        setup,
        Prepared {
            train: TrainFeed::new(lengths(&train), collate(&train), &setup.options),
            valid: feed(&valid),
            test: test.as_ref().map(&feed),
            loaded,
            saved,
            labels: Some(labels.names.clone()),
        },
    )
}

/// Refuses a tokenizer whose padding the model does not know.
fn belongs(tokenizer: &TextTokenizer, pad: u32, vocab: usize, model: &Path) -> Result<(), Failure> {
    if (pad as usize) < vocab {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{}: the tokenizer knows {} tokens and pads with {pad}, the model knows {vocab}; do they \
         belong together?",
        model.display(),
        tokenizer.vocab(),
    )))
}

/// The classes as the model numbers them, if its own head is for just these.
fn in_the_models_order(labels: Labels, model: &Path) -> Result<Labels, Failure> {
    let own = own_labels(&BertForSequenceClassification::read_config(model)?);
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names
    };
    Ok(match sorted(&own) == sorted(&labels.names) {
        true => Labels { names: own },
        false => labels,
    })
}

fn held_out(args: &TrainArgs) -> Result<Option<f64>, Failure> {
    match args.validation_split.map(f64::from) {
        None => Ok(None),
        Some(_) if args.validation_file.is_some() => {
            Err(Failure::new("--validation-split and --validation-file: give one of them"))
        }
        Some(share) if share > 0.0 && share < 1.0 => Ok(Some(share)),
        Some(share) => Err(Failure::new(format!(
            "--validation-split: expected a share between 0 and 1, found {share}"
        ))),
    }
}

fn causal(setup: &Setup) -> Result<(), Failure> {
    let args = &setup.args;
    let path = need(&args.train_file, "train-file")?;
    let tokenizer = TextTokenizer::load(&setup.model)?;
    let unit = text_unit(args.text_unit.as_deref())?;
    let loaded = LlamaForCausalLM::load(
        &setup.model,
        Precision::F32,
        setup.options.seed,
        &setup.device,
        |_| (),
    )?;
    let max_length = causal_length(args.max_length, loaded.model.max_positions())?;
    belongs(&tokenizer, tokenizer.pad, loaded.model.vocab(), &setup.model)?;
    let read = |path: &Path| -> Result<Vec<CausalItem>, Failure> {
        let (items, report) = read_causal(path, &tokenizer, max_length, unit)?;
        tell(&format!(
            "{}: {} documents, {} tokens in {} sequences, {} cut, {} left out",
            path.display(),
            report.documents,
            report.tokens,
            items.len(),
            report.cut,
            report.dropped
        ));
        for item in 0..items.len() {
            loaded
                .model
                .check(&causal_batch(&items, &[&[item]], tokenizer.pad).tokens, &Scope::plain())?;
        }
        Ok(items)
    };
    let mut train = read(path)?;
    let mut valid = args.validation_file.as_deref().map(read).transpose()?.unwrap_or_default();
    if let Some(share) = held_out(args)? {
        (train, valid) = hold_out(train, share, setup.options.seed).ok_or_else(|| {
            Failure::new(format!(
                "{}: too few sequences to hold {share} of them out",
                path.display()
            ))
        })?;
    }
    let test = args.test_file.as_deref().map(read).transpose()?;
    let packing = args.packing.unwrap_or(false);
    let pad = tokenizer.pad;
    let size = setup.options.per_device_eval_batch_size;
    let rows = |items: Vec<CausalItem>| {
        let rows = match packing {
            true => pack(&items, max_length),
            false => (0..items.len()).map(|item| vec![item]).collect(),
        };
        let length = |row: &Vec<usize>| row.iter().map(|&i| items[i].ids.len()).sum::<usize>();
        let lengths: Vec<usize> = rows.iter().map(length).collect();
        let make = move |picked: &[usize]| {
            let picked: Vec<&[usize]> = picked.iter().map(|&row| rows[row].as_slice()).collect();
            causal_batch(&items, &picked, pad)
        };
        (lengths, Arc::new(make) as Collate<_>)
    };
    let feed = |items: Vec<CausalItem>| {
        let (lengths, collate) = rows(items);
        EvalFeed::new(&lengths, size, collate)
    };
    let (lengths, collate) = rows(train);
    finish(
        setup,
        Prepared {
            train: TrainFeed::new(lengths, collate, &setup.options),
            valid: feed(valid),
            test: test.map(feed),
            loaded,
            saved: Vec::new(),
            labels: None,
        },
    )
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

/// Writes trained adapters, and files beside them.
type Save = dyn FnOnce(&Adapters<AnyAdapter>, &[(&str, Vec<u8>)]) -> Result<(), Failure>;

/// What a method makes of what was asked for.
struct Made {
    name: &'static str,
    faster: &'static [&'static str],
    summary: Summary,
    adapters: Adapters<AnyAdapter>,
    guide: Guide<AnyAdapter>,
    save: Box<Save>,
}

/// Tells a method the tokens of the text that it begins with, if it does.
fn tokenized<T: Method>(method: T, model: &Path) -> Result<T, Failure> {
    let Some((text, named)) = method.text() else { return Ok(method) };
    let folder = named.map_or_else(|| model.to_owned(), PathBuf::from);
    let ids = TextTokenizer::load(&folder)?.encode_whole(&[text], true)?.concat();
    Ok(method.tokenized(&ids, &folder.display().to_string()))
}

/// Makes adapters for the places of a model; `steps` is how many the training will have.
struct Make<'a> {
    setup: &'a Setup,
    saved: &'a [String],
    sites: &'a Sites,
    steps: usize,
    sample: &'a dyn Passes,
}

impl Job for Make<'_> {
    type Output = Result<Made, Failure>;

    fn run<T: Method>(self) -> Self::Output {
        let Self { setup, saved, sites, steps, sample } = self;
        let method: T = configure(&setup.args, &setup.fields, saved)?;
        let method = tokenized(method, &setup.model)?;
        let method = survey(method.planned(steps), sites, sample)?;
        let adapters = adapt(sites, &method, setup.options.seed, &setup.device.clone().autodiff())?;
        let guide = Guide::of(&method, &adapters)?;
        let guide = match setup.args.riemannian_reg {
            Some(delta) => guide.riemannian(T::PAIR, &adapters, delta.into())?,
            None => guide,
        };
        let guide = guide.erased();
        let summary = Summary::new(sites, &adapters);
        let erased = adapters.erased();
        let (sites, out) = (sites.clone(), setup.out.clone());
        let (task, model) = (setup.task.task_type(), setup.model.display().to_string());
        let save = move |adapters: &Adapters<AnyAdapter>, beside: &[(&str, Vec<u8>)]| {
            let Some(adapters) = adapters.typed() else {
                return Err(Failure::new("the training returned another method's adapters"));
            };
            let mut config = AdapterConfig::new(method.finished(&adapters));
            config.task_type = Some(task.into());
            config.base_model_name_or_path = Some(model);
            Ok(save_with(&out, &config, &sites, &adapters, beside)?)
        };
        let (name, faster) = (T::NAME, T::FASTER);
        Ok(Made { name, faster, summary, adapters: erased, guide, save: Box::new(save) })
    }
}

fn finish<B: Objective + Pretrained>(setup: &Setup, prepared: Prepared<B>) -> Result<(), Failure> {
    let (device, out) = (&setup.device, &setup.out);
    let base = Arc::new(prepared.loaded.model);
    let sites = Sites::of(&*base, Some(B::OUTPUT));
    let name = setup.args.method.as_deref().unwrap_or("lora");
    let steps = prepared.train.steps();
    let batches = setup.args.init_batches.unwrap_or(INIT_BATCHES);
    let sample = Sample::new(&*base, device, &prepared.train, batches);
    let (saved, sites, sample) = (&prepared.saved, &sites, &sample);
    let made = with_method(name, Make { setup, saved, sites, steps, sample })??;
    let Made { name, faster, summary, adapters, guide, save } = made;
    tell(summary.to_string().trim_end());
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
        faster,
        folder: Some(out.clone()),
        resume: setup.args.resume,
        stop,
    };
    let observer = Box::new((Console::new(), (metrics_file, kept.clone())));
    let fitted = run.fit(adapters, guide, observer)?;
    let events = kept.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let title = format!("{name} on {}", setup.model.display());
    burn_peft::train::plot::draw(&out.join("training.svg"), &title, &events)?;
    if fitted.interrupted {
        return Err(Failure::Interrupted);
    }

    let after = prepared
        .test
        .as_ref()
        .map(|test| scores(evaluated(&*base, test, device, &Scope::new(&fitted.adapters.valid()))));
    let mut beside = Vec::new();
    if let Some(labels) = &prepared.labels {
        beside.push((LABELS, json_bytes(LABELS, labels)?));
    }
    let (tokens, padded) = fitted.tokens;
    let padding = 1.0 - tokens as f64 / padded.max(1) as f64;
    let summary_json = json!({
        "trainable_parameters": summary.trainable,
        "total_parameters": summary.total,
        "train_seconds": fitted.seconds,
        "peak_memory_bytes": peak_memory(),
        "before": before,
        "after": after,
        "steps": fitted.steps,
        "best_step": fitted.best,
        "epochs": setup.options.num_train_epochs,
        "padding": padding,
    });
    beside.push((SUMMARY, json_bytes(SUMMARY, &summary_json)?));
    save(&fitted.adapters, &beside)?;
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
