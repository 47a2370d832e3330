//! The program as a user runs it, on small models with random weights (`interop/fixtures.py`).

mod checkpointing;
mod conversions;
mod dtype;
mod inits;
mod laplace;
mod methods;
mod policies_rank;
mod policies_stage;
mod prompts;
mod refusals;
mod selective;
mod together;
mod vision;

use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A folder to work in, with data for both tasks.
struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { folder: tempfile::tempdir().expect("makes a folder") };
        let class = |i: usize| if i.is_multiple_of(2) { "even" } else { "odd" };
        let line = |i: usize| {
            format!("w{} w{} w{}\t{}\n", i % 40, (i * 7) % 40, 3 + 2 * (i % 2), class(i))
        };
        let table: String = (0..64).map(line).collect();
        desk.write("train.tsv", &format!("text\tlabel\n{table}"));
        desk.write("test.tsv", &format!("text\tlabel\n{}", (70..90).map(line).collect::<String>()));
        let paragraph =
            |i: usize| (0..20).map(|j| format!("w{}", (i * j) % 80)).collect::<Vec<_>>().join(" ");
        desk.write("train.txt", &(0..24).map(paragraph).collect::<Vec<_>>().join("\n\n"));
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("writes");
    }

    /// `burn-peft` with words split at spaces; `{}` words are this desk's paths, `@` the fixtures'.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-peft"));
        for word in line.split_whitespace() {
            match (word.strip_prefix('/'), word.strip_prefix('@')) {
                (Some(name), _) => command.arg(self.path(name)),
                (_, Some(name)) => command.arg(fixture(name)),
                _ => command.arg(word),
            };
        }
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).stdin(Stdio::null()).output().expect("starts")
    }

    #[track_caller]
    fn good(&self, line: &str) -> String {
        let output = self.run(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A copy of a fixture, a folder or a file, in this desk.
    fn copy(&self, from: &str, to: &str) {
        let (from, to) = (fixture(from), self.path(to));
        if from.is_file() {
            std::fs::copy(from, to).expect("copies");
            return;
        }
        std::fs::create_dir_all(&to).expect("makes a folder");
        for entry in std::fs::read_dir(from).expect("is committed").flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
        }
    }

    fn json(&self, name: &str) -> Value {
        let text = std::fs::read_to_string(self.path(name)).expect("is written");
        serde_json::from_str(&text).expect("is JSON")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("is written")
    }
}

const CLASSIFY: &str = "train --model @models/bert --train-file /train.tsv --learning-rate 1e-2 \
    --per-device-train-batch-size 8 --target-modules query,value --r 4 --seed 3";
const SPEAK: &str = "train --model @models/llama --train-file /train.txt --learning-rate 1e-2 \
    --target-modules all-linear --r 4 --max-length 32 --seed 3";

/// The fixture's head has three classes.
fn three_classes(desk: &Desk) {
    let line = |i: usize| format!("w{} w{} w{}\tclass{}\n", i % 40, (i * 7) % 40, 3 + i % 3, i % 3);
    for (name, range) in [("train.tsv", 0..66), ("test.tsv", 70..91)] {
        desk.write(name, &format!("text\tlabel\n{}", range.map(line).collect::<String>()));
    }
}

fn classify() -> Desk {
    let desk = Desk::new();
    three_classes(&desk);
    desk
}

