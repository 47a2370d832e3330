//! AdaLoRA: LoRA in the form of a singular value decomposition, whose rank is shared out between the
//! places while it trains (arXiv 2303.10512).

use crate::adalora_policy::{RankPolicy, orthogonality};
use crate::common::{Bias, drop, finite, number, positive, probability};
use crate::importance::check_betas;
use crate::init::Init;
use crate::random::normal;
use crate::rank_mask::{cut, kept};
use burn::module::{Module, Param};
use burn::nn::conv::Conv2d;
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Biases, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
use burn_peft_kernels::linear;
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// AdaLoRA (arXiv 2303.10512): `y = xW + b + s·dropout(x)·A·diag(E)·B`.
///
/// `A [fan_in, r]`, `E [r]`, `B [r, fan_out]`; a column of `A`, a number of `E` and a row of `B` are a
/// triplet. Every place begins with `init_r` triplets, `A, B ~ N(0, 0.02²)` and `E = 0`, an exact
/// identity; training takes away those that matter least ([`RankPolicy`](crate::RankPolicy)) until
/// `target_r` a place are left on average. `s = lora_alpha / (init_r + 1e-5)`, whatever is left.
/// Parameters: `r·(fan_in + fan_out + 1)` a place. Folds: `Δ(W) = s·A·diag(E)·B`. Names and defaults
/// are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaLora {
    /// Triplets a place that are left in the end, on average; default 8.
    pub target_r: usize,
    /// Triplets of each place at the start; default 12.
    pub init_r: usize,
    /// Steps before the first is taken away; default 0.
    pub tinit: usize,
    /// Steps of training after the last was taken away; default 0.
    pub tfinal: usize,
    /// Steps from one taking away to the next; default 1.
    #[serde(rename = "deltaT")]
    pub delta_t: usize,
    /// How slowly the sensitivity of a parameter forgets; default 0.85.
    pub beta1: f64,
    /// How slowly its uncertainty forgets; default 0.85.
    pub beta2: f64,
    /// Weight in the loss of how far `A` and `B` are from orthogonal; default 0.5.
    pub orth_reg_weight: f64,
    /// Steps of the whole training; has no default.
    pub total_step: Option<usize>,
    /// Which of the `init_r` triplets are left, by the path of the place and `.lora_E`.
    pub rank_pattern: Option<IndexMap<String, Vec<bool>>>,
    /// Scale of the difference, divided by `init_r`; `init_r` itself where it is not above 0; default 8.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub lora_dropout: f64,
    /// Which biases of the model are trained beside it: none, all or lora_only.
    pub bias: Bias,
    /// `false`: all are drawn from `N(0, 1)`, which is no identity; any other word: as above.
    pub init_lora_weights: Init,
    /// LoRA's rank, which HF PEFT writes and does not use.
    pub r: usize,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for AdaLora {
    fn default() -> Self {
        Self {
            target_r: 8,
            init_r: 12,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            rank_pattern: None,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            bias: Bias::None,
            init_lora_weights: Init::Default,
            r: 8,
            targets: Targets::default(),
        }
    }
}

/// What AdaLoRA trains at one place.
#[derive(Module, Debug)]
pub struct AdaLoraAdapter {
    /// What is left; none where all were taken away.
    pub triplets: Option<Triplets>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

/// The singular value decomposition that is trained.
#[derive(Module, Debug)]
pub struct Triplets {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `E [r]`.
    pub lora_e: Param<Tensor<1>>,
    /// `B [r, fan_out]`.
    pub lora_b: Param<Tensor<2>>,
}

impl AdaLoraAdapter {
    /// `s·A·diag(E)` and `B`.
    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        let triplets = self.triplets.as_ref()?;
        let e = triplets.lora_e.val().unsqueeze_dim(0) * self.scaling;
        Some((triplets.lora_a.val() * e, triplets.lora_b.val()))
    }
}

