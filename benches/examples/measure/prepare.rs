//! The model and the adapters that both sides read: the same numbers on every machine.

use crate::job::{Failed, Job, Measured};
use crate::steps::Peer;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{AdapterConfig, Sites, Targets, adapt, hf_path, save, site_rng};
use burn_peft_models::{Precision, save_model};
use burn_peft_reparam::Lora;
use rand::RngExt;
use rand_distr::StandardNormal;

/// Standard deviation of all that is drawn: BERT's and Llama's `initializer_range`.
const STD: f32 = 0.02;

/// Draws every parameter by its name. Norms stand around 1, and nothing is at 0, so that no part of the
/// model can be forgotten without being seen.
struct Drawn {
    seed: u64,
    stack: Vec<String>,
}

impl ModuleMapper for Drawn {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let mean = if self.stack.last().is_some_and(|name| name == "gamma") { 1.0 } else { 0.0 };
        let mut rng = site_rng(self.seed, &hf_path(&self.stack));
        let shape = param.lazy_shape().dims::<D>();
        let count = shape.iter().product();
        let draw = |_| mean + STD * rng.sample::<f32, _>(StandardNormal);
        let data = TensorData::new((0..count).map(draw).collect::<Vec<f32>>(), shape);
        let device = param.lazy_device();
        Param::initialized(param.id, Tensor::from_data(data, &device))
    }
}

/// Writes the model, unless its weights are real ones with what they lack drawn, and the adapters.
pub(crate) fn prepare<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let model = match &job.source {
        Some(source) => {
            let model = B::load(source, Precision::F32, 0, &device, |_| ())?.model;
            save_model(&model, source, &job.model, &[])?;
            model
        }
        None => {
            let model = B::init(&B::read_config(&job.model)?, &device)?;
            let model = model.map(&mut Drawn { seed: 0, stack: Vec::new() });
            save_model(&model, &job.model, &job.model, &[])?;
            model
        }
    };
    let sites = Sites::of(&model, Some(B::OUTPUT));
    let method = Lora::new(job.r, job.lora_alpha, Targets::list(job.target_modules.iter()));
    for (folder, seed) in job.adapters.iter().zip(1..) {
        let adapters = adapt(&sites, &method, seed, &device)?;
        let adapters = adapters.map(&mut Drawn { seed, stack: Vec::new() });
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        save(folder, &AdapterConfig::new(method.clone()), &sites, &adapters)?;
    }
    Ok(Measured::default())
}
