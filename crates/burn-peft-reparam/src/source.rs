//! Where the tensors of a place come from: drawn, or read. A method says its tensors' names and HF
//! PEFT's shapes once, to a [`Source`], and both ways follow.

use crate::random::{normal, uniform};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, PlaceTensors};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;

/// The same numbers on `device`, laid out without gaps: a transposed view is multiplied in another
/// order, and what was read must give what was made, bit for bit.
pub(crate) fn laid_out<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    Tensor::from_data(tensor.into_data(), device)
}

/// How a trained tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Draw {
    /// All zeros.
    Zeros,
    /// `U(±bound)`.
    Uniform(f32),
    /// `N(0, std²)`.
    Normal(f32),
}

impl Draw {
    /// PyTorch's `kaiming_uniform_(a=√5)` for a tensor of this shape there: `U(±1/√fan_in)`.
    pub(crate) fn kaiming(shape: &[usize]) -> Self {
        let fan_in: usize = shape.iter().skip(1).product();
        Self::Uniform((1.0 / fan_in.max(1) as f32).sqrt())
    }

    /// As [`Draw::kaiming`], and zeros for the tensors that keep a fresh adapter an identity.
    pub(crate) fn kaiming_but(zeros: &[&str], name: &str, shape: &[usize]) -> Self {
        if zeros.contains(&name) { Self::Zeros } else { Self::kaiming(shape) }
    }
}

/// Gives a place's tensors by HF PEFT's names and shapes.
pub(crate) trait Source {
    /// The tensor of that name.
    fn take<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, Error>;
}

/// Draws them, each as `draw` says of its name and shape.
pub(crate) struct Drawn<'a, F: Fn(&str, &[usize]) -> Draw> {
    pub(crate) rng: &'a mut ChaCha8Rng,
    pub(crate) device: &'a Device,
    pub(crate) draw: F,
}

impl<F: Fn(&str, &[usize]) -> Draw> Source for Drawn<'_, F> {
    fn take<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, Error> {
        Ok(match (self.draw)(name, &shape) {
            Draw::Zeros => Tensor::zeros(shape, self.device),
            Draw::Uniform(bound) => uniform(shape, bound, self.rng, self.device),
            Draw::Normal(std) => normal(shape, std, self.rng, self.device),
        })
    }
}

/// Reads them.
pub(crate) struct Read<'a, 'f> {
    pub(crate) file: &'a mut PlaceTensors<'f>,
    pub(crate) device: &'a Device,
}

impl Source for Read<'_, '_> {
    fn take<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, Error> {
        self.file.take(name, shape, self.device)
    }
}

/// A matrix, whole or as a product of two thin ones.
#[derive(Module, Debug)]
pub struct Factor {
    /// The matrix, or its left factor `[rows, r]`.
    pub a: Param<Tensor<2>>,
    /// The right factor `[r, columns]`.
    pub b: Option<Param<Tensor<2>>>,
}

impl Factor {
    pub(crate) fn whole(a: Tensor<2>) -> Self {
        Self { a: Param::from_tensor(a), b: None }
    }

    pub(crate) fn thin(a: Tensor<2>, b: Tensor<2>) -> Self {
        Self { a: Param::from_tensor(a), b: Some(Param::from_tensor(b)) }
    }

    /// `[rows, columns]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        let [rows, columns] = self.a.dims();
        [rows, self.b.as_ref().map_or(columns, |b| b.dims()[1])]
    }

    /// The matrix, multiplied out.
    pub(crate) fn matrix(&self) -> Tensor<2> {
        match &self.b {
            None => self.a.val(),
            Some(b) => self.a.val().matmul(b.val()),
        }
    }

    /// `x·M` over the last axis, never multiplying `M` out.
    pub(crate) fn after(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.b {
            None => linear(x, self.a.val(), None),
            Some(b) => linear(linear(x, self.a.val(), None), b.val(), None),
        }
    }
}
