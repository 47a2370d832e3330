//! LoRA: `W' = W + s·A·B` with two thin trained factors (arXiv 2106.09685).

use crate::common::{Bias, drop, drops, fifteen_digits, finite, number, positive, probability};
use crate::dora::{Dora, unbiased};
use crate::init::{Init, Pair, Place, bound};
use crate::layout::{Layout, MAGNITUDE, expand, kernel, shaped, take};
use crate::random::uniform;
use crate::source::laid_out;
use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::{conv1d, conv2d, embedding, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, as_matrix,
    pattern_value,
};
use indexmap::IndexMap;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoRA (arXiv 2106.09685): `y = xW + b + s·dropout(x)·A·B`.
///
/// `A [fan_in, r]`, `B [r, fan_out]`; `s = lora_alpha / r`, or `lora_alpha / √r` with rsLoRA
/// (arXiv 2312.03732). Parameters: `r·(fan_in + fan_out)` a place (less `r·fan_out` with the init
/// "mica"), and `fan_out` more with `lora_bias` or `use_dora`. Folds: `Δ(W) = s·A·B`; DoRA:
/// [`Dora`]. Names and defaults are HF PEFT's.
///
/// With the inits "pissa" and "olora" `Δ(W) = s·(A·B - A0·B0)`, `A0` and `B0` the factors at the start.
/// Their files are those of a LoRA of twice the rank, `[A, A0]` and `[B; -B0]`, as HF PEFT writes them
/// when it is told the initial adapter: they work on the untouched base. Dropout acts on the whole
/// difference, as it does for one who reads such a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank of the difference; default 8.
    pub r: usize,
    /// Scale of the difference, divided by `r` (or `√r`); default 8.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub lora_dropout: f64,
    /// Scale by `1/√r` in place of `1/r`, so that large ranks learn at the same speed.
    pub use_rslora: bool,
    /// Which biases of the model are trained beside it.
    pub bias: Bias,
    /// A bias of its own on `B`; with the inits true and false, and without DoRA.
    pub lora_bias: bool,
    /// DoRA: the length of each column of the weight is trained apart from its direction.
    pub use_dora: bool,
    /// How `A` and `B` begin.
    pub init_lora_weights: Init,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            bias: Bias::None,
            lora_bias: false,
            use_dora: false,
            init_lora_weights: Init::default(),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// What LoRA trains at one place.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`; none where the init holds it constant.
    pub lora_b: Option<Param<Tensor<2>>>,
    /// The bias on `B`, `[fan_out]`.
    pub lora_bias: Option<Param<Tensor<1>>>,
    /// The trained lengths, with DoRA.
    pub dora: Option<Dora>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
    /// More columns of `A` that are constant: `A0`.
    constant_a: Option<Tensor<2>>,
    /// More rows of `B` that are constant: `-B0`, or all of it.
    constant_b: Option<Tensor<2>>,
}

/// A trained part with a constant one beside it.
fn join(trained: Tensor<2>, constant: &Option<Tensor<2>>, axis: usize) -> Tensor<2> {
    match constant {
        Some(constant) => Tensor::cat(vec![trained, constant.clone()], axis),
        None => trained,
    }
}

