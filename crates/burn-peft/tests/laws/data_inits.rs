//! Inits that look at data, and HF PEFT's numbers for the same data (`interop/data_inits.py`).

use crate::hf::{base, device, fixtures, floats, open};
use crate::probe::{Probe, values};
use burn::tensor::Tensor;
use burn_peft::core::{
    Adapters, Counted, Error, Method, Passes, Scope, Sites, Targets, adapt, pattern_value, survey,
};
use burn_peft::models::{LlamaForCausalLM, Pretrained, Tokens};
use burn_peft::reparam::{Lora, LoraAdapter, integers, loftq};
use burn_peft::train::Objective;
use burn_peft::train::data::{CausalBatch, IGNORED};
use serde_json::{Value, json};

/// A model with the fixture's texts, `rows` of them a batch.
struct Texts {
    model: LlamaForCausalLM,
    batches: Vec<CausalBatch>,
}

impl Texts {
    fn new(rows: usize) -> Self {
        let mut file = open(fixtures().join("inits/data/golden.safetensors"));
        let mut ints = |name: &str| {
            let (shape, values) = file.take_ints(name).expect("is in the file");
            (shape[1], values.into_iter().map(|value| value as i32).collect::<Vec<_>>())
        };
        let (seq, ids) = ints("input_ids");
        let [mask, labels] = ["attention_mask", "labels"].map(|name| ints(name).1);
        // The token that follows, in place of the one that stands there.
        let next = |row: &[i32]| row[1..].iter().copied().chain([IGNORED]).collect::<Vec<_>>();
        let batch = |at: usize| {
            let part = at * seq * rows..((at + 1) * seq * rows).min(ids.len());
            let (ids, mask) = (ids[part.clone()].to_vec(), mask[part.clone()].to_vec());
            let tokens = Tokens { batch: ids.len() / seq, seq, ids, mask, ..Tokens::default() };
            CausalBatch { tokens, targets: labels[part].chunks(seq).flat_map(next).collect() }
        };
        let count = (ids.len() / seq).div_ceil(rows);
        Self { model: base("llama"), batches: (0..count).map(batch).collect() }
    }

    fn sites(&self) -> Sites {
        Sites::of(&self.model, Some(LlamaForCausalLM::OUTPUT))
    }
}

impl Passes for Texts {
    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        let batch = &self.batches[batch];
        let loss = self.model.loss(batch, &device(), cx);
        loss.sum / LlamaForCausalLM::targets(batch) as f64
    }

    fn counted(&self, batch: usize, targets_only: bool) -> Counted {
        LlamaForCausalLM::counted(&self.batches[batch], targets_only)
    }
}

/// HF PEFT's case of that name: what was asked for, what it decided, and ours over `texts`.
fn run(name: &str, texts: &Texts) -> (Lora, Value, Adapters<LoraAdapter>) {
    let folder = fixtures().join("inits").join(name);
    let text = std::fs::read_to_string(folder.join("config.json")).expect("is committed");
    let said: Value = serde_json::from_str(&text).expect("is JSON");
    let asked: Lora = serde_json::from_value(said["asked"].clone()).expect("is LoRA's");
    let sites = texts.sites();
    let known = survey(asked, &sites, texts).expect("there is enough data");
    let adapters = adapt(&sites, &known, 0, &device().autodiff()).expect("fits");
    (known, said, adapters)
}

/// HF PEFT's `A` and `B` at each place beside ours, in our layout: rows of `Aᵀ` and rows of `B`.
type Beside = (String, [Vec<Vec<f32>>; 2], [Vec<Vec<f32>>; 2]);

fn beside(name: &str, adapters: &Adapters<LoraAdapter>) -> Vec<Beside> {
    let mut golden = open(fixtures().join("inits").join(name).join("golden.safetensors"));
    let rows = |values: Vec<f32>, r: usize| -> Vec<Vec<f32>> {
        values.chunks(values.len() / r).map(<[f32]>::to_vec).collect()
    };
    let places: Vec<_> = adapters.iter().collect();
    assert_eq!(places.len(), 6);
    places
        .into_iter()
        .map(|(path, adapter)| {
            let r = golden.shape(&format!("{path}.lora_A")).expect("is in the file")[0];
            let a = rows(floats(&mut golden, &format!("{path}.lora_A")), r);
            let b = floats(&mut golden, &format!("{path}.lora_B"));
            let b: Vec<Vec<f32>> =
                (0..r).map(|k| b.iter().skip(k).step_by(r).copied().collect()).collect();
            let own_b = adapter.lora_b.as_ref().expect("is trained").val();
            assert_eq!(adapter.lora_a.dims()[1], r, "{name} {path}");
            let own = [values(adapter.lora_a.val().transpose()), values(own_b)].map(|v| rows(v, r));
            (path.to_owned(), own, [a, b])
        })
        .collect()
}

