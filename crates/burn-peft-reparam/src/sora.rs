//! SoRA: `W' = W + s·A·diag(g)·B`, with a gate that a proximal step makes sparse (arXiv 2311.11696).

use crate::LoraAdapter;
use crate::common::finite;
use crate::importance::renewed;
use crate::low_rank::{LowRank, faces_by_lora, stored, taken};
use crate::random::{normal, uniform};
use crate::rank_mask::{cut, kept};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// SoRA, sparse low-rank adaptation (arXiv 2311.11696): `y = xW + b + s·dropout(x)·A·diag(g)·B`, which is
/// `W0 + B·diag(g)·A` in the paper's layout.
///
/// `A [fan_in, r]` as in LoRA, gate `g [r] ~ N(0, 1)`, `B [r, fan_out]` zero at first;
/// `s = lora_alpha / r` for the rank that was asked for, whatever is left of it. After each step at rate
/// `η` the gate is drawn towards zero, `g ← sign(g)·max(|g| - η·λ, 0)` with `λ = sparse_lambda`: the
/// proximal step of `λ·‖g‖₁` ([`soft_threshold`]). The file holds the ranks whose gate is not zero, and one
/// of a place where all are. Parameters: `r·(fan_in + fan_out + 1)` a place. Folds. The paper's second
/// schedule, which trains on under a growing `λ`, is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sora {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// `λ`; default 0.375. The paper's `ξ` is `η·λ`: its scripts' 3e-4 at the rate 8e-4.
    pub sparse_lambda: f64,
    /// Which of the asked ranks are left, by the path of the place; what a training decided.
    pub gate_pattern: Option<IndexMap<String, Vec<bool>>>,
}

impl Default for Sora {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), sparse_lambda: 0.375, gate_pattern: None }
    }
}

/// What SoRA trains at one place.
#[derive(Module, Debug)]
pub struct SoraAdapter {
    /// `A [fan_in, r]`.
    pub sora_a: Param<Tensor<2>>,
    /// `g [r]`.
    pub sora_gate: Param<Tensor<1>>,
    /// `B [r, fan_out]`.
    pub sora_b: Param<Tensor<2>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl SoraAdapter {
    fn lora(&self) -> LoraAdapter {
        let gated = self.sora_a.val() * self.sora_gate.val().unsqueeze(); // A·diag(g)
        crate::lora::LoraAdapter::of(gated, self.sora_b.val(), self.scaling)
    }
}

faces_by_lora!(SoraAdapter, sora_a);

/// `sign(g)·max(|g| - threshold, 0)`.
pub fn soft_threshold(gate: Tensor<1>, threshold: f64) -> Tensor<1> {
    (gate.clone().abs() - threshold).clamp_min(0.0) * gate.sign()
}

/// Draws the gates towards zero after each step. It knows nothing between steps.
#[derive(Debug, Clone)]
struct Proximal {
    sparse_lambda: f64,
}

impl Policy<SoraAdapter> for Proximal {
    fn adjust(
        &mut self,
        step: usize,
        learning_rate: f64,
        adapters: &Adapters<SoraAdapter>,
    ) -> Result<Option<Adapters<SoraAdapter>>, Error> {
        if step == 0 {
            return Ok(None);
        }
        let threshold = learning_rate * self.sparse_lambda;
        Ok(Some(adapters.clone().map_layers(|_, adapter| {
            let gate = soft_threshold(adapter.sora_gate.val().without_autodiff(), threshold);
            SoraAdapter { sora_gate: renewed(&adapter.sora_gate, gate), ..adapter }
        })))
    }

    fn state(&self) -> Result<Json, Error> {
        Ok(Json::Null)
    }

    fn resume(&mut self, _state: Json, _device: &Device) -> Result<(), Error> {
        Ok(())
    }
}

impl Sora {
    /// Indices of the ranks that are left at `site`.
    fn kept(&self, site: &Site) -> Result<Vec<i32>, Error> {
        let (r, path) = (self.low_rank.rank(site)?, &site.path);
        let mask = self.gate_pattern.as_ref().and_then(|all| all.get(path));
        let kept = kept("gate_pattern", mask, r, path)?;
        if kept.is_empty() {
            let reason = format!("leaves no rank at {path}; expected 1 or more");
            return Err(Error::config("gate_pattern", reason));
        }
        Ok(kept)
    }

    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        gate: Tensor<1>,
    ) -> Result<SoraAdapter, Error> {
        Ok(SoraAdapter {
            sora_a: Param::from_tensor(a),
            sora_gate: Param::from_tensor(gate),
            sora_b: Param::from_tensor(b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, self.low_rank.rank(site)?)?,
        })
    }
}

impl Method for Sora {
    type Adapter = SoraAdapter;
    type Shared = ();
    const NAME: &'static str = "SORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["sora_b"];

    fn targets(&self) -> &Targets {
        &self.low_rank.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.low_rank.targets
    }

