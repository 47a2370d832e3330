//! What stands in front of a sequence, through the program.

use crate::{CLASSIFY, Desk, SPEAK, classify, logits};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Options of each method that fit the small models.
const METHODS: &[&str] = &[
    "prompt_tuning --method-option num_virtual_tokens=6",
    "prompt_tuning --method-option num_virtual_tokens=4 --method-option prompt_tuning_init=SAMPLE_VOCAB",
    "p_tuning --method-option num_virtual_tokens=6 --method-option encoder_hidden_size=16",
    "p_tuning --method-option num_virtual_tokens=4 --method-option encoder_reparameterization_type=LSTM \
     --method-option encoder_dropout=0.1",
    "prefix_tuning --method-option num_virtual_tokens=6",
    "prefix_tuning --method-option num_virtual_tokens=4 --method-option prefix_projection=true",
    "dept --method-option num_virtual_tokens=4 --method-option max_length=20 --loraplus-lr-ratio 4",
    "adaption_prompt --method-option adapter_len=4",
    "xprompt --method-option num_virtual_tokens=6 --method-option num_pieces=8",
    "ptp --method-option num_virtual_tokens=6 --method-option adversarial_weight=0.5",
];

fn without_targets(line: &str) -> String {
    line.replace("--target-modules query,value", "")
        .replace("--target-modules all-linear", "")
        .replace("--r 4", "")
}

fn refused(desk: &Desk, line: &str, says: &str) {
    let output = desk.run(line);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(says), "{line}: {said}");
    assert!(!said.contains("panicked"), "{line}: {said}");
}

