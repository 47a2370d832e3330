//! Laplace-LoRA through the program.

use crate::{CLASSIFY, Desk, SPEAK, classify};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("is JSON")
}

#[track_caller]
fn refused(desk: &Desk, line: &str, says: &str) {
    let output = desk.run(line);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{line} went well");
    assert!(said.contains(says) && !said.contains("panicked"), "{line}\nexpected: {says}\n{said}");
}

#[test]
fn a_posterior_is_fitted_and_answers_less_surely() {
    let desk = classify();
    desk.good(&format!("{CLASSIFY} --num-train-epochs 12 --output-dir /out"));
    let eval = "eval --model @models/bert --adapter /out --test-file /test.tsv";
    refused(&desk, &format!("{eval} --laplace"), "fit it by burn-peft laplace");
    let plain = json(&desk.good(eval));
    let fit = "laplace --model @models/bert --adapter /out --train-file /train.tsv";
    let told = json(&desk.good(fit));
    let number = |value: &Value, name: &str| value[name].as_f64().expect("is a number");
    assert_eq!(told["examples"], 66);
    assert!(number(&told, "prior_precision") > 0.0 && number(&told, "decided_parameters") > 0.0);
    // The adapter is what it was, with or without the posterior beside it.
    assert_eq!(json(&desk.good(eval)), plain);
    let with = json(&desk.good(&format!("{eval} --laplace")));
    assert_eq!(with["targets"], plain["targets"]);
    for name in ["loss", "accuracy", "ece"] {
        assert!(number(&with, name).is_finite() && number(&plain, name).is_finite(), "{name}");
    }
    let surest = |more: &str| {
        let line =
            format!("predict --model @models/bert --adapter /out --test-file /test.tsv{more}");
        desk.good(&line).lines().map(|line| number(&json(line), "score")).sum::<f64>()
    };
    assert!(surest(" --laplace") < surest("") - 1e-3);
    // The evidence is largest where the fit put the prior.
    for times in [0.5, 2.0] {
        let other = number(&told, "prior_precision") * times;
        let other = json(&desk.good(&format!("{fit} --prior-precision {other}")));
        assert!(number(&other, "evidence") < number(&told, "evidence"), "{other} {told}");
    }
    // So strong a prior that nothing is unsure.
    desk.good(&format!("{fit} --prior-precision 1e9"));
    let strong = json(&desk.good(&format!("{eval} --laplace")));
    let gap = number(&strong, "loss") - number(&plain, "loss");
    assert!(gap.abs() < 1e-5, "{strong} {plain}");
    desk.good(&format!("{fit} --n-kfac 10"));
    let thin = desk.bytes("out/laplace.safetensors").len();
    json(&desk.good(&format!("{eval} --laplace")));
    desk.good(fit);
    assert!(thin < desk.bytes("out/laplace.safetensors").len());
}

#[test]
fn what_has_no_posterior_is_refused_by_name() {
    let desk = classify();
    let short = format!("{CLASSIFY} --max-steps 2");
    let fit = |name: &str| {
        format!("laplace --model @models/bert --adapter /{name} --train-file /train.tsv")
    };
    desk.good(&format!("{short} --output-dir /plain"));
    desk.good(&fit("plain"));
    for (name, more) in [("dora", "--method-option use_dora=true"), ("vera", "--method vera")] {
        let line = if name == "vera" { short.replace("--r 4", "") } else { short.clone() };
        desk.good(&format!("{line} {more} --output-dir /{name}"));
        refused(&desk, &fit(name), "expected an adapter that is two trained factors");
    }
    let words = short.replace("query,value", "word_embeddings");
    desk.good(&format!("{words} --output-dir /words"));
    refused(&desk, &fit("words"), "word_embeddings: expected a linear layer");
    for name in ["dora", "vera", "words"] {
        assert!(!desk.path(name).join("laplace.json").exists(), "{name}");
    }
    // Trained again, the adapter is another one.
    desk.good(&format!("{CLASSIFY} --max-steps 4 --output-dir /plain --overwrite"));
    let eval = "eval --model @models/bert --adapter /plain --test-file /test.tsv --laplace";
    refused(&desk, eval, "another adapter");
    refused(
        &desk,
        "eval --model @models/bert --test-file /test.tsv --laplace",
        "one --adapter, found 0",
    );
    refused(&desk, &format!("{eval} --adapter /dora"), "one --adapter, found 2");
    refused(&desk, &format!("{} --n-kfac 0", fit("plain")), "n_kfac: expected 1 or more");
    refused(&desk, &format!("{} --prior-precision=-1", fit("plain")), "prior_precision");
    refused(&desk, &format!("{} --prior-precision nan", fit("plain")), "finite");
    desk.good(&format!("{SPEAK} --max-steps 1 --output-dir /lm"));
    refused(
        &desk,
        "laplace --model @models/llama --adapter /lm --train-file /train.txt",
        "laplace is for classifiers",
    );
    refused(
        &desk,
        "eval --model @models/llama --adapter /lm --test-file /train.txt --laplace",
        "laplace is for classifiers",
    );
}
