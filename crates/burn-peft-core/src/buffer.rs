//! State of an adapter that is not trained.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use std::collections::BTreeSet;

/// A tensor of an adapter that a [`Policy`](crate::Policy) sets and no gradient reaches: a mask over
/// ranks, a stage that was merged. Checkpoints hold it as they hold parameters, and it counts as none
/// ([`trained_parameters`]). What never changes needs no buffer; a plain tensor does.
#[derive(Module, Debug)]
pub struct Buffer<const D: usize> {
    value: Param<Tensor<D>>,
}

impl<const D: usize> Buffer<D> {
    /// Of these numbers, on their device.
    pub fn new(value: Tensor<D>) -> Self {
        let value = Param::from_tensor(value.detach()).set_require_grad(false);
        Self { value }
    }

    /// The numbers, a constant to every gradient.
    pub fn val(&self) -> Tensor<D> {
        self.value.val().without_autodiff()
    }

    /// Whether it lies on an autodiff device, which is to say that a training is on.
    pub fn is_training(&self) -> bool {
        self.value.val().is_autodiff()
    }

    /// The same buffer with other numbers, on the device where it was.
    pub fn with(&self, value: Tensor<D>) -> Self {
        let plain = value.without_autodiff();
        let value = if self.is_training() { Tensor::from_inner(plain) } else { plain };
        let param = Param::from_tensor(value.detach()).set_require_grad(false);
        Self { value: Param::initialized(self.value.id, param.val()).set_require_grad(false) }
    }
}

/// Passes over what is no trained parameter: the value of a [`Buffer`]. A visitor or mapper of its own
/// tells it of each module that it enters and leaves.
#[derive(Debug, Default, Clone)]
pub struct Trained {
    containers: Vec<bool>,
}

impl Trained {
    /// As a visitor's or mapper's `enter_module`.
    pub fn enter(&mut self, container_type: &str) {
        self.containers.push(container_type == "Struct:Buffer");
    }

    /// As a visitor's or mapper's `exit_module`.
    pub fn exit(&mut self) {
        self.containers.pop();
    }

    /// Whether the parameter that is met now is trained.
    pub fn here(&self) -> bool {
        !self.containers.last().copied().unwrap_or(false)
    }
}

/// Counts trained parameters, those that several places share once, at the first.
#[derive(Default)]
pub(crate) struct Count {
    trained: Trained,
    met: BTreeSet<ParamId>,
    count: usize,
}

impl Count {
    /// How many of `module` were not met before.
    pub(crate) fn more<M: Module>(&mut self, module: &M) -> usize {
        let before = self.count;
        module.visit(self);
        self.count - before
    }
}

impl ModuleVisitor for Count {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.trained.enter(container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.trained.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.trained.here() && self.met.insert(param.id) {
            self.count += param.dims().iter().product::<usize>();
        }
    }
}

/// Number of trained parameters: all but those of [`Buffer`]s.
pub fn trained_parameters<M: Module>(module: &M) -> usize {
    Count::default().more(module)
}
