//! Methods of several families that are trained together, through the program.

use crate::{CLASSIFY, Desk, classify, far, logits};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const BOTTLENECK: &str =
    r#"{"peft_type":"BOTTLENECK","target_modules":["output"],"reduction_factor":4}"#;
const PREFIX: &str = r#"{"peft_type":"PREFIX_TUNING","num_virtual_tokens":4}"#;

fn tensors(desk: &Desk, name: &str) -> BTreeMap<String, Vec<u8>> {
    let bytes = desk.bytes(&format!("{name}/adapter_model.safetensors"));
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    file.tensors().into_iter().map(|(name, tensor)| (name, tensor.data().to_vec())).collect()
}

fn forward(desk: &Desk, adapters: &str) -> Vec<f32> {
    let inputs = "--inputs @models/bert/golden.safetensors --output /o.safetensors";
    desk.good(&format!("forward --model @models/bert {adapters} {inputs}"));
    logits(desk, "o.safetensors")
}

#[test]
fn lora_bottleneck_and_prefix_learn_together() {
    let desk = classify();
    let line = format!("{CLASSIFY} --also {BOTTLENECK} --also {PREFIX} --test-file /test.tsv");
    desk.good(&format!("{line} --num-train-epochs 8 --output-dir /out"));
    let summary = desk.json("out/summary.json");
    let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
    assert!(loss("after") < 0.8 * loss("before"), "{summary}");
    assert_eq!(desk.json("out/adapters.json"), json!(["lora", "bottleneck", "prefix_tuning"]));
    assert!(!desk.path("out/adapter_config.json").exists());
    assert_eq!(desk.json("out/bottleneck/adapter_config.json")["reduction_factor"], 4.0);

    // Against a run that hardly moves: every tensor of every part was trained.
    let still = line.replace("--learning-rate 1e-2", "--learning-rate 1e-12");
    desk.good(&format!("{still} --max-steps 1 --output-dir /still"));
    for part in ["lora", "bottleneck", "prefix_tuning"] {
        let (out, still) =
            (tensors(&desk, &format!("out/{part}")), tensors(&desk, &format!("still/{part}")));
        assert_eq!(out.len(), still.len());
        for (name, data) in &out {
            assert_ne!(data, &still[name], "{part} {name}");
        }
    }

    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    let far = (report["loss"].as_f64().expect("was measured") - loss("after")).abs();
    assert!(far < 1e-4, "{report}, {summary}");
    assert!(desk.good("predict --model @models/bert --adapter /out --text w1").contains("class"));
    let told = desk.good("inspect /out");
    for name in ["\"LORA\"", "\"BOTTLENECK\"", "\"PREFIX_TUNING\""] {
        assert!(told.contains(name), "{told}");
    }
    // The folder is what its parts are, one after the other.
    let whole = forward(&desk, "--adapter /out");
    let parts = "--adapter /out/lora --adapter /out/bottleneck --adapter /out/prefix_tuning";
    assert_eq!(forward(&desk, parts), whole);
    assert_ne!(forward(&desk, "--adapter /out/lora"), whole);

    // One replaces several, and the other way round.
    desk.good(&format!("{CLASSIFY} --max-steps 1 --output-dir /out --overwrite"));
    assert!(!desk.path("out/adapters.json").exists());
    assert_ne!(forward(&desk, "--adapter /out"), whole);
    desk.good(&format!("{line} --max-steps 1 --output-dir /out --overwrite"));
    assert!(!desk.path("out/adapter_config.json").exists());
    assert_eq!(desk.json("out/adapters.json").as_array().map(Vec::len), Some(3));
}

#[test]
fn several_of_one_method_by_flags_and_by_a_file() {
    let desk = classify();
    let dense = r#"{"peft_type":"LORA","target_modules":["dense"],"r":2}"#;
    let line = format!("{CLASSIFY} --also {dense} --lora-dropout 0.1 --max-steps 12");
    desk.good(&format!("{line} --output-dir /out"));
    assert_eq!(desk.json("out/adapters.json"), json!(["lora", "lora-2"]));
    desk.good("merge --model @models/bert --adapter /out --output-dir /merged");
    let merged = {
        let inputs = "--inputs @models/bert/golden.safetensors --output /m.safetensors";
        desk.good(&format!("forward --model /merged {inputs}"));
        logits(&desk, "m.safetensors")
    };
    let whole = forward(&desk, "--adapter /out");
    let far = far(&whole, &merged);
    assert!(far < 1e-4, "merged differs by {far}");
    desk.write("run.toml", "[[also]]\npeft_type = \"LORA\"\ntarget_modules = [\"dense\"]\nr = 2\n");
    let line = format!("{CLASSIFY} --config /run.toml --lora-dropout 0.1 --max-steps 12");
    desk.good(&format!("{line} --output-dir /toml"));
    for part in ["lora", "lora-2"] {
        assert_eq!(tensors(&desk, &format!("toml/{part}")), tensors(&desk, &format!("out/{part}")));
    }
}

#[test]
fn what_cannot_be_trained_together_is_refused() {
    let desk = classify();
    for (also, says) in [
        ("nonsense", "expected a JSON object"),
        (r#"{"r":4}"#, "has no peft_type"),
        (r#"{"peft_type":"NONSENSE"}"#, "expected one of LORA"),
        (r#"{"peft_type":"LORA","rank":4}"#, "has no option `rank`"),
        (r#"{"peft_type":"LORA","r":0,"target_modules":["dense"]}"#, "expected 1 or more"),
        (
            r#"{"peft_type":"LORA","target_modules":["dense"],"modules_to_save":["classifier"]}"#,
            "classifier: LORA and LORA both train it itself",
        ),
    ] {
        let output = desk.run(&format!("{CLASSIFY} --also {also} --output-dir /no"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(says), "{also}: {said}");
        assert!(!said.contains("panicked") && !desk.path("no/adapters.json").exists(), "{said}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_of_several_goes_on_to_the_same_numbers() {
    // With a policy's state, and two parts that draw dropout.
    let ranks = "--method adalora --method-option init_r=5 --method-option target_r=2";
    let line = format!("{CLASSIFY} {}", crate::LONG).replace("--r 4", ranks);
    let also = BOTTLENECK.replace('}', r#","dropout":0.1}"#);
    let line = format!("{line} --also {also}");
    crate::interrupted_in(&line, "--lora-alpha 3", &["adalora/", "bottleneck/"]);
}
