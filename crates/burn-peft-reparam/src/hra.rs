//! HRA: the input reflected by a few trained mirrors (arXiv 2405.17484).

use crate::common::{Bias, positive};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::nn::conv::Conv2d;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Scope, Site, Targets, as_matrix,
    composed,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Householder reflection adaptation (arXiv 2405.17484): `y = x·(H₁ H₂ ⋯ H_r)ᵀ·W + b` with
/// `Hᵢ = I - 2·uᵢuᵢᵀ`, `uᵢ` the unit columns of the trained `U [fan_in, r]`.
///
/// In the compact form `H₁ ⋯ H_r = I - U·T·Uᵀ`, `T⁻¹ = ½I + striu(UᵀU)`, a reflected input costs two thin
/// products. Parameters: `fan_in·r` a place. Folds: `Δ(W) = -U·Tᵀ·Uᵀ·W`. Columns begin as equal pairs, which
/// undo each other: an exact identity for an even `r`. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hra {
    /// Number of reflections, better even; default 8.
    pub r: usize,
    /// Gram and Schmidt's orthogonal columns, so that `H₁ ⋯ H_r = I - 2·U·Uᵀ`; default false. This is
    /// never the identity, and equal pairs would leave nothing of the second, so that all columns are drawn.
    #[serde(rename = "apply_GS")]
    pub apply_gs: bool,
    /// Pairs at the start; `false` draws all columns. Default true.
    pub init_weights: bool,
    /// Which biases of the model are trained beside it: "none", "all" or "hra_only"; default none.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Hra {
    fn default() -> Self {
        Self {
            r: 8,
            apply_gs: false,
            init_weights: true,
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// What HRA trains at one place.
#[derive(Module, Debug)]
pub struct HraAdapter {
    /// `U [fan_in, r]`, its columns of any length.
    pub hra_u: Param<Tensor<2>>,
    /// Whether the columns are made orthogonal.
    pub apply_gs: bool,
    /// `[r, r]` each: where the inverse of a triangle grows when its blocks double.
    levels: Vec<Tensor<2>>,
}

/// Columns of length 1.
fn unit(u: Tensor<2>) -> Tensor<2> {
    let length = (u.clone() * u.clone()).sum_dim(0).sqrt();
    u / length
}

/// Gram and Schmidt's orthonormal columns: each takes its share out of those that follow.
fn orthonormal(u: Tensor<2>) -> Tensor<2> {
    let [_, r] = u.dims();
    let mut rest = u;
    let mut columns = Vec::with_capacity(r);
    for following in (0..r).rev() {
        let column = unit(rest.clone().narrow(1, 0, 1));
        if following > 0 {
            rest = rest.narrow(1, 1, following);
            rest = rest.clone() - column.clone().matmul(column.clone().transpose().matmul(rest));
        }
        columns.push(column);
    }
    Tensor::cat(columns, 1)
}

/// For each size 1, 2, 4, .. of blocks on the diagonal of `[r, r]`, where those right of them stand with
/// which they make blocks of twice the size.
fn levels(r: usize, device: &Device) -> Vec<Tensor<2>> {
    let level = |level: u32| {
        let at = |i: usize, j: usize| i < j && (i ^ j).ilog2() == level;
        let mask = (0..r * r).map(|k| f32::from(u8::from(at(k / r, k % r)))).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(mask, [r, r]), &device.clone().inner())
    };
    (0..r.next_power_of_two().ilog2()).map(level).collect()
}

impl HraAdapter {
    fn new(u: Tensor<2>, apply_gs: bool) -> Self {
        let levels = levels(u.dims()[1], &u.device());
        Self { hra_u: Param::from_tensor(u), apply_gs, levels }
    }

    /// `(U, T)` with `H₁ ⋯ H_r = I - U·T·Uᵀ`.
    fn compact(&self) -> (Tensor<2>, Tensor<2>) {
        let u = self.hra_u.val();
        let [_, r] = u.dims();
        let eye = Tensor::<2>::eye(r, &u.device().inner());
        if self.apply_gs {
            return (orthonormal(u), eye * 2.0);
        }
        let u = unit(u);
        // T = 2·(I + N)⁻¹, N = 2·striu(UᵀU): from the inverses of two blocks on the diagonal to that of the
        // block which they make, [A B; 0 D]⁻¹ = [A⁻¹ -A⁻¹BD⁻¹; 0 D⁻¹], all blocks of one size at once.
        let n = u.clone().transpose().matmul(u.clone()) * 2.0;
        let inverse = self.levels.iter().fold(eye, |inverse, level| {
            let between = n.clone() * level.clone();
            inverse.clone() - inverse.clone().matmul(between).matmul(inverse)
        });
        (u, inverse * 2.0)
    }
}

impl Adapter for HraAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let (u, t) = self.compact();
        let input = x.clone().cast(u.dtype());
        let seen = input.clone().matmul(u.clone().unsqueeze()); // [batch, seq, r]
        let back = t.transpose().matmul(u.transpose()); // Tᵀ·Uᵀ
        let reflected = input - seen.matmul(back.unsqueeze());
        Some(Scope::plain().linear(layer, reflected.cast(x.dtype())))
    }

    /// `Δ(W) = -U·(Tᵀ·Uᵀ·W)` has rank `r`: a convolution into `r` channels, then one of 1x1.
    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        if layer.groups > 1 {
            return composed::conv2d(self, layer, x);
        }
        let (u, t) = self.compact();
        let w = layer.weight.val();
        let [out, channels, height, width] = w.dims();
        let [_, r] = u.dims();
        let mut down = layer.clone();
        let kernels = u.clone().transpose().reshape([r, channels, height, width]);
        down.weight = Param::initialized(layer.weight.id, kernels);
        down.bias = None;
        let up = t.transpose().matmul(u.clone().transpose().matmul(as_matrix(w).cast(u.dtype())));
        let up = up.transpose().reshape([out, r, 1, 1]);
        let seen = down.forward(x.clone().cast(u.dtype()));
        let options = ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
        Some(conv2d(seen, -up, None, options).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for HraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (u, t) = self.compact();
        let seen = u.clone().transpose().matmul(w.clone().cast(u.dtype()));
        Some(-u.matmul(t.transpose().matmul(seen)).cast(w.dtype()))
    }
}

