//! TinyLoRA: a handful of numbers between the largest singular directions of the weight (arXiv 2602.04118).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::uniform;
use crate::source::laid_out;
use crate::torch_random::TorchRandom;
use burn::linalg::svd;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// TinyLoRA (arXiv 2602.04118), on LoRA-XS (arXiv 2405.17604): `y = xW + b + dropout(x)·A·R·B` with
/// `R = Σᵢ vᵢ·Pᵢ`.
///
/// `A = U√S [fan_in, r]` and `B = √S·Vᵀ [r, fan_out]` are the `r` largest singular directions of `W = USVᵀ`,
/// frozen; `Pᵢ [r, r]` are `u` frozen random matrices of a place, `N(0, 1/r)`, drawn from `projection_seed`
/// and the place's number with the numbers of HF PEFT. Trained is `v [u]`, which begins as 0: one for each
/// place, or with `weight_tying` one for several places that follow each other. Parameters: `u` for each
/// such group. `r` is at most the smaller width of a place. Folds: `Δ(W) = A·R·B`. Names and defaults are
/// HF PEFT's.
///
/// A singular direction may as well point the other way, and libraries differ in that; the file holds `A` and
/// `B`, as HF PEFT's does, and they are never computed again when it is read. The `v` of a file are numbered
/// by the model's order of places.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TinyLora {
    /// Rank of the difference; default 2.
    pub r: usize,
    /// Length of `v`; default 64.
    pub u: usize,
    /// How far places share their `v`, from 0, each has its own, to 1, all have one. Default 0.
    pub weight_tying: f64,
    /// Seed of `P`; default 42.
    pub projection_seed: u64,
    /// Write `P` along; otherwise who reads the file draws it again from the seed. Default true.
    pub save_projection: bool,
    /// Bound of `v` where it begins as "uniform"; default 0.02.
    pub init_v_bound: f64,
    /// Probability with which an input of `A` (of an embedding: of `R`) is zeroed in training; default 0.
    pub tinylora_dropout: f64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "tinylora_only".
    pub bias: Bias,
    /// How `v` begins.
    pub init_weights: VInit,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for TinyLora {
    fn default() -> Self {
        Self {
            r: 2,
            u: 64,
            weight_tying: 0.0,
            projection_seed: 42,
            save_projection: true,
            init_v_bound: 0.02,
            tinylora_dropout: 0.0,
            bias: Bias::None,
            init_weights: VInit::Zero(true),
            targets: Targets::default(),
        }
    }
}

/// How `v` begins: HF PEFT's `init_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VInit {
    /// `true`, the default: as 0, an identity. `false` leaves it to chance in HF PEFT; here such an
    /// adapter can be read and not begun.
    Zero(bool),
    /// "uniform": `U(±init_v_bound)`.
    Named(String),
}

/// The places by number, in the model's order, and the `v` of each group of them.
#[derive(Debug, Clone, Default)]
pub struct Groups {
    places: BTreeMap<String, usize>,
    v: Vec<Param<Tensor<1>>>,
}

/// What TinyLoRA trains at one place.
#[derive(Module, Debug)]
pub struct TinyLoraAdapter {
    /// `A [fan_in, r]`.
    pub a: Tensor<2>,
    /// `B [r, fan_out]`.
    pub b: Tensor<2>,
    /// `P [u, r, r]`.
    pub p: Tensor<3>,
    /// `v [u]`: one parameter for all places of the group.
    pub v: Param<Tensor<1>>,
    /// The number of the group.
    pub group: usize,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
}

impl TinyLoraAdapter {
    /// `R [r, r]`.
    fn core(&self) -> Tensor<2> {
        let [u, r, _] = self.p.dims();
        let v = self.v.val().reshape([1, u]);
        v.matmul(self.p.clone().reshape([u, r * r])).reshape([r, r])
    }
}

impl Adapter for TinyLoraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let core = self.core();
        let h = linear(drop(x, &self.dropout, &core), self.a.clone(), None); // [batch, seq, r]
        Some(linear(linear(h, core, None), self.b.clone(), None).cast(y.dtype()))
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let core = self.core();
        let h = drop(&embedding(self.a.clone(), ids.clone()), &self.dropout, &core);
        Some(linear(linear(h, core, None), self.b.clone(), None).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for TinyLoraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.a.clone().matmul(self.core()).matmul(self.b.clone()))
    }
}

