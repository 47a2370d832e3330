//! (IA)³: outputs or inputs of a layer rescaled (arXiv 2205.05638).

use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::nn::conv::Conv2d;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Fold, Kind, Method, Names, Scope, Site, Sites, Strictness, Targets,
};
use serde::{Deserialize, Serialize};

/// (IA)³ (arXiv 2205.05638): `y = (xW + b) ⊙ l`, and `y = (x ⊙ l)W + b` at `feedforward_modules`.
///
/// `l [fan_out]` (or `[fan_in]`) begins as 1. At a convolution there is one number a channel; inputs of a
/// grouped one are scaled by their place in the group. The paper scales keys, values and the inputs of the
/// second layer of each feed-forward part. Parameters: `fan_out` (or `fan_in`) a place. Folds:
/// `Δ(W) = W ⊙ (l - 1)` over columns (or rows), `Δ(b) = b ⊙ (l - 1)` (or 0). Names and defaults are HF PEFT's,
/// but for `feedforward_modules`: HF PEFT chooses by the model what is not set, here it is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3 {
    /// Those of the adapted layers whose input is scaled in place of their output: ends of paths, or a
    /// regular expression for whole ones.
    #[serde(deserialize_with = "names")]
    pub feedforward_modules: Names,
    /// Begin as an identity, the default; otherwise with `l ~ N(0, 1)`.
    pub init_ia3_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

/// `null` is none.
fn names<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Names, D::Error> {
    let names: Option<Names> = Deserialize::deserialize(from)?;
    Ok(names.unwrap_or_else(|| Names::List(Vec::new())))
}

