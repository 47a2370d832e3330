//! GraLoRA: LoRA in `k × k` blocks, each with factors of its own (arXiv 2505.20355).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::lycoris::indexable;
use crate::source::{Draw, Drawn, Factor, Read, Source};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// GraLoRA (arXiv 2505.20355): the block of `Δ(W)` from inputs `n` to outputs `j`, of `k × k` blocks, is
/// `s·Aₙⱼ·Bⱼₙ`, of rank `r / k`.
///
/// `Aₙⱼ [fan_in / k, r / k]` are the columns of `Aₙ [fan_in / k, r]`, `Bⱼₙ [r / k, fan_out / k]` the rows
/// of `Bⱼ [r, fan_out / k]`. With `hybrid_r` a LoRA of that rank lies beside it; `s = alpha / (r +
/// hybrid_r)`. `Aₙ ~ U(±1/√(fan_in / k))`, LoRA's A `~ U(±1/√fan_in)`, all B are zero. Parameters:
/// `(r + hybrid_r)·(fan_in + fan_out)` a place. Folds. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gralora {
    /// Rank, a multiple of `gralora_k`; default 32.
    pub r: usize,
    /// Rank of the LoRA beside it; default 0, none.
    pub hybrid_r: usize,
    /// Scale of the difference, divided by `r + hybrid_r`; default 64.
    #[serde(serialize_with = "crate::common::number")]
    pub alpha: f64,
    /// Probability with which an input is zeroed in training; default 0.
    pub gralora_dropout: f64,
    /// Number of blocks along each side; default 2.
    pub gralora_k: usize,
    /// Which biases of the model are trained beside it: none (default), all or gralora_only.
    pub bias: Bias,
    /// `true` (default): an identity at the start. `false`: the B are drawn too.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Gralora {
    fn default() -> Self {
        Self {
            r: 32,
            hybrid_r: 0,
            alpha: 64.0,
            gralora_dropout: 0.0,
            gralora_k: 2,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What GraLoRA trains at one place.
#[derive(Module, Debug)]
pub struct GraloraAdapter {
    /// `Aₙ`, `[k, fan_in / k, r]`.
    pub gralora_a: Param<Tensor<3>>,
    /// `Bⱼ`, `[k, r, fan_out / k]`.
    pub gralora_b: Param<Tensor<3>>,
    /// The LoRA beside it, `[fan_in, hybrid_r]·[hybrid_r, fan_out]`.
    pub general: Option<Factor>,
    /// Drops inputs in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl Adapter for GraloraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let ([batch, seq, _], [k, width, r]) = (x.dims(), self.gralora_a.dims());
        let rows = batch * seq;
        let dropped = || drop(x, &self.dropout, &self.gralora_a.val());
        let blocks = dropped().reshape([rows, k, width]).swap_dims(0, 1); // [n, rows, fan_in / k]
        let h = blocks.matmul(self.gralora_a.val()) * self.scaling; // [n, rows, r]
        // What the columns Aₙⱼ found goes to the rows Bⱼₙ.
        let h = h.reshape([k, rows, k, r / k]).permute([2, 1, 0, 3]).reshape([k, rows, r]);
        let delta = h.matmul(self.gralora_b.val()).swap_dims(0, 1).reshape(y.dims());
        let delta = match &self.general {
            None => delta,
            Some(lora) => delta + lora.after(dropped() * self.scaling),
        };
        Some(delta.cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for GraloraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let ([k, width, r], [_, _, out]) = (self.gralora_a.dims(), self.gralora_b.dims());
        let a = self.gralora_a.val().reshape([k, width, k, r / k]).swap_dims(1, 2); // Aₙⱼ
        let b = self.gralora_b.val().reshape([k, k, r / k, out]).swap_dims(0, 1); // Bⱼₙ, by n and j
        let blocks = a.matmul(b).swap_dims(1, 2).reshape([k * width, k * out]);
        let sum = match &self.general {
            None => blocks,
            Some(lora) => blocks + lora.matrix(),
        };
        Some(sum * self.scaling)
    }
}

impl Gralora {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, alpha: f64, targets: Targets) -> Self {
        Self { r, alpha, targets, ..Self::default() }
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<GraloraAdapter, Error> {
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        let (r, k, hybrid_r) = (self.r, self.gralora_k, self.hybrid_r);
        for (what, width) in [("inputs", fan_in), ("outputs", fan_out)] {
            if !width.is_multiple_of(k) {
                let reason = format!("expected a divisor of the {width} {what}, found {k}");
                return Err(Error::place(&site.path, format!("gralora_k: {reason}")));
            }
        }
        let ranks = r.checked_add(hybrid_r);
        indexable(r, ranks.and_then(|ranks| ranks.checked_mul(fan_in + fan_out)), site)?;
        let general = match hybrid_r {
            0 => None,
            _ => {
                let a = from.take("gralora_A_general.weight", [hybrid_r, fan_in])?;
                let b = from.take("gralora_B_general.weight", [fan_out, hybrid_r])?;
                Some(Factor::thin(a.transpose(), b.transpose()))
            }
        };
        Ok(GraloraAdapter {
            gralora_a: Param::from_tensor(from.take("gralora_A", [k, fan_in / k, r])?),
            gralora_b: Param::from_tensor(from.take("gralora_B", [k, r, fan_out / k])?),
            general,
            dropout: DropoutConfig::new(self.gralora_dropout).init(),
            scaling: self.alpha / (r + hybrid_r) as f64,
        })
    }
}

impl Method for Gralora {
    type Adapter = GraloraAdapter;
    type Shared = ();
    const NAME: &'static str = "GRALORA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];
    const FASTER: &'static [&'static str] = &["gralora_b"];

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
        positive("gralora_k", self.gralora_k)?;
        if !self.r.is_multiple_of(self.gralora_k) {
            let reason =
                format!("expected a multiple of gralora_k = {}, found {}", self.gralora_k, self.r);
            return Err(Error::config("r", reason));
        }
        finite("alpha", self.alpha)?;
        probability("gralora_dropout", self.gralora_dropout)?;
        self.bias.check("gralora_only")
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
    ) -> Result<GraloraAdapter, Error> {
        // The blocks are stored as they are multiplied, transposed from PyTorch's layers.
        let draw = |name: &str, shape: &[usize]| match name {
            "gralora_B" | "gralora_B_general.weight" if self.init_weights => Draw::Zeros,
            "gralora_A" | "gralora_B" => Draw::kaiming(&[shape[2], shape[1]]),
            _ => Draw::kaiming(shape),
        };
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &GraloraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 8.0, targets.clone());
        vec![
            Self { hybrid_r: 3, bias: Bias::Only("gralora_only".into()), ..plain.clone() },
            Self { gralora_dropout: 0.2, hybrid_r: 2, bias: Bias::All, ..plain.clone() },
            Self { gralora_k: 4, init_weights: false, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        (self.r + self.hybrid_r) * (site.fan_in() + site.fan_out())
    }

    fn tensors(&self, _site: &Site, adapter: &GraloraAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![
            ("gralora_A", adapter.gralora_a.val().into_data()),
            ("gralora_B", adapter.gralora_b.val().into_data()),
        ];
        if let Some(Factor { a, b: Some(b) }) = &adapter.general {
            tensors.push(("gralora_A_general.weight", a.val().transpose().into_data()));
            tensors.push(("gralora_B_general.weight", b.val().transpose().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<GraloraAdapter, Error> {
        self.adapter(site, &mut Read { file, device })
    }
}