#[test]
fn a_classifier_is_trained_evaluated_merged_and_asked() {
    let desk = classify();
    desk.good(&format!("{CLASSIFY} --num-train-epochs 12 --test-file /test.tsv --validation-split 0.2 --output-dir /out"));
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
        "metrics.jsonl",
        "training.svg",
    ] {
        assert!(desk.path("out").join(name).is_file(), "{name}");
    }
    assert!(!desk.path("out/checkpoint").exists());
    let summary = desk.json("out/summary.json");
    let accuracy = |when: &str| summary[when]["accuracy"].as_f64().expect("was measured");
    assert!(accuracy("after") > accuracy("before") && accuracy("after") > 0.8, "{summary}");
    assert!(desk.path("out/training.svg").metadata().is_ok_and(|file| file.len() > 1000));

    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    let report: Value = serde_json::from_str(&desk.good(eval)).expect("is JSON");
    assert_eq!(report["accuracy"].as_f64(), Some(accuracy("after")));
    desk.good("merge --model @models/bert --adapter /out --output-dir /merged");
    let merged: Value =
        serde_json::from_str(&desk.good("eval --model /merged --test-file /test.tsv"))
            .expect("is JSON");
    assert_eq!(merged["accuracy"], report["accuracy"]);

    let told = desk.good("predict --model @models/bert --adapter /out --text w1 --text w2");
    let lines: Vec<Value> =
        told.lines().map(|l| serde_json::from_str(l).expect("is JSON")).collect();
    assert_eq!(lines.len(), 2);
    let sum: f64 = lines[0]["scores"]
        .as_object()
        .expect("are scores")
        .values()
        .filter_map(Value::as_f64)
        .sum();
    assert!(
        (sum - 1.0).abs() < 1e-5
            && lines[0]["label"].as_str().is_some_and(|l| l.starts_with("class"))
    );
    let told = desk.good("predict --model @models/bert --adapter /out --test-file /test.tsv");
    assert_eq!(told.lines().count(), 21);
    let told = desk.good("inspect /out");
    assert!(told.contains("\"LORA\"") && told.contains("lora_A.weight [4, 32]"), "{told}");
    assert!(desk.good("inspect @models/bert").contains("word_embeddings.weight [96, 32]"));
}

#[test]
fn a_language_model_learns_from_text_pairs_and_chats() {
    let desk = Desk::new();
    let pair = |i: usize| {
        format!(
            "{{\"prompt\": \"w{} w{}\", \"completion\": \" w{}\"}}\n",
            i % 30,
            i % 7,
            (i + 1) % 30
        )
    };
    desk.write("pairs.jsonl", &(0..40).map(pair).collect::<String>());
    let chat = |i: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"w{i}\"}}, {{\"role\": \"assistant\", \"content\": \"w{} w9\"}}]}}\n",
            i + 1
        )
    };
    desk.write("chats.jsonl", &(0..40).map(chat).collect::<String>());
    for (name, file, more) in [
        (
            "text",
            "train.txt",
            "--packing --gradient-accumulation-steps 2 --per-device-train-batch-size 2",
        ),
        (
            "pairs",
            "pairs.jsonl",
            "--lr-scheduler-type cosine --warmup-ratio 0.1 --loraplus-lr-ratio 4",
        ),
        (
            "chats",
            "chats.jsonl",
            "--lr-scheduler-type constant --weight-decay 0.01 --lora-dropout 0.1",
        ),
    ] {
        let line = SPEAK.replace("/train.txt", &format!("/{file}"));
        desk.good(&format!(
            "{line} --num-train-epochs 8 --test-file /{file} --output-dir /{name} {more}"
        ));
        let summary = desk.json(&format!("{name}/summary.json"));
        let loss = |when: &str| summary[when]["loss"].as_f64().expect("was measured");
        assert!(loss("after") < 0.8 * loss("before"), "{name}: {summary}");
    }
    let ask = "generate --model @models/llama --adapter /text --prompt w1 --max-new-tokens 6";
    let answer = desk.good(ask);
    assert!(!answer.trim().is_empty());
    assert_eq!(desk.good(ask), answer);
    assert_eq!(
        desk.good(&format!("{ask} --do-sample --seed 5")),
        desk.good(&format!("{ask} --do-sample --seed 5"))
    );
    assert!(
        !desk
            .good("generate --model @models/llama --adapter /chats --chat --prompt w3")
            .trim()
            .is_empty()
    );
    desk.good("merge --model @models/llama --adapter /text --output-dir /merged");
    assert_eq!(desk.good("generate --model /merged --prompt w1 --max-new-tokens 6"), answer);
}

/// The largest difference; what is no number is further than all numbers.
fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or_default()
}

