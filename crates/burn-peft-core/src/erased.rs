//! An adapter of whatever method behind one type: what is written for it is compiled once, and not once
//! a method.

use crate::policy::Made;
use crate::{Adapter, Adapters, Guide, Hidden, Mask, Overlay, Passes, Policy, Routed, SeenTokens};
use burn::module::{
    Content, Devices, Flag, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, Param,
};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, Device, Int, Tensor};
use serde_json::Value as Json;
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// An adapter of any method.
pub struct AnyAdapter(Box<dyn Erased>);

/// [`Module`] and [`Adapter`] without type parameters.
trait Erased: Adapter {
    fn boxed(&self) -> Box<dyn Erased>;
    fn any(&self) -> &dyn Any;
    fn devices(&self, devices: Devices) -> Devices;
    fn forked(self: Box<Self>, device: &Device) -> Box<dyn Erased>;
    fn moved(self: Box<Self>, device: &Device) -> Box<dyn Erased>;
    fn training(self: Box<Self>) -> Box<dyn Erased>;
    fn validating(&self) -> Box<dyn Erased>;
    fn materialized(self: Box<Self>) -> Box<dyn Erased>;
    fn visited(&self, visitor: &mut dyn Visitor);
    fn mapped(self: Box<Self>, mapper: &mut dyn Mapper) -> Box<dyn Erased>;
    fn shown(&self, content: Content) -> Option<Content>;
}

impl<A: Adapter + Module + ModuleDisplay + 'static> Erased for A {
    fn boxed(&self) -> Box<dyn Erased> {
        Box::new(self.clone())
    }

    fn any(&self) -> &dyn Any {
        self
    }

    fn devices(&self, devices: Devices) -> Devices {
        self.collect_devices(devices)
    }

    fn forked(self: Box<Self>, device: &Device) -> Box<dyn Erased> {
        Box::new((*self).fork(device))
    }

    fn moved(self: Box<Self>, device: &Device) -> Box<dyn Erased> {
        Box::new((*self).to_device(device))
    }

    fn training(self: Box<Self>) -> Box<dyn Erased> {
        Box::new((*self).train())
    }

    fn validating(&self) -> Box<dyn Erased> {
        Box::new(self.valid())
    }

    fn materialized(self: Box<Self>) -> Box<dyn Erased> {
        Box::new((*self).materialize())
    }

    fn visited(&self, visitor: &mut dyn Visitor) {
        self.visit(&mut ByVisitor(visitor));
    }

    fn mapped(self: Box<Self>, mapper: &mut dyn Mapper) -> Box<dyn Erased> {
        Box::new((*self).map(&mut ByMapper(mapper)))
    }

    fn shown(&self, content: Content) -> Option<Content> {
        self.content(content)
    }
}

/// [`ModuleVisitor`] whose parameters have lost their type.
trait Visitor {
    fn enter(&mut self, name: &str, container_type: &str);
    fn exit(&mut self, name: &str, container_type: &str);
    /// A `&Param` of a float, int or bool tensor, or of a flag.
    fn parameter(&mut self, param: &dyn Any);
}

/// [`ModuleMapper`], likewise.
trait Mapper {
    fn enter(&mut self, name: &str, container_type: &str);
    fn exit(&mut self, name: &str, container_type: &str);
    fn parameter(&mut self, param: Box<dyn Any>) -> Box<dyn Any>;
}

/// Does `$body` with the parameter's own type, by its kind and number of axes.
macro_rules! with_rank {
    ($d:ident, $body:block) => {
        with_rank!(@ $d, $body, 1, 2, 3, 4, 5, 6, 7, 8)
    };
    (@ $d:ident, $body:block, $($rank:literal),+) => {
        $({
            const $d: usize = $rank;
            $body
        })+
    };
}

/// Most axes of a parameter that [`with_rank!`] knows: as many as Burn's own `DynParam`.
const MOST_AXES: usize = 8;

struct ByVisitor<'a>(&'a mut dyn Visitor);

impl ModuleVisitor for ByVisitor<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        const { assert!(D <= MOST_AXES) };
        self.0.parameter(param);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        const { assert!(D <= MOST_AXES) };
        self.0.parameter(param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        const { assert!(D <= MOST_AXES) };
        self.0.parameter(param);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.0.parameter(flag);
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.0.enter(name, container_type);
    }

    fn exit_module(&mut self, name: &str, container_type: &str) {
        self.0.exit(name, container_type);
    }
}