impl LoraAdapter {
    /// The difference `s·A·B` alone, without dropout: what a kin of LoRA is at one moment.
    pub(crate) fn of(a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Self {
        Self {
            // Never visited, so that the ids do not matter.
            lora_a: Param::initialized(ParamId::from(0), a),
            lora_b: Some(Param::initialized(ParamId::from(0), b)),
            lora_bias: None,
            dora: None,
            dropout: DropoutConfig::new(0.0).init(),
            scaling,
            constant_a: None,
            constant_b: None,
        }
    }

    /// `A` and `B` with their constant parts: `s·A·B` is the difference.
    fn factors(&self) -> Pair {
        let a = join(self.lora_a.val(), &self.constant_a, 1);
        let b = match (&self.lora_b, &self.constant_b) {
            (Some(b), constant) => join(b.val(), constant, 0),
            (None, Some(b)) => b.clone(),
            (None, None) => Tensor::zeros([a.dims()[1], 0], &a.device()), // is never made
        };
        (a, b)
    }

    /// `δ` out of `product(x, A, B)`, the effect of `s·A·B`: the same, or with DoRA what it makes of that
    /// and of `own`, the layer without its bias on an input from which dropout took something.
    fn effect<const D: usize, const W: usize>(
        &self,
        x: &Tensor<D>,
        y: &Tensor<D>,
        axis: usize,
        weight: &Param<Tensor<W>>,
        own: impl FnOnce(Option<Tensor<D>>) -> Tensor<D>,
        product: impl FnOnce(Tensor<D>, Tensor<2>, Tensor<2>) -> Tensor<D>,
    ) -> Option<Tensor<D>> {
        let (a, b) = self.factors();
        let x = drop(x, &self.dropout, &a);
        let delta = product(x.clone(), a.clone(), b.clone());
        let Some(dora) = &self.dora else {
            return Some(delta.cast(y.dtype()));
        };
        let own = own(drops(&self.dropout, &a).then_some(x));
        let whole = dora.turn(&as_matrix(weight.val()), &(a, b), self.scaling, (own, delta), axis);
        Some(whole.cast(y.dtype()))
    }
}

impl Adapter for LoraAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let own = |dropped: Option<Tensor<3>>| match dropped {
            Some(x) => linear(x.cast(y.dtype()), layer.weight.val(), None),
            None => unbiased(y, &layer.bias, 2),
        };
        self.effect(x, y, 2, &layer.weight, own, |x, a, b| {
            let h = linear(x, a, None) * self.scaling; // [batch, seq, r]
            linear(h, b, self.lora_bias.as_ref().map(|bias| bias.val() * self.scaling))
        })
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let (a, b) = self.factors();
        let h = embedding(a.clone(), ids.clone()) * self.scaling; // [batch, seq, r]
        let delta = linear(h, b.clone(), None);
        let delta = match &self.dora {
            None => delta,
            Some(dora) => {
                let w = layer.weight.val();
                dora.turn(&w, &(a, b), self.scaling, (y.clone(), delta), 2)
            }
        };
        Some(delta.cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let run = |x: Tensor<3>, kernel: Tensor<3>| {
            let mut copy = layer.clone();
            copy.weight = Param::initialized(layer.weight.id, kernel);
            copy.bias = None;
            copy.forward(x)
        };
        let own = |dropped: Option<Tensor<3>>| match dropped {
            Some(x) => run(x.cast(y.dtype()), layer.weight.val()),
            None => unbiased(y, &layer.bias, 1),
        };
        self.effect(x, y, 1, &layer.weight, own, |x, a, b| {
            let h = run(x, kernel(a, layer.weight.dims())) * self.scaling;
            conv1d(h, expand(b), None, ConvOptions::new([1], [0], [1], 1))
        })
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let run = |x: Tensor<4>, kernel: Tensor<4>| {
            let mut copy = layer.clone();
            copy.weight = Param::initialized(layer.weight.id, kernel);
            copy.bias = None;
            copy.forward(x)
        };
        let own = |dropped: Option<Tensor<4>>| match dropped {
            Some(x) => run(x.cast(y.dtype()), layer.weight.val()),
            None => unbiased(y, &layer.bias, 1),
        };
        self.effect(x, y, 1, &layer.weight, own, |x, a, b| {
            let h = run(x, kernel(a, layer.weight.dims())) * self.scaling;
            conv2d(h, expand(b), None, ConvOptions::new([1, 1], [0, 0], [1, 1], 1))
        })
    }
}

impl Fold for LoraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let (a, b) = self.factors();
        let delta = (a.clone() * self.scaling).matmul(b.clone());
        Some(match &self.dora {
            None => delta,
            Some(dora) => dora.turn(w, &(a, b), self.scaling, (w.clone(), delta), 1),
        })
    }

    fn brings_bias(&self) -> bool {
        self.lora_bias.is_some()
    }

    fn bias(&self, _b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.lora_bias.as_ref()?.val() * self.scaling)
    }
}

impl Lora {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, lora_alpha: f64, targets: Targets) -> Self {
        Self { r, lora_alpha, targets, ..Self::default() }
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

