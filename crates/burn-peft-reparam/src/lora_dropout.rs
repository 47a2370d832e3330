//! LoRA Dropout: in training, random inputs of `A` and outputs of `B` are dropped (arXiv 2404.09610).

use crate::LoraAdapter;
use crate::common::drop;
use crate::low_rank::{LowRank, stored};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Dropout, Embedding, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LoRA Dropout (arXiv 2404.09610): `y = xW + b + s·x·Â·B̂`, where a step of training sees
/// `Â = diag(m)·A` and `B̂ = B·diag(m')` with fresh Bernoulli `m [fan_in]` and `m' [fan_out]`: random
/// columns of `A` and rows of `B` are zero in the paper's layout, the same ones for the whole batch.
///
/// `lora_dropout` is the rate of both masks, which are divided by `1 - lora_dropout`, so that evaluation
/// sees the mean. Shapes, inits, `s` and the number of parameters, `r·(fan_in + fan_out)` a place, are
/// LoRA's. Folds, without masks. The paper's ensemble over masks at test time is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraDropout {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
}

/// What LoRA Dropout trains at one place.
#[derive(Module, Debug)]
pub struct LoraDropoutAdapter {
    /// `A [fan_in, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub lora_b: Param<Tensor<2>>,
    /// The rate of both masks.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl LoraDropoutAdapter {
    fn lora(&self) -> LoraAdapter {
        crate::lora::LoraAdapter::of(self.lora_a.val(), self.lora_b.val(), self.scaling)
    }

    /// The LoRA of this step.
    fn dropped(&self) -> LoraAdapter {
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, &a.device().inner());
        let rows = drop(&ones([a.dims()[0], 1]), &self.dropout, &a);
        let columns = drop(&ones([1, b.dims()[1]]), &self.dropout, &b);
        crate::lora::LoraAdapter::of(a * rows, b * columns, self.scaling)
    }
}

impl Adapter for LoraDropoutAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.dropped().linear(layer, x, y)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        self.dropped().embedding(layer, ids, y)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.dropped().conv1d(layer, x, y)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        self.dropped().conv2d(layer, x, y)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for LoraDropoutAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        self.lora().weight(w)
    }
}

impl LoraDropout {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
    ) -> Result<LoraDropoutAdapter, Error> {
        let [_, r] = a.dims();
        Ok(LoraDropoutAdapter {
            lora_a: Param::from_tensor(a),
            lora_b: Param::from_tensor(b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for LoraDropout {
    type Adapter = LoraDropoutAdapter;
    type Shared = ();
    const NAME: &'static str = "LORADROPOUT";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["lora_b"];

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
    ) -> Result<LoraDropoutAdapter, Error> {
        self.adapter(site, self.low_rank.drawn(site, rng, device)?)
    }

    fn fold(adapter: &LoraDropoutAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        // Rarely: where all of a small place's rows are dropped, nothing has a gradient.
        let rare = |low_rank: LowRank| {
            let lora_dropout = low_rank.lora_dropout / 10.0;
            Self { low_rank: LowRank { lora_dropout, ..low_rank } }
        };
        LowRank::samples(targets).map(rare).to_vec()
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site)
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &LoraDropoutAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        vec![("lora_A", stored(adapter.lora_a.val())), ("lora_B", stored(adapter.lora_b.val()))]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraDropoutAdapter, Error> {
        self.adapter(site, self.low_rank.take(site, ["lora_A", "lora_B"], file, device)?)
    }
}
