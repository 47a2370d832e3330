//! RandLoRA: a difference of full rank out of frozen random bases, which are scaled (arXiv 2502.00987).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::normal;
use crate::shared::{Largest, corner, held};
use crate::source::laid_out;
use crate::torch_random::TorchRandom;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData, bf16};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// RandLoRA (arXiv 2502.00987): `Δ = s·Σₙ Bₙ·diag(λₙ)·A·diag(γₙ)`, `y = xW + b + dropout(x)·Δ`.
///
/// With `min` and `max` the smaller and the larger width of the place, `n = ⌈min / r⌉` bases make the
/// difference one of full rank. `A [r, min]` and `Bₙ [max, r]` are random, frozen and shared: drawn once
/// for the largest place from `projection_prng_key`, with the very numbers of HF PEFT; a smaller place
/// takes their corner. Trained are `λ [r, n]`, which begins as 0, and `γ [n, min]`, which begins as
/// `1 / min`; `s = randlora_alpha / r`. Parameters: `n·(r + min)` a place. Folds. As in HF PEFT, the `n·r`
/// rows of the scaled `A` are counted rank first and the columns of `B` base first, so that `λ` and `γ` of
/// one base meet the columns of several. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RandLora {
    /// Rank of a basis; smaller ones make more bases, so more parameters. Default 32.
    pub r: usize,
    /// Seed of the bases; default 0.
    pub projection_prng_key: u64,
    /// Write the bases along; otherwise who reads the file draws them again from the key. PyTorch draws
    /// them in bf16, for which its versions differ: the numbers here are those of 2.15. Default true.
    pub save_projection: bool,
    /// Bases of -1, 0 and 1 only, a sixth of them -1 and a sixth 1. Default false.
    pub sparse: bool,
    /// Bases of -1, 0 and 1 only, `1 / 2√min` of them -1 and as many 1; wins over `sparse`. Default false.
    pub very_sparse: bool,
    /// Probability with which an input is zeroed in training; default 0.
    pub randlora_dropout: f64,
    /// Scale of the difference, divided by `r`; default 640.
    #[serde(serialize_with = "crate::common::number")]
    pub randlora_alpha: f64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "randlora_only".
    pub bias: Bias,
    /// Begin as an identity, the default; otherwise with `λ ~ N(0, 1)` and `γ = 1 / max`.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for RandLora {
    fn default() -> Self {
        Self {
            r: 32,
            projection_prng_key: 0,
            save_projection: true,
            sparse: false,
            very_sparse: false,
            randlora_dropout: 0.0,
            randlora_alpha: 640.0,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// The frozen bases of the largest place, as HF PEFT lays them out.
#[derive(Module, Debug)]
pub struct Bases {
    /// `[r, 1, min]`.
    a: Tensor<3>,
    /// `[max, n, r]`.
    b: Tensor<3>,
}

/// What RandLoRA trains at one place, and its handles on what all places share.
#[derive(Module, Debug)]
pub struct RandLoraAdapter {
    /// `λ [r, n]`.
    pub randlora_lambda: Param<Tensor<2>>,
    /// `γ [n, min]`.
    pub randlora_gamma: Param<Tensor<2>>,
    /// `A` and `B` of the largest place.
    pub bases: Bases,
    /// Drops inputs in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl RandLoraAdapter {
    /// `[fan_in, n·r]` and `[n·r, fan_out]`, whose product is the difference but for `s`.
    fn factors(&self, [fan_in, fan_out]: [usize; 2]) -> (Tensor<2>, Tensor<2>) {
        let (lambda, gamma) = (self.randlora_lambda.val(), self.randlora_gamma.val());
        let ([r, n], [_, min]) = (lambda.dims(), gamma.dims());
        let max = fan_in.max(fan_out);
        let a = corner(&self.bases.a, [r, 1, min]);
        let b = corner(&self.bases.b, [max, n, r]).reshape([max, n * r]);
        let a = lambda.reshape([r, n, 1]) * a * gamma.reshape([1, n, min]);
        let a = a.reshape([r * n, min]);
        match min == fan_in {
            true => (a.transpose(), b.transpose()),
            false => (b, a),
        }
    }
}

impl Adapter for RandLoraAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (first, second) = self.factors(layer.weight.dims());
        let x = drop(x, &self.dropout, &self.randlora_lambda.val());
        let h = linear(x, first, None) * self.scaling; // [batch, seq, n·r]
        Some(linear(h, second, None).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for RandLoraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (first, second) = self.factors(w.dims());
        Some((first * self.scaling).matmul(second))
    }
}

/// The unbiased standard deviation.
fn deviation(values: &[f32]) -> f32 {
    let count = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let squares: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (squares / (count - 1.0)).sqrt() as f32
}

/// `bf16` numbers, `torch.nn.init.kaiming_uniform_(tensor, a=√5)`.
fn kaiming(torch: &mut TorchRandom, count: usize, fan_in: usize) -> impl Iterator<Item = f32> {
    let bound = 3.0_f64.sqrt() * ((1.0_f64 / 3.0).sqrt() / (fan_in as f64).sqrt());
    let rounded = |value: f32| bf16::from_f32(value).to_f32();
    let end = rounded(bound as f32);
    // The interval is half open: what is rounded to its end becomes its beginning.
    let half_open = move |value| if value == end { -end } else { value };
    torch.uniform(count, -bound, bound).into_iter().map(rounded).map(half_open)
}

const PROJECTIONS: [&str; 2] = ["randlora_A", "randlora_B"];

impl RandLora {
    /// With this rank and alpha, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, randlora_alpha: f64, targets: Targets) -> Self {
        Self { r, randlora_alpha, targets, ..Self::default() }
    }

    /// Shapes of the shared `A` and `B`.
    fn shapes(&self, largest: &Largest) -> Result<[[usize; 3]; 2], Error> {
        largest.check("r", self.r)?;
        let min = largest.fan_in.min(largest.fan_out);
        let max = largest.fan_in.max(largest.fan_out);
        let bases = min.div_ceil(self.r);
        largest.check("r", bases.saturating_mul(self.r))?;
        Ok([[self.r, 1, min], [max, bases, self.r]])
    }

    /// With the numbers that HF PEFT draws.
    fn draw(&self, [shape_a, shape_b]: [[usize; 3]; 2], device: &Device) -> Bases {
        let mut torch = TorchRandom::manual_seed(self.projection_prng_key);
        let ([r, _, min], [max, n, _]) = (shape_a, shape_b);
        let sparsity = match (self.very_sparse, self.sparse) {
            (true, _) => Some((min as f64).sqrt()),
            (false, true) => Some(3.0),
            (false, false) => None,
        };
        let device = device.clone().inner();
        let tensor = |values: Vec<f32>, shape: [usize; 3]| -> Tensor<3> {
            Tensor::from_data(TensorData::new(values, shape), &device)
        };
        if let Some(sparsity) = sparsity {
            let part = 1.0 / (2.0 * sparsity);
            let (low, high) = (part as f32, (1.0 - part) as f32);
            let sign = |u: f32| f32::from(i8::from(u > high) - i8::from(u < low));
            let mut signs = |shape: [usize; 3]| {
                let drawn = torch.uniform(shape.iter().product(), 0.0, 1.0);
                let signs: Vec<f32> = drawn.into_iter().map(sign).collect();
                let deviation = deviation(&signs);
                tensor(signs.into_iter().map(|sign| sign / deviation).collect(), shape)
            };
            return Bases { a: signs(shape_a), b: signs(shape_b) };
        }
        // Divided in bf16, too.
        let divided = |values: Vec<f32>| -> Vec<f32> {
            let deviation = bf16::from_f32(deviation(&values)).to_f32();
            values.into_iter().map(|v| bf16::from_f32(v / deviation).to_f32()).collect()
        };
        let a = tensor(divided(kaiming(&mut torch, r * min, min).collect()), shape_a);
        // Each base at once, [n, max, r].
        let b = (0..n).flat_map(|_| kaiming(&mut torch, max * r, r).collect::<Vec<_>>());
        let b = tensor(divided(b.collect()), [n, max, r]);
        Bases { a, b: laid_out(b.swap_dims(0, 1), &device) }
    }

    /// `r`, `n` and `min` of a place.
    fn sizes(&self, site: &Site) -> [usize; 3] {
        let min = site.fan_in().min(site.fan_out());
        [self.r, min.div_ceil(self.r), min]
    }

    fn adapter(
        &self,
        lambda: Tensor<2>,
        gamma: Tensor<2>,
        shared: &Option<Bases>,
    ) -> Result<RandLoraAdapter, Error> {
        Ok(RandLoraAdapter {
            randlora_lambda: Param::from_tensor(lambda),
            randlora_gamma: Param::from_tensor(gamma),
            bases: held(shared, "projection_prng_key")?,
            dropout: DropoutConfig::new(self.randlora_dropout).init(),
            scaling: self.randlora_alpha / self.r as f64,
        })
    }
}

