//! LoRA-FA: LoRA with a frozen random `A`; only `B` is trained (arXiv 2308.03303).

use crate::LoraAdapter;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets, ridge_inverse,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// LoRA-FA (arXiv 2308.03303): `y = xW + b + s·dropout(x)·A·B` with `A` frozen, so that training keeps
/// `x·A [.., r]` and not `x` for the backward pass.
///
/// `A [fan_in, r]` a random constant, `U(±1/√fan_in)`; `B [r, fan_out]` zero at first;
/// `s = lora_alpha / r`. Parameters: `r·fan_out` a place. Folds. The file holds `A` too.
///
/// In training the gradient of `B`, clipped, is corrected before the optimizer's step:
/// `∂B ← (AᵀA + δI)⁻¹·∂B / s²` with `δ = 1e-8`. Of all steps of `B` that is the one whose effect on `W` comes
/// nearest to full fine-tuning's (as in HF PEFT's LoRA-FA optimizer).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraFa {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Corrects the gradient of `B` as above; default true.
    pub gradient_correction: bool,
}

impl Default for LoraFa {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), gradient_correction: true }
    }
}

/// What LoRA-FA trains at one place.
#[derive(Module, Debug)]
pub struct LoraFaAdapter {
    /// `A [fan_in, r]`, frozen.
    pub lorafa_a: Tensor<2>,
    /// `B [r, fan_out]`.
    pub lorafa_b: Param<Tensor<2>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl LoraFaAdapter {
    fn lora(&self) -> LoraAdapter {
        crate::lora::LoraAdapter::of(self.lorafa_a.clone(), self.lorafa_b.val(), self.scaling)
    }

    /// `(AᵀA + δI)⁻¹ / s²`.
    fn metric(&self) -> Tensor<2> {
        let a = self.lorafa_a.clone().without_autodiff();
        ridge_inverse(&a.clone().transpose().matmul(a), 1e-8) / self.scaling.powi(2)
    }
}

faces_by_lora!(LoraFaAdapter, lorafa_b);

impl LoraFa {
    fn adapter(&self, site: &Site, (a, b): (Tensor<2>, Tensor<2>)) -> Result<LoraFaAdapter, Error> {
        let [_, r] = a.dims();
        Ok(LoraFaAdapter {
            lorafa_a: a.without_autodiff(),
            lorafa_b: Param::from_tensor(b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for LoraFa {
    type Adapter = LoraFaAdapter;
    type Shared = ();
    const NAME: &'static str = "LORAFA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn draws(&self) -> bool {
        false
    }

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
        self.low_rank.check()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LoraFaAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?)
    }

    fn fold(adapter: &LoraFaAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, gradient_correction: false },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.rank(site).unwrap_or(self.low_rank.r) * site.fan_out()
    }

    fn policy(
        &self,
        adapters: &Adapters<LoraFaAdapter>,
    ) -> Result<Option<Box<dyn Policy<LoraFaAdapter>>>, Error> {
        if !self.gradient_correction {
            return Ok(None);
        }
        let mut metrics = BTreeMap::new();
        for (path, adapter) in adapters.iter() {
            if adapter.scaling == 0.0 {
                let reason = "has a lora_alpha of 0, by which no gradient can be corrected";
                return Err(Error::place(path, reason));
            }
            metrics.insert(path.to_owned(), adapter.metric());
        }
        Ok(Some(Box::new(Corrected { metrics })))
    }

    fn tensors(&self, _site: &Site, adapter: &LoraFaAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("lorafa_A", stored(adapter.lorafa_a.clone())),
            ("lorafa_B", stored(adapter.lorafa_b.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraFaAdapter, Error> {
        let pair = self.low_rank.take(site, ["lorafa_A", "lorafa_B"], file, device)?;
        self.adapter(site, pair)
    }
}

/// Corrects the gradients of `B`; `A` stays what it is, so that its part is computed once.
struct Corrected {
    metrics: BTreeMap<String, Tensor<2>>,
}

impl Policy<LoraFaAdapter> for Corrected {
    fn gradients(
        &mut self,
        _step: usize,
        adapters: &Adapters<LoraFaAdapter>,
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        for (path, adapter) in adapters.iter() {
            let id = adapter.lorafa_b.id;
            if let (Some(metric), Some(gradient)) =
                (self.metrics.get(path), gradients.remove::<2>(id))
            {
                gradients.register(id, metric.clone().matmul(gradient));
            }
        }
        gradients
    }

    fn adjust(
        &mut self,
        _step: usize,
        _learning_rate: f64,
        _adapters: &Adapters<LoraFaAdapter>,
    ) -> Result<Option<Adapters<LoraFaAdapter>>, Error> {
        Ok(None)
    }

    fn state(&self) -> Result<Json, Error> {
        Ok(Json::Null)
    }

    fn resume(&mut self, _state: Json, _device: &Device) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::optim::AdamWConfig;

    /// A matrix of the golden file, as PyTorch stores it.
    fn matrix(json: &Json) -> Tensor<2> {
        let rows: Vec<Vec<f32>> = serde_json::from_value(json.clone()).expect("is a matrix");
        let shape = [rows.len(), rows[0].len()];
        let data = TensorData::new(rows.concat(), shape);
        let matrix = Tensor::<2>::from_data(data, &Device::flex()).transpose();
        Tensor::from_data(matrix.into_data(), &Device::flex().autodiff())
    }

    /// HF PEFT's LoRA-FA optimizer on the same gradients (`interop/fixtures.py`, `lora_fa`).
    #[test]
    fn steps_as_hf_pefts_optimizer() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/lora_fa.json");
        let text = std::fs::read_to_string(path).expect("is committed");
        let golden: Json = serde_json::from_str(&text).expect("is JSON");
        let number = |name: &str| golden[name].as_f64().expect("is a number");
        let adapter = LoraFaAdapter {
            lorafa_a: matrix(&golden["a"]).inner(),
            lorafa_b: Param::from_tensor(matrix(&golden["b"])),
            dropout: LowRank::default().dropout(),
            scaling: number("scaling"),
        };
        let id = adapter.lorafa_b.id;
        let mut adapters = Adapters::new([("one".to_owned(), adapter)], []);
        let mut policy = LoraFa::default().policy(&adapters).expect("fits").expect("is there");
        let adamw = AdamWConfig::new().with_epsilon(0.0).with_weight_decay(0.0);
        let mut optimizer = adamw.init();
        let steps = golden["steps"].as_array().expect("are steps");
        assert!(steps.len() > 3);
        for (step, golden_step) in (1..).zip(steps) {
            let mut gradients = GradientsParams::new();
            gradients.register(id, matrix(&golden_step["gradient"]).inner());
            let gradients = policy.gradients(step, &adapters, gradients);
            adapters = optimizer.step(number("lr"), adapters, gradients);
            let b = adapters.get("one").expect("is there").lorafa_b.val().inner();
            let far = (b - matrix(&golden_step["b"]).inner()).abs().max().into_scalar::<f32>();
            // Numbers below 1; what the inverse amplifies of a rounding, Adam divides out again.
            assert!(far < 1e-5, "step {step} differs by {far}");
        }
    }
}