struct ToVisitor<'a, V>(&'a mut V);

impl<V: ModuleVisitor> Visitor for ToVisitor<'_, V> {
    fn enter(&mut self, name: &str, container_type: &str) {
        self.0.enter_module(name, container_type);
    }

    fn exit(&mut self, name: &str, container_type: &str) {
        self.0.exit_module(name, container_type);
    }

    fn parameter(&mut self, param: &dyn Any) {
        with_rank!(D, {
            if let Some(param) = param.downcast_ref::<Param<Tensor<D>>>() {
                return self.0.visit_float(param);
            }
            if let Some(param) = param.downcast_ref::<Param<Tensor<D, Int>>>() {
                return self.0.visit_int(param);
            }
            if let Some(param) = param.downcast_ref::<Param<Tensor<D, Bool>>>() {
                return self.0.visit_bool(param);
            }
        });
        if let Some(flag) = param.downcast_ref::<Param<Flag>>() {
            self.0.visit_flag(flag);
        }
    }
}

struct ByMapper<'a>(&'a mut dyn Mapper);

impl ByMapper<'_> {
    /// A mapper gives back what it was given.
    fn same<P: Clone + 'static>(&mut self, param: P) -> P {
        let kept = param.clone();
        self.0.parameter(Box::new(param)).downcast().map_or(kept, |mapped| *mapped)
    }
}

impl ModuleMapper for ByMapper<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        const { assert!(D <= MOST_AXES) };
        self.same(param)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        const { assert!(D <= MOST_AXES) };
        self.same(param)
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        const { assert!(D <= MOST_AXES) };
        self.same(param)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.same(flag)
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.0.enter(name, container_type);
    }

    fn exit_module(&mut self, name: &str, container_type: &str) {
        self.0.exit(name, container_type);
    }
}

struct ToMapper<'a, M>(&'a mut M);

impl<M: ModuleMapper> Mapper for ToMapper<'_, M> {
    fn enter(&mut self, name: &str, container_type: &str) {
        self.0.enter_module(name, container_type);
    }

    fn exit(&mut self, name: &str, container_type: &str) {
        self.0.exit_module(name, container_type);
    }

    fn parameter(&mut self, param: Box<dyn Any>) -> Box<dyn Any> {
        let mut param = param;
        with_rank!(D, {
            param = match param.downcast::<Param<Tensor<D>>>() {
                Ok(param) => return Box::new(self.0.map_float(*param)),
                Err(param) => param,
            };
            param = match param.downcast::<Param<Tensor<D, Int>>>() {
                Ok(param) => return Box::new(self.0.map_int(*param)),
                Err(param) => param,
            };
            param = match param.downcast::<Param<Tensor<D, Bool>>>() {
                Ok(param) => return Box::new(self.0.map_bool(*param)),
                Err(param) => param,
            };
        });
        match param.downcast::<Param<Flag>>() {
            Ok(flag) => Box::new(self.0.map_flag(*flag)),
            Err(param) => param,
        }
    }
}

impl AnyAdapter {
    /// Of this adapter.
    pub fn new<A: Adapter + Module + ModuleDisplay + 'static>(adapter: A) -> Self {
        Self(Box::new(adapter))
    }

    /// The adapter itself, if it is an `A`.
    pub fn get<A: 'static>(&self) -> Option<&A> {
        self.0.any().downcast_ref()
    }
}

impl fmt::Debug for AnyAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Clone for AnyAdapter {
    fn clone(&self) -> Self {
        Self(self.0.boxed())
    }
}

impl Module for AnyAdapter {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.forked(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.moved(device))
    }

    fn train(self) -> Self {
        Self(self.0.training())
    }

    fn valid(&self) -> Self {
        Self(self.0.validating())
    }

    fn materialize(self) -> Self {
        Self(self.0.materialized())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.0.visited(&mut ToVisitor(visitor));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self(self.0.mapped(&mut ToMapper(mapper)))
    }
}

impl ModuleDisplayDefault for AnyAdapter {
    fn content(&self, content: Content) -> Option<Content> {
        self.0.shown(content)
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl ModuleDisplay for AnyAdapter {}

impl Adapter for AnyAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.0.linear(layer, x, y)
    }

    fn linear_reading(
        &self,
        layer: &Linear,
        x: &Tensor<3>,
        y: &Tensor<3>,
        tokens: &SeenTokens,
    ) -> Option<Tensor<3>> {
        self.0.linear_reading(layer, x, y, tokens)
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        self.0.linear_whole(layer, x)
    }

