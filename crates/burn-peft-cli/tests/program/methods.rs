//! Every method and every backend of the build, through the program.

use crate::{CLASSIFY, classify, far, logits};
use safetensors::SafeTensors;

#[test]
fn a_methods_policy_decides_and_its_file_is_as_small() {
    let desk = classify();
    let line =
        CLASSIFY.replace("--r 4", "--method adalora").replace("query,value", "query,key,value");
    let more = "--method-option init_r=6 --method-option target_r=2 --method-option tfinal=10 --max-steps 60";
    desk.good(&format!("{line} {more} --output-dir /out"));
    let config = desk.json("out/adapter_config.json");
    assert_eq!(config["total_step"], 60);
    let pattern = config["rank_pattern"].as_object().expect("was decided");
    let kept: Vec<usize> = pattern
        .values()
        .map(|mask| {
            mask.as_array().expect("is a mask").iter().filter(|kept| **kept == true).count()
        })
        .collect();
    // Six places with two triplets each on average, and not two everywhere.
    assert_eq!((kept.len(), kept.iter().sum::<usize>()), (6, 12), "{kept:?}");
    assert!(kept.iter().any(|&rank| rank != 2), "{kept:?}");
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let rank = |name: &str| file.tensor(name).expect("is there").shape()[0];
    let names = file.names();
    let ranks = names.iter().filter(|name| name.ends_with("lora_E")).map(|name| rank(name));
    assert_eq!(ranks.sum::<usize>(), 12);
    desk.good("predict --model @models/bert --adapter /out --text w1");
}

/// Backends of this build beside the first.
fn other_devices() -> Vec<&'static str> {
    let all = [
        ("ndarray", cfg!(feature = "ndarray")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[test]
fn every_backend_of_the_build_trains_and_answers_alike() {
    let desk = classify();
    let train = format!("{CLASSIFY} --max-steps 2 --test-file /test.tsv");
    desk.good(&format!("{train} --output-dir /flex"));
    let loss = |name: &str| -> f64 {
        desk.json(&format!("{name}/summary.json"))["after"]["loss"].as_f64().expect("was measured")
    };
    for device in other_devices() {
        desk.good(&format!("{train} --output-dir /{device} --device {device}"));
        // Two steps of Adam blow a rounding of a gradient near zero up to a step of its own.
        let apart = (loss(device) - loss("flex")).abs();
        assert!(apart < 1e-2, "{device} differs by {apart}");
        let forward = "forward --model @models/llama --inputs @models/llama/golden.safetensors";
        desk.good(&format!("{forward} --output /a.safetensors"));
        desk.good(&format!("{forward} --output /b.safetensors --device {device}"));
        let [a, b] = ["a", "b"].map(|n| logits(&desk, &format!("{n}.safetensors")));
        let far = far(&a, &b);
        assert!(far < 1e-4, "{device} differs by {far}");
    }
}

/// Sizes that fit the fixture's layers of 32, where the defaults do not.
fn fitting(method: &str) -> &'static str {
    match method {
        "ADALORA" => "--method-option init_r=6 --method-option target_r=2",
        "ADAPTER_DROP" => {
            "--method-option reduction_factor=4 --method-option drop_layers=1 --method-option robust=true"
        }
        "BOTTLENECK" | "SPARSE_ADAPTER" => "--method-option reduction_factor=4",
        "C3A" => "--method-option block_size=16",
        "COMPACTER" => "--method-option reduction_factor=4 --method-option phm_init_range=0.1",
        "FISHDIP" => "--method-option keep_ratio=0.05 --method-option update_steps=4",
        "FOURIERFT" => "--method-option n_frequency=60",
        "MISS" => "--method-option r=8",
        "MULTI_HEAD_ADAPTER" => "--method-option r=8 --method-option num_heads=4",
        "NOLA" => "--method-option ka=16 --method-option kb=16",
        "PASTA" => "--method-option special_tokens=[1,2]",
        "RANDLORA" => "--method-option r=4 --method-option randlora_alpha=8",
        "ROAD" => "--method-option group_size=16",
        "SAID" => "--method-option intrinsic_dimension=64",
        "SHIRA" => "--method-option r=2",
        "SUPERLORA" => "--method-option r=2",
        "TINY_ATTENTION" => "--method-option heads=2 --method-option head_dim=4",
        "TRAINABLE_TOKENS" => "--method-option token_indices=[1,2,9]",
        "VBLORA" => "--method-option vector_length=16 --method-option num_vectors=8",
        "WARP" => "--method-option transform=false",
        "WAVEFT" => "--method-option n_frequency=60",
        _ => "",
    }
}

/// Places for methods that do not lie over `query` and `value`.
fn places(method: &str) -> &'static str {
    match method {
        "ADAPTER_DROP" | "BOTTLENECK" | "COMPACTER" | "CONVPASS" | "SPARSE_ADAPTER" => "output",
        "INVERTIBLE" => "embeddings",
        "LN_TUNING" => "LayerNorm",
        "PASTA" | "REFT" => r".*layer\.\d+",
        "TINY_ATTENTION" => "attention.output",
        "TRAINABLE_TOKENS" => "word_embeddings",
        _ => "query,value",
    }
}

