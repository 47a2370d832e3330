//! What is measured with gradients: a step is forward, backward, clipping and AdamW.

use crate::job::{Failed, Job, Measured, timed, took};
use crate::steps::{Peer, adapter, base, held};
use burn::module::{Lora as BuiltIn, Module, ModuleMapper, Param, ParamGroup};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn::train::TrainStep;
use burn_peft_core::{
    AdapterConfig, Adapters, Bank, Scope, TENSORS_FILE, hf_path, load, save, trained_parameters,
};
use burn_peft_models::Precision;
use burn_peft_reparam::{Lora, LoraAdapter};
use burn_peft_train::{Objective, Step, StepSettings, Tuned, clip, measure};
use std::sync::Arc;

/// Times an adapter is loaded, and another is switched to.
const LOADS: usize = 5;
const SWITCHES: usize = 20;

fn adamw() -> ModuleOptimizer {
    AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).build().into()
}

/// LoRA as burn-peft trains it: the base on the plain device, the factors beside it.
pub(crate) fn lora<B: Peer>(
    job: &Job,
    precision: Precision,
    gradient_checkpointing: bool,
) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = held::<B>(job, precision, &device)?;
    let adapters = adapter(job, 0, &sites, &device.clone().autodiff())?;
    let batch = B::batch(job);
    Objective::check(&model, &batch, &Scope::new(&adapters))?;
    let settings = StepSettings {
        device: device.clone(),
        max_grad_norm: job.max_grad_norm,
        seed: 0,
        gradient_checkpointing,
    };
    let mut tuned = Tuned::new(Arc::new(model), vec![adapters.erased()], settings);
    let mut optimizer = adamw();
    let (measured, reports) = timed(job, |index| {
        let batches = vec![batch.clone()];
        let output = TrainStep::step(&tuned, Step { index, epoch: 0, ends_epoch: false, batches });
        tuned = optimizer.step(job.learning_rate, tuned.clone(), output.grads);
        Ok(output.item)
    })?;

    let trained: Adapters<LoraAdapter> = tuned.adapters[0].typed().ok_or("are no LoRA adapters")?;
    let config = AdapterConfig::<Lora>::load(&job.adapters[0])?;
    save(&job.folder, &config, &sites, &trained)?;
    let written = job.folder.join(TENSORS_FILE);
    let adapter_bytes = std::fs::metadata(&written).map_err(|e| e.to_string())?.len();
    let other = job.adapters.get(1).ok_or("has no second adapter to load")?;
    let mut bank = Bank::new();
    bank.insert("trained", trained);
    let mut load_seconds = Vec::new();
    for _ in 0..LOADS {
        let ((_, loaded), seconds) = took(|| Ok(load::<Lora>(other, &sites, &device)?))?;
        bank.insert("loaded", loaded);
        load_seconds.push(seconds);
    }
    let mut switch_seconds = Vec::new();
    let mut active = bank.only("trained")?;
    for index in 0..SWITCHES {
        let name = if index % 2 == 0 { "trained" } else { "loaded" };
        let (selected, seconds) = took(|| Ok(bank.only(name)?))?;
        active = selected;
        switch_seconds.push(seconds);
    }
    let switched = measure(&*tuned.base, &batch, &device, &Scope::new(&active)).loss;
    Ok(Measured {
        losses: reports.iter().map(|report| report.loss).collect(),
        grad_norm: reports.first().map(|report| report.grad_norm),
        trained_parameters: Some(trained_parameters(&tuned)),
        load_seconds,
        switch_seconds,
        switched_loss: Some(switched),
        adapter_bytes: Some(adapter_bytes),
        ..measured
    })
}

/// A step of a model whose own parameters are trained.
fn own<B: Peer>(job: &Job, model: B, trained: usize) -> Result<Measured, Failed> {
    let (device, batch) = (Device::flex(), B::batch(job));
    let (mut held, mut optimizer) = (Some(model), adamw());
    let (measured, steps) = timed(job, |_| {
        let model = held.take().ok_or("a step before was not made")?;
        let sum = model.loss(&batch, &device, &Scope::plain()).sum;
        let mean = sum / B::targets(&batch).max(1) as f64;
        let loss = f64::from(mean.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(mean.backward(), &model);
        let (grads, norm) = clip(&model, grads, job.max_grad_norm);
        held = Some(optimizer.step(job.learning_rate, model, grads));
        Ok((loss, norm))
    })?;
    Ok(Measured {
        losses: steps.iter().map(|(loss, _)| *loss).collect(),
        grad_norm: steps.first().map(|(_, norm)| *norm),
        trained_parameters: Some(trained),
        ..measured
    })
}

/// Makes every parameter a leaf that is trained.
struct Leaves;

impl ModuleMapper for Leaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = param.val().detach();
        Param::initialized(param.id, Param::from_tensor(value).val())
    }
}

pub(crate) fn full<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex().autodiff();
    let model = B::load(&job.model, Precision::F32, 0, &device, |_| ())?.model;
    let model = model.map(&mut Leaves);
    let trained = Module::num_params(&model);
    own(job, model, trained)
}

/// Puts factors of ours into Burn's own adapters, `weight.lora.a` and `weight.lora.b`.
struct Factors<'a> {
    from: &'a Adapters<LoraAdapter>,
    stack: Vec<String>,
    set: usize,
}

impl ModuleMapper for Factors<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let [path @ .., weight, lora, factor] = &self.stack[..] else { return param };
        if (weight.as_str(), lora.as_str()) != ("weight", "lora") {
            return param;
        }
        let Some(ours) = self.from.get(&hf_path(path)) else { return param };
        let ours = match factor.as_str() {
            "a" => Some(ours.lora_a.val()),
            _ => ours.lora_b.as_ref().map(Param::val),
        };
        let Some(ours) = ours.filter(|ours| ours.dims()[..] == param.dims()[..]) else {
            return param;
        };
        self.set += ours.dims().iter().product::<usize>();
        let value = Tensor::<D>::from_data(ours.into_data(), &param.device());
        Param::initialized(param.id, Param::from_tensor(value).val())
    }
}

/// Burn's own way: the factors are part of the model, composed densely on every read.
pub(crate) fn apply_lora<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = base::<B>(job, &device.clone().autodiff())?;
    let adapters = adapter(job, 0, &sites, &device)?;
    let names = job.target_modules.iter().map(|name| format!("{name}.weight")).collect();
    let lora = BuiltIn::new(job.r, job.lora_alpha);
    let model = model.apply_lora(lora.set_param_group(ParamGroup::from_any_predicates(names)));
    let mut factors = Factors { from: &adapters, stack: Vec::new(), set: 0 };
    let model = model.map(&mut factors);
    let (set, expected) = (factors.set, trained_parameters(&adapters));
    if set != expected {
        let found = format!("apply_lora took {set} of the adapter's {expected} numbers");
        return Err(found.into());
    }
    own(job, model, set)
}