    fn biases(&self) -> Biases {
        self.low_rank.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        finite("sparse_lambda", self.sparse_lambda)?;
        if self.sparse_lambda < 0.0 {
            let reason = format!("expected 0 or more, found {}", self.sparse_lambda);
            return Err(Error::config("sparse_lambda", reason));
        }
        self.low_rank.check()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SoraAdapter, Error> {
        let left = self.kept(site)?.len();
        let bound = (1.0 / site.fan_in() as f32).sqrt();
        let a = uniform([site.fan_in(), left], bound, rng, device);
        let gate = normal([left], 1.0, rng, device);
        self.adapter(site, (a, Tensor::zeros([left, site.fan_out()], device)), gate)
    }

    fn fold(adapter: &SoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        let gates = IndexMap::from([("mix".into(), vec![true, false, true, false])]);
        vec![
            Self { low_rank: dropping, gate_pattern: Some(gates), ..Self::default() },
            Self { low_rank: patterned, sparse_lambda: 0.1, gate_pattern: None },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let left = self.kept(site).map_or(self.low_rank.r, |kept| kept.len());
        left * (site.fan_in() + site.fan_out() + 1)
    }

    fn policy(
        &self,
        _adapters: &Adapters<SoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<SoraAdapter>>>, Error> {
        Ok(Some(Box::new(Proximal { sparse_lambda: self.sparse_lambda })))
    }

    /// Ranks whose gate is zero are left out of the file.
    fn finished(self, adapters: &Adapters<SoraAdapter>) -> Self {
        if self.gate_pattern.is_some() {
            return self;
        }
        let open = |adapter: &SoraAdapter| -> Vec<bool> {
            let gate = adapter.sora_gate.val().into_data().convert::<f32>();
            let gate: Vec<f32> = gate.try_to_vec().unwrap_or_default();
            let closed = gate.iter().all(|g| *g == 0.0);
            // One stays where all are zero, so that the place is still one.
            (0..).zip(gate).map(|(rank, g)| g != 0.0 || (closed && rank == 0)).collect()
        };
        let pattern = adapters.iter().map(|(path, adapter)| (path.to_owned(), open(adapter)));
        Self { gate_pattern: Some(pattern.collect()), ..self }
    }

    fn tensors(&self, site: &Site, adapter: &SoraAdapter) -> Vec<(&'static str, TensorData)> {
        let kept = self.kept(site).unwrap_or_default();
        vec![
            ("sora_A", stored(cut(adapter.sora_a.val(), 1, &kept))),
            ("sora_gate", cut(adapter.sora_gate.val(), 0, &kept).into_data()),
            ("sora_B", stored(cut(adapter.sora_b.val(), 0, &kept))),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SoraAdapter, Error> {
        let left = self.kept(site)?.len();
        let a = taken("sora_A", [site.fan_in(), left], file, device)?;
        let gate = file.take("sora_gate", [left], device)?;
        let b = taken("sora_B", [left, site.fan_out()], file, device)?;
        self.adapter(site, (a, b), gate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    fn adapter(gate: [f32; 3], device: &Device) -> SoraAdapter {
        SoraAdapter {
            sora_a: Param::from_tensor(Tensor::ones([4, 3], device)),
            sora_gate: Param::from_tensor(Tensor::from_floats(gate, device)),
            sora_b: Param::from_tensor(Tensor::ones([3, 2], device)),
            dropout: LowRank::default().dropout(),
            scaling: 1.0,
        }
    }

    #[test]
    fn the_threshold_takes_from_both_sides() {
        let gate = Tensor::from_floats([0.75, -0.75, 0.25, -0.25, 0.0], &Device::flex());
        assert_eq!(numbers(soft_threshold(gate.clone(), 0.5)), [0.25, -0.25, 0.0, 0.0, 0.0]);
        assert_eq!(numbers(soft_threshold(gate.clone(), 0.0)), numbers(gate));
    }

    #[test]
    fn the_policy_takes_rate_times_lambda_and_the_file_what_is_left() {
        let device = Device::flex().autodiff();
        let places = [("one", [0.75, -0.25, 0.5]), ("two", [0.25, 0.25, -0.25])];
        let layers = places.map(|(path, gate)| (path.to_owned(), adapter(gate, &device)));
        let before = Adapters::new(layers, []);
        let mut policy = Proximal { sparse_lambda: 2.0 };
        assert!(policy.adjust(0, 0.0, &before).expect("can").is_none());
        let after = policy.adjust(1, 0.125, &before).expect("can").expect("changes something");
        let gate = |path| &after.get(path).expect("is there").sora_gate;
        assert_eq!(numbers(gate("one").val()), [0.5, 0.0, 0.25]);
        assert_eq!(gate("one").id, before.get("one").expect("is there").sora_gate.id);
        assert!(gate("one").val().is_require_grad());
        let pattern = Sora::default().finished(&after).gate_pattern.expect("was decided");
        assert_eq!(pattern["one"], [true, false, true]);
        assert_eq!(pattern["two"], [true, false, false], "one stays");
    }
}
