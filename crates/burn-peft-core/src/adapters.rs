//! Adapters by path: the thing one trains, saves, loads and averages.

use crate::method::site_rng;
use crate::shared::{MapOnce, Same, VisitOnce};
use crate::{
    Biases, Error, Fold, Laid, Method, Overlay, Part, Sites, Strength, Strictness, TrainedCopy,
};
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param, ParamId,
};
use burn::tensor::{Device, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything that was trained over one model: a method's adapters, and trained copies of layers
/// (`modules_to_save`, biases), each by the path of its place.
///
/// A Burn [`Module`] whose parameters are the trained ones, and the [`Buffer`](crate::Buffer)s of its
/// method's policy, so that an optimizer, a record or a checkpoint of it never meets the base model. As an [`Overlay`] it lies fully (strength 1)
/// over the model.
///
/// A parameter that several places share (one id in several adapters) is visited, updated and
/// stored once.
#[derive(Debug, Clone)]
pub struct Adapters<A: Module + ModuleDisplay> {
    parts: Parts<A>,
    index: Arc<Index>,
}

#[derive(Module, Debug)]
struct Parts<A: Module + ModuleDisplay> {
    layers: Vec<A>,
    copies: Vec<TrainedCopy>,
}

/// Each holder of a shared parameter was changed on its own: they become one again.
fn tied<A: Module + ModuleDisplay>(parts: Parts<A>) -> Parts<A> {
    parts.map(&mut MapOnce::new(&mut Same))
}

impl<A: Module + ModuleDisplay> Module for Adapters<A> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.parts.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { parts: tied(self.parts.fork(device)), index: self.index }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { parts: tied(self.parts.to_device(device)), index: self.index }
    }

    fn train(self) -> Self {
        Self { parts: tied(self.parts.train()), index: self.index }
    }

    fn valid(&self) -> Self {
        Self { parts: tied(self.parts.valid()), index: self.index.clone() }
    }

    fn materialize(self) -> Self {
        Self { parts: tied(self.parts.materialize()), index: self.index }
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.parts.visit(&mut VisitOnce::new(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let parts = self.parts.map(&mut MapOnce::new(mapper));
        Self { parts, index: self.index }
    }
}

impl<A: Module + ModuleDisplay> ModuleDisplayDefault for Adapters<A> {
    fn content(&self, content: Content) -> Option<Content> {
        self.parts.content(content)
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<A: Module + ModuleDisplay> ModuleDisplay for Adapters<A> {}

/// Paths of the adapters and copies, in the model's order.
#[derive(Debug, Default, Clone)]
struct Index {
    layers: BTreeMap<String, usize>,
    copies: BTreeMap<String, usize>,
}

impl<A: Module + ModuleDisplay> Adapters<A> {
    /// From parts by path. Order is kept: it is the order of parameters for an optimizer.
    pub fn new(
        layers: impl IntoIterator<Item = (String, A)>,
        copies: impl IntoIterator<Item = (String, TrainedCopy)>,
    ) -> Self {
        let mut index = Index::default();
        let mut adapters = Vec::new();
        for (path, adapter) in layers {
            index.layers.insert(path, adapters.len());
            adapters.push(adapter);
        }
        let mut copied = Vec::new();
        for (path, copy) in copies {
            index.copies.insert(path, copied.len());
            copied.push(copy);
        }
        Self { parts: Parts { layers: adapters, copies: copied }, index: Arc::new(index) }
    }

    /// The method's adapter at `path`.
    pub fn get(&self, path: &str) -> Option<&A> {
        self.parts.layers.get(*self.index.layers.get(path)?)
    }

    /// The trained copy of the layer at `path`.
    pub fn copy(&self, path: &str) -> Option<&TrainedCopy> {
        self.parts.copies.get(*self.index.copies.get(path)?)
    }

    /// Adapters with their paths, by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &A)> {
        self.index
            .layers
            .iter()
            .filter_map(|(path, i)| Some((path.as_str(), self.parts.layers.get(*i)?)))
    }

    /// Trained copies with their paths, by path.
    pub fn copies(&self) -> impl Iterator<Item = (&str, &TrainedCopy)> {
        self.index
            .copies
            .iter()
            .filter_map(|(path, i)| Some((path.as_str(), self.parts.copies.get(*i)?)))
    }

    /// Paths of all places that change, sorted.
    pub fn places(&self) -> Vec<String> {
        let mut paths: Vec<String> = self.index.layers.keys().cloned().collect();
        paths.extend(self.index.copies.keys().cloned());
        paths.sort();
        paths.dedup();
        paths
    }

    /// The same adapters with each adapter put through `map`: how a method changes its own between
    /// steps (a rank masked, a stage merged).
    pub fn map_layers(mut self, mut map: impl FnMut(&str, A) -> A) -> Self {
        let mut paths = vec![""; self.parts.layers.len()];
        for (path, &at) in &self.index.layers {
            paths[at] = path;
        }
        let layers = self.parts.layers.into_iter().zip(paths);
        self.parts.layers = layers.map(|(adapter, path)| map(path, adapter)).collect();
        self
    }

    /// The same places with another adapter at each; `None` where one is not to be had.
    pub(crate) fn try_with<B: Module + ModuleDisplay>(
        &self,
        make: impl Fn(&A) -> Option<B>,
    ) -> Option<Adapters<B>> {
        let layers = self.parts.layers.iter().map(make).collect::<Option<_>>()?;
        let parts = Parts { layers, copies: self.parts.copies.clone() };
        Some(Adapters { parts, index: self.index.clone() })
    }

    /// The same places with another adapter at each.
    pub(crate) fn with<B: Module + ModuleDisplay>(&self, make: impl Fn(&A) -> B) -> Adapters<B> {
        let layers = self.parts.layers.iter().map(make).collect();
        let parts = Parts { layers, copies: self.parts.copies.clone() };
        Adapters { parts, index: self.index.clone() }
    }

    /// Takes the values of parameters with the same id out of `trained`: the way back from a model
    /// that was trained with these adapters [attached](crate::attach).
    pub fn updated_from<M: Module>(self, trained: &M) -> Self {
        let mut values = ById::default();
        trained.visit(&mut values);
        self.map(&mut values)
    }
}

/// Makes adapters of `method` for `model`.
///
/// `output` is the path of the model's output layer, if it has one ("all-linear" leaves it out).
/// Parameters are trainable on `device`, which should be an autodiff device for training. The
/// model is only read.
///
/// # Errors
/// What [`Method::check`], [`Method::places`] or [`Method::init`] refuse.
pub fn adapt<T: Method>(
    sites: &Sites,
    method: &T,
    seed: u64,
    device: &Device,
) -> Result<Adapters<T::Adapter>, Error> {
    method.check()?;
    let chosen = method.places(sites, Strictness::EachName)?;
    let shared = method.share(&chosen, &mut site_rng(seed, ""), device)?;
    let mut layers = Vec::with_capacity(chosen.len());
    for site in &chosen {
        let mut rng = site_rng(seed, &site.path);
        layers.push((site.path.clone(), method.init(site, &shared, &mut rng, device)?));
    }
    let adapted: Vec<&str> = chosen.iter().map(|site| site.path.as_str()).collect();
    let copies = copies(sites, method, &adapted, Strictness::EachName)?.into_iter().filter_map(
        |(path, part)| Some((path.to_owned(), TrainedCopy::of(sites.get(path)?, part, device)?)),
    );
    Ok(Adapters::new(layers, copies))
}

/// Which layers are copied, whole (`modules_to_save`) or in their bias.
pub(crate) fn copies<'s, T: Method>(
    sites: &'s Sites,
    method: &T,
    adapted: &[&str],
    strictness: Strictness,
) -> Result<Vec<(&'s str, Part)>, Error> {
    let saved = method.targets().saved(sites, strictness)?;
    let mut copies: Vec<(&str, Part)> =
        saved.iter().map(|site| (site.path.as_str(), Part::Whole)).collect();
    for site in sites.all.iter().filter(|site| site.bias.is_some()) {
        let wanted = match method.biases() {
            Biases::None => false,
            Biases::All => true,
            Biases::Adapted => adapted.contains(&site.path.as_str()),
        };
        if wanted && !copies.iter().any(|(path, _)| *path == site.path) {
            copies.push((&site.path, Part::Bias));
        }
    }
    Ok(copies)
}

impl<A: Module + ModuleDisplay + crate::Adapter> Overlay for Adapters<A> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if let Some(adapter) = self.get(path) {
            laid.push(Laid { adapter, strength: Strength::Scale(1.0) });
        }
        if let Some(copy) = self.copy(path) {
            laid.push(Laid { adapter: copy, strength: Strength::Scale(1.0) });
        }
    }

    fn by_token(&self) -> bool {
        self.iter().all(|(_, adapter)| adapter.by_token())
    }

    fn rows_alike(&self) -> bool {
        true
    }
}

