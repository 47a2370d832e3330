//! Several LoRAs as one: weighted sums and their kin.

use crate::beside::{copied, hf_cannot, own_bias};
use crate::combination::{Combination, Combine, Rule};
use crate::convert::{Converted, Fits, Rank, approximation};
use crate::init::Pair;
use crate::lora::{Lora, LoraAdapter};
use crate::merging::{Arithmetic, Prune, Settings};
use crate::plain::{Piece, Plain};
use crate::torch_random::TorchRandom;
use burn::linalg::qr;
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Folds, Kind, Method, Site, Sites};
use std::collections::BTreeSet;

/// One of the adapters that are combined: what was trained, its configuration, and its weight, which may
/// be negative.
pub type Weighted<'a> = (&'a Adapters<LoraAdapter>, &'a Lora, f64);

/// Combines several LoRAs over one model into one plain LoRA.
///
/// A place that only some of them adapt gets the combination of those. Ranks, alphas, rsLoRA and patterns
/// may differ; the result's are in its configuration. Biases (trained ones and `lora_bias`) are added up
/// with the weights, whatever the rule. A layer that is trained whole (`modules_to_save`), such as a head,
/// becomes the weighted mean `Σ wᵢ·Wᵢ / Σ wᵢ` of those that train it, which does not ask what the base has
/// there; one that a single adapter trains goes along as it is.
///
/// # Errors
/// Options that do not belong to the rule; a weight or an adapter that is not finite; DoRA and other
/// variants whose difference is no product; a layer that one adapter trains whole and another adapts, or that several train
/// whole at weights whose sum is 0. For HF PEFT's rules (`hf_`) also what they cannot do: factors of different
/// ranks, biases, 1d convolutions in the svd family, a layer that several train whole.
pub fn combine(sites: &Sites, parts: &[Weighted<'_>], how: &Combine) -> Result<Converted, Error> {
    how.check(parts.len())?;
    let mut places = BTreeSet::new();
    for (adapters, _, weight) in parts {
        if !weight.is_finite() {
            let reason = format!("expected finite numbers, found {weight}");
            return Err(Error::config("weights", reason));
        }
        if let Some(path) = adapters.broken() {
            let reason = "the adapter holds NaN or infinity; it is broken, nothing was combined";
            return Err(Error::place(path, reason));
        }
        places.extend(adapters.places());
    }
    if let Some(path) = places.iter().find(|path| sites.get(path).is_none()) {
        let near = sites.all.iter().map(|site| site.path.as_str());
        return Err(Error::no_match("adapter", path, "layer", near));
    }
    let Combination { by_hf, .. } = how.combination;
    let mut work = Work {
        how,
        rule: how.combination.rule_for(parts.len()),
        on_factors: how.combination.on_factors(parts.len()),
        rank: how.svd_rank.unwrap_or_else(|| ranks(parts).max().unwrap_or(1)),
        settings: Settings {
            density: how.density.unwrap_or(1.0),
            majority_sign: how.majority_sign_method.unwrap_or_default(),
            random: TorchRandom::manual_seed(how.seed),
        },
        fits: Fits::default(),
    };
    let mut plain = Plain::new();
    if by_hf && parts.first().is_some_and(|(_, lora, _)| lora.use_rslora) {
        plain.use_rslora = true;
        let r = if work.rule == Rule::Cat { ranks(parts).sum() } else { work.rank };
        plain.scaling = (r as f64).sqrt();
    }
    for site in sites.all.iter().filter(|site| places.contains(&site.path)) {
        if let Some(copy) = copied(site, parts, by_hf)? {
            plain.copies.insert(site.path.clone(), copy);
        }
        let held: Vec<(&LoraAdapter, f64)> = parts
            .iter()
            .filter_map(|(adapters, _, weight)| Some((adapters.get(&site.path)?, *weight)))
            .collect();
        if !held.is_empty() {
            let bias = own_bias(site, &held, by_hf)?;
            plain.pieces.push(Piece { site, pair: work.pair(site, &held)?, bias });
        }
    }
    let (method, adapters) = plain.lora(sites)?;
    Ok(Converted { method, adapters, fits: work.fits })
}

/// The largest rank of each adapter, as HF PEFT counts it.
fn ranks<'a>(parts: &'a [Weighted<'_>]) -> impl Iterator<Item = usize> + 'a {
    parts.iter().map(|(_, lora, _)| {
        let lora = lora.portable();
        lora.rank_pattern.values().copied().fold(lora.r, usize::max)
    })
}

/// What the places of one combination have in common.
struct Work<'a> {
    how: &'a Combine,
    rule: Rule,
    on_factors: bool,
    /// Where the result is cut.
    rank: usize,
    settings: Settings,
    fits: Fits,
}

impl Work<'_> {
    /// The factors at one place, `s` in them.
    fn pair(&mut self, site: &Site, held: &[(&LoraAdapter, f64)]) -> Result<Pair, Error> {
        let mut pairs = Vec::with_capacity(held.len());
        for (adapter, weight) in held {
            if let Some(variant) = adapter.variant.as_ref().filter(|variant| !variant.is_product())
            {
                let reason = format!(
                    "{}: its difference is no product s·A·B and has no place in a sum; convert the adapter \
                     to a plain LoRA first",
                    variant.name()
                );
                return Err(Error::place(&site.path, reason));
            }
            let (a, b) = adapter.factors();
            let plain = |t: Tensor<2>| t.without_autodiff().cast(DType::F32);
            pairs.push(Scaled {
                pair: (plain(a), plain(b)),
                scaling: adapter.scaling,
                weight: *weight,
            });
        }
        let Some(arithmetic) = self.rule.arithmetic() else {
            return Ok(beside(&pairs));
        };
        if self.on_factors {
            return self.factor_by_factor(site, arithmetic, &pairs);
        }
        if self.how.combination.by_hf && site.kind == Kind::Conv1d {
            return Err(hf_cannot(site, "cannot decompose a 1d convolution"));
        }
        let rank = Rank::At(self.rank);
        let (pair, fit) = match arithmetic {
            Arithmetic { prune: Prune::Nothing, elect: false } => {
                let (a, b) = beside(&pairs);
                // `A·B = Qa·(Ra·Rbᵀ)·Qbᵀ`: the small matrix has the same singular values.
                let ((qa, ra), (qb, rb)) = (qr(a, true), qr(b.transpose(), true));
                let ((a, b), fit) = approximation(&site.path, ra.matmul(rb.transpose()), rank)?;
                ((qa.matmul(a), b.matmul(qb.transpose())), fit)
            }
            _ => {
                let deltas = pairs.iter().map(Scaled::delta).collect();
                let weights: Vec<f64> = pairs.iter().map(|part| part.weight).collect();
                let turned = site.kind != Kind::Embedding;
                let delta = self.merged((site, turned), arithmetic, deltas, &weights);
                approximation(&site.path, delta, rank)?
            }
        };
        self.fits.0.push(fit);
        Ok(pair)
    }

    /// `A` and `B`, each merged by itself with the root of the weight.
    fn factor_by_factor(
        &mut self,
        site: &Site,
        arithmetic: Arithmetic,
        pairs: &[Scaled],
    ) -> Result<Pair, Error> {
        let mut ranks = pairs.iter().map(|part| part.pair.0.dims()[1]);
        let first = ranks.next().unwrap_or(0);
        if let Some(other) = ranks.find(|rank| *rank != first) {
            let reason = format!(
                "{} merges factor by factor; expected equal ranks, found {first} and {other}",
                self.how.combination
            );
            return Err(Error::place(&site.path, reason));
        }
        let strength = |part: &Scaled| part.weight * part.scaling;
        let roots: Vec<f64> = pairs.iter().map(|part| strength(part).abs().sqrt()).collect();
        // The sign is A's, so that it does not cancel.
        let signed: Vec<f64> = pairs
            .iter()
            .zip(&roots)
            .map(|(part, root)| if strength(part) < 0.0 { -root } else { *root })
            .collect();
        let a = pairs.iter().map(|part| part.pair.0.clone()).collect();
        let b = pairs.iter().map(|part| part.pair.1.clone()).collect();
        let a = self.merged((site, true), arithmetic, a, &signed);
        Ok((a, self.merged((site, true), arithmetic, b, &roots)))
    }

    /// Matrices of one shape merged number by number, in the order in which PyTorch holds them, where all
    /// but the difference of a table lie `turned`: the draws come in that order.
    fn merged(
        &mut self,
        (site, turned): (&Site, bool),
        rule: Arithmetic,
        matrices: Vec<Tensor<2>>,
        weights: &[f64],
    ) -> Tensor<2> {
        let there = |m: Tensor<2>| if turned { m.transpose() } else { m };
        let matrices: Vec<Tensor<2>> = matrices.into_iter().map(there).collect();
        let shape = matrices.first().map_or([0, 0], |matrix| matrix.dims());
        let values = |m: Tensor<2>| m.into_data().iter::<f32>().collect();
        let values =
            self.settings.merged(rule, matrices.into_iter().map(values).collect(), weights);
        there(Tensor::from_data(TensorData::new(values, shape), &site.device()))
    }
}

