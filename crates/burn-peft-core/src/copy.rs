//! A trained copy of a layer's own parameters: `modules_to_save` and trained biases.

use crate::{Adapter, Fold, Site, Value, widened};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, Int, Tensor};

/// Which parameters of a layer are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Weight and, where there is one, bias.
    Whole,
    /// The bias alone.
    Bias,
}

/// `Δ(W) = W' - W` with `W'` trained: the layer's own parameters, as a difference like any other.
#[derive(Module, Debug)]
pub struct TrainedCopy {
    /// The trained weight as a matrix `[fan_in, fan_out]`.
    pub weight: Option<Param<Tensor<2>>>,
    /// The trained scale of a norm, `[dim]`.
    pub scale: Option<Param<Tensor<1>>>,
    /// The trained bias, `[fan_out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

/// A handle on `tensor` as a trainable leaf of `device`.
pub(crate) fn leaf<const D: usize>(tensor: Tensor<D>, device: &Device) -> Param<Tensor<D>> {
    let plain = tensor.without_autodiff().to_device(&device.clone().inner());
    let lifted = if device.is_autodiff() { Tensor::from_inner(plain) } else { plain };
    Param::from_tensor(lifted.detach())
}

impl TrainedCopy {
    /// A copy of the parameters at `site`, trainable on `device`; equal to the base at first, and in f32 where that is
    /// in half precision.
    ///
    /// `None` where the place has no such part.
    pub fn of(site: &Site, part: Part, device: &Device) -> Option<Self> {
        let bias = site.bias.clone().map(|bias| leaf(bias, device));
        let copy = match part {
            Part::Bias => Self { weight: None, scale: None, bias },
            Part::Whole => Self {
                weight: site.matrix().map(|weight| leaf(weight, device)),
                scale: match &site.weight {
                    Value::D1(scale) => Some(leaf(scale.clone(), device)),
                    _ => None,
                },
                bias,
            },
        };
        let empty = copy.weight.is_none() && copy.scale.is_none() && copy.bias.is_none();
        (!empty).then_some(copy)
    }

    fn replace_bias(&self, bias: &Option<Param<Tensor<1>>>) -> Option<Param<Tensor<1>>> {
        self.bias.clone().or_else(|| bias.clone())
    }
}

impl Adapter for TrainedCopy {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        if self.weight.is_some() {
            return self.linear_whole(layer, x).map(|whole| whole - y.clone());
        }
        let delta = self.bias.as_ref()?.val() - widened(layer.bias.as_ref()?.val());
        Some(delta.unsqueeze::<3>().expand(y.dims()))
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let weight = self.weight.as_ref()?.val();
        let bias = self.replace_bias(&layer.bias).map(|bias| bias.val());
        Some(burn_peft_kernels::linear(x.clone(), weight, bias))
    }

    fn by_token(&self) -> bool {
        true
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let copy = Embedding { weight: self.weight.clone()? };
        Some(copy.forward(ids.clone()) - y.clone())
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let mut copy = layer.clone();
        if let Some(weight) = &self.weight {
            let shape = layer.weight.dims();
            copy.weight = weight.clone().consume_as(|w| crate::from_matrix(w, shape));
        }
        copy.bias = self.replace_bias(&layer.bias);
        Some(copy.forward(x.clone()) - y.clone())
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let mut copy = layer.clone();
        if let Some(weight) = &self.weight {
            let shape = layer.weight.dims();
            copy.weight = weight.clone().consume_as(|w| crate::from_matrix(w, shape));
        }
        copy.bias = self.replace_bias(&layer.bias);
        Some(copy.forward(x.clone()) - y.clone())
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        (self.scale.as_ref().map(Param::val), self.bias.as_ref().map(Param::val))
    }
}

impl Fold for TrainedCopy {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.weight.as_ref()?.val() - w.clone())
    }

    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.scale.as_ref()?.val() - v.clone())
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.bias.as_ref()?.val() - b.clone())
    }
}

/// Turns a parameter into one of another rank without losing its place in the autodiff graph.
trait ConsumeAs {
    fn consume_as<const D: usize>(
        self,
        map: impl FnOnce(Tensor<2>) -> Tensor<D>,
    ) -> Param<Tensor<D>>;
}

impl ConsumeAs for Param<Tensor<2>> {
    fn consume_as<const D: usize>(
        self,
        map: impl FnOnce(Tensor<2>) -> Tensor<D>,
    ) -> Param<Tensor<D>> {
        let id = self.id;
        Param::initialized(id, map(self.val()))
    }
}
