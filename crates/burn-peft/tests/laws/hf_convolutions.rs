//! Every method that HF PEFT lays over convolutions, in its files and with its numbers
//! (`interop/methods.py`).

use crate::hf::{device, fixtures, floats, near, open};
use crate::hf_methods::SameFile;
use crate::probe::values;
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{Linear, LinearConfig, PaddingConfig2d};
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn_peft::core::{Folds, Kind, Method, Scope, Sites, TensorFile, merge, peft_type};
use burn_peft::registry::{ForEach, for_each_method, load_any, with_method};
use std::collections::BTreeSet;
use std::path::Path;

#[derive(Module, Debug)]
struct Cnn {
    conv1: Conv2d,
    conv2: Conv1d,
    head: Linear,
}

impl Cnn {
    fn forward(&self, x: Tensor<4>, cx: &Scope<'_>) -> Tensor<2> {
        let h = relu(cx.at("conv1").conv2d(&self.conv1, x));
        let [batch, channels, height, width] = h.dims();
        let h = h.reshape([batch, channels, height * width]);
        let h = relu(cx.at("conv2").conv1d(&self.conv2, h));
        cx.at("head").linear(&self.head, h.mean_dim(2).squeeze_dim(2))
    }
}

/// PyTorch's weights into Burn's layers.
struct FromFile<'a> {
    file: &'a mut TensorFile,
    stack: Vec<String>,
}

impl ModuleMapper for FromFile<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }
    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let mut shape = param.dims();
        if D == 2 {
            shape.reverse();
        }
        let name = format!("base.{}", self.stack.join("."));
        let tensor = self.file.take(&name, shape, &device()).expect("is in the file");
        Param::initialized(param.id, if D == 2 { tensor.transpose() } else { tensor })
    }
}

/// The model whose weights the golden file holds.
fn model(golden: &mut TensorFile) -> Cnn {
    let device = device();
    let conv1 = Conv2dConfig::new([3, 6], [3, 3]).with_stride([2, 2]);
    let model = Cnn {
        conv1: conv1.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(&device),
        conv2: Conv1dConfig::new(6, 8, 2).with_stride(2).init(&device),
        head: LinearConfig::new(8, 4).init(&device),
    };
    model.map(&mut FromFile { file: golden, stack: Vec::new() })
}

/// Reads, writes again, and compares the numbers; returns the method.
fn check(folder: &Path) -> String {
    let name = folder.file_name().expect("has a name").to_string_lossy().into_owned();
    let mut golden = open(folder.join("golden.safetensors"));
    let model = model(&mut golden);
    let sites = Sites::of(&model, None);
    let x: Tensor<4> = golden.take("x", [2, 3, 8, 8], &device()).expect("is in the file");
    let plain = values(model.forward(x.clone(), &Scope::plain()));
    near(&plain, &floats(&mut golden, "before"), "base");
    let method = peft_type(folder).expect("names its method");
    with_method(&method, SameFile(folder, &sites)).expect("is in the registry");
    let adapters = load_any(folder, &sites, &device()).expect("is whole");
    let expected = floats(&mut golden, "logits");
    let found = values(model.forward(x.clone(), &Scope::new(&adapters)));
    near(&found, &expected, &name);
    let folds: Box<dyn Folds + '_> = adapters.folds().expect("acts on weights");
    let merged = merge(&model, &[(folds.as_ref(), 1.0)]).expect("is finite");
    near(&values(merged.forward(x, &Scope::plain())), &expected, &format!("{name} merged"));
    assert!(found.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3), "{name} does nothing");
    method
}

#[test]
fn convolutions_of_hf_peft() {
    let folders = std::fs::read_dir(fixtures().join("convolutions")).expect("is committed");
    let found: BTreeSet<String> = folders.flatten().map(|entry| check(&entry.path())).collect();
    struct Named(BTreeSet<String>);
    impl ForEach for Named {
        fn visit<T: Method>(&mut self) {
            if T::HF_FORMAT && T::KINDS.contains(&Kind::Conv2d) {
                self.0.insert(T::NAME.to_owned());
            }
        }
    }
    let mut named = Named(BTreeSet::new());
    for_each_method(&mut named);
    let missing: Vec<_> = named.0.difference(&found).collect();
    assert!(missing.is_empty(), "no golden files on convolutions for {missing:?}");
}
