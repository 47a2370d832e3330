//! Outputs of a layer scaled and shifted: what several methods train.

use crate::numbers::Draw;
use crate::source::Source;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::nn::conv::{Conv1d, Conv2d};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Site};

/// `y ⊙ γ + β`, each `[fan_out]`: one number a channel at a convolution.
///
/// Folds: `Δ(W) = W ⊙ (γ - 1)` over columns, `Δ(b) = b ⊙ (γ - 1) + β`.
#[derive(Module, Debug)]
pub struct ScaleShift {
    /// `γ`.
    pub scale: Param<Tensor<1>>,
    /// `β`.
    pub shift: Param<Tensor<1>>,
}

/// The kinds of places whose outputs have channels and that have a weight to fold into.
pub(crate) const KINDS: &[Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d];

impl ScaleShift {
    /// `γ` and `β` by these names.
    pub(crate) fn build(
        site: &Site,
        [scale, shift]: [&'static str; 2],
        [begin_scale, begin_shift]: [Draw; 2],
        from: &mut impl Source,
    ) -> Result<Self, Error> {
        let shape = [site.fan_out()];
        let scale = from.take(scale, shape, begin_scale)?;
        Ok(Self { scale, shift: from.take(shift, shape, begin_shift)? })
    }

    pub(crate) fn tensors(&self, names: [&'static str; 2]) -> Vec<(&'static str, TensorData)> {
        names.into_iter().zip([&self.scale, &self.shift].map(|p| p.val().into_data())).collect()
    }

    /// `y ⊙ (γ - 1) + β`, the channels along `axis`.
    fn change<const D: usize>(&self, y: &Tensor<D>, axis: usize) -> Tensor<D> {
        let (scale, shift) = (self.scale.val() - 1.0, self.shift.val());
        let mut shape = [1; D];
        shape[axis] = y.dims()[axis];
        let change = y.clone().cast(scale.dtype()) * scale.reshape(shape) + shift.reshape(shape);
        change.cast(y.dtype())
    }
}

impl Adapter for ScaleShift {
    fn linear(&self, _layer: &Linear, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(self.change(y, 2))
    }

    fn conv1d(&self, _layer: &Conv1d, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(self.change(y, 1))
    }

    fn conv2d(&self, _layer: &Conv2d, _x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        Some(self.change(y, 1))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for ScaleShift {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let change = self.scale.val() - 1.0;
        Some(w.clone().cast(change.dtype()) * change.unsqueeze())
    }

    fn brings_bias(&self) -> bool {
        true
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.change(b, 0))
    }
}
