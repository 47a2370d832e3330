//! Bases that are held in half precision.

use crate::{CLASSIFY, Desk, SPEAK, classify, far, logits};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The types of a file's tensors, by their last names.
fn types(desk: &Desk, name: &str) -> Vec<(String, Dtype)> {
    let bytes = desk.bytes(name);
    let file = SafeTensors::deserialize(&bytes).expect("is whole");
    file.iter().map(|(name, tensor)| (name.to_owned(), tensor.dtype())).collect()
}

#[test]
fn a_classifier_is_trained_over_bf16_evaluated_and_merged() {
    let desk = classify();
    let line = CLASSIFY.replace("--r 4", "--r 4 --dtype bfloat16 --num-train-epochs 12");
    desk.good(&format!("{line} --test-file /test.tsv --validation-split 0.2 --output-dir /out"));
    let summary = desk.json("out/summary.json");
    let accuracy = |when: &str| summary[when]["accuracy"].as_f64().expect("was measured");
    assert!(accuracy("after") > accuracy("before") && accuracy("after") > 0.8, "{summary}");
    // What is trained is f32, whatever lies under it.
    let adapter = types(&desk, "out/adapter_model.safetensors");
    assert!(adapter.iter().all(|(_, dtype)| *dtype == Dtype::F32), "{adapter:?}");

    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv --dtype bfloat16";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    assert_eq!(report["accuracy"].as_f64(), Some(accuracy("after")));
    desk.good("merge --model @models/bert --adapter /out --output-dir /merged --dtype bfloat16");
    assert_eq!(desk.json("merged/config.json")["dtype"], "bfloat16");
    for (name, dtype) in types(&desk, "merged/model.safetensors") {
        let matrix = name.ends_with(".weight") && !name.contains("LayerNorm");
        assert_eq!(dtype, if matrix { Dtype::BF16 } else { Dtype::F32 }, "{name}");
    }
    let merged = "eval --model /merged --test-file /test.tsv --dtype bfloat16";
    let merged: Value = serde_json::from_str(&desk.good(merged)).expect("is JSON");
    let loss = |report: &Value| report["loss"].as_f64().expect("was measured");
    // Merging rounds each weight by a share of 2^-9, which moves a loss by some of these.
    assert!((loss(&merged) - loss(&report)).abs() < 0.1, "{merged} {report}");
}

#[test]
fn a_language_model_is_trained_over_f16_and_continues_texts() {
    let desk = Desk::new();
    desk.good(&format!("{SPEAK} --dtype float16 --max-steps 4 --output-dir /out"));
    desk.good("generate --model @models/llama --adapter /out --prompt w3 --max-new-tokens 5 --dtype float16");
    // The base rounded, but near.
    for dtype in ["float32", "float16"] {
        desk.good(&format!(
            "forward --model @models/llama --inputs @models/llama/golden.safetensors --output /{dtype} --dtype {dtype}"
        ));
    }
    let apart = far(&logits(&desk, "float32"), &logits(&desk, "float16"));
    assert!(apart > 0.0 && apart < 0.1, "{apart}");
}
