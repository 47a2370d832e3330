//! Every method that HF PEFT has, in its files and with its numbers (`interop/methods.py`), on a BERT
//! and a Llama.

use crate::hf::{base, device, fixtures, floats, kept, near, open, same_file, tokens};
use crate::probe::values;
use burn_peft::core::{Error, Folds, Kind, Method, Scope, Sites, merge, peft_type};
use burn_peft::models::{
    BertForSequenceClassification, Classifier, Dinov2ForImageClassification, Images,
    LlamaForCausalLM, Pretrained, ViTForImageClassification,
};
use burn_peft::registry::{ForEach, Job, for_each_method, load_any, with_method};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Reads, writes again, and compares the files.
pub(crate) struct SameFile<'a>(pub(crate) &'a Path, pub(crate) &'a Sites);

impl Job for SameFile<'_> {
    type Output = ();
    fn run<T: Method>(self) {
        same_file::<T>(self.0, self.1);
    }
}

pub(crate) fn folders(kind: &str, model: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join(kind)).expect("is committed");
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.retain(|path| path.to_string_lossy().ends_with(&format!("-{model}")));
    folders.sort();
    folders
}

/// Goes through the adapters of a kind for one model; returns their methods.
fn check<M: Pretrained>(
    kind: &str,
    model: &str,
    forward: impl Fn(&M, &Scope<'_>) -> Vec<f32>,
    kept: impl Fn(&[f32]) -> Vec<f32>,
) -> BTreeSet<String> {
    let base: M = base(model);
    let sites = Sites::of(&base, Some(M::OUTPUT));
    let plain = kept(&forward(&base, &Scope::plain()));
    let mut methods = BTreeSet::new();
    for folder in folders(kind, model) {
        let name = folder.file_name().expect("has a name").to_string_lossy().into_owned();
        let method = peft_type(&folder).expect("names its method");
        with_method(&method, SameFile(&folder, &sites)).expect("is in the registry");
        let adapters = load_any(&folder, &sites, &device()).expect("is whole");
        let expected = kept(&floats(&mut open(folder.join("golden.safetensors")), "logits"));
        let found = kept(&forward(&base, &Scope::new(&adapters)));
        near(&found, &expected, &name);
        let folds: Option<Box<dyn Folds + '_>> = adapters.folds();
        match folds.map(|folds| merge(&base, &[(folds.as_ref(), 1.0)])) {
            // Llama's layers have no bias for those that change one.
            None | Some(Err(Error::Place { .. })) => {}
            Some(merged) => {
                let merged = forward(&merged.expect("is finite"), &Scope::plain());
                near(&kept(&merged), &expected, &format!("{name} merged"));
            }
        }
        let changed = found.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(changed, "{name} does nothing");
        methods.insert(method);
    }
    methods
}

/// Goes through the adapters of a kind for both models, of which `all` are the methods that may not be missing.
fn check_both(kind: &str, all: BTreeSet<String>) {
    let bert_tokens = tokens("bert", true);
    let bert = check::<BertForSequenceClassification>(
        kind,
        "bert",
        |model, cx| values(model.forward(&bert_tokens, cx)),
        <[f32]>::to_vec,
    );
    let llama_tokens = tokens("llama", false);
    let llama = check::<LlamaForCausalLM>(
        kind,
        "llama",
        |model, cx| values(model.forward(&llama_tokens, cx)),
        |all| kept(all, &llama_tokens),
    );
    // HF PEFT has no such for BERT.
    let not_for_bert = BTreeSet::from(["ADAPTION_PROMPT".to_owned()]);
    for (model, found) in [("bert", &bert | &not_for_bert), ("llama", llama)] {
        let missing: Vec<_> = all.difference(&found).collect();
        assert!(missing.is_empty(), "no golden files on {model} for {missing:?}");
    }
}

#[test]
fn methods_of_hf_peft() {
    struct Named(BTreeSet<String>);
    impl ForEach for Named {
        fn visit<T: Method>(&mut self) {
            // LoRA's own files are in `hf.rs`.
            if T::HF_FORMAT && T::NAME != "LORA" {
                self.0.insert(T::NAME.to_owned());
            }
        }
    }
    let mut named = Named(BTreeSet::new());
    for_each_method(&mut named);
    check_both("methods", named.0);
}

/// With the numbers of AdapterHub's `adapters` (`interop/hidden.py`), or of the paper's formula in PyTorch where that
/// does not have the method (`interop/hidden_formulas.py`).
#[test]
fn methods_over_hidden_states() {
    struct Named(BTreeSet<String>);
    impl ForEach for Named {
        fn visit<T: Method>(&mut self) {
            if T::KINDS == [Kind::Hidden] {
                self.0.insert(T::NAME.to_owned());
            }
        }
    }
    let mut named = Named(BTreeSet::new());
    for_each_method(&mut named);
    check_both("hidden", named.0);
}

/// Of a model of images.
fn look<M: Classifier<Input = Images>>(kind: &str, name: &str) -> BTreeSet<String> {
    let images = crate::vision::images(name);
    let forward = |model: &M, cx: &Scope<'_>| values(model.forward(&images, cx));
    check::<M>(kind, name, forward, <[f32]>::to_vec)
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// With the numbers of the paper's formula in PyTorch (`interop/routed.py`), where each row goes alone.
#[test]
fn blocks_for_some_tokens_by_their_formula() {
    let batch = tokens("bert", true);
    let bert = check::<BertForSequenceClassification>(
        "routed",
        "bert",
        |model, cx| values(model.forward(&batch, cx)),
        <[f32]>::to_vec,
    );
    let all = names(&["CODA"]);
    assert_eq!(bert, all);
    assert_eq!(look::<ViTForImageClassification>("routed", "vit"), all);
    assert_eq!(look::<Dinov2ForImageClassification>("routed", "dinov2"), all);
}

/// With the numbers of the papers' formulas in PyTorch (`interop/in_front.py`), on models of text and of images.
#[test]
fn what_stands_in_front_by_its_formula() {
    let batch = tokens("bert", true);
    let bert = check::<BertForSequenceClassification>(
        "prompts",
        "bert",
        |model, cx| values(model.forward(&batch, cx)),
        <[f32]>::to_vec,
    );
    let masked = check::<BertForSequenceClassification>(
        "prompts",
        "bert-mlm",
        |model, cx| values(model.forward(&batch, cx)),
        <[f32]>::to_vec,
    );
    let batch = tokens("llama", false);
    let llama = check::<LlamaForCausalLM>(
        "prompts",
        "llama",
        |model, cx| values(model.forward(&batch, cx)),
        |all| kept(all, &batch),
    );
    let carried = ["LPT", "PREFIX_PROPAGATION", "SELECTIVE_PROMPT_TUNING", "VPT"];
    let everywhere = names(&carried);
    assert_eq!(
        bert,
        &everywhere | &names(&["APROMPT", "APT", "IDPG", "INFOPROMPT", "PTP", "SMOP", "WARP"])
    );
    assert_eq!(masked, names(&["WARP"]));
    // It predicts what it reads.
    let unread = names(&["SELECTIVE_PROMPT_TUNING"]);
    assert_eq!(llama, &(&everywhere - &unread) | &names(&["APROMPT", "APT"]));
    assert_eq!(look::<ViTForImageClassification>("prompts", "vit"), everywhere);
    assert_eq!(look::<Dinov2ForImageClassification>("prompts", "dinov2"), everywhere);
}
