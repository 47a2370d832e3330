//! Bad input: one sentence, a non-zero exit, nothing half-written.

use crate::{CLASSIFY, Desk, SPEAK, classify};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
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
        ("--r 0", "r: expected 1 or more, found 0"),
        ("--r 1000000000000000000", "2^31"),
        ("--target-modules quary", "near names: "),
        ("--target-modules (", "is not a regular expression"),
        ("--target-modules query,nothing", "`nothing`"),
        ("--modules-to-save nothing", "`nothing`"),
        ("--lora-dropout 1.5", "lora_dropout"),
        ("--bias some", "bias: expected none, all or lora_only, found some"),
        ("--init-lora-weights loftq", "loftq"),
        ("--method nonsense", "expected one of LORA"),
        ("--method-option use_bdlora=true", "use_bdlora"),
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
        ("--dtype int8", "--dtype: expected float32, bfloat16 or float16, found int8"),
        ("--task nonsense", "--task"),
        ("--task causal-lm", "holds a bert model"),
        ("--text-column nonsense", "nonsense"),
        ("--config /none.toml", "none.toml"),
        ("--max-length 0", "max"),
        ("--layers-to-transform 7", "layers_to_transform"),
        ("--warmup-ratio 2", "warmup"),
        ("--early-stopping-patience 2", "needs validation data"),
        ("--target-modules all-linear --layers-to-transform 1", "layers_to_transform"),
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

/// The tensors of a file, each put through `change`: its type and its bytes.
fn rewrite(desk: &Desk, name: &str, change: impl Fn(&str) -> Option<Dtype>) {
    let bytes = desk.bytes(name);
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let tensors = file.tensors();
    let views = tensors.iter().map(|(name, tensor)| {
        let dtype = change(name).unwrap_or(tensor.dtype());
        let view = TensorView::new(dtype, tensor.shape().to_vec(), tensor.data());
        (name.clone(), view.expect("is as large"))
    });
    let bytes = safetensors::serialize(views, None).expect("is well formed");
    std::fs::write(desk.path(name), bytes).expect("writes");
}

#[test]
fn models_and_adapters_that_are_broken_or_strange() {
    let desk = classify();
    let adapter = |name: &str| desk.copy("adapters/plain", name);
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
    desk.copy("models/bert", "bare");
    std::fs::remove_file(desk.path("bare/tokenizer.json")).expect("was there");
    let edited = |name: &str, from: &str, to: &str| {
        desk.copy("models/bert", name);
        let path = format!("{name}/config.json");
        let config = String::from_utf8(desk.bytes(&path)).expect("is text");
        assert!(config.contains(from));
        desk.write(&path, &config.replace(from, to));
    };
    edited("gpt", "\"bert\"", "\"gpt2\"");
    edited("tall", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000000");
    edited("wide", "\"hidden_size\": 32", "\"hidden_size\": 64");
    edited("regressor", "\"hidden_size\"", "\"problem_type\": \"regression\", \"hidden_size\"");
    edited(
        "keyed",
        "\"hidden_size\"",
        "\"position_embedding_type\": \"relative_key\", \"hidden_size\"",
    );
    desk.copy("models/bert", "ints");
    let whole = |name: &str| name.ends_with("query.weight").then_some(Dtype::I32);
    rewrite(&desk, "ints/model.safetensors", whole);
    adapter("ints-adapter");
    rewrite(&desk, "ints-adapter/adapter_model.safetensors", |_| Some(Dtype::I32));
    adapter("ranked");
    let config = String::from_utf8(desk.bytes("ranked/adapter_config.json")).expect("is text");
    desk.write("ranked/adapter_config.json", &config.replace("\"r\": 4", "\"r\": 5"));
    let forward = "forward --inputs @models/bert/golden.safetensors --output /out.safetensors";
    for (line, says) in [
        (format!("{forward} --model /none"), "none"),
        (format!("{forward} --model /gpt"), "expected bert, llama, vit or dinov2, found gpt2"),
        (format!("{forward} --model /tall"), "num_hidden_layers: expected a number"),
        (
            format!("{forward} --model /wide"),
            "word_embeddings.weight`: expected shape [96, 64], found",
        ),
        (format!("{forward} --model /keyed"), "position_embedding_type"),
        (format!("{forward} --model /ints"), "query.weight`: expected numbers of type F32"),
        (format!("{forward} --model @models/bert --adapter /ints-adapter"), "expected numbers of"),
        (
            format!("{forward} --model @models/bert --adapter /ranked"),
            "layer.0.attention.self.query.lora_A.weight`: expected shape [5, 32], found",
        ),
        ("predict --model /regressor --text w1".into(), "problem_type: `regression`"),
        (
            "eval --model @models/llama --test-file /train.txt --max-length 0".into(),
            "--max-length: expected 2 to 64",
        ),
        ("train --model @models/bert --output-dir /out --resume".into(), "no checkpoint"),
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
    // The last step's harm shows in no loss any more.
    let line = format!("{CLASSIFY} --max-steps 1 --loraplus-lr-ratio 10 --output-dir /out");
    let line = line.replace("--learning-rate 1e-2", "--learning-rate 1e38");
    refused(&desk, &desk.run(&line), &line, "a trained parameter is");
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let desk = classify();
    // Files may have no more than so many blocks: every larger write fails as on a full disk.
    let with_room = |blocks: usize, line: &str| {
        let program = desk.command(line);
        let mut shell = Command::new("sh");
        let limit = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        shell.args(["-c", &limit, "sh"]).arg(program.get_program());
        shell.args(program.get_args()).stdin(Stdio::null()).output().expect("starts")
    };
    // The picture, the checkpoint, the adapter: one after the other has room.
    let mut ends = Vec::new();
    for blocks in [1, 4, 16, 24, 32, 48, 64, 96] {
        let line = format!("{CLASSIFY} --max-steps 6 --save-steps 3 --output-dir /out");
        let output = with_room(blocks, &line);
        ends.push(output.status.success());
        if output.status.success() {
            desk.good("predict --model @models/bert --adapter /out --text w1");
        } else {
            refused(&desk, &output, &line, "out");
        }
        let _ = std::fs::remove_dir_all(desk.path("out"));
    }
    assert!(!ends[0] && ends.last() == Some(&true), "{ends:?}");
    let line = "merge --model @models/bert --adapter @adapters/plain --output-dir /out";
    refused(&desk, &with_room(8, line), line, "out");
}
