//! Tuning of norms: scale and shift trained, as copies (arXiv 2312.11420).

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, Part, PlaceTensors, Site, Targets, TrainedCopy,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LN tuning (arXiv 2312.11420): `y = norm(x) ⊙ g' + b'`, where `g'` and `b'` begin as the norm's own.
///
/// Over layer norms and root-mean-square norms (which have no `b`). Parameters: `2·dim` a place, or `dim`.
/// Folds: `Δ(g) = g' - g`, `Δ(b) = b' - b`. Names are HF PEFT's; it has no option but where it goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LnTuning {
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

/// What LN tuning trains at one place.
#[derive(Module, Debug)]
pub struct LnTuningAdapter {
    /// `g' [dim]` and `b' [dim]`.
    pub ln_tuning_layers: TrainedCopy,
}

impl Adapter for LnTuningAdapter {
    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.ln_tuning_layers.norm()
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for LnTuningAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        self.ln_tuning_layers.vector(v)
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Fold::bias(&self.ln_tuning_layers, b)
    }
}

impl LnTuning {
    /// Of these norms.
    pub fn new(targets: Targets) -> Self {
        Self { targets }
    }
}

const WEIGHT: &str = "ln_tuning_layers.weight";
const BIAS: &str = "ln_tuning_layers.bias";

impl Method for LnTuning {
    type Adapter = LnTuningAdapter;
    type Shared = ();
    const NAME: &'static str = "LN_TUNING";
    const KINDS: &'static [Kind] = &[Kind::Norm];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn draws(&self) -> bool {
        false
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LnTuningAdapter, Error> {
        match TrainedCopy::of(site, Part::Whole, device) {
            Some(ln_tuning_layers) => Ok(LnTuningAdapter { ln_tuning_layers }),
            None => Err(Error::place(&site.path, "expected a norm with a scale, found none")),
        }
    }

    fn fold(adapter: &LnTuningAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let saved = Some(vec!["head".into()]);
        let saving = Targets { modules_to_save: saved, ..targets.clone() };
        vec![Self::new(saving), Self::new(targets.clone())]
    }

    fn parameters(&self, site: &Site) -> usize {
        site.fan_out() * if site.bias.is_some() { 2 } else { 1 }
    }

    fn tensors(&self, _site: &Site, adapter: &LnTuningAdapter) -> Vec<(&'static str, TensorData)> {
        let TrainedCopy { scale, bias, .. } = &adapter.ln_tuning_layers;
        let data = |name, param: &Param<Tensor<1>>| (name, param.val().into_data());
        let scale = scale.iter().map(|scale| data(WEIGHT, scale));
        scale.chain(bias.iter().map(|bias| data(BIAS, bias))).collect()
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LnTuningAdapter, Error> {
        let mut take = |name| Ok(Param::from_tensor(file.take(name, [site.fan_out()], device)?));
        let scale = Some(take(WEIGHT)?);
        let bias = site.bias.is_some().then(|| take(BIAS)).transpose()?;
        Ok(LnTuningAdapter { ln_tuning_layers: TrainedCopy { weight: None, scale, bias } })
    }
}
