//! ReFT: low-rank interventions on hidden states at some positions (arXiv 2404.03592).

use crate::fields::{bounded, positive, probability};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::{Draw, dropped};
use crate::source::{Source, by_source};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Hidden, Kind, Method, Site, Targets};
use serde::{Deserialize, Serialize};

/// Representation fine-tuning (arXiv 2404.03592): `h' = h + (f(h·W + b) - h·Rᵀ)·R` at the first and last tokens of
/// each row, `R [r, hidden]`, `W [hidden, r]`; padding does not count.
///
/// The first tokens and the last ones have matrices of their own (`tied_weights`); where a row is too short for both, the
/// last count. LoReFT ([`loreft`](Self::loreft)) keeps the rows of `R` orthonormal: those that are stored, made so one after
/// the other (Gram and Schmidt) at each reading. NoReFT does not, and DiReFT leaves `- h·Rᵀ` out too. The paper lays
/// it over blocks. Generation intervenes on the prompt alone. Parameters: `2·r·hidden + r` a place, for the first
/// and for the last tokens. It does not fold. Fields and defaults are those of AdapterHub's `ReftConfig`; the file holds
/// `projection.weight (r, hidden)`, `learned_source.weight (r, hidden)` and `learned_source.bias`, each after `units.0.` for
/// the first tokens and `units.1.` for the last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reft {
    /// Rank of the intervention; default 1.
    pub r: usize,
    /// Number of tokens at the beginning of a row; default 3.
    pub prefix_positions: usize,
    /// Number of tokens at the end of a row; default 0.
    pub suffix_positions: usize,
    /// Keep the rows of `R` orthonormal; default true.
    pub orthogonality: bool,
    /// Take `h·Rᵀ` off; default true.
    pub subtract_projection: bool,
    /// The last tokens have the matrices of the first; default false.
    pub tied_weights: bool,
    /// `f`; default none.
    pub non_linearity: Option<Nonlinearity>,
    /// Probability with which a number of `h'` is zeroed in training; default 0.05.
    pub dropout: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Reft {
    fn default() -> Self {
        Self {
            r: 1,
            prefix_positions: 3,
            suffix_positions: 0,
            orthogonality: true,
            subtract_projection: true,
            tied_weights: false,
            non_linearity: None,
            dropout: 0.05,
            targets: Targets::default(),
        }
    }
}

/// What ReFT trains for some positions of a place.
#[derive(Module, Debug)]
pub struct ReftUnit {
    /// `R [r, hidden]`, before its rows are made orthonormal.
    pub projection: Param<Tensor<2>>,
    /// `Wᵀ [r, hidden]`.
    pub learned_source: Param<Tensor<2>>,
    /// `b [r]`.
    pub learned_bias: Param<Tensor<1>>,
}

/// What ReFT trains at one place.
#[derive(Module, Debug)]
pub struct ReftAdapter {
    /// For the first tokens, or for all where that is asked for.
    pub first: Option<ReftUnit>,
    /// For the last tokens.
    pub last: Option<ReftUnit>,
    /// What was asked for.
    #[module(skip)]
    pub how: Reft,
}

/// The rows made orthonormal one after the other.
fn orthonormal(rows: &Tensor<2>) -> Tensor<2> {
    let [r, _] = rows.dims();
    let mut done: Vec<Tensor<2>> = Vec::with_capacity(r);
    for row in 0..r {
        let mut v = rows.clone().narrow(0, row, 1); // [1, hidden]
        for q in &done {
            let along = (v.clone() * q.clone()).sum_dim(1);
            v = v - q.clone() * along;
        }
        let length = v.clone().square().sum_dim(1).sqrt();
        done.push(v / length);
    }
    Tensor::cat(done, 0)
}

/// 1 at the first tokens and at the last, each `[batch, seq, 1]`; `None` in a pass after the prompt's.
fn positions(how: &Reft, at: &Hidden<'_>) -> Option<[Tensor<3>; 2]> {
    let [batch, seq, _] = at.y.dims();
    let kept: Tensor<2> = match &at.tokens {
        Some(tokens) if tokens.past > 0 => return None,
        Some(tokens) => tokens.kept.clone().float(),
        None => Tensor::ones([batch, seq], &at.y.device().inner()),
    };
    let seen = kept.clone().cumsum(1); // tokens up to this one
    let left = kept.clone().sum_dim(1) - seen.clone(); // tokens after it
    let last = left.lower_elem(how.suffix_positions as f32).float() * kept.clone();
    let first = seen.lower_equal_elem(how.prefix_positions as f32).float() * kept;
    let first = first.clone() - first * last.clone();
    Some([first, last].map(|mask| mask.reshape([batch, seq, 1])))
}