/// As it lies in the file: PyTorch's linear weights are transposed and with them `A`, `B` and `P`; its
/// tables are not, but there `A` and `B` change their names.
fn turn(site: &Site, p: Tensor<3>) -> Tensor<3> {
    match site.kind {
        Kind::Embedding => p,
        _ => p.swap_dims(1, 2),
    }
}

impl TinyLora {
    /// With this rank and length of `v`, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, u: usize, targets: Targets) -> Self {
        Self { r, u, targets, ..Self::default() }
    }

    /// How many groups so many places make.
    fn groups(&self, places: usize) -> usize {
        let groups = places as f64 * (1.0 - self.weight_tying);
        (groups.round_ties_even() as usize).clamp(1, places.max(1))
    }

    /// The group of the place of this number.
    fn group(&self, place: usize, places: usize) -> usize {
        let groups = self.groups(places);
        (place / (places / groups).max(1)).min(groups - 1)
    }

    fn share_with(
        &self,
        sites: &[&Site],
        mut v: impl FnMut(usize) -> Result<Tensor<1>, Error>,
    ) -> Result<Groups, Error> {
        sites.iter().try_for_each(|site| self.check_size(site))?;
        let number = |(place, site): (usize, &&Site)| (site.path.clone(), place);
        let v = (0..self.groups(sites.len())).map(|group| Ok(Param::from_tensor(v(group)?)));
        Ok(Groups {
            places: sites.iter().enumerate().map(number).collect(),
            v: v.collect::<Result<_, Error>>()?,
        })
    }

    fn rank(&self, site: &Site) -> usize {
        self.r.min(site.fan_in()).min(site.fan_out())
    }

    fn adapter(
        &self,
        site: &Site,
        shared: &Groups,
        (a, b): (Tensor<2>, Tensor<2>),
        p: Option<Tensor<3>>,
    ) -> Result<TinyLoraAdapter, Error> {
        let unknown = || Error::place(&site.path, "is not among the places that were numbered");
        let place = *shared.places.get(&site.path).ok_or_else(unknown)?;
        let group = self.group(place, shared.places.len());
        let p = p.unwrap_or_else(|| {
            let r = self.rank(site);
            let mut torch =
                TorchRandom::manual_seed(self.projection_seed.wrapping_add(place as u64));
            let values = torch.normal(self.u * r * r, 0.0, 1.0 / (r as f64).sqrt());
            Tensor::from_data(TensorData::new(values, [self.u, r, r]), &a.device())
        });
        let device = a.device();
        Ok(TinyLoraAdapter {
            a,
            b,
            p: laid_out(turn(site, p), &device),
            v: shared.v.get(group).cloned().ok_or_else(unknown)?,
            group,
            dropout: DropoutConfig::new(self.tinylora_dropout).init(),
        })
    }

    /// Refuses a `P` that no tensor holds.
    fn check_size(&self, site: &Site) -> Result<(), Error> {
        let r = self.rank(site);
        match self.u.checked_mul(r * r).is_some_and(|numbers| numbers <= i32::MAX as usize) {
            true => Ok(()),
            false => {
                let reason = format!("{} makes more than 2^31 numbers at {}", self.u, site.path);
                Err(Error::config("u", reason))
            }
        }
    }
}

/// Sweeps of the iteration that finds the singular values, for each of them: two or three are the rule.
const SWEEPS: usize = 100;

impl Method for TinyLora {
    type Adapter = TinyLoraAdapter;
    type Shared = Groups;
    const NAME: &'static str = "TINYLORA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

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
        positive("u", self.u)?;
        if !(0.0..=1.0).contains(&self.weight_tying) {
            let reason = format!("expected a number from 0 to 1, found {}", self.weight_tying);
            return Err(Error::config("weight_tying", reason));
        }
        finite("init_v_bound", self.init_v_bound)?;
        probability("tinylora_dropout", self.tinylora_dropout)?;
        self.bias.check("tinylora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights == VInit::Zero(true)
    }

    fn draws(&self) -> bool {
        self.init_weights != VInit::Zero(true)
    }

