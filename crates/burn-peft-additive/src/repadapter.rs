//! RepAdapter: a linear adapter before a layer, which merges into it (arXiv 2302.08106).

use crate::fields::{bounded, finite, positive};
use crate::numbers::Draw;
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, Scope, Site, Targets};
use serde::{Deserialize, Serialize};

/// RepAdapter (arXiv 2302.08106): `y = (x + s·U(x·D))·W + b`, `D [fan_in, r]` and `U` sparse: its `r` inputs
/// and `fan_in` outputs are cut into `groups`, each of which maps to its own.
///
/// `D ~ U(±√(6/(fan_in + r)))`, `U [groups, r/groups, fan_in/groups]` zero at first. Without the biases of the
/// paper's two layers. Parameters: `r·fan_in + r·fan_in/groups` a place. Folds: `Δ(W) = s·D·U·W`. HF PEFT does
/// not have it; the file holds `repadapter_down (r, fan_in)` and `repadapter_up`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RepAdapter {
    /// Width of the bottleneck, a multiple of `groups`; default 8.
    pub r: usize,
    /// Number of groups, a divisor of `fan_in`; default 2.
    pub groups: usize,
    /// `s`; default 1.
    pub scale: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for RepAdapter {
    fn default() -> Self {
        Self { r: 8, groups: 2, scale: 1.0, targets: Targets::default() }
    }
}

/// What RepAdapter trains at one place.
#[derive(Module, Debug)]
pub struct RepAdapterAdapter {
    /// `Dᵀ [r, fan_in]`.
    pub repadapter_down: Param<Tensor<2>>,
    /// `U [groups, r/groups, fan_in/groups]`.
    pub repadapter_up: Param<Tensor<3>>,
    /// `s`.
    pub scaling: f64,
}

impl RepAdapterAdapter {
    /// `s·U(h)` for the rows of `h [rows, r]`.
    fn up(&self, h: Tensor<2>) -> Tensor<2> {
        let up = self.repadapter_up.val();
        let ([rows, _], [groups, each, wide]) = (h.dims(), up.dims());
        let h = h.reshape([rows, groups, each]).swap_dims(0, 1); // [groups, rows, r/groups]
        h.matmul(up).swap_dims(0, 1).reshape([rows, groups * wide]) * self.scaling
    }
}

impl Adapter for RepAdapterAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let down = self.repadapter_down.val().transpose();
        let ([batch, seq, fan_in], [_, r]) = (x.dims(), down.dims());
        let wide = x.clone().cast(down.dtype());
        let h = linear(wide.clone(), down, None).reshape([batch * seq, r]);
        let moved = wide + self.up(h).reshape([batch, seq, fan_in]);
        Some(Scope::plain().linear(layer, moved.cast(x.dtype())))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for RepAdapterAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let down = self.repadapter_down.val().transpose(); // [fan_in, r]
        let dtype = down.dtype();
        Some(self.up(down).matmul(w.clone().cast(dtype)))
    }
}

impl RepAdapter {
    /// With this width and number of groups.
    pub fn new(r: usize, groups: usize, targets: Targets) -> Self {
        Self { r, groups, targets, ..Self::default() }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<RepAdapterAdapter, Error> {
        let (r, groups, fan_in) = (self.r, self.groups, site.fan_in());
        bounded("r", &site.path, [r, fan_in])?;
        if !fan_in.is_multiple_of(groups) {
            let path = &site.path;
            let reason =
                format!("expected a divisor of {fan_in}, the inputs of {path}, found {groups}");
            return Err(Error::config("groups", reason));
        }
        let down = Draw::Uniform((6.0 / (fan_in + r) as f32).sqrt());
        let up = [groups, r / groups, fan_in / groups];
        Ok(RepAdapterAdapter {
            repadapter_down: from.take("repadapter_down", [r, fan_in], down)?,
            repadapter_up: from.take("repadapter_up", up, Draw::Constant(0.0))?,
            scaling: self.scale,
        })
    }
}

impl Method for RepAdapter {
    type Adapter = RepAdapterAdapter;
    type Shared = ();
    const NAME: &'static str = "REPADAPTER";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const FASTER: &'static [&'static str] = &["repadapter_up"];

    by_source!(RepAdapterAdapter);

    fn check(&self) -> Result<(), Error> {
        positive("groups", self.groups)?;
        positive("r", self.r)?;
        finite("scale", self.scale)?;
        match self.r.is_multiple_of(self.groups) {
            true => Ok(()),
            false => {
                let (r, groups) = (self.r, self.groups);
                let reason = format!("expected a multiple of groups, {groups}, found {r}");
                Err(Error::config("r", reason))
            }
        }
    }

    fn fold(adapter: &RepAdapterAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 2, targets.clone());
        vec![
            Self { groups: 1, r: 3, ..plain.clone() },
            Self { groups: 4, scale: 0.5, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r * site.fan_in() + self.r * site.fan_in() / self.groups
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &RepAdapterAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        vec![
            ("repadapter_down", adapter.repadapter_down.val().into_data()),
            ("repadapter_up", adapter.repadapter_up.val().into_data()),
        ]
    }
}
