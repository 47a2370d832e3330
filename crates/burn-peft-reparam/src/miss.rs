//! MiSS: `Δ(W)` is one small block repeated along the inputs (arXiv 2409.15371).

use crate::common::{Bias, drop, positive, probability};
use crate::lycoris::indexable;
use crate::source::{Draw, Drawn, Read, Source};
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::ops::PadMode;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed,
};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// MiSS (matrix shard sharing, arXiv 2409.15371; once Bone): `δ = (Σᵢ xᵢ)·D` over the shards `xᵢ` of `r`
/// inputs each, so that `Δ(W)` is `D` repeated along the inputs.
///
/// `D [r, fan_out]`, or `[r, mini_r]` repeated along the outputs too ("mini"). "bat" makes it depend on
/// the weight: with `W` cut into `r × r` blocks, the block of inputs `i` and outputs `j` gets
/// `Dⱼᵀ·(Wᵢⱼ + I)`, `D [fan_out / r, r, r]`; that is composed on each call, for nothing cheaper is
/// known. `D = 0` at the start. Parameters: `r·fan_out` a place, `r·mini_r` for "mini". Folds. Names and
/// defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Miss {
    /// Inputs of a shard, at most `fan_in`; for "bat" a divisor of both sides; default 64.
    pub r: usize,
    /// Probability with which an input is zeroed in training; default 0. As in HF PEFT, not for "bat".
    pub miss_dropout: f64,
    /// Outputs of "mini"'s block, a divisor of `fan_out`; default 1.
    pub mini_r: usize,
    /// Which of the three it is; default `true`.
    pub init_weights: MissInit,
    /// Which biases of the model are trained beside it: none (default), all or MiSS_only.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Miss {
    fn default() -> Self {
        Self {
            r: 64,
            miss_dropout: 0.0,
            mini_r: 1,
            init_weights: MissInit::Default(true),
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// Which MiSS: HF PEFT's `init_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MissInit {
    /// MiSS itself, from zero (`true`) or from `U(±1/√fan_out)` (`false`), which is no identity.
    Default(bool),
    /// "bat" or "mini", from zero.
    Named(String),
}

/// What MiSS trains at one place.
#[derive(Module, Debug)]
pub enum MissAdapter {
    /// `D` repeated.
    Shards(MissShards),
    /// `D` times the weight's blocks.
    Bat(MissBat),
}

/// A block that is repeated along inputs and outputs.
#[derive(Module, Debug)]
pub struct MissShards {
    /// `D [r, fan_out]`, or `[r, mini_r]`.
    pub block: Param<Tensor<2>>,
    /// Drops inputs in training.
    pub dropout: Dropout,
}

/// Blocks that multiply the weight's.
#[derive(Module, Debug)]
pub struct MissBat {
    /// `D [fan_out / r, r, r]`.
    pub block: Param<Tensor<3>>,
}

impl Adapter for MissAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let Self::Shards(MissShards { block, dropout }) = self else {
            return self.linear_whole(layer, x).map(|whole| whole - y.clone());
        };
        let ([batch, seq, fan_in], [r, width], [_, _, fan_out]) =
            (x.dims(), block.dims(), y.dims());
        let x = drop(x, dropout, &block.val());
        let shards = fan_in.div_ceil(r);
        let x = match shards * r - fan_in {
            0 => x,
            missing => x.pad((0, missing, 0, 0), PadMode::Constant(0.0)),
        };
        let sum = x.reshape([batch * seq, shards, r]).sum_dim(1);
        let delta = linear(sum.reshape([batch, seq, r]), block.val(), None);
        Some(delta.repeat_dim(2, fan_out / width).cast(y.dtype()))
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        match self {
            Self::Shards(_) => None,
            Self::Bat(_) => composed::linear(self, layer, x),
        }
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for MissAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let [fan_in, fan_out] = w.dims();
        Some(match self {
            Self::Shards(MissShards { block, .. }) => {
                let [r, width] = block.dims();
                let repeated = block.val().repeat_dim(1, fan_out / width);
                repeated.repeat_dim(0, fan_in.div_ceil(r)).narrow(0, 0, fan_in)
            }
            Self::Bat(MissBat { block }) => {
                let [blocks, r, _] = block.dims();
                let d = block.val().swap_dims(1, 2).reshape([1, blocks, r, r]); // Dⱼᵀ
                let w = w.clone().cast(d.dtype()).reshape([fan_in / r, r, blocks, r]);
                let w = w.swap_dims(1, 2); // Wᵢⱼ [r, r]
                (d.clone().matmul(w) + d).swap_dims(1, 2).reshape([fan_in, fan_out])
            }
        })
    }
}

