//! A frozen base and trained adapters as one Burn module, for a training loop.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::Device;
use std::sync::Arc;

/// A value that training never touches: to Burn it has no parameters, so that an optimizer, a
/// gradient or a checkpoint never meets it. Cloning shares it.
#[derive(Debug)]
pub struct Frozen<M>(Arc<M>);

impl<M> Frozen<M> {
    /// Freezes a model. It should live on the plain device.
    pub fn new(model: M) -> Self {
        Self(Arc::new(model))
    }
}

impl<M> Clone for Frozen<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M> std::ops::Deref for Frozen<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.0
    }
}

impl<M: std::fmt::Debug + Send + Sync> Module for Frozen<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }
    fn fork(self, _device: &Device) -> Self {
        self
    }
    fn to_device(self, _device: &Device) -> Self {
        self
    }
    fn train(self) -> Self {
        self
    }
    fn valid(&self) -> Self {
        self.clone()
    }
    fn materialize(self) -> Self {
        self
    }
    fn visit<V: ModuleVisitor>(&self, _visitor: &mut V) {}
    fn map<R: ModuleMapper>(self, _mapper: &mut R) -> Self {
        self
    }
}

impl<M: std::fmt::Debug + Send + Sync> ModuleDisplayDefault for Frozen<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&"frozen base").optional()
    }
}
impl<M: std::fmt::Debug + Send + Sync> ModuleDisplay for Frozen<M> {}

/// A frozen base with adapters over it: what a training loop holds. Its record is the adapters'.
#[derive(Module, Debug)]
pub struct Tuned<M: std::fmt::Debug + Send + Sync, A: Module + ModuleDisplay> {
    /// The base model, on the plain device.
    pub base: Frozen<M>,
    /// What is trained.
    pub adapters: A,
}

impl<M: std::fmt::Debug + Send + Sync, A: Module + ModuleDisplay> Tuned<M, A> {
    /// Lays `adapters` over `base`.
    pub fn new(base: M, adapters: A) -> Self {
        Self {
            base: Frozen::new(base),
            adapters,
        }
    }
}
