//! `convert` and `combine`: the same function by other factors.

use crate::{CLASSIFY, Desk, SPEAK, classify, far, fixture, logits};
use safetensors::SafeTensors;

fn forward(desk: &Desk, model: &str, adapter: &str) -> Vec<f32> {
    let inputs = format!("@models/{model}/golden.safetensors");
    desk.good(&format!(
        "forward --model @models/{model} {adapter} --inputs {inputs} --output /o.safetensors"
    ));
    logits(desk, "o.safetensors")
}

#[test]
fn another_method_becomes_a_lora() {
    let desk = classify();
    let line = CLASSIFY.replace("--r 4", "--method boft --method-option boft_block_size=8");
    desk.good(&format!("{line} --max-steps 12 --output-dir /boft"));
    let boft = forward(&desk, "bert", "--adapter /boft");
    let convert = "convert --model @models/bert --adapter /boft";
    let told = desk.good(&format!("{convert} --rank 32 --output-dir /whole"));
    assert!(
        told.contains("query") && told.contains("rank   32") && told.contains("error"),
        "{told}"
    );
    // The bound of the issue for logits.
    let whole = forward(&desk, "bert", "--adapter /whole");
    assert!(far(&whole, &boft) < 1e-4, "{}", far(&whole, &boft));
    let config = desk.json("whole/adapter_config.json");
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["task_type"], "SEQ_CLS");
    assert_eq!(config["target_modules"], serde_json::json!(["query", "value"]));
    assert_eq!(desk.json("whole/labels.json"), desk.json("boft/labels.json"));

    desk.good(&format!("{convert} --energy 0.9 --max-rank 6 --output-dir /cut"));
    let config = desk.json("cut/adapter_config.json");
    assert!(config["r"].as_u64().is_some_and(|r| (1..=6).contains(&r)), "{config}");
    assert!(far(&forward(&desk, "bert", "--adapter /cut"), &boft) > 1e-4, "nothing was cut");

    for (more, says) in [
        ("", "--rank"),
        ("--rank 2 --energy 0.5", "cannot be used with"),
        ("--rank 2 --max-rank 3", "cannot be used with"),
        ("--rank 0", "r: expected 1 or more, found 0"),
        ("--energy 1.5", "energy: expected more than 0 and at most 1"),
        ("--rank 2 --adapter /boft", "expected one --adapter"),
    ] {
        let refused = desk.run(&format!("{convert} {more} --output-dir /refused"));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(says), "{more}: {said}");
        assert!(!desk.path("refused/adapter_config.json").exists(), "{more}");
    }
    let again = desk.run(&format!("{convert} --rank 2 --output-dir /whole"));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--overwrite"));
}

/// The fixture's BERT without its head, as models come from pretraining.
fn headless(desk: &Desk) {
    let from = fixture("models/bert");
    std::fs::create_dir_all(desk.path("bert")).expect("makes a folder");
    for entry in std::fs::read_dir(&from).expect("is committed").flatten() {
        std::fs::copy(entry.path(), desk.path("bert").join(entry.file_name())).expect("copies");
    }
    let bytes = std::fs::read(from.join("model.safetensors")).expect("is committed");
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let body = file.tensors().into_iter().filter(|(name, _)| !name.starts_with("classifier"));
    let bytes = safetensors::serialize(body, None).expect("is a file");
    std::fs::write(desk.path("bert/model.safetensors"), bytes).expect("writes");
}

/// Two heads for the same classes become their mean, so that what was trained apart answers together.
#[test]
fn two_classifiers_become_one() {
    let desk = classify();
    headless(&desk);
    for (seed, out) in [("--seed 1", "/one"), ("--seed 2", "/two")] {
        let line = CLASSIFY.replace("--seed 3", seed).replace("@models/bert", "/bert");
        desk.good(&format!("{line} --max-steps 12 --output-dir {out}"));
    }
    let apart = desk.run("eval --model /bert --adapter /one --adapter /two --test-file /test.tsv");
    let said = String::from_utf8_lossy(&apart.stderr).into_owned();
    assert!(!apart.status.success() && said.contains("burn-peft combine"), "{said}");
    let combine = "combine --model /bert --adapter /one --adapter /two --combination cat";
    desk.good(&format!("{combine} --weight 1 --weight 0 --output-dir /first"));
    desk.good(&format!("{combine} --weight 0.5 --weight 0.5 --output-dir /both"));
    let inputs = "--inputs @models/bert/golden.safetensors --output /o.safetensors";
    let [first, one, both] = ["/first", "/one", "/both"].map(|adapter| {
        desk.good(&format!("forward --model /bert --adapter {adapter} {inputs}"));
        logits(&desk, "o.safetensors")
    });
    assert!(far(&first, &one) < 1e-4, "{}", far(&first, &one));
    assert!(far(&both, &one) > 1e-4 && both.iter().all(|v| v.is_finite()));
    assert_eq!(desk.json("both/labels.json"), desk.json("one/labels.json"));
    let said = desk.run(&format!("{combine} --weight 1 --weight -1 --output-dir /none"));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("classifier: ") && said.contains("add up to 0"), "{said}");
}

