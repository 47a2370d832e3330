//! Combinations of LoRAs, with the numbers of HF PEFT's `add_weighted_adapter` (`interop/combine.py`).

use crate::hf::{base, device, fixtures, floats, open};
use crate::probe::values;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{Tensor, TensorData};
use burn_peft::core::{Adapters, Folds, Sites, TensorFile, load};
use burn_peft::models::BertForSequenceClassification;
use burn_peft::reparam::{Combination, Combine, Converted, Lora, LoraAdapter, combine};
use std::collections::BTreeSet;

/// DARE's seed in the fixtures.
const SEED: u64 = 11;

#[derive(Module, Debug)]
struct Convolutions {
    image: Conv2d,
    point: Conv2d,
}

fn convolutions() -> Sites {
    let conv = |channels, kernel| Conv2dConfig::new(channels, kernel).init(&device());
    let model = Convolutions { image: conv([3, 6], [3, 3]), point: conv([6, 5], [1, 1]) };
    Sites::of(&model, None)
}

/// The adapters of a group, with their weights.
struct Group {
    sites: Sites,
    parts: Vec<(Adapters<LoraAdapter>, Lora, f64)>,
    golden: TensorFile,
}

impl Group {
    fn of(name: &str) -> Self {
        let sites = match name {
            "convolutions" => convolutions(),
            _ => Sites::of(&base::<BertForSequenceClassification>("bert"), None),
        };
        let folder = fixtures().join("combine").join(name);
        let mut golden = open(folder.join("golden.safetensors"));
        let data = golden.take_data("weights").expect("is in the file");
        let weights: Vec<f64> = data.iter::<f64>().collect();
        let part = |(i, weight): (usize, &f64)| {
            let folder = folder.join(format!("part{i}"));
            let (config, adapters) = load::<Lora>(&folder, &sites, &device()).expect("is whole");
            (adapters, config.method, *weight)
        };
        let parts = weights.iter().enumerate().map(part).collect();
        Self { sites, parts, golden }
    }

    fn made(&self, how: &Combine) -> Converted {
        let parts: Vec<_> = self.parts.iter().map(|(a, lora, w)| (a, lora, *w)).collect();
        combine(&self.sites, &parts, how).expect("combines")
    }

    /// Names of the cases in the golden file.
    fn cases(&self) -> BTreeSet<String> {
        let case = |name: &str| Some(name.split_once('/')?.0.to_owned());
        self.golden.names().filter_map(case).collect()
    }
}

/// The options that a case's name holds.
fn options(case: &str) -> Combine {
    let mut words = case.split(' ');
    let rule = format!("hf_{}", words.next().expect("is the rule"));
    let mut how = Combine::new(rule.parse().expect("is a rule"));
    how.seed = SEED;
    for word in words {
        match word.split_once('=').expect("is an option") {
            ("svd_rank", rank) => how.svd_rank = Some(rank.parse().expect("is a number")),
            ("density", share) => how.density = Some(share.parse().expect("is a number")),
            ("majority_sign_method", name) => {
                how.majority_sign_method = Some(name.parse().expect("is a way"));
            }
            (other, _) => unreachable!("{other}"),
        }
    }
    how
}

/// `s·A·B` of the fixture, `[fan_in, fan_out]`.
fn theirs(golden: &mut TensorFile, case: &str, path: &str) -> Tensor<2> {
    let mut factor = |side: &str| {
        let name = format!("{case}/{path}/{side}");
        let shape = golden.shape(&name).expect("is in the file").to_vec();
        let columns = shape[1..].iter().product();
        let data = TensorData::new(floats(golden, &name), [shape[0], columns]);
        Tensor::<2>::from_data(data, &device())
    };
    let (a, b) = (factor("A"), factor("B")); // (r, fan_in) and (fan_out, r)
    let scaling = floats(golden, &format!("{case}/{path}/scaling"))[0];
    (b.matmul(a) * scaling).transpose()
}

#[track_caller]
fn same(found: Tensor<2>, expected: Tensor<2>, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let size = values(expected.clone()).iter().fold(1.0_f32, |size, v| size.max(v.abs()));
    let far = values(found - expected).iter().fold(0.0_f32, |far, v| far.max(v.abs()));
    assert!(far <= 1e-5 * size, "{what}: differs by {far} of {size}");
}

fn delta(sites: &Sites, made: &Converted, path: &str) -> Tensor<2> {
    let w = sites.get(path).and_then(|site| site.matrix()).expect("is a matrix");
    made.adapters.fold_weight(path, &w).expect("is adapted")
}

#[test]
fn combinations_of_hf_peft() {
    let mut rules = BTreeSet::new();
    for name in ["alone", "convolutions", "equal", "rslora", "three", "uneven"] {
        let mut group = Group::of(name);
        for case in group.cases() {
            let mut how = options(&case);
            if group.parts.len() == 1 {
                // What HF PEFT then leaves unread is refused here.
                how = Combine::new(how.combination);
            }
            let made = group.made(&how);
            for path in made.adapters.places() {
                let expected = theirs(&mut group.golden, &case, &path);
                let what = format!("{name} {case} {path}");
                same(delta(&group.sites, &made, &path), expected, &what);
            }
            let prefix = format!("{case}/");
            let layers = group.golden.names().filter(|n| n.starts_with(&prefix)).count();
            assert_eq!(layers, 0, "{name} {case}: layers without a place");
            rules.insert(how.combination.to_string());
        }
    }
    let all: BTreeSet<String> =
        Combination::names().into_iter().filter(|name| name.starts_with("hf_")).collect();
    assert_eq!(rules, all);
}

#[test]
fn without_rslora_the_svd_family_is_hf_pefts() {
    for name in ["convolutions", "equal", "three"] {
        let mut group = Group::of(name);
        for case in group.cases() {
            let mut how = options(&case);
            how.combination.by_hf = false;
            let (rule, _) = case.split_once(' ').unwrap_or((&case, ""));
            if !rule.ends_with("svd") && rule != "cat" {
                continue;
            }
            let made = group.made(&how);
            for path in made.adapters.places() {
                let expected = theirs(&mut group.golden, &case, &path);
                let what = format!("{name} {case} {path}");
                same(delta(&group.sites, &made, &path), expected, &what);
            }
        }
    }
}

#[test]
fn a_rule_by_its_plain_name_works_on_the_differences() {
    let group = Group::of("rslora");
    for (one, other) in [
        ("linear", "svd"),
        ("ties", "ties_svd"),
        ("dare_linear", "dare_linear_svd"),
        ("dare_ties", "dare_ties_svd"),
        ("magnitude_prune", "magnitude_prune_svd"),
    ] {
        let [a, b] = [one, other].map(|name| {
            let mut how = Combine::new(name.parse().expect("is a rule"));
            how.density = (name != "linear" && name != "svd").then_some(0.5);
            group.made(&how)
        });
        for path in a.adapters.places() {
            let [a, b] = [&a, &b].map(|made| values(delta(&group.sites, made, &path)));
            assert_eq!(a, b, "{one} {path}");
        }
        // No root of the rank is left over: the scale is 1.
        assert!(a.adapters.iter().all(|(_, adapter)| adapter.scaling == 1.0), "{one}");
    }
}
