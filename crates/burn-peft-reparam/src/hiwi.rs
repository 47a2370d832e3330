//! HiWi: the adapter reads the weight and not the activation, `W' = W + s·f(W·D)·U` (arXiv 2305.16742).

use crate::LoraAdapter;
use crate::common::{finite, positive};
use crate::low_rank::{bounded, stored, taken};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, as_matrix, widened,
};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// HiWi (arXiv 2305.16742): `y = x·(W + s·f(W·D)·U) + b` on weights, or
/// `y = xW + b + s·f(b·D)·U` on biases.
///
/// `D [fan_out, r] ~ U(±1/√fan_out)`, `U [r, fan_out]` zero at first. The adapter reads rows of
/// `W [fan_in, fan_out]`, which are as long as the bias, so that both forms have the same shapes; `W·D`
/// and `U` are then the factors of a LoRA, and nothing as large as `W` is formed. Parameters:
/// `2·r·fan_out` a place. Folds; once merged, the paper throws the adapter away.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HiWi {
    /// Width of the bottleneck; default 8.
    pub r: usize,
    /// `s`; default 1.
    pub scale: f64,
    /// Whether it changes weights or biases; default weights.
    pub parameters: Parameters,
    /// `f`; default none, `f(x) = x`.
    pub nonlinearity: Nonlinearity,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for HiWi {
    fn default() -> Self {
        Self {
            r: 8,
            scale: 1.0,
            parameters: Parameters::Weight,
            nonlinearity: Nonlinearity::None,
            targets: Targets::default(),
        }
    }
}

/// What [`HiWi`] changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parameters {
    /// The weight.
    #[default]
    Weight,
    /// The bias, which the place must have.
    Bias,
}

/// What [`HiWi`] does between its two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// Nothing.
    #[default]
    None,
    /// `max(x, 0)`.
    Relu,
}

/// What HiWi trains at one place.
#[derive(Module, Debug)]
pub struct HiWiAdapter {
    /// `D [fan_out, r]`.
    pub hiwi_down: Param<Tensor<2>>,
    /// `U [r, fan_out]`.
    pub hiwi_up: Param<Tensor<2>>,
    /// What is changed.
    #[module(skip)]
    pub parameters: Parameters,
    /// `f`.
    #[module(skip)]
    pub nonlinearity: Nonlinearity,
    /// `s`.
    pub scaling: f64,
}

impl HiWiAdapter {
    /// `f(rows·D)`.
    fn down<const D: usize>(&self, rows: Tensor<D>) -> Tensor<D> {
        let down = self.hiwi_down.val();
        let h = linear(rows.cast(down.dtype()), down, None);
        match self.nonlinearity {
            Nonlinearity::None => h,
            Nonlinearity::Relu => relu(h),
        }
    }

    /// The LoRA that this is on a weight.
    fn lora<const D: usize>(&self, weight: Tensor<D>) -> LoraAdapter {
        crate::lora::LoraAdapter::of(self.down(as_matrix(weight)), self.hiwi_up.val(), self.scaling)
    }

    /// `Δ(b)`, as large as `y` is along its channels.
    fn shift<const D: usize>(&self, bias: Tensor<1>, y: &Tensor<D>, channels: usize) -> Tensor<D> {
        let delta = self.down(bias.unsqueeze::<2>()).matmul(self.hiwi_up.val()) * self.scaling;
        let mut shape = [1; D];
        shape[channels] = y.dims()[channels];
        delta.reshape(shape).expand(y.dims()).cast(y.dtype())
    }
}

impl Adapter for HiWiAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        match self.parameters {
            Parameters::Weight => self.lora(widened(layer.weight.val())).linear(layer, x, y),
            Parameters::Bias => Some(self.shift(layer.bias.as_ref()?.val(), y, 2)),
        }
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        _ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        // The rows of the table that are asked for are the output.
        let h = self.down(y.clone()) * self.scaling;
        Some(linear(h, self.hiwi_up.val(), None).cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        match self.parameters {
            Parameters::Weight => self.lora(layer.weight.val()).conv1d(layer, x, y),
            Parameters::Bias => Some(self.shift(layer.bias.as_ref()?.val(), y, 1)),
        }
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        match self.parameters {
            Parameters::Weight => self.lora(layer.weight.val()).conv2d(layer, x, y),
            Parameters::Bias => Some(self.shift(layer.bias.as_ref()?.val(), y, 1)),
        }
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for HiWiAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        match self.parameters {
            Parameters::Weight => self.lora(w.clone()).weight(w),
            Parameters::Bias => None,
        }
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        match self.parameters {
            Parameters::Weight => None,
            Parameters::Bias => Some(self.shift(b.clone(), b, 0)),
        }
    }
}

impl HiWi {
    /// Refuses a place without the parameter, and ranks beyond a tensor's size.
    fn fits(&self, site: &Site) -> Result<(), Error> {
        if self.parameters == Parameters::Bias && site.bias.is_none() {
            let reason = "parameters: has no bias; expected one, or parameters = \"weight\"";
            return Err(Error::place(&site.path, reason));
        }
        bounded("r", &site.path, &[self.r, site.fan_in() + site.fan_out()])?;
        Ok(())
    }

    fn adapter(&self, [down, up]: [Tensor<2>; 2]) -> HiWiAdapter {
        HiWiAdapter {
            hiwi_down: Param::from_tensor(down),
            hiwi_up: Param::from_tensor(up),
            parameters: self.parameters,
            nonlinearity: self.nonlinearity,
            scaling: self.scale,
        }
    }
}

impl Method for HiWi {
    type Adapter = HiWiAdapter;
    type Shared = ();
    const NAME: &'static str = "HIWI";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["hiwi_up"];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        finite("scale", self.scale)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<HiWiAdapter, Error> {
        self.fits(site)?;
        let width = site.fan_out();
        let down = uniform([width, self.r], (1.0 / width as f32).sqrt(), rng, device);
        Ok(self.adapter([down, Tensor::zeros([self.r, width], device)]))
    }

    fn fold(adapter: &HiWiAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { r: 4, targets: targets.clone(), ..Self::default() };
        let (relu, bias) = (Nonlinearity::Relu, Parameters::Bias);
        vec![
            Self { nonlinearity: relu, scale: 0.5, ..plain.clone() },
            Self { parameters: bias, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        2 * self.r * site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &HiWiAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("hiwi_down", stored(adapter.hiwi_down.val())),
            ("hiwi_up", stored(adapter.hiwi_up.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<HiWiAdapter, Error> {
        self.fits(site)?;
        let width = site.fan_out();
        let down = taken("hiwi_down", [width, self.r], file, device)?;
        let up = taken("hiwi_up", [self.r, width], file, device)?;
        Ok(self.adapter([down, up]))
    }
}
