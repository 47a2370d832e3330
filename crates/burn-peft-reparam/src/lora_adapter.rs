//! What LoRA trains at one place, and its faces on activations and parameters.

use crate::common::{drop, drops};
use crate::dora::unbiased;
use crate::init::Pair;
use crate::layout::{expand, kernel};
use crate::lora_variant::LoraVariant;
use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::{conv1d, conv2d, embedding};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor};
use burn_peft_core::{Adapter, Fold, SeenTokens, as_matrix, widened};
use burn_peft_kernels::{linear, low_rank};

/// What LoRA trains at one place.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`; none where the init holds it constant.
    pub lora_b: Option<Param<Tensor<2>>>,
    /// The bias on `B`, `[fan_out]`.
    pub lora_bias: Option<Param<Tensor<1>>>,
    /// What DoRA or another variant has beside the factors.
    pub variant: Option<LoraVariant>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
    /// More columns of `A` that are constant: `A0`.
    pub(crate) constant_a: Option<Tensor<2>>,
    /// More rows of `B` that are constant: `-B0`, or all of it.
    pub(crate) constant_b: Option<Tensor<2>>,
}

/// A trained part with a constant one beside it.
fn join(trained: Tensor<2>, constant: &Option<Tensor<2>>, axis: usize) -> Tensor<2> {
    match constant {
        Some(constant) => Tensor::cat(vec![trained, constant.clone()], axis),
        None => trained,
    }
}

