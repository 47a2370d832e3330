//! Differences folded into parameters: [`attach`] to train any Burn model, [`merge`] for a plain one.

use crate::widened::is_half;
use crate::{
    Adapters, Error, Fold, Folds, Sites, TrainedCopy, Value, as_matrix, from_matrix, hf_path,
    widened,
};
use burn::module::{
    Module, ModuleDisplay, ModuleMapper, Param, Reparameterization, Reparameterizer,
};
use burn::tensor::Tensor;

/// Which parameter of a place.
fn split(path: &str) -> Option<(&str, &str)> {
    path.rsplit_once('.')
}

/// What [`attach`] lays over one parameter: the adapter of its place, the trained copy, or both.
///
/// The effective value is `W + Δ(W)`, composed densely on every read. That is the price of a model
/// that knows nothing of adapters; models of ours take the factored way through
/// [`Scope`](crate::Scope). A parameter in half precision is read so too: the sum is formed in f32 and rounded once, as
/// [`merge`] does.
#[derive(Module, Debug)]
pub struct Attached<A: Module + ModuleDisplay> {
    adapter: Option<A>,
    copy: Option<TrainedCopy>,
    #[module(skip)]
    bias: bool,
}

impl<A: Module + ModuleDisplay + Fold + Sync + 'static> Reparameterization for Attached<A> {
    const NAME: &'static str = "peft";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        fn total<const R: usize>(
            base: Tensor<R>,
            adapter: Option<Tensor<R>>,
            copy: Option<Tensor<R>>,
        ) -> Tensor<R> {
            [adapter, copy].into_iter().flatten().fold(base, |sum, delta| sum + delta)
        }
        let own = base.dtype();
        let base = widened(base);
        let rounded = |sum: Tensor<D>| if is_half(own) { sum.cast(own) } else { sum };
        let shape = base.dims();
        let folds = (self.adapter.as_ref(), self.copy.as_ref());
        rounded(match Value::new(base.clone()) {
            Some(Value::D1(v)) if self.bias => {
                let deltas =
                    (folds.0.and_then(|a| a.bias(&v)), folds.1.and_then(|c| Fold::bias(c, &v)));
                total(v, deltas.0, deltas.1).reshape(shape)
            }
            Some(Value::D1(v)) => {
                let deltas =
                    (folds.0.and_then(|a| a.vector(&v)), folds.1.and_then(|c| c.vector(&v)));
                total(v, deltas.0, deltas.1).reshape(shape)
            }
            _ => {
                let w = as_matrix(base);
                let deltas =
                    (folds.0.and_then(|a| a.weight(&w)), folds.1.and_then(|c| c.weight(&w)));
                from_matrix(total(w, deltas.0, deltas.1), shape)
            }
        })
    }
}

struct Attacher<'a, A: Module + ModuleDisplay> {
    adapters: &'a Adapters<A>,
}

impl<A: Module + ModuleDisplay + Fold + Sync + 'static> Reparameterizer for Attacher<'_, A> {
    type Reparam = Attached<A>;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        let path = hf_path(&path.split('.').collect::<Vec<_>>());
        let Some((place, name)) = split(&path) else {
            return (param, None);
        };
        let (adapter, copy) = (self.adapters.get(place), self.adapters.copy(place));
        if adapter.is_none() && copy.is_none() {
            return (param, None);
        }
        let bias = name == "bias";
        // Only what changes this parameter goes along, so that each factor is met once.
        let touches = match Value::new(widened(param.base())) {
            Some(Value::D1(v)) if bias => (
                adapter.is_some_and(|a| a.bias(&v).is_some()),
                copy.is_some_and(|c| Fold::bias(c, &v).is_some()),
            ),
            Some(Value::D1(v)) => (
                adapter.is_some_and(|a| a.vector(&v).is_some()),
                copy.is_some_and(|c| c.vector(&v).is_some()),
            ),
            Some(_) if name == "weight" => {
                (adapter.is_some(), copy.is_some_and(|c| c.weight.is_some()))
            }
            _ => (false, false),
        };
        if touches == (false, false) {
            return (param, None);
        }
        let attached = Attached {
            adapter: adapter.filter(|_| touches.0).cloned(),
            copy: copy.filter(|_| touches.1).cloned(),
            bias,
        };
        (param, Some(attached))
    }
}

