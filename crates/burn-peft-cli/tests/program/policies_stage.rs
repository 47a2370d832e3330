//! Methods whose training has stages, and those that change gradients, through the program.

use crate::{CLASSIFY, Desk, classify};
use safetensors::SafeTensors;
use serde_json::Value;

/// Trains, and checks that the file is the function that was trained.
fn trained(line: &str) -> Desk {
    let desk = classify();
    desk.good(&format!("{CLASSIFY} {line} --test-file /test.tsv --output-dir /out"));
    let summary = desk.json("out/summary.json");
    let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
    assert!(loss("after") < loss("before"), "{summary}");
    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    let read = report["loss"].as_f64().expect("was measured");
    assert!((read - loss("after")).abs() < 1e-5, "{read} and {}", loss("after"));
    desk
}

/// A matrix of the file, by the end of its name.
fn matrix(desk: &Desk, name: &str) -> ([usize; 2], Vec<f32>) {
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let names = file.names();
    let whole = names.iter().find(|whole| whole.ends_with(name)).expect("is there");
    let tensor = file.tensor(whole).expect("is there");
    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let shape = tensor.shape().try_into().expect("is a matrix");
    (shape, tensor.data().chunks_exact(4).map(number).collect())
}

#[test]
fn periodic_lora_writes_all_its_stages() {
    let desk = trained("--method periodiclora --method-option stages=3 --max-steps 20");
    assert_eq!(desk.json("out/adapter_config.json")["total_step"], 20);
    let ([rank, width], a) = matrix(&desk, "0.attention.self.query.plora_A");
    assert_eq!([rank, width], [12, 32]);
    let (shape, b) = matrix(&desk, "0.attention.self.query.plora_B");
    assert_eq!(shape, [32, 12]);
    for stage in 0..3 {
        let rows = |r: usize| &a[(4 * stage + r) * width..(4 * stage + r + 1) * width];
        assert!((0..4).all(|r| rows(r).iter().any(|a| *a != 0.0)), "stage {stage}");
        let of_stage = |i: &usize| (4 * stage..4 * stage + 4).contains(&(i % rank));
        let moved = b.iter().enumerate().filter(|(i, _)| of_stage(i)).any(|(_, b)| *b != 0.0);
        assert!(moved, "stage {stage}");
    }
}

#[test]
fn delta_lora_writes_where_its_weight_began_to_move() {
    let start = "--method-option start_step=6";
    let desk = trained(&format!("--method deltalora {start} --max-steps 20"));
    let (_, last) = matrix(&desk, "0.attention.self.query.deltalora_B");
    let (_, first) = matrix(&desk, "0.attention.self.query.deltalora_B_start");
    assert!(first.iter().any(|b| *b != 0.0) && first != last);
    let desk = trained("--method deltalora --max-steps 20");
    let bytes = desk.bytes("out/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    assert!(!file.names().iter().any(|name| name.contains("start")));
}

#[test]
fn auto_lora_finds_ranks_that_lora_can_take() {
    let line = "--method autolora --max-steps 60 --method-option search_steps=40";
    let desk = trained(line);
    let config = desk.json("out/adapter_config.json");
    let ranks = config["rank_pattern"].as_object().expect("were found");
    assert_eq!(ranks.len(), 4, "{ranks:?}");
    let mut sum = 0;
    for (path, rank) in ranks {
        let rank = rank.as_u64().expect("is a rank") as usize;
        assert_eq!(matrix(&desk, &format!("{path}.autolora_A")).0, [rank, 32]);
        sum += rank;
    }
    assert!((4..16).contains(&sum), "{ranks:?}");
    let pattern = config["rank_pattern"].to_string();
    let line = format!("{CLASSIFY} --max-steps 2 --method-option rank_pattern={pattern}");
    desk.good(&format!("{line} --output-dir /lora"));
    let bytes = desk.bytes("lora/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let names = file.names();
    let found = names.iter().filter(|name| name.ends_with("lora_A.weight"));
    let found: usize = found.map(|name| file.tensor(name).expect("is there").shape()[0]).sum();
    assert_eq!(found, sum);
}

#[test]
fn corrected_gradients_change_the_training_and_not_the_file() {
    let tensors = |desk: &Desk| desk.bytes("out/adapter_model.safetensors");
    let fa = trained("--method lorafa --max-steps 12");
    let plain = "--method lorafa --max-steps 12 --method-option gradient_correction=false";
    assert_ne!(tensors(&fa), tensors(&trained(plain)));

    let lora = trained("--max-steps 12");
    let riemannian = trained("--max-steps 12 --riemannian-reg 1e-6");
    assert_ne!(tensors(&lora), tensors(&riemannian));
    let config = |desk: &Desk| desk.json("out/adapter_config.json");
    assert_eq!(config(&lora), config(&riemannian));
    let line = CLASSIFY.replace("--r 4", "--riemannian-reg 1e-6 --max-steps 2 --output-dir /no");
    for (more, said) in [("--method vera", "riemannian_reg"), ("--init-lora-weights mica", "query")]
    {
        let refused = lora.run(&format!("{line} {more}"));
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains(said), "{more}: {text}");
    }
}

/// Several ends of stages before and after whatever step the interruption comes at.
#[cfg(unix)]
#[test]
fn interrupted_stages_go_on_to_the_same_numbers() {
    let long = "--max-steps 240 --num-train-epochs 60 --validation-split 0.2 --eval-steps 40 --save-steps 7";
    for method in [
        "periodiclora --method-option stages=40 --method-option momentum=0.1 --riemannian-reg 1e-4",
        "deltalora --method-option start_step=30",
        "autolora --method-option search_steps=120 --lora-dropout 0.1",
        "lorafa",
    ] {
        crate::interrupted(&format!("{CLASSIFY} {long} --method {method}"), "--lora-alpha 3");
    }
}
