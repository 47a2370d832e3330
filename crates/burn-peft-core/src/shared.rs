//! Parameters that several places share: held once, whoever holds a handle on them.
//!
//! An adapter may hold a parameter with the same id as another place's (VB-LoRA's bank, a rule of
//! Compacter's). [`Adapters`](crate::Adapters) shows such a parameter to visitors and mappers once, by
//! its first holder, and hands what came out to all others: an optimizer updates it once, with the sum
//! of its gradients, and a checkpoint holds it once.

use burn::module::{Flag, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};

/// Passes on what it meets for the first time.
pub(crate) struct VisitOnce<'a, V> {
    inner: &'a mut V,
    met: BTreeSet<ParamId>,
}

impl<'a, V> VisitOnce<'a, V> {
    pub(crate) fn new(inner: &'a mut V) -> Self {
        Self { inner, met: BTreeSet::new() }
    }
}

impl<V: ModuleVisitor> ModuleVisitor for VisitOnce<'_, V> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.met.insert(param.id) {
            self.inner.visit_float(param);
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.inner.visit_int(param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.inner.visit_bool(param);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.inner.visit_flag(flag);
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.inner.enter_module(name, container_type);
    }

    fn exit_module(&mut self, name: &str, container_type: &str) {
        self.inner.exit_module(name, container_type);
    }
}

/// Maps what it meets for the first time, and hands the result to all that had the same id.
pub(crate) struct MapOnce<'a, M> {
    inner: &'a mut M,
    mapped: BTreeMap<ParamId, Box<dyn Any>>,
}

impl<'a, M> MapOnce<'a, M> {
    pub(crate) fn new(inner: &'a mut M) -> Self {
        Self { inner, mapped: BTreeMap::new() }
    }
}

impl<M: ModuleMapper> ModuleMapper for MapOnce<'_, M> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        let known = self.mapped.get(&id).and_then(|any| any.downcast_ref::<Param<Tensor<D>>>());
        if let Some(known) = known {
            return known.clone();
        }
        let mapped = self.inner.map_float(param);
        self.mapped.insert(id, Box::new(mapped.clone()));
        mapped
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.inner.map_int(param)
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        self.inner.map_bool(param)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.inner.map_flag(flag)
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.inner.enter_module(name, container_type);
    }

    fn exit_module(&mut self, name: &str, container_type: &str) {
        self.inner.exit_module(name, container_type);
    }
}

/// Changes nothing; through [`MapOnce`], parameters with one id become one again.
pub(crate) struct Same;

impl ModuleMapper for Same {}