/// The logits in a file that `forward` wrote.
fn logits(desk: &Desk, name: &str) -> Vec<f32> {
    let bytes = desk.bytes(name);
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let data = file.tensor("logits").expect("is there").data();
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn a_tied_model_with_an_adapted_embedding_merges_to_the_same_function() {
    let desk = Desk::new();
    desk.copy("models/llama-tied-llama3-bf16", "tied");
    desk.copy("models/llama/tokenizer.json", "tied/tokenizer.json");
    let line = SPEAK.replace("@models/llama", "/tied").replace("all-linear", "embed_tokens,q_proj");
    desk.good(&format!("{line} --max-steps 6 --output-dir /out"));
    desk.good("merge --model /tied --adapter /out --output-dir /merged");
    let forward = "forward --inputs @models/llama/golden.safetensors";
    desk.good(&format!("{forward} --model /tied --adapter /out --output /a.safetensors"));
    desk.good(&format!("{forward} --model /merged --output /b.safetensors"));
    desk.good(&format!("{forward} --model /tied --output /c.safetensors"));
    let [overlaid, merged, plain] =
        ["a", "b", "c"].map(|n| logits(&desk, &format!("{n}.safetensors")));
    assert!(far(&overlaid, &merged) < 1e-4, "{}", far(&overlaid, &merged));
    assert!(far(&overlaid, &plain) > 1e-2, "the adapter does nothing");
    assert_eq!(desk.json("merged/config.json")["tie_word_embeddings"], false);
}

#[test]
fn a_merge_leaves_no_shards_of_an_older_model() {
    let desk = Desk::new();
    desk.copy("models/llama-linear-sharded-f16", "sharded");
    desk.copy("models/llama-linear-sharded-f16", "merged");
    desk.copy("models/llama/tokenizer.json", "sharded/tokenizer.json");
    let line = SPEAK.replace("@models/llama", "/sharded");
    desk.good(&format!("{line} --max-steps 6 --output-dir /out"));
    desk.good("merge --model /sharded --adapter /out --output-dir /merged --overwrite");
    let forward = "forward --inputs @models/llama/golden.safetensors";
    desk.good(&format!("{forward} --model /sharded --adapter /out --output /a.safetensors"));
    desk.good(&format!("{forward} --model /merged --output /b.safetensors"));
    let [overlaid, merged] = ["a", "b"].map(|n| logits(&desk, &format!("{n}.safetensors")));
    let far = far(&overlaid, &merged);
    assert!(far < 1e-4, "{far}");
}

#[test]
fn sizes_beyond_the_data_and_spellings_of_labels_are_no_trouble() {
    let desk = classify();
    let signed = String::from_utf8(desk.bytes("train.tsv")).expect("is text");
    let signed = signed.replace("class0", "+1").replace("class1", "-1").replace("class2", "00");
    desk.write("train.tsv", &signed);
    let line = CLASSIFY.replace("--per-device-train-batch-size 8", "");
    desk.good(&format!(
        "{line} --max-steps 2 --num-train-epochs 18446744073709551615 --output-dir /out \
         --per-device-train-batch-size 9223372036854775808"
    ));
    assert_eq!(desk.json("out/labels.json"), serde_json::json!(["-1", "00", "+1"]));
    // One token more than the length, in batches of one.
    let words = |n: usize| (0..n).map(|i| format!("w{}", i % 40)).collect::<Vec<_>>().join(" ");
    desk.write("train.txt", &[words(31), words(32), words(1), words(64)].join("\n\n"));
    desk.good(&format!(
        "{SPEAK} --per-device-train-batch-size 1 --num-train-epochs 1 --output-dir /lm"
    ));
}

#[test]
fn the_models_own_order_of_classes_is_kept() {
    let desk = classify();
    desk.copy("models/bert", "bert");
    let config = String::from_utf8(desk.bytes("bert/config.json")).expect("is text");
    let mut config: Value = serde_json::from_str(&config).expect("is JSON");
    config["id2label"] = serde_json::json!({"0": "class2", "1": "class0", "2": "class1"});
    desk.write("bert/config.json", &config.to_string());
    let line = CLASSIFY.replace("@models/bert", "/bert");
    desk.good(&format!("{line} --max-steps 1 --output-dir /out"));
    assert_eq!(desk.json("out/labels.json"), serde_json::json!(["class2", "class0", "class1"]));
}

#[test]
fn forward_gives_logits_in_the_shape_that_is_promised() {
    let desk = Desk::new();
    for (model, shape) in [("bert", vec![3, 3]), ("llama", vec![3, 11, 96])] {
        let inputs = format!("@models/{model}/golden.safetensors");
        desk.good(&format!(
            "forward --model @models/{model} --inputs {inputs} --output /{model}.safetensors"
        ));
        let bytes = desk.bytes(&format!("{model}.safetensors"));
        let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
        assert_eq!(file.names(), ["logits"]);
        assert_eq!(file.tensor("logits").expect("is there").shape(), shape);
    }
}

/// The embeddings in a file that `embed` wrote, a vector a text.
fn embeddings(desk: &Desk, name: &str) -> Vec<Vec<f32>> {
    let bytes = desk.bytes(name);
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    assert_eq!(file.names(), ["embeddings"]);
    let tensor = file.tensor("embeddings").expect("is there");
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("has four bytes"));
    let numbers: Vec<f32> = tensor.data().chunks(4).map(number).collect();
    numbers.chunks(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
}

#[test]
fn embeddings_have_length_one_whatever_lies_beside_them() {
    let desk = classify();
    let embed = "embed --model @models/bert --per-device-eval-batch-size 2";
    desk.write("texts.tsv", "text\nw1\nw3 w4 w5 w6 w7 w8\nw9 w10\n");
    desk.good(&format!("{embed} --test-file /texts.tsv --text w2 --output /all.safetensors"));
    let all = embeddings(&desk, "all.safetensors");
    assert_eq!((all.len(), all[0].len()), (4, 32));
    for one in &all {
        let length: f32 = one.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }
    // Alone it has no padding, in the file it has five tokens of it.
    desk.good(&format!("{embed} --text w1 --output /one.safetensors"));
    let one = embeddings(&desk, "one.safetensors");
    assert!(far(&one[0], &all[0]) < 1e-5, "differs by {}", far(&one[0], &all[0]));
    desk.good(&format!("{CLASSIFY} --max-steps 4 --output-dir /out"));
    desk.good(&format!("{embed} --adapter /out --text w1 --output /adapted.safetensors"));
    let adapted = embeddings(&desk, "adapted.safetensors");
    assert!(far(&one[0], &adapted[0]) > 1e-3, "the adapter changes nothing");
    let nothing = desk.run(&format!("{embed} --output /none.safetensors"));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("give --text or --test-file"));
}