impl Default for Ia3 {
    fn default() -> Self {
        Self {
            feedforward_modules: Names::List(Vec::new()),
            init_ia3_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What (IA)³ trains at one place.
#[derive(Module, Debug)]
pub struct Ia3Adapter {
    /// `l`.
    pub ia3_l: Param<Tensor<1>>,
    /// Whether the input is scaled and not the output.
    pub feedforward: bool,
}

impl Adapter for Ia3Adapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        if self.feedforward {
            return self.linear_whole(layer, x).map(|whole| whole - y.clone());
        }
        let l = self.ia3_l.val();
        Some((y.clone().cast(l.dtype()) * (l - 1.0).unsqueeze()).cast(y.dtype()))
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let l = self.ia3_l.val();
        let scaled = || (x.clone().cast(l.dtype()) * l.clone().unsqueeze()).cast(x.dtype());
        self.feedforward.then(|| Scope::plain().linear(layer, scaled()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        let l = self.ia3_l.val();
        let scaled = |t: &Tensor<4>, l: Tensor<1>| {
            let (channels, dtype) = (l.dims()[0], l.dtype());
            (t.clone().cast(dtype) * l.reshape([1, channels, 1, 1])).cast(t.dtype())
        };
        if !self.feedforward {
            return Some(scaled(y, l - 1.0));
        }
        let groups = x.dims()[1] / l.dims()[0].max(1);
        Some(layer.forward(scaled(x, l.repeat_dim(0, groups))) - y.clone())
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for Ia3Adapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let change = self.ia3_l.val() - 1.0;
        let [rows, _] = w.dims();
        let w = w.clone().cast(change.dtype());
        if !self.feedforward {
            return Some(w * change.unsqueeze());
        }
        // Each channel has as many rows as the kernel has numbers.
        let channels = change.dims()[0];
        let rows = [channels, rows / channels.max(1)];
        let change: Tensor<2> = change.reshape([channels, 1]).expand(rows);
        Some(w * change.reshape([rows[0] * rows[1], 1]))
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        let change = self.ia3_l.val() - 1.0;
        (!self.feedforward).then(|| b.clone().cast(change.dtype()) * change)
    }
}

impl Ia3 {
    /// With these targets, of which `feedforward_modules` are scaled at their input.
    pub fn new(targets: Targets, feedforward_modules: impl IntoIterator<Item = String>) -> Self {
        let feedforward_modules = feedforward_modules.into_iter().collect();
        Self { feedforward_modules, targets, ..Self::default() }
    }

    /// HF PEFT compares the ends of paths as text, without asking for a dot before them.
    fn is_feedforward(&self, site: &Site) -> Result<bool, Error> {
        let path = &site.path;
        match &self.feedforward_modules {
            Names::List(ends) => Ok(ends.iter().any(|end| path.ends_with(end.as_str()))),
            Names::Pattern(pattern) => {
                let sites = Sites { all: vec![site.clone()], ..Sites::default() };
                let targets = Targets {
                    target_modules: Some(Names::Pattern(pattern.clone())),
                    ..Targets::default()
                };
                match targets.select(&sites, Self::KINDS, Strictness::Any) {
                    Ok(found) => Ok(!found.is_empty()),
                    Err(Error::NoMatch { .. }) => Ok(false),
                    Err(Error::Config { reason, .. }) => {
                        Err(Error::config("feedforward_modules", reason))
                    }
                    Err(other) => Err(other),
                }
            }
        }
    }

    /// Shape of `l` in HF PEFT's file.
    fn size(&self, site: &Site) -> Result<(usize, bool), Error> {
        let feedforward = self.is_feedforward(site)?;
        let channels = match (site.weight.shape().as_slice(), feedforward) {
            ([_, fan_in, _, _], true) => *fan_in,
            (_, true) => site.fan_in(),
            (_, false) => site.fan_out(),
        };
        Ok((channels, feedforward))
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<Ia3Adapter, Error> {
        let (l, feedforward) = self.size(site)?;
        let draw = if self.init_ia3_weights { Draw::Constant(1.0) } else { Draw::Normal(0.0, 1.0) };
        let ia3_l = match (site.kind, feedforward) {
            (Kind::Conv2d, _) => flat(&from.take("ia3_l", [1, l, 1, 1], draw)?),
            (_, true) => flat(&from.take("ia3_l", [1, l], draw)?),
            (_, false) => flat(&from.take("ia3_l", [l, 1], draw)?),
        };
        Ok(Ia3Adapter { ia3_l, feedforward })
    }
}

/// The same numbers along one axis, as a leaf.
fn flat<const D: usize>(l: &Param<Tensor<D>>) -> Param<Tensor<1>> {
    let numbers: Tensor<1> = l.val().flatten(0, D - 1);
    Param::from_tensor(Tensor::from_data(numbers.into_data(), &l.device()))
}

impl Method for Ia3 {
    type Adapter = Ia3Adapter;
    type Shared = ();
    const NAME: &'static str = "IA3";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    by_source!(Ia3Adapter);

    fn check(&self) -> Result<(), Error> {
        let (Names::List(inputs), Some(Names::List(all))) =
            (&self.feedforward_modules, &self.targets.target_modules)
        else {
            return Ok(());
        };
        match inputs.iter().find(|name| !all.contains(name)) {
            None => Ok(()),
            Some(name) => {
                let reason = format!("expected names of target_modules, found `{name}`");
                Err(Error::config("feedforward_modules", reason))
            }
        }
    }

    fn draws(&self) -> bool {
        !self.init_ia3_weights
    }

    fn starts_as_identity(&self) -> bool {
        self.init_ia3_weights
    }

    fn fold(adapter: &Ia3Adapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        let all = match &targets.target_modules {
            Some(Names::List(names)) => names.clone(),
            _ => Vec::new(),
        };
        vec![
            Self { feedforward_modules: Names::List(all), ..plain.clone() },
            Self { feedforward_modules: "(query|image)".into(), ..plain.clone() },
            Self { init_ia3_weights: false, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.size(site).map_or(0, |(l, _)| l)
    }

    fn tensors(&self, site: &Site, adapter: &Ia3Adapter) -> Vec<(&'static str, TensorData)> {
        let l = adapter.ia3_l.val();
        let size = l.dims()[0];
        let data = match (site.kind, adapter.feedforward) {
            (Kind::Conv2d, _) => l.reshape([1, size, 1, 1]).into_data(),
            (_, true) => l.reshape([1, size]).into_data(),
            (_, false) => l.reshape([size, 1]).into_data(),
        };
        vec![("ia3_l", data)]
    }
}