/// `w·s·A·B`.
struct Scaled {
    pair: Pair,
    scaling: f64,
    weight: f64,
}

impl Scaled {
    /// `s·A·B`, without the weight.
    fn delta(&self) -> Tensor<2> {
        (self.pair.0.clone() * self.scaling).matmul(self.pair.1.clone())
    }
}

/// `Σ wᵢ·sᵢ·Aᵢ·Bᵢ` as one product: the factors beside each other.
fn beside(pairs: &[Scaled]) -> Pair {
    let a = pairs.iter().map(|part| part.pair.0.clone() * (part.weight * part.scaling)).collect();
    let b = pairs.iter().map(|part| part.pair.1.clone()).collect();
    (Tensor::cat(a, 1), Tensor::cat(b, 0))
}

#[cfg(test)]
mod tests {
    use super::combine;
    use crate::{Combine, Converted, Lora, LoraAdapter};
    use burn::module::{Module, ModuleMapper, Param};
    use burn::nn::conv::{Conv1d, Conv1dConfig};
    use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
    use burn::tensor::{Device, Distribution, Tensor};
    use burn_peft_core::{Adapters, Error, Folds, Sites, Targets, adapt};

    #[derive(Module, Debug)]
    struct Small {
        words: Embedding,
        first: Linear,
        second: Linear,
        conv: Conv1d,
    }