#[test]
fn a_file_of_options_is_the_flags() {
    let desk = classify();
    desk.good(&format!("{CLASSIFY} --max-steps 4 --output-dir /flags"));
    let toml = format!(
        "model = {:?}\ntrain_file = {:?}\nlearning_rate = 1e-2\nper_device_train_batch_size = 8\n\
         target_modules = \"query,value\"\nr = 4\nseed = 3\nmax_steps = 9\n",
        fixture("models/bert"),
        desk.path("train.tsv"),
    );
    desk.write("run.toml", &toml);
    desk.good("train --config /run.toml --max-steps 4 --output-dir /file");
    let tensors = |name: &str| desk.bytes(&format!("{name}/adapter_model.safetensors"));
    assert_eq!(tensors("flags"), tensors("file"));
    desk.good(
        &format!("{CLASSIFY} --max-steps 4 --output-dir /other --seed 4").replace("--seed 3", ""),
    );
    assert_ne!(tensors("flags"), tensors("other"));
}

#[test]
fn an_adapter_is_replaced_only_when_asked() {
    let desk = classify();
    let line = format!("{CLASSIFY} --max-steps 2 --output-dir /out");
    desk.good(&line);
    let before = desk.bytes("out/adapter_model.safetensors");
    let refused = desk.run(&format!("{line} --r 2").replace("--r 4", ""));
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--overwrite"));
    assert_eq!(desk.bytes("out/adapter_model.safetensors"), before);
    desk.good(&format!("{line} --r 2 --overwrite").replace("--r 4", ""));
    assert_ne!(desk.bytes("out/adapter_model.safetensors"), before);
}