#[test]
fn they_learn_to_classify_and_are_what_they_were_after_reading() {
    let desk = classify();
    for (index, method) in METHODS.iter().enumerate() {
        let line = without_targets(CLASSIFY);
        desk.good(&format!(
            "{line} --method {method} --num-train-epochs 12 --test-file /test.tsv --output-dir /{index}"
        ));
        let summary = desk.json(&format!("{index}/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!(loss("after") < 0.8 * loss("before"), "{method}: {summary}");
        let eval = format!("eval --model @models/bert --adapter /{index} --test-file /test.tsv");
        let report: Value = serde_json::from_str(&desk.good(&eval)).expect("is JSON");
        let far = (report["loss"].as_f64().expect("was measured") - loss("after")).abs();
        assert!(far < 1e-4, "{method}: {report}, {summary}");
        let told = desk.good(&format!("predict --model @models/bert --adapter /{index} --text w1"));
        assert!(told.contains("class"), "{told}");
    }
    // The network that made it is left out, and the head goes along.
    let bytes = desk.bytes("5/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let mut names = file.names();
    names.sort();
    assert_eq!(
        names,
        ["base_model.classifier.bias", "base_model.classifier.weight", "prompt_embeddings"]
    );
    assert_eq!(file.tensor("prompt_embeddings").expect("is there").shape(), [4, 128]);
    let told = desk.good("inspect /5");
    assert!(
        told.contains("\"PREFIX_TUNING\"") && told.contains("prompt_embeddings [4, 128]"),
        "{told}"
    );
    for verb in ["merge", "convert --rank 2"] {
        let line = format!("{verb} --model @models/bert --adapter /5 --output-dir /out");
        refused(&desk, &line, "PREFIX_TUNING");
    }
}

#[test]
fn they_learn_to_speak_with_packing_and_without() {
    let desk = Desk::new();
    for (index, method) in METHODS.iter().enumerate() {
        let packing = if index % 2 == 0 { "--packing" } else { "" };
        let line = without_targets(SPEAK).replace("1e-2", "5e-2");
        desk.good(&format!(
            "{line} --method {method} {packing} --num-train-epochs 6 --test-file /train.txt \
             --output-dir /{index}"
        ));
        let summary = desk.json(&format!("{index}/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!(loss("after") < 0.99 * loss("before"), "{method}: {summary}");
        let ask = format!(
            "generate --model @models/llama --adapter /{index} --prompt w1 --max-new-tokens 6"
        );
        assert!(!desk.good(&ask).trim().is_empty());
        let eval = format!(
            "eval --model @models/llama --adapter /{index} --test-file /train.txt --max-length 32"
        );
        assert!(desk.good(&eval).contains("perplexity"));
    }
    assert_eq!(desk.json("7/adapter_config.json")["adapter_layers"], 2);
    // A prompt and a prefix at once, and each of them alone.
    let forward = |adapters: &str| {
        let inputs = "--inputs @models/llama/golden.safetensors --output /o.safetensors";
        desk.good(&format!("forward --model @models/llama {adapters} {inputs}"));
        logits(&desk, "o.safetensors")
    };
    let (prompt, prefix) = (forward("--adapter /0"), forward("--adapter /4"));
    let both = forward("--adapter /0 --adapter /4");
    assert_eq!(both.len(), prompt.len());
    assert!(both != prompt && both != prefix);
}

#[test]
fn a_text_is_tokenized_and_named_in_the_file() {
    let desk = classify();
    let line = without_targets(CLASSIFY);
    let text = "--method prompt_tuning --method-option prompt_tuning_init=TEXT \
                --method-option prompt_tuning_init_text=w3 --method-option num_virtual_tokens=5";
    desk.good(&format!("{line} {text} --max-steps 2 --output-dir /out"));
    let config = desk.json("out/adapter_config.json");
    assert_eq!(config["prompt_tuning_init"], "TEXT");
    assert!(config["tokenizer_name_or_path"].as_str().is_some_and(|path| path.ends_with("bert")));
    assert_eq!(config["num_virtual_tokens"], 5);
    assert_eq!(config["modules_to_save"], json!(["classifier"]));
    refused(
        &desk,
        &format!("{line} {text} --method-option tokenizer_name_or_path=nowhere --output-dir /no"),
        "nowhere",
    );
}

/// The block that a search kept is the file's, which is the function that was trained.
#[test]
fn a_search_of_blocks_ends_in_the_file() {
    let desk = classify();
    let line = format!("{} --method selective_prompt_tuning", without_targets(CLASSIFY));
    let search = "--method-option search_steps=20 --max-steps 60 --test-file /test.tsv";
    desk.good(&format!("{line} {search} --output-dir /out"));
    let summary = desk.json("out/summary.json");
    let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
    assert!(loss("after") < loss("before"), "{summary}");
    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    let far = (report["loss"].as_f64().expect("was measured") - loss("after")).abs();
    assert!(far < 1e-5, "{report}, {summary}");
    // Half of two blocks, without their gates.
    let layers = desk.json("out/adapter_config.json")["prompt_layers"].clone();
    assert!(layers == json!([0]) || layers == json!([1]), "{layers}");
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let down = file.tensor("base_model.model.bert.encoder.layer.generators_down");
    assert_eq!(down.expect("is there").shape(), [1, 32, 128]);
    assert!(!file.names().iter().any(|name| name.contains("gates")));
    // With blocks that are given nothing is searched.
    let given = format!("--method-option prompt_layers={layers} --max-steps 2 --output-dir /given");
    desk.good(&format!("{line} {given}"));
    assert_eq!(desk.json("given/adapter_config.json")["prompt_layers"], layers);
}

/// What InfoPrompt trains beside its prompt is in no file, and the file is the function that was trained.
#[test]
fn scores_of_information_end_with_the_training() {
    let desk = classify();
    let line = format!("{} --method infoprompt", without_targets(CLASSIFY));
    desk.good(&format!("{line} --num-train-epochs 12 --test-file /test.tsv --output-dir /out"));
    let summary = desk.json("out/summary.json");
    let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
    assert!(loss("after") < 0.8 * loss("before"), "{summary}");
    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    let far = (report["loss"].as_f64().expect("was measured") - loss("after")).abs();
    assert!(far < 1e-5, "{report}, {summary}");
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    assert_eq!(file.names().len(), 3, "{:?}", file.names());
    assert_eq!(file.tensor("prompt_embeddings").expect("is there").shape(), [20, 32]);
    let speak = without_targets(crate::SPEAK);
    refused(&desk, &format!("{speak} --method infoprompt --output-dir /no"), "beta");
}

#[cfg(unix)]
mod resumed {
    use super::without_targets;
    use crate::{CLASSIFY, LONG, interrupted};

    fn check(method: &str, other: &str) {
        let line = without_targets(&format!("{CLASSIFY} {LONG}"));
        let line = line.replace("--lora-dropout 0.2", "");
        interrupted(&format!("{line} --method {method}"), &format!("--method-option {other}"));
    }

    #[test]
    fn ptp_shakes_and_pushes_words_the_same_again() {
        check(
            "ptp --method-option adversarial_weight=0.5 --method-option adversarial_steps=1 \
             --method-option sigma=0.02 --method-option num_virtual_tokens=4",
            "adversarial_rate=0.1",
        );
    }

    #[test]
    fn infoprompt_draws_its_negatives_the_same_again() {
        check("infoprompt --method-option num_virtual_tokens=4", "gamma=0.3");
    }
}

/// Prompts and a vector for each class are all that is trained and stored: the checkpoint has no head, and needs none.
#[test]
fn a_class_is_read_at_a_mask() {
    let desk = classify();
    let line = without_targets(CLASSIFY).replace("@models/bert", "@models/bert-mlm");
    let warp = format!("{line} --method warp");
    let more = "--num-train-epochs 12 --test-file /test.tsv";
    for (name, also) in [
        ("alone", ""),
        ("with", r#"--also {"peft_type":"LN_TUNING","target_modules":["LayerNorm"]}"#),
    ] {
        desk.good(&format!("{warp} {also} {more} --output-dir /{name}"));
        let summary = desk.json(&format!("{name}/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!(loss("after") < 0.8 * loss("before"), "{name}: {summary}");
        let with = format!("--model @models/bert-mlm --adapter /{name}");
        let report = desk.good(&format!("eval {with} --test-file /test.tsv"));
        let report: Value = serde_json::from_str(&report).expect("is JSON");
        let far = (report["loss"].as_f64().expect("was measured") - loss("after")).abs();
        assert!(far < 1e-4, "{name}: {report}, {summary}");
        let told = desk.good(&format!("predict {with} --text w1"));
        assert!(told.contains("class"), "{told}");
    }
    let bytes = desk.bytes("alone/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let mut names = file.names();
    names.sort();
    assert_eq!(names, ["base_model.classifier.weight", "prompt_embeddings"]);
    let shape = |name: &str| file.tensor(name).expect("is there").shape().to_vec();
    assert_eq!([shape(names[0]), shape(names[1])], [[3, 32], [8, 32]]);
    assert_eq!(desk.json("alone/summary.json")["trainable_parameters"], json!((3 + 8) * 32));

    refused(&desk, "predict --model @models/bert-mlm --text w1", "no --adapter brings it");
    let plain = "predict --model @models/bert --adapter /alone --text w1";
    refused(&desk, plain, "cls.predictions.transform.dense.weight");
    let merge = "merge --model @models/bert-mlm --adapter /alone --output-dir /merged";
    refused(&desk, merge, "WARP");
    let plain = without_targets(CLASSIFY);
    refused(&desk, &format!("{plain} --method warp --output-dir /no"), "transform = false");
    let saved = format!("{warp} --modules-to-save classifier --output-dir /no");
    refused(&desk, &saved, "modules_to_save");
    let behind = r#"--method ln_tuning --target-modules LayerNorm --also {"peft_type":"WARP"}"#;
    refused(&desk, &format!("{line} {behind} --output-dir /no"), "give WARP as --method");
    let speak = without_targets(SPEAK);
    let speak = format!("{speak} --method warp --output-dir /no");
    desk.write("train.txt", "w1 w2 w3\n\nw4 w5\n");
    refused(&desk, &speak, "[MASK]");
}

#[test]
fn what_cannot_work_is_refused() {
    let desk = classify();
    let line = without_targets(CLASSIFY);
    for (more, says) in [
        ("--method prompt_tuning --target-modules query", "has no option `target_modules`"),
        ("--method prefix_tuning --layers-to-transform 1", "has no option `layers_to_transform`"),
        ("--method prompt_tuning --method-option num_virtual_tokens=0", "num_virtual_tokens"),
        (
            "--method prompt_tuning --method-option prompt_tuning_init=TEXT",
            "prompt_tuning_init_text",
        ),
        ("--method prompt_tuning --method-option prompt_tuning_init=POEM", "prompt_tuning_init"),
        // 40 positions in all.
        (
            "--method prompt_tuning --method-option num_virtual_tokens=38",
            "behind 38 virtual tokens",
        ),
        (
            "--method prefix_tuning --method-option num_virtual_tokens=38",
            "behind 38 virtual tokens",
        ),
        ("--method prefix_tuning --method-option token_dim=7", "token_dim"),
        ("--method prefix_tuning --method-option init_weights=one", "init_weights"),
        ("--method p_tuning --method-option encoder_dropout=2", "encoder_dropout"),
        ("--method adaption_prompt --method-option adapter_layers=3", "adapter_layers"),
        ("--method adaption_prompt --target-modules self_atn", "`self_atn`"),
    ] {
        refused(&desk, &format!("{line} {more} --output-dir /out"), says);
    }
}
