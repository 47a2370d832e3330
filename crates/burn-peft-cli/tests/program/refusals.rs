//! Bad input: one sentence, a non-zero exit, nothing half-written.

use crate::{CLASSIFY, Desk, SPEAK, classify, fixture};
use std::process::{Command, Output, Stdio};

/// One sentence on standard error that says what is expected, and no adapter in `/out`.
#[track_caller]
fn refused(desk: &Desk, output: &Output, line: &str, says: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{line} went well");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("[ERROR]")).collect();
    assert!(errors.len() == 1 && errors[0].contains(says), "{line}\nexpected: {says}\n{said}");
    assert!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "{line}: {said}");
    let out = desk.path("out");
    let left: Vec<_> =
        std::fs::read_dir(out).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    for name in
        ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"]
    {
        assert!(!left.iter().any(|file| file.to_string_lossy() == name), "{line} left {left:?}");
    }
    assert!(
        !left.iter().any(|file| file.to_string_lossy().starts_with(".tmp")),
        "{line} left {left:?}"
    );
}

#[test]
fn options_that_cannot_work() {
    let desk = classify();
    for (more, says) in [
        ("--r 0", "r: expected a rank of 1 or more, found 0"),
        ("--r 1000000000000000000", "2^31"),
        ("--target-modules quary", "near names: "),
        ("--target-modules (", "is not a regular expression"),
        ("--target-modules query,nothing", "`nothing`"),
        ("--modules-to-save nothing", "`nothing`"),
        ("--lora-dropout 1.5", "lora_dropout"),
        ("--bias some", "bias: unknown variant"),
        ("--init-lora-weights pissa", "pissa"),
        ("--method nonsense", "expected one of LORA"),
        ("--method-option use_dora=true", "use_dora"),
        ("--method-option nonsense=1", "nonsense"),
        ("--method-option nonsense", "NAME=JSON"),
        ("--learning-rate=-1", "learning-rate"),
        ("--num-train-epochs 0", "num-train-epochs"),
        ("--per-device-train-batch-size 0", "per-device-train-batch-size"),
        ("--gradient-accumulation-steps 0", "gradient-accumulation-steps"),
        ("--lr-scheduler-type wave", "lr_scheduler_type: unknown variant"),
        ("--validation-split 1.5", "--validation-split"),
        ("--device nonsense", "nonsense"),
        ("--device cuda", "--features cuda"),
        ("--task nonsense", "--task"),
        ("--task causal-lm", "holds a bert model"),
        ("--text-column nonsense", "nonsense"),
        ("--config /none.toml", "none.toml"),
        ("--max-length 0", "max"),
        ("--layers-to-transform 7", "layers_to_transform"),
        ("--warmup-ratio 2", "warmup"),
    ] {
        let name = more.split([' ', '=']).next().unwrap_or_default();
        // A flag may stand once only.
        let words: Vec<&str> = CLASSIFY.split_whitespace().collect();
        let mut kept = Vec::new();
        let mut skip = false;
        for word in words {
            if std::mem::take(&mut skip) {
                continue;
            }
            skip = word == name;
            if !skip {
                kept.push(word);
            }
        }
        let line = format!("{} --output-dir /out --max-steps 2 {more}", kept.join(" "));
        refused(&desk, &desk.run(&line), &line, says);
    }
    desk.write("bad.toml", "learning_rates = 1\n");
    let line = "train --config /bad.toml";
    refused(&desk, &desk.run(line), line, "learning_rates");
    desk.write("nan.toml", "learning_rate = nan\n");
    let line = "train --config /nan.toml";
    refused(&desk, &desk.run(line), line, "finite");
    let nan = desk.run(&format!("{CLASSIFY} --lora-alpha nan"));
    assert!(!nan.status.success() && String::from_utf8_lossy(&nan.stderr).contains("finite"));
    let line = CLASSIFY.to_owned();
    refused(&desk, &desk.run(&line), &line, "--output-dir is not set");
}

#[test]
fn data_that_cannot_be_read() {
    let desk = classify();
    for (text, says) in [
        ("", "train.tsv"),
        ("text\tlabel\n", "train.tsv"),
        ("text\tlabel\nonly one column\n", "line 2"),
        ("text\tlabel\na\tb\tc\n", "line 2"),
        ("words\tkind\na\tb\n", "text"),
        ("text\tlabel\nw1\tclass0\n", "two labels"),
    ] {
        desk.write("train.tsv", text);
        let line = format!("{CLASSIFY} --output-dir /out --max-steps 2");
        refused(&desk, &desk.run(&line), &line, says);
    }
    let desk = classify();
    desk.write("test.tsv", "text\tlabel\nw1\tstranger\n");
    let line = format!("{CLASSIFY} --output-dir /out --test-file /test.tsv");
    refused(&desk, &desk.run(&line), &line, "stranger");
    let line = format!("{CLASSIFY} --output-dir /out --test-file /none.tsv");
    refused(&desk, &desk.run(&line), &line, "none.tsv");
    for (name, text, says) in [
        ("a.jsonl", "{\"prompt\": \"w1\"}\n", "line 1"),
        ("b.jsonl", "nonsense\n", "line 1"),
        ("c.jsonl", "{\"messages\": []}\n", "nothing to learn"),
        ("d.txt", "", "d.txt"),
        ("e.txt", "\n\n\n", "e.txt"),
    ] {
        desk.write(name, text);
        let line = SPEAK.replace("/train.txt", &format!("/{name}")) + " --output-dir /out";
        refused(&desk, &desk.run(&line), &line, says);
    }
    std::fs::write(desk.path("f.txt"), [0xff, 0xfe, 0x00, 0xd8]).expect("writes");
    let line = SPEAK.replace("/train.txt", "/f.txt") + " --output-dir /out";
    refused(&desk, &desk.run(&line), &line, "f.txt");
}

