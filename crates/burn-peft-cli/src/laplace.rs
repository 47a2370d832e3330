//! `burn-peft laplace`, and the answers of a classifier with and without what it fits.

use crate::args::{LaplaceArgs, ModelArgs};
use crate::evaluate::{Reads, Source, size};
use crate::failure::{Failure, print};
use crate::model::{Bert, Dinov2, Ready, Task, Vision, Vit, classifier};
use burn_peft::core::{Product, Scope};
use burn_peft::models::Classifier;
use burn_peft::train::calibration::softmax;
use burn_peft::train::laplace::{Posterior, Settings};
use serde_json::json;
use std::path::Path;

/// An adapter's folder and its factors by path.
type Factors<'a> = (&'a Path, Vec<(String, Product)>);

/// Those of the one adapter that there may be.
fn factors<'a, M>(args: &'a ModelArgs, ready: &Ready<M>) -> Result<Factors<'a>, Failure> {
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

pub(crate) fn no_classifier() -> Failure {
    Failure::new("laplace is for classifiers; this is a causal model")
}

pub(crate) fn fit(args: &LaplaceArgs) -> Result<(), Failure> {
    match Task::of(&args.model.model, args.model.task.as_deref())? {
        Task::Classification => fit_to::<Bert>(args),
        Task::Images(Vision::Vit) => fit_to::<Vit>(args),
        Task::Images(Vision::Dinov2) => fit_to::<Dinov2>(args),
        Task::CausalLm => Err(no_classifier()),
    }
}

fn fit_to<M: Reads>(args: &LaplaceArgs) -> Result<(), Failure> {
    let source = Source {
        model: &args.model.model,
        path: &args.train_file,
        columns: &args.columns,
        max_length: args.max_length,
        size: size(args.per_device_eval_batch_size)?,
    };
    let (ready, names, classes) = classifier::<M>(&args.model)?;
    classes.check()?;
    ready.refuse_fresh(&args.model.model)?;
    let (folder, products) = factors(&args.model, &ready)?;
    let feed = M::labelled(&ready, &source, names)?;
    let settings =
        Settings { n_kfac: args.n_kfac, prior_precision: args.prior_precision.map(f64::from) };
    let batches = feed.batches().map(|(_, batch)| (batch.input, batch.labels));
    let overlay = ready.overlay();
    let forward = |input: &M::Input, cx: &Scope<'_>| ready.model.forward(input, cx);
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
pub(crate) fn posterior<M>(args: &ModelArgs, ready: &Ready<M>) -> Result<Posterior, Failure> {
    let (folder, products) = factors(args, ready)?;
    Ok(Posterior::load(folder, products)?)
}

/// The probabilities of the classes of each thing in a batch: as trained, or as the posterior has them.
pub(crate) fn probabilities<M: Classifier>(
    ready: &Ready<M>,
    posterior: Option<&Posterior>,
    input: &M::Input,
) -> Result<Vec<Vec<f64>>, Failure> {
    let overlay = ready.overlay();
    let forward = |cx: &Scope<'_>| ready.model.forward(input, cx);
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