    fn sites() -> Sites {
        let device = Device::flex();
        let model = Small {
            words: EmbeddingConfig::new(9, 6).init(&device),
            first: LinearConfig::new(6, 8).init(&device),
            second: LinearConfig::new(8, 5).init(&device),
            conv: Conv1dConfig::new(4, 6, 3).init(&device),
        };
        Sites::of(&model, None)
    }

    struct Noise;

    impl ModuleMapper for Noise {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|t| t.random_like(Distribution::Normal(0.0, 0.5)))
        }
    }

    type Part = (Adapters<LoraAdapter>, Lora);

    fn trained(sites: &Sites, lora: Lora) -> Part {
        (adapt(sites, &lora, 0, &Device::flex()).expect("fits").map(&mut Noise), lora)
    }

    /// Two that differ in rank, scale and places.
    fn two(sites: &Sites) -> [Part; 2] {
        let one = Lora {
            use_rslora: true,
            rank_pattern: [("first".to_owned(), 3)].into_iter().collect(),
            ..Lora::new(2, 5.0, Targets::list(["words", "first", "conv"]))
        };
        let other = Lora {
            alpha_pattern: [("first".to_owned(), 7.0)].into_iter().collect(),
            ..Lora::new(1, 3.0, Targets::list(["first", "second", "conv"]))
        };
        [trained(sites, one), trained(sites, other)]
    }

    fn made(sites: &Sites, parts: &[Part; 2], how: &Combine) -> Result<Converted, Error> {
        let [(a, la), (b, lb)] = parts;
        combine(sites, &[(a, la, 0.7), (b, lb, -0.4)], how)
    }

    fn rule(name: &str) -> Combine {
        Combine::new(name.parse().expect("is a name"))
    }

    /// `Σ wᵢ·Δᵢ` at each place, and how far the made one is from it, of its size.
    fn far(sites: &Sites, parts: &[Part; 2], made: &Converted) -> Vec<f64> {
        let size = |t: Tensor<2>| t.powf_scalar(2.0).sum().into_scalar::<f32>().sqrt();
        let place = |site: &burn_peft_core::Site| {
            let w = site.matrix().expect("is a matrix");
            let delta = |a: &Adapters<LoraAdapter>| a.fold_weight(&site.path, &w);
            let zeros = || w.zeros_like();
            let sum = delta(&parts[0].0).unwrap_or_else(zeros) * 0.7
                - delta(&parts[1].0).unwrap_or_else(zeros) * 0.4;
            let found = delta(&made.adapters).expect("is adapted");
            f64::from(size(found - sum.clone()) / size(sum))
        };
        sites.all.iter().map(place).collect()
    }

    #[test]
    fn cat_and_linear_are_the_weighted_sum() {
        let sites = sites();
        let parts = two(&sites);
        let cat = made(&sites, &parts, &rule("cat")).expect("combines");
        assert!(far(&sites, &parts, &cat).iter().all(|&far| far < 1e-5));
        let rank = |path: &str| cat.adapters.get(path).expect("is adapted").lora_a.dims()[1];
        assert_eq!(["words", "first", "second", "conv"].map(rank), [2, 4, 1, 3]);
        assert!(cat.fits.0.is_empty());
        for name in ["linear", "svd"] {
            let whole = Combine { svd_rank: Some(4), ..rule(name) };
            let found = made(&sites, &parts, &whole).expect("combines");
            assert!(far(&sites, &parts, &found).iter().all(|&far| far < 1e-5), "{name}");
            // At less than the sum of the ranks, what is said to be lost is what is lost.
            let found = made(&sites, &parts, &rule(name)).expect("combines");
            let far = far(&sites, &parts, &found);
            assert_eq!(found.fits.0.iter().map(|fit| fit.rank).collect::<Vec<_>>(), [2, 3, 1, 3]);
            for (fit, far) in found.fits.0.iter().zip(&far) {
                assert!((fit.error() - far).abs() < 1e-5, "{fit:?}, {far}");
            }
            assert!(far[1] > 1e-3, "four directions do not fit in three");
        }
    }

    #[test]
    fn pruning_nothing_is_the_weighted_sum() {
        let sites = sites();
        let parts = two(&sites);
        for name in ["magnitude_prune", "dare_linear_svd"] {
            let how = Combine { svd_rank: Some(4), density: Some(1.0), ..rule(name) };
            let found = made(&sites, &parts, &how).expect("combines");
            assert!(far(&sites, &parts, &found).iter().all(|&far| far < 1e-5), "{name}");
        }
    }

    #[test]
    fn hf_peft_names_its_own_oddities() {
        let sites = sites();
        let part = |alpha| trained(&sites, Lora::new(2, alpha, Targets::list(["first"])));
        let parts = [part(3.0), part(5.0)];
        let w = sites.get("first").and_then(|site| site.matrix()).expect("is a matrix");
        let delta = |a: &Adapters<LoraAdapter>| a.fold_weight("first", &w).expect("is adapted");
        let sum = delta(&parts[0].0) * 0.7 - delta(&parts[1].0) * 0.4;
        let [ours, theirs] = ["linear", "hf_linear"].map(|name| {
            let how = Combine { svd_rank: (name == "linear").then_some(4), ..rule(name) };
            let found = delta(&made(&sites, &parts, &how).expect("combines").adapters);
            (found - sum.clone()).abs().max().into_scalar::<f32>()
        });
        assert!(ours < 1e-5 && theirs > 1e-2, "{ours}, {theirs}");
    }

    #[test]
    fn biases_add_up_and_whole_layers_go_along() {
        let sites = sites();
        let biased = |saved: Option<Vec<String>>| {
            let targets = Targets { modules_to_save: saved, ..Targets::list(["first"]) };
            Lora {
                lora_bias: true,
                bias: "lora_only".to_owned().into(),
                ..Lora::new(2, 4.0, targets)
            }
        };
        let parts =
            [trained(&sites, biased(Some(vec!["second".into()]))), trained(&sites, biased(None))];
        let found = made(&sites, &parts, &rule("cat")).expect("combines");
        let b = sites.get("first").and_then(|site| site.bias.clone()).expect("has one");
        let [one, other, sum] = [&parts[0].0, &parts[1].0, &found.adapters]
            .map(|a| a.fold_bias("first", &b).expect("changes"));
        let far = (sum - one * 0.7 + other * 0.4).abs().max().into_scalar::<f32>();
        assert!(far < 1e-5, "{far}");
        let weight = |a: &Adapters<LoraAdapter>| {
            a.copy("second").and_then(|copy| Some(copy.weight.as_ref()?.val())).expect("is a copy")
        };
        let same = weight(&found.adapters).equal(weight(&parts[0].0));
        assert!(same.all().into_scalar::<bool>());
        assert_eq!(found.method.targets.modules_to_save, Some(vec!["second".into()]));

        let both = [0, 1].map(|_| trained(&sites, biased(Some(vec!["second".into()]))));
        let found = made(&sites, &both, &rule("cat")).expect("combines");
        // The weights are 0.7 and -0.4.
        let mean = (weight(&both[0].0) * 0.7 - weight(&both[1].0) * 0.4) / 0.3;
        let far = (weight(&found.adapters) - mean).abs().max().into_scalar::<f32>();
        assert!(far < 1e-5, "{far}");
        let saving =
            Targets { modules_to_save: Some(vec!["second".into()]), ..Targets::list(["first"]) };
        let plain = [0, 1].map(|_| trained(&sites, Lora::new(2, 4.0, saving.clone())));
        let said = made(&sites, &plain, &rule("hf_cat")).expect_err("HF has none").to_string();
        assert!(said.starts_with("second: HF PEFT"), "{said}");
        let balanced: Vec<crate::Weighted<'_>> =
            both.iter().zip([0.5, -0.5]).map(|((of, lora), weight)| (of, lora, weight)).collect();
        let said = combine(&sites, &balanced, &rule("cat")).expect_err("has no mean").to_string();
        assert!(said.starts_with("second: ") && said.contains("add up to 0"), "{said}");

        let adapted = trained(&sites, Lora::new(2, 4.0, Targets::list(["second"])));
        let [first, _] = parts;
        let said = made(&sites, &[first, adapted], &rule("cat")).expect_err("has no sum");
        let said = said.to_string();
        assert!(said.starts_with("second: ") && said.contains("modules_to_save"), "{said}");
    }

    #[test]
    fn what_has_no_sum_or_no_use_is_refused() {
        let sites = sites();
        let parts = two(&sites);
        let dense = |density| Combine { density: Some(density), ..rule("ties") };
        for (how, says) in [
            (rule("ties"), "density: ties needs"),
            (dense(0.0), "density: expected"),
            (dense(1.5), "density: expected"),
            (dense(f64::NAN), "density: expected"),
            (Combine { density: Some(0.5), ..rule("svd") }, "density: is for rules that prune"),
            (Combine { svd_rank: Some(2), ..rule("cat") }, "svd_rank: is for"),
            (Combine { svd_rank: Some(2), ..rule("hf_linear") }, "svd_rank: is for"),
            (Combine { svd_rank: Some(0), ..rule("svd") }, "svd_rank: expected 1"),
            (
                Combine { majority_sign_method: Some(crate::MajoritySign::Total), ..rule("svd") },
                "majority_sign_method: is for",
            ),
            (rule("hf_linear"), "first: hf_linear merges factor by factor"),
            (rule("hf_svd"), "conv: HF PEFT cannot"),
        ] {
            let said = made(&sites, &parts, &how).expect_err("cannot work").to_string();
            assert!(said.starts_with(says), "expected {says}\n{said}");
        }
        let dora = Lora { use_dora: true, ..Lora::new(2, 4.0, Targets::list(["first"])) };
        let parts = [trained(&sites, dora.clone()), trained(&sites, dora)];
        let said = made(&sites, &parts, &rule("cat")).expect_err("is no sum").to_string();
        assert!(said.contains("use_dora"), "{said}");
        assert!("nonsense".parse::<crate::Combination>().is_err_and(|e| e.contains("hf_ties")));
        for name in crate::Combination::names() {
            let parsed: crate::Combination = name.parse().expect("is a name");
            assert_eq!(parsed.to_string(), name);
        }
    }
}
