//! `burn-peft laplace`, and the answers of a classifier with and without what it fits.

use crate::args::{LaplaceArgs, ModelArgs};
use crate::evaluate::{labelled, size};
use crate::failure::{Failure, print};
use crate::model::{Ready, Task, classifier};
use burn_peft::core::{Product, Scope};
use burn_peft::models::{BertForSequenceClassification, Tokens};
use burn_peft::train::calibration::softmax;
use burn_peft::train::laplace::{Posterior, Settings};
use serde_json::json;
use std::path::Path;

type Classifier = Ready<BertForSequenceClassification>;

/// An adapter's folder and its factors by path.
type Factors<'a> = (&'a Path, Vec<(String, Product)>);

/// Those of the one adapter that there may be.
fn factors<'a>(args: &'a ModelArgs, ready: &Classifier) -> Result<Factors<'a>, Failure> {
    match (args.adapter.as_slice(), ready.adapters.as_slice()) {
        ([folder], [adapters]) => Ok((folder, adapters.products()?)),
        (_, all) => {
            let found = all.len();
            Err(Failure::new(format!(
                "a posterior is one adapter's; expected one --adapter, found {found}"
            )))
        }
    }
}

pub(crate) fn refuse_causal(args: &ModelArgs) -> Result<(), Failure> {
    match Task::of(&args.model, args.task.as_deref())? {
        Task::Classification => Ok(()),
        Task::CausalLm => {
            Err(Failure::new("laplace is for classifiers of texts; this is a causal model"))
        }
    }
}

pub(crate) fn fit(args: &LaplaceArgs) -> Result<(), Failure> {
    let size = size(args.per_device_eval_batch_size)?;
    refuse_causal(&args.model)?;
    let (ready, names, config) = classifier(&args.model)?;
    config.check_classes()?;
    ready.refuse_fresh(&args.model.model)?;
    let (folder, products) = factors(&args.model, &ready)?;
    let model = &args.model.model;
    let feed =
        labelled(&ready, model, &args.train_file, &args.columns, names, args.max_length, size)?;
    let settings =
        Settings { n_kfac: args.n_kfac, prior_precision: args.prior_precision.map(f64::from) };
    let batches = feed.batches().map(|(_, batch)| (batch.tokens, batch.labels));
    let overlay = ready.overlay();
    let forward = |tokens: &Tokens, cx: &Scope<'_>| ready.model.forward(tokens, cx);
    let posterior = Posterior::fit(products, overlay, batches, forward, settings)?;
    posterior.save(folder)?;
    let precision = posterior.prior_precision();
    let result = json!({
        "prior_precision": precision,
        "evidence": posterior.evidence(precision),
        "decided_parameters": posterior.decided(precision),
        "examples": posterior.examples(),
    });
    print(&format!("{result}\n"))
}

/// The posterior beside the adapter.
pub(crate) fn posterior(args: &ModelArgs, ready: &Classifier) -> Result<Posterior, Failure> {
    let (folder, products) = factors(args, ready)?;
    Ok(Posterior::load(folder, products)?)
}

/// The probabilities of the classes of each text: as trained, or as the posterior has them.
pub(crate) fn probabilities(
    ready: &Classifier,
    posterior: Option<&Posterior>,
    tokens: &Tokens,
) -> Result<Vec<Vec<f64>>, Failure> {
    let overlay = ready.overlay();
    let forward = |cx: &Scope<'_>| ready.model.forward(tokens, cx);
    match posterior {
        Some(posterior) => Ok(posterior.logits(overlay, &forward)?.probabilities()),
        None => {
            let logits = forward(&Scope::new(&overlay)).without_autodiff();
            let [_, classes] = logits.dims();
            let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
            let rows: Vec<Vec<f64>> = logits.chunks(classes.max(1)).map(<[f64]>::to_vec).collect();
            Ok(softmax(&rows))
        }
    }
}
