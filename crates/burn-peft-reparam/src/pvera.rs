//! PVeRA: VeRA with a distribution in the middle, from which training draws (arXiv 2512.07703).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::normal;
use crate::shared::{Largest, Projections, held};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// PVeRA (arXiv 2512.07703): `(μ, ln σ²) = dropout(x)·A ⊙ d`, `z = μ + ε·σ`, `y = xW + b + (z·B) ⊙ b`.
///
/// `ε ~ N(0, 1)` is drawn in training, from the device's generator; outside of it `z = μ`. `A [fan_in, 2r]`
/// and `B [r, fan_out]` are random, frozen and shared: drawn once for the largest place from
/// `projection_prng_key`, with the very numbers of HF PEFT; a smaller place takes their corner. Trained are
/// `d [2r]`, which begins as `d_initial`, and `b [fan_out]`, which begins as 0. Parameters: `2r + fan_out` a
/// place. Folds by its mean: `Δ(W) = (A_μ ⊙ d_μ)·(B ⊙ b)`. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pvera {
    /// Rank of the difference; default 256.
    pub r: usize,
    /// Seed of `A` and `B`; default 0.
    pub projection_prng_key: u64,
    /// Write `A` and `B` along; otherwise who reads the file draws them again from the key. Default true.
    pub save_projection: bool,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub pvera_dropout: f64,
    /// What `d` begins as; default 0.1.
    pub d_initial: f64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "pvera_only".
    pub bias: Bias,
    /// Begin as an identity, the default; otherwise with `d ~ N(0, 1)` and `b = 1`.
    pub init_weights: bool,
    /// Draw `ε` outside of training too; a merged model has the mean all the same. Default false.
    pub sample_at_inference: bool,
    /// Seed of HF PEFT's own generator of `ε`: kept in the file, without effect here.
    pub generator_seed: Option<u64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Pvera {
    fn default() -> Self {
        Self {
            r: 256,
            projection_prng_key: 0,
            save_projection: true,
            pvera_dropout: 0.0,
            d_initial: 0.1,
            bias: Bias::None,
            init_weights: true,
            sample_at_inference: false,
            generator_seed: None,
            targets: Targets::default(),
        }
    }
}

/// What PVeRA trains at one place, and its handles on what all places share.
#[derive(Module, Debug)]
pub struct PveraAdapter {
    /// `d [2r]`: of the means, then of the logarithms of the variances.
    pub pvera_lambda_d: Param<Tensor<1>>,
    /// `b [fan_out]`.
    pub pvera_lambda_b: Param<Tensor<1>>,
    /// `A` and `B` of the largest place.
    pub projections: Projections,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// Whether `ε` is drawn outside of training too.
    pub sample_at_inference: bool,
}

impl PveraAdapter {
    fn samples(&self) -> bool {
        let training =
            self.dropout.training.is_enabled() && self.pvera_lambda_d.val().is_autodiff();
        training || self.sample_at_inference
    }

    /// `d`, and the place's `A` and `B`, of the first `columns` columns of `A`.
    fn factors(&self, fan_in: usize, columns: usize) -> (Tensor<1>, Tensor<2>, Tensor<2>) {
        let [fan_out] = self.pvera_lambda_b.dims();
        let d = self.pvera_lambda_d.val().narrow(0, 0, columns);
        (d, self.projections.a(fan_in, columns), self.projections.b(fan_out))
    }
}

impl Adapter for PveraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let [both] = self.pvera_lambda_d.dims();
        let r = both / 2;
        let (d, a, b) = self.factors(x.dims()[2], if self.samples() { both } else { r });
        let h = linear(drop(x, &self.dropout, &d), a, None) * d.unsqueeze();
        let mu = h.clone().narrow(2, 0, r); // [batch, seq, r]
        let z = match self.samples() {
            true => {
                let sigma = (h.narrow(2, r, r) * 0.5).exp();
                let normal = Distribution::Normal(0.0, 1.0);
                let epsilon = sigma.clone().without_autodiff().random_like(normal);
                mu + sigma * epsilon
            }
            false => mu,
        };
        Some((linear(z, b, None) * self.pvera_lambda_b.val().unsqueeze()).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for PveraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let [both] = self.pvera_lambda_d.dims();
        let (d, a, b) = self.factors(w.dims()[0], both / 2);
        Some((a * d.unsqueeze()).matmul(b * self.pvera_lambda_b.val().unsqueeze()))
    }
}

