//! Any difference of weights as a plain LoRA: `Δ(W)` of each place, cut to its largest directions.

use crate::common::positive;
use crate::init::{Pair, decomposed, first};
use crate::lora::{Lora, LoraAdapter};
use crate::plain::{Piece, Plain, bias_copy, is_whole, plain_copy};
use burn::tensor::{DType, Tensor};
use burn_peft_core::{Adapters, Error, Folds, Site, Sites, TrainedCopy, Value};
use std::collections::BTreeSet;
use std::fmt;

/// At which rank a difference is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// At this one, or at the number of the place's directions where that is less.
    At(usize),
    /// At the smallest one that keeps `share`, in (0, 1], of the sum of the squared singular values,
    /// place by place. Values below rounding, `max(fan_in, fan_out)·ε` of the largest, do not count.
    Energy {
        /// What is kept.
        share: f64,
        /// No rank is larger than this.
        most: Option<usize>,
    },
}

impl Rank {
    fn check(self) -> Result<(), Error> {
        match self {
            Self::At(r) => positive("r", r),
            Self::Energy { share, .. } if !(share > 0.0 && share <= 1.0) => {
                let reason = format!("expected more than 0 and at most 1, found {share}");
                Err(Error::config("energy", reason))
            }
            Self::Energy { most, .. } => positive("max_rank", most.unwrap_or(1)),
        }
    }

    /// For these singular values, falling, of a matrix whose longer side is `side`; at least 1.
    fn of(self, values: &[f64], side: usize) -> usize {
        let rank = match self {
            Self::At(r) => r,
            Self::Energy { share, most } => {
                let floor = values.first().unwrap_or(&0.0) * side as f64 * f64::from(f32::EPSILON);
                let energies: Vec<f64> =
                    values.iter().filter(|&&v| v > floor).map(|v| v * v).collect();
                let asked = share * energies.iter().sum::<f64>();
                let mut kept = 0.0;
                let enough = energies.iter().position(|energy| {
                    kept += energy;
                    kept >= asked
                });
                let rank = enough.map_or(energies.len(), |at| at + 1);
                rank.min(most.unwrap_or(usize::MAX))
            }
        };
        rank.clamp(1, values.len().max(1))
    }
}

/// How well a product of rank `r` stands for the difference at one place.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The place.
    pub path: String,
    /// `r`.
    pub rank: usize,
    /// `‖Δ‖`, the root of the sum of the squares.
    pub norm: f64,
    /// `‖Δ - A·B‖`.
    pub residual: f64,
}

impl Fit {
    /// `‖Δ - A·B‖ / ‖Δ‖`, and 0 where nothing changes.
    pub fn error(&self) -> f64 {
        relative(self.residual, self.norm)
    }
}

fn relative(residual: f64, norm: f64) -> f64 {
    if norm > 0.0 { residual / norm } else { residual }
}

/// How well a LoRA stands for the differences that it was made of, place by place in the model's order.
///
/// Shown as a table of ranks and errors, the total last.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fits(pub Vec<Fit>);

impl Fits {
    /// `√(Σ‖Δ - A·B‖² / Σ‖Δ‖²)` over all places.
    pub fn error(&self) -> f64 {
        let sum = |of: fn(&Fit) -> f64| self.0.iter().map(|fit| of(fit).powi(2)).sum::<f64>();
        relative(sum(|fit| fit.residual).sqrt(), sum(|fit| fit.norm).sqrt())
    }
}

impl fmt::Display for Fits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|fit| fit.path.len()).max().unwrap_or(0);
        for fit in &self.0 {
            writeln!(f, "  {:width$}  rank {:>4}  error {:.2e}", fit.path, fit.rank, fit.error())?;
        }
        writeln!(f, "error {:.2e} of the whole difference", self.error())
    }
}

