//! IncreLoRA: LoRA in the form of a singular value decomposition, whose rank grows where it matters while
//! it trains (arXiv 2308.12043).

use crate::LoraAdapter;
use crate::adalora::Triplets;
use crate::common::{Bias, finite, positive, probability};
use crate::importance::{check_betas, off_orthogonal};
use crate::increlora_policy::{GrowthPolicy, RESERVE};
use crate::low_rank::{bounded, faces_by_lora, stored, taken};
use crate::random::normal;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Buffer, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// IncreLoRA (arXiv 2308.12043): `y = xW + b + s·dropout(x)·A·diag(E)·B` over the triplets that a place has
/// at the time.
///
/// Every place begins with `init_r` triplets, `A [fan_in, r], B [r, fan_out] ~ N(0, 0.02²)` and `E [r] = 0`,
/// an exact identity. Every `incre_interval` steps after `init_warmup`, each of the `top_h` places that
/// matter most gets `incre_rank_num` more, until there are `target_r` a place on average. With
/// `advance_learn`, the triplets that a place gets next already take part in training with `E = 1e-5`, so
/// that they have learned a direction when they come; outside of training they have no effect. Memory is
/// that of `max_r` triplets a place from the start; the file holds those that a place has. Parameters:
/// `r·(fan_in + fan_out + 1)` a place, `r` being `max_r` in training. Folds.
///
/// A place matters as much as its triplets do together, each by AdaLoRA's score; the authors' program
/// scores the dense difference, which would need a gradient as large as the weight. `s = lora_alpha /
/// target_r` does not change; theirs divides by the rank of the time, so that growing shrinks what was
/// learned. Their restart of the learning rate's warmup for new triplets is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IncreLora {
    /// Triplets a place in the end, on average; default 8.
    pub target_r: usize,
    /// Triplets of each place at the start; default 1.
    pub init_r: usize,
    /// Most triplets of a place; default 16.
    pub max_r: usize,
    /// Steps before the first growth; default 0.
    pub init_warmup: usize,
    /// Steps from one growth to the next; default 10.
    pub incre_interval: usize,
    /// How many places grow at a time; default 3.
    pub top_h: usize,
    /// By how many triplets each of them grows; default 1.
    pub incre_rank_num: usize,
    /// Whether the next triplets of a place are trained before they come; default true.
    pub advance_learn: bool,
    /// How slowly the sensitivity of a parameter forgets; default 0.85.
    pub beta1: f64,
    /// How slowly its uncertainty forgets; default 0.85.
    pub beta2: f64,
    /// Weight in the loss of how far `A` and `B` are from orthogonal; default 0.1.
    pub orth_reg_weight: f64,
    /// How many triplets a place has, by its path; what a training decided.
    pub rank_pattern: Option<IndexMap<String, usize>>,
    /// Scale of the difference, divided by `target_r`; default 8.
    pub lora_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub lora_dropout: f64,
    /// Which biases of the model are trained beside it: none, all or lora_only.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for IncreLora {
    fn default() -> Self {
        Self {
            target_r: 8,
            init_r: 1,
            max_r: 16,
            init_warmup: 0,
            incre_interval: 10,
            top_h: 3,
            incre_rank_num: 1,
            advance_learn: true,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.1,
            rank_pattern: None,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// What IncreLoRA trains at one place.
#[derive(Module, Debug)]
pub struct IncreLoraAdapter {
    /// All triplets that the place may ever have.
    pub triplets: Triplets,
    /// `[2, r]`, 1 where a triplet is there, and 1 where it learns in advance.
    pub stages: Buffer<2>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

/// `[2, r]`: the first `active` triplets are there, and the `spare` ones after them learn in advance.
pub(crate) fn stages(active: usize, spare: usize, r: usize, device: &Device) -> Tensor<2> {
    let within = |from: usize, to: usize| {
        (0..r).map(move |rank| f32::from(u8::from((from..to).contains(&rank))))
    };
    let values: Vec<f32> = within(0, active).chain(within(active, active + spare)).collect();
    Tensor::from_data(TensorData::new(values, [2, r]), device)
}

impl IncreLoraAdapter {
    /// The rows of `stages`, `[r]` each.
    fn stage(&self, row: usize) -> Tensor<1> {
        self.stages.val().narrow(0, row, 1).squeeze_dim(0)
    }

    /// How many triplets the place has.
    pub fn rank(&self) -> usize {
        let active: Vec<f32> =
            self.stage(0).into_data().convert::<f32>().try_to_vec().unwrap_or_default();
        active.iter().filter(|active| **active > 0.0).count()
    }

    /// `E`, and 0 where there is no triplet yet.
    fn active(&self) -> Tensor<1> {
        self.triplets.lora_e.val() * self.stage(0)
    }

    fn lora(&self) -> LoraAdapter {
        let e = match self.stages.is_training() {
            true => self.active() + self.stage(1) * RESERVE,
            false => self.active(),
        };
        let a = self.triplets.lora_a.val() * e.unsqueeze(); // A·diag(E)
        crate::lora::LoraAdapter::of(a, self.triplets.lora_b.val(), self.scaling)
    }

    /// `A` and `B` of the triplets that learn, and the identity for them.
    fn learning(&self) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let mask = self.stages.val().sum_dim(0); // [1, r]
        let a = self.triplets.lora_a.val() * mask.clone();
        let b = self.triplets.lora_b.val() * mask.clone().transpose();
        let identity = Tensor::eye(mask.dims()[1], &mask.device()) * mask;
        (a, b, identity)
    }
}

faces_by_lora!(IncreLoraAdapter, triplets.lora_a);

impl IncreLora {
    /// With these ranks at the start, in the end and at most, and the defaults for the rest.
    pub fn new(init_r: usize, target_r: usize, max_r: usize, targets: Targets) -> Self {
        Self { init_r, target_r, max_r, targets, ..Self::default() }
    }

    /// How many triplets are allocated at `site`: those that it has in the end, once that is known.
    fn rank(&self, site: &Site) -> Result<usize, Error> {
        let path = &site.path;
        let r = self.rank_pattern.as_ref().and_then(|all| all.get(path)).copied();
        if let Some(r) = r.filter(|r| !(1..=self.max_r).contains(r)) {
            let reason = format!("expected 1 to max_r = {} at {path}, found {r}", self.max_r);
            return Err(Error::config("rank_pattern", reason));
        }
        let r = r.unwrap_or(self.max_r);
        bounded("max_r", path, &[r, site.fan_in() + site.fan_out()])?;
        Ok(r)
    }

    fn adapter(
        &self,
        (a, e, b): (Tensor<2>, Tensor<1>, Tensor<2>),
        stages: Tensor<2>,
    ) -> IncreLoraAdapter {
        IncreLoraAdapter {
            triplets: Triplets {
                lora_a: Param::from_tensor(a),
                lora_e: Param::from_tensor(e),
                lora_b: Param::from_tensor(b),
            },
            stages: Buffer::new(stages),
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scaling: self.lora_alpha / self.target_r as f64,
        }
    }
}

impl Method for IncreLora {
    type Adapter = IncreLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "INCRELORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

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
        for (field, value) in [
            ("init_r", self.init_r),
            ("incre_interval", self.incre_interval),
            ("top_h", self.top_h),
            ("incre_rank_num", self.incre_rank_num),
        ] {
            positive(field, value)?;
        }
        for (field, rank, least, least_is) in [
            ("target_r", self.target_r, self.init_r, "init_r"),
            ("max_r", self.max_r, self.target_r, "target_r"),
        ] {
            if rank < least {
                let reason = format!("expected at least {least_is} = {least}, found {rank}");
                return Err(Error::config(field, reason));
            }
        }
        check_betas(self.beta1, self.beta2)?;
        finite("orth_reg_weight", self.orth_reg_weight)?;
        if self.orth_reg_weight < 0.0 {
            let reason = format!("expected 0 or more, found {}", self.orth_reg_weight);
            return Err(Error::config("orth_reg_weight", reason));
        }
        finite("lora_alpha", self.lora_alpha)?;
        probability("lora_dropout", self.lora_dropout)?;
        self.bias.check("lora_only")
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<IncreLoraAdapter, Error> {
        let r = self.rank(site)?;
        let a = normal([site.fan_in(), r], 0.02, rng, device);
        let b = normal([r, site.fan_out()], 0.02, rng, device);
        let active = if self.rank_pattern.is_some() { r } else { self.init_r };
        let spare = if self.advance_learn { self.incre_rank_num } else { 0 };
        Ok(self.adapter((a, Tensor::zeros([r], device), b), stages(active, spare, r, device)))
    }

    fn fold(adapter: &IncreLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(1, 2, 4, targets.clone());
        vec![
            Self {
                rank_pattern: Some(IndexMap::from([("query".into(), 3), ("mix".into(), 1)])),
                bias: Bias::All,
                ..plain.clone()
            },
            Self {
                init_r: 2,
                advance_learn: false,
                lora_dropout: 0.2,
                bias: Bias::Only("lora_only".into()),
                ..plain.clone()
            },
            Self { incre_rank_num: 2, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.rank(site).unwrap_or(self.max_r) * (site.fan_in() + site.fan_out() + 1)
    }

    fn has_penalty(&self) -> bool {
        self.orth_reg_weight > 0.0
    }

    fn penalty(&self, adapters: &Adapters<IncreLoraAdapter>) -> Option<Tensor<1>> {
        let all = adapters.iter().map(|(_, adapter)| adapter.learning());
        Some(off_orthogonal(all)? * self.orth_reg_weight)
    }

    fn policy(
        &self,
        adapters: &Adapters<IncreLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<IncreLoraAdapter>>>, Error> {
        Ok(Some(Box::new(GrowthPolicy::new(self, adapters.iter()))))
    }

    /// Triplets that never came are left out of the file.
    fn finished(self, adapters: &Adapters<IncreLoraAdapter>) -> Self {
        let ranks = adapters.iter().map(|(path, adapter)| (path.to_owned(), adapter.rank()));
        Self { rank_pattern: Some(ranks.collect()), ..self }
    }

    fn tensors(&self, site: &Site, adapter: &IncreLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let Triplets { lora_a, lora_b, .. } = &adapter.triplets;
        // Without a pattern all are written, those that never came with E = 0.
        let r = self.rank(site).unwrap_or(self.max_r);
        vec![
            ("increlora_A", stored(lora_a.val().narrow(1, 0, r))),
            ("increlora_E", adapter.active().narrow(0, 0, r).into_data()),
            ("increlora_B", stored(lora_b.val().narrow(0, 0, r))),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<IncreLoraAdapter, Error> {
        let r = self.rank(site)?;
        let a = taken("increlora_A", [site.fan_in(), r], file, device)?;
        let e = file.take("increlora_E", [r], device)?;
        let b = taken("increlora_B", [r, site.fan_out()], file, device)?;
        Ok(self.adapter((a, e, b), stages(r, 0, r, device)))
    }
}