/// Lays adapters over any Burn model, unmodified: each adapted parameter reads `W + Δ(W)`.
///
/// The factors keep their parameter ids, so the returned model can be trained by any Burn loop
/// (its own parameters carry no gradient if it lives on the plain device);
/// [`Adapters::updated_from`] brings the trained values back. `model` must be the pristine base:
/// a parameter holds one reparameterization, and Burn loses a second one silently.
///
/// # Errors
/// A path of the adapters that the model does not have, or a bias for a layer that has none.
pub fn attach<M, A>(model: M, adapters: &Adapters<A>) -> Result<M, Error>
where
    M: Module,
    A: Module + ModuleDisplay + Fold + Sync + 'static,
{
    check(&model, adapters)?;
    Ok(model.apply_reparameterization(Attacher { adapters }))
}

/// Refuses places that the model does not have, what is no difference of weights, and biases for layers that
/// have none: they would be lost without a word.
fn check<M: Module>(model: &M, folds: &dyn Folds) -> Result<(), Error> {
    let sites = Sites::of(model, None);
    for path in folds.paths() {
        let Some(site) = sites.get(&path) else {
            let near = sites.all.iter().map(|site| site.path.as_str());
            return Err(Error::no_match("adapter", &path, "layer", near));
        };
        if let Some(reason) = folds.unfoldable(&path) {
            return Err(Error::place(path, reason));
        }
        if site.bias.is_none() && folds.brings_bias(&path) {
            let reason = "the adapter adds a bias and the layer has none to fold it into; \
                          run the model with the adapter as an overlay instead";
            return Err(Error::place(path, reason));
        }
    }
    Ok(())
}

/// A plain model with the adapters folded in: `W' = W + Σ wᵢ·Δᵢ(W)`. The old model is still there.
///
/// Of a quantized base the weights that change come out in floats: rounded again, they would lose what was
/// trained. Of one in half precision they are added up in f32 and rounded once, so that what is written is as small as
/// the base.
///
/// # Errors
/// A path of the adapters that the model does not have, a bias for a layer that has none, or a
/// merged weight that is not finite
/// (named; the adapter is broken).
pub fn merge<M: Module>(model: &M, parts: &[(&dyn Folds, f64)]) -> Result<M, Error> {
    for (folds, _) in parts {
        check(model, *folds)?;
        // By its own numbers, too: a maximum may pass over NaN, and it would reach no weight.
        if let Some(path) = folds.broken() {
            let reason = "the adapter holds NaN or infinity; it is broken, nothing was merged";
            return Err(Error::place(path, reason));
        }
    }
    let mut merger = Merger { parts, stack: Vec::new(), broken: None };
    let merged = model.clone().map(&mut merger);
    match merger.broken {
        None => Ok(merged),
        Some(path) => Err(Error::place(
            path,
            "the merged parameter holds NaN or infinity; the adapter is broken, nothing was merged",
        )),
    }
}

struct Merger<'a> {
    parts: &'a [(&'a dyn Folds, f64)],
    stack: Vec<String>,
    broken: Option<String>,
}

impl Merger<'_> {
    fn total<const D: usize>(
        &self,
        base: &Tensor<D>,
        fold: impl Fn(&dyn Folds, &Tensor<D>) -> Option<Tensor<D>>,
    ) -> Option<Tensor<D>> {
        let mut sum: Option<Tensor<D>> = None;
        for (folds, weight) in self.parts {
            let Some(delta) = fold(*folds, base) else {
                continue;
            };
            let delta = delta.without_autodiff() * *weight;
            let start = sum.take().unwrap_or_else(|| base.clone().cast(delta.dtype()));
            sum = Some(start + delta);
        }
        sum
    }
}

impl ModuleMapper for Merger<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = hf_path(&self.stack);
        let Some((place, name)) = split(&path) else {
            return param;
        };
        let base = param.base().without_autodiff();
        // Half precision is merged in the adapter's and rounded once.
        let own = base.dtype();
        let base = widened(base);
        let own = if is_half(own) { own } else { base.dtype() };
        let shape = base.dims();
        let merged: Option<Tensor<D>> = match (Value::new(base.clone()), name) {
            (Some(Value::D1(v)), "bias") => {
                self.total(&v, |folds, v| folds.fold_bias(place, v)).map(|t| t.reshape(shape))
            }
            (Some(Value::D1(v)), "weight") => {
                self.total(&v, |folds, v| folds.fold_vector(place, v)).map(|t| t.reshape(shape))
            }
            (Some(_), "weight") => self
                .total(&as_matrix(base), |folds, w| folds.fold_weight(place, w))
                .map(|w| from_matrix(w, shape)),
            _ => None,
        };
        match merged {
            None => param,
            Some(value) => {
                let value = value.cast(own);
                let finite = value.clone().is_finite().all().into_scalar::<bool>();
                if !finite && self.broken.is_none() {
                    self.broken = Some(path);
                }
                param.map(|_| value)
            }
        }
    }
}
