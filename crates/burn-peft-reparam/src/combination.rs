//! What a combination of adapters is called, and what it is made of.

use crate::common::positive;
use crate::merging::{Arithmetic, MajoritySign, Prune};
use burn_peft_core::Error;
use std::fmt;
use std::str::FromStr;

/// A rule to combine adapters, by HF PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The weighted sum of the differences.
    Linear,
    /// The same, without loss: the factors beside each other, at the sum of the ranks.
    Cat,
    /// The same as `Linear`.
    Svd,
    /// TIES (arXiv 2306.01708): small numbers go, and the mean is over those of the elected sign.
    Ties,
    /// The same as `Ties`.
    TiesSvd,
    /// DARE (arXiv 2311.03099): drawn numbers go, the others grow for them.
    DareLinear,
    /// The same as `DareLinear`.
    DareLinearSvd,
    /// DARE's drawing with the mean and the elected sign of TIES.
    DareTies,
    /// The same as `DareTies`.
    DareTiesSvd,
    /// Small numbers go, and the rest is summed.
    MagnitudePrune,
    /// The same as `MagnitudePrune`.
    MagnitudePruneSvd,
}

/// HF PEFT's names.
const NAMES: &[(&str, Rule)] = &[
    ("linear", Rule::Linear),
    ("cat", Rule::Cat),
    ("svd", Rule::Svd),
    ("ties", Rule::Ties),
    ("ties_svd", Rule::TiesSvd),
    ("dare_linear", Rule::DareLinear),
    ("dare_linear_svd", Rule::DareLinearSvd),
    ("dare_ties", Rule::DareTies),
    ("dare_ties_svd", Rule::DareTiesSvd),
    ("magnitude_prune", Rule::MagnitudePrune),
    ("magnitude_prune_svd", Rule::MagnitudePruneSvd),
];

/// What stands before the name of HF PEFT's own arithmetic.
const BY_HF: &str = "hf_";

impl Rule {
    /// What is done to the numbers; none where factors are laid beside each other.
    pub(crate) fn arithmetic(self) -> Option<Arithmetic> {
        let (prune, elect) = match self {
            Self::Cat => return None,
            Self::Linear | Self::Svd => (Prune::Nothing, false),
            Self::Ties | Self::TiesSvd => (Prune::Smallest, true),
            Self::DareLinear | Self::DareLinearSvd => (Prune::Random, false),
            Self::DareTies | Self::DareTiesSvd => (Prune::Random, true),
            Self::MagnitudePrune | Self::MagnitudePruneSvd => (Prune::Smallest, false),
        };
        Some(Arithmetic { prune, elect })
    }

    /// Whether HF PEFT, too, works on the differences and not on the factors.
    fn is_of_svd_family(self) -> bool {
        matches!(
            self,
            Self::Svd
                | Self::TiesSvd
                | Self::DareLinearSvd
                | Self::DareTiesSvd
                | Self::MagnitudePruneSvd
        )
    }
}

/// A rule in this library's reading of it, or in HF PEFT's.
///
/// By its plain name a rule works on the differences `sᵢ·Aᵢ·Bᵢ` as matrices, and the result is cut to a
/// rank by its singular value decomposition; "cat" alone works on factors, because that loses nothing.
/// So "linear" and "svd" are one rule, "ties" and "ties_svd" another, and so on.
///
/// With `hf_` before the name it is the arithmetic of `add_weighted_adapter` in HF PEFT 0.21, where it
/// differs:
///
/// * "hf_linear", "hf_ties", "hf_dare_linear", "hf_dare_ties" and "hf_magnitude_prune" work on `A` and `B`
///   by themselves, weighted by `±√|wᵢ·sᵢ|` and `√|wᵢ·sᵢ|`. The product of the two results has the cross
///   terms `Aᵢ·Bⱼ`, which no adapter trained.
/// * Every rule, if the first adapter is an rsLoRA: the result is one, too, at an alpha of `r`, and so
///   comes out `√r` times as large.
/// * Every rule, for a single adapter: what is computed is "hf_linear".
///
/// The differences of the svd family hold their scale `sᵢ` once, in HF PEFT 0.21 as here
/// (`get_delta_weight` brings it; older releases multiplied by it again).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Combination {
    /// The rule.
    pub rule: Rule,
    /// Whether it is HF PEFT's arithmetic to the letter.
    pub by_hf: bool,
}

