//! What must be known of the data before a method can build its adapters: the inputs of layers, or the
//! gradients of their weights, over some batches.

use crate::copy::leaf;
use crate::slopes::{Along, hardest, has, slopes};
use crate::{
    Adapter, Adapters, Error, Kind, Laid, Method, Overlay, Part, Scope, Site, Sites, Slopes,
    Strength, Strictness, TrainedCopy, Tuning,
};
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Gradients, Int, Tensor, TensorData};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What a method wants to know of each of its places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Statistic {
    /// The [`Moments`] of the inputs to the frozen layer, where that is linear.
    Inputs {
        /// Leave out positions where nothing is learnt, and not only padding.
        targets_only: bool,
        /// Divide the inputs of each row of a batch by the largest of their numbers (its sign aside), so that
        /// rows count alike.
        even: bool,
    },
    /// The gradient of a batch's mean loss with respect to the weight, its mean over the batches; at
    /// linear places.
    Gradient,
    /// The [`Slopes`] of every number, at places of each kind: at the base, one example at a time, or
    /// along a full fine-tuning of all places together, batch by batch.
    Slopes {
        /// Which parameters are looked at.
        part: Part,
        /// The fine-tuning, if there is one; what `modules_to_save` names is trained along.
        tuning: Option<Tuning>,
    },
    /// The [`Slopes`] of every number at the base, over these many of the examples alone: those with the highest
    /// losses.
    Hardest(usize),
    /// The gradients of the adapters of [`Method::trial`], which all lie over the model together: of a batch's mean
    /// loss, their mean over the batches.
    Trial,
}

/// What was found at one place, on the device of the base.
// Handles on tensors differ in size; there is one of these at a time.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum Finding {
    /// Of [`Statistic::Inputs`].
    Inputs(Moments),
    /// Of [`Statistic::Gradient`], `[fan_in, fan_out]`.
    Gradient(Tensor<2>),
    /// Of [`Statistic::Slopes`] and [`Statistic::Hardest`].
    Slopes(Slopes),
    /// Of [`Statistic::Trial`]: of each parameter in the order of the adapter, its numbers in a row.
    Trial(Vec<Tensor<1>>),
}

/// Number, mean and scatter of the rows of a matrix.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Number of rows, more than 0.
    pub count: usize,
    /// `[1, width]`.
    pub mean: Tensor<2>,
    /// `Σ (x - mean)ᵀ·(x - mean)`, `[width, width]`.
    pub scatter: Tensor<2>,
}

impl Moments {
    /// Of `rows [n, width]`; `None` where there is no row.
    pub fn of(rows: Tensor<2>) -> Option<Self> {
        let [count, _] = rows.dims();
        if count == 0 {
            return None;
        }
        let mean = rows.clone().mean_dim(0);
        let off = rows - mean.clone();
        Some(Self { count, mean, scatter: off.clone().transpose().matmul(off) })
    }

    /// Of the rows of both; nothing is lost where the mean is much larger than what lies around it.
    pub fn and(self, other: Self) -> Self {
        let (n, m) = (self.count as f64, other.count as f64);
        let apart = other.mean - self.mean.clone();
        let between = apart.clone().transpose().matmul(apart.clone()) * (n * m / (n + m));
        Self {
            count: self.count + other.count,
            mean: self.mean + apart * (m / (n + m)),
            scatter: self.scatter + other.scatter + between,
        }
    }

    /// `Σ xᵀ·x / n`, `[width, width]`: the mean square about zero.
    pub fn square(&self) -> Tensor<2> {
        let mean = self.mean.clone();
        self.scatter.clone() / self.count as f64 + mean.clone().transpose().matmul(mean)
    }
}

/// Which positions of a batch count.
#[derive(Debug, Clone)]
pub struct Counted {
    /// Rows.
    pub batch: usize,
    /// Positions a row.
    pub seq: usize,
    /// Whether each counts, `[batch · seq]`.
    pub kept: Vec<bool>,
}

/// Forward passes of a model over some batches of data.
pub trait Passes {
    /// Number of batches.
    fn batches(&self) -> usize;

    /// Mean loss of a batch over its targets, `[1]`, with what `cx` lays over the model.
    fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1>;

    /// The positions of a batch that are no padding and, with `targets_only`, at which something is
    /// learnt. A layer that sees another number of positions is taken whole.
    fn counted(&self, batch: usize, targets_only: bool) -> Counted;

    /// Number of examples in all batches. By default batches cannot be cut, and each is an example.
    fn examples(&self) -> usize {
        self.batches()
    }

    /// Mean loss of an example over its targets, `[1]`, with what `cx` lays over the model.
    fn example_loss(&self, example: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.loss(example, cx)
    }
}

/// Most numbers that are held on the device at a time: 512 MB of them.
const HELD: usize = 1 << 27;

