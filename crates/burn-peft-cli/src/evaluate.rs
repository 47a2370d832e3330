//! `burn-peft eval`, `predict` and `embed`.

use crate::args::{ColumnArgs, EmbedArgs, EvalArgs, PredictArgs, TextArgs};
use crate::failure::{Failure, print};
use crate::laplace::{posterior, probabilities, refuse_causal};
use crate::model::{Ready, Task, causal, causal_length, classifier};
use crate::options::text_unit;
use burn::tensor::Tensor;
use burn_peft::core::{Scope, write_tensors};
use burn_peft::models::{BertForSequenceClassification, Tokens};
use burn_peft::train::calibration::Scores;
use burn_peft::train::data::{
    CausalBatch, ClassBatch, ClassItem, Columns, Encoded, Example, Labels, TextTokenizer,
    causal_batch, class_batch, pad, read_causal, read_labelled, read_texts,
};
use burn_peft::train::{EvalFeed, Objective, Report, measure};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

impl ColumnArgs {
    fn columns(&self) -> Columns {
        Columns {
            text: self.text_column.clone(),
            text_pair: self.text_pair_column.clone(),
            label: self.label_column.clone(),
        }
    }
}

pub(crate) fn size(asked: usize) -> Result<usize, Failure> {
    match asked {
        0 => Err(Failure::new("--per-device-eval-batch-size: expected 1 or more, found 0")),
        size => Ok(size),
    }
}

pub(crate) fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let size = size(args.per_device_eval_batch_size)?;
    let task = Task::of(&args.model.model, args.model.task.as_deref())?;
    let result = match task {
        Task::Classification => {
            let (ready, names, config) = classifier(&args.model)?;
            config.check_classes()?;
            ready.refuse_fresh(&args.model.model)?;
            let posterior = args.laplace.then(|| posterior(&args.model, &ready)).transpose()?;
            let (model, max_length) = (&args.model.model, args.max_length.unwrap_or(128));
            let feed =
                labelled(&ready, model, &args.test_file, &args.columns, names, max_length, size)?;
            let (mut shares, mut labels) = (Vec::new(), Vec::new());
            for (_, batch) in feed.batches() {
                shares.extend(probabilities(&ready, posterior.as_ref(), &batch.tokens)?);
                labels.extend(batch.labels);
            }
            let scores = Scores::of(&shares, &labels);
            json!({
                "loss": scores.loss, "accuracy": scores.accuracy, "ece": scores.ece,
                "targets": labels.len(),
            })
        }
        Task::CausalLm => {
            if args.laplace {
                refuse_causal(&args.model)?;
            }
            let tokenizer = TextTokenizer::load(&args.model.model)?;
            let padding = tokenizer.pad;
            let unit = text_unit(args.text_unit.as_deref())?;
            let ready = causal(&args.model)?;
            let length = causal_length(args.max_length, ready.model.max_positions())?;
            let (items, _) = read_causal(&args.test_file, &tokenizer, length, unit)?;
            let lengths: Vec<usize> = items.iter().map(|item| item.ids.len()).collect();
            let make = move |picked: &[usize]| {
                let rows: Vec<&[usize]> = picked.chunks(1).collect();
                causal_batch(&items, &rows, padding)
            };
            let feed = EvalFeed::new(&lengths, size, Arc::new(make));
            let overlay = ready.overlay();
            let cx = Scope::new(&overlay);
            let check = |batch: &CausalBatch| ready.model.check(&batch.tokens, &cx);
            let report = total(&ready.model, &feed, &ready.device, &cx, check)?;
            json!({
                "loss": report.loss, "accuracy": report.accuracy(), "targets": report.targets,
                "perplexity": report.loss.exp(),
            })
        }
    };
    print(&format!("{result}\n"))
}

/// Labelled texts in batches, each of which the model can take.
pub(crate) fn labelled(
    ready: &Ready<BertForSequenceClassification>,
    model: &Path,
    path: &Path,
    columns: &ColumnArgs,
    names: Vec<String>,
    max_length: usize,
    size: usize,
) -> Result<EvalFeed<ClassBatch>, Failure> {
    let tokenizer = TextTokenizer::load(model)?;
    let padding = tokenizer.pad;
    let examples = read_labelled(path, &columns.columns())?;
    let labels = Labels { names };
    let ids = examples.iter().map(|e| labels.id(path, e)).collect::<Result<Vec<_>, _>>()?;
    let encoded = encode(&tokenizer, &examples, max_length)?;
    let lengths: Vec<usize> = encoded.iter().map(|item| item.ids.len()).collect();
    let items: Vec<ClassItem> = encoded
        .into_iter()
        .zip(ids)
        .map(|(e, label)| ClassItem { ids: e.ids, type_ids: e.type_ids, label })
        .collect();
    let make = move |picked: &[usize]| class_batch(&items, picked, padding);
    let feed = EvalFeed::new(&lengths, size, Arc::new(make));
    for (_, batch) in feed.batches() {
        ready.model.check(&batch.tokens, &Scope::new(&ready.overlay()))?;
    }
    Ok(feed)
}

