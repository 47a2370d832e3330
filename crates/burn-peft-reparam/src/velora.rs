//! VeLoRA (arXiv 2405.17991): LoRA whose backward pass keeps one number of a group of inputs.

use crate::common::positive;
use crate::init::Place;
use crate::random::normal;
use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Error, PlaceTensors};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const EMBED: &str = "lora_velora_embed";

/// Options of VeLoRA (arXiv 2405.17991, section 3): the forward pass is LoRA's, and so are all gradients but `A`'s,
/// which is that of inputs made up of their projections: each token's inputs are cut into groups of `D =
/// ⌈fan_in / num_groups⌉` (zeros at the end), `x̂ = scale·(x·e)·eᵀ` for each group with one unit vector `e [D]`. What a training holds
/// of `x` for `A` is then `num_groups` numbers a token.
///
/// It trains LoRA's factors, and folds as they do. The file holds `e` too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VeloraConfig {
    /// Default 64.
    pub num_groups: usize,
    /// Default 1.
    pub scale: f64,
    /// Where `e` comes from.
    pub init_type: VeloraInit,
}

/// Where VeLoRA's `e` comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VeloraInit {
    /// The mean of all groups of the batch at hand, of length 1.
    #[default]
    BatchAverage,
    /// That of the first batch alone; refused, because a forward pass keeps nothing for the next one.
    BatchAverageOnce,
    /// Drawn from `N(0, 1)` and made of length 1, once for all.
    Random,
}

impl Default for VeloraConfig {
    fn default() -> Self {
        Self { num_groups: 64, scale: 1.0, init_type: VeloraInit::default() }
    }
}

impl VeloraConfig {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::config("velora_config", reason));
        if positive("num_groups", self.num_groups).is_err() {
            return refuse("num_groups: expected 1 or more, found 0".into());
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return refuse(format!("scale: expected more than 0, found {}", self.scale));
        }
        match self.init_type {
            VeloraInit::BatchAverageOnce => refuse(
                "init_type: `batch_average_once` is not implemented; expected \"batch_average\" or \
                 \"random\""
                    .into(),
            ),
            _ => Ok(()),
        }
    }
}

/// What VeLoRA has at a place beside LoRA's factors: nothing that is trained.
#[derive(Module, Debug)]
pub struct Velora {
    /// `e [D]`, constant; what the file says of it, where each batch has its own.
    embed: Tensor<1>,
    num_groups: usize,
    scale: f64,
    #[module(skip)]
    of_batch: bool,
}

impl Velora {
    pub(crate) fn new(config: &VeloraConfig, place: &Place<'_>, rng: &mut ChaCha8Rng) -> Self {
        let (width, device) = (config.width(place), place.device);
        let embed = match config.init_type {
            VeloraInit::Random => unit(normal([width], 1.0, rng, device)),
            _ => Tensor::zeros([width], device), // as HF PEFT has it before the first batch
        };
        Self::with(config, embed)
    }

    pub(crate) fn restored(
        config: &VeloraConfig,
        place: &Place<'_>,
        file: &mut PlaceTensors<'_>,
    ) -> Result<Self, Error> {
        Ok(Self::with(config, file.take(EMBED, [config.width(place)], place.device)?))
    }

    fn with(config: &VeloraConfig, embed: Tensor<1>) -> Self {
        Self {
            embed: embed.without_autodiff(),
            num_groups: config.num_groups,
            scale: config.scale,
            of_batch: config.init_type == VeloraInit::BatchAverage,
        }
    }

