//! How the loss slopes at every number of the chosen places, and how far a full fine-tuning takes it.

use crate::copy::leaf;
use crate::{Adapters, Finding, Overlay, Part, Passes, Scope, Site, TrainedCopy, Value};
use burn::module::Param;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Gradients, Tensor};
use std::collections::BTreeMap;

/// A full fine-tuning over the batches: AdamW without decay, its rate falling in a straight line to zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Rate of the first step.
    pub learning_rate: f64,
    /// How often each batch is met.
    pub epochs: usize,
}

/// What was found of the numbers of one parameter, in the order of the base's weight read as a matrix
/// `[fan_in, fan_out]`, row by row.
#[derive(Debug, Clone)]
pub struct Slope {
    /// Mean of the gradients of the loss, `[n]`.
    pub mean: Tensor<1>,
    /// Mean of their squares, `[n]`: the empirical Fisher information where each is of one example.
    pub square: Tensor<1>,
    /// How far each number went, `[n]`, where there was a [`Tuning`].
    pub change: Option<Tensor<1>>,
}

/// [`Slope`] of the parameters of one place.
#[derive(Debug, Clone)]
pub struct Slopes {
    /// Of its weight, if that was looked at.
    pub weight: Option<Slope>,
    /// Of its bias, if there is one.
    pub bias: Option<Slope>,
}

impl Slopes {
    pub(crate) fn is_finite(&self) -> bool {
        let finite = |t: &Tensor<1>| t.clone().is_finite().all().into_scalar::<bool>();
        [&self.weight, &self.bias].into_iter().flatten().all(|slope| {
            finite(&slope.mean) && finite(&slope.square) && slope.change.as_ref().is_none_or(finite)
        })
    }
}

/// Whether a place has what is looked at.
pub(crate) fn has(site: &Site, part: Part) -> bool {
    part == Part::Whole || site.bias.is_some()
}

