//! Methods with a mask, through the program.

use crate::{CLASSIFY, Desk, classify};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;

fn tensors(bytes: &[u8]) -> BTreeMap<String, TensorView<'_>> {
    let file = SafeTensors::deserialize(bytes).expect("is a safetensors file");
    file.tensors().into_iter().collect()
}

fn words(tensor: &TensorView<'_>) -> Vec<u32> {
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("has four bytes"));
    tensor.data().chunks(4).map(word).collect()
}

/// The adapter of that name is merged, and the numbers that changed are those of its mask.
fn merged_is_the_mask(desk: &Desk, name: &str) -> usize {
    desk.good(&format!("merge --model @models/bert --adapter /{name} --output-dir /{name}-m"));
    let base =
        std::fs::read(crate::fixture("models/bert/model.safetensors")).expect("is committed");
    let merged = desk.bytes(&format!("{name}-m/model.safetensors"));
    let adapter = desk.bytes(&format!("{name}/adapter_model.safetensors"));
    let (base, merged, adapter) = (tensors(&base), tensors(&merged), tensors(&adapter));
    let mut count = 0;
    for (parameter, before) in &base {
        if parameter.starts_with("classifier.") {
            continue; // trained whole
        }
        let after = words(&merged[parameter]);
        let changed: Vec<u32> = (0..)
            .zip(words(before).into_iter().zip(after))
            .filter(|(_, (before, after))| before != after)
            .map(|(at, _)| at)
            .collect();
        let indices = adapter.get(&format!("base_model.model.{parameter}.indices"));
        let chosen = indices.map(words).unwrap_or_default();
        assert_eq!(changed, chosen, "{name} {parameter}");
        count += chosen.len();
    }
    count
}

#[test]
fn a_merged_model_has_changed_where_the_mask_is_and_nowhere_else() {
    // Of queries and values of two blocks, each 32·32 + 32 numbers.
    let line = format!("{CLASSIFY} --max-steps 12 --init-batches 4 --test-file /test.tsv");
    let line = line.replace("--r 4", "");
    for (name, more, chosen) in [
        ("fishmask", "--method-option keep_ratio=0.05", 211),
        ("sam", "--method-option keep_ratio=0.05 --method-option hessian=fisher", 211),
        ("ltsft", "--method-option keep_ratio=0.1 --method-option full_epochs=2", 422),
        ("pafi", "--method-option keep_ratio=0.05", 4 * (51 + 1)),
        ("far", "--method-option keep_ratio=0.25", 32 * 33),
        ("childtuning", "--method-option mode=ChildTuning-D", 1267),
        ("usbitfit", "", 64),
    ] {
        let desk = classify();
        desk.good(&format!("{line} --method {name} {more} --output-dir /{name}"));
        let summary = desk.json(&format!("{name}/summary.json"));
        // Three classes' weights and biases beside.
        assert_eq!(summary["trainable_parameters"], chosen + 3 * 33, "{name}");
        assert_eq!(merged_is_the_mask(&desk, name), chosen, "{name}");
        // The same data choose the same numbers, and others others.
        desk.good(&format!("{line} --method {name} {more} --output-dir /again"));
        let bytes = |name: &str| desk.bytes(&format!("{name}/adapter_model.safetensors"));
        assert_eq!(bytes(name), bytes("again"), "{name}");
    }
}

#[test]
fn a_drawn_child_is_another_than_the_whole() {
    let desk = classify();
    let line = format!("{CLASSIFY} --max-steps 12").replace("--r 4", "--method childtuning");
    let free = "--method-option mode=ChildTuning-F";
    for (name, more) in [("a", "keep_ratio=1.0"), ("b", "keep_ratio=0.3"), ("c", "mask_seed=1")] {
        desk.good(&format!("{line} {free} --method-option {more} --output-dir /{name}"));
    }
    let bytes = |name: &str| desk.bytes(&format!("{name}/adapter_model.safetensors"));
    assert!(bytes("a") != bytes("b") && bytes("b") != bytes("c"));
    // With a share of 1, each number is in each draw.
    assert_eq!(merged_is_the_mask(&desk, "a"), 4 * 33 * 32);
}

#[test]
fn biases_are_all_that_bitfit_writes() {
    let desk = classify();
    let line = format!("{CLASSIFY} --max-steps 12").replace("--r 4", "--method bitfit");
    let line = line.replace("query,value", ".*encoder.*");
    desk.good(&format!("{line} --output-dir /out"));
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let names: Vec<String> = tensors(&bytes).into_keys().collect();
    // Six linear layers and two norms in each of two blocks, and the head.
    let biases = names.iter().filter(|name| name.ends_with(".bias")).count();
    assert_eq!((names.len(), biases), (18, 17), "{names:?}");
    let refused =
        desk.run(&format!("{line} --output-dir /no").replace(".*encoder.*", "word_embeddings"));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("word_embeddings"), "{said}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_training_chooses_the_same_again() {
    let long = "--max-steps 240 --num-train-epochs 60 --validation-split 0.2 --eval-steps 40 --save-steps 7";
    for method in [
        "fishmask --method-option keep_ratio=0.05 --init-batches 2",
        "fishdip --method-option update_steps=50 --method-option top_examples=6 --init-batches 2",
        "childtuning --method-option mode=ChildTuning-F",
    ] {
        let line = format!("{CLASSIFY} {long}").replace("--r 4", &format!("--method {method}"));
        crate::interrupted(&line, "--method-option keep_ratio=0.04");
    }
}