    pub(crate) fn tensors(&self) -> [(&'static str, TensorData); 1] {
        [(EMBED, self.embed.clone().into_data())]
    }

    /// `x·A`, with the gradient of `A` out of `x̂`.
    pub(crate) fn product(&self, x: Tensor<3>, a: Tensor<2>) -> Tensor<3> {
        if !a.is_autodiff() {
            return linear(x, a, None);
        }
        let ([batch, seq, fan_in], [_, r], groups) = (x.dims(), a.dims(), self.num_groups);
        let [width] = self.embed.dims();
        let left = groups * width - fan_in;
        let cut = padded(x.clone().without_autodiff(), 2, left);
        let cut = cut.reshape([batch * seq * groups, width]);
        let e = match self.of_batch {
            true => unit(cut.clone().mean_dim(0).flatten::<1>(0, 1)),
            false => self.embed.clone().cast(cut.dtype()),
        };
        let kept = cut.matmul(e.clone().unsqueeze_dim(1)).reshape([batch, seq, groups]); // x·e
        let parts = padded(a.clone(), 0, left).reshape([groups, width, r]);
        let seen = (parts * e.reshape([1, width, 1])).sum_dim(1).reshape([groups, r]); // eᵀ·A
        let made = linear(kept, seen, None) * self.scale; // x̂·A
        linear(x, a.without_autodiff(), None) + (made.clone() - made.without_autodiff())
    }
}

impl VeloraConfig {
    /// `D`.
    fn width(&self, place: &Place<'_>) -> usize {
        place.site.fan_in().div_ceil(self.num_groups)
    }
}

/// With this many zeros at the end of an axis.
fn padded<const D: usize>(tensor: Tensor<D>, axis: usize, zeros: usize) -> Tensor<D> {
    if zeros == 0 {
        return tensor;
    }
    let mut shape = tensor.dims();
    shape[axis] = zeros;
    let zeros: Tensor<D> = Tensor::zeros(shape, &tensor.device().inner());
    Tensor::cat(vec![tensor.clone(), zeros.cast(tensor.dtype())], axis)
}

/// Of length 1; zeros become equal numbers.
fn unit(e: Tensor<1>) -> Tensor<1> {
    let ([width], length) = (e.dims(), e.clone().square().sum().sqrt());
    let nothing = length.clone().equal_elem(0.0).float().cast(e.dtype()); // 1 or 0
    (e + nothing.clone()) / (length + nothing * (width as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::{Velora, unit};
    use burn::tensor::{Device, Distribution, Tensor};

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    #[test]
    fn the_gradient_is_that_of_the_inputs_made_up() {
        let device = Device::flex();
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([2, 3, 5], normal, &device);
        let g = Tensor::<3>::random([2, 3, 2], normal, &device);
        let a = Tensor::<2>::random([5, 2], normal, &device);
        let fixed = unit(Tensor::from_floats([1.0, -2.0, 0.5], &device));
        for of_batch in [true, false] {
            let velora = Velora { embed: fixed.clone(), num_groups: 2, scale: 1.5, of_batch };
            let trained = Tensor::from_data(a.to_data(), &device.clone().autodiff()).require_grad();
            let y = velora.product(x.clone(), trained.clone());
            let plain = velora.product(x.clone(), a.clone());
            let same = plain.equal(y.clone().without_autodiff()).all().into_scalar::<bool>();
            assert!(same, "the forward pass is LoRA's");
            let gradients = (y * g.clone()).sum().backward();
            let found = numbers(trained.grad(&gradients).expect("has one"));

            // Two groups of three, the last with a zero at its end.
            let (x, g) = (numbers(x.clone()), numbers(g.clone()));
            let at = |token: usize, i: usize| if i < 5 { x[token * 5 + i] } else { 0.0 };
            let mean = |k| {
                let groups = (0..6).flat_map(|token| [at(token, k), at(token, 3 + k)]);
                groups.sum::<f64>() / 12.0
            };
            let mut e = match of_batch {
                true => [0, 1, 2].map(mean).to_vec(),
                false => numbers(fixed.clone()),
            };
            let length = e.iter().map(|v| v * v).sum::<f64>().sqrt();
            e.iter_mut().for_each(|v| *v /= length);
            for i in 0..5 {
                for column in 0..2 {
                    let of = |token: usize| {
                        let group = i / 3 * 3;
                        let kept: f64 = (0..3).map(|k| at(token, group + k) * e[k]).sum();
                        1.5 * kept * e[i % 3] * g[token * 2 + column]
                    };
                    let expected: f64 = (0..6).map(of).sum();
                    let far = (found[i * 2 + column] - expected).abs();
                    assert!(far < 64.0 * f64::from(f32::EPSILON) * 10.0, "{i} {column}: {far}");
                }
            }
        }
        let equal = numbers(unit(Tensor::from_floats([0.0; 4], &device)));
        assert!(equal.iter().all(|v| (v - 0.5).abs() < 1e-6), "{equal:?}");
    }
}