/// Tells `method` what it [wants](Method::wants) to know of the data; it is then ready for
/// [`adapt`](crate::adapt). Methods that want nothing are given back as they are, without a pass.
///
/// Every batch is run once for each group of places whose statistics fit into memory together.
///
/// # Errors
/// What [`Method::check`], [`Method::places`], [`Method::learn`] or
/// [`Method::surveyed`] refuse; no batches; a place that no batch reached, or whose numbers are not finite.
pub fn survey<T: Method>(mut method: T, sites: &Sites, passes: &dyn Passes) -> Result<T, Error> {
    let Some(statistic) = method.wants() else {
        return Ok(method);
    };
    method.check()?;
    let chosen = method.places(sites, Strictness::EachName)?;
    if passes.batches() == 0 {
        return Err(Error::config("init_batches", "expected 1 or more batches of data, found 0"));
    }
    let saved = method.targets().saved(sites, Strictness::EachName)?;
    let looked_at = |site: &&Site| match statistic {
        Statistic::Inputs { .. } | Statistic::Gradient => site.kind == Kind::Linear,
        Statistic::Slopes { part, .. } => has(site, part),
        Statistic::Hardest(_) | Statistic::Trial => true,
    };
    let examples: Vec<usize> = match statistic {
        Statistic::Hardest(count) => hardest(passes, count, &()),
        _ => (0..passes.examples()).collect(),
    };
    let places: Vec<&Site> = chosen.iter().copied().filter(looked_at).collect();
    let mut rest = places.as_slice();
    while !rest.is_empty() {
        let (group, after) = rest.split_at(fitting(rest, statistic));
        let mut found = match statistic {
            Statistic::Inputs { targets_only, even } => inputs(group, passes, targets_only, even),
            Statistic::Gradient => gradients(group, passes),
            Statistic::Slopes { part, tuning } => {
                let along = tuning.map_or(Along::Examples(&examples), Along::Tuning);
                slopes(group, &saved, passes, part, along, &())
            }
            Statistic::Trial => trial(&method, group, passes)?,
            Statistic::Hardest(_) => {
                slopes(group, &saved, passes, Part::Whole, Along::Examples(&examples), &())
            }
        };
        for site in group {
            let path = &site.path;
            let Some(finding) = found.remove(path) else {
                return Err(Error::place(path, "no batch of the data reaches it"));
            };
            if !finding.is_finite() {
                return Err(Error::place(path, "the data brings NaN or infinity there"));
            }
            method.learn(site, finding)?;
        }
        rest = after;
    }
    method.surveyed(&chosen)
}

/// How many of the first of `sites` [`slopes_at`](crate::slopes_at) is best shown together, so that what it sums fits
/// into memory: at least one.
pub fn held_together(sites: &[Site]) -> usize {
    let sites: Vec<&Site> = sites.iter().collect();
    fitting(&sites, Statistic::Hardest(0))
}

/// How many of `sites` are looked at together: at least one.
fn fitting(sites: &[&Site], statistic: Statistic) -> usize {
    if matches!(statistic, Statistic::Slopes { tuning: Some(_), .. } | Statistic::Trial) {
        return sites.len(); // one training of all, or one trial
    }
    let mut held = 0_usize;
    let fits = sites.iter().take_while(|site| {
        let [fan_in, fan_out] = [site.fan_in(), site.fan_out()];
        let numbers = match statistic {
            Statistic::Inputs { .. } => fan_in.saturating_mul(fan_in),
            Statistic::Trial => 0,
            Statistic::Gradient => fan_in.saturating_mul(fan_out),
            Statistic::Slopes { part: Part::Bias, .. } => fan_out,
            // A gradient and two sums.
            Statistic::Slopes { .. } | Statistic::Hardest(_) => {
                fan_in.saturating_mul(fan_out).saturating_mul(3)
            }
        };
        held = held.saturating_add(numbers);
        held <= HELD
    });
    fits.count().max(1)
}

impl Finding {
    fn is_finite(&self) -> bool {
        let matrix = match self {
            Self::Inputs(moments) => moments.square(),
            Self::Gradient(gradient) => gradient.clone(),
            Self::Slopes(slopes) => return slopes.is_finite(),
            Self::Trial(gradients) => {
                let finite = |t: &Tensor<1>| t.clone().is_finite().all().into_scalar::<bool>();
                return gradients.iter().all(finite);
            }
        };
        matrix.is_finite().all().into_scalar::<bool>()
    }
}

/// Takes note of what enters a layer, and changes nothing.
#[derive(Debug)]
struct Recorder {
    counted: Counted,
    even: bool,
    found: Mutex<Option<Moments>>,
}

fn and(a: Option<Moments>, b: Option<Moments>) -> Option<Moments> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.and(b)),
        (a, b) => a.or(b),
    }
}

