//! BitFit: the biases (arXiv 2106.10199).

use burn::module::Module;
use burn::module::Param;
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, Part, PlaceTensors, Site, Targets, TrainedCopy,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// BitFit (arXiv 2106.10199): trains the biases of the target places and nothing else, `b' = b + Δ(b)`; the
/// shift of a norm is its bias.
///
/// The paper's full form is all biases of the encoder (a pattern such as `.*encoder.*`, which reaches norms
/// too); its small one those of the queries and of the feed-forward network's first layer ("query",
/// "intermediate.dense"). It begins at the base's own biases. Parameters: `fan_out` a place. Folds. The file
/// holds the trained biases `bias [fan_out]` under their own names. A place without a bias is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BitFit {
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

/// What BitFit trains at one place.
#[derive(Module, Debug)]
pub struct BitFitAdapter {
    /// The trained bias.
    pub copy: TrainedCopy,
}

impl Adapter for BitFitAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.copy.linear(layer, x, y)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        self.copy.embedding(layer, ids, y)
    }

    fn conv1d(&self, layer: &Conv1d, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let delta = Fold::bias(&self.copy, &layer.bias.as_ref()?.val())?;
        let [_, channels, _] = y.dims();
        Some(delta.reshape([1, channels, 1]).expand(y.dims()))
    }

    fn conv2d(&self, layer: &Conv2d, _x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let delta = Fold::bias(&self.copy, &layer.bias.as_ref()?.val())?;
        let [_, channels, _, _] = y.dims();
        Some(delta.reshape([1, channels, 1, 1]).expand(y.dims()))
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.copy.norm()
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for BitFitAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Fold::bias(&self.copy, b)
    }
}

fn no_bias(site: &Site) -> Error {
    Error::place(&site.path, "has no bias to train; expected one")
}

impl Method for BitFit {
    type Adapter = BitFitAdapter;
    type Shared = ();
    const NAME: &'static str = "BITFIT";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d, Kind::Norm];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<BitFitAdapter, Error> {
        let copy = TrainedCopy::of(site, Part::Bias, device).ok_or_else(|| no_bias(site))?;
        Ok(BitFitAdapter { copy })
    }

    fn fold(adapter: &BitFitAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self { targets: targets.clone() }]
    }

    fn parameters(&self, site: &Site) -> usize {
        site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &BitFitAdapter) -> Vec<(&'static str, TensorData)> {
        adapter.copy.bias.iter().map(|bias| ("bias", bias.val().into_data())).collect()
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<BitFitAdapter, Error> {
        if site.bias.is_none() {
            return Err(no_bias(site));
        }
        let bias = Param::from_tensor(file.take("bias", [site.fan_out()], device)?);
        Ok(BitFitAdapter { copy: TrainedCopy { weight: None, scale: None, bias: Some(bias) } })
    }
}