    fn scaling(&self, path: &str, r: usize) -> Result<f64, Error> {
        let alpha =
            pattern_value("alpha_pattern", &self.alpha_pattern, path)?.unwrap_or(self.lora_alpha);
        let r = r as f64;
        Ok(alpha / if self.use_rslora { r.sqrt() } else { r })
    }

    /// `start` is what is taken off again.
    fn adapter(
        &self,
        site: &Site,
        (a, b): Pair,
        start: Option<Pair>,
        bias: Option<Tensor<1>>,
    ) -> Result<LoraAdapter, Error> {
        let scaling = self.scaling(&site.path, a.dims()[1])?;
        let freezes_b = self.init_lora_weights.freezes_b();
        let (constant_a, constant_b) = start.map(|(a0, b0)| (a0, -b0)).unzip();
        let constant_b = if freezes_b { Some(b.clone()) } else { constant_b };
        Ok(LoraAdapter {
            lora_a: Param::from_tensor(a),
            lora_b: (!freezes_b).then(|| Param::from_tensor(b)),
            lora_bias: bias.map(Param::from_tensor),
            dora: None,
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scaling,
            constant_a: constant_a.map(Tensor::without_autodiff),
            constant_b: constant_b.map(Tensor::without_autodiff),
        })
    }

    /// The factors of which `s·A·B` is a part of the base, where the init splits it.
    fn start(&self, site: &Site, (a, b): &Pair) -> Option<Pair> {
        self.init_lora_weights.splits_base().then(|| match site.kind {
            // As in HF PEFT, tables are not split.
            Kind::Embedding => (a.zeros_like(), b.zeros_like()),
            _ => (a.clone(), b.clone()),
        })
    }

    fn has_bias(&self, site: &Site) -> Result<bool, Error> {
        if self.lora_bias && site.kind != Kind::Linear {
            let reason = "lora_bias: works on linear layers only, as in HF PEFT";
            return Err(Error::place(&site.path, reason));
        }
        Ok(self.lora_bias)
    }
}

