//! Weights in half precision: what is held how, what it computes, and what is written.

use crate::{LLAMAS, changed, fixture, golden, tokens, values};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor};
use burn_peft_core::{Scope, TensorFile, hf_path, widened, write_tensors};
use burn_peft_models::{
    BertForSequenceClassification, LlamaForCausalLM, Precision, Pretrained, save_model,
};
use std::collections::BTreeMap;
use std::path::Path;

type Bert = BertForSequenceClassification;

fn load<M: Pretrained>(folder: &Path, precision: Precision) -> M {
    M::load(folder, precision, 0, &Device::flex(), |_| ()).expect("is a whole model").model
}

/// The types of all parameters, by name.
#[derive(Default)]
struct Types {
    stack: Vec<String>,
    found: BTreeMap<String, DType>,
}

impl ModuleVisitor for Types {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found.insert(hf_path(&self.stack), param.val().dtype());
    }
}

fn types<M: Module>(model: &M) -> BTreeMap<String, DType> {
    let mut types = Types::default();
    model.visit(&mut types);
    types.found
}

struct Floats;

impl ModuleMapper for Floats {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(widened)
    }
}

#[test]
fn matrices_are_held_in_half_and_all_else_in_full() {
    let folder = fixture("bert");
    for (precision, half) in [(Precision::Bf16, DType::BF16), (Precision::F16, DType::F16)] {
        let types = types(&load::<Bert>(&folder, precision));
        for (name, found) in &types {
            let matrix = name.ends_with(".weight") && !name.contains("LayerNorm");
            assert_eq!(*found, if matrix { half } else { DType::F32 }, "{name}");
        }
        assert!(types.values().any(|found| *found == half));
    }
    // Files in half precision keep theirs, but for norms.
    for (name, half) in [(LLAMAS[1], DType::BF16), (LLAMAS[2], DType::F16)] {
        let types = types(&load::<LlamaForCausalLM>(&fixture(name), Precision::Keep));
        for (name, found) in &types {
            let vector = name.contains("norm") || name.ends_with("bias");
            assert_eq!(*found, if vector { DType::F32 } else { half }, "{name}");
        }
    }
}

/// A file in half precision that is kept gives the logits that it gives in f32, but for the order of sums; and so does each
/// model of the numbers that are left.
#[test]
fn what_is_held_in_half_computes_in_full() {
    fn close<M: Pretrained>(name: &str, held: &M, full: &M, forward: impl Fn(&M) -> Tensor<3>) {
        let [found, expected] = [held, full].map(|model| values(forward(model)));
        let size = expected.iter().fold(1.0_f32, |size, x| size.max(x.abs()));
        // Logits stand behind some 20 sums of at most 48 products, whose roundings are independent: 20·√48 of them.
        let bound = 2.0 * 20.0 * 48.0_f32.sqrt() * f32::EPSILON * size;
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= bound, "{name}: {a} {b}");
        }
    }
    for name in LLAMAS {
        let (folder, tokens) = (fixture(name), tokens(&mut golden(&fixture(name))));
        let forward = |model: &LlamaForCausalLM| model.forward(&tokens, &Scope::plain());
        let keep = load(&folder, Precision::Keep);
        close(name, &keep, &load(&folder, Precision::F32), forward);
        let half: LlamaForCausalLM = load(&folder, Precision::Bf16);
        close(name, &half, &half.clone().map(&mut Floats), forward);
    }
}

#[test]
fn a_model_in_half_is_written_so_and_read_again() {
    for precision in [Precision::Bf16, Precision::F16] {
        let (source, folder) = (fixture("bert"), tempfile::tempdir().expect("makes a folder"));
        let model: Bert = load(&source, precision);
        save_model(&model, &source, folder.path(), &[]).expect("is written");
        let size = |folder: &Path| {
            let file = folder.join("model.safetensors").metadata();
            file.expect("is there").len()
        };
        assert!(size(folder.path()) < size(&source) * 2 / 3);
        let again: Bert = load(folder.path(), Precision::Keep);
        assert_eq!(types(&again), types(&model));
        let tokens = tokens(&mut golden(&source));
        let [found, expected] =
            [&again, &model].map(|model| values(model.forward(&tokens, &Scope::plain())));
        assert_eq!(found, expected);
    }
}

#[test]
fn what_float16_cannot_hold_is_refused() {
    let folder = changed("bert", "config.json", |bytes| bytes);
    let path = folder.path().join("model.safetensors");
    let mut file = TensorFile::open(&path).expect("is committed");
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let tensor = |name: &String| {
        let data = file.take_data(name).expect("is in the file");
        let data = match name.contains("word_embeddings") {
            true => (Tensor::<2>::from_data(data, &Device::flex()) * 1e6).into_data(),
            false => data,
        };
        (name.clone(), data)
    };
    let tensors: Vec<_> = names.iter().map(tensor).collect();
    write_tensors(&path, tensors.iter().map(|(name, data)| (name.clone(), data))).expect("writes");
    let load = |precision| Bert::load(folder.path(), precision, 0, &Device::flex(), |_| ());
    let said = load(Precision::F16).expect_err("is too large").to_string();
    for part in ["word_embeddings.weight", "65504", "bfloat16"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(load(Precision::Bf16).is_ok());
}
