//! Delta-LoRA: the weight moves along with the product of its factors (arXiv 2309.02411).

use crate::LoraAdapter;
use crate::common::finite;
use crate::low_rank::{LowRank, faces_by_lora, stored, taken};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Buffer, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// Delta-LoRA (arXiv 2309.02411): LoRA `y = xW_t + b + s·x·A_t·B_t`, whose weight moves after each step
/// `t ≥ K` by what the product moved: `W_{t+1} = W_t + λ·s·(A_{t+1}·B_{t+1} - A_t·B_t)`.
///
/// The moves add up to their last and first product,
/// `W_t = W_0 + Σ_{i=K}^{t-1} λ·s·(A_{i+1}·B_{i+1} - A_i·B_i) = W_0 + λ·s·(A_t·B_t - A_K·B_K)`,
/// so that the weight itself can stay and the adapter is exactly
/// `y = xW_0 + b + s·x·A·B + λ·s·x·(sg[A·B] - A_K·B_K)`, where `sg` is what no gradient enters. For `K = 0`
/// the last product is zero and is not held.
///
/// `A [fan_in, r] ~ U(±1/√fan_in)`, `B [r, fan_out]` zero at first, `λ = delta_lambda`, `K = start_step`,
/// `s = lora_alpha / r`; no dropout, as in the paper. Parameters: `r·(fan_in + fan_out)` a place. Folds:
/// `Δ(W) = s·(1 + λ)·A·B - λ·s·A_K·B_K`, a plain LoRA of rank `r` with `(1 + λ)·lora_alpha` where `K = 0`, and of
/// rank `2·r` otherwise. The file holds both pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeltaLora {
    /// Rank, scale and places, as in LoRA; `lora_dropout` must be 0.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// `λ`, how far the weight moves for a move of the product; default 2, the value of the paper as remembered.
    pub delta_lambda: f64,
    /// `K`, the step after which the weight begins to move; default 0.
    pub start_step: usize,
}

impl Default for DeltaLora {
    fn default() -> Self {
        Self { low_rank: LowRank::default(), delta_lambda: 2.0, start_step: 0 }
    }
}

/// What Delta-LoRA trains at one place.
#[derive(Module, Debug)]
pub struct DeltaLoraAdapter {
    /// `A [fan_in, r]`.
    pub deltalora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub deltalora_b: Param<Tensor<2>>,
    /// The factors at step `K`, none where that is 0.
    pub start: Option<Start>,
    /// Has probability 0.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
    /// `λ`.
    pub lambda: f64,
}

/// The factors when the weight began to move; until then, those of the step at hand.
#[derive(Module, Debug)]
pub struct Start {
    /// `A_K [fan_in, r]`.
    pub a: Buffer<2>,
    /// `B_K [r, fan_out]`.
    pub b: Buffer<2>,
}

impl DeltaLoraAdapter {
    fn lora(&self) -> LoraAdapter {
        let (a, b) = (self.deltalora_a.val(), self.deltalora_b.val());
        let (mut left, mut right) = match a.is_autodiff() {
            true => {
                let (still_a, still_b) =
                    (a.clone().without_autodiff(), b.clone().without_autodiff());
                (vec![a, still_a], vec![b, still_b * self.lambda])
            }
            false => (vec![a], vec![b * (1.0 + self.lambda)]),
        };
        if let Some(start) = &self.start {
            left.push(start.a.val());
            right.push(start.b.val() * -self.lambda);
        }
        let (a, b) = (Tensor::cat(left, 1), Tensor::cat(right, 0));
        crate::lora::LoraAdapter::of(a, b, self.scaling)
    }

    /// With the factors of now as those of step `K`.
    fn started(mut self) -> Self {
        if let Some(start) = &mut self.start {
            start.a = start.a.with(self.deltalora_a.val());
            start.b = start.b.with(self.deltalora_b.val());
        }
        self
    }
}

faces_by_lora!(DeltaLoraAdapter, deltalora_a);