impl Miss {
    /// With this rank and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn is(&self, name: &str) -> bool {
        matches!(&self.init_weights, MissInit::Named(word) if word == name)
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<MissAdapter, Error> {
        let (fan_in, fan_out, r) = (site.fan_in(), site.fan_out(), self.r);
        let refuse = |field: &str, expected: String, found: usize| {
            Err(Error::place(&site.path, format!("{field}: expected {expected}, found {found}")))
        };
        if r > fan_in {
            return refuse("r", format!("at most the {fan_in} inputs"), r);
        }
        indexable(r, r.checked_mul(fan_out), site)?;
        if self.is("bat") {
            if !fan_in.is_multiple_of(r) || !fan_out.is_multiple_of(r) {
                return refuse("r", format!("a divisor of {fan_in} and {fan_out}"), r);
            }
            let block = Param::from_tensor(from.take("miss_block", [fan_out / r, r, r])?);
            return Ok(MissAdapter::Bat(MissBat { block }));
        }
        let width = if self.is("mini") { self.mini_r } else { fan_out };
        if !fan_out.is_multiple_of(width) {
            return refuse("mini_r", format!("a divisor of the {fan_out} outputs"), width);
        }
        Ok(MissAdapter::Shards(MissShards {
            block: Param::from_tensor(from.take("miss_block", [r, width])?),
            dropout: DropoutConfig::new(self.miss_dropout).init(),
        }))
    }
}

impl Method for Miss {
    type Adapter = MissAdapter;
    type Shared = ();
    const NAME: &'static str = "MISS";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        self.is("bat")
    }

    fn draws(&self) -> bool {
        self.init_weights == MissInit::Default(false)
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
        if let MissInit::Named(name) = &self.init_weights
            && !["bat", "mini"].contains(&name.as_str())
        {
            let reason = format!("expected true, false, \"bat\" or \"mini\", found `{name}`");
            return Err(Error::config("init_weights", reason));
        }
        positive("r", self.r)?;
        if self.is("mini") {
            positive("mini_r", self.mini_r)?;
        }
        probability("miss_dropout", self.miss_dropout)?;
        self.bias.check("MiSS_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights != MissInit::Default(false)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<MissAdapter, Error> {
        let draw = |_: &str, shape: &[usize]| match self.init_weights {
            MissInit::Default(false) => Draw::kaiming(shape),
            _ => Draw::Zeros,
        };
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &MissAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let named = |name: &str| MissInit::Named(name.into());
        let plain = Self::new(4, targets.clone());
        vec![
            Self { miss_dropout: 0.2, bias: Bias::All, ..plain.clone() },
            Self { init_weights: MissInit::Default(false), r: 5, ..plain.clone() },
            Self { bias: Bias::Only("MiSS_only".into()), ..plain.clone() },
            Self { init_weights: named("mini"), mini_r: 8, ..plain.clone() },
            Self { init_weights: named("bat"), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r * if self.is("mini") { self.mini_r } else { site.fan_out() }
    }

    fn tensors(&self, _site: &Site, adapter: &MissAdapter) -> Vec<(&'static str, TensorData)> {
        let block = match adapter {
            MissAdapter::Shards(shards) => shards.block.val().into_data(),
            MissAdapter::Bat(bat) => bat.block.val().into_data(),
        };
        vec![("miss_block", block)]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<MissAdapter, Error> {
        self.adapter(site, &mut Read { file, device })
    }
}
