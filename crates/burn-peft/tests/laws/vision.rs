//! Vision transformers: HF PEFT's own adapters over them (`interop/vision.py`).

use crate::hf::{base, fixtures, floats, near, open, same_file};
use crate::probe::values;
use burn_peft::core::{Scope, Sites, merge};
use burn_peft::models::{
    Classifier, Dinov2ForImageClassification, Images, ViTForImageClassification,
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

#[test]
fn vision_adapters_of_hf_peft() {
    adapts::<ViTForImageClassification>("vit");
    adapts::<Dinov2ForImageClassification>("dinov2");
}
