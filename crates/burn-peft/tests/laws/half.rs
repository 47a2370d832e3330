//! Models that are loaded in half precision, under the adapters of the fixtures.

use crate::hf::{device, fixtures, kept, tokens};
use crate::hf_methods::folders;
use crate::probe::{Drawn, close, distance, values};
use crate::quantized::{Floats, gradients};
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Tensor};
use burn_peft::core::{
    Adapters, Method, Scope, Sites, Targets, adapt, attach, load, merge, peft_type,
};
use burn_peft::models::{BertForSequenceClassification, LlamaForCausalLM, Precision, Pretrained};
use burn_peft::registry::{Job, with_method};
use burn_peft::reparam::Lora;
use std::path::Path;

/// Logits, and of those that mean something the numbers.
struct Over<'a, M, F, K> {
    folder: &'a Path,
    /// In half precision, and in f32 with the same numbers.
    models: &'a [M; 2],
    forward: &'a F,
    kept: &'a K,
}

impl<M, F, K> Job for Over<'_, M, F, K>
where
    M: Pretrained,
    F: Fn(&M, &Scope<'_>) -> Tensor<1>,
    K: Fn(&[f32]) -> Vec<f32>,
{
    type Output = ();

    fn run<T: Method>(self) {
        let name = self.folder.display();
        let sites = Sites::of(&self.models[0], Some(M::OUTPUT));
        let adapters: Adapters<T::Adapter> =
            load::<T>(self.folder, &sites, &device().autodiff()).expect("is whole").1;
        let still = adapters.valid();
        let [found, expected] = self
            .models
            .each_ref()
            .map(|model| (self.kept)(&values((self.forward)(model, &Scope::new(&still)))));
        close(&found, &expected, &format!("{name}"));
        let plain = (self.kept)(&values((self.forward)(&self.models[0], &Scope::plain())));
        assert_ne!(found, plain, "{name} does nothing");
        let learned =
            |model: &M| gradients((self.forward)(model, &Scope::new(&adapters)), &adapters);
        let [found, expected] = self.models.each_ref().map(learned);
        assert!(!found.is_empty(), "{name} learns nothing");
        let [distance, bound] = distance(&found, &expected);
        // What draws while it trains gives other gradients now and then.
        let draws = || (0..256).any(|_| learned(&self.models[1]) != expected);
        assert!(distance <= bound || draws(), "{name} learns: {distance} apart, at most {bound}");
    }
}

/// Every method's adapters of the fixtures over a model in `precision`: the logits and the gradients are those over the f32
/// model whose weights are the rounded ones. Widening rounds nothing, so that the order of sums is all that may differ.
fn is_its_numbers<M: Pretrained>(
    model: &str,
    precision: Precision,
    forward: impl Fn(&M, &Scope<'_>) -> Tensor<1>,
    kept: impl Fn(&[f32]) -> Vec<f32>,
    lora: &str,
) {
    // ndarray has no such types.
    if !device().supports_dtype(DType::BF16) {
        return;
    }
    let folder = fixtures().join("models").join(model);
    let load =
        |precision| M::load(&folder, precision, 0, &device(), |_| ()).expect("is whole").model;
    let held = load(precision);
    let models = [held.clone(), held.map(&mut Floats)];
    let base = |model: &M| values(forward(model, &Scope::plain()));
    assert_ne!(base(&models[0]), base(&load(Precision::F32)), "nothing was rounded");
    close(&base(&models[0]), &base(&models[1]), model);
    let kinds = ["methods", "hidden", "prompts", "routed"].map(|kind| folders(kind, model));
    for folder in kinds.concat().into_iter().chain([fixtures().join("adapters").join(lora)]) {
        let method = peft_type(&folder).expect("names its method");
        let job = Over { folder: &folder, models: &models, forward: &forward, kept: &kept };
        with_method(&method, job).expect("is in the registry");
    }
}

#[test]
fn bert_in_bf16_is_its_numbers() {
    let tokens = tokens("bert", true);
    let forward = |model: &BertForSequenceClassification, cx: &Scope<'_>| {
        model.forward(&tokens, cx).flatten(0, 1)
    };
    is_its_numbers("bert", Precision::Bf16, forward, <[f32]>::to_vec, "plain");
}

#[test]
fn llama_in_bf16_is_its_numbers() {
    let tokens = tokens("llama", false);
    let forward =
        |model: &LlamaForCausalLM, cx: &Scope<'_>| model.forward(&tokens, cx).flatten(0, 2);
    let kept = |all: &[f32]| kept(all, &tokens);
    is_its_numbers("llama", Precision::Bf16, forward, kept, "llama-all-linear");
}

/// What is attached to a parameter in half precision reads as what is merged into it, and learns in f32.
#[test]
fn attached_to_bf16_is_merged_into_it() {
    if !device().supports_dtype(DType::BF16) {
        return;
    }
    let plain = LinearConfig::new(6, 5).init(&device());
    let model = One { query: plain.map(&mut Bf16) };
    let sites = Sites::of(&model, None);
    let lora = Lora::new(2, 4.0, Targets::list(["query"]));
    let adapters = adapt(&sites, &lora, 0, &device().autodiff()).expect("fits");
    let adapters = adapters.map(&mut Drawn::new(3, 0.4));
    let attached = attach(model.clone(), &adapters).expect("is the same model");
    let merged = merge(&model, &[(&adapters, 1.0)]).expect("is finite");
    let (read, expected) = (attached.query.weight.val(), merged.query.weight.val());
    assert_eq!([read.dtype(), expected.dtype()], [DType::BF16; 2]);
    assert_eq!(values(read.clone()), values(expected));
    assert_ne!(values(read.clone()), values(model.query.weight.val()));
    let found = gradients(read, &attached);
    assert_eq!(found.len(), 2 * (6 + 5));
    assert!(found.iter().any(|g| *g != 0.0));
}

#[derive(Module, Debug)]
struct One {
    query: Linear,
}

struct Bf16;

impl ModuleMapper for Bf16 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|t| t.cast(DType::BF16))
    }
}
