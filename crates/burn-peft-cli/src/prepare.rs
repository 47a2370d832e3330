//! Data and model of a training of texts, ready for what is the same for all.

use crate::failure::{Failure, tell};
use crate::model::{Bert, causal_length};
use crate::options::{need, text_unit};
use crate::train::{Setup, finish};
use burn_peft::core::Scope;
use burn_peft::models::{Classifier, LlamaForCausalLM, Loaded, Pretrained};
use burn_peft::train::data::{
    CausalItem, ClassItem, Columns, Encoded, Example, Labels, TextTokenizer, causal_batch,
    class_batch, hold_out, pack, read_causal, read_labelled,
};
use burn_peft::train::{Collate, EvalFeed, Objective, TrainFeed};
use std::path::Path;
use std::sync::Arc;

/// What a task hands to the part that is the same for all.
pub(crate) struct Prepared<B: Objective + Pretrained> {
    pub(crate) loaded: Loaded<B>,
    pub(crate) train: TrainFeed<B::Batch>,
    pub(crate) valid: EvalFeed<B::Batch>,
    pub(crate) test: Option<EvalFeed<B::Batch>>,
    /// Layers that must be trained whole.
    pub(crate) saved: Vec<String>,
    pub(crate) labels: Option<Vec<String>>,
}

/// A classifier for so many classes, and its layers that must be trained whole.
pub(crate) fn with_classes<M: Classifier>(
    setup: &Setup,
    count: usize,
) -> Result<(Loaded<M>, Vec<String>), Failure> {
    let edit = |config: &mut M::Config| M::classes_mut(config).resize(count);
    let seed = setup.options.seed;
    let loaded = M::load(&setup.model, setup.precision, seed, &setup.device, edit)?;
    // Whatever nobody trained before is trained now, and travels with the adapter.
    let fresh = |name: &String| name.rsplit_once('.').map(|(place, _)| place.to_owned());
    let mut saved: Vec<String> = loaded.fresh.iter().filter_map(fresh).collect();
    saved.push(M::OUTPUT.into());
    saved.sort();
    saved.dedup();
    Ok((loaded, saved))
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
    let item = |(e, label): (Encoded, i32)| ClassItem { ids: e.ids, type_ids: e.type_ids, label };
    Ok(Arc::new(encoded.into_iter().zip(ids).map(item).collect()))
}

pub(crate) fn texts(setup: &Setup) -> Result<(), Failure> {
    let args = &setup.args;
    let path = need(&args.train_file, "train-file")?;
    let columns = Columns {
        text: args.text_column.clone().unwrap_or("text".into()),
        text_pair: args.text_pair_column.clone(),
        label: args.label_column.clone().unwrap_or("label".into()),
    };
    let examples = read_labelled(path, &columns)?;
    let labels = Labels::of(path, examples.iter().map(|example| &example.label))?;
    let labels = in_the_models_order::<Bert>(labels, &setup.model)?;
    let valid = match &args.validation_file {
        Some(file) => read_labelled(file, &columns)?,
        None => Vec::new(),
    };
    let (examples, valid) = held_out(setup, path, examples, valid, "examples")?;
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
    let (loaded, saved): (Loaded<Bert>, _) = with_classes(setup, labels.names.len())?;
    belongs(&tokenizer, pad, loaded.model.vocab(), &setup.model)?;
    for item in [Some(&train), Some(&valid), test.as_ref()].into_iter().flatten().flat_map(|i| &**i)
    {
        loaded
            .model
            .check(&class_batch(std::slice::from_ref(item), &[0], pad).input, &Scope::plain())?;
    }
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
pub(crate) fn in_the_models_order<M: Classifier>(
    labels: Labels,
    model: &Path,
) -> Result<Labels, Failure> {
    let own = M::classes(&M::read_config(model)?).names();
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

/// Data to train on and to validate with: as they were given, or a share of the first for the second.
pub(crate) fn held_out<T>(
    setup: &Setup,
    path: &Path,
    train: Vec<T>,
    valid: Vec<T>,
    what: &str,
) -> Result<(Vec<T>, Vec<T>), Failure> {
    let args = &setup.args;
    let share = match args.validation_split.map(f64::from) {
        None => return Ok((train, valid)),
        Some(_) if args.validation_file.is_some() => {
            return Err(Failure::new("--validation-split and --validation-file: give one of them"));
        }
        Some(share) if share > 0.0 && share < 1.0 => share,
        Some(share) => {
            return Err(Failure::new(format!(
                "--validation-split: expected a share between 0 and 1, found {share}"
            )));
        }
    };
    hold_out(train, share, setup.options.seed).ok_or_else(|| {
        let place = path.display();
        Failure::new(format!("{place}: too few {what} to hold {share} of them out"))
    })
}

pub(crate) fn causal(setup: &Setup) -> Result<(), Failure> {
    let args = &setup.args;
    let path = need(&args.train_file, "train-file")?;
    let tokenizer = TextTokenizer::load(&setup.model)?;
    let unit = text_unit(args.text_unit.as_deref())?;
    let loaded = LlamaForCausalLM::load(
        &setup.model,
        setup.precision,
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
    let train = read(path)?;
    let valid = args.validation_file.as_deref().map(read).transpose()?.unwrap_or_default();
    let (train, valid) = held_out(setup, path, train, valid, "sequences")?;
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
