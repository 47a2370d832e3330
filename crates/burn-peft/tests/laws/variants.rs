//! What is particular to LoRA's variants; the laws hold them to the rest.

use crate::hf::{base, device, fixtures, floats, kept, near, open, tokens};
use crate::probe::{Drawn, Probe, close, ids, values};
use burn::linalg::svd;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::core::{
    Adapters, Error, Folds, Method, Scope, Sites, Targets, adapt, attach, load, merge,
};
use burn_peft::models::{KvCache, LlamaForCausalLM, Pretrained, Tokens};
use burn_peft::reparam::{
    ArrowConfig, BdLoraConfig, KasaConfig, Lora, LoraAdapter, LoraVariants, MontecloraConfig, Rank,
    VeloraConfig, VeloraInit, arrow, convert,
};

fn invoked(tokens: &[u32]) -> LoraVariants {
    LoraVariants { alora_invocation_tokens: Some(tokens.to_vec()), ..LoraVariants::default() }
}

fn lora(variants: LoraVariants) -> Lora {
    Lora { variants, ..Lora::new(4, 8.0, Targets::list(["query"])) }
}

fn refused(lora: &Lora, says: &str) {
    let sites = Sites::of(&Probe::new(&device()), Some("head"));
    let said = adapt(&sites, lora, 0, &device()).expect_err("cannot work").to_string();
    assert!(said.starts_with(says), "expected {says}\n{said}");
}

#[test]
fn what_cannot_work_is_refused_by_its_field() {
    let none = LoraVariants::default;
    let kasa = |config| LoraVariants { kasa_config: Some(config), ..none() };
    let plain_kasa = || kasa(KasaConfig::default());
    for (beta, gamma, field) in [(-1.0, 0.0, "beta"), (0.0, f64::NAN, "gamma")] {
        let config = KasaConfig { beta, gamma };
        refused(&lora(kasa(config)), &format!("kasa_config: {field}: expected 0 or more"));
    }
    refused(&Lora { r: 8, ..lora(plain_kasa()) }, "r: is 8 and query has 8 directions");
    refused(
        &Lora { use_dora: true, ..lora(plain_kasa()) },
        "kasa_config: does not work with use_dora",
    );
    for init in ["mica", "pissa", "olora"] {
        let begun = Lora { init_lora_weights: init.into(), ..lora(plain_kasa()) };
        refused(&begun, "kasa_config: does not work with every init_lora_weights");
    }

    let words = |word: &str| Some(vec![word.to_owned()]);
    let bd = |config| LoraVariants { use_bdlora: Some(config), ..none() };
    let cut = |nblocks, r| Lora {
        r,
        ..lora(bd(BdLoraConfig {
            target_modules_bd_a: words("query"),
            nblocks,
            ..BdLoraConfig::default()
        }))
    };
    refused(&cut(0, 4), "use_bdlora: nblocks: expected 1 or more");
    refused(&cut(3, 4), "use_bdlora: nblocks: expected a divisor of the rank 4");
    refused(
        &cut(3, 3),
        "use_bdlora: nblocks: expected a divisor of the rank 3 and of the 8 inputs of query",
    );
    refused(&lora(bd(BdLoraConfig::default())), "use_bdlora: neither target_modules_bd_a nor");
    let [a, b] = ["query", "que"].map(words);
    let both = BdLoraConfig {
        target_modules_bd_a: a.clone(),
        target_modules_bd_b: b,
        ..BdLoraConfig::default()
    };
    refused(
        &lora(bd(both.clone())),
        "use_bdlora: target_modules_bd_a and target_modules_bd_b both mean query",
    );
    refused(
        &lora(bd(BdLoraConfig { target_modules_bd_b: a, ..both })),
        "use_bdlora: `query` is in",
    );
    refused(&Lora { lora_bias: true, ..cut(2, 4) }, "lora_bias: ");

    refused(&lora(invoked(&[])), "alora_invocation_tokens: expected the tokens");
    refused(
        &lora(invoked(&[3, 11])),
        "alora_invocation_tokens: expected tokens below 11, found 11",
    );
    let head = Lora { targets: Targets::list(["head"]), ..lora(invoked(&[3])) };
    refused(&head, "head: alora_invocation_tokens: the output layer");

    let pooled = |group| LoraVariants { use_qalora: true, qalora_group_size: group, ..none() };
    refused(&lora(pooled(0)), "qalora_group_size: ");
    refused(
        &lora(pooled(3)),
        "qalora_group_size: expected a divisor of the 8 inputs of query, found 3",
    );
    let two = LoraVariants { use_qalora: true, ..plain_kasa() };
    refused(&lora(two), "use_qalora: does not work with kasa_config");

    let monte = |config| LoraVariants { monteclora_config: Some(config), ..none() };
    let plain = MontecloraConfig::default;
    for (config, says) in [
        (MontecloraConfig { num_samples: 0, ..plain() }, "num_samples: expected 1"),
        (MontecloraConfig { buffer_size: 0, ..plain() }, "buffer_size: expected 1"),
        (MontecloraConfig { dirichlet_prior: 0.0, ..plain() }, "dirichlet_prior: expected more"),
        (
            MontecloraConfig { sample_scaler: f64::NAN, ..plain() },
            "sample_scaler: expected a finite",
        ),
    ] {
        refused(&lora(monte(config)), &format!("monteclora_config: {says}"));
    }
    let velora = |config| LoraVariants { velora_config: Some(config), ..none() };
    let plain = VeloraConfig::default;
    for (config, says) in [
        (VeloraConfig { num_groups: 0, ..plain() }, "num_groups: expected 1"),
        (VeloraConfig { scale: 0.0, ..plain() }, "scale: expected more than 0"),
        (VeloraConfig { init_type: VeloraInit::BatchAverageOnce, ..plain() }, "init_type: "),
    ] {
        refused(&lora(velora(config)), &format!("velora_config: {says}"));
    }
    for targets in ["words", "conv", "image"] {
        let elsewhere = Lora { targets: Targets::list([targets]), ..lora(plain_kasa()) };
        refused(&elsewhere, &format!("{targets}: kasa_config: works on linear layers only"));
    }
}