impl Method for Lora {
    type Adapter = LoraAdapter;
    type Shared = ();
    const NAME: &'static str = "LORA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[
        ("alora_invocation_tokens", &[]),
        ("arrow_config", &[]),
        ("ensure_weight_tying", &[]),
        ("fan_in_fan_out", &[]),
        ("kasa_config", &[]),
        ("layer_replication", &[]),
        ("megatron_config", &[]),
        ("megatron_core", &["\"megatron.core\""]),
        ("monteclora_config", &[]),
        ("qalora_group_size", &["16"]),
        ("target_parameters", &[]),
        ("trainable_token_indices", &[]),
        ("use_bdlora", &[]),
        ("use_qalora", &[]),
    ];

    const FASTER: &'static [&'static str] = &["lora_b"];

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
        finite("lora_alpha", self.lora_alpha)?;
        probability("lora_dropout", self.lora_dropout)?;
        let plain = matches!(self.init_lora_weights, Init::Default | Init::Random);
        if self.lora_bias && (self.use_dora || !plain) {
            let reason = "works without use_dora and with init_lora_weights true or false only";
            return Err(Error::config("lora_bias", reason));
        }
        if self.use_dora && self.init_lora_weights.freezes_b() {
            return Err(Error::config("use_dora", "does not work with the init \"mica\""));
        }
        self.bias.check("lora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_lora_weights != Init::Random
    }

    fn draws(&self) -> bool {
        self.init_lora_weights.draws()
    }

    fn portable(&self) -> Self {
        if !self.init_lora_weights.splits_base() {
            return self.clone();
        }
        // Twice the rank at the same scale.
        let more = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let more = |alpha: &mut f64| *alpha = fifteen_digits(*alpha * more);
        let mut portable = self.clone();
        portable.init_lora_weights = Init::Default;
        portable.r = self.r.saturating_mul(2);
        portable.rank_pattern.values_mut().for_each(|r| *r = r.saturating_mul(2));
        more(&mut portable.lora_alpha);
        portable.alpha_pattern.values_mut().for_each(more);
        portable
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LoraAdapter, Error> {
        let r = self.rank(site)?;
        let scaling = self.scaling(&site.path, r)?;
        let pair = self.init_lora_weights.factors(&Place { site, r, scaling, device }, rng)?;
        let start = self.start(site, &pair);
        let bias = self.has_bias(site)?.then(|| match self.init_lora_weights {
            Init::Random => uniform([site.fan_out()], bound(r), rng, device),
            _ => Tensor::zeros([site.fan_out()], device),
        });
        let mut adapter = self.adapter(site, pair, start, bias)?;
        if self.use_dora
            && let Some(w) = site.matrix()
        {
            adapter.dora = Some(Dora::new(w, &adapter.factors(), scaling, device));
        }
        Ok(adapter)
    }

    fn fold(adapter: &LoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 8.0, targets.clone());
        let saving = Targets { modules_to_save: Some(vec!["head".into()]), ..targets.clone() };
        let patterned = |method| Self {
            rank_pattern: IndexMap::from([("query".into(), 2)]),
            alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
            ..method
        };
        vec![
            Self { use_rslora: true, bias: Bias::Only("lora_only".into()), ..plain.clone() },
            Self { lora_dropout: 0.2, bias: Bias::All, ..plain.clone() },
            Self { init_lora_weights: "gaussian".into(), targets: saving, ..plain.clone() },
            Self { init_lora_weights: Init::Random, lora_bias: true, ..plain.clone() },
            Self { use_dora: true, lora_dropout: 0.1, ..plain.clone() },
            Self { use_dora: true, init_lora_weights: Init::Random, ..plain.clone() },
            Self { use_dora: true, init_lora_weights: "pissa_niter_4".into(), ..plain.clone() },
            Self { init_lora_weights: Init::Orthogonal, ..plain.clone() },
            Self { init_lora_weights: "pissa".into(), ..plain.clone() },
            patterned(Self { init_lora_weights: Init::Olora, use_rslora: true, ..plain.clone() }),
            Self { init_lora_weights: Init::Mica, ..plain.clone() },
            patterned(plain.clone()),
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.rank(site).unwrap_or(self.r);
        let b = if self.init_lora_weights.freezes_b() { 0 } else { r * site.fan_out() };
        let vectors = usize::from(self.lora_bias) + usize::from(self.use_dora);
        r * site.fan_in() + b + vectors * site.fan_out()
    }

    fn tensors(&self, site: &Site, adapter: &LoraAdapter) -> Vec<(&'static str, TensorData)> {
        let (a, b) = adapter.factors();
        let layout = Layout::new(site, a.dims()[1]);
        let mut tensors = vec![
            (layout.a, shaped(a.transpose(), layout.shape_a)), // (r, fan_in) in PyTorch
            (layout.b, shaped(b.transpose(), layout.shape_b)), // (fan_out, r)
        ];
        if let Some(bias) = &adapter.lora_bias {
            tensors.push(("lora_B.bias", bias.val().into_data()));
        }
        if let Some(dora) = &adapter.dora {
            tensors.push((MAGNITUDE, shaped(dora.magnitude.val(), layout.shape_m)));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraAdapter, Error> {
        self.init_lora_weights.check_readable()?;
        let r = self.rank(site)?;
        let layout = Layout::new(site, r);
        let a = take(file, layout.a, &layout.shape_a, [r, site.fan_in()], device)?;
        let b = take(file, layout.b, &layout.shape_b, [site.fan_out(), r], device)?;
        let bias = match self.has_bias(site)? {
            true => Some(file.take("lora_B.bias", [site.fan_out()], device)?),
            false => None,
        };
        // HF PEFT splits the base again when it reads an adapter that was not converted.
        let start = match self.init_lora_weights.splits_base() {
            true => {
                let place = Place { site, r, scaling: self.scaling(&site.path, r)?, device };
                let drawn = &mut ChaCha8Rng::seed_from_u64(0); // what is read draws nothing
                self.start(site, &self.init_lora_weights.factors(&place, drawn)?)
            }
            false => None,
        };
        let pair = (laid_out(a.transpose(), device), laid_out(b.transpose(), device));
        let mut adapter = self.adapter(site, pair, start, bias)?;
        if self.use_dora
            && let Some(w) = site.matrix()
        {
            let shape = [1, site.fan_out()];
            let m = take(file, MAGNITUDE, &layout.shape_m, shape, device)?;
            adapter.dora = Some(Dora::restored(&w, m.flatten(0, 1)));
        }
        Ok(adapter)
    }
}
