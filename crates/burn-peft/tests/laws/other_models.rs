//! Models through `attach`, as if they were not ours: Burn's own transformer, a small CNN and a vision
//! transformer.

use crate::probe::{Drawn, Probe, all_values, close, ids, targets, values};
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::nn::{GroupNorm, GroupNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft::core::{Adapters, Scope, Sites, Targets, adapt, attach, merge};
use burn_peft::models::{Classifier, ViTForImageClassification};
use burn_peft::reparam::{Bias, Lora, LoraAdapter};

fn devices() -> Vec<Device> {
    let names = burn_peft::device::names();
    names.iter().map(|name| burn_peft::device::by_name(name).expect("is in the build")).collect()
}

/// Trains the factors through the attached model and checks that it learns, that the base keeps
/// every bit, and that merging gives what was trained.
pub(crate) fn trains<M: Module>(model: M, lora: &Lora, loss: impl Fn(&M) -> Tensor<1>) {
    let before = all_values(&model);
    let device = model.devices().first().expect("has parameters").clone();
    let sites = Sites::of(&model, None);
    let mut adapters = adapt(&sites, lora, 1, &device.autodiff()).expect("fits");
    let mut optimizer = AdamConfig::new().init();
    let start = values(loss(&model))[0];
    for step in 0..12 {
        let attached = attach(model.clone(), &adapters).expect("is the same model");
        let loss = loss(&attached);
        if step == 0 {
            close(&values(loss.clone().inner()), &[start], "a fresh adapter");
        }
        let grads = GradientsParams::from_grads(loss.backward(), &adapters);
        assert!(!grads.is_empty());
        adapters = optimizer.step(0.02, adapters, grads);
    }
    let adapters: Adapters<LoraAdapter> = adapters.valid();
    let attached = values(loss(&attach(model.clone(), &adapters).expect("is the same model")))[0];
    assert!(attached < 0.8 * start, "learnt nothing: {start} to {attached}");
    let merged = merge(&model, &[(&adapters, 1.0)]).expect("is finite");
    close(&values(loss(&merged)), &[attached], "merged");
    assert_eq!(all_values(&model), before, "the base has changed");
}

#[test]
fn burns_own_transformer() {
    for device in devices() {
        device.seed(3);
        let config = TransformerEncoderConfig::new(16, 32, 2, 2).with_dropout(0.0);
        let model: TransformerEncoder = config.init(&device);
        let x = Tensor::<3>::random([2, 5, 16], Distribution::Normal(0.0, 1.0), &device);
        let wanted = Tensor::<3>::random([2, 5, 16], Distribution::Normal(0.0, 1.0), &device);
        let names = Targets::list(["query", "value", "linear_inner", "linear_outer"]);
        trains(model, &Lora::new(4, 8.0, names), |model| {
            let y = model.forward(TransformerEncoderInput::new(x.clone()));
            (y - wanted.clone()).powi_scalar(2).mean()
        });
    }
}

#[derive(Module, Debug)]
struct Cnn {
    conv1: Conv2d,
    norm: GroupNorm,
    conv2: Conv2d,
    pool: AdaptiveAvgPool2d,
    head: Linear,
}

impl Cnn {
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = relu(self.norm.forward(self.conv1.forward(x)));
        let x = self.pool.forward(relu(self.conv2.forward(x)));
        self.head.forward(x.flatten(1, 3))
    }
}

#[test]
fn a_small_cnn() {
    for device in devices() {
        device.seed(4);
        let model = Cnn {
            conv1: Conv2dConfig::new([1, 4], [3, 3]).init(&device),
            norm: GroupNormConfig::new(2, 4).init(&device),
            conv2: Conv2dConfig::new([4, 6], [3, 3]).init(&device),
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            head: LinearConfig::new(6, 3).init(&device),
        };
        let x = Tensor::<4>::random([6, 1, 8, 8], Distribution::Normal(0.0, 1.0), &device);
        let wanted = Tensor::<2>::random([6, 3], Distribution::Normal(0.0, 1.0), &device);
        let saved = Targets {
            modules_to_save: Some(vec!["head".into()]),
            ..Targets::list(["conv1", "conv2"])
        };
        let lora = Lora { bias: Bias::Only("lora_only".into()), ..Lora::new(2, 4.0, saved) };
        trains(model, &lora, |model| {
            (model.forward(x.clone()) - wanted.clone()).powi_scalar(2).mean()
        });
    }
}