/// Adapters that fold into parameters, by path: what [`merge`](crate::merge) takes.
pub trait Folds {
    /// `Δ(W)` at `path`, the weight read as a matrix `[fan_in, fan_out]`.
    fn fold_weight(&self, path: &str, w: &Tensor<2>) -> Option<Tensor<2>>;
    /// `Δ(v)` of a norm's scale at `path`.
    fn fold_vector(&self, path: &str, v: &Tensor<1>) -> Option<Tensor<1>>;
    /// `Δ(b)` of the bias at `path`.
    fn fold_bias(&self, path: &str, b: &Tensor<1>) -> Option<Tensor<1>>;
    /// Why the adapter at `path` is no difference of weights, where it is none.
    fn unfoldable(&self, path: &str) -> Option<&'static str>;
    /// Whether the adapter at `path` has a bias of its own.
    fn brings_bias(&self, path: &str) -> bool;
    /// The trained copy of the layer at `path`, whose difference is in the others' answers.
    fn trained_copy(&self, path: &str) -> Option<&TrainedCopy>;
    /// The first place, if any, with a parameter that is NaN or infinite.
    fn broken(&self) -> Option<String>;
    /// Paths of all places that change.
    fn paths(&self) -> Vec<String>;
}

/// Whether every parameter is a number.
fn finite<M: Module>(module: &M) -> bool {
    struct Finite(bool);
    impl ModuleVisitor for Finite {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val().without_autodiff();
            let empty = value.dims().contains(&0);
            self.0 &= empty || value.is_finite().all().into_scalar::<bool>();
        }
    }
    let mut found = Finite(true);
    module.visit(&mut found);
    found.0
}