/// A LoRA that was made of other adapters.
#[derive(Debug, Clone)]
pub struct Converted {
    /// Its configuration, which names exactly the places and ranks that there are.
    pub method: Lora,
    /// Its adapters, on the base's device and without gradients; `fork` brings them to another.
    pub adapters: Adapters<LoraAdapter>,
    /// What was lost. Empty where the factors were made without cutting anything.
    pub fits: Fits,
}

/// Any adapters that fold into parameters as a plain LoRA, `Δ(W) ≈ A·B` with `s = 1`: the best
/// approximation of each place's difference at its rank, by its singular value decomposition (Eckart and
/// Young). `sites` are those of the base model, because `Δ` may depend on `W`.
///
/// Places of other ranks than the largest are in `rank_pattern`. Trained copies of layers
/// (`modules_to_save`) go along; a bias that changes becomes a trained one (`bias`), exactly. The
/// decomposition takes minutes for widths of thousands.
///
/// # Errors
/// A place that the model does not have or whose difference is NaN or infinite; what is no difference of
/// a matrix, by its place: the scale of a norm, a bias that the adapter brings of its own.
pub fn convert(sites: &Sites, folds: &dyn Folds, rank: Rank) -> Result<Converted, Error> {
    rank.check()?;
    if let Some(path) = folds.broken() {
        let reason = "the adapter holds NaN or infinity; it is broken, nothing was converted";
        return Err(Error::place(path, reason));
    }
    let paths: BTreeSet<String> = folds.paths().into_iter().collect();
    if let Some(path) = paths.iter().find(|path| sites.get(path).is_none()) {
        let near = sites.all.iter().map(|site| site.path.as_str());
        return Err(Error::no_match("adapter", path, "layer", near));
    }
    if let Some((path, reason)) =
        paths.iter().find_map(|path| Some((path, folds.unfoldable(path)?)))
    {
        return Err(Error::place(path, reason));
    }
    let mut plain = Plain::new();
    let mut fits = Fits::default();
    for site in sites.all.iter().filter(|site| paths.contains(&site.path)) {
        let path = &site.path;
        let copy = folds.trained_copy(path);
        if let Some(copy) = copy.filter(|copy| is_whole(copy)) {
            plain.copies.insert(path.clone(), plain_copy(copy));
            continue;
        }
        let (bias, moved) = trained_bias(site, folds, copy)?;
        if let Some(bias) = bias {
            plain.copies.insert(path.clone(), bias);
        }
        let Some(w) = site.matrix() else {
            continue;
        };
        let delta = match folds.fold_weight(path, &w) {
            Some(delta) => delta.without_autodiff(),
            // LoRA lies where the adapter lay, with `A·B = 0`.
            None if moved => w.zeros_like(),
            None => continue,
        };
        let (pair, fit) = approximation(path, delta, rank)?;
        plain.pieces.push(Piece { site, pair, bias: None });
        fits.0.push(fit);
    }
    let (method, adapters) = plain.lora(sites)?;
    Ok(Converted { method, adapters, fits })
}

/// The bias that takes the place of the layer's own, where it changes, and whether the adapter changes
/// it and not a copy alone.
fn trained_bias(
    site: &Site,
    folds: &dyn Folds,
    copy: Option<&TrainedCopy>,
) -> Result<(Option<TrainedCopy>, bool), Error> {
    let path = &site.path;
    if folds.brings_bias(path) {
        let reason = "the adapter has a bias of its own, which is no product of two matrices; expected \
                      one that changes weights alone";
        return Err(Error::place(path, reason));
    }
    if let Value::D1(v) = &site.weight
        && folds.fold_vector(path, v).is_some()
    {
        let reason = "the adapter changes a vector, which is no product of two matrices; expected one \
                      over linear, embedding and convolution layers";
        return Err(Error::place(path, reason));
    }
    let Some(b) = &site.bias else {
        return Ok((None, false));
    };
    let delta = folds.fold_bias(path, b).map(Tensor::without_autodiff);
    // What is a copy already stays the same to the bit.
    let own = copy.and_then(|copy| Some(copy.bias.as_ref()?.val().without_autodiff()));
    Ok(match (delta, copy, own) {
        (None, ..) => (None, false),
        (Some(delta), Some(copy), Some(own))
            if delta.clone().equal(own.clone() - b.clone()).all().into_scalar::<bool>() =>
        {
            (Some(plain_copy(copy)), false)
        }
        (Some(delta), ..) => (Some(bias_copy(b.clone().cast(delta.dtype()) + delta)), true),
    })
}