impl Hra {
    /// With this number of reflections and these targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn fits(&self, site: &Site) -> Result<(), Error> {
        let (r, fan_in) = (self.r, site.fan_in());
        if r.checked_mul(fan_in.max(r)).is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("{r} reflections make more than 2^31 numbers at {}", site.path);
            return Err(Error::config("r", reason));
        }
        if self.apply_gs && r > fan_in {
            let reason = format!(
                "expected at most {fan_in} orthogonal columns (apply_GS) at {}, found {r}",
                site.path
            );
            return Err(Error::config("r", reason));
        }
        Ok(())
    }
}

impl Method for Hra {
    type Adapter = HraAdapter;
    type Shared = ();
    const NAME: &'static str = "HRA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn biases(&self) -> Biases {
        self.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        self.bias.check("hra_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights && self.r.is_multiple_of(2) && !self.apply_gs
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<HraAdapter, Error> {
        self.fits(site)?;
        let (r, fan_in) = (self.r, site.fan_in());
        let mut draw = |r: usize| uniform([fan_in, r], (1.0 / r as f32).sqrt(), rng, device);
        let u = match self.starts_as_identity() {
            true => draw(r / 2).unsqueeze_dim::<3>(2).repeat_dim(2, 2).reshape([fan_in, r]),
            false => draw(r),
        };
        Ok(HraAdapter::new(u, self.apply_gs))
    }

    fn fold(adapter: &HraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, targets.clone());
        vec![
            Self { r: 3, bias: Bias::Only("hra_only".into()), ..plain.clone() },
            Self { apply_gs: true, bias: Bias::All, ..plain.clone() },
            Self { init_weights: false, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        site.fan_in() * self.r
    }

    fn tensors(&self, _site: &Site, adapter: &HraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![("hra_u", adapter.hra_u.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<HraAdapter, Error> {
        self.fits(site)?;
        let u = file.take("hra_u", [site.fan_in(), self.r], device)?;
        Ok(HraAdapter::new(u, self.apply_gs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compact_form_is_the_product_of_reflections() {
        let device = Device::flex();
        for r in [1, 2, 3, 5, 8, 9] {
            let numbers: Vec<f32> = (0..10 * r).map(|i| (i * 29 % 17) as f32 / 8.0 - 1.0).collect();
            let u = Tensor::<2>::from_data(TensorData::new(numbers, [10, r]), &device);
            // The second column as the first: what pairs are at the start.
            let u = match r {
                1 => u,
                _ => u.clone().slice_assign([0..10, 1..2], u.narrow(1, 0, 1)),
            };
            let eye = Tensor::<2>::eye(10, &device);
            let product = (0..r).fold(eye.clone(), |product, i| {
                let u = unit(u.clone().narrow(1, i, 1));
                product.matmul(eye.clone() - u.clone().matmul(u.transpose()) * 2.0)
            });
            let (u, t) = HraAdapter::new(u, false).compact();
            let compact = eye - u.clone().matmul(t).matmul(u.transpose());
            let far = (product - compact).abs().max().into_scalar::<f32>();
            assert!(far < 1e-5, "{r}: {far}");
        }
    }
}
