//! SAID: all differences are projections of one trained vector of the intrinsic dimension
//! (arXiv 2012.13255).

use crate::common::positive;
use crate::low_rank::{bounded, check_shape, shape};
use crate::seeded::{shuffled, signs, uniform};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed, site_rng,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Structure-aware intrinsic dimension (arXiv 2012.13255): `W' = W + λ·P·θ`, with one trained `θ` for all
/// places and a trained `λ` for each; without `said`, the plain intrinsic dimension (DID), `λ = 1`.
///
/// `P` is a Fastfood transform, of which no matrix is held: in blocks of `n`, the power of two that
/// `θ` is padded to, `P·θ = H·G·Π·H·B·θ / √(n·fan_in·fan_out)` with Walsh-Hadamard transforms `H`, a sign
/// `B`, a permutation `Π` and, new for each block, a diagonal `G` of unit variance. So `P·θ` is about
/// as long as `θ`. `B` and `Π` are shared by the blocks of a place, and `G` is uniform and not normal:
/// the authors use one block as large as the weight and a normal `G`. All of it comes out of
/// `projection_seed` and the path, is not in the file, and is held as `fan_in·fan_out` numbers a place.
///
/// `θ = 0` and `λ = 1` at first. Parameters: `intrinsic_dimension` in all, of which the `λ` take one a
/// place, as in the paper; weights only. Folds. An effect on an activation goes through the dense
/// difference: nothing cheaper is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Said {
    /// Number of trained parameters of all places together, at most 2^24; default 1000.
    pub intrinsic_dimension: usize,
    /// Whether each place has a trained scale `λ`; default true.
    pub said: bool,
    /// Seed of the projections; default 0.
    pub projection_seed: u64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Said {
    fn default() -> Self {
        Self {
            intrinsic_dimension: 1000,
            said: true,
            projection_seed: 0,
            targets: Targets::default(),
        }
    }
}

/// What all places share.
#[derive(Debug, Clone)]
pub struct Subspace {
    theta: Param<Tensor<1>>,
    hadamard: [Tensor<2>; 2],
}

/// What SAID trains at one place, and a handle on what all places train.
#[derive(Module, Debug)]
pub struct SaidAdapter {
    /// `θ`; one parameter of all places.
    pub said_theta: Param<Tensor<1>>,
    /// `λ [1]`.
    pub said_lambda: Option<Param<Tensor<1>>>,
    /// `B [n]`.
    signs: Tensor<1>,
    /// `Π [n]`.
    order: Tensor<1, Int>,
    /// `G [blocks, n]`.
    diagonals: Tensor<2>,
    /// `H [p, p]` and `H [q, q]`, whose Kronecker product is `H [n, n]`.
    hadamard: [Tensor<2>; 2],
}

impl SaidAdapter {
    /// `H` of each row: with a row read as `[p, q]`, one transform along each axis.
    fn transform(&self, rows: Tensor<2>) -> Tensor<2> {
        let [left, right] = self.hadamard.clone();
        let ([k, n], [p, _], [q, _]) = (rows.dims(), left.dims(), right.dims());
        let h = rows.reshape([k * p, q]).matmul(right);
        let h = h.reshape([k, p, q]).swap_dims(1, 2).reshape([k * q, p]).matmul(left);
        h.reshape([k, q, p]).swap_dims(1, 2).reshape([k, n])
    }
}

impl Adapter for SaidAdapter {
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

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        composed::conv1d(self, layer, x)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, _y: &Tensor<4>) -> Option<Tensor<4>> {
        composed::conv2d(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for SaidAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (shape, [_, n]) = (w.dims(), self.diagonals.dims());
        let numbers = shape[0] * shape[1];
        let mut theta = self.said_theta.val();
        if let padding @ 1.. = n - theta.dims()[0] {
            let zeros = Tensor::zeros([padding], &theta.device());
            theta = Tensor::cat(vec![theta, zeros], 0);
        }
        let mixed = self.transform((theta * self.signs.clone()).unsqueeze()); // H·B·θ
        let blocks = mixed.select(1, self.order.clone()) * self.diagonals.clone(); // G·Π·H·B·θ
        let delta = self.transform(blocks).flatten::<1>(0, 1).narrow(0, 0, numbers).reshape(shape);
        let delta = delta / ((n * numbers) as f64).sqrt();
        Some(match &self.said_lambda {
            Some(lambda) => delta * lambda.val().unsqueeze(),
            None => delta,
        })
    }
}

/// The largest intrinsic dimension; far beyond what the paper finds, and its transforms still fit.
const MOST: usize = 1 << 24;

