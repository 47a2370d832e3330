//! AdapterHub's own files (`interop/hidden.py`): they load here and give its logits, and what is written here is what
//! it wrote.

use crate::hf::{base, contents, device, fixtures, floats, kept, near, open, tokens};
use crate::probe::values;
use burn_peft::additive::{Bottleneck, FromHub, HubMethod, HubModel, load_from_hub, save_to_hub};
use burn_peft::core::{Adapters, Overlay, Scope, Sites, Targets, adapt};
use burn_peft::models::{BertForSequenceClassification, LlamaForCausalLM, Pretrained};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

fn folders(model: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("hidden")).expect("is committed");
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.retain(|path| {
        path.to_string_lossy().ends_with(&format!("-{model}")) && path.join("adapterhub").is_dir()
    });
    folders.sort();
    folders
}

fn json(folder: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).expect("is there");
    serde_json::from_str(&text).expect("is JSON")
}

/// Writes it again and compares the files.
fn same<T: HubMethod>(folder: &Path, sites: &Sites, method: &T, adapters: &Adapters<T::Adapter>) {
    let theirs = json(folder);
    let word = |field: &str| theirs[field].as_str().expect("is text").to_owned();
    let about = HubModel {
        name: word("name"),
        model_class: word("model_class"),
        model_name: word("model_name"),
        model_type: word("model_type"),
    };
    let again = tempfile::tempdir().expect("makes a folder");
    save_to_hub(again.path(), &about, method, sites, adapters).expect("is written");
    let tensors = |folder: &Path| contents(folder.join("adapter.safetensors"));
    assert_eq!(tensors(again.path()), tensors(folder), "{}", folder.display());
    assert_eq!(json(again.path()), theirs, "{}", folder.display());
}

fn check<M: Pretrained>(
    model: &str,
    forward: impl Fn(&M, &Scope<'_>) -> Vec<f32>,
    kept: impl Fn(&[f32]) -> Vec<f32>,
) {
    let base: M = base(model);
    let sites = Sites::of(&base, Some(M::OUTPUT));
    let folders = folders(model);
    assert!(folders.len() >= 6, "{folders:?}");
    for folder in folders {
        let hub = folder.join("adapterhub");
        let found = load_from_hub(&hub, &sites, &device()).expect("is whole");
        let overlay: Box<dyn Overlay> = match found {
            FromHub::Bottleneck(method, adapters) => {
                same(&hub, &sites, &method, &adapters);
                Box::new(adapters)
            }
            FromHub::Compacter(method, adapters) => {
                same(&hub, &sites, &method, &adapters);
                Box::new(adapters)
            }
        };
        let expected = kept(&floats(&mut open(folder.join("golden.safetensors")), "logits"));
        let name = folder.display().to_string();
        near(&kept(&forward(&base, &Scope::new(&overlay))), &expected, &name);
    }
}

#[test]
fn adapters_of_adapterhub() {
    let bert = tokens("bert", true);
    check::<BertForSequenceClassification>(
        "bert",
        |model, cx| values(model.forward(&bert, cx)),
        <[f32]>::to_vec,
    );
    let llama = tokens("llama", false);
    check::<LlamaForCausalLM>(
        "llama",
        |model, cx| values(model.forward(&llama, cx)),
        |all| kept(all, &llama),
    );
}

#[test]
fn what_adapterhub_asks_for_and_is_not_here_is_refused() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, None);
    let hub = fixtures().join("hidden/houlsby-bert/adapterhub");
    let folder = tempfile::tempdir().expect("makes a folder");
    let tensors = "adapter.safetensors";
    std::fs::copy(hub.join(tensors), folder.path().join(tensors)).expect("copies");
    for (field, value) in [
        ("ln_after", Value::Bool(true)),
        ("use_gating", Value::Bool(true)),
        ("original_ln_after", Value::Bool(false)),
        ("inv_adapter", "nice".into()),
        ("non_linearity", "leakyrelu".into()),
        ("reduction_factor", 0.into()),
        ("reduction_factor", 5.into()),
        ("phm_layer", Value::Bool(true)),
    ] {
        let mut config = json(&hub);
        config["config"][field] = value.clone();
        let text = serde_json::to_string(&config).expect("is JSON");
        std::fs::write(folder.path().join("adapter_config.json"), text).expect("writes");
        let refused = load_from_hub(folder.path(), &sites, &device());
        let said = refused.expect_err("changes the result").to_string();
        let named =
            [field, "adapter_down", "leakyrelu", "swish"].iter().any(|name| said.contains(name));
        assert!(named, "{field} = {value}: {said}");
    }
    let peft = fixtures().join("methods/ia3-bert");
    let said = load_from_hub(&peft, &sites, &device()).expect_err("is HF PEFT's").to_string();
    assert!(said.contains("HF PEFT"), "{said}");

    let about = HubModel { name: "own".into(), ..HubModel::default() };
    let saved = Some(vec!["classifier".into()]);
    let targets = Targets { modules_to_save: saved, ..Targets::list(["output"]) };
    let with_norm = Bottleneck::residual(4.0, Targets::list(["output"]));
    for (method, word) in
        [(Bottleneck::houlsby(4.0, targets), "classifier"), (with_norm, "ln_before")]
    {
        let adapters = adapt(&sites, &method, 0, &device()).expect("fits");
        let refused = save_to_hub(folder.path(), &about, &method, &sites, &adapters);
        let said = refused.expect_err("has no place in the file").to_string();
        assert!(said.contains(word), "{said}");
    }
}
