//! SPT: sensitive numbers are trained alone where they are few, and by LoRA where they are many
//! (arXiv 2303.08566).

use crate::mask::{Chosen, Mask};
use crate::parameter::Parameter;
use crate::selected::{SelectedAdapter, sum};
use crate::selective::{Criterion, Selective};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::module::linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Finding, Fold, Kind, Method, Part, PlaceTensors, Site, Slope, Statistic,
    Targets,
};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;

/// SPT, sensitivity-aware visual parameter-efficient fine-tuning (arXiv 2303.08566), with LoRA: a number is
/// the more sensitive, the larger its mean squared gradient at the base model (to first order the loss falls by
/// as much when it is trained), and the `⌊keep_ratio·n⌋` most sensitive of all target places are found. A
/// linear place whose weight has `sigma` of them or more is trained as LoRA, `Δ(W) = s·A·B`; all others at the
/// numbers that were found, as the biases everywhere.
///
/// `A [fan_in, r] ~ U(±1/√fan_in)`, `B [r, fan_out]` zero at first, `s = lora_alpha / r`. Parameters: `r·(fan_in +
/// fan_out)` for a weight with LoRA, else as many as were found. Folds. Beside the tensors of [`Selective`] the
/// file holds `lora_A.weight [r, fan_in]` and `lora_B.weight [fan_out, r]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spt {
    /// Share of the numbers that count as sensitive, and where they are looked for; default 0.005.
    #[serde(flatten)]
    pub select: Selective<Sensitivity>,
    /// Rank of the weights with LoRA; default 8.
    pub r: usize,
    /// Their scale is `lora_alpha / r`; default 8.
    pub lora_alpha: f64,
    /// How many sensitive numbers make a weight one with LoRA; default none, which is as many as LoRA would
    /// train there.
    pub sigma: Option<usize>,
    /// Places with LoRA, once they are known.
    #[serde(skip)]
    low_rank: Arc<BTreeSet<String>>,
}

impl Default for Spt {
    fn default() -> Self {
        Self {
            select: Selective::default(),
            r: 8,
            lora_alpha: 8.0,
            sigma: None,
            low_rank: Arc::default(),
        }
    }
}

/// The criterion of [`Spt`]: the mean squared gradient. It has no options.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sensitivity {}

impl Criterion for Sensitivity {
    const NAME: &'static str = "SPT";
    const KEEP_RATIO: f64 = 0.005;

    fn wants(&self) -> Option<Statistic> {
        Some(Statistic::Slopes { part: Part::Whole, tuning: None })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(slope?.square.clone())
    }
}

/// What SPT trains at one place.
#[derive(Module, Debug)]
pub struct SptAdapter {
    /// Single numbers: of the weight where there is no LoRA, and of the bias.
    pub sparse: SelectedAdapter,
    /// LoRA on the weight.
    pub low_rank: Option<Factors>,
    /// `s`.
    pub scaling: f64,
}

/// LoRA's factors.
#[derive(Module, Debug)]
pub struct Factors {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub lora_b: Param<Tensor<2>>,
}

impl Adapter for SptAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let product = self.low_rank.as_ref().map(|Factors { lora_a, lora_b }| {
            let (a, b) = (lora_a.val(), lora_b.val());
            let h = linear(x.clone().cast(a.dtype()), a, None) * self.scaling; // [batch, seq, r]
            linear(h, b, None).cast(y.dtype())
        });
        sum(self.sparse.linear(layer, x, y), product)
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        match self.low_rank {
            Some(_) => None,
            None => self.sparse.linear_whole(layer, x),
        }
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        self.sparse.embedding(layer, ids, y)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.sparse.conv1d(layer, x, y)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        self.sparse.conv2d(layer, x, y)
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.sparse.norm()
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for SptAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let product = self
            .low_rank
            .as_ref()
            .map(|Factors { lora_a, lora_b }| (lora_a.val() * self.scaling).matmul(lora_b.val()));
        sum(Fold::weight(&self.sparse, w), product)
    }

    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        self.sparse.vector(v)
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Fold::bias(&self.sparse, b)
    }
}

impl Spt {
    /// How many sensitive numbers make a weight one with LoRA.
    fn sigma(&self, site: &Site) -> usize {
        self.sigma.unwrap_or(self.r.saturating_mul(site.fan_in() + site.fan_out()))
    }

