//! Matching rules against HF PEFT's own answers, and files against rubbish.

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Kind, Names, Site, Sites, Strictness, Targets, TensorFile, Value, write_atomic, write_tensors,
};
use proptest::prelude::*;
use serde::Deserialize;
use std::path::{Path, PathBuf};

fn site(path: &str, kind: Kind) -> Site {
    let weight = Value::D2(Tensor::zeros([1, 1], &Device::flex()));
    Site { path: path.into(), kind, weight, bias: None, mask: None }
}

fn linears(paths: &[String], output: Option<&str>) -> Sites {
    let all = paths.iter().map(|path| site(path, Kind::Linear)).collect();
    Sites { all, output: output.map(str::to_owned), ..Sites::default() }
}

#[derive(Deserialize)]
struct Case {
    config: Targets,
    paths: Vec<String>,
}

#[derive(Deserialize)]
struct Cases {
    paths: Vec<String>,
    cases: Vec<Case>,
}

fn reached(targets: &Targets, sites: &Sites, strictness: Strictness) -> Option<Vec<String>> {
    let found = targets.select(sites, &[Kind::Linear], strictness).ok()?;
    Some(found.iter().map(|site| site.path.clone()).collect())
}

#[test]
fn targets_reach_what_hf_peft_reaches() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/targets.json");
    let text = std::fs::read_to_string(path).expect("is committed");
    let cases: Cases = serde_json::from_str(&text).expect("is JSON");
    let sites = linears(&cases.paths, None);
    for Case { config, paths } in &cases.cases {
        // What reaches nothing is an error here, as it is when HF PEFT builds the model.
        let expected = (!paths.is_empty()).then(|| paths.clone());
        assert_eq!(reached(config, &sites, Strictness::Any), expected, "{config:?}");
    }
    assert!(cases.cases.len() > 15);
}

#[test]
fn all_linear_leaves_the_output_and_saved_layers_out() {
    let paths = ["a.query", "a.value", "pooler", "classifier"].map(String::from);
    let sites = linears(&paths, Some("classifier"));
    let all = Targets {
        target_modules: Some("ALL-linear".into()),
        modules_to_save: Some(vec!["pooler".into()]),
        ..Targets::default()
    };
    let expected = vec!["a.query".to_owned(), "a.value".to_owned()];
    assert_eq!(reached(&all, &sites, Strictness::EachName), Some(expected));
}

#[test]
fn each_name_that_a_user_types_must_match() {
    let sites = linears(&["layer.0.query".into(), "layer.0.value".into()], None);
    let targets = Targets::list(["query", "valeu"]);
    let refused = targets.select(&sites, &[Kind::Linear], Strictness::EachName);
    let said = refused.expect_err("one matches nothing").to_string();
    assert!(said.contains("`valeu`") && said.contains("value"), "{said}");
    assert!(reached(&targets, &sites, Strictness::Any).is_some());
    let none = Targets::default();
    assert!(none.select(&sites, &[Kind::Linear], Strictness::EachName).is_err());
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("makes a folder");
    let path = folder.path().join("x.safetensors");
    (folder, path)
}

