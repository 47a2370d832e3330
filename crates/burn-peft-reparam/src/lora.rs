//! LoRA: `W' = W + s·A·B` with two thin trained factors (arXiv 2106.09685).

use crate::common::{drop, finite, positive, probability};
use crate::random::{normal, uniform};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::{conv1d, conv2d, embedding, linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, pattern_value,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize, Serializer};

/// LoRA (arXiv 2106.09685): `y = xW + b + s·dropout(x)·A·B`.
///
/// `A [fan_in, r]`, `B [r, fan_out]`; `s = lora_alpha / r`, or `lora_alpha / √r` with rsLoRA
/// (arXiv 2312.03732). Parameters: `r·(fan_in + fan_out)` a place, and `fan_out` more with
/// `lora_bias`. Folds: `Δ(W) = s·A·B`. Names and defaults are HF PEFT's.
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
    pub bias: LoraBias,
    /// A bias of its own on `B`.
    pub lora_bias: bool,
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
            bias: LoraBias::None,
            lora_bias: false,
            init_lora_weights: Init::default(),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

/// Writes 16 and not 16.0: HF PEFT declares these fields as integers.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(crate) fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

/// Biases trained beside LoRA, in HF PEFT's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// How the factors begin: HF PEFT's `init_lora_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Init {
    /// `true`: `A ~ U(±1/√fan_in)`, `B = 0`, an exact identity at the start. `false`: `B` is drawn
    /// like `A` with bound `1/√r`, which is no identity and serves tests.
    Default(bool),
    /// "gaussian": `A ~ N(0, 1/r²)`, `B = 0`.
    Named(String),
}

impl Default for Init {
    fn default() -> Self {
        Self::Default(true)
    }
}

impl From<&str> for Init {
    fn from(name: &str) -> Self {
        match name.to_ascii_lowercase().as_str() {
            "true" => Self::Default(true),
            "false" => Self::Default(false),
            _ => Self::Named(name.to_owned()),
        }
    }
}

/// What LoRA trains at one place.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub lora_b: Param<Tensor<2>>,
    /// The bias on `B`, `[fan_out]`.
    pub lora_bias: Option<Param<Tensor<1>>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl LoraAdapter {
    fn drop<const D: usize>(&self, x: &Tensor<D>) -> Tensor<D> {
        drop(x, &self.dropout, &self.lora_a.val())
    }

    /// A convolution's kernels out of `A`: `[r, in, ..kernel]`.
    fn kernel<const D: usize>(&self, mut shape: [usize; D]) -> Tensor<D> {
        let [_, r] = self.lora_a.dims();
        shape[0] = r;
        self.lora_a.val().transpose().reshape(shape)
    }

    /// The 1x1 convolution that `B` is: `[fan_out, r, 1, ..]`.
    fn expand<const D: usize>(&self) -> Tensor<D> {
        let [r, out] = self.lora_b.dims();
        let mut shape = [1; D];
        shape[0] = out;
        shape[1] = r;
        self.lora_b.val().transpose().reshape(shape)
    }
}

impl Adapter for LoraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let h = linear(self.drop(x), self.lora_a.val(), None) * self.scaling; // [batch, seq, r]
        let bias = self.lora_bias.as_ref().map(|bias| bias.val() * self.scaling);
        Some(linear(h, self.lora_b.val(), bias).cast(y.dtype()))
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let h = embedding(self.lora_a.val(), ids.clone()) * self.scaling; // [batch, seq, r]
        Some(linear(h, self.lora_b.val(), None).cast(y.dtype()))
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let mut down = layer.clone();
        down.weight = Param::initialized(layer.weight.id, self.kernel(layer.weight.dims()));
        down.bias = None;
        let h = down.forward(self.drop(x)) * self.scaling;
        let options = burn::tensor::ops::ConvOptions::new([1], [0], [1], 1);
        Some(conv1d(h, self.expand(), None, options).cast(y.dtype()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let mut down = layer.clone();
        down.weight = Param::initialized(layer.weight.id, self.kernel(layer.weight.dims()));
        down.bias = None;
        let h = down.forward(self.drop(x)) * self.scaling;
        let options = burn::tensor::ops::ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
        Some(conv2d(h, self.expand(), None, options).cast(y.dtype()))
    }
}

impl Fold for LoraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        Some((self.lora_a.val() * self.scaling).matmul(self.lora_b.val()))
    }

    fn bias(&self, _b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.lora_bias.as_ref()?.val() * self.scaling)
    }
}

