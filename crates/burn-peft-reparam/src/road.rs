//! RoAd: pairs of outputs rotated and scaled (arXiv 2409.00119).

use crate::random::normal;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// 2D rotary adaptation (arXiv 2409.00119): the outputs, bias and all, are cut into pairs `(a, b)`, each
/// rotated and scaled: `a' = α·cosθ·a - α·sinθ·b`, `b' = α·sinθ·a + α·cosθ·b`.
///
/// Within each group of `group_size` outputs the first half pairs with the second. θ = 0 and α = 1 at the
/// start. Parameters: `θ` and `α`, each `fan_out/2` (road_1), `fan_out` (road_2) or `2·fan_out` (road_4) a
/// place. Folds: weight and bias are rotated as the outputs are. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Road {
    /// How many of the four entries of a rotation are their own; default road_1.
    pub variant: Variant,
    /// Outputs whose first half pairs with the second, even, a divisor of `fan_out`; default 64.
    pub group_size: usize,
    /// θ = 0 and α = 1 at the start; `false` draws θ from `N(0, 0.5²)` and α from `N(1, 0.5²)`. Default true.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Road {
    fn default() -> Self {
        Self {
            variant: Variant::Road1,
            group_size: 64,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// How many θ and α a pair has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Variant {
    /// One for the pair: a rotation and its scale.
    #[default]
    #[serde(rename = "road_1")]
    Road1,
    /// One for each of the two outputs.
    #[serde(rename = "road_2")]
    Road2,
    /// One for each of the four entries of the matrix.
    #[serde(rename = "road_4")]
    Road4,
}

/// What RoAd trains at one place.
#[derive(Module, Debug)]
pub struct RoadAdapter {
    /// θ, as many as the variant has.
    pub road_theta: Param<Tensor<1>>,
    /// α, as many.
    pub road_alpha: Param<Tensor<1>>,
    /// Outputs whose first half pairs with the second.
    pub group_size: usize,
    /// Which output has which θ and α.
    #[module(skip)]
    pub variant: Variant,
}

impl RoadAdapter {
    /// What each output counts itself with and its partner with: `α·cosθ`, `α·sinθ`, each `[fan_out]`.
    fn columns(&self) -> (Tensor<1>, Tensor<1>) {
        let (theta, alpha, half) =
            (self.road_theta.val(), self.road_alpha.val(), self.group_size / 2);
        match self.variant {
            Variant::Road1 => {
                // [groups, 1, half]: both halves of a group have the same.
                let both = |v: Tensor<1>| {
                    let groups = v.dims()[0] / half;
                    v.reshape([groups, 1, half]).repeat_dim(1, 2).reshape([groups * 2 * half])
                };
                let (theta, alpha) = (both(theta), both(alpha));
                (alpha.clone() * theta.clone().cos(), alpha * theta.sin())
            }
            Variant::Road2 => (alpha.clone() * theta.clone().cos(), alpha * theta.sin()),
            Variant::Road4 => {
                // [groups, 2, group]: the first row counts the outputs, the second their partners.
                let row = |v: &Tensor<1>, row: usize| {
                    let groups = v.dims()[0] / (4 * half);
                    let rows = v.clone().reshape([groups, 2, 2 * half]);
                    rows.narrow(1, row, 1).reshape([groups * 2 * half])
                };
                (row(&alpha, 0) * row(&theta, 0).cos(), row(&alpha, 1) * row(&theta, 1).sin())
            }
        }
    }

    /// `R·v - v` for each `v` in the rows of `[.., fan_out]`.
    fn turn<const D: usize>(&self, y: &Tensor<D>) -> Tensor<D> {
        let (own, partner) = self.columns();
        let (shape, half) = (y.dims(), self.group_size / 2);
        let v = y.clone().cast(own.dtype());
        let pairs = v.clone().reshape([shape.iter().product::<usize>() / (2 * half), 2, half]);
        let (a, b) = (pairs.clone().narrow(1, 0, 1), pairs.narrow(1, 1, 1));
        let crossed = Tensor::cat(vec![-b, a], 1).reshape(shape);
        (v * (own - 1.0).unsqueeze() + crossed * partner.unsqueeze()).cast(y.dtype())
    }
}

impl Adapter for RoadAdapter {
    fn linear(&self, _layer: &Linear, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        Some(self.turn(y))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for RoadAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.turn(w))
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        Some(self.turn(b))
    }
}

impl Road {
    /// With this variant, group size and targets, and HF PEFT's defaults for the rest.
    pub fn new(variant: Variant, group_size: usize, targets: Targets) -> Self {
        Self { variant, group_size, targets, ..Self::default() }
    }

    /// Numbers of θ at a place, and of α.
    fn size(&self, site: &Site) -> Result<usize, Error> {
        let out = site.fan_out();
        if !out.is_multiple_of(self.group_size) {
            let reason = format!(
                "expected a divisor of the {out} outputs of {}, found {}",
                site.path, self.group_size
            );
            return Err(Error::config("group_size", reason));
        }
        Ok(match self.variant {
            Variant::Road1 => out / 2,
            Variant::Road2 => out,
            Variant::Road4 => out * 2,
        })
    }

    fn adapter(&self, theta: Tensor<1>, alpha: Tensor<1>) -> RoadAdapter {
        RoadAdapter {
            road_theta: Param::from_tensor(theta),
            road_alpha: Param::from_tensor(alpha),
            group_size: self.group_size,
            variant: self.variant,
        }
    }
}

impl Method for Road {
    type Adapter = RoadAdapter;
    type Shared = ();
    const NAME: &'static str = "ROAD";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        match self.group_size {
            size if size > 0 && size.is_multiple_of(2) => Ok(()),
            size => {
                let reason = format!("expected an even number of 2 or more, found {size}");
                Err(Error::config("group_size", reason))
            }
        }
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<RoadAdapter, Error> {
        let size = [self.size(site)?];
        Ok(match self.init_weights {
            true => self.adapter(Tensor::zeros(size, device), Tensor::ones(size, device)),
            false => {
                let theta = normal(size, 0.5, rng, device);
                self.adapter(theta, normal(size, 0.5, rng, device) + 1.0)
            }
        })
    }

    fn fold(adapter: &RoadAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(Variant::Road1, 4, targets.clone());
        vec![
            Self { init_weights: false, ..plain.clone() },
            Self { variant: Variant::Road2, group_size: 8, ..plain.clone() },
            Self { variant: Variant::Road4, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.size(site).map_or(0, |size| 2 * size)
    }

    fn tensors(&self, _site: &Site, adapter: &RoadAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("road_theta", adapter.road_theta.val().into_data()),
            ("road_alpha", adapter.road_alpha.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<RoadAdapter, Error> {
        let size = [self.size(site)?];
        let theta = file.take("road_theta", size, device)?;
        Ok(self.adapter(theta, file.take("road_alpha", size, device)?))
    }
}