/// Waits until the run has written a checkpoint.
fn until_checkpoint(desk: &Desk, child: &mut Child) {
    let began = Instant::now();
    while !desk.path("out/checkpoint/state.json").exists() {
        assert!(began.elapsed() < Duration::from_secs(120), "no checkpoint came");
        assert!(child.try_wait().expect("can be asked").is_none(), "the run ended before");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Many steps, with everything that has a state: dropout, decay, schedule, evaluations.
const LONG: &str = "--max-steps 400 --num-train-epochs 60 --lora-dropout 0.2 --weight-decay 0.01 \
    --lr-scheduler-type cosine --warmup-steps 10 --validation-split 0.2 --eval-steps 5 --save-steps 7";

#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_to_the_same_numbers() {
    let lora = format!("{CLASSIFY} {LONG}");
    interrupted(&lora, "--lora-alpha 3");
    // With what a method knows between steps, too.
    let policy = lora
        .replace("--r 4", "--method adalora --method-option init_r=5 --method-option target_r=2");
    interrupted(&policy, "--lora-alpha 3");
}

#[cfg(unix)]
fn interrupted(line: &str, other: &str) {
    interrupted_in(line, other, &[""]);
}

/// Of a run whose adapters lie in these subfolders.
#[cfg(unix)]
fn interrupted_in(line: &str, other: &str, parts: &[&str]) {
    let desk = classify();
    desk.good(&format!("{line} --output-dir /whole"));
    let tensors = |name: &str| -> Vec<Vec<u8>> {
        let file = |part: &&str| desk.bytes(&format!("{name}/{part}adapter_model.safetensors"));
        parts.iter().map(file).collect()
    };
    let whole = tensors("whole");
    for (signal, code) in [("INT", Some(130)), ("KILL", None)] {
        let _ = std::fs::remove_dir_all(desk.path("out"));
        let mut command = desk.command(&format!("{line} --output-dir /out"));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        until_checkpoint(&desk, &mut child);
        let id = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([&format!("-{signal}"), &id])
                .status()
                .is_ok_and(|s| s.success())
        );
        assert_eq!(child.wait().expect("ends").code(), code);
        assert!(!desk.path(&format!("out/{}adapter_config.json", parts[0])).exists());
        let refused = desk.run(&format!("{line} --output-dir /out --resume {other}"));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("other options"), "{refused:?}");
        desk.good(&format!("{line} --output-dir /out --resume"));
        assert_eq!(tensors("out"), whole, "after {signal}");
        let steps = |name: &str| -> Vec<Value> {
            let text =
                String::from_utf8(desk.bytes(&format!("{name}/metrics.jsonl"))).expect("is text");
            let line = |line: &str| serde_json::from_str::<Value>(line).expect("is JSON");
            // Speed is not repeated, and the first run tells of its interruption.
            let told = text
                .lines()
                .map(line)
                .filter(|line| line["event"] != "interrupted" && line["event"] != "checkpoint");
            told.map(|mut line| {
                line.as_object_mut().expect("is an object").remove("tokens_per_second");
                line
            })
            .collect()
        };
        assert_eq!(steps("out"), steps("whole"), "after {signal}");
    }
}

#[test]
fn early_stopping_keeps_the_best() {
    let desk = classify();
    let line = format!(
        "{CLASSIFY} --num-train-epochs 50 --validation-file /test.tsv --eval-steps 2 --early-stopping-patience 2 --output-dir /out"
    );
    desk.good(&line.replace("--learning-rate 1e-2", "--learning-rate 5e-1"));
    let summary = desk.json("out/summary.json");
    let (best, steps) = (summary["best_step"].as_u64(), summary["steps"].as_u64());
    assert!(best < steps && steps < Some(450), "{summary}");
}
