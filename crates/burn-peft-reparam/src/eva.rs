//! EVA: `A` begins at the main directions of a layer's inputs, and ranks go where they explain most (arXiv
//! 2410.07170).

use crate::init::{Pair, Place};
use crate::init_data::{Found, leading, numbers};
use burn::linalg::trace;
use burn_peft_core::{Error, Kind, Moments, Names, Site, Statistic, Targets, pattern_value};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Options of the init "eva" (arXiv 2410.07170): `A` is the first `r` main directions of the layer's inputs,
/// less their mean, and `B = 0`.
///
/// Names and defaults are HF PEFT's, whose incremental decomposition comes near to the exact one here. The
/// ranks of all places together stay as they are, and each goes to the direction that explains the largest
/// share of its inputs' variance. Places that are left without are not adapted. Embeddings begin as by the
/// init true.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaConfig {
    /// A place gets at most `rho·r` directions (and no more than its data have); default 2, at least 1,
    /// which leaves all ranks as they are.
    pub rho: f64,
    /// When HF PEFT has seen enough data; here the number of batches says that, so that only its default
    /// 0.99 is taken.
    pub tau: f64,
    /// Look only at positions from which a token is learnt (HF PEFT: that hold such a token); default
    /// true. Padding never counts.
    pub use_label_mask: bool,
    /// HF PEFT's mark of a position where nothing is learnt: -100.
    pub label_mask_value: i64,
    /// Divide each direction by the square root of its singular value; default false. (HF PEFT 0.21 does
    /// so once for each of the places that share an input.)
    pub whiten: bool,
    /// Let alphas follow the ranks, so that the scale of each place stays as it was; default true.
    pub adjust_scaling_factors: bool,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
        }
    }
}

impl EvaConfig {
    pub(crate) fn statistic(&self) -> Statistic {
        Statistic::Inputs { targets_only: self.use_label_mask, even: false }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::config("eva_config", reason));
        if !(self.rho.is_finite() && self.rho >= 1.0) {
            return refuse(format!("rho: expected a number of at least 1, found {}", self.rho));
        }
        match (0.0..=1.0).contains(&self.tau) {
            true => Ok(()),
            false => refuse(format!("tau: expected a number in [0, 1], found {}", self.tau)),
        }
    }

    /// The main directions of the inputs of a place of rank `r`, up to `rho·r` of them.
    pub(crate) fn find(&self, site: &Site, r: usize, inputs: &Moments) -> Result<Found, Error> {
        let default = Self::default();
        if self.tau != default.tau || self.label_mask_value != default.label_mask_value {
            let reason = "tau and label_mask_value cannot be chosen here; the number of batches says how \
                          much data is seen, and the training's own targets say where something is learnt";
            return Err(Error::config("eva_config", reason));
        }
        let most = ((r as f64 * self.rho).round_ties_even() as usize).min(site.fan_in());
        let total = numbers(trace(inputs.scatter.clone()));
        let (_, squares, directions) =
            leading(inputs.scatter.clone(), most, most.saturating_mul(2));
        let total = total.first().copied().unwrap_or(0.0).max(f32::MIN_POSITIVE);
        let shares: Vec<f32> = numbers(squares.clone()).iter().map(|size| size / total).collect();
        // Below, a share is rounding.
        let least = f32::EPSILON * site.fan_in() as f32;
        let given = shares.iter().take_while(|share| **share > least).count();
        let given = given.min(inputs.count - 1);
        if given < r {
            let (path, tokens) = (&site.path, inputs.count);
            let reason = format!(
                "is {r}, and the inputs of {path} have {given} directions over the {tokens} tokens of \
                 data; expected at most as many, or more data"
            );
            return Err(Error::config("r", reason));
        }
        let directions = directions.narrow(0, 0, given);
        let directions = match self.whiten {
            false => directions,
            true => {
                let roots = squares.narrow(0, 0, given).sqrt().sqrt(); // of the singular values
                directions / roots.unsqueeze_dim(1)
            }
        };
        Ok(Found::new(directions.transpose(), shares[..given].to_vec(), None))
    }
}

/// `A` the first `r` directions, `B = 0`.
pub(crate) fn factors(place: &Place<'_>, found: &Found) -> Pair {
    let a = found.left(place.device).narrow(1, 0, place.r);
    (a, place.zeros([place.r, place.site.fan_out()]))
}

/// The fields of a configuration that the data decide.
pub(crate) struct Shared<'a> {
    pub(crate) targets: &'a mut Targets,
    pub(crate) rank_pattern: &'a mut IndexMap<String, usize>,
    pub(crate) alpha_pattern: &'a mut IndexMap<String, f64>,
}

/// A place with its rank and alpha before the data were looked at.
pub(crate) struct Asked<'a> {
    pub(crate) site: &'a Site,
    pub(crate) r: usize,
    pub(crate) alpha: f64,
}

/// Gives the ranks of all linear places, taken together, to the directions of the largest shares; among
/// equal ones to the places that come first.
pub(crate) fn share_out(
    adjust: bool,
    asked: &[Asked<'_>],
    found: &BTreeMap<String, Found>,
    fields: Shared<'_>,
) -> Result<(), Error> {
    let mut ranks: Vec<usize> = asked.iter().map(|place| place.r).collect();
    let mut offers: Vec<(f32, usize)> = Vec::new();
    let mut budget = 0;
    for (index, place) in asked.iter().enumerate() {
        if let (Kind::Linear, Some(found)) = (place.site.kind, found.get(&place.site.path)) {
            offers.extend(found.sizes.iter().map(|share| (*share, index)));
            budget += place.r;
            ranks[index] = 0;
        }
    }
    offers.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    for (_, index) in offers.iter().take(budget) {
        ranks[*index] += 1;
    }
    if asked.iter().zip(&ranks).all(|(place, rank)| place.r == *rank) {
        return Ok(());
    }
    let mut decided: Vec<(&Asked<'_>, usize)> = asked.iter().zip(ranks).collect();
    if decided.iter().any(|(_, rank)| *rank == 0) {
        decided.retain(|(_, rank)| *rank > 0);
        let left = decided.iter().map(|(place, _)| place.site.path.as_str());
        fields.targets.target_modules = Some(left.collect::<Names>());
    }
    // A path is also the end of longer ones, and the first that matches wins.
    decided.sort_by_key(|(place, _)| std::cmp::Reverse(place.site.path.len()));
    fields.rank_pattern.clear();
    if adjust {
        fields.alpha_pattern.clear();
    }
    for (place, rank) in decided {
        let path = &place.site.path;
        fields.rank_pattern.insert(path.clone(), rank);
        if adjust {
            let alpha = place.alpha * (rank as f64 / place.r as f64);
            fields.alpha_pattern.insert(path.clone(), crate::common::fifteen_digits(alpha));
        }
        if pattern_value("rank_pattern", fields.rank_pattern, path)? != Some(rank) {
            let reason = "its path, read as a pattern, matches another place before it";
            return Err(Error::place(path, reason));
        }
    }
    Ok(())
}
