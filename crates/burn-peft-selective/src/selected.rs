//! What the methods with a mask train: the differences at the chosen numbers, and nothing beside them.

use crate::mask::{Chosen, Mask, chosen_of, index_data, shape_data};
use crate::parameter::Parameter;
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, PlaceTensors, Site, Value, composed};

/// Differences at some numbers of one parameter: `Δ` is zero but at the places, where it is the values.
#[derive(Module, Debug)]
pub struct Entries {
    /// The trained differences, in the checkpoint's order, `[n]`.
    pub values: Param<Tensor<1>>,
    /// Where each stands, counted row by row through the weight as a matrix `[fan_in, fan_out]`, `[n]`.
    pub places: Tensor<1, Int>,
}

impl Entries {
    fn zeros(parameter: Parameter, site: &Site, chosen: &Chosen, device: &Device) -> Self {
        let values = Tensor::zeros([chosen.indices().len()], device);
        let places = parameter.places(site, chosen.indices(), device);
        Self { values: Param::from_tensor(values), places }
    }

    /// `Δ` of the whole parameter, its `size` numbers in a row.
    fn delta(&self, size: usize) -> Tensor<1> {
        // Adding -0 leaves every number as it is, bit for bit; adding +0 would turn -0 into +0.
        let values = self.values.val();
        let nothing = Tensor::<1>::full([size], -0.0, &self.places.device()).cast(values.dtype());
        nothing.select_assign(0, self.places.clone(), values, IndexingUpdateOp::Add)
    }
}

/// What a method with a mask trains at one place: differences at the chosen numbers of its weight and of its
/// bias, where some are chosen.
#[derive(Module, Debug)]
pub struct SelectedAdapter {
    /// Of the weight; of a norm, its scale.
    pub weight: Option<Entries>,
    /// Of the bias; of a norm, its shift.
    pub bias: Option<Entries>,
    /// Of a norm, the frozen scale and shift that the differences are added to: handles on the base's own.
    norm: Option<Norm>,
}

/// A frozen norm's parameters.
#[derive(Module, Debug)]
pub(crate) struct Norm {
    scale: Tensor<1>,
    shift: Option<Tensor<1>>,
}

impl Norm {
    /// The norm at `site`, if one stands there.
    pub(crate) fn of(site: &Site) -> Option<Self> {
        match (&site.weight, site.kind) {
            (Value::D1(scale), Kind::Norm) => {
                Some(Self { scale: scale.clone(), shift: site.bias.clone() })
            }
            _ => None,
        }
    }

    /// Its parameters with these differences, where there are some.
    pub(crate) fn moved(&self, by: &impl Fold) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        let moved = |base: &Tensor<1>, delta: Option<Tensor<1>>| {
            let delta = delta?;
            Some((base.clone().cast(delta.dtype()) + delta).cast(base.dtype()))
        };
        let shift = self.shift.as_ref().and_then(|b| moved(b, by.bias(b)));
        (moved(&self.scale, by.vector(&self.scale)), shift)
    }
}

impl SelectedAdapter {
    /// Zero differences at the numbers that `mask` chooses at `site`.
    ///
    /// # Errors
    /// [`Error::Place`] where the mask is of a parameter of another shape.
    pub fn new(site: &Site, mask: &Mask, device: &Device) -> Result<Self, Error> {
        let entries = |parameter: Parameter| {
            let Some(chosen) = mask.get(&parameter.name(site)) else { return Ok(None) };
            fits(site, parameter, chosen)?;
            Ok(Some(Entries::zeros(parameter, site, chosen, device)))
        };
        let (weight, bias) = (entries(Parameter::Weight)?, entries(Parameter::Bias)?);
        Ok(Self { weight, bias, norm: Norm::of(site) })
    }

    fn entries(&self, parameter: Parameter) -> Option<&Entries> {
        match parameter {
            Parameter::Weight => self.weight.as_ref(),
            Parameter::Bias => self.bias.as_ref(),
        }
    }

    /// The numbers that are trained at `site`, by the names of their parameters.
    pub fn chosen(&self, site: &Site) -> Vec<(String, Chosen)> {
        let one = |parameter: Parameter| {
            let entries = self.entries(parameter)?;
            let indices = parameter.indices(site, &entries.places);
            Some((parameter.name(site), Chosen::new(parameter.shape(site)?, indices)?))
        };
        Parameter::ALL.into_iter().filter_map(one).collect()
    }