/// Inits that changed the base model they were trained on, so that the factors alone do not say
/// what was learnt.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga", "mica"];

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

    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        bias: Option<Tensor<1>>,
    ) -> Result<LoraAdapter, Error> {
        let [_, r] = a.dims();
        Ok(LoraAdapter {
            scaling: self.scaling(&site.path, r)?,
            lora_a: Param::from_tensor(a),
            lora_b: Param::from_tensor(b),
            lora_bias: bias.map(Param::from_tensor),
            dropout: DropoutConfig::new(self.lora_dropout).init(),
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
        ("use_dora", &[]),
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
        match self.bias {
            LoraBias::None => Biases::None,
            LoraBias::All => Biases::All,
            LoraBias::LoraOnly => Biases::Adapted,
        }
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        finite("lora_alpha", self.lora_alpha)?;
        probability("lora_dropout", self.lora_dropout)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_lora_weights != Init::Default(false)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LoraAdapter, Error> {
        let r = self.rank(site)?;
        let (shape_a, shape_b) = ([site.fan_in(), r], [r, site.fan_out()]);
        let zeros = |shape: [usize; 2]| Tensor::zeros(shape, device);
        let bound = |fan_in: usize| (1.0 / fan_in as f32).sqrt();
        let mut bias = Tensor::zeros([site.fan_out()], device);
        let pair = match (&self.init_lora_weights, site.kind) {
            // HF PEFT draws B and zeroes A here, whatever the init says, so that unseen rows of
            // the table do not move; `false` leaves both drawn.
            (Init::Default(true) | Init::Named(_), Kind::Embedding) => {
                (zeros(shape_a), normal(shape_b, 1.0, rng, device))
            }
            (Init::Default(true), _) => {
                (uniform(shape_a, bound(site.fan_in()), rng, device), zeros(shape_b))
            }
            (Init::Default(false), _) => {
                if self.lora_bias {
                    bias = uniform([site.fan_out()], bound(r), rng, device);
                }
                (
                    uniform(shape_a, bound(site.fan_in()), rng, device),
                    uniform(shape_b, bound(r), rng, device),
                )
            }
            (Init::Named(name), _) if name.eq_ignore_ascii_case("gaussian") => {
                (normal(shape_a, 1.0 / r as f32, rng, device), zeros(shape_b))
            }
            (Init::Named(name), _) => {
                let reason =
                    format!("`{name}` is not implemented; expected true, false or \"gaussian\"");
                return Err(Error::config("init_lora_weights", reason));
            }
        };
        let bias = self.has_bias(site)?.then_some(bias);
        self.adapter(site, pair, bias)
    }

    fn fold(adapter: &LoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 8.0, targets.clone());
        let saving = Targets { modules_to_save: Some(vec!["head".into()]), ..targets.clone() };
        vec![
            Self { use_rslora: true, bias: LoraBias::LoraOnly, ..plain.clone() },
            Self { lora_dropout: 0.2, bias: LoraBias::All, ..plain.clone() },
            Self { init_lora_weights: "gaussian".into(), targets: saving, ..plain.clone() },
            Self { init_lora_weights: "false".into(), lora_bias: true, ..plain.clone() },
            Self {
                rank_pattern: IndexMap::from([("query".into(), 2)]),
                alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.rank(site).unwrap_or(self.r);
        r * (site.fan_in() + site.fan_out()) + usize::from(self.lora_bias) * site.fan_out()
    }

    fn tensors(&self, site: &Site, adapter: &LoraAdapter) -> Vec<(&'static str, TensorData)> {
        let a = adapter.lora_a.val().transpose(); // (r, fan_in), as PyTorch stores it
        let b = adapter.lora_b.val().transpose(); // (fan_out, r)
        let r = a.dims()[0];
        let mut tensors = match site.weight.shape().as_slice() {
            _ if site.kind == Kind::Embedding => {
                vec![("lora_embedding_A", a.into_data()), ("lora_embedding_B", b.into_data())]
            }
            [out, c, k] => vec![
                ("lora_A.weight", a.reshape([r, *c, *k]).into_data()),
                ("lora_B.weight", b.reshape([*out, r, 1]).into_data()),
            ],
            [out, c, h, w] => vec![
                ("lora_A.weight", a.reshape([r, *c, *h, *w]).into_data()),
                ("lora_B.weight", b.reshape([*out, r, 1, 1]).into_data()),
            ],
            _ => vec![("lora_A.weight", a.into_data()), ("lora_B.weight", b.into_data())],
        };
        if let Some(bias) = &adapter.lora_bias {
            tensors.push(("lora_B.bias", bias.val().into_data()));
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
        if let Init::Named(name) = &self.init_lora_weights
            && CHANGES_BASE.iter().any(|init| name.to_ascii_lowercase().starts_with(init))
        {
            let reason = format!(
                "`{name}` changed the base model; convert the adapter in HF PEFT with \
                 save_pretrained(path_initial_model_for_weight_conversion=..)"
            );
            return Err(Error::config("init_lora_weights", reason));
        }
        let r = self.rank(site)?;
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        let (a, b) = match site.weight.shape().as_slice() {
            _ if site.kind == Kind::Embedding => (
                file.take("lora_embedding_A", [r, fan_in], device)?,
                file.take("lora_embedding_B", [fan_out, r], device)?,
            ),
            [out, c, k] => (
                file.take("lora_A.weight", [r, *c, *k], device)?.reshape([r, fan_in]),
                file.take("lora_B.weight", [*out, r, 1], device)?.reshape([fan_out, r]),
            ),
            [out, c, h, w] => (
                file.take("lora_A.weight", [r, *c, *h, *w], device)?.reshape([r, fan_in]),
                file.take("lora_B.weight", [*out, r, 1, 1], device)?.reshape([fan_out, r]),
            ),
            _ => (
                file.take("lora_A.weight", [r, fan_in], device)?,
                file.take("lora_B.weight", [fan_out, r], device)?,
            ),
        };
        let bias = match self.has_bias(site)? {
            true => Some(file.take("lora_B.bias", [fan_out], device)?),
            false => None,
        };
        self.adapter(site, (a.transpose(), b.transpose()), bias)
    }
}