proptest! {
    /// Any bytes are a file or a sentence, never a panic.
    #[test]
    fn no_bytes_make_reading_panic(header in "\\PC{0,200}", tail in proptest::collection::vec(any::<u8>(), 0..64), lie in any::<Option<u64>>()) {
        let (_folder, path) = scratch();
        let length = lie.unwrap_or(header.len() as u64);
        let bytes = [&length.to_le_bytes()[..], header.as_bytes(), &tail].concat();
        std::fs::write(&path, bytes).expect("writes");
        read(&path);
    }

    /// As above, with headers that are nearly right.
    #[test]
    fn no_header_makes_reading_panic(start in 0_u64..40, end in 0_u64..80, a in any::<u32>(), b in 0_u64..9, dtype in "F32|F16|I64|BF16|F8_E4M3|BOOL|X") {
        let (_folder, path) = scratch();
        let header = format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":[{a},{b}],\"data_offsets\":[{start},{end}]}}}}");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 40]].concat();
        std::fs::write(&path, bytes).expect("writes");
        read(&path);
    }

    /// What was written is read, whatever its shape and numbers.
    #[test]
    fn tensors_come_back(values in proptest::collection::vec(any::<f32>(), 1..40), split in 1_usize..5) {
        let (_folder, path) = scratch();
        let rows = if values.len().is_multiple_of(split) { split } else { 1 };
        let shape = [rows, values.len() / rows];
        let data = TensorData::new(values.clone(), shape);
        write_tensors(&path, [("a.b".to_owned(), &data)]).expect("writes");
        let mut file = TensorFile::open(&path).expect("is whole");
        prop_assert_eq!(file.shape("a.b"), Some(&shape[..]));
        let found: Vec<f32> = file.take_data("a.b").expect("is there").try_to_vec().expect("is f32");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&found), bits(&values));
        prop_assert!(!file.has("a.b"));
    }

    /// Any pattern is a rule or a sentence.
    #[test]
    fn no_pattern_panics(pattern in "\\PC{0,30}") {
        let sites = linears(&["layer.0.query".into()], None);
        let targets = Targets { target_modules: Some(Names::Pattern(pattern)), ..Targets::default() };
        let _ = targets.select(&sites, &[Kind::Linear], Strictness::EachName);
    }
}

/// Reads whatever can be read.
fn read(path: &Path) {
    let Ok(mut file) = TensorFile::open(path) else { return };
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    for name in names {
        let _ = file.take::<2>(&name, [2, 2], &Device::flex());
        let _ = file.take_ints(&name);
        let _ = file.take_data(&name);
    }
}

#[test]
fn a_missing_tensor_lists_near_names() {
    let (_folder, path) = scratch();
    let data = TensorData::new(vec![1.0_f32], [1]);
    write_tensors(&path, [("layer.query".to_owned(), &data)]).expect("writes");
    let mut file = TensorFile::open(&path).expect("is whole");
    let said = file.take_data("layer.quary").expect_err("is not there").to_string();
    assert!(said.contains("layer.quary") && said.contains("layer.query"), "{said}");
}

#[test]
fn a_write_is_whole_or_absent() {
    let (folder, path) = scratch();
    write_atomic(&path, b"old").expect("writes");
    write_atomic(&path, b"new").expect("writes");
    assert_eq!(std::fs::read(&path).expect("is there"), b"new");
    // A folder stands where the file should go.
    let taken = folder.path().join("taken");
    std::fs::create_dir_all(taken.join("inside")).expect("makes a folder");
    assert!(write_atomic(&taken, b"x").is_err());
    let left = std::fs::read_dir(folder.path()).expect("is there").count();
    assert_eq!(left, 2, "a temporary file was left");
}

#[cfg(unix)]
#[test]
fn a_link_stays_a_link_and_an_old_mark_goes_first() {
    let folder = tempfile::tempdir().expect("makes a folder");
    let [real, link] = ["real", "link"].map(|name| folder.path().join(name));
    std::fs::write(&real, "old").expect("writes");
    std::os::unix::fs::symlink(&real, &link).expect("links");
    burn_peft_core::write_atomic(&link, b"new").expect("writes");
    assert!(link.is_symlink() && std::fs::read(&real).is_ok_and(|bytes| bytes == b"new"));
    let mark = folder.path().join("mark");
    std::fs::write(&mark, "old").expect("writes");
    // A folder cannot be replaced by a file: nothing is, and the mark is still there.
    let part = folder.path().join("none/part");
    std::fs::write(folder.path().join("none"), "in the way").expect("writes");
    let files = [(part, b"new".as_slice()), (mark.clone(), b"new".as_slice())];
    assert!(burn_peft_core::write_together(&files).is_err());
    assert!(std::fs::read(&mark).is_ok_and(|bytes| bytes == b"old"));
}