impl ReftUnit {
    /// `(f(h·W + b) - h·Rᵀ)·R`.
    fn change(&self, h: &Tensor<3>, how: &Reft) -> Tensor<3> {
        let rows = self.projection.val();
        let rotation = if how.orthogonality { orthonormal(&rows) } else { rows };
        let source = self.learned_source.val().transpose();
        let z = linear(h.clone(), source, Some(self.learned_bias.val())); // [batch, seq, r]
        let z = how.non_linearity.map_or(z.clone(), |f| f.apply(z));
        let z = match how.subtract_projection {
            true => z - linear(h.clone(), rotation.clone().transpose(), None),
            false => z,
        };
        linear(z, rotation, None)
    }
}

impl Adapter for ReftAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let [first, last] = positions(&self.how, at)?;
        let masks = match self.how.tied_weights {
            true => vec![first + last],
            false => vec![first, last],
        };
        let mut sum: Option<Tensor<3>> = None;
        for (unit, mask) in [&self.first, &self.last].into_iter().zip(masks) {
            let Some(unit) = unit else { continue };
            let trained = unit.projection.val();
            let h = at.y.clone().cast(trained.dtype());
            let moved = h.clone() + unit.change(&h, &self.how);
            let shape = h.dims();
            let moved = dropped(moved, self.how.dropout, shape, &trained) - h;
            let change = moved * mask.cast(trained.dtype());
            sum = Some(match sum {
                Some(sum) => sum + change,
                None => change,
            });
        }
        sum.map(|change| change.cast(at.y.dtype()))
    }
}

/// Names of a unit's tensors: of the first tokens, of the last.
const NAMES: [[&str; 3]; 2] = [
    ["units.0.projection.weight", "units.0.learned_source.weight", "units.0.learned_source.bias"],
    ["units.1.projection.weight", "units.1.learned_source.weight", "units.1.learned_source.bias"],
];

impl Reft {
    /// LoReFT of this rank.
    pub fn loreft(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    /// LoReFT without orthonormal rows.
    pub fn noreft(r: usize, targets: Targets) -> Self {
        Self { orthogonality: false, ..Self::loreft(r, targets) }
    }

    /// NoReFT that takes nothing off.
    pub fn direft(r: usize, targets: Targets) -> Self {
        Self { subtract_projection: false, ..Self::noreft(r, targets) }
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<ReftAdapter, Error> {
        let (r, hidden) = (self.r, site.fan_out());
        bounded("r", &site.path, [r, hidden])?;
        if self.orthogonality && r > hidden {
            let path = &site.path;
            let reason = format!(
                "expected at most {hidden}, the states of {path}, of which no more are orthogonal; found {r}"
            );
            return Err(Error::config("r", reason));
        }
        let bound = (1.0 / hidden as f32).sqrt();
        let mut unit = |[projection, source, bias]: [&'static str; 3]| -> Result<ReftUnit, Error> {
            Ok(ReftUnit {
                projection: from.take(projection, [r, hidden], Draw::Normal(0.0, bound))?,
                learned_source: from.take(source, [r, hidden], Draw::Uniform(bound))?,
                learned_bias: from.take(bias, [r], Draw::Uniform(bound))?,
            })
        };
        let [first, last] = self.units();
        Ok(ReftAdapter {
            first: first.then(|| unit(NAMES[0])).transpose()?,
            last: last.then(|| unit(NAMES[1])).transpose()?,
            how: self.clone(),
        })
    }

    /// Whether there are matrices for the first tokens, and other ones for the last.
    fn units(&self) -> [bool; 2] {
        match self.tied_weights {
            true => [true, false],
            false => [self.prefix_positions > 0, self.suffix_positions > 0],
        }
    }
}

impl Method for Reft {
    type Adapter = ReftAdapter;
    type Shared = ();
    const NAME: &'static str = "REFT";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    by_source!(ReftAdapter);

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        if self.prefix_positions == 0 && self.suffix_positions == 0 {
            let reason = "is 0, and suffix_positions too; expected a token to intervene on";
            return Err(Error::config("prefix_positions", reason));
        }
        probability("dropout", self.dropout)
    }

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let to = || targets.clone();
        let tanh = Some(Nonlinearity::Tanh);
        vec![
            Self { suffix_positions: 1, prefix_positions: 1, ..Self::loreft(3, to()) },
            Self { suffix_positions: 1, tied_weights: true, ..Self::loreft(2, to()) },
            Self { dropout: 0.0, non_linearity: tanh, ..Self::noreft(2, to()) },
            Self { prefix_positions: 0, suffix_positions: 2, ..Self::direft(2, to()) },
            Self::loreft(2, to()),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let units = self.units().into_iter().filter(|there| *there).count();
        units * (2 * self.r * site.fan_out() + self.r)
    }

    fn tensors(&self, _site: &Site, adapter: &ReftAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (unit, [projection, source, bias]) in
            [&adapter.first, &adapter.last].into_iter().zip(NAMES)
        {
            let Some(unit) = unit else { continue };
            tensors.push((projection, unit.projection.val().into_data()));
            tensors.push((source, unit.learned_source.val().into_data()));
            tensors.push((bias, unit.learned_bias.val().into_data()));
        }
        tensors
    }
}
