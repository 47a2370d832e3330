//! LoRA on a model of one's own, with `burn-peft-core` and `burn-peft-reparam` alone: no registry,
//! no model zoo, no training crate.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft_core::{AdapterConfig, Error, Scope, Sites, Targets, adapt, load, merge, save};
use burn_peft_reparam::Lora;

#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn forward(&self, x: Tensor<2>, cx: &Scope<'_>) -> Tensor<2> {
        let h = relu(cx.at("up").linear(&self.up, x));
        cx.at("down").linear(&self.down, h)
    }
}

fn run() -> Result<[f32; 3], Error> {
    let device = Device::flex();
    device.seed(1);
    let base = Mlp {
        up: LinearConfig::new(8, 16).init(&device),
        down: LinearConfig::new(16, 4).init(&device),
    };
    let x = Tensor::random([32, 8], Distribution::Default, &device);
    let wanted = Tensor::random([32, 4], Distribution::Default, &device);
    let loss = |model: &Mlp, cx: &Scope<'_>| {
        (model.forward(x.clone(), cx) - wanted.clone()).powi_scalar(2).mean()
    };

    let lora = Lora::new(4, 8.0, Targets::list(["up", "down"]));
    let sites = Sites::of(&base, None);
    let mut adapters = adapt(&sites, &lora, 42, &device.clone().autodiff())?;
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..50 {
        let gradients = loss(&base, &Scope::new(&adapters)).backward();
        let gradients = GradientsParams::from_grads(gradients, &adapters);
        adapters = optimizer.step(0.01, adapters, gradients);
    }

    let folder = std::env::temp_dir().join(format!("only-core-{}", std::process::id()));
    save(&folder, &AdapterConfig::new(lora), &sites, &adapters)?;
    let (_, loaded) = load::<Lora>(&folder, &sites, &device)?;
    let _ = std::fs::remove_dir_all(&folder);
    let merged = merge(&base, &[(&loaded, 1.0)])?;
    let number = |loss: Tensor<1>| loss.into_scalar::<f32>();
    Ok([
        number(loss(&base, &Scope::plain())),
        number(loss(&base, &Scope::new(&loaded))),
        number(loss(&merged, &Scope::plain())),
    ])
}

fn main() -> Result<(), Error> {
    let [before, after, merged] = run()?;
    println!("loss {before:.4} before, {after:.4} after, {merged:.4} merged");
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_learns() {
        let [before, after, merged] = super::run().expect("works");
        assert!(after < 0.5 * before, "{before} to {after}");
        assert!((after - merged).abs() < 1e-5, "{after} and {merged}");
    }
}