fn first_broken<A: Module + ModuleDisplay>(adapters: &Adapters<A>) -> Option<String> {
    let layers = adapters.iter().filter(|(_, adapter)| !finite(*adapter)).map(|(path, _)| path);
    let copies = adapters.copies().filter(|(_, copy)| !finite(*copy)).map(|(path, _)| path);
    layers.chain(copies).next().map(str::to_owned)
}

fn add<const D: usize>(a: Option<Tensor<D>>, b: Option<Tensor<D>>) -> Option<Tensor<D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

impl<A: Module + ModuleDisplay + Fold> Folds for Adapters<A> {
    fn fold_weight(&self, path: &str, w: &Tensor<2>) -> Option<Tensor<2>> {
        let adapter = self.get(path).and_then(|a| a.weight(w));
        add(adapter, self.copy(path).and_then(|c| c.weight(w)))
    }

    fn fold_vector(&self, path: &str, v: &Tensor<1>) -> Option<Tensor<1>> {
        let adapter = self.get(path).and_then(|a| a.vector(v));
        add(adapter, self.copy(path).and_then(|c| c.vector(v)))
    }

    fn fold_bias(&self, path: &str, b: &Tensor<1>) -> Option<Tensor<1>> {
        let adapter = self.get(path).and_then(|a| a.bias(b));
        add(adapter, self.copy(path).and_then(|c| Fold::bias(c, b)))
    }