#[test]
fn kasa_leaves_out_the_smallest_directions_and_penalises_its_form() {
    let model = Probe::new(&device());
    let sites = Sites::of(&model, Some("head"));
    let config = KasaConfig { beta: 0.5, gamma: 0.25 };
    let method = lora(LoraVariants { kasa_config: Some(config), ..LoraVariants::default() });
    let fresh = adapt(&sites, &method, 0, &device()).expect("fits");
    let w = sites.get("query").and_then(|site| site.matrix()).expect("is a matrix");
    let cut = w.clone() + fresh.fold_weight("query", &w).expect("changes");
    let sizes = |w: Tensor<2>| values(svd::<2, 1>(w, 300).1);
    let (before, after) = (sizes(w), sizes(cut));
    close(&after[..4], &before[..4], "the largest stay");
    close(&after[4..], &[0.0; 4], "the smallest go");

    let drawn = fresh.map(&mut Drawn::new(3, 0.7));
    let adapter = drawn.get("query").expect("is there");
    let numbers = |t: Tensor<2>| -> Vec<f64> { t.into_data().iter::<f64>().collect() };
    let off = |gram: Tensor<2>| {
        let identity = Tensor::<2>::eye(4, &gram.device());
        numbers(gram - identity).iter().map(|v| v * v).sum::<f64>().sqrt()
    };
    let a = adapter.lora_a.val();
    let b = adapter.lora_b.as_ref().expect("is trained").val();
    let tensors = method.tensors(sites.get("query").expect("is there"), adapter);
    let (_, diagonal) = tensors.iter().find(|(name, _)| *name == "lora_diag").expect("is stored");
    let squares: f64 = diagonal.iter::<f64>().map(|d| d * d).sum();
    let expected = 0.5 * squares
        + 0.25 * (off(a.clone().transpose().matmul(a)) + off(b.clone().matmul(b.transpose())));
    assert!(method.has_penalty());
    let found = values(method.penalty(&drawn).expect("has one"))[0];
    close(&[found], &[expected as f32], "penalty");
}

#[test]
fn alora_acts_from_the_last_invocation_on() {
    let model = Probe::new(&device());
    let sites = Sites::of(&model, Some("head"));
    let ids = ids(&device());
    let trained = |tokens: &[u32]| -> Adapters<LoraAdapter> {
        let method = lora(invoked(tokens));
        adapt(&sites, &method, 0, &device()).expect("fits").map(&mut Drawn::new(3, 0.7))
    };
    let forward = |cx: &Scope<'_>| values(model.forward(&ids, cx));
    // [3, 0] stands in every row, [10] in none.
    let plain = forward(&Scope::plain());
    assert_eq!(forward(&Scope::new(&trained(&[10]))), plain);
    assert_ne!(forward(&Scope::new(&trained(&[3, 0]))), plain);

    let adapters = trained(&[3, 0]);
    let refused = |error: Error| {
        let said = error.to_string();
        assert!(said.starts_with("query: alora_invocation_tokens: "), "{said}");
    };
    refused(merge(&model, &[(&adapters, 1.0)]).expect_err("is no weight"));
    refused(attach(model.clone(), &adapters).expect_err("is no weight"));
    refused(convert(&sites, &adapters, Rank::At(2)).expect_err("is no weight"));
    let adapter = adapters.get("query").expect("is there");
    assert!(Lora::fold(adapter).is_none());
}

