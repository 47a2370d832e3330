//! Cross-attention tuning: the attention of a decoder to its encoder (arXiv 2104.08771).

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, Names, Part, PlaceTensors, Site, Sites, Strictness,
    Targets, TrainedCopy,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The projections of T5's cross-attention.
const PROJECTIONS: [&str; 4] =
    ["EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"];

const WEIGHT: &str = "weight";
const BIAS: &str = "bias";

/// Cross-attention tuning (arXiv 2104.08771): of an encoder with a decoder only the weights of the
/// cross-attention are trained, `W' = W + Δ(W)` with `Δ(W)` of full rank.
///
/// Where `target_modules` is not set, it goes to the queries, keys, values and outputs of every
/// cross-attention by T5's names (`EncDecAttention`), and a model without one is refused. For a new
/// language the paper trains that language's embedding as well: `modules_to_save`. It begins at the base's own
/// weights. Parameters: `fan_in·fan_out`, and `fan_out` where there is a bias, a place. Folds. The file holds
/// the trained `weight [fan_out, fan_in]` and `bias [fan_out]` under their own names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CrossAttention {
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

/// What cross-attention tuning trains at one place.
#[derive(Module, Debug)]
pub struct CrossAttentionAdapter {
    /// The trained weight, and bias where there is one.
    pub copy: TrainedCopy,
}

impl Adapter for CrossAttentionAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        self.copy.linear_whole(layer, x)
    }
}

impl Fold for CrossAttentionAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        self.copy.weight(w)
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Fold::bias(&self.copy, b)
    }
}

impl Method for CrossAttention {
    type Adapter = CrossAttentionAdapter;
    type Shared = ();
    const NAME: &'static str = "CROSSATTENTION";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    /// What is trained is as large as the weight.
    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn places<'s>(&self, sites: &'s Sites, strictness: Strictness) -> Result<Vec<&'s Site>, Error> {
        let named = self.targets.target_modules.clone();
        let target_modules = named.or_else(|| Some(PROJECTIONS.into_iter().collect::<Names>()));
        let targets = Targets { target_modules, ..self.targets.clone() };
        targets.select(sites, Self::KINDS, strictness)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<CrossAttentionAdapter, Error> {
        match TrainedCopy::of(site, Part::Whole, device) {
            Some(copy) => Ok(CrossAttentionAdapter { copy }),
            None => Err(Error::place(&site.path, "expected a layer with a weight, found none")),
        }
    }

    fn fold(adapter: &CrossAttentionAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self { targets: targets.clone() }]
    }

    fn parameters(&self, site: &Site) -> usize {
        let bias = if site.bias.is_some() { site.fan_out() } else { 0 };
        site.fan_in() * site.fan_out() + bias
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &CrossAttentionAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let TrainedCopy { weight, bias, .. } = &adapter.copy;
        let weight = weight.iter().map(|weight| (WEIGHT, weight.val().transpose().into_data()));
        weight.chain(bias.iter().map(|bias| (BIAS, bias.val().into_data()))).collect()
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<CrossAttentionAdapter, Error> {
        let stored: Tensor<2> = file.take(WEIGHT, [site.fan_out(), site.fan_in()], device)?;
        let bias = match site.bias {
            Some(_) => Some(Param::from_tensor(file.take(BIAS, [site.fan_out()], device)?)),
            None => None,
        };
        let weight = Some(Param::from_tensor(stored.transpose()));
        Ok(CrossAttentionAdapter { copy: TrainedCopy { weight, scale: None, bias } })
    }
}
