//! HF PEFT's own files and numbers (`interop/fixtures.py`): its adapters load here and give its
//! logits, and what is written here is what it wrote.

use crate::probe::{far, values};
use burn::nn::LinearConfig;
use burn::tensor::Device;
use burn_peft::core::{
    AdapterConfig, Adapters, Method, Scope, Sites, TensorFile, load, merge, save,
};
use burn_peft::models::{
    BertForSequenceClassification, LlamaForCausalLM, Precision, Pretrained, Tokens,
};
use burn_peft::reparam::Lora;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

pub(crate) fn device() -> Device {
    burn_peft::device::by_name(burn_peft::device::names()[0]).expect("is in the build")
}

pub(crate) fn open(path: PathBuf) -> TensorFile {
    TensorFile::open(path).expect("is committed")
}

pub(crate) fn floats(file: &mut TensorFile, name: &str) -> Vec<f32> {
    let data = file.take_data(name).expect("is in the file").convert::<f32>();
    data.try_to_vec().expect("is f32")
}

pub(crate) fn base<M: Pretrained>(name: &str) -> M {
    let folder = fixtures().join("models").join(name);
    M::load(&folder, Precision::F32, 0, &device(), |_| ()).expect("is whole").model
}

pub(crate) fn tokens(model: &str, types: bool) -> Tokens {
    let mut file = open(fixtures().join("models").join(model).join("golden.safetensors"));
    let mut ints = |name: &str| {
        let (shape, values) = file.take_ints(name).expect("is in the file");
        (shape, values.into_iter().map(|v| v as i32).collect::<Vec<_>>())
    };
    let (shape, ids) = ints("input_ids");
    let mask = ints("attention_mask").1;
    let type_ids = types.then(|| ints("token_type_ids").1);
    Tokens { ids, mask, type_ids, batch: shape[0], seq: shape[1], ..Tokens::default() }
}

/// The logits' bound of the issue.
#[track_caller]
pub(crate) fn near(found: &[f32], expected: &[f32], what: &str) {
    let far = far(found, expected);
    assert!(found.len() == expected.len() && far <= 1e-4, "{what}: differs by {far}");
}

/// Tensors by name, less the copies that HF PEFT's wrapper writes twice.
pub(crate) fn contents(path: PathBuf) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut file = open(path);
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    // And the base weight of an adapted embedding, which is not ours to write.
    let more = [".original_module.", ".modules_to_save.", ".base_layer.weight"];
    let theirs = |name: &String| more.iter().any(|part| name.contains(part));
    names
        .into_iter()
        .filter(|name| !theirs(name))
        .map(|name| {
            let shape = file.shape(&name).map(<[usize]>::to_vec).unwrap_or_default();
            let integers = file.dtype(&name).is_some_and(|t| t.starts_with(['I', 'U']));
            let values = match integers {
                true => file
                    .take_ints(&name)
                    .expect("is in the file")
                    .1
                    .iter()
                    .map(|&i| i as f32)
                    .collect(),
                false => floats(&mut file, &name),
            };
            (name, (shape, values))
        })
        .collect()
}

/// Loads the adapter, writes it again, and compares the files: tensors, and fields that are ours.
pub(crate) fn same_file<T: Method>(folder: &Path, sites: &Sites) -> Adapters<T::Adapter> {
    let (config, adapters) = load::<T>(folder, sites, &device()).expect("is whole");
    let again = tempfile::tempdir().expect("makes a folder");
    save(again.path(), &config, sites, &adapters).expect("is written");
    let tensors = |folder: &Path| contents(folder.join("adapter_model.safetensors"));
    assert_eq!(tensors(again.path()), tensors(folder), "{}", folder.display());
    let json = |folder: &Path| -> serde_json::Map<String, serde_json::Value> {
        let text = std::fs::read_to_string(folder.join("adapter_config.json")).expect("is there");
        serde_json::from_str(&text).expect("is JSON")
    };
    let (ours, theirs) = (json(again.path()), json(folder));
    for (name, value) in &ours {
        if name != "peft_version" {
            let expected = theirs.get(name).unwrap_or(&serde_json::Value::Null);
            let [found, expected] = [value, expected].map(numbers);
            assert_eq!(found, expected, "{} {name}", folder.display());
        }
    }
    for (name, value) in theirs {
        let neutral = match &value {
            serde_json::Value::Null | serde_json::Value::Bool(false) => true,
            serde_json::Value::Object(fields) => fields.is_empty(),
            _ => name == "peft_version",
        };
        let absent = T::ABSENT.iter().any(|(field, _)| *field == name);
        assert!(neutral || absent || ours.contains_key(&name), "{} lost {name}", folder.display());
    }
    adapters
}

/// 8 and 8.0 are one number.
fn numbers(value: &serde_json::Value) -> serde_json::Value {
    match (value, value.as_f64()) {
        (_, Some(number)) => number.into(),
        (serde_json::Value::Object(fields), _) => {
            fields.iter().map(|(name, value)| (name.clone(), numbers(value))).collect()
        }
        _ => value.clone(),
    }
}