#[test]
fn alora_of_a_causal_model() {
    let base: LlamaForCausalLM = base("llama");
    let sites = Sites::of(&base, Some(LlamaForCausalLM::OUTPUT));
    let folder = fixtures().join("methods/alora-llama");
    let (_, adapters) = load::<Lora>(&folder, &sites, &device()).expect("is whole");
    let cx = Scope::new(&adapters);
    // The token 45 stands in columns 3 and 8 of the first row, in none of the second, in 7 of the third.
    let tokens = tokens("llama", false);
    let [adapted, plain] = [&cx, &Scope::plain()].map(|cx| values(base.forward(&tokens, cx)));
    let width = adapted.len() / tokens.ids.len();
    for (at, (a, b)) in adapted.chunks(width).zip(plain.chunks(width)).enumerate() {
        let (row, column) = (at / tokens.seq, at % tokens.seq);
        let on = (row == 0 && column >= 8) || (row == 2 && column >= 7);
        // What padding sees means nothing.
        let counts = tokens.mask[at] == 1;
        assert!(!counts || (a != b) == on, "row {row}, column {column}");
    }

    // What was read before is remembered: in two passes it is what it is in one.
    let all = [1, 17, 45, 33, 5, 60];
    let whole = values(base.hidden(&Tokens::row(&all), &cx, None));
    for cut in 1..all.len() {
        let mut cache = KvCache::default();
        let parts = [&all[..cut], &all[cut..]]
            .map(|part| values(base.hidden(&Tokens::row(part), &cx, Some(&mut cache))));
        near(&parts.concat(), &whole, &format!("cut at {cut}"));
    }
}

#[test]
fn arrow_routes_as_in_hf_peft() {
    let base: LlamaForCausalLM = base("llama");
    let sites = Sites::of(&base, Some(LlamaForCausalLM::OUTPUT));
    let folder = fixtures().join("arrow");
    let read = |part: &str| -> Adapters<LoraAdapter> {
        load::<Lora>(&folder.join(part), &sites, &device()).expect("is whole").1
    };
    let tasks = ["task0", "task1", "task2"].map(read);
    let general = ["general0", "general1"].map(read);
    let (tasks, general): (Vec<_>, Vec<_>) = (tasks.iter().collect(), general.iter().collect());
    let seeded = ArrowConfig { rng_seed: Some(7), ..ArrowConfig::default() };
    let tokens = tokens("llama", false);
    let mut golden = open(folder.join("golden.safetensors"));
    for (case, config) in [
        ("two", ArrowConfig { top_k: 2, router_temperature: 0.3, ..seeded.clone() }),
        ("one", ArrowConfig { top_k: 1, ..seeded.clone() }),
        ("known", ArrowConfig { top_k: 2, use_gks: true, ..seeded.clone() }),
    ] {
        let known = if config.use_gks { &general[..] } else { &[] };
        let routed = arrow(&tasks, known, &config).expect("are of one kind");
        let found = values(base.forward(&tokens, &Scope::new(&routed)));
        let expected = floats(&mut golden, case);
        near(&kept(&found, &tokens), &kept(&expected, &tokens), case);
    }

    let refused = |tasks: &[&Adapters<LoraAdapter>], config: ArrowConfig, says: &str| {
        let said = arrow(tasks, &[], &config).expect_err("cannot route").to_string();
        assert!(said.starts_with(says), "expected {says}\n{said}");
    };
    refused(&tasks, ArrowConfig { top_k: 0, ..seeded.clone() }, "top_k: expected 1 or more");
    refused(&tasks, ArrowConfig { top_k: 4, ..seeded.clone() }, "top_k: expected at most 3");
    refused(&[], seeded.clone(), "top_k: expected at most 0");
    let cold = ArrowConfig { router_temperature: 0.0, ..seeded.clone() };
    refused(&tasks, cold, "router_temperature: expected more than 0");
    refused(&tasks, ArrowConfig { use_gks: true, ..seeded.clone() }, "use_gks: goes with");
    let of = |lora: Lora| adapt(&sites, &lora, 0, &device()).expect("fits");
    let places = Targets::list(["q_proj", "down_proj"]);
    let path = "model.layers.0.mlp.down_proj: ";
    for (other, says) in [
        (Lora::new(3, 4.0, Targets::list(["q_proj"])), "one adapter lies here"),
        (Lora::new(2, 4.0, places.clone()), "expected factors of one rank"),
        (Lora { use_dora: true, ..Lora::new(3, 4.0, places) }, "the adapter is more than s·A·B"),
    ] {
        let other = of(other);
        refused(&[tasks[0], tasks[1], &other], seeded.clone(), &format!("{path}{says}"));
    }
}