    fn share(
        &self,
        sites: &[&Site],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Groups, Error> {
        match &self.init_weights {
            VInit::Zero(true) => self.share_with(sites, |_| Ok(Tensor::zeros([self.u], device))),
            VInit::Named(name) if name == "uniform" => self.share_with(sites, |_| {
                Ok(uniform([self.u], self.init_v_bound as f32, rng, device))
            }),
            VInit::Zero(false) => {
                let reason = "false leaves v to chance; expected true or \"uniform\"";
                Err(Error::config("init_weights", reason))
            }
            VInit::Named(name) => {
                let reason = format!("expected true or \"uniform\", found `{name}`");
                Err(Error::config("init_weights", reason))
            }
        }
    }

    fn init(
        &self,
        site: &Site,
        shared: &Groups,
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<TinyLoraAdapter, Error> {
        let r = self.rank(site);
        let no_matrix = || Error::place(&site.path, "expected a matrix, found a vector");
        let w = site.matrix().ok_or_else(no_matrix)?.without_autodiff().cast(DType::F32);
        if w.clone().is_finite().all().bool_not().into_scalar::<bool>() {
            return Err(Error::place(&site.path, "expected finite weights, found NaN or infinity"));
        }
        let (u, s, vt) = svd::<2, 1>(w, SWEEPS);
        let root = s.narrow(0, 0, r).sqrt();
        let a = u.narrow(1, 0, r) * root.clone().unsqueeze_dim(0);
        let b = vt.narrow(0, 0, r) * root.unsqueeze_dim(1);
        let device = device.clone().inner();
        self.adapter(site, shared, (a.to_device(&device), b.to_device(&device)), None)
    }

    fn fold(adapter: &TinyLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, 5, targets.clone());
        let uniform = VInit::Named("uniform".into());
        vec![
            plain.clone(),
            Self { save_projection: false, weight_tying: 0.5, bias: Bias::All, ..plain.clone() },
            Self {
                r: 9,
                weight_tying: 1.0,
                tinylora_dropout: 0.2,
                projection_seed: 7,
                bias: Bias::Only("tinylora_only".into()),
                ..plain.clone()
            },
            Self { init_weights: uniform, init_v_bound: 0.3, ..plain },
        ]
    }

    fn parameters(&self, _site: &Site) -> usize {
        0
    }

    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        self.u * self.groups(sites.len())
    }

    fn tensors(&self, site: &Site, adapter: &TinyLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let TinyLoraAdapter { a, b, p, .. } = adapter.clone();
        let (a, b) = match site.kind {
            Kind::Embedding => (b, a),
            _ => (a.transpose(), b.transpose()),
        };
        let mut tensors = vec![("tinylora_A", a.into_data()), ("tinylora_B", b.into_data())];
        if self.save_projection {
            tensors.push(("tinylora_P", turn(site, p).into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Groups,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<TinyLoraAdapter, Error> {
        let device = device.clone().inner();
        let (r, fan_in, fan_out) = (self.rank(site), site.fan_in(), site.fan_out());
        let pair = match site.kind {
            Kind::Embedding => {
                let b = file.take("tinylora_A", [r, fan_out], &device)?;
                (file.take("tinylora_B", [fan_in, r], &device)?, b)
            }
            _ => {
                let a = file.take("tinylora_A", [r, fan_in], &device)?.transpose();
                let b = file.take("tinylora_B", [fan_out, r], &device)?.transpose();
                (laid_out(a, &device), laid_out(b, &device))
            }
        };
        let p = match self.save_projection {
            true => Some(file.take("tinylora_P", [self.u, r, r], &device)?),
            false => None,
        };
        self.adapter(site, shared, pair, p)
    }

    fn shared_tensors(&self, adapters: &[&TinyLoraAdapter]) -> Vec<(String, TensorData)> {
        let v: BTreeMap<usize, TensorData> =
            adapters.iter().map(|adapter| (adapter.group, adapter.v.val().into_data())).collect();
        v.into_iter().map(|(group, v)| (format!("tinylora_v.{group}"), v)).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Groups, Error> {
        self.share_with(sites, |group| file.take(&format!("tinylora_v.{group}"), [self.u], device))
    }
}