    /// What is chosen at `site`, and whether its weight is trained as LoRA instead.
    fn chosen(&self, site: &Site) -> Result<(Mask, bool), Error> {
        let mask = self.select.chosen(site)?;
        let weight = Parameter::Weight.name(site);
        let found = mask.get(&weight).map_or(0, |chosen| chosen.indices().len());
        if site.kind != Kind::Linear || found == 0 || found < self.sigma(site) {
            return Ok((mask, false));
        }
        let others = mask.iter().filter(|(name, _)| *name != weight);
        let own = |(name, chosen): (&str, &Chosen)| (name.to_owned(), chosen.clone());
        Ok((others.map(own).collect(), true))
    }

    fn scaling(&self) -> f64 {
        self.lora_alpha / self.r as f64
    }
}

impl Method for Spt {
    type Adapter = SptAdapter;
    type Shared = ();
    const NAME: &'static str = Sensitivity::NAME;
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = Sensitivity::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["lora_b"];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        !self.low_rank.is_empty()
    }

    fn targets(&self) -> &Targets {
        &self.select.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.select.targets
    }

    fn check(&self) -> Result<(), Error> {
        if self.r == 0 {
            return Err(Error::config("r", "expected 1 or more, found 0"));
        }
        if !self.lora_alpha.is_finite() {
            let reason = format!("expected a finite number, found {}", self.lora_alpha);
            return Err(Error::config("lora_alpha", reason));
        }
        Method::check(&self.select)
    }

    fn wants(&self) -> Option<Statistic> {
        Method::wants(&self.select)
    }

    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        self.select.learn(site, finding)
    }

    fn surveyed(mut self, sites: &[&Site]) -> Result<Self, Error> {
        self.select = self.select.surveyed(sites)?;
        let mut low_rank = BTreeSet::new();
        for site in sites {
            if self.chosen(site)?.1 {
                low_rank.insert(site.path.clone());
            }
        }
        self.low_rank = Arc::new(low_rank);
        Ok(self)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SptAdapter, Error> {
        let (mask, low_rank) = self.chosen(site)?;
        let sparse = SelectedAdapter::new(site, &mask, device)?;
        let (fan_in, fan_out, r) = (site.fan_in(), site.fan_out(), self.r);
        let factors = |rng: &mut ChaCha8Rng| {
            let bound = (1.0 / fan_in as f32).sqrt();
            let drawn: Vec<f32> =
                (0..fan_in * r).map(|_| rng.random_range(-bound..bound)).collect();
            let a = Tensor::from_data(TensorData::new(drawn, [fan_in, r]), device);
            let lora_b = Param::from_tensor(Tensor::zeros([r, fan_out], device));
            Factors { lora_a: Param::from_tensor(a), lora_b }
        };
        let low_rank = low_rank.then(|| factors(rng));
        Ok(SptAdapter { sparse, low_rank, scaling: self.scaling() })
    }

    fn fold(adapter: &SptAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let select = || Selective::new(0.5, targets.clone());
        let plain = Self { select: select(), ..Self::default() };
        vec![
            Self { r: 2, lora_alpha: 6.0, sigma: Some(1), ..plain.clone() },
            Self { sigma: Some(usize::MAX), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let Ok((mask, low_rank)) = self.chosen(site) else { return 0 };
        let factors = self.r * (site.fan_in() + site.fan_out());
        mask.count() + if low_rank { factors } else { 0 }
    }

    fn tensors(&self, site: &Site, adapter: &SptAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = adapter.sparse.tensors(site);
        if let Some(Factors { lora_a, lora_b }) = &adapter.low_rank {
            tensors.push(("lora_A.weight", lora_a.val().transpose().into_data()));
            tensors.push(("lora_B.weight", lora_b.val().transpose().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SptAdapter, Error> {
        let sparse = SelectedAdapter::restore(site, file, device)?;
        let low_rank = match file.has("lora_A.weight") {
            false => None,
            true => {
                let a = file.take("lora_A.weight", [self.r, site.fan_in()], device)?.transpose();
                let b = file.take("lora_B.weight", [site.fan_out(), self.r], device)?.transpose();
                Some(Factors { lora_a: Param::from_tensor(a), lora_b: Param::from_tensor(b) })
            }
        };
        Ok(SptAdapter { sparse, low_rank, scaling: self.scaling() })
    }
}
