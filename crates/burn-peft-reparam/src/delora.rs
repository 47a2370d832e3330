//! DeLoRA: a low-rank difference whose strength is apart from its direction (arXiv 2503.18225).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, pattern_value,
};
use burn_peft_kernels::linear;
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// DeLoRA (arXiv 2503.18225): `y = xW + b + (dropout(x)∘‖W‖)·A·Ξ·B`, `Ξ = λ/r · diag(1/(‖aᵢ‖‖bᵢ‖))`.
///
/// `A [fan_in, r]` with columns `aᵢ`, `B [r, fan_out]` with rows `bᵢ`, a trained `λ`, and `‖W‖ [fan_in]` the
/// lengths of the rows of `W` at the start, which the file keeps. `A ~ U(±1/√fan_in)`, `B = 0`. Parameters:
/// `r·(fan_in + fan_out) + 1` a place. Folds: `Δ(W) = diag(‖W‖)·A·Ξ·B`. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Delora {
    /// Rank of the difference; default 8.
    pub r: usize,
    /// `λ` at the start, which bounds the length of the difference; default 15.
    pub delora_lambda: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub module_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "delora_only"; default none.
    pub bias: Bias,
    /// `B = 0`; `false` draws it too, `U(±1/√r)`. Default true.
    pub init_weights: bool,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other `λ`, likewise.
    pub lambda_pattern: IndexMap<String, f64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Delora {
    fn default() -> Self {
        Self {
            r: 8,
            delora_lambda: 15.0,
            module_dropout: 0.0,
            bias: Bias::None,
            init_weights: true,
            rank_pattern: IndexMap::new(),
            lambda_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// What DeLoRA trains at one place.
#[derive(Module, Debug)]
pub struct DeloraAdapter {
    /// `A [fan_in, r]`.
    pub delora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub delora_b: Param<Tensor<2>>,
    /// `λ [1]`.
    pub delora_lambda: Param<Tensor<1>>,
    /// `‖W‖ [fan_in]`, a constant.
    pub delora_w_norm: Tensor<1>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
}

/// Lengths of the vectors along an axis, no less than 1e-4. The bound is put on their squares, so that a
/// vector of zeros has the gradient 0 and not 0/0.
fn length(v: &Tensor<2>, axis: usize) -> Tensor<2> {
    (v.clone() * v.clone()).sum_dim(axis).clamp_min(1e-8).sqrt()
}

impl DeloraAdapter {
    /// `A·Ξ`.
    fn scaled(&self) -> Tensor<2> {
        let (a, b) = (self.delora_a.val(), self.delora_b.val());
        let [_, r] = a.dims();
        let lengths = length(&a, 0) * length(&b, 1).transpose();
        let strength = self.delora_lambda.val() / r as f64;
        a * (strength.unsqueeze::<2>() / lengths)
    }
}

impl Adapter for DeloraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let x = drop(x, &self.dropout, &self.delora_a.val());
        let h = linear(x * self.delora_w_norm.clone().unsqueeze(), self.scaled(), None);
        Some(linear(h, self.delora_b.val(), None).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for DeloraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let rows = self.scaled() * self.delora_w_norm.clone().unsqueeze_dim(1);
        Some(rows.matmul(self.delora_b.val()).cast(w.dtype()))
    }
}

impl Delora {
    /// With this rank, `λ` and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, delora_lambda: f64, targets: Targets) -> Self {
        Self { r, delora_lambda, targets, ..Self::default() }
    }

    fn rank(&self, site: &Site) -> Result<usize, Error> {
        let path = &site.path;
        let r = pattern_value("rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.r);
        if r == 0 {
            let reason = format!("gives rank 0 at {path}; expected 1 or more");
            return Err(Error::config("rank_pattern", reason));
        }
        let numbers = r.checked_mul(site.fan_in() + site.fan_out());
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("a rank of {r} makes more than 2^31 numbers at {path}");
            return Err(Error::config("r", reason));
        }
        Ok(r)
    }

    fn adapter(
        &self,
        (a, b): (Tensor<2>, Tensor<2>),
        lambda: Tensor<1>,
        w_norm: Tensor<1>,
    ) -> DeloraAdapter {
        DeloraAdapter {
            delora_a: Param::from_tensor(a),
            delora_b: Param::from_tensor(b),
            delora_lambda: Param::from_tensor(lambda),
            delora_w_norm: w_norm.without_autodiff(),
            dropout: DropoutConfig::new(self.module_dropout).init(),
        }
    }
}

impl Method for Delora {
    type Adapter = DeloraAdapter;
    type Shared = ();
    const NAME: &'static str = "DELORA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    const FASTER: &'static [&'static str] = &["delora_b"];

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
        finite("delora_lambda", self.delora_lambda)?;
        for value in self.lambda_pattern.values() {
            finite("lambda_pattern", *value)?;
        }
        probability("module_dropout", self.module_dropout)?;
        self.bias.check("delora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DeloraAdapter, Error> {
        let r = self.rank(site)?;
        let Some(w) = site.matrix().filter(|w| w.dtype().is_float()) else {
            return Err(Error::place(
                &site.path,
                "expected a matrix of floats, to take its length",
            ));
        };
        let bound = |fan_in: usize| (1.0 / fan_in as f32).sqrt();
        let a = uniform([site.fan_in(), r], bound(site.fan_in()), rng, device);
        let b = match self.init_weights {
            true => Tensor::zeros([r, site.fan_out()], device),
            false => uniform([r, site.fan_out()], bound(r), rng, device),
        };
        let lambda = pattern_value("lambda_pattern", &self.lambda_pattern, &site.path)?
            .unwrap_or(self.delora_lambda);
        let lambda = Tensor::full([1], lambda, device);
        let w = w.cast(a.dtype()).to_device(&device.clone().inner());
        let w_norm = (w.clone() * w).sum_dim(1).sqrt().squeeze_dim(1);
        Ok(self.adapter((a, b), lambda, w_norm))
    }

    fn fold(adapter: &DeloraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 3.0, targets.clone());
        vec![
            Self { module_dropout: 0.2, bias: Bias::Only("delora_only".into()), ..plain.clone() },
            Self { init_weights: false, bias: Bias::All, ..plain.clone() },
            Self {
                rank_pattern: IndexMap::from([("query".into(), 2)]),
                lambda_pattern: IndexMap::from([("query".into(), 6.0)]),
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.rank(site).unwrap_or(self.r);
        r * (site.fan_in() + site.fan_out()) + 1
    }

    fn tensors(&self, _site: &Site, adapter: &DeloraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("delora_A", adapter.delora_a.val().transpose().into_data()),
            ("delora_B", adapter.delora_b.val().transpose().into_data()),
            ("delora_lambda", adapter.delora_lambda.val().into_data()),
            ("delora_w_norm", adapter.delora_w_norm.clone().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<DeloraAdapter, Error> {
        let (r, fan_in) = (self.rank(site)?, site.fan_in());
        let a = file.take("delora_A", [r, fan_in], device)?.transpose();
        let b = file.take("delora_B", [site.fan_out(), r], device)?.transpose();
        let lambda = file.take("delora_lambda", [1], device)?;
        let w_norm = file.take("delora_w_norm", [fan_in], device)?;
        Ok(self.adapter((a, b), lambda, w_norm))
    }
}
