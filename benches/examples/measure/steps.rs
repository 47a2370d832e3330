//! What is measured without gradients.

use crate::job::{Failed, Job, Measured, timed, took};
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft_core::{Adapters, Bank, Scope, Sites, load};
use burn_peft_kernels::linear;
use burn_peft_models::{
    BertForSequenceClassification, LlamaForCausalLM, Precision, Pretrained, Sampling,
};
use burn_peft_reparam::{Lora, LoraAdapter};
use burn_peft_train::data::{
    CausalBatch, CausalItem, ClassBatch, ClassItem, causal_batch, class_batch,
};
use burn_peft_train::{Objective, measure};

/// A model that both sides have.
pub(crate) trait Peer: Objective + Pretrained {
    /// The job's rows, as this model is trained with them.
    fn batch(job: &Job) -> Self::Batch;

    /// The tokens that follow a prompt.
    fn continued(
        &self,
        cx: &Scope<'_>,
        prompt: &[u32],
        sampling: &Sampling,
    ) -> Result<Vec<u32>, Failed>;
}

impl Peer for BertForSequenceClassification {
    fn batch(job: &Job) -> ClassBatch {
        let item = |(ids, label): (&Vec<u32>, &i32)| ClassItem {
            ids: ids.clone(),
            type_ids: vec![0; ids.len()],
            label: *label,
        };
        let items: Vec<ClassItem> = job.rows.iter().zip(&job.labels).map(item).collect();
        class_batch(&items, &(0..items.len()).collect::<Vec<_>>(), 0)
    }

    fn continued(&self, _: &Scope<'_>, _: &[u32], _: &Sampling) -> Result<Vec<u32>, Failed> {
        Err("a classifier does not continue texts".into())
    }
}

impl Peer for LlamaForCausalLM {
    fn batch(job: &Job) -> CausalBatch {
        let item = |ids: &Vec<u32>| CausalItem { ids: ids.clone(), learnt: vec![true; ids.len()] };
        let items: Vec<CausalItem> = job.rows.iter().map(item).collect();
        let rows: Vec<[usize; 1]> = (0..items.len()).map(|row| [row]).collect();
        let rows: Vec<&[usize]> = rows.iter().map(<[usize; 1]>::as_slice).collect();
        causal_batch(&items, &rows, 0)
    }

    fn continued(
        &self,
        cx: &Scope<'_>,
        prompt: &[u32],
        sampling: &Sampling,
    ) -> Result<Vec<u32>, Failed> {
        Ok(burn_peft_models::generate(self, cx, prompt, sampling, |_| true)?)
    }
}

/// The model in f32 and its places.
pub(crate) fn base<B: Peer>(job: &Job, device: &Device) -> Result<(B, Sites), Failed> {
    held(job, Precision::F32, device)
}

/// The model with its matrices held so, and its places.
pub(crate) fn held<B: Peer>(
    job: &Job,
    precision: Precision,
    device: &Device,
) -> Result<(B, Sites), Failed> {
    let model = B::load(&job.model, precision, 0, device, |_| ())?.model;
    let sites = Sites::of(&model, Some(B::OUTPUT));
    Ok((model, sites))
}

/// The job's adapter of that number.
pub(crate) fn adapter(
    job: &Job,
    number: usize,
    sites: &Sites,
    device: &Device,
) -> Result<Adapters<LoraAdapter>, Failed> {
    let folder = job.adapters.get(number).ok_or_else(|| format!("has no adapter {number}"))?;
    Ok(load::<Lora>(folder, sites, device)?.1)
}

pub(crate) fn forward<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = base::<B>(job, &device)?;
    let (adapters, batch) = (adapter(job, 0, &sites, &device)?, B::batch(job));
    let cx = Scope::new(&adapters);
    Objective::check(&model, &batch, &cx)?;
    let (measured, losses) = timed(job, |_| Ok(measure(&model, &batch, &device, &cx).loss))?;
    Ok(Measured { losses, ..measured })
}

/// All adapters of the job, under their numbers.
fn bank(
    job: &Job,
    sites: &Sites,
    device: &Device,
) -> Result<(Bank<LoraAdapter>, Vec<String>), Failed> {
    let mut bank = Bank::new();
    let names: Vec<String> = (0..job.adapters.len()).map(|number| number.to_string()).collect();
    for (number, name) in names.iter().enumerate() {
        bank.insert(name, adapter(job, number, sites, device)?);
    }
    Ok((bank, names))
}

pub(crate) fn loaded<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = base::<B>(job, &device)?;
    let (bank, names) = bank(job, &sites, &device)?;
    let batch = B::batch(job);
    let chosen = bank.only(names.last().ok_or("has no adapters")?)?;
    let cx = Scope::new(&chosen);
    let (measured, losses) = timed(job, |_| Ok(measure(&model, &batch, &device, &cx).loss))?;
    Ok(Measured { losses, ..measured })
}

pub(crate) fn mixed<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = base::<B>(job, &device)?;
    let (bank, names) = bank(job, &sites, &device)?;
    let batch = B::batch(job);
    let by_row: Vec<&str> =
        (0..job.rows.len()).map(|row| names[row % names.len()].as_str()).collect();
    let (own, one) = (bank.rows(&by_row, &device)?, bank.only(by_row[0])?);
    let loss =
        |cx: &Scope<'_>| -> Result<f64, Failed> { Ok(measure(&model, &batch, &device, cx).loss) };
    let (measured, losses) = timed(job, |_| loss(&Scope::new(&own)))?;
    let (alone, _) = timed(job, |_| loss(&Scope::new(&one)))?;
    Ok(Measured { losses, one_seconds: alone.step_seconds, ..measured })
}

pub(crate) fn generate<B: Peer>(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let (model, sites) = base::<B>(job, &device)?;
    let adapters = adapter(job, 0, &sites, &device)?;
    let prompt = job.rows.first().ok_or("has no row to continue")?;
    let sampling = Sampling { max_new_tokens: job.new_tokens, ..Sampling::default() };
    let (measured, texts) =
        timed(job, |_| model.continued(&Scope::new(&adapters), prompt, &sampling))?;
    let new_tokens = texts.into_iter().next().unwrap_or_default();
    Ok(Measured { new_tokens, ..measured })
}

/// The largest rate of all products, each made several times.
pub(crate) fn rate(job: &Job) -> Result<Measured, Failed> {
    let device = Device::flex();
    let mut best = 0.0_f64;
    for &[m, k, n] in &job.products {
        let x = Tensor::<3>::random([1, m, k], Distribution::Default, &device);
        let w = Tensor::<2>::random([k, n], Distribution::Default, &device);
        let (_, seconds) = timed(job, |_| {
            let product = || -> Result<Tensor<3>, Failed> {
                let y = linear(x.clone(), w.clone(), None);
                device.sync().map_err(|e| format!("{e:?}"))?;
                Ok(y)
            };
            Ok(took(product)?.1)
        })?;
        let fastest = seconds.into_iter().fold(f64::INFINITY, f64::min);
        best = best.max(2.0 * (m * k * n) as f64 / fastest);
    }
    Ok(Measured { rate: Some(best), ..Measured::default() })
}
