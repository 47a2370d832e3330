//! Gradient checkpointing through the program.

use crate::{CLASSIFY, Desk, SPEAK, classify};
use serde_json::Value;

/// Losses and norms of gradients of all steps.
fn numbers(desk: &Desk, out: &str) -> Vec<[f64; 2]> {
    let text = String::from_utf8(desk.bytes(&format!("{out}/metrics.jsonl"))).expect("is text");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("is JSON"));
    lines.filter_map(|line| Some([line["loss"].as_f64()?, line["grad_norm"].as_f64()?])).collect()
}

/// By a flag or in the file of options, it is the run without: what is drawn is drawn again, in each batch of a step.
#[test]
fn a_run_that_computes_blocks_again_is_the_run_without() {
    let more = "--lora-dropout 0.3 --gradient-accumulation-steps 2 --max-steps 5 --logging-steps 1";
    for (desk, line, asked) in [
        (classify(), CLASSIFY, "--gradient-checkpointing"),
        (Desk::new(), SPEAK, "--config /run.toml"),
    ] {
        desk.write("run.toml", "gradient_checkpointing = true\n");
        desk.good(&format!("{line} {more} --output-dir /kept"));
        desk.good(&format!("{line} {more} {asked} --output-dir /again"));
        let [kept, again] = ["kept", "again"].map(|out| numbers(&desk, out));
        assert_eq!((kept.len(), again.len()), (5, 5), "{line}");
        assert_eq!(kept[0][0], again[0][0], "{line}: the first loss");
        // Gradients of the first step are the same but for rounding; Adam divides by their size, so that what is
        // near 0 may move otherwise by a learning rate.
        for (step, (one, other)) in kept.iter().flatten().zip(again.iter().flatten()).enumerate() {
            let far = (one - other).abs() / one.abs().max(1.0);
            assert!(far < 1e-3, "{line}: {one} and {other} at number {step}");
        }
    }
    let desk = classify();
    desk.write("run.toml", "gradient_checkpointing = \"blocks\"\n");
    let output = desk.run(&format!("{CLASSIFY} --config /run.toml --output-dir /out"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("run.toml") && said.contains("line 1"),
        "{said}"
    );
}