    /// Of each parameter of which something is chosen, `PARAMETER.values [n]`, `PARAMETER.indices [n]` and
    /// `PARAMETER.shape [axes]`.
    pub(crate) fn tensors(&self, site: &Site) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (parameter, [values, indices, shape]) in
            [(Parameter::Weight, WEIGHT), (Parameter::Bias, BIAS)]
        {
            let Some(entries) = self.entries(parameter) else { continue };
            let held = index_data(indices, &parameter.indices(site, &entries.places));
            let (Ok(held), Some(sizes)) = (held, parameter.shape(site)) else { continue };
            tensors.push((values, entries.values.val().into_data()));
            tensors.push((indices, held));
            tensors.push((shape, shape_data(&sizes)));
        }
        tensors
    }

    /// The inverse of [`SelectedAdapter::tensors`].
    pub(crate) fn restore(
        site: &Site,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self, Error> {
        let mut entries = |parameter: Parameter, [values, indices, shape]: [&str; 3]| {
            if !file.has(values) {
                return Ok(None);
            }
            let (_, held) = file.take_ints(indices)?;
            let (_, sizes) = file.take_ints(shape)?;
            let chosen = chosen_of(&parameter.name(site), &sizes, &held)?;
            fits(site, parameter, &chosen)?;
            let values = file.take(values, [chosen.indices().len()], device)?;
            let places = parameter.places(site, chosen.indices(), device);
            Ok(Some(Entries { values: Param::from_tensor(values), places }))
        };
        let (weight, bias) = (entries(Parameter::Weight, WEIGHT)?, entries(Parameter::Bias, BIAS)?);
        Ok(Self { weight, bias, norm: Norm::of(site) })
    }
}

const WEIGHT: [&str; 3] = ["weight.values", "weight.indices", "weight.shape"];
const BIAS: [&str; 3] = ["bias.values", "bias.indices", "bias.shape"];

pub(crate) fn fits(site: &Site, parameter: Parameter, chosen: &Chosen) -> Result<(), Error> {
    if i32::try_from(parameter.size(site)).is_err() {
        let reason = "has a parameter of 2^31 or more numbers, of which none can be chosen";
        return Err(Error::place(&site.path, reason));
    }
    let (found, name) = (chosen.shape(), parameter.name(site));
    match parameter.shape(site) {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => {
            Err(Error::tensor(name, format!("shape {expected:?}"), format!("shape {found:?}")))
        }
        None => Err(Error::tensor(name, "no such parameter in the model", format!("{found:?}"))),
    }
}

impl Adapter for SelectedAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        linear(self, layer, x, y)
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        _y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        composed::embedding(self, layer, ids)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        conv1d(self, layer, x, y)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        conv2d(self, layer, x, y)
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.norm.as_ref().map_or((None, None), |norm| norm.moved(self))
    }

    fn by_token(&self) -> bool {
        true
    }
}

/// `δ` of a linear layer whose weight and bias have differences.
pub(crate) fn linear(
    by: &impl Fold,
    layer: &Linear,
    x: &Tensor<3>,
    y: &Tensor<3>,
) -> Option<Tensor<3>> {
    if let Some(whole) = composed::linear(by, layer, x) {
        return Some(whole - y.clone());
    }
    let delta = Fold::bias(by, &layer.bias.as_ref()?.val())?;
    Some(delta.unsqueeze::<3>().expand(y.dims()).cast(y.dtype()))
}

/// `δ` of a convolution whose weight and bias have differences.
pub(crate) fn conv1d(
    by: &impl Fold,
    layer: &Conv1d,
    x: &Tensor<3>,
    y: &Tensor<3>,
) -> Option<Tensor<3>> {
    let [_, channels, _] = y.dims();
    let bias = layer.bias.as_ref().and_then(|b| Fold::bias(by, &b.val()));
    let bias = bias.map(|b| b.reshape([1, channels, 1]).expand(y.dims()));
    sum(composed::conv1d(by, layer, x), bias)
}

/// The same over images.
pub(crate) fn conv2d(
    by: &impl Fold,
    layer: &Conv2d,
    x: &Tensor<4>,
    y: &Tensor<4>,
) -> Option<Tensor<4>> {
    let [_, channels, _, _] = y.dims();
    let bias = layer.bias.as_ref().and_then(|b| Fold::bias(by, &b.val()));
    let bias = bias.map(|b| b.reshape([1, channels, 1, 1]).expand(y.dims()));
    sum(composed::conv2d(by, layer, x), bias)
}

pub(crate) fn sum<const D: usize>(a: Option<Tensor<D>>, b: Option<Tensor<D>>) -> Option<Tensor<D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

impl Fold for SelectedAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let [rows, columns] = w.dims();
        Some(self.weight.as_ref()?.delta(rows * columns).reshape([rows, columns]))
    }

    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.weight.as_ref()?.delta(v.dims()[0]))
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.bias.as_ref()?.delta(b.dims()[0]))
    }
}
