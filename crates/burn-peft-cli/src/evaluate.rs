//! `burn-peft eval`, `predict` and `embed`.

use crate::args::{ColumnArgs, EmbedArgs, EvalArgs, PredictArgs, TextArgs};
use crate::failure::{Failure, print};
use crate::images;
use crate::laplace::{no_classifier, posterior, probabilities};
use crate::model::{Bert, Dinov2, Ready, Task, Vision, Vit, causal, causal_length, classifier};
use crate::options::text_unit;
use burn::tensor::Tensor;
use burn_peft::core::{Scope, write_tensors};
use burn_peft::models::{Classifier, Tokens};
use burn_peft::train::calibration::Scores;
use burn_peft::train::data::{
    CausalBatch, ClassBatch, ClassItem, Columns, Encoded, Example, Labels, TextTokenizer,
    causal_batch, class_batch, pad, read_causal, read_labelled, read_texts,
};
use burn_peft::train::laplace::Posterior;
use burn_peft::train::{EvalFeed, Objective, Report, measure};
use serde_json::{Value, json};
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

/// Where labelled data are, and how they are read.
pub(crate) struct Source<'a> {
    pub(crate) model: &'a Path,
    pub(crate) path: &'a Path,
    pub(crate) columns: &'a ColumnArgs,
    pub(crate) max_length: usize,
    /// Examples of a batch.
    pub(crate) size: usize,
}

/// A classifier that reads its data out of files.
pub(crate) trait Reads:
    Classifier + Objective<Batch = ClassBatch<<Self as Classifier>::Input>>
{
    /// Labelled data in batches, each of which the model can take.
    fn labelled(
        ready: &Ready<Self>,
        source: &Source<'_>,
        names: Vec<String>,
    ) -> Result<EvalFeed<ClassBatch<Self::Input>>, Failure>;
}

impl Reads for Bert {
    fn labelled(
        ready: &Ready<Self>,
        source: &Source<'_>,
        names: Vec<String>,
    ) -> Result<EvalFeed<ClassBatch>, Failure> {
        let tokenizer = TextTokenizer::load(source.model)?;
        let padding = tokenizer.pad;
        let examples = read_labelled(source.path, &source.columns.columns())?;
        let labels = Labels { names };
        let id = |example: &Example| labels.id(source.path, example);
        let ids = examples.iter().map(id).collect::<Result<Vec<_>, _>>()?;
        let encoded = encode(&tokenizer, &examples, source.max_length)?;
        let lengths: Vec<usize> = encoded.iter().map(|item| item.ids.len()).collect();
        let items: Vec<ClassItem> = encoded
            .into_iter()
            .zip(ids)
            .map(|(e, label)| ClassItem { ids: e.ids, type_ids: e.type_ids, label })
            .collect();
        let make = move |picked: &[usize]| class_batch(&items, picked, padding);
        let feed = EvalFeed::new(&lengths, source.size, Arc::new(make));
        for (_, batch) in feed.batches() {
            ready.model.check(&batch.input, &Scope::new(&ready.overlay()))?;
        }
        Ok(feed)
    }
}

pub(crate) fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let result = match Task::of(&args.model.model, args.model.task.as_deref())? {
        Task::Classification => eval_classes::<Bert>(args)?,
        Task::Images(Vision::Vit) => eval_classes::<Vit>(args)?,
        Task::Images(Vision::Dinov2) => eval_classes::<Dinov2>(args)?,
        Task::CausalLm => eval_causal(args)?,
    };
    print(&format!("{result}\n"))
}

fn eval_classes<M: Reads>(args: &EvalArgs) -> Result<Value, Failure> {
    let source = Source {
        model: &args.model.model,
        path: &args.test_file,
        columns: &args.columns,
        max_length: args.max_length.unwrap_or(128),
        size: size(args.per_device_eval_batch_size)?,
    };
    let (ready, names, classes) = classifier::<M>(&args.model)?;
    classes.check()?;
    ready.refuse_fresh(&args.model.model)?;
    let posterior = args.laplace.then(|| posterior(&args.model, &ready)).transpose()?;
    let feed = M::labelled(&ready, &source, names)?;
    let (mut shares, mut labels) = (Vec::new(), Vec::new());
    for (_, batch) in feed.batches() {
        shares.extend(probabilities(&ready, posterior.as_ref(), &batch.input)?);
        labels.extend(batch.labels);
    }
    let scores = Scores::of(&shares, &labels);
    Ok(json!({
        "loss": scores.loss, "accuracy": scores.accuracy, "ece": scores.ece,
        "targets": labels.len(),
    }))
}