    fn by_token(&self) -> bool {
        self.0.by_token()
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        self.0.embedding(layer, ids, y)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.0.conv1d(layer, x, y)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        self.0.conv2d(layer, x, y)
    }

    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        self.0.hidden(at)
    }

    fn whole_sequence(&self) -> bool {
        self.0.whole_sequence()
    }

    fn positional(&self, positions: &Tensor<2, Int>) -> Option<Tensor<3>> {
        self.0.positional(positions)
    }

    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        self.0.prompt(x, tokens)
    }

    fn prefix(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        self.0.prefix(x, tokens)
    }

    fn carried(
        &self,
        block: usize,
        x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        tokens: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        self.0.carried(block, x, held, tokens)
    }

    fn virtual_tokens(&self) -> usize {
        self.0.virtual_tokens()
    }

    fn mask(&self) -> Option<Mask> {
        self.0.mask()
    }

    fn attention(
        &self,
        x: &Tensor<3>,
        q: &Tensor<4>,
        key: &Linear,
        value: &Linear,
    ) -> Option<Tensor<3>> {
        self.0.attention(x, q, key, value)
    }

    fn products(&self, rows: usize, total: usize) -> Option<Tensor<2>> {
        self.0.products(rows, total)
    }

    fn routed(&self, block: usize, x: &Tensor<3>, mask: Option<&Tensor<4>>) -> Option<Routed> {
        self.0.routed(block, x, mask)
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.0.norm()
    }
}

impl Adapters<AnyAdapter> {
    /// The adapters themselves, if all are `A`s: the inverse of [`Adapters::erased`].
    pub fn typed<A: Module + ModuleDisplay + 'static>(&self) -> Option<Adapters<A>> {
        self.try_with(|any| any.get::<A>().cloned())
    }
}

impl<A: Adapter + Module + ModuleDisplay + 'static> Adapters<A> {
    /// The same adapters behind one type, with the same parameters.
    pub fn erased(&self) -> Adapters<AnyAdapter> {
        self.with(|adapter| AnyAdapter::new(adapter.clone()))
    }
}

/// A policy over adapters that have lost their type.
struct Over<A: Module + ModuleDisplay>(Box<dyn Policy<A>>);

impl<A: Adapter + Module + ModuleDisplay + 'static> Policy<AnyAdapter> for Over<A> {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<AnyAdapter>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        match adapters.typed::<A>() {
            Some(adapters) => self.0.gradients(step, &adapters, gradients),
            None => gradients,
        }
    }

    fn looks_back(&self, step: usize) -> usize {
        self.0.looks_back(step)
    }

    fn look(
        &mut self,
        adapters: &Adapters<AnyAdapter>,
        beside: &dyn Overlay,
        passes: &dyn Passes,
    ) -> Result<(), crate::Error> {
        let Some(adapters) = adapters.typed::<A>() else { return Ok(()) };
        self.0.look(&adapters, beside, passes)
    }

    fn adjust(
        &mut self,
        step: usize,
        learning_rate: f64,
        adapters: &Adapters<AnyAdapter>,
    ) -> Result<Option<Adapters<AnyAdapter>>, crate::Error> {
        let Some(adapters) = adapters.typed::<A>() else { return Ok(None) };
        Ok(self.0.adjust(step, learning_rate, &adapters)?.map(|adapters| adapters.erased()))
    }

    fn state(&self) -> Result<Json, crate::Error> {
        self.0.state()
    }

    fn resume(&mut self, state: Json, device: &Device) -> Result<(), crate::Error> {
        self.0.resume(state, device)
    }
}

impl<A: Adapter + Module + ModuleDisplay + 'static> Guide<A> {
    /// For [erased](Adapters::erased) adapters.
    pub fn erased(self) -> Guide<AnyAdapter> {
        let policy =
            self.policy.map(|policy| Box::new(Over(policy)) as Box<dyn Policy<AnyAdapter>>);
        Guide { penalty: self.penalty.map(over), beside: self.beside.map(over), policy }
    }
}

/// The same of adapters that have lost their type.
fn over<A: Module + ModuleDisplay + 'static, T: 'static>(of: Made<A, T>) -> Made<AnyAdapter, T> {
    Arc::new(move |adapters| of(&adapters.typed::<A>()?))
}
