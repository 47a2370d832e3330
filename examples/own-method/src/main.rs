//! A method of one's own (`scaled.rs`) over a model of one's own, through `burn-peft-core` alone. Nothing
//! in any crate of burn-peft knows of it.

mod scaled;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft_core::{Adapters, Error, Scope, Sites, Targets, adapt, merge};
use scaled::{Scaled, ScaledAdapter};

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

/// A frozen model, and what it shall learn.
struct Task {
    base: Mlp,
    sites: Sites,
    method: Scaled,
    device: Device,
    x: Tensor<2>,
    wanted: Tensor<2>,
}

impl Task {
    fn new() -> Self {
        let device = Device::flex();
        device.seed(1);
        let base = Mlp {
            up: LinearConfig::new(8, 16).init(&device),
            down: LinearConfig::new(16, 4).init(&device),
        };
        Self {
            sites: Sites::of(&base, None),
            base,
            method: Scaled::new(4, Targets::list(["up", "down"])),
            x: Tensor::random([32, 8], Distribution::Default, &device),
            wanted: Tensor::random([32, 4], Distribution::Default, &device),
            device,
        }
    }

    fn adapters(&self) -> Result<Adapters<ScaledAdapter>, Error> {
        adapt(&self.sites, &self.method, 42, &self.device.clone().autodiff())
    }

    fn loss(&self, model: &Mlp, cx: &Scope<'_>) -> Tensor<1> {
        (model.forward(self.x.clone(), cx) - self.wanted.clone()).powi_scalar(2).mean()
    }

    fn trained(&self, steps: usize) -> Result<Adapters<ScaledAdapter>, Error> {
        let mut adapters = self.adapters()?;
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..steps {
            let gradients = self.loss(&self.base, &Scope::new(&adapters)).backward();
            let gradients = GradientsParams::from_grads(gradients, &adapters);
            adapters = optimizer.step(0.01, adapters, gradients);
        }
        Ok(adapters)
    }
}

fn main() -> Result<(), Error> {
    let task = Task::new();
    let adapters = task.trained(50)?.valid();
    let merged = merge(&task.base, &[(&adapters, 1.0)])?;
    let number = |model: &Mlp, cx: &Scope<'_>| task.loss(model, cx).into_scalar::<f32>();
    let before = number(&task.base, &Scope::plain());
    let after = number(&task.base, &Scope::new(&adapters));
    let merged = number(&merged, &Scope::plain());
    println!("loss {before:.4} before, {after:.4} after, {merged:.4} merged");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_peft_core::{AdapterConfig, Method, load, save, trained_parameters};

    fn outputs(task: &Task, model: &Mlp, cx: &Scope<'_>) -> Vec<f32> {
        model.forward(task.x.clone(), cx).into_data().try_to_vec().expect("is f32")
    }

    #[test]
    fn it_begins_as_an_identity_with_as_many_parameters_as_it_says() {
        let task = Task::new();
        let adapters = task.adapters().expect("fits").valid();
        let plain = outputs(&task, &task.base, &Scope::plain());
        assert_eq!(outputs(&task, &task.base, &Scope::new(&adapters)), plain);
        let said: usize = task.sites.all.iter().map(|site| task.method.parameters(site)).sum();
        assert_eq!(trained_parameters(&adapters), said);
        assert_eq!(said, 4 * (8 + 16 + 1) + 4 * (16 + 4 + 1));
        let broken = Scaled { r: 0, ..task.method };
        let refused = adapt(&task.sites, &broken, 42, &task.device).expect_err("has no rank");
        assert!(refused.to_string().starts_with("r: expected 1 or more"), "{refused}");
    }

    #[test]
    fn a_step_trains_it_and_fifty_halve_the_loss() {
        let task = Task::new();
        let loss = |adapters: &Adapters<ScaledAdapter>| -> f32 {
            task.loss(&task.base, &Scope::new(&adapters.valid())).into_scalar()
        };
        let [before, one, fifty] =
            [0, 1, 50].map(|steps| loss(&task.trained(steps).expect("fits")));
        assert!(one < before && fifty < 0.5 * before, "{before}, {one}, {fifty}");
    }

    #[test]
    fn merged_it_is_the_same_function() {
        let task = Task::new();
        let adapters = task.trained(50).expect("fits").valid();
        let overlaid = outputs(&task, &task.base, &Scope::new(&adapters));
        let merged = merge(&task.base, &[(&adapters, 1.0)]).expect("is finite");
        let merged = outputs(&task, &merged, &Scope::plain());
        // Sums of 16 numbers about 1, in another order.
        let far = overlaid.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 16.0 * 4.0 * f32::EPSILON, "differs by {far}");
        assert_ne!(overlaid, outputs(&task, &task.base, &Scope::plain()));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let task = Task::new();
        let adapters = task.trained(5).expect("fits").valid();
        let folder = std::env::temp_dir().join(format!("own-method-{}", std::process::id()));
        let config = AdapterConfig::new(task.method.clone());
        save(&folder, &config, &task.sites, &adapters).expect("is written");
        let (config, again) = load::<Scaled>(&folder, &task.sites, &task.device).expect("is whole");
        let _ = std::fs::remove_dir_all(&folder);
        assert_eq!(config.method, task.method);
        let [written, read] =
            [&adapters, &again].map(|a| outputs(&task, &task.base, &Scope::new(a)));
        assert_eq!(read, written);
    }
}