impl Combination {
    /// Every name that there is.
    pub fn names() -> Vec<String> {
        let plain = NAMES.iter().map(|(name, _)| (*name).to_owned());
        plain.chain(NAMES.iter().map(|(name, _)| format!("{BY_HF}{name}"))).collect()
    }

    /// What is computed for so many adapters.
    pub(crate) fn rule_for(self, adapters: usize) -> Rule {
        match self.by_hf && adapters == 1 {
            true => Rule::Linear,
            false => self.rule,
        }
    }

    /// Whether the factors are merged by themselves.
    pub(crate) fn on_factors(self, adapters: usize) -> bool {
        let rule = self.rule_for(adapters);
        self.by_hf && rule != Rule::Cat && !rule.is_of_svd_family()
    }
}

impl FromStr for Combination {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let (by_hf, rule) = match name.strip_prefix(BY_HF) {
            Some(rule) => (true, rule),
            None => (false, name),
        };
        match NAMES.iter().find(|(known, _)| *known == rule) {
            Some((_, rule)) => Ok(Self { rule: *rule, by_hf }),
            None => Err(format!("expected one of {}, found {name}", Self::names().join(", "))),
        }
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, rule)| *rule == self.rule).map_or("", |(name, _)| name);
        write!(f, "{}{name}", if self.by_hf { BY_HF } else { "" })
    }
}

/// How LoRAs are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Combine {
    /// By which rule.
    pub combination: Combination,
    /// Rank of the result, for rules that cut it; default: the largest of the adapters'.
    pub svd_rank: Option<usize>,
    /// Share of the numbers that is kept, in (0, 1], for rules that prune: they need it.
    pub density: Option<f64>,
    /// How signs are elected, for TIES and its kin; default: by the sum.
    pub majority_sign_method: Option<MajoritySign>,
    /// Seed of DARE's draws: those of PyTorch's `manual_seed`, place by place in the model's order.
    pub seed: u64,
}

impl Combine {
    /// By this rule, with HF PEFT's defaults for the rest.
    pub fn new(combination: Combination) -> Self {
        Self { combination, svd_rank: None, density: None, majority_sign_method: None, seed: 0 }
    }

    /// Refuses what is missing, and what would be given in vain.
    pub(crate) fn check(&self, adapters: usize) -> Result<(), Error> {
        let rule = self.combination.rule_for(adapters);
        let arithmetic = rule.arithmetic();
        let prunes = arithmetic.is_some_and(|of| of.prune != Prune::Nothing);
        let only_for = |field: &str, what: &str| {
            let reason = format!("is for rules that {what}, and {} does not", self.combination);
            Err(Error::config(field, reason))
        };
        match self.density {
            None if prunes => {
                let reason = format!(
                    "{} needs the share of numbers to keep; expected more than 0 and at most 1",
                    self.combination
                );
                return Err(Error::config("density", reason));
            }
            Some(_) if !prunes => return only_for("density", "prune"),
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                let reason = format!("expected more than 0 and at most 1, found {density}");
                return Err(Error::config("density", reason));
            }
            _ => {}
        }
        if self.majority_sign_method.is_some() && !arithmetic.is_some_and(|of| of.elect) {
            return only_for("majority_sign_method", "elect signs");
        }
        match self.svd_rank {
            Some(_) if rule == Rule::Cat || self.combination.on_factors(adapters) => {
                only_for("svd_rank", "cut the result to a rank")
            }
            rank => positive("svd_rank", rank.unwrap_or(1)),
        }
    }
}