impl LoraAdapter {
    /// The difference `s·A·B` alone, without dropout: what a kin of LoRA is at one moment.
    pub(crate) fn of(a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Self {
        Self {
            // Never visited, so that the ids do not matter.
            lora_a: Param::initialized(ParamId::from(0), a),
            lora_b: Some(Param::initialized(ParamId::from(0), b)),
            lora_bias: None,
            variant: None,
            dropout: DropoutConfig::new(0.0).init(),
            scaling,
            constant_a: None,
            constant_b: None,
        }
    }

    /// `A` and `B` as they act: `s·A·B` is the difference, or the part of it that is a product.
    pub(crate) fn factors(&self) -> Pair {
        match &self.variant {
            Some(variant) => variant.factors(self.stored()),
            None => self.stored(),
        }
    }

    /// `A` and `B` with their constant parts, as the file holds them.
    pub(crate) fn stored(&self) -> Pair {
        let a = join(self.lora_a.val(), &self.constant_a, 1);
        let b = match (&self.lora_b, &self.constant_b) {
            (Some(b), constant) => join(b.val(), constant, 0),
            (None, Some(b)) => b.clone(),
            (None, None) => Tensor::zeros([a.dims()[1], 0], &a.device()), // is never made
        };
        (a, b)
    }

    /// `δ` out of `product(x, A, B)`, the effect of `s·A·B`: the same, or what DoRA makes of that
    /// and of `own`, the layer without its bias on an input from which dropout took something.
    fn effect<const D: usize, const W: usize>(
        &self,
        x: &Tensor<D>,
        y: &Tensor<D>,
        axis: usize,
        weight: &Param<Tensor<W>>,
        own: impl FnOnce(Option<Tensor<D>>) -> Tensor<D>,
        product: impl FnOnce(Tensor<D>, Tensor<2>, Tensor<2>) -> Tensor<D>,
    ) -> Option<Tensor<D>> {
        let (mut a, b) = self.factors();
        let x = drop(x, &self.dropout, &a);
        if let Some(LoraVariant::Monteclora(sampler)) = &self.variant {
            a = sampler.sampled(a);
        }
        let delta = product(x.clone(), a.clone(), b.clone());
        let Some(LoraVariant::Dora(dora)) = &self.variant else {
            return Some(delta.cast(y.dtype()));
        };
        let own = own(drops(&self.dropout, &a).then_some(x));
        let whole =
            dora.turn(&as_matrix(widened(weight.val())), &(a, b), self.scaling, (own, delta), axis);
        Some(whole.cast(y.dtype()))
    }
}

impl LoraAdapter {
    /// `δ` of a linear layer on every token.
    fn everywhere(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let own = |dropped: Option<Tensor<3>>| match dropped {
            Some(x) => linear(x.cast(y.dtype()), layer.weight.val(), None),
            None => unbiased(y, &layer.bias, 2),
        };
        let delta = self.effect(x, y, 2, &layer.weight, own, |x, a, b| {
            let h = match &self.variant {
                Some(LoraVariant::Velora(velora)) => velora.product(x, a),
                _ => linear(x, a, None),
            };
            let h = h * self.scaling; // [batch, seq, r]
            linear(h, b, self.lora_bias.as_ref().map(|bias| bias.val() * self.scaling))
        })?;
        Some(match &self.variant {
            Some(LoraVariant::Kasa(kasa)) => delta - kasa.lost_of(x.clone()).cast(y.dtype()),
            _ => delta,
        })
    }
}

impl Adapter for LoraAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        match &self.variant {
            Some(LoraVariant::ALora(_)) => None, // no token is known to be one of its own
            _ => self.everywhere(layer, x, y),
        }
    }

    /// The plain form, `x·W + b + s·x·A·B`, in one; where more than that happens, `linear` has the difference.
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let plain = self.variant.is_none() && self.lora_bias.is_none();
        let (a, b) = plain.then(|| self.factors())?;
        if drops(&self.dropout, &a) || x.dtype() != a.dtype() {
            return None;
        }
        let (w, bias) = (layer.weight.val(), layer.bias.as_ref().map(Param::val));
        Some(low_rank(x.clone(), w, bias, (a, b), self.scaling))
    }

    fn linear_reading(
        &self,
        layer: &Linear,
        x: &Tensor<3>,
        y: &Tensor<3>,
        tokens: &SeenTokens,
    ) -> Option<Tensor<3>> {
        let delta = self.everywhere(layer, x, y)?;
        Some(match &self.variant {
            Some(LoraVariant::ALora(invocation)) => {
                let mask = invocation.mask(tokens, x.dims()[1]); // [batch, seq]
                let mask = mask.cast(delta.dtype()).unsqueeze_dim(2);
                delta * mask
            }
            _ => delta,
        })
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let (a, b) = self.factors();
        let h = embedding(a.clone(), ids.clone()) * self.scaling; // [batch, seq, r]
        let delta = linear(h, b.clone(), None);
        let delta = match &self.variant {
            Some(LoraVariant::Dora(dora)) => {
                let w = widened(layer.weight.val());
                dora.turn(&w, &(a, b), self.scaling, (y.clone(), delta), 2)
            }
            _ => delta,
        };
        Some(delta.cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let run = |x: Tensor<3>, kernel: Tensor<3>| {
            let mut copy = layer.clone();
            copy.weight = Param::initialized(layer.weight.id, kernel);
            copy.bias = None;
            copy.forward(x)
        };
        let own = |dropped: Option<Tensor<3>>| match dropped {
            Some(x) => run(x.cast(y.dtype()), layer.weight.val()),
            None => unbiased(y, &layer.bias, 1),
        };
        self.effect(x, y, 1, &layer.weight, own, |x, a, b| {
            let h = run(x, kernel(a, layer.weight.dims())) * self.scaling;
            conv1d(h, expand(b), None, ConvOptions::new([1], [0], [1], 1))
        })
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let run = |x: Tensor<4>, kernel: Tensor<4>| {
            let mut copy = layer.clone();
            copy.weight = Param::initialized(layer.weight.id, kernel);
            copy.bias = None;
            copy.forward(x)
        };
        let own = |dropped: Option<Tensor<4>>| match dropped {
            Some(x) => run(x.cast(y.dtype()), layer.weight.val()),
            None => unbiased(y, &layer.bias, 1),
        };
        self.effect(x, y, 1, &layer.weight, own, |x, a, b| {
            let h = run(x, kernel(a, layer.weight.dims())) * self.scaling;
            conv2d(h, expand(b), None, ConvOptions::new([1, 1], [0, 0], [1, 1], 1))
        })
    }

    /// aLoRA asks which tokens it reads, and VeLoRA takes a mean over the batch as it is.
    fn by_token(&self) -> bool {
        !matches!(self.variant, Some(LoraVariant::ALora(_) | LoraVariant::Velora(_)))
    }
}

impl Fold for LoraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        if self.unfoldable().is_some() {
            return None;
        }
        let (a, b) = self.factors();
        let delta = (a.clone() * self.scaling).matmul(b.clone());
        Some(match &self.variant {
            Some(LoraVariant::Dora(dora)) => {
                dora.turn(w, &(a, b), self.scaling, (w.clone(), delta), 1)
            }
            Some(LoraVariant::Kasa(kasa)) => delta - kasa.lost(),
            _ => delta,
        })
    }

    fn unfoldable(&self) -> Option<&'static str> {
        matches!(self.variant, Some(LoraVariant::ALora(_))).then_some(
            "alora_invocation_tokens: the adapter acts on some tokens only, and no weight knows of tokens; \
             run the model with the adapter as an overlay instead",
        )
    }

    fn brings_bias(&self) -> bool {
        self.lora_bias.is_some()
    }

    fn bias(&self, _b: &Tensor<1>) -> Option<Tensor<1>> {
        let bias = self.lora_bias.as_ref().filter(|_| self.unfoldable().is_none());
        Some(bias?.val() * self.scaling)
    }
}