fn size(v: &[f32]) -> f32 {
    v.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// How far apart two vectors are, as a share of the second.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    let off: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    assert_eq!(found.len(), expected.len());
    size(&off) / size(expected)
}

/// Rounding in f32 moves a direction by as much as its singular value is closer to the next than to 0.
const DIRECTION: f32 = 2e-3;

#[test]
fn eva_begins_and_shares_out_as_hf_peft() {
    // HF PEFT looks at its one batch twice, and divides by what it then takes for the spread.
    let twice = 2.0_f32.powf(-0.25);
    for (name, scale) in [("eva", 1.0), ("eva-plain", twice)] {
        // Data in parts are the same data.
        for rows in [6, 4] {
            let (known, said, adapters) = run(name, &Texts::new(rows));
            for (path, [a, b], [expected, _]) in beside(name, &adapters) {
                for (found, expected) in a.iter().zip(&expected) {
                    let found: Vec<f32> = found.iter().map(|x| x * scale).collect();
                    let apart = apart(&found, expected);
                    assert!(apart < DIRECTION, "{name} {path}: {apart}");
                }
                assert!(b.iter().flatten().all(|x| *x == 0.0));
                let asked = &said["asked"]["lora_alpha"];
                let alpha = &said["decided"]["alpha_pattern"][&path];
                let alpha = alpha.as_f64().or(asked.as_f64()).unwrap_or(8.0);
                let found = pattern_value("alpha_pattern", &known.alpha_pattern, &path);
                let found = found.expect("are patterns").unwrap_or(known.lora_alpha);
                assert_eq!(found, alpha, "{name} {path}");
            }
            let moved = said["decided"]["rank_pattern"].as_object().expect("is a table");
            assert_eq!(moved.is_empty(), known.rank_pattern.is_empty(), "{name}");
        }
    }
}

#[test]
fn corda_splits_as_hf_peft() {
    for name in ["corda-ipm", "corda-kpm"] {
        let (_, _, adapters) = run(name, &Texts::new(4));
        for (path, own, golden) in beside(name, &adapters) {
            let product = |[a, b]: &[Vec<Vec<f32>>; 2]| -> Vec<f32> {
                let mut sum = vec![0.0; a[0].len() * b[0].len()];
                for (a, b) in a.iter().zip(b) {
                    let all = a.iter().flat_map(|x| b.iter().map(move |y| x * y));
                    sum.iter_mut().zip(all).for_each(|(sum, x)| *sum += x);
                }
                sum
            };
            let apart = apart(&product(&own), &product(&golden));
            assert!(apart < 1e-4, "{name} {path}: {apart}");
        }
    }
}

#[test]
fn lora_ga_follows_the_gradient_as_hf_peft() {
    for name in ["lora_ga", "lora_ga-svd", "lora_ga-gd"] {
        let (_, _, adapters) = run(name, &Texts::new(3));
        for (path, own, golden) in beside(name, &adapters) {
            for (found, expected) in own.iter().flatten().zip(golden.iter().flatten()) {
                // The sign of a direction is the library's.
                let other: Vec<f32> = found.iter().map(|x| -x).collect();
                let apart = apart(found, expected).min(apart(&other, expected));
                assert!(apart < DIRECTION, "{name} {path}: {apart}");
            }
        }
    }
}

/// What refuses `lora` with these fields over the first `rows` texts.
fn refused(fields: Value, rows: usize) -> String {
    let mut texts = Texts::new(rows.max(1));
    texts.batches.truncate(rows.min(1));
    let mut asked = json!({"target_modules": ["v_proj"]});
    asked.as_object_mut().expect("is one").extend(fields.as_object().expect("is one").clone());
    let lora: Lora = serde_json::from_value(asked).expect("is LoRA's");
    survey(lora, &texts.sites(), &texts).expect_err("cannot work").to_string()
}