const PROJECTIONS: [&str; 2] = ["pvera_A", "pvera_B"];

impl Pvera {
    /// With this rank, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    /// Columns of `A` and rows of `B`.
    fn inner(&self) -> [usize; 2] {
        [self.r.saturating_mul(2), self.r]
    }

    fn adapter(
        &self,
        d: Tensor<1>,
        b: Tensor<1>,
        shared: &Option<Projections>,
    ) -> Result<PveraAdapter, Error> {
        Ok(PveraAdapter {
            pvera_lambda_d: Param::from_tensor(d),
            pvera_lambda_b: Param::from_tensor(b),
            projections: held(shared, "projection_prng_key")?,
            dropout: DropoutConfig::new(self.pvera_dropout).init(),
            sample_at_inference: self.sample_at_inference,
        })
    }
}

impl Method for Pvera {
    type Adapter = PveraAdapter;
    type Shared = Option<Projections>;
    const NAME: &'static str = "PVERA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    const FASTER: &'static [&'static str] = &["pvera_lambda_b"];

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
        probability("pvera_dropout", self.pvera_dropout)?;
        self.bias.check("pvera_only")
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
        largest.check("r", self.inner()[0])?;
        Ok(Some(Projections::draw(&largest, self.inner(), self.projection_prng_key, device)))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<PveraAdapter, Error> {
        let (r, out) = ([2 * self.r], [site.fan_out()]);
        match self.init_weights {
            true => {
                let d = Tensor::full(r, self.d_initial, device);
                self.adapter(d, Tensor::zeros(out, device), shared)
            }
            false => self.adapter(normal(r, 1.0, rng, device), Tensor::ones(out, device), shared),
        }
    }

    fn fold(adapter: &PveraAdapter) -> Option<&dyn Fold> {
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
                pvera_dropout: 0.2,
                bias: Bias::Only("pvera_only".into()),
                ..plain.clone()
            },
            Self { init_weights: false, generator_seed: Some(3), ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        2 * self.r + site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &PveraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("pvera_lambda_b", adapter.pvera_lambda_b.val().into_data()),
            ("pvera_lambda_d", adapter.pvera_lambda_d.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<PveraAdapter, Error> {
        let d = file.take("pvera_lambda_d", [2 * self.r], device)?;
        self.adapter(d, file.take("pvera_lambda_b", [site.fan_out()], device)?, shared)
    }

    fn shared_tensors(&self, adapters: &[&PveraAdapter]) -> Vec<(String, TensorData)> {
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
        largest.check("r", self.inner()[0])?;
        let (inner, key) = (self.inner(), self.projection_prng_key);
        Ok(Some(match self.save_projection {
            true => Projections::take(&largest, inner, file, PROJECTIONS, device)?,
            false => Projections::draw(&largest, inner, key, device),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;
    use burn_peft_core::{Scope, Sites, adapt};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    /// The laws hold functions to be the same on each call, so this option is not among the samples.
    #[test]
    fn inference_draws_where_it_is_asked_to() {
        let device = Device::flex();
        let model = One { query: LinearConfig::new(6, 5).init(&device) };
        let sites = Sites::of(&model, None);
        let x = Tensor::<3>::ones([2, 3, 6], &device);
        for sample_at_inference in [false, true] {
            let targets = Targets::list(["query"]);
            let method =
                Pvera { init_weights: false, sample_at_inference, ..Pvera::new(4, targets) };
            let adapters = adapt(&sites, &method, 0, &device).expect("fits");
            let cx = Scope::new(&adapters);
            let forward = || cx.at("query").linear(&model.query, x.clone()).into_data();
            assert_eq!(forward() != forward(), sample_at_inference);
        }
    }
}
