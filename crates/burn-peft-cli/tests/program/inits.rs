//! Inits that look at training data, through the program.

use crate::{CLASSIFY, Desk, SPEAK, classify, far, logits};
use serde_json::Value;

const EVA: &str = "--init-lora-weights eva --method-option eva_config={\"rho\":2.0}";
const CORDA: &str =
    "--init-lora-weights corda --method-option corda_config={\"corda_method\":\"kpm\"}";
const GA: &str = "--init-lora-weights lora_ga --method-option lora_ga_config={\"stable_gamma\":64}";

#[test]
fn inits_that_look_at_data_train_and_work_on_the_untouched_base() {
    let desk = classify();
    for (name, init, ranks) in [("eva", EVA, "eva"), ("corda", CORDA, "true"), ("ga", GA, "true")] {
        let line = format!("{CLASSIFY} {init} --init-batches 2 --test-file /test.tsv");
        // No step has moved anything yet that counts: the base is as it was.
        desk.good(
            &format!("{line} --max-steps 1 --learning-rate 1e-12 --output-dir /{name}-0").replacen(
                "--learning-rate 1e-2",
                "",
                1,
            ),
        );
        let summary = desk.json(&format!("{name}-0/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!((loss("before") - loss("after")).abs() < 1e-5, "{name}: {summary}");

        desk.good(&format!("{line} --max-steps 12 --output-dir /{name}"));
        let summary = desk.json(&format!("{name}/summary.json"));
        let [before, after] = ["before", "after"].map(|when| summary[when]["loss"].as_f64());
        assert!(after < before, "{name}: {summary}");
        let config = desk.json(&format!("{name}/adapter_config.json"));
        let said = &config["init_lora_weights"];
        assert!(*said == ranks || (*said == Value::Bool(true) && ranks == "true"), "{config}");
        assert_eq!(config["r"], if ranks == "eva" { 4 } else { 8 });

        // The trained adapter is the same function when it is read, and when it is merged.
        let eval = format!("eval --model @models/bert --adapter /{name} --test-file /test.tsv");
        let found: Value = serde_json::from_str(&desk.good(&eval)).expect("is JSON");
        let apart = found["loss"].as_f64().zip(after).map(|(a, b)| (a - b).abs());
        assert!(apart.is_some_and(|apart| apart < 1e-5), "{name}: {found} {summary}");
        desk.good(&format!("merge --model @models/bert --adapter /{name} --output-dir /{name}-m"));
        let forward = "forward --inputs @models/bert/golden.safetensors";
        desk.good(&format!(
            "{forward} --model @models/bert --adapter /{name} --output /a.safetensors"
        ));
        desk.good(&format!("{forward} --model /{name}-m --output /b.safetensors"));
        let [a, b] = ["a", "b"].map(|n| logits(&desk, &format!("{n}.safetensors")));
        let far = far(&a, &b);
        assert!(far < 1e-4, "{name} merged differs by {far}");

        // The same data give the same start.
        desk.good(&format!("{line} --max-steps 12 --output-dir /{name}-again"));
        let tensors = |name: &str| desk.bytes(&format!("{name}/adapter_model.safetensors"));
        assert_eq!(tensors(name), tensors(&format!("{name}-again")), "{name}");
        desk.good(
            &format!("{line} --max-steps 12 --output-dir /{name}-more --overwrite")
                .replace("--init-batches 2", "--init-batches 1"),
        );
        assert_ne!(tensors(name), tensors(&format!("{name}-more")), "{name}");
    }
}

#[test]
fn they_serve_language_models_too() {
    let desk = Desk::new();
    for (name, init) in [("eva", EVA), ("corda", CORDA), ("ga", GA)] {
        let line = format!("{SPEAK} {init} --max-steps 8 --test-file /train.txt");
        desk.good(&format!("{line} --output-dir /{name}"));
        let summary = desk.json(&format!("{name}/summary.json"));
        let [before, after] = ["before", "after"].map(|when| summary[when]["loss"].as_f64());
        assert!(after < before, "{name}: {summary}");
        let eval = format!("eval --model @models/llama --adapter /{name} --test-file /train.txt");
        let found = desk.good(&format!("{eval} --max-length 32"));
        let found: Value = serde_json::from_str(&found).expect("is JSON");
        let apart = found["loss"].as_f64().zip(after).map(|(a, b)| (a - b).abs());
        assert!(apart.is_some_and(|apart| apart < 1e-4), "{name}: {found} {summary}");
    }
}

#[cfg(unix)]
#[test]
fn a_resumed_run_begins_where_the_first_began() {
    crate::interrupted(&format!("{CLASSIFY} {GA} {}", crate::LONG), "--init-batches 3");
}