    fn unfoldable(&self, path: &str) -> Option<&'static str> {
        self.get(path).and_then(Fold::unfoldable)
    }

    fn brings_bias(&self, path: &str) -> bool {
        self.get(path).is_some_and(Fold::brings_bias)
    }

    fn trained_copy(&self, path: &str) -> Option<&TrainedCopy> {
        self.copy(path)
    }

    fn broken(&self) -> Option<String> {
        first_broken(self)
    }

    fn paths(&self) -> Vec<String> {
        self.places()
    }
}

/// Adapters of a method known only at run time, as something to merge.
#[derive(Debug)]
pub struct Folded<'a, T: Method>(&'a Adapters<T::Adapter>);

impl<'a, T: Method> Folded<'a, T> {
    /// `None` where the method does not fold into parameters.
    pub fn new(adapters: &'a Adapters<T::Adapter>) -> Option<Self> {
        adapters.iter().all(|(_, adapter)| T::fold(adapter).is_some()).then_some(Self(adapters))
    }

    fn fold(&self, path: &str) -> Option<&dyn Fold> {
        T::fold(self.0.get(path)?)
    }
}

impl<T: Method> Folds for Folded<'_, T> {
    fn fold_weight(&self, path: &str, w: &Tensor<2>) -> Option<Tensor<2>> {
        let adapter = self.fold(path).and_then(|a| a.weight(w));
        add(adapter, self.0.copy(path).and_then(|c| Fold::weight(c, w)))
    }

    fn fold_vector(&self, path: &str, v: &Tensor<1>) -> Option<Tensor<1>> {
        let adapter = self.fold(path).and_then(|a| a.vector(v));
        add(adapter, self.0.copy(path).and_then(|c| Fold::vector(c, v)))
    }

    fn fold_bias(&self, path: &str, b: &Tensor<1>) -> Option<Tensor<1>> {
        let adapter = self.fold(path).and_then(|a| a.bias(b));
        add(adapter, self.0.copy(path).and_then(|c| Fold::bias(c, b)))
    }

    fn unfoldable(&self, path: &str) -> Option<&'static str> {
        self.fold(path).and_then(Fold::unfoldable)
    }

    fn brings_bias(&self, path: &str) -> bool {
        self.fold(path).is_some_and(Fold::brings_bias)
    }

    fn trained_copy(&self, path: &str) -> Option<&TrainedCopy> {
        self.0.copy(path)
    }

    fn broken(&self) -> Option<String> {
        first_broken(self.0)
    }

    fn paths(&self) -> Vec<String> {
        self.0.places()
    }
}

/// Collects parameters by id, then hands them to the parameters with those ids.
#[derive(Default)]
struct ById {
    values: BTreeMap<ParamId, crate::Value>,
}

impl burn::module::ModuleVisitor for ById {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(value) = crate::Value::new(param.base()) {
            self.values.insert(param.id, value);
        }
    }
}

impl burn::module::ModuleMapper for ById {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.values.get(&param.id) else {
            return param;
        };
        let shape = param.dims();
        let device = param.device();
        let id = param.id;
        let tensor: Tensor<D> = match value.clone() {
            crate::Value::D1(t) => t.reshape(shape),
            crate::Value::D2(t) => t.reshape(shape),
            crate::Value::D3(t) => t.reshape(shape),
            crate::Value::D4(t) => t.reshape(shape),
        };
        let leaf = crate::copy::leaf(tensor, &device);
        Param::initialized(id, leaf.val())
    }
}