fn eval_causal(args: &EvalArgs) -> Result<Value, Failure> {
    let size = size(args.per_device_eval_batch_size)?;
    if args.laplace {
        return Err(no_classifier());
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
    Ok(json!({
        "loss": report.loss, "accuracy": report.accuracy(), "targets": report.targets,
        "perplexity": report.loss.exp(),
    }))
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
    ready: &Ready<Bert>,
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

/// A classifier that says what it takes things for.
pub(crate) struct Answers<M> {
    pub(crate) ready: Ready<M>,
    labels: Vec<String>,
    posterior: Option<Posterior>,
}

impl<M: Classifier> Answers<M> {
    pub(crate) fn new(args: &PredictArgs) -> Result<Self, Failure> {
        let (ready, labels, classes) = classifier::<M>(&args.model)?;
        classes.check()?;
        ready.refuse_fresh(&args.model.model)?;
        let posterior = args.laplace.then(|| posterior(&args.model, &ready)).transpose()?;
        Ok(Self { ready, labels, posterior })
    }

    /// A line for each thing of a batch, which is `what` by these names.
    pub(crate) fn print<'a>(
        &self,
        what: &str,
        names: impl Iterator<Item = &'a str>,
        batch: &M::Input,
    ) -> Result<(), Failure> {
        let shares = probabilities(&self.ready, self.posterior.as_ref(), batch)?;
        for (name, row) in names.zip(shares) {
            let row: Vec<f32> = row.into_iter().map(|share| share as f32).collect();
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            let all: serde_json::Map<_, _> =
                self.labels.iter().cloned().zip(row.iter().map(|share| json!(share))).collect();
            let line = json!({
                what: name, "label": self.labels[best], "score": row[best], "scores": all,
            });
            print(&format!("{line}\n"))?;
        }
        Ok(())
    }
}

pub(crate) fn predict(args: &PredictArgs) -> Result<(), Failure> {
    match Task::of(&args.model.model, args.model.task.as_deref())? {
        Task::Classification => predict_texts(args),
        Task::Images(Vision::Vit) => images::predict::<Vit>(args),
        Task::Images(Vision::Dinov2) => images::predict::<Dinov2>(args),
        Task::CausalLm => Err(Failure::new(
            "predict labels texts and images; for a causal model use burn-peft generate",
        )),
    }
}

fn predict_texts(args: &PredictArgs) -> Result<(), Failure> {
    if !args.image.is_empty() {
        return Err(Failure::new("--image: this is a model of texts; give --text or --test-file"));
    }
    let size = size(args.texts.per_device_eval_batch_size)?;
    let examples = given(&args.texts)?;
    let answers = Answers::<Bert>::new(args)?;
    let batches = batches(&answers.ready, &args.model.model, &args.texts, &examples)?;
    for (texts, tokens) in examples.chunks(size).zip(&batches) {
        answers.print("text", texts.iter().map(|example| &*example.text), tokens)?;
    }
    Ok(())
}

pub(crate) fn embed(args: &EmbedArgs) -> Result<(), Failure> {
    let task = Task::of(&args.model.model, args.model.task.as_deref())?;
    if task != Task::Classification {
        let found = task.name();
        return Err(Failure::new(format!(
            "embed takes the hidden states of BERT; this model is for {found}"
        )));
    }
    let examples = given(&args.texts)?;
    // A head that nobody trained is no harm: the embeddings are made below it.
    let (ready, ..) = classifier::<Bert>(&args.model)?;
    let overlay = ready.overlay();
    let cx = Scope::new(&overlay);
    let parts = batches(&ready, &args.model.model, &args.texts, &examples)?;
    let embed = |tokens: &Tokens| ready.model.encoder().embed(tokens, &cx.at("bert"));
    let parts = parts.iter().map(|tokens| embed(tokens).without_autodiff()).collect();
    let whole = Tensor::cat(parts, 0).into_data().convert::<f32>();
    Ok(write_tensors(&args.output, [("embeddings".to_owned(), &whole)])?)
}
