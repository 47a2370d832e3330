//! What is trained together: one method's adapters or several methods', each with rules of its own.

use crate::TrainError;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Adapters, AnyAdapter, Guide, Passes, Policy};
use serde_json::Value as Json;

/// One method's part of a training.
#[derive(Debug)]
pub struct Part {
    /// Its [erased](Adapters::erased) adapters.
    pub adapters: Adapters<AnyAdapter>,
    /// What it adds to the loss and does around a step.
    pub guide: Guide<AnyAdapter>,
    /// Names of its parameters that LoRA+ makes faster.
    pub faster: &'static [&'static str],
}

/// The policies of all parts; those without have none.
pub(crate) struct Policies(pub(crate) Vec<Option<Box<dyn Policy<AnyAdapter>>>>);

/// Moves the gradients of a module's parameters.
struct Moved<'a> {
    from: &'a mut GradientsParams,
    to: &'a mut GradientsParams,
}

impl ModuleVisitor for Moved<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.remove::<D>(param.id) {
            self.to.register(param.id, gradient);
        }
    }
}

impl Policies {
    /// As [`Policy::gradients`]: each sees those of its own adapters.
    pub(crate) fn gradients(
        &mut self,
        step: usize,
        parts: &[Adapters<AnyAdapter>],
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        for (policy, adapters) in self.0.iter_mut().zip(parts) {
            let Some(policy) = policy else { continue };
            let mut own = GradientsParams::new();
            adapters.visit(&mut Moved { from: &mut gradients, to: &mut own });
            let mut kept = policy.gradients(step, adapters, own);
            adapters.visit(&mut Moved { from: &mut kept, to: &mut gradients });
        }
        gradients
    }

    /// As [`Policy::look`]: each sees the examples of as many of the latest steps as it wants, by `examples`.
    pub(crate) fn look<P: Passes>(
        &mut self,
        step: usize,
        parts: &[Adapters<AnyAdapter>],
        examples: impl Fn(usize) -> P,
    ) -> Result<(), TrainError> {
        for (at, (policy, adapters)) in self.0.iter_mut().zip(parts).enumerate() {
            let Some(policy) = policy else { continue };
            let back = policy.looks_back(step).min(step);
            if back == 0 {
                continue;
            }
            let others = parts.iter().enumerate().filter(|(other, _)| *other != at);
            let mut beside: Vec<_> = others.map(|(_, adapters)| adapters.valid()).collect();
            let whole = adapters.valid();
            let copies = whole.copies().map(|(path, copy)| (path.to_owned(), copy.clone()));
            beside.push(Adapters::new([], copies));
            policy.look(adapters, &beside, &examples(back))?;
        }
        Ok(())
    }

    /// As [`Policy::adjust`]; whether any adapters go on as others.
    pub(crate) fn adjust(
        &mut self,
        step: usize,
        rate: f64,
        parts: &mut [Adapters<AnyAdapter>],
    ) -> Result<bool, TrainError> {
        let mut changed = false;
        for (policy, adapters) in self.0.iter_mut().zip(parts) {
            let Some(policy) = policy else { continue };
            if let Some(other) = policy.adjust(step, rate, adapters)? {
                *adapters = other;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// What a checkpoint holds, by part; nothing where there is no policy at all.
    pub(crate) fn state(&self) -> Result<Option<Vec<Json>>, TrainError> {
        if self.0.iter().all(Option::is_none) {
            return Ok(None);
        }
        let state = |policy: &Option<Box<dyn Policy<AnyAdapter>>>| {
            Ok(policy.as_ref().map_or(Ok(Json::Null), |policy| policy.state())?)
        };
        self.0.iter().map(state).collect::<Result<_, _>>().map(Some)
    }

    /// Goes on where `state` was taken.
    pub(crate) fn resume(&mut self, state: Vec<Json>, device: &Device) -> Result<(), TrainError> {
        for (policy, state) in self.0.iter_mut().zip(state) {
            if let Some(policy) = policy {
                policy.resume(state, device)?;
            }
        }
        Ok(())
    }
}