impl Adapter for AdaLoraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (a, b) = self.factors()?;
        let h = linear(drop(x, &self.dropout, &a), a, None); // [batch, seq, r]
        Some(linear(h, b, None).cast(y.dtype()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let (a, b) = self.factors()?;
        let ([_, r], [_, out]) = (a.dims(), b.dims());
        let [_, channels, height, width] = layer.weight.dims();
        let x = drop(x, &self.dropout, &a);
        let mut down = layer.clone();
        let kernels = a.transpose().reshape([r, channels, height, width]);
        down.weight = Param::initialized(layer.weight.id, kernels);
        down.bias = None;
        let up = b.transpose().reshape([out, r, 1, 1]);
        let options = ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
        Some(conv2d(down.forward(x), up, None, options).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for AdaLoraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let (a, b) = self.factors()?;
        Some(a.matmul(b))
    }
}

impl AdaLora {
    /// With these ranks at the start and in the end, over so many steps, and HF PEFT's defaults for the
    /// rest.
    pub fn new(init_r: usize, target_r: usize, total_step: usize, targets: Targets) -> Self {
        Self { init_r, target_r, total_step: Some(total_step), targets, ..Self::default() }
    }

    /// Indices of the triplets that are left at `path`.
    fn kept(&self, path: &str) -> Result<Vec<i32>, Error> {
        let mask = self.rank_pattern.as_ref().and_then(|all| all.get(&format!("{path}.lora_E")));
        kept("rank_pattern", mask, self.init_r, path)
    }

    fn rank(&self, site: &Site) -> Result<usize, Error> {
        let numbers = self.init_r.checked_mul(site.fan_in() + site.fan_out());
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let (r, path) = (self.init_r, &site.path);
            let reason = format!("a rank of {r} makes more than 2^31 numbers at {path}");
            return Err(Error::config("init_r", reason));
        }
        Ok(self.kept(&site.path)?.len())
    }

    fn adapter(&self, a: Tensor<2>, e: Tensor<1>, b: Tensor<2>) -> AdaLoraAdapter {
        AdaLoraAdapter {
            triplets: Some(Triplets {
                lora_a: Param::from_tensor(a),
                lora_e: Param::from_tensor(e),
                lora_b: Param::from_tensor(b),
            }),
            ..self.empty()
        }
    }

    fn empty(&self) -> AdaLoraAdapter {
        let init_r = self.init_r as f64;
        let alpha = if self.lora_alpha > 0.0 { self.lora_alpha } else { init_r };
        AdaLoraAdapter {
            triplets: None,
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scaling: alpha / (init_r + 1e-5),
        }
    }
}