/// A copy of a fixture in this desk.
fn copy(desk: &Desk, from: &str, to: &str) {
    let to = desk.path(to);
    std::fs::create_dir_all(&to).expect("makes a folder");
    for entry in std::fs::read_dir(fixture(from)).expect("is committed").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
    }
}

#[test]
fn models_and_adapters_that_are_broken_or_strange() {
    let desk = classify();
    let adapter = |name: &str| copy(&desk, "adapters/plain", name);
    adapter("cut");
    let bytes = desk.bytes("cut/adapter_model.safetensors");
    std::fs::write(desk.path("cut/adapter_model.safetensors"), &bytes[..bytes.len() / 2])
        .expect("writes");
    adapter("lies");
    let mut lies = bytes.clone();
    lies[..8].copy_from_slice(&(bytes.len() as u64 * 2).to_le_bytes());
    std::fs::write(desk.path("lies/adapter_model.safetensors"), lies).expect("writes");
    adapter("half");
    std::fs::remove_file(desk.path("half/adapter_model.safetensors")).expect("was there");
    copy(&desk, "models/bert", "bare");
    std::fs::remove_file(desk.path("bare/tokenizer.json")).expect("was there");
    copy(&desk, "models/bert", "gpt");
    let config = String::from_utf8(desk.bytes("gpt/config.json")).expect("is text");
    desk.write("gpt/config.json", &config.replace("\"bert\"", "\"gpt2\""));
    let forward = "forward --inputs @models/bert/golden.safetensors --output /out.safetensors";
    for (line, says) in [
        (format!("{forward} --model /none"), "none"),
        (format!("{forward} --model /gpt"), "expected bert or llama, found gpt2"),
        (format!("{forward} --model @models/bert --adapter /none"), "adapter_config.json"),
        (
            format!("{forward} --model @models/bert --adapter /cut"),
            "is not a whole safetensors file",
        ),
        (
            format!("{forward} --model @models/bert --adapter /lies"),
            "is not a whole safetensors file",
        ),
        (format!("{forward} --model @models/bert --adapter /half"), "adapter_model.safetensors"),
        (
            format!("{forward} --model @models/bert --adapter @adapters/llama-all-linear"),
            "matches no",
        ),
        (format!("{forward} --model @models/llama --adapter @adapters/plain"), "matches no"),
        ("forward --inputs /train.tsv --output /o --model @models/bert".into(), "train.tsv"),
        (
            "forward --inputs @models/bert/model.safetensors --output /o --model @models/bert"
                .into(),
            "input_ids",
        ),
        ("predict --model /bare --text w1".into(), "tokenizer.json"),
        ("predict --model @models/bert".into(), "--text"),
        ("predict --model @models/llama --text w1".into(), "generate"),
        ("generate --model @models/bert --prompt w1".into(), "predict"),
        (
            "generate --model @models/llama --prompt w1 --do-sample --temperature 0".into(),
            "temperature",
        ),
        ("merge --model @models/bert --output-dir /out".into(), "--adapter"),
        ("merge --model @models/bert --adapter /cut --output-dir /out".into(), "whole"),
        ("inspect /train.tsv".into(), "train.tsv"),
        ("inspect /".into(), "neither"),
        (
            "eval --model @models/bert --adapter @adapters/plain --test-file /none.tsv".into(),
            "none.tsv",
        ),
    ] {
        refused(&desk, &desk.run(&line), &line, says);
        assert!(!desk.path("out.safetensors").exists(), "{line}");
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let desk = classify();
    let line = format!("{CLASSIFY} --max-grad-norm 0 --num-train-epochs 9 --output-dir /out");
    let line = line.replace("--learning-rate 1e-2", "--learning-rate 1e38");
    let output = desk.run(&line);
    refused(&desk, &output, &line, "at step ");
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let desk = classify();
    let line = format!("{CLASSIFY} --max-steps 2 --output-dir /out");
    let program = desk.command(&line);
    let mut shell = Command::new("sh");
    // Files may have no more than 4 blocks: every larger write fails as on a full disk.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$@\"", "sh"]).arg(program.get_program());
    let output = shell.args(program.get_args()).stdin(Stdio::null()).output().expect("starts");
    refused(&desk, &output, &line, "out");
}