/// The Walsh-Hadamard matrix: the sign at `(i, j)` is the parity of the bits that they have in common.
fn hadamard(n: usize, device: &Device) -> Tensor<2> {
    let sign =
        |k: usize| if ((k / n) & (k % n)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let values: Vec<f32> = (0..n * n).map(sign).collect();
    Tensor::from_data(TensorData::new(values, [n, n]), device)
}

impl Said {
    /// Length of `θ` for all `places`.
    fn theta(&self, places: usize) -> Result<usize, Error> {
        let scales = if self.said { places } else { 0 };
        match self.intrinsic_dimension.checked_sub(scales) {
            Some(length @ 1..) => Ok(length),
            _ => {
                let reason = format!(
                    "expected more than {scales}, one scale for each place, found {}",
                    self.intrinsic_dimension
                );
                Err(Error::config("intrinsic_dimension", reason))
            }
        }
    }

    fn subspace(&self, theta: Tensor<1>, device: &Device) -> Option<Subspace> {
        let bits = theta.dims()[0].next_power_of_two().ilog2();
        let constants = device.clone().inner();
        let halves = [bits / 2, bits - bits / 2].map(|bits| hadamard(1 << bits, &constants));
        Some(Subspace { theta: Param::from_tensor(theta), hadamard: halves })
    }

    fn adapter(
        &self,
        site: &Site,
        shared: &Option<Subspace>,
        lambda: Option<Tensor<1>>,
        device: &Device,
    ) -> Result<SaidAdapter, Error> {
        let Some(Subspace { theta, hadamard }) = shared.clone() else {
            return Err(Error::place(&site.path, "has no θ; expected that of all places"));
        };
        let n = theta.dims()[0].next_power_of_two();
        let blocks = (site.fan_in() * site.fan_out()).div_ceil(n);
        bounded("intrinsic_dimension", &site.path, &[blocks, n])?;
        let rng = &mut site_rng(self.projection_seed, &site.path);
        let constants = device.clone().inner();
        let signs = signs(n, rng, &constants);
        let order: Vec<i64> = shuffled(n, rng).into_iter().map(|place| place as i64).collect();
        Ok(SaidAdapter {
            said_theta: theta,
            said_lambda: lambda.map(Param::from_tensor),
            signs,
            order: Tensor::from_data(TensorData::new(order, [n]), &constants),
            diagonals: uniform([blocks, n], 3_f32.sqrt(), rng, &constants),
            hadamard,
        })
    }
}

impl Method for Said {
    type Adapter = SaidAdapter;
    type Shared = Option<Subspace>;
    const NAME: &'static str = "SAID";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        positive("intrinsic_dimension", self.intrinsic_dimension)?;
        match self.intrinsic_dimension <= MOST {
            true => Ok(()),
            false => {
                let reason = format!("expected at most {MOST}, found {}", self.intrinsic_dimension);
                Err(Error::config("intrinsic_dimension", reason))
            }
        }
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Option<Subspace>, Error> {
        Ok(self.subspace(Tensor::zeros([self.theta(sites.len())?], device), device))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Option<Subspace>,
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SaidAdapter, Error> {
        let lambda = self.said.then(|| Tensor::ones([1], device));
        self.adapter(site, shared, lambda, device)
    }

    fn fold(adapter: &SaidAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        vec![
            Self { intrinsic_dimension: 40, projection_seed: 9, ..plain.clone() },
            Self { intrinsic_dimension: 16, said: false, ..plain },
        ]
    }

    fn parameters(&self, _site: &Site) -> usize {
        usize::from(self.said)
    }

    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        self.theta(sites.len()).unwrap_or(0)
    }

    fn tensors(&self, site: &Site, adapter: &SaidAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![("said_shape", shape(site))];
        if let Some(lambda) = &adapter.said_lambda {
            tensors.push(("said_lambda", lambda.val().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Option<Subspace>,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SaidAdapter, Error> {
        check_shape("said_shape", site, file)?;
        let lambda = match self.said {
            true => Some(file.take("said_lambda", [1], device)?),
            false => None,
        };
        self.adapter(site, shared, lambda, device)
    }

    fn shared_tensors(&self, adapters: &[&SaidAdapter]) -> Vec<(String, TensorData)> {
        let theta = |adapter: &&SaidAdapter| adapter.said_theta.val().into_data();
        adapters.first().map(|a| ("said_theta".into(), theta(a))).into_iter().collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Option<Subspace>, Error> {
        let theta = file.take("said_theta", [self.theta(sites.len())?], device)?;
        Ok(self.subspace(theta, device))
    }
}