/// The same adapter at another strength, by what multiplies its `A`.
fn scaled(desk: &Desk, from: &str, to: &str, by: f32) {
    let bytes = desk.bytes(&format!("{from}/adapter_model.safetensors"));
    let file = SafeTensors::deserialize(&bytes).expect("is a safetensors file");
    let mut held: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for name in file.names() {
        let tensor = file.tensor(name).expect("is there");
        let factor = if name.contains("lora_A") { by } else { 1.0 };
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) * factor;
        let data = tensor.data().chunks_exact(4).flat_map(|b| number(b).to_le_bytes()).collect();
        held.push((name.to_owned(), tensor.shape().to_vec(), data));
    }
    let views = held.iter().map(|(name, shape, data)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
        (name.as_str(), view.expect("is f32"))
    });
    let bytes = safetensors::serialize(views, None).expect("is a file");
    std::fs::create_dir_all(desk.path(to)).expect("makes a folder");
    std::fs::write(desk.path(to).join("adapter_model.safetensors"), bytes).expect("writes");
    std::fs::copy(
        desk.path(from).join("adapter_config.json"),
        desk.path(to).join("adapter_config.json"),
    )
    .expect("copies");
}

#[test]
fn two_adapters_become_one() {
    let desk = Desk::new();
    let line = |seed, more| format!("{} --max-steps 8 {more}", SPEAK.replace("--seed 3", seed));
    desk.good(&line("--seed 3", "--output-dir /a"));
    let other = line("--seed 4", "--lora-alpha 3 --output-dir /b");
    desk.good(&other.replace("all-linear", "q_proj,down_proj").replace("--r 4", "--r 2"));
    scaled(&desk, "a", "a2", 0.7);
    scaled(&desk, "b", "b2", -0.3);
    let both = forward(&desk, "llama", "--adapter /a2 --adapter /b2");
    let combine =
        "combine --model @models/llama --adapter /a --weight 0.7 --adapter /b --weight -0.3";
    desk.good(&format!("{combine} --combination cat --output-dir /cat"));
    let cat = forward(&desk, "llama", "--adapter /cat");
    assert!(far(&cat, &both) < 1e-4, "{}", far(&cat, &both));
    let config = desk.json("cat/adapter_config.json");
    assert_eq!((config["r"].as_u64(), config["task_type"].as_str()), (Some(6), Some("CAUSAL_LM")));
    let told = desk.good(&format!("{combine} --combination linear --svd-rank 6 --output-dir /sum"));
    assert!(told.contains("q_proj") && told.contains("error"), "{told}");
    let sum = forward(&desk, "llama", "--adapter /sum");
    assert!(far(&sum, &both) < 1e-4, "{}", far(&sum, &both));

    let plain = forward(&desk, "llama", "");
    for rule in [
        "ties --density 0.5",
        "dare_linear --density 0.5 --seed 7",
        "dare_ties_svd --density 0.5 --majority-sign-method frequency",
        "magnitude_prune --density 0.2",
    ] {
        let name = rule.split(' ').next().unwrap_or_default();
        desk.good(&format!("{combine} --combination {rule} --output-dir /{name}"));
        let found = forward(&desk, "llama", &format!("--adapter /{name}"));
        assert!(far(&found, &plain) > 1e-3 && found.iter().all(|v| v.is_finite()), "{rule}");
    }
    for (line, says) in [
        (format!("{combine} --combination ties"), "density: ties needs"),
        (format!("{combine} --combination nonsense"), "expected one of linear"),
        (format!("{combine} --combination hf_linear"), "expected equal ranks"),
        (format!("{combine} --weight 1 --combination cat"), "one for each --adapter, 2, found 3"),
        ("combine --model @models/llama --combination cat".into(), "nothing to combine"),
    ] {
        let refused = desk.run(&format!("{line} --output-dir /refused"));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(says), "{line}: {said}");
        assert!(!desk.path("refused/adapter_config.json").exists(), "{line}");
    }
    desk.good(&format!(
        "{} --method vera --max-steps 2 --output-dir /vera",
        SPEAK.replace("--r 4", "--method-option r=4")
    ));
    let refused = desk
        .run("combine --model @models/llama --adapter /vera --combination cat --output-dir /no");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("burn-peft convert"));
}