/// `A·B ≈ Δ` at this rank.
pub(crate) fn approximation(
    path: &str,
    delta: Tensor<2>,
    rank: Rank,
) -> Result<(Pair, Fit), Error> {
    let delta = delta.cast(DType::F32);
    if !delta.clone().is_finite().all().into_scalar::<bool>() {
        let reason = "the difference holds NaN or infinity and cannot be decomposed";
        return Err(Error::place(path, reason));
    }
    let [rows, columns] = delta.dims();
    let (u, values, vt) = decomposed(delta.clone());
    let sizes: Vec<f64> = values.to_data().iter::<f64>().collect();
    let rank = rank.of(&sizes, rows.max(columns));
    let pair = first((u, values, vt), rank, 1.0);
    // Measured, and not only what theory leaves out: rounding counts.
    let left = delta.clone() - pair.0.clone().matmul(pair.1.clone());
    let (norm, residual) = (length(delta), length(left));
    Ok((pair, Fit { path: path.to_owned(), rank, norm, residual }))
}

/// The root of the sum of the squares.
fn length(matrix: Tensor<2>) -> f64 {
    matrix.into_data().iter::<f64>().map(|v| v * v).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::{Rank, approximation, convert, length};
    use crate::{Bias, Lora};
    use burn::module::{Module, ModuleMapper, Param};
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, Distribution, Tensor};
    use burn_peft_core::{Folds, Sites, Targets, adapt};

    fn diagonal(values: &[f32]) -> Tensor<2> {
        let n = values.len();
        let device = Device::flex();
        let eye = Tensor::<2>::eye(n, &device);
        // Turned, so that the directions are not the axes.
        let (q, _) = burn::linalg::qr(
            Tensor::<2>::random([n, n], Distribution::Normal(0.0, 1.0), &device),
            true,
        );
        let values = Tensor::<1>::from_floats(values, &device).unsqueeze_dim::<2>(0);
        q.clone().matmul(eye * values).matmul(q.transpose())
    }

    #[test]
    fn the_smallest_rank_that_keeps_the_energy() {
        // Squares 16, 9, 4, 1: shares 16/30, 25/30, 29/30.
        for (share, most, expected) in [
            (0.5, None, 1),
            (0.54, None, 2),
            (0.83, None, 2),
            (0.84, None, 3),
            (0.97, None, 4),
            (1.0, None, 4),
            (1.0, Some(2), 2),
        ] {
            let rank = Rank::Energy { share, most };
            let (_, fit) =
                approximation("x", diagonal(&[4.0, 3.0, 2.0, 1.0]), rank).expect("is finite");
            assert_eq!(fit.rank, expected, "{share}");
        }
        // What rounding leaves of a matrix of rank 2 does not count.
        let all = Rank::Energy { share: 1.0, most: None };
        let (_, fit) = approximation("x", diagonal(&[4.0, 3.0, 0.0, 0.0]), all).expect("is finite");
        assert_eq!(fit.rank, 2);
        let (_, fit) = approximation("x", diagonal(&[0.0, 0.0]), all).expect("is finite");
        assert_eq!((fit.rank, fit.norm, fit.error()), (1, 0.0, 0.0));
    }

    #[test]
    fn the_error_is_what_is_left_out() {
        let delta = diagonal(&[4.0, 3.0, 2.0, 1.0]);
        let (pair, fit) = approximation("x", delta.clone(), Rank::At(2)).expect("is finite");
        // √(4 + 1) of √30.
        assert!((fit.error() - (5.0_f64 / 30.0).sqrt()).abs() < 1e-5, "{fit:?}");
        let left = length(delta.clone() - pair.0.matmul(pair.1));
        assert!((fit.residual - left).abs() < 1e-6);
        let (_, fit) = approximation("x", delta, Rank::At(9)).expect("is finite");
        assert!(fit.rank == 4 && fit.error() < 1e-5, "{fit:?}");
        assert!(approximation("x", diagonal(&[f32::NAN, 1.0]), Rank::At(1)).is_err());
    }

    #[derive(Module, Debug)]
    struct Two {
        first: Linear,
        second: Linear,
        head: Linear,
    }

    struct Noise;

    impl ModuleMapper for Noise {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|t| t.random_like(Distribution::Normal(0.0, 0.5)))
        }
    }

    #[test]
    fn ranks_biases_and_copies_go_along() {
        let device = Device::flex();
        let linear = |a, b| LinearConfig::new(a, b).init(&device);
        let model = Two { first: linear(6, 5), second: linear(5, 3), head: linear(3, 2) };
        let sites = Sites::of(&model, Some("head"));
        let targets = Targets {
            modules_to_save: Some(vec!["head".into()]),
            ..Targets::list(["first", "second"])
        };
        let lora = Lora {
            bias: Bias::Only("lora_only".into()),
            rank_pattern: [("second".to_owned(), 1)].into_iter().collect(),
            ..Lora::new(4, 6.0, targets)
        };
        let adapters = adapt(&sites, &lora, 0, &device).expect("fits").map(&mut Noise);
        let all = Rank::Energy { share: 1.0, most: None };
        let made = convert(&sites, &adapters, all).expect("converts");
        assert_eq!(made.fits.0.iter().map(|fit| fit.rank).collect::<Vec<_>>(), [4, 1]);
        assert_eq!((made.method.r, made.method.lora_alpha), (4, 4.0));
        assert_eq!(made.method.rank_pattern.get("second"), Some(&1));
        assert_eq!(made.method.targets, lora.targets);
        assert_eq!(made.method.bias, lora.bias);
        assert!(made.fits.error() < 1e-5);
        for path in ["first", "second"] {
            let w = sites.get(path).and_then(|site| site.matrix()).expect("is a matrix");
            let [a, b] =
                [&adapters, &made.adapters].map(|a| a.fold_weight(path, &w).expect("changes"));
            assert!(length(a - b) < 1e-4);
            let [a, b] = [&adapters, &made.adapters].map(|a| {
                a.copy(path).and_then(|copy| Some(copy.bias.as_ref()?.val())).expect("is trained")
            });
            assert!(a.equal(b).all().into_scalar::<bool>());
        }
        let [a, b] = [&adapters, &made.adapters].map(|a| {
            a.copy("head").and_then(|copy| Some(copy.weight.as_ref()?.val())).expect("is a copy")
        });
        assert!(a.equal(b).all().into_scalar::<bool>());
    }

    #[test]
    fn what_is_no_weight_difference_is_refused() {
        let device = Device::flex();
        let linear = LinearConfig::new(4, 4).init(&device);
        let model = Two { first: linear.clone(), second: linear.clone(), head: linear };
        let sites = Sites::of(&model, Some("head"));
        let lora = Lora { lora_bias: true, ..Lora::new(2, 2.0, Targets::list(["first"])) };
        let adapters = adapt(&sites, &lora, 0, &device).expect("fits");
        let said = convert(&sites, &adapters, Rank::At(2)).expect_err("has a bias").to_string();
        assert!(said.starts_with("first: ") && said.contains("bias of its own"), "{said}");
        let plain = Lora::new(2, 2.0, Targets::list(["first"]));
        let adapters = adapt(&sites, &plain, 0, &device).expect("fits");
        for rank in [
            Rank::At(0),
            Rank::Energy { share: 0.0, most: None },
            Rank::Energy { share: f64::NAN, most: None },
            Rank::Energy { share: 0.5, most: Some(0) },
        ] {
            assert!(convert(&sites, &adapters, rank).is_err(), "{rank:?}");
        }
    }
}