#[test]
fn data_that_do_not_suffice_are_refused() {
    let texts = Texts::new(6);
    for init in ["eva", "corda", "lora_ga"] {
        let lora = json!({"init_lora_weights": init, "target_modules": ["v_proj"]});
        let lora: Lora = serde_json::from_value(lora).expect("is LoRA's");
        let said = adapt(&texts.sites(), &lora, 0, &device()).expect_err("saw none").to_string();
        assert!(said.starts_with("init_lora_weights: ") && said.contains("survey"), "{said}");
        let none = refused(json!({"init_lora_weights": init}), 0);
        assert!(none.starts_with("init_batches: "), "{none}");
    }
    // 14 tokens, of which one comes twice, less their mean.
    let all = json!({"use_label_mask": false});
    let few = refused(json!({"init_lora_weights": "eva", "r": 14, "eva_config": all}), 1);
    assert!(few.starts_with("r: is 14") && few.contains("have 12"), "{few}");
    // 16 outputs.
    let wide = refused(json!({"init_lora_weights": "lora_ga", "r": 9}), 1);
    assert!(wide.starts_with("r: is 9") && wide.contains("v_proj has 16"), "{wide}");
    let wide = refused(json!({"init_lora_weights": "corda", "r": 17}), 1);
    assert!(wide.starts_with("r: is 17") && wide.contains("16"), "{wide}");
    for (config, fields) in [
        ("eva_config", json!({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}})),
        ("eva_config", json!({"init_lora_weights": "eva", "eva_config": {"tau": 0.9}})),
        (
            "corda_config",
            json!({"init_lora_weights": "corda", "corda_config": {"cache_file": "c"}}),
        ),
        (
            "lora_ga_config",
            json!({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}),
        ),
    ] {
        let said = refused(fields, 1);
        assert!(said.starts_with(&format!("{config}: ")), "{said}");
    }
    let probe = Probe::new(&device());
    let conv =
        Lora { init_lora_weights: "eva".into(), ..Lora::new(2, 2.0, Targets::list(["conv"])) };
    let sites = Sites::of(&probe, None);
    let conv = survey(conv, &sites, &probe).expect("there is no linear place");
    let said = adapt(&sites, &conv, 0, &device()).expect_err("is a convolution");
    assert!(matches!(said, Error::Place { .. }), "{said}");
}

#[test]
fn loftq_is_hf_pefts() {
    let mut golden = open(fixtures().join("inits/loftq/golden.safetensors"));
    let mut take = |name: &str| -> Tensor<2> {
        golden.take::<2>(name, [16, 24], &device()).expect("is in the file").transpose()
    };
    let [weight, quantized, product] = ["weight", "quantized", "product"].map(&mut take);
    // HF PEFT leaves LoRA's scale out.
    for scale in [1.0, 3.0] {
        let (q, (a, b)) = loftq(&weight, 4, scale, 4, |w| integers(w, 3));
        let apart = [
            apart(&values(q), &values(quantized.clone())),
            apart(&values(a.matmul(b) * scale), &values(product.clone())),
        ];
        assert!(apart.iter().all(|apart| *apart < 1e-4), "{scale}: {apart:?}");
    }
}

#[test]
fn places_that_explain_little_are_left_out() {
    let texts = Texts::new(6);
    let mut lora = Lora::new(1, 4.0, Targets::list(["q_proj", "down_proj", "o_proj"]));
    lora.init_lora_weights = "eva".into();
    let sites = texts.sites();
    let known = survey(lora.clone(), &sites, &texts).expect("there is enough data");
    let adapters = adapt(&sites, &known, 0, &device().autodiff()).expect("fits");
    let ranks: Vec<usize> = adapters.iter().map(|(_, a)| a.lora_a.dims()[1]).collect();
    assert_eq!(ranks.iter().sum::<usize>(), 6, "{ranks:?}");
    assert!(ranks.len() < 6 && ranks.contains(&2), "{ranks:?}");
    // The scale of each stays.
    assert!(adapters.iter().all(|(_, adapter)| adapter.scaling == 4.0));
    assert_eq!(known.portable(), known);
}