impl Method for AdaLora {
    type Adapter = AdaLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "ADALORA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[
        ("alora_invocation_tokens", &[]),
        ("arrow_config", &[]),
        ("ensure_weight_tying", &[]),
        ("fan_in_fan_out", &[]),
        ("kasa_config", &[]),
        ("layer_replication", &[]),
        ("loftq_config", &[]),
        ("megatron_config", &[]),
        ("megatron_core", &["\"megatron.core\""]),
        ("monteclora_config", &[]),
        ("qalora_group_size", &["16"]),
        ("target_parameters", &[]),
        ("trainable_token_indices", &[]),
        ("use_bdlora", &[]),
        ("use_dora", &[]),
        ("use_qalora", &[]),
        ("velora_config", &[]),
    ];

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
        positive("init_r", self.init_r)?;
        positive("target_r", self.target_r)?;
        positive("deltaT", self.delta_t)?;
        if self.target_r > self.init_r {
            let reason =
                format!("expected at most init_r = {}, found {}", self.init_r, self.target_r);
            return Err(Error::config("target_r", reason));
        }
        check_betas(self.beta1, self.beta2)?;
        finite("orth_reg_weight", self.orth_reg_weight)?;
        if self.orth_reg_weight < 0.0 {
            let reason = format!("expected 0 or more, found {}", self.orth_reg_weight);
            return Err(Error::config("orth_reg_weight", reason));
        }
        let total = self.total_step.unwrap_or(0);
        if total == 0 {
            return Err(Error::config("total_step", "expected the number of training steps"));
        }
        if self.tinit >= total.saturating_sub(self.tfinal) {
            let reason = format!(
                "{} and tfinal {} leave none of total_step {total} for taking triplets away",
                self.tinit, self.tfinal
            );
            return Err(Error::config("tinit", reason));
        }
        finite("lora_alpha", self.lora_alpha)?;
        probability("lora_dropout", self.lora_dropout)?;
        self.bias.check("lora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_lora_weights != Init::Random
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<AdaLoraAdapter, Error> {
        let r = self.rank(site)?;
        if r == 0 {
            return Ok(self.empty());
        }
        let (std, std_e) = if self.starts_as_identity() { (0.02, 0.0) } else { (1.0, 1.0) };
        let a = normal([site.fan_in(), r], std, rng, device);
        let b = normal([r, site.fan_out()], std, rng, device);
        Ok(self.adapter(a, normal([r], std_e, rng, device), b))
    }

    fn fold(adapter: &AdaLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 2, 100, targets.clone());
        let mask = |kept: [bool; 4]| IndexMap::from([("query.lora_E".into(), kept.into())]);
        vec![
            plain.clone(),
            Self { lora_dropout: 0.2, lora_alpha: 0.0, ..plain.clone() },
            Self {
                init_lora_weights: Init::Random,
                bias: Bias::Only("lora_only".into()),
                ..plain.clone()
            },
            Self { rank_pattern: Some(mask([true, false, true, false])), ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.rank(site).unwrap_or(self.init_r) * (site.fan_in() + site.fan_out() + 1)
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn has_penalty(&self) -> bool {
        self.orth_reg_weight > 0.0
    }

    fn penalty(&self, adapters: &Adapters<AdaLoraAdapter>) -> Option<Tensor<1>> {
        let all = adapters.iter().map(|(_, adapter)| adapter);
        Some(orthogonality(all)? * self.orth_reg_weight)
    }

    fn policy(
        &self,
        adapters: &Adapters<AdaLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<AdaLoraAdapter>>>, Error> {
        Ok(Some(Box::new(RankPolicy::new(self, adapters.iter())?)))
    }

    /// Triplets without effect are left out of the file.
    fn finished(self, adapters: &Adapters<AdaLoraAdapter>) -> Self {
        if self.rank_pattern.is_some() {
            return self;
        }
        let kept = |adapter: &AdaLoraAdapter| -> Vec<bool> {
            let e = adapter.triplets.as_ref().map(|t| t.lora_e.val().into_data().convert::<f32>());
            let e: Vec<f32> = e.and_then(|e| e.try_to_vec().ok()).unwrap_or_default();
            e.iter().map(|e| *e != 0.0).collect()
        };
        let pattern = adapters.iter().map(|(path, a)| (format!("{path}.lora_E"), kept(a)));
        Self { rank_pattern: Some(pattern.collect()), ..self }
    }

    fn tensors(&self, site: &Site, adapter: &AdaLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let kept = self.kept(&site.path).unwrap_or_default();
        let triplets = adapter.triplets.as_ref().filter(|_| !kept.is_empty());
        let Some(Triplets { lora_a, lora_e, lora_b }) = triplets else {
            let none = |shape: [usize; 2]| TensorData::new(Vec::<f32>::new(), shape);
            return vec![
                ("lora_A", none([0, site.fan_in()])),
                ("lora_E", none([0, 1])),
                ("lora_B", none([site.fan_out(), 0])),
            ];
        };
        let (a, b) = (cut(lora_a.val(), 1, &kept), cut(lora_b.val(), 0, &kept));
        let e = cut(lora_e.val(), 0, &kept);
        vec![
            ("lora_A", a.transpose().into_data()), // (r, fan_in), as PyTorch stores it
            ("lora_E", e.unsqueeze_dim::<2>(1).into_data()),
            ("lora_B", b.transpose().into_data()), // (fan_out, r)
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<AdaLoraAdapter, Error> {
        let r = self.rank(site)?;
        let a = file.take("lora_A", [r, site.fan_in()], device)?;
        let e = file.take("lora_E", [r, 1], device)?;
        let b = file.take("lora_B", [site.fan_out(), r], device)?;
        if r == 0 {
            return Ok(self.empty());
        }
        Ok(self.adapter(a.transpose(), e.reshape([r]), b.transpose()))
    }
}