/// Methods over hidden states that act on activations only, and MoV.
const NOT_MERGED: &[&str] = &[
    "ADAPTER_DROP",
    "BOTTLENECK",
    "COMPACTER",
    "CONVPASS",
    "INVERTIBLE",
    "MOV",
    "PASTA",
    "REFT",
    "SPARSE_ADAPTER",
    "TINY_ATTENTION",
];

/// Methods that have but one place to go, and are refused names of layers.
const ONE_PLACE: &[&str] = &[
    "ADAPTION_PROMPT",
    "APROMPT",
    "APT",
    "CODA",
    "DEPT",
    "IDPG",
    "INFOPROMPT",
    "LPT",
    "MULTI_HEAD_ADAPTER",
    "P_TUNING",
    "PREFIX_PROPAGATION",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "PTP",
    "SELECTIVE_PROMPT_TUNING",
    "SMOP",
    "VPT",
    "WARP",
    "XPROMPT",
];

#[test]
fn every_method_trains_and_is_merged() {
    let desk = classify();
    let line = CLASSIFY.replace("--r 4", "");
    let unknown = desk.run(&format!("{line} --method nonsense --output-dir /out"));
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    let (_, names) = said.split_once("expected one of ").expect("lists the methods");
    let names: Vec<&str> = names.trim().split(", ").collect();
    assert!(names.len() >= 35, "{names:?}");
    for name in names {
        let more = fitting(name);
        let line = match ONE_PLACE.contains(&name) {
            true => line.replace("--target-modules query,value", ""),
            false => line.replace("query,value", places(name)),
        };
        desk.good(&format!(
            "{line} --method {name} {more} --max-steps 12 --test-file /test.tsv --output-dir /{name}"
        ));
        let summary = desk.json(&format!("{name}/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!(loss("after") < loss("before"), "{name}: {summary}");
        let merge =
            format!("merge --model @models/bert --adapter /{name} --output-dir /{name}-merged");
        if ONE_PLACE.contains(&name) || NOT_MERGED.contains(&name) {
            let refused = desk.run(&merge);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success() && said.contains(name), "{name}: {said}");
            assert!(!desk.path(&format!("{name}-merged/config.json")).exists());
            continue;
        }
        desk.good(&merge);
        let forward = "forward --inputs @models/bert/golden.safetensors";
        desk.good(&format!(
            "{forward} --model @models/bert --adapter /{name} --output /a.safetensors"
        ));
        desk.good(&format!("{forward} --model /{name}-merged --output /b.safetensors"));
        let [a, b] = ["a", "b"].map(|n| logits(&desk, &format!("{n}.safetensors")));
        let far = far(&a, &b);
        assert!(far < 1e-4, "{name} merged differs by {far}");
    }
}
