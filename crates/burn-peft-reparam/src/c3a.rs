//! C3A: the difference is made of circulant blocks (arXiv 2407.19342).

use crate::common::{Bias, positive};
use crate::random::{normal, uniform};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, pattern_value,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::f64::consts::TAU;

/// C3A (arXiv 2407.19342): `y = xW + b + δ(x)`, where output block `m` of `δ` is `Σₙ xₙ ⋆ wₘₙ / fan_in`:
/// the circular correlation of each input block, `block_size` numbers, with a trained kernel.
///
/// `w [block_size, fan_in / block_size, fan_out / block_size]`. On activations the correlation is a
/// product of spectra, `F(y) = Σ F(x)·F(w)*`, with matrices for `F`, which places of one block size
/// share. It begins as `init_weights` says, by default not as an identity. Parameters: `fan_in·fan_out /
/// block_size` a place. Folds: block `(n, m)` of `Δ(W)` holds `wₘₙ[(i − o) mod block_size] / fan_in`.
/// Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct C3a {
    /// Numbers in a block, which must divide both widths of every place; default 256.
    pub block_size: usize,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "c3a_only".
    pub bias: Bias,
    /// Other block sizes for layers whose path ends in a match of the key; the first match wins.
    pub block_size_pattern: IndexMap<String, usize>,
    /// How the kernels begin; default "xavier_uniform".
    pub init_weights: C3aInit,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for C3a {
    fn default() -> Self {
        Self {
            block_size: 256,
            bias: Bias::None,
            block_size_pattern: IndexMap::new(),
            init_weights: C3aInit::from("xavier_uniform"),
            targets: Targets::default(),
        }
    }
}

/// How the kernels begin: HF PEFT's `init_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum C3aInit {
    /// `true`: 0, an identity. `false`: as "xavier_uniform".
    Zeros(bool),
    /// "xavier_uniform": `U(±√(6 / (fan_in + fan_out)))`; "kaiming_uniform": `U(±√(1 / fan_in))`;
    /// "gaussian": `N(0, 1)`.
    Named(String),
}

impl From<&str> for C3aInit {
    fn from(name: &str) -> Self {
        Self::Named(name.into())
    }
}

/// The Fourier transform of `b` real numbers, as matrices. A spectrum is its `f = b / 2 + 1` real parts,
/// and then its imaginary ones.
#[derive(Module, Debug)]
pub struct Fourier {
    /// `F [2f, b]`.
    pub forward: Tensor<2>,
    /// `F⁻¹ [b, 2f]`.
    pub inverse: Tensor<2>,
}

impl Fourier {
    fn new(b: usize, device: &Device) -> Self {
        let f = b / 2 + 1;
        let (mut forward, mut inverse) = (vec![0.0_f32; 2 * f * b], vec![0.0_f32; b * 2 * f]);
        for k in 0..f {
            // Those between the first and the last stand for their mirror image too.
            let weight = if k == 0 || 2 * k == b { 1.0 } else { 2.0 } / b as f64;
            for i in 0..b {
                let (sin, cos) = (TAU * (i * k % b) as f64 / b as f64).sin_cos();
                forward[k * b + i] = cos as f32;
                forward[(f + k) * b + i] = -sin as f32;
                inverse[i * 2 * f + k] = (weight * cos) as f32;
                inverse[i * 2 * f + f + k] = (-weight * sin) as f32;
            }
        }
        let device = device.clone().inner();
        Self {
            forward: Tensor::from_data(TensorData::new(forward, [2 * f, b]), &device),
            inverse: Tensor::from_data(TensorData::new(inverse, [b, 2 * f]), &device),
        }
    }
}

/// What C3A trains at one place.
#[derive(Module, Debug)]
pub struct C3aAdapter {
    /// `w [b, fan_in / b, fan_out / b]`.
    pub kernel: Param<Tensor<3>>,
    /// `F` of `b` numbers.
    pub fourier: Fourier,
}

impl Adapter for C3aAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let w = self.kernel.val();
        let ([batch, seq, fan_in], [b, n, m]) = (x.dims(), w.dims());
        let (rows, f) = (batch * seq, b / 2 + 1);
        let x = x.clone().cast(w.dtype()).reshape([rows * n, b]).transpose();
        let x = self.fourier.forward.clone().matmul(x).reshape([2 * f, rows, n]);
        let w = self.fourier.forward.clone().matmul(w.reshape([b, n * m])).reshape([2 * f, n, m]);
        // (Re x + i·Im x)(Re w − i·Im w): Re x and Im x meet Re w, Im x and −Re x meet Im w.
        let (re, im) = (x.clone().narrow(0, 0, f), x.narrow(0, f, f));
        let with_re = Tensor::cat(vec![re.clone(), im.clone()], 1);
        let with_im = Tensor::cat(vec![im, -re], 1);
        let products = Tensor::cat(vec![with_re, with_im], 0).matmul(w); // [2f, 2·rows, m]
        let sum = products.clone().narrow(0, 0, f) + products.narrow(0, f, f);
        let sum = sum.reshape([f, 2, rows * m]).swap_dims(0, 1).reshape([2 * f, rows * m]);
        let blocks = self.fourier.inverse.clone().matmul(sum).reshape([b, rows, m]);
        let whole = blocks.permute([1, 2, 0]).reshape([batch, seq, m * b]);
        Some((whole / fan_in as f64).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for C3aAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let w = self.kernel.val();
        let [b, n, m] = w.dims();
        let circulant: Vec<i32> = (0..b * b).map(|at| ((at / b + b - at % b) % b) as i32).collect();
        let circulant = TensorData::new(circulant, [b * b]);
        let circulant = Tensor::<1, Int>::from_data(circulant, &self.fourier.forward.device());
        let blocks = w.select(0, circulant).reshape([b, b, n, m]).permute([2, 0, 3, 1]);
        Some(blocks.reshape([n * b, m * b]) / (n * b) as f64)
    }
}