impl DeltaLora {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        start: Option<(Tensor<2>, Tensor<2>)>,
    ) -> Result<DeltaLoraAdapter, Error> {
        let [_, r] = a.dims();
        Ok(DeltaLoraAdapter {
            deltalora_a: Param::from_tensor(a),
            deltalora_b: Param::from_tensor(b),
            start: start.map(|(a, b)| Start { a: Buffer::new(a), b: Buffer::new(b) }),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
            lambda: self.delta_lambda,
        })
    }
}

impl Method for DeltaLora {
    type Adapter = DeltaLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "DELTALORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["deltalora_b"];
    const PAIR: Option<[&'static str; 2]> = Some(["deltalora_a", "deltalora_b"]);

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
        self.low_rank.check()?;
        if self.low_rank.lora_dropout > 0.0 {
            let dropout = self.low_rank.lora_dropout;
            let reason = format!("expected 0, which the method's identity needs, found {dropout}");
            return Err(Error::config("lora_dropout", reason));
        }
        finite("delta_lambda", self.delta_lambda)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DeltaLoraAdapter, Error> {
        let (a, b) = self.low_rank.drawn(site, rng, device)?;
        let start = (self.start_step > 0).then(|| (a.zeros_like(), b.zeros_like()));
        self.adapter(site, (a, b), start)
    }

    fn fold(adapter: &DeltaLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [scaled, patterned] = LowRank::samples(targets);
        vec![
            Self {
                low_rank: LowRank { lora_dropout: 0.0, ..scaled },
                delta_lambda: 0.5,
                start_step: 3,
            },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site)
    }

    fn policy(
        &self,
        adapters: &Adapters<DeltaLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<DeltaLoraAdapter>>>, Error> {
        if self.start_step == 0 {
            return Ok(None);
        }
        for (path, adapter) in adapters.iter() {
            let b = adapter.deltalora_b.val().without_autodiff();
            if b.abs().sum().into_scalar::<f32>() != 0.0 {
                let reason = "was trained before, and a start_step above 0 would take back how far its \
                              weight has moved; expected a fresh adapter";
                return Err(Error::place(path, reason));
            }
        }
        Ok(Some(Box::new(Waiting { start_step: self.start_step })))
    }

    fn tensors(&self, _site: &Site, adapter: &DeltaLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![
            ("deltalora_A", stored(adapter.deltalora_a.val())),
            ("deltalora_B", stored(adapter.deltalora_b.val())),
        ];
        if let Some(start) = &adapter.start {
            tensors.push(("deltalora_A_start", stored(start.a.val())));
            tensors.push(("deltalora_B_start", stored(start.b.val())));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<DeltaLoraAdapter, Error> {
        let pair = self.low_rank.take(site, ["deltalora_A", "deltalora_B"], file, device)?;
        let start = match self.start_step {
            0 => None,
            _ => {
                let ([fan_in, r], [_, fan_out]) = (pair.0.dims(), pair.1.dims());
                let a = taken("deltalora_A_start", [fan_in, r], file, device)?;
                Some((a, taken("deltalora_B_start", [r, fan_out], file, device)?))
            }
        };
        self.adapter(site, pair, start)
    }
}

/// Lets the weight stand still until step `K`: its start goes along with the factors.
struct Waiting {
    start_step: usize,
}

impl Policy<DeltaLoraAdapter> for Waiting {
    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<DeltaLoraAdapter>,
    ) -> Result<Option<Adapters<DeltaLoraAdapter>>, Error> {
        Ok((1..=self.start_step)
            .contains(&step)
            .then(|| adapters.clone().map_layers(|_, adapter| adapter.started())))
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
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::Distribution;
    use burn_peft_core::{Adapter, Sites, adapt};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    const RATE: f64 = 0.1;

    fn method(start_step: usize) -> DeltaLora {
        let low_rank = LowRank::new(2, 3.0, Targets::list(["query"]));
        DeltaLora { low_rank, delta_lambda: 0.5, start_step }
    }

    fn loss(y: Tensor<3>) -> Tensor<1> {
        (y - 1.0).square().mean()
    }

    /// Steps of the paper's own: a dense weight that moves, and two factors over it.
    #[test]
    fn five_steps_are_those_of_a_weight_that_moves() {
        let device = Device::flex();
        device.seed(1);
        let model = One { query: LinearConfig::new(5, 4).with_bias(false).init(&device) };
        let x = Tensor::<3>::random([2, 3, 5], Distribution::Default, &device);
        for start_step in [0, 2] {
            let method = method(start_step);
            let sites = Sites::of(&model, None);
            let mut adapters = adapt(&sites, &method, 1, &device.clone().autodiff()).expect("fits");
            let mut policy = method.policy(&adapters).expect("fits");
            let mut optimizer = SgdConfig::new().init();

            let mut w = model.query.weight.val();
            let first = adapters.get("query").expect("is there");
            let [mut a, mut b] = [&first.deltalora_a, &first.deltalora_b].map(|p| p.val().inner());
            let s = 1.5;
            for step in 1..=5 {
                let [leaf_a, leaf_b] =
                    [&a, &b].map(|t| Tensor::<2>::from_inner(t.clone()).require_grad());
                let whole = w.clone() + leaf_a.clone().matmul(leaf_b.clone()) * s;
                let mut grads = loss(x.clone().matmul(whole.unsqueeze())).backward();
                let before = a.clone().matmul(b.clone());
                a = a - leaf_a.grad_remove(&mut grads).expect("is reached") * RATE;
                b = b - leaf_b.grad_remove(&mut grads).expect("is reached") * RATE;
                if step > start_step {
                    w = w + (a.clone().matmul(b.clone()) - before) * (0.5 * s);
                }

                let adapter = adapters.get("query").expect("is there");
                let y = model.query.forward(x.clone());
                let y = adapter.linear(&model.query, &x, &y).expect("is linear") + y;
                let grads = GradientsParams::from_grads(loss(y).backward(), &adapters);
                adapters = optimizer.step(RATE, adapters, grads);
                if let Some(policy) = &mut policy {
                    let adjusted = policy.adjust(step, RATE, &adapters).expect("works");
                    assert_eq!(adjusted.is_some(), step <= start_step);
                    adapters = adjusted.unwrap_or(adapters);
                }
                let w0 = model.query.weight.val();
                let dense = w.clone() + a.clone().matmul(b.clone()) * s - w0.clone();
                // Learning and at rest, the same difference.
                let at_rest = adapters.valid();
                for adapter in [adapters.get("query"), at_rest.get("query")] {
                    let found = adapter.expect("is there").weight(&w0).expect("folds");
                    let far = (found.without_autodiff() - dense.clone()).abs().max();
                    let far = far.into_scalar::<f32>();
                    assert!(far < 1e-6, "K = {start_step}, step {step}: differs by {far}");
                }
            }
            let moved = (w - model.query.weight.val()).abs().max().into_scalar::<f32>();
            assert!(moved > 1e-3, "the weight moved by {moved} alone");
        }
    }

    #[test]
    fn a_late_start_wants_a_fresh_adapter() {
        let device = Device::flex();
        let model = One { query: LinearConfig::new(5, 4).init(&device) };
        let method = method(2);
        let fresh = adapt(&Sites::of(&model, None), &method, 1, &device.autodiff()).expect("fits");
        assert!(method.policy(&fresh).is_ok());
        let used = fresh.map_layers(|_, mut adapter| {
            let ones = adapter.deltalora_b.val().ones_like();
            adapter.deltalora_b = Param::from_tensor(ones.detach());
            adapter
        });
        let refused = method.policy(&used).err().expect("was trained").to_string();
        assert!(refused.contains("query") && refused.contains("fresh"), "{refused}");
    }

    #[test]
    fn dropout_is_refused() {
        let mut method = method(0);
        method.low_rank.lora_dropout = 0.1;
        assert!(method.check().is_err_and(|e| e.to_string().contains("lora_dropout")));
    }
}