#[test]
fn a_vision_transformer() {
    let model: ViTForImageClassification = crate::hf::base("vit");
    let images = crate::vision::images("vit");
    let wanted = Tensor::<2>::from_data([[2.0, -1.0, 0.0], [-1.0, 0.5, 1.0]], &crate::hf::device());
    let names = Targets::list(["query", "value", "intermediate.dense", "projection"]);
    trains(model, &Lora::new(4, 8.0, names), |model| {
        let logits = model.forward(&images, &Scope::plain());
        (logits - wanted.clone()).powi_scalar(2).mean()
    });
}

#[test]
fn attached_is_overlaid_on_every_kind_of_place() {
    for device in devices() {
        let model = Probe::new(&device);
        let sites = Sites::of(&model, Some("head"));
        let ids = ids(&device);
        for targets in targets::<Lora>(&sites) {
            let saving = Targets { modules_to_save: Some(vec!["head".into()]), ..targets };
            let lora = Lora { bias: Bias::All, ..Lora::new(3, 5.0, saving) };
            let adapters = adapt(&sites, &lora, 0, &device.clone().autodiff()).expect("fits");
            let adapters = adapters.map(&mut Drawn::new(9, 0.4)).valid();
            let attached = attach(model.clone(), &adapters).expect("is the same model");
            let overlaid = values(model.forward(&ids, &Scope::new(&adapters)));
            close(&values(attached.plain(&ids)), &overlaid, "attached");
        }
    }
}

#[test]
fn trained_values_come_back_out_of_an_attached_model() {
    let device = devices().remove(0);
    let model = Probe::new(&device);
    let sites = Sites::of(&model, None);
    let adapters =
        adapt(&sites, &Lora::new(2, 4.0, Targets::list(["query"])), 0, &device.clone().autodiff());
    let adapters = adapters.expect("fits");
    let attached = attach(model.clone(), &adapters).expect("is the same model");
    let ids = ids(&device);
    let y = attached.plain(&ids);
    let grads = GradientsParams::from_grads((y.clone() * y).mean().backward(), &attached);
    let trained = AdamConfig::new().init().step(0.1, attached, grads);
    let updated = adapters.clone().updated_from(&trained);
    assert_ne!(all_values(&updated), all_values(&adapters));
    let overlaid = values(model.forward(&ids, &Scope::new(&updated.valid())));
    close(&values(trained.valid().plain(&ids)), &overlaid, "updated");
}

#[test]
fn attaching_to_another_model_is_refused() {
    let device = devices().remove(0);
    let sites = Sites::of(&Probe::new(&device), None);
    let lora = Lora::new(2, 4.0, Targets::list(["query"]));
    let adapters = adapt(&sites, &lora, 0, &device.clone().autodiff()).expect("fits");
    let other = LinearConfig::new(3, 3).init(&device);
    assert!(attach(other.clone(), &adapters).is_err_and(|e| e.to_string().contains("query")));
    let bare = Bare { query: LinearConfig::new(8, 8).with_bias(false).init(&device) };
    let lora = Lora { lora_bias: true, ..lora };
    let adapters =
        adapt(&Sites::of(&bare, None), &lora, 0, &device.clone().autodiff()).expect("fits");
    assert!(merge(&bare, &[(&adapters, 1.0)]).is_err_and(|e| e.to_string().contains("bias")));
    assert!(attach(bare, &adapters).is_err_and(|e| e.to_string().contains("bias")));
    assert!(merge(&other, &[(&adapters, 1.0)]).is_err_and(|e| e.to_string().contains("query")));
}

#[derive(Module, Debug)]
struct Bare {
    query: Linear,
}