impl C3a {
    /// With this block size, and HF PEFT's defaults for the rest.
    pub fn new(block_size: usize, targets: Targets) -> Self {
        Self { block_size, targets, ..Self::default() }
    }

    /// The kernels' shape.
    fn shape(&self, site: &Site) -> Result<[usize; 3], Error> {
        let pattern = pattern_value("block_size_pattern", &self.block_size_pattern, &site.path)?;
        let b = pattern.unwrap_or(self.block_size);
        for (side, width) in [("inputs", site.fan_in()), ("outputs", site.fan_out())] {
            if b == 0 || width % b != 0 {
                let reason =
                    format!("block_size: expected a divisor of its {width} {side}, found {b}");
                return Err(Error::place(&site.path, reason));
            }
        }
        Ok([b, site.fan_in() / b, site.fan_out() / b])
    }

    fn transforms(
        &self,
        sites: &[&Site],
        device: &Device,
    ) -> Result<BTreeMap<usize, Fourier>, Error> {
        let mut transforms = BTreeMap::new();
        for site in sites {
            let [b, _, _] = self.shape(site)?;
            transforms.entry(b).or_insert_with(|| Fourier::new(b, device));
        }
        Ok(transforms)
    }

    fn adapter(
        &self,
        kernel: Tensor<3>,
        shared: &BTreeMap<usize, Fourier>,
        device: &Device,
    ) -> C3aAdapter {
        let [b, _, _] = kernel.dims();
        C3aAdapter {
            kernel: Param::from_tensor(kernel),
            fourier: shared.get(&b).cloned().unwrap_or_else(|| Fourier::new(b, device)),
        }
    }
}

impl Method for C3a {
    type Adapter = C3aAdapter;
    /// The Fourier transform by the block size.
    type Shared = BTreeMap<usize, Fourier>;
    const NAME: &'static str = "C3A";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn draws(&self) -> bool {
        self.init_weights != C3aInit::Zeros(true)
    }

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
        positive("block_size", self.block_size)?;
        self.bias.check("c3a_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights == C3aInit::Zeros(true)
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        self.transforms(sites, device)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<C3aAdapter, Error> {
        let shape = self.shape(site)?;
        let (fan_in, fan_out) = (site.fan_in() as f32, site.fan_out() as f32);
        let name = match &self.init_weights {
            C3aInit::Zeros(true) => "zeros",
            C3aInit::Zeros(false) => "xavier_uniform",
            C3aInit::Named(name) => name,
        };
        let kernel = match name {
            "zeros" => Tensor::zeros(shape, device),
            "xavier_uniform" => uniform(shape, (6.0 / (fan_in + fan_out)).sqrt(), rng, device),
            "kaiming_uniform" => uniform(shape, (1.0 / fan_in).sqrt(), rng, device),
            "gaussian" => normal(shape, 1.0, rng, device),
            other => {
                let reason = format!(
                    "`{other}` is not known; expected true, false, xavier_uniform, kaiming_uniform \
                     or gaussian"
                );
                return Err(Error::config("init_weights", reason));
            }
        };
        Ok(self.adapter(kernel, shared, device))
    }

    fn fold(adapter: &C3aAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        // Blocks of 8 where it is wide, so that the kernels are thin beside the weight.
        let pattern = IndexMap::from([("query".into(), 8)]);
        let plain = Self { block_size_pattern: pattern, ..Self::new(4, targets.clone()) };
        let init = |init_weights: C3aInit| Self { init_weights, ..plain.clone() };
        vec![
            Self { bias: Bias::Only("c3a_only".into()), ..init(C3aInit::Zeros(true)) },
            Self { bias: Bias::All, ..init(C3aInit::Zeros(false)) },
            init("kaiming_uniform".into()),
            init("gaussian".into()),
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).map_or(0, |[b, n, m]| b * n * m)
    }

    fn tensors(&self, _site: &Site, adapter: &C3aAdapter) -> Vec<(&'static str, TensorData)> {
        // (fan_out / b, fan_in / b, b)
        vec![("c3a_kernel", adapter.kernel.val().permute([2, 1, 0]).into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<C3aAdapter, Error> {
        let [b, n, m] = self.shape(site)?;
        let kernel = file.take("c3a_kernel", [m, n, b], device)?;
        Ok(self.adapter(kernel.permute([2, 1, 0]), shared, device))
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        _file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        self.transforms(sites, device)
    }
}
