//! VeRA: frozen random factors that all places share, and two trained vectors (arXiv 2310.11454).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::normal;
use crate::shared::{Largest, Projections, held};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// VeRA (arXiv 2310.11454): `y = xW + b + ((dropout(x)·A ⊙ d)·B) ⊙ b`.
///
/// `A [fan_in, r]` and `B [r, fan_out]` are random, frozen and shared: drawn once for the largest
/// place from `projection_prng_key`, with the very numbers of HF PEFT; a smaller place takes their
/// corner. Trained are `d [r]`, which begins as `d_initial`, and `b [fan_out]`, which begins as 0.
/// Parameters: `r + fan_out` a place. Folds: `Δ(W) = (A ⊙ d)·(B ⊙ b)`. Names and defaults are HF
/// PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vera {
    /// Rank of the difference; default 256.
    pub r: usize,
    /// Seed of `A` and `B`; default 0.
    pub projection_prng_key: u64,
    /// Write `A` and `B` along; otherwise who reads the file draws them again from the key. Default true.
    pub save_projection: bool,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub vera_dropout: f64,
    /// What `d` begins as; default 0.1.
    pub d_initial: f64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "vera_only".
    pub bias: Bias,
    /// Begin as an identity, the default; otherwise with `d ~ N(0, 1)` and `b = 1`.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Vera {
    fn default() -> Self {
        Self {
            r: 256,
            projection_prng_key: 0,
            save_projection: true,
            vera_dropout: 0.0,
            d_initial: 0.1,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What VeRA trains at one place, and its handles on what all places share.
#[derive(Module, Debug)]
pub struct VeraAdapter {
    /// `d [r]`.
    pub vera_lambda_d: Param<Tensor<1>>,
    /// `b [fan_out]`.
    pub vera_lambda_b: Param<Tensor<1>>,
    /// `A` and `B` of the largest place.
    pub projections: Projections,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
}

impl VeraAdapter {
    /// The place's `A [fan_in, r]` and `B [r, fan_out]`.
    fn factors(&self, fan_in: usize) -> (Tensor<2>, Tensor<2>) {
        let ([r], [fan_out]) = (self.vera_lambda_d.dims(), self.vera_lambda_b.dims());
        (self.projections.a(fan_in, r), self.projections.b(fan_out))
    }
}

impl Adapter for VeraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (d, b) = (self.vera_lambda_d.val(), self.vera_lambda_b.val());
        let (a, b_matrix) = self.factors(x.dims()[2]);
        let h = linear(drop(x, &self.dropout, &d), a, None) * d.unsqueeze(); // [batch, seq, r]
        Some((linear(h, b_matrix, None) * b.unsqueeze()).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for VeraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (d, b) = (self.vera_lambda_d.val(), self.vera_lambda_b.val());
        let (a, b_matrix) = self.factors(w.dims()[0]);
        Some((a * d.unsqueeze()).matmul(b_matrix * b.unsqueeze()))
    }
}

const PROJECTIONS: [&str; 2] = ["vera_A", "vera_B"];

impl Vera {
    /// With this rank, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn adapter(
        &self,
        d: Tensor<1>,
        b: Tensor<1>,
        shared: &Option<Projections>,
    ) -> Result<VeraAdapter, Error> {
        Ok(VeraAdapter {
            vera_lambda_d: Param::from_tensor(d),
            vera_lambda_b: Param::from_tensor(b),
            projections: held(shared, "projection_prng_key")?,
            dropout: DropoutConfig::new(self.vera_dropout).init(),
        })
    }
}

impl Method for Vera {
    type Adapter = VeraAdapter;
    type Shared = Option<Projections>;
    const NAME: &'static str = "VERA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    const FASTER: &'static [&'static str] = &["vera_lambda_b"];

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
        finite("d_initial", self.d_initial)?;
        probability("vera_dropout", self.vera_dropout)?;
        self.bias.check("vera_only")
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
        let largest = Largest::of(sites);
        largest.check("r", self.r)?;
        Ok(Some(Projections::draw(&largest, [self.r; 2], self.projection_prng_key, device)))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<VeraAdapter, Error> {
        let (r, out) = ([self.r], [site.fan_out()]);
        match self.init_weights {
            true => {
                let d = Tensor::full(r, self.d_initial, device);
                self.adapter(d, Tensor::zeros(out, device), shared)
            }
            false => self.adapter(normal(r, 1.0, rng, device), Tensor::ones(out, device), shared),
        }
    }

    fn fold(adapter: &VeraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(5, targets.clone());
        vec![
            plain.clone(),
            Self {
                save_projection: false,
                projection_prng_key: 7,
                bias: Bias::All,
                ..plain.clone()
            },
            Self {
                d_initial: 0.3,
                vera_dropout: 0.2,
                bias: Bias::Only("vera_only".into()),
                ..plain.clone()
            },
            Self { init_weights: false, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r + site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &VeraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("vera_lambda_b", adapter.vera_lambda_b.val().into_data()),
            ("vera_lambda_d", adapter.vera_lambda_d.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<VeraAdapter, Error> {
        let d = file.take("vera_lambda_d", [self.r], device)?;
        self.adapter(d, file.take("vera_lambda_b", [site.fan_out()], device)?, shared)
    }

    fn shared_tensors(&self, adapters: &[&VeraAdapter]) -> Vec<(String, TensorData)> {
        let saved = adapters.first().filter(|_| self.save_projection);
        saved.map_or_else(Vec::new, |adapter| adapter.projections.tensors(PROJECTIONS))
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let largest = Largest::of(sites);
        largest.check("r", self.r)?;
        let (inner, key) = ([self.r; 2], self.projection_prng_key);
        Ok(Some(match self.save_projection {
            true => Projections::take(&largest, inner, file, PROJECTIONS, device)?,
            false => Projections::draw(&largest, inner, key, device),
        }))
    }
}
