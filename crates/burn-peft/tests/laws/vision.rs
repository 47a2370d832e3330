//! Vision transformers: HF PEFT's own adapters over them (`interop/vision.py`).

use crate::hf::{base, device, fixtures, floats, near, open, same_file};
use crate::probe::values;
use burn_peft::additive::Convpass;
use burn_peft::core::{Scope, Sites, Targets, adapt, merge};
use burn_peft::models::{
    BertForSequenceClassification, Classifier, Dinov2ForImageClassification, Images,
    ViTForImageClassification,
};
use burn_peft::reparam::Lora;

pub(crate) fn images(model: &str) -> Images {
    let mut file = open(fixtures().join("models").join(model).join("golden.safetensors"));
    Images { pixels: floats(&mut file, "pixel_values"), batch: 2, shape: [3, 12, 12] }
}

fn adapts<M: Classifier<Input = Images>>(name: &str) {
    let base: M = base(name);
    let sites = Sites::of(&base, Some(M::OUTPUT));
    let folder = fixtures().join(format!("vision/lora-{name}"));
    let adapters = same_file::<Lora>(&folder, &sites);
    let expected = floats(&mut open(folder.join("golden.safetensors")), "logits");
    let images = images(name);
    near(&values(base.forward(&images, &Scope::new(&adapters))), &expected, name);
    let merged = merge(&base, &[(&adapters, 1.0)]).expect("is finite");
    near(&values(merged.forward(&images, &Scope::plain())), &expected, name);
    let plain = values(base.forward(&images, &Scope::plain()));
    assert!(plain.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1e-2), "{name} does nothing");
}

/// Convpass over patches, by the paper's formula in PyTorch, of images that are no squares.
fn convolves<M: Classifier<Input = Images>>(name: &str) {
    let base: M = base(name);
    let sites = Sites::of(&base, Some(M::OUTPUT));
    let folder = fixtures().join(format!("vision/convpass-{name}"));
    let adapters = same_file::<Convpass>(&folder, &sites);
    let expected = floats(&mut open(folder.join("golden.safetensors")), "logits");
    let mut file = open(fixtures().join("models").join(name).join("golden.safetensors"));
    let pixels = floats(&mut file, "other_pixel_values");
    let images = Images { batch: pixels.len() / (3 * 20 * 16), pixels, shape: [3, 20, 16] };
    near(&values(base.forward(&images, &Scope::new(&adapters))), &expected, name);
    let plain = values(base.forward(&images, &Scope::plain()));
    assert!(plain.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1e-2), "{name} does nothing");
}

#[test]
fn convpass_goes_over_patches() {
    convolves::<ViTForImageClassification>("vit");
    convolves::<Dinov2ForImageClassification>("dinov2");
    let sites = Sites::of(&base::<BertForSequenceClassification>("bert"), None);
    let method = Convpass::over_images(2, Targets::list(["output"]));
    let said = adapt(&sites, &method, 0, &device()).expect_err("reads no images").to_string();
    assert!(said.starts_with("image: "), "{said}");
}

#[test]
fn vision_adapters_of_hf_peft() {
    adapts::<ViTForImageClassification>("vit");
    adapts::<Dinov2ForImageClassification>("dinov2");
}
