//! LoRA over a model that knows nothing of adapters: Burn's own transformer, unmodified.
//!
//! cargo run --package burn-peft --example any_model

use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Distribution, Tensor};
use burn_peft::device;
use burn_peft::prelude::*;

pub(crate) fn main() {
    let device = device::by_name("flex").expect("is in the default build");
    device.seed(1);
    let base: TransformerEncoder = TransformerEncoderConfig::new(32, 64, 4, 2).init(&device);
    let x = Tensor::<3>::random([4, 6, 32], Distribution::Default, &device);
    let wanted = Tensor::<3>::random([4, 6, 32], Distribution::Default, &device);
    let loss = |model: &TransformerEncoder| {
        let y = model.forward(TransformerEncoderInput::new(x.clone()));
        (y - wanted.clone()).powi_scalar(2).mean()
    };

    // Places are found by name; the base stays on the plain device and is only read.
    let lora = Lora::new(4, 8.0, Targets::list(["query", "value", "linear_outer"]));
    let sites = Sites::of(&base, None);
    let mut adapters = adapt(&sites, &lora, 42, &device.autodiff()).expect("the names match");
    println!("{}", Summary::new(&sites, &adapters));

    let mut optimizer = AdamConfig::new().init();
    for step in 0..20 {
        // Each step lays the adapters over a clone: handles, no copies.
        let model = attach(base.clone(), &adapters).expect("is the model they were made for");
        let loss = loss(&model);
        if step % 5 == 0 {
            println!("step {step}: loss {:.4}", loss.clone().into_scalar::<f32>());
        }
        let grads = GradientsParams::from_grads(loss.backward(), &adapters);
        adapters = optimizer.step(0.01, adapters, grads);
    }
    let merged = merge(&base, &[(&adapters, 1.0)]).expect("is finite");
    let [before, after] = [&base, &merged].map(|model| loss(model).into_scalar::<f32>());
    println!("loss of the base {before:.4}, of the merged model {after:.4}");
}