fn total<B: Objective>(
    base: &B,
    feed: &EvalFeed<B::Batch>,
    device: &burn::tensor::Device,
    cx: &Scope<'_>,
    check: impl Fn(&B::Batch) -> Result<(), burn_peft::core::Error>,
) -> Result<Report, Failure> {
    let mut sum = Report::default();
    for (_, batch) in feed.batches() {
        check(&batch)?;
        sum = sum.and(measure(base, &batch, device, cx));
    }
    Ok(sum)
}

fn encode(
    tokenizer: &TextTokenizer,
    examples: &[Example],
    max_length: usize,
) -> Result<Vec<Encoded>, Failure> {
    let texts: Vec<_> = examples.iter().map(|e| (&*e.text, e.text_pair.as_deref())).collect();
    Ok(tokenizer.encode(&texts, max_length)?)
}

/// The texts that were given, those of the file first.
fn given(args: &TextArgs) -> Result<Vec<Example>, Failure> {
    let mut examples = match &args.test_file {
        Some(file) => read_texts(file, &args.columns.columns())?,
        None => Vec::new(),
    };
    let own = |text: &String| Example {
        text: text.clone(),
        text_pair: None,
        label: String::new(),
        line: 0,
    };
    examples.extend(args.text.iter().map(own));
    if examples.is_empty() {
        return Err(Failure::new("no texts: give --text or --test-file"));
    }
    Ok(examples)
}

/// Texts as batches, in their order, each of which the model can take.
fn batches(
    ready: &Ready<BertForSequenceClassification>,
    model: &Path,
    args: &TextArgs,
    examples: &[Example],
) -> Result<Vec<Tokens>, Failure> {
    let tokenizer = TextTokenizer::load(model)?;
    let encoded = encode(&tokenizer, examples, args.max_length)?;
    let batch = |rows: &[Encoded]| {
        let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|e| (&*e.ids, &*e.type_ids)).collect();
        let tokens = pad(&rows, tokenizer.pad);
        ready.model.check(&tokens, &Scope::new(&ready.overlay()))?;
        Ok(tokens)
    };
    encoded.chunks(size(args.per_device_eval_batch_size)?).map(batch).collect()
}

pub(crate) fn predict(args: &PredictArgs) -> Result<(), Failure> {
    let size = size(args.texts.per_device_eval_batch_size)?;
    if Task::of(&args.model.model, args.model.task.as_deref())? != Task::Classification {
        return Err(Failure::new(
            "predict labels texts; for a causal model use burn-peft generate",
        ));
    }
    let examples = given(&args.texts)?;
    let (ready, labels, config) = classifier(&args.model)?;
    config.check_classes()?;
    ready.refuse_fresh(&args.model.model)?;
    let posterior = args.laplace.then(|| posterior(&args.model, &ready)).transpose()?;
    let batches = batches(&ready, &args.model.model, &args.texts, &examples)?;
    for (texts, tokens) in examples.chunks(size).zip(&batches) {
        let shares = probabilities(&ready, posterior.as_ref(), tokens)?;
        for (example, row) in texts.iter().zip(shares) {
            let row: Vec<f32> = row.into_iter().map(|share| share as f32).collect();
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            let all: serde_json::Map<_, _> =
                labels.iter().cloned().zip(row.iter().map(|share| json!(share))).collect();
            let line = json!({
                "text": example.text, "label": labels[best], "score": row[best], "scores": all,
            });
            print(&format!("{line}\n"))?;
        }
    }
    Ok(())
}

pub(crate) fn embed(args: &EmbedArgs) -> Result<(), Failure> {
    if Task::of(&args.model.model, args.model.task.as_deref())? != Task::Classification {
        return Err(Failure::new("embed takes the hidden states of BERT; this is a causal model"));
    }
    let examples = given(&args.texts)?;
    // A head that nobody trained is no harm: the embeddings are made below it.
    let (ready, ..) = classifier(&args.model)?;
    let overlay = ready.overlay();
    let cx = Scope::new(&overlay);
    let parts = batches(&ready, &args.model.model, &args.texts, &examples)?;
    let embed = |tokens: &Tokens| ready.model.encoder().embed(tokens, &cx.at("bert"));
    let parts = parts.iter().map(|tokens| embed(tokens).without_autodiff()).collect();
    let whole = Tensor::cat(parts, 0).into_data().convert::<f32>();
    Ok(write_tensors(&args.output, [("embeddings".to_owned(), &whole)])?)
}