impl Method for RandLora {
    type Adapter = RandLoraAdapter;
    type Shared = Option<Bases>;
    const NAME: &'static str = "RANDLORA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    const FASTER: &'static [&'static str] = &["randlora_lambda"];

    /// The scaled `A` has at least as many numbers as the square of the smaller width.
    fn weight_only(&self) -> bool {
        true
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
        positive("r", self.r)?;
        finite("randlora_alpha", self.randlora_alpha)?;
        probability("randlora_dropout", self.randlora_dropout)?;
        self.bias.check("randlora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        Ok(Some(self.draw(self.shapes(&Largest::of(sites))?, device)))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<RandLoraAdapter, Error> {
        let [r, n, min] = self.sizes(site);
        let gamma = |width: usize| Tensor::full([n, min], 1.0 / width as f64, device);
        match self.init_weights {
            true => self.adapter(Tensor::zeros([r, n], device), gamma(n.max(min)), shared),
            false => {
                let max = site.fan_in().max(site.fan_out());
                self.adapter(normal([r, n], 1.0, rng, device), gamma(max), shared)
            }
        }
    }

    fn fold(adapter: &RandLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, 6.0, targets.clone());
        let only = Bias::Only("randlora_only".into());
        vec![
            plain.clone(),
            Self { sparse: true, projection_prng_key: 7, bias: Bias::All, ..plain.clone() },
            Self { very_sparse: true, save_projection: false, bias: only, ..plain.clone() },
            Self { init_weights: false, randlora_dropout: 0.2, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let [r, n, min] = self.sizes(site);
        n * (r + min)
    }

    fn tensors(&self, _site: &Site, adapter: &RandLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![
            ("randlora_gamma", adapter.randlora_gamma.val().into_data()),
            ("randlora_lambda", adapter.randlora_lambda.val().into_data()),
        ];
        if self.save_projection {
            // HF PEFT writes them again for each place.
            tensors.push((PROJECTIONS[0], adapter.bases.a.clone().into_data()));
            tensors.push((PROJECTIONS[1], adapter.bases.b.clone().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<RandLoraAdapter, Error> {
        let [r, n, min] = self.sizes(site);
        let lambda = file.take("randlora_lambda", [r, n], device)?;
        let gamma = file.take("randlora_gamma", [n, min], device)?;
        let adapter = self.adapter(lambda, gamma, shared)?;
        for (name, own) in PROJECTIONS.into_iter().zip([&adapter.bases.a, &adapter.bases.b]) {
            if !file.has(name) {
                continue;
            }
            let again = file.take(name, own.dims(), &own.device())?;
            if again.into_data() != own.to_data() {
                let name = format!("{}.{name}", site.path);
                return Err(Error::tensor(name, "the numbers of the model's own", "others"));
            }
        }
        Ok(adapter)
    }

    fn shared_tensors(&self, adapters: &[&RandLoraAdapter]) -> Vec<(String, TensorData)> {
        let Some(adapter) = adapters.first().filter(|_| self.save_projection) else {
            return Vec::new();
        };
        let Bases { a, b } = adapter.bases.clone();
        PROJECTIONS.into_iter().map(String::from).zip([a.into_data(), b.into_data()]).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let largest = Largest::of(sites);
        let shapes = self.shapes(&largest)?;
        if !self.save_projection {
            return Ok(Some(self.draw(shapes, device)));
        }
        let device = device.clone().inner();
        Ok(Some(Bases {
            a: largest.take(file, PROJECTIONS[0], shapes[0], &device)?,
            b: largest.take(file, PROJECTIONS[1], shapes[1], &device)?,
        }))
    }
}