fn copy(site: &Site, part: Part) -> TrainedCopy {
    let device = site.device().autodiff();
    let whole = part == Part::Whole;
    let single = |vector: &Tensor<1>| leaf(vector.clone().cast(DType::F32), &device);
    TrainedCopy {
        weight: site.matrix().filter(|_| whole).map(|w| leaf(w.cast(DType::F32), &device)),
        scale: match &site.weight {
            Value::D1(scale) if whole => Some(single(scale)),
            _ => None,
        },
        bias: site.bias.as_ref().map(single),
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let count = tensor.dims().iter().product::<usize>();
    tensor.without_autodiff().reshape([count])
}

fn gradient<const D: usize>(
    param: Option<&Param<Tensor<D>>>,
    gradients: &Gradients,
) -> Option<Tensor<1>> {
    param?.val().grad(gradients).map(flat)
}

/// Sums of gradients and of their squares.
type Sums = BTreeMap<(String, bool), [Tensor<1>; 2]>;

fn add(sums: &mut Sums, path: &str, bias: bool, gradient: Option<Tensor<1>>) {
    let Some(gradient) = gradient else { return };
    let now = [gradient.clone(), gradient.square()];
    let sum = match sums.remove(&(path.to_owned(), bias)) {
        None => now,
        Some([mean, square]) => {
            let [first, second] = now;
            [mean + first, square + second]
        }
    };
    sums.insert((path.to_owned(), bias), sum);
}

/// The `count` examples with the highest losses, the highest first and of equals the first, of a model with
/// `over` laid over it; all where there are fewer.
pub fn hardest(passes: &dyn Passes, count: usize, over: &dyn Overlay) -> Vec<usize> {
    let loss = |at: usize| passes.example_loss(at, &Scope::new(&over)).into_scalar::<f32>();
    let losses: Vec<f32> = (0..passes.examples()).map(loss).collect();
    let mut order: Vec<usize> = (0..losses.len()).collect();
    order.sort_by(|&a, &b| losses[b].total_cmp(&losses[a]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

/// The [`Slopes`] at `sites`, as their numbers stand there, over these examples one at a time, with `beside` laid
/// over the other places of the model. A place that no example reaches is left out.
pub fn slopes_at(
    sites: &[Site],
    passes: &dyn Passes,
    examples: &[usize],
    beside: &dyn Overlay,
) -> BTreeMap<String, Finding> {
    let group: Vec<&Site> = sites.iter().collect();
    slopes(&group, &[], passes, Part::Whole, Along::Examples(examples), beside)
}

/// What slopes are taken along.
#[derive(Clone, Copy)]
pub(crate) enum Along<'a> {
    /// Batch by batch, and the numbers move.
    Tuning(Tuning),
    /// These examples, one at a time, and the numbers stay.
    Examples(&'a [usize]),
}

/// Of `group`; `saved` places are trained along in a tuning.
pub(crate) fn slopes(
    group: &[&Site],
    saved: &[&Site],
    passes: &dyn Passes,
    part: Part,
    along: Along<'_>,
    beside: &dyn Overlay,
) -> BTreeMap<String, Finding> {
    let (tuning, steps) = match along {
        Along::Tuning(tuning) => (Some(tuning), passes.batches() * tuning.epochs),
        Along::Examples(examples) => (None, examples.len()),
    };
    let with = saved.iter().filter(|_| tuning.is_some());
    let mut copies = Adapters::new(
        group.iter().map(|site| (site.path.clone(), copy(site, part))),
        with.map(|site| (site.path.clone(), copy(site, Part::Whole))),
    );
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
    let mut sums = Sums::new();
    for step in 0..steps {
        let over = (&copies, beside);
        let loss = match along {
            Along::Tuning(_) => passes.loss(step % passes.batches(), &Scope::new(&over)),
            Along::Examples(examples) => passes.example_loss(examples[step], &Scope::new(&over)),
        };
        if !loss.is_autodiff() {
            continue; // none of the group lies on its way
        }
        let gradients = loss.backward();
        for (path, copy) in copies.iter() {
            let weight = gradient(copy.weight.as_ref(), &gradients);
            let weight = weight.or_else(|| gradient(copy.scale.as_ref(), &gradients));
            add(&mut sums, path, false, weight);
            add(&mut sums, path, true, gradient(copy.bias.as_ref(), &gradients));
        }
        if let Some(tuning) = tuning {
            let rate = tuning.learning_rate * (1.0 - step as f64 / steps as f64);
            let gradients = GradientsParams::from_grads(gradients, &copies);
            copies = optimizer.step(rate, copies, gradients);
        }
    }
    let mut slope = |path: &str, bias: bool, change: Option<Tensor<1>>| {
        let [mean, square] = sums.remove(&(path.to_owned(), bias))?;
        let count = steps as f64;
        let change = change.filter(|_| tuning.is_some());
        Some(Slope { mean: mean / count, square: square / count, change })
    };
    let mut found = BTreeMap::new();
    for site in group {
        let Some(copy) = copies.get(&site.path) else { continue };
        let base = match &site.weight {
            Value::D1(scale) => Some(scale.clone()),
            _ => site.matrix().map(flat),
        };
        let now = copy.weight.as_ref().map(|w| flat(w.val()));
        let now = now.or_else(|| copy.scale.as_ref().map(|s| flat(s.val())));
        let moved =
            |now: Option<Tensor<1>>, base: Option<Tensor<1>>| Some(now? - base?.cast(DType::F32));
        let weight = slope(&site.path, false, moved(now, base));
        let now = copy.bias.as_ref().map(|b| flat(b.val()));
        let bias = slope(&site.path, true, moved(now, site.bias.clone()));
        if weight.is_some() || bias.is_some() {
            found.insert(site.path.clone(), Finding::Slopes(Slopes { weight, bias }));
        }
    }
    found
}