impl Recorder {
    fn moments(&self, x: &Tensor<3>) -> Option<Moments> {
        let [batch, seq, width] = x.dims();
        let Counted { kept, .. } = &self.counted;
        let masked = [batch, seq] == [self.counted.batch, self.counted.seq];
        let x = x.clone().without_autodiff().cast(DType::F32);
        let mut found = None;
        for row in 0..batch {
            let kept: Vec<i32> = (0..seq)
                .filter(|position| !masked || kept.get(row * seq + position) != Some(&false))
                .map(|position| position as i32)
                .collect();
            if kept.is_empty() {
                continue;
            }
            let rows = x.clone().narrow(0, row, 1).reshape([seq, width]);
            let count = kept.len();
            let at = Tensor::<1, Int>::from_data(TensorData::new(kept, [count]), &x.device());
            let mut rows = rows.select(0, at);
            if self.even {
                let largest = rows.clone().max().abs().reshape([1, 1]);
                rows = rows / largest;
            }
            found = and(found, Moments::of(rows));
        }
        found
    }
}

impl Adapter for Recorder {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        let seen = self.moments(x);
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        *found = and(found.take(), seen);
        None
    }
}

struct Recorders(BTreeMap<String, Recorder>);

impl Overlay for Recorders {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if let Some(adapter) = self.0.get(path) {
            laid.push(Laid { adapter, strength: Strength::Scale(1.0) });
        }
    }
}

fn inputs(
    group: &[&Site],
    passes: &dyn Passes,
    targets_only: bool,
    even: bool,
) -> BTreeMap<String, Finding> {
    let mut found = BTreeMap::new();
    for batch in 0..passes.batches() {
        let counted = passes.counted(batch, targets_only);
        let recorder = |site: &&Site| {
            let found = Mutex::new(None);
            (site.path.clone(), Recorder { counted: counted.clone(), even, found })
        };
        let recorders = Recorders(group.iter().map(recorder).collect());
        let _ = passes.loss(batch, &Scope::new(&recorders));
        for (path, recorder) in recorders.0 {
            let seen = recorder.found.into_inner().unwrap_or_else(PoisonError::into_inner);
            if let Some(all) = and(found.remove(&path), seen) {
                found.insert(path, all);
            }
        }
    }
    found.into_iter().map(|(path, moments)| (path, Finding::Inputs(moments))).collect()
}

fn gradients(group: &[&Site], passes: &dyn Passes) -> BTreeMap<String, Finding> {
    let copy = |site: &&Site| {
        let weight = leaf(site.matrix()?.cast(DType::F32), &site.device().autodiff());
        let copy = TrainedCopy { weight: Some(weight), scale: None, bias: None };
        Some((site.path.clone(), copy))
    };
    let copies = Adapters::new(group.iter().filter_map(copy), []);
    let mut sums: BTreeMap<String, Tensor<2>> = BTreeMap::new();
    for batch in 0..passes.batches() {
        let loss = passes.loss(batch, &Scope::new(&copies));
        if !loss.is_autodiff() {
            continue; // none of the group lies on its way
        }
        let gradients = loss.backward();
        for (path, copy) in copies.iter() {
            let gradient = copy.weight.as_ref().and_then(|weight| weight.val().grad(&gradients));
            if let Some(gradient) = gradient {
                let sum = match sums.remove(path) {
                    Some(sum) => sum + gradient,
                    None => gradient,
                };
                sums.insert(path.to_owned(), sum);
            }
        }
    }
    let batches = passes.batches() as f64;
    sums.into_iter().map(|(path, sum)| (path, Finding::Gradient(sum / batches))).collect()
}

/// Gradients of a module's parameters, each in a row; zeros where there is none.
struct Flat<'a> {
    gradients: &'a Gradients,
    found: Vec<Tensor<1>>,
}

impl ModuleVisitor for Flat<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let count = value.dims().iter().product::<usize>();
        let zeros = || value.clone().without_autodiff().zeros_like();
        let gradient = value.grad(self.gradients).map_or_else(zeros, Tensor::without_autodiff);
        self.found.push(gradient.reshape([count]));
    }
}

fn trial<T: Method>(
    method: &T,
    group: &[&Site],
    passes: &dyn Passes,
) -> Result<BTreeMap<String, Finding>, Error> {
    let mut layers = Vec::with_capacity(group.len());
    for site in group {
        layers.push((site.path.clone(), method.trial(site, &site.device().autodiff())?));
    }
    let adapters = Adapters::new(layers, []);
    let mut sums: BTreeMap<String, Vec<Tensor<1>>> = BTreeMap::new();
    for batch in 0..passes.batches() {
        let loss = passes.loss(batch, &Scope::new(&adapters));
        if !loss.is_autodiff() {
            continue; // none lies on its way
        }
        let gradients = loss.backward();
        for (path, adapter) in adapters.iter() {
            let mut flat = Flat { gradients: &gradients, found: Vec::new() };
            adapter.visit(&mut flat);
            let sum = match sums.remove(path) {
                Some(sum) => sum.into_iter().zip(flat.found).map(|(a, b)| a + b).collect(),
                None => flat.found,
            };
            sums.insert(path.to_owned(), sum);
        }
    }
    let batches = passes.batches() as f64;
    let mean = |sum: Vec<Tensor<1>>| Finding::Trial(sum.into_iter().map(|t| t / batches).collect());
    Ok(sums.into_iter().map(|(path, sum)| (path, mean(sum))).collect())
}
