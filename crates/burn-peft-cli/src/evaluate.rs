//! `burn-peft eval` and `burn-peft predict`.

use crate::args::{ColumnArgs, EvalArgs, PredictArgs};
use crate::failure::{Failure, print};
use crate::model::{Task, causal, causal_length, classifier};
use crate::options::text_unit;
use burn::tensor::activation::softmax;
use burn_peft::core::Scope;
use burn_peft::train::data::{
    CausalBatch, ClassBatch, ClassItem, Columns, Encoded, Example, Labels, TextTokenizer,
    causal_batch, class_batch, pad, read_causal, read_labelled, read_texts,
};
use burn_peft::train::{EvalFeed, Objective, Report, measure};
use serde_json::json;
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

fn size(asked: usize) -> Result<usize, Failure> {
    match asked {
        0 => Err(Failure::new("--per-device-eval-batch-size: expected 1 or more, found 0")),
        size => Ok(size),
    }
}

pub(crate) fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let size = size(args.per_device_eval_batch_size)?;
    let tokenizer = TextTokenizer::load(&args.model.model)?;
    let padding = tokenizer.pad;
    let task = Task::of(&args.model.model, args.model.task.as_deref())?;
    let report = match task {
        Task::Classification => {
            let (ready, names, config) = classifier(&args.model)?;
            config.check_classes()?;
            ready.refuse_fresh(&args.model.model)?;
            let examples = read_labelled(&args.test_file, &args.columns.columns())?;
            let labels = Labels { names };
            let ids = examples.iter().map(|e| labels.id(&args.test_file, e));
            let ids = ids.collect::<Result<Vec<_>, _>>()?;
            let encoded = encode(&tokenizer, &examples, args.max_length.unwrap_or(128))?;
            let lengths: Vec<usize> = encoded.iter().map(|item| item.ids.len()).collect();
            let items: Vec<ClassItem> = encoded
                .into_iter()
                .zip(ids)
                .map(|(e, label)| ClassItem { ids: e.ids, type_ids: e.type_ids, label })
                .collect();
            let make = move |picked: &[usize]| class_batch(&items, picked, padding);
            let feed = EvalFeed::new(&lengths, size, Arc::new(make));
            let check = |batch: &ClassBatch| ready.model.check(&batch.tokens);
            total(&ready.model, &feed, &ready.device, &Scope::new(&ready.overlay()), check)?
        }
        Task::CausalLm => {
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
            let check = |batch: &CausalBatch| ready.model.check(&batch.tokens);
            total(&ready.model, &feed, &ready.device, &Scope::new(&ready.overlay()), check)?
        }
    };
    let mut result = json!({
        "loss": report.loss, "accuracy": report.accuracy(), "targets": report.targets,
    });
    if task == Task::CausalLm {
        result["perplexity"] = json!(report.loss.exp());
    }
    print(&format!("{result}\n"))
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

pub(crate) fn predict(args: &PredictArgs) -> Result<(), Failure> {
    let size = size(args.per_device_eval_batch_size)?;
    if Task::of(&args.model.model, args.model.task.as_deref())? != Task::Classification {
        return Err(Failure::new(
            "predict labels texts; for a causal model use burn-peft generate",
        ));
    }
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
        return Err(Failure::new("nothing to label: give --text or --test-file"));
    }
    let (ready, labels, config) = classifier(&args.model)?;
    config.check_classes()?;
    ready.refuse_fresh(&args.model.model)?;
    let tokenizer = TextTokenizer::load(&args.model.model)?;
    let encoded = encode(&tokenizer, &examples, args.max_length)?;
    let overlay = ready.overlay();
    let batch = |rows: &[Encoded]| {
        let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|e| (&*e.ids, &*e.type_ids)).collect();
        pad(&rows, tokenizer.pad)
    };
    for rows in encoded.chunks(size) {
        ready.model.check(&batch(rows))?;
    }
    for (texts, rows) in examples.chunks(size).zip(encoded.chunks(size)) {
        let tokens = batch(rows);
        let logits = ready.model.forward(&tokens, &Scope::new(&overlay)).without_autodiff();
        let shares = softmax(logits, 1).into_data().convert::<f32>();
        let shares = shares.as_slice::<f32>().unwrap_or_default();
        for (example, row) in texts.iter().zip(shares.chunks(labels.len())) {
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