#[test]
fn bert_adapters_of_hf_peft() {
    let base: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&base, Some(BertForSequenceClassification::OUTPUT));
    let tokens = tokens("bert", true);
    let plain = values(base.forward(&tokens, &Scope::plain()));
    let mut count = 0;
    let folder = std::fs::read_dir(fixtures().join("adapters")).expect("is committed");
    for entry in folder.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("llama") {
            continue;
        }
        let adapters = same_file::<Lora>(&entry.path(), &sites);
        let expected = floats(&mut open(entry.path().join("golden.safetensors")), "logits");
        let found = values(base.forward(&tokens, &Scope::new(&adapters)));
        near(&found, &expected, &name);
        let merged = merge(&base, &[(&adapters, 1.0)]).expect("is finite");
        near(&values(merged.forward(&tokens, &Scope::plain())), &expected, &name);
        assert!(found.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-2), "{name} does nothing");
        count += 1;
    }
    assert_eq!(count, 10);
}

#[test]
fn llama_adapter_of_hf_peft() {
    let base: LlamaForCausalLM = base("llama");
    let sites = Sites::of(&base, Some(LlamaForCausalLM::OUTPUT));
    let folder = fixtures().join("adapters/llama-all-linear");
    let adapters = same_file::<Lora>(&folder, &sites);
    let tokens = tokens("llama", false);
    let expected = floats(&mut open(folder.join("golden.safetensors")), "logits");
    let found = values(base.forward(&tokens, &Scope::new(&adapters)));
    near(&kept(&found, &tokens), &kept(&expected, &tokens), "llama");
}

/// Rows of padding mean nothing, on neither side.
pub(crate) fn kept(all: &[f32], tokens: &Tokens) -> Vec<f32> {
    let width = all.len() / tokens.mask.len();
    let rows = all.chunks(width).zip(&tokens.mask).filter(|(_, kept)| **kept != 0);
    rows.flat_map(|(row, _)| row.to_vec()).collect()
}

#[test]
fn a_configuration_that_changes_the_result_is_refused() {
    let base: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&base, None);
    let plain = fixtures().join("adapters/plain");
    let folder = tempfile::tempdir().expect("makes a folder");
    let tensors = "adapter_model.safetensors";
    std::fs::copy(plain.join(tensors), folder.path().join(tensors)).expect("copies");
    let text = std::fs::read_to_string(plain.join("adapter_config.json")).expect("is committed");
    let with = |field: &str, value: serde_json::Value| {
        let mut json: serde_json::Map<_, _> = serde_json::from_str(&text).expect("is JSON");
        json.insert(field.into(), value);
        let text = serde_json::to_string(&json).expect("is JSON");
        std::fs::write(folder.path().join("adapter_config.json"), text).expect("writes");
        load::<Lora>(folder.path(), &sites, &device()).map(|(config, _)| config)
    };
    for (field, value) in [
        ("use_dora", serde_json::json!(true)),
        ("use_bdlora", serde_json::json!({"nblocks": 2})),
        ("target_parameters", serde_json::json!(["experts"])),
        ("layer_replication", serde_json::json!([[0, 1]])),
        ("r", serde_json::json!(0)),
        ("r", serde_json::json!(5)),
        ("r", serde_json::json!("four")),
        ("peft_type", serde_json::json!("NONSENSE")),
        ("init_lora_weights", serde_json::json!("pissa_niter_4")),
        ("target_modules", serde_json::json!(["nothing"])),
        ("target_modules", serde_json::json!("(")),
        ("target_modules", serde_json::json!(["query"])),
        ("target_modules", serde_json::json!(["query", "key", "value"])),
    ] {
        let said = with(field, value.clone()).expect_err("changes the result").to_string();
        let named = [field, "lora_", "tensor"].iter().any(|name| said.contains(name));
        assert!(named, "{field} = {value}: {said}");
    }
    let kept: AdapterConfig<Lora> =
        with("a_field_of_tomorrow", serde_json::json!(3)).expect("is kept");
    assert_eq!(kept.other.get("a_field_of_tomorrow"), Some(&serde_json::json!(3)));
}

/// Any JSON value, a few levels deep.
fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        "\\PC{0,8}".prop_map(Into::into),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Into::into),
            prop::collection::btree_map("[a-z]{0,3}", inner, 0..3)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// A configuration with one field that holds anything is read or refused, never a panic.
    #[test]
    fn no_configuration_panics(field in 0_usize..40, value in any_json()) {
        let folder = tempfile::tempdir().expect("makes a folder");
        let text = std::fs::read_to_string(fixtures().join("adapters/plain/adapter_config.json"));
        let text = text.expect("is committed");
        let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).expect("is JSON");
        let name = json.keys().nth(field % json.len()).expect("is within").clone();
        json.insert(name, value);
        let path = folder.path().join("adapter_config.json");
        std::fs::write(path, serde_json::to_string(&json).expect("is JSON")).expect("writes");
        if let Ok(config) = AdapterConfig::<Lora>::load(folder.path()) {
            let sites = Sites::of(&LinearConfig::new(2, 2).init(&device()), None);
            let _ = burn_peft::core::adapt(&sites, &config.method, 0, &device());
        }
    }
}
