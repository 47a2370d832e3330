//! A base that is held in fewer bits: linear weights in 8, or matrices in bf16.

use super::probe::distance;
use super::*;
use burn::tensor::DType;
use burn::tensor::quantization::QuantValue;
use burn_peft::core::{quantize, widened};

/// What weights in fewer bits stand for.
pub(crate) struct Floats;

impl ModuleMapper for Floats {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(widened)
    }
}

/// The weights of linear layers and embeddings in bf16, as a model is loaded.
#[derive(Default)]
struct Halves(Vec<bool>);

impl ModuleMapper for Halves {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.0.push(matches!(container_type, "Struct:Linear" | "Struct:Embedding"));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match D == 2 && self.0.last() == Some(&true) {
            true => param.map(|weight| weight.cast(DType::BF16)),
            false => param,
        }
    }
}

impl<T: Method> Case<T> {
    /// Over the same model in 8 bits, or in `half`; `back` in floats, of the numbers that are left.
    fn rounded(&self, half: bool, back: bool) -> Self {
        let scheme = self.device.settings().quantization.scheme.with_value(QuantValue::Q8S);
        let rounded = match half {
            true => self.model.clone().map(&mut Halves::default()),
            false => quantize(self.model.clone(), &scheme),
        };
        let model = if back { rounded.map(&mut Floats) } else { rounded };
        Self {
            name: format!("{} over {}", self.name, if half { "bf16" } else { "8 bits" }),
            method: self.method.clone(),
            device: self.device.clone(),
            sites: Sites::of(&model, Some("head")),
            model,
            ids: self.ids.clone(),
            linear_only: self.linear_only,
        }
    }

    /// Gradients of all trained tensors, in the module's order: numbers that are sums of the same ones, so that
    /// the largest says how far rounding takes any of them.
    fn gradients(&self, adapters: &Adapters<T::Adapter>) -> Vec<f32> {
        gradients(self.model.forward(&self.ids, &Scope::new(adapters)), adapters)
    }
}

/// Those of the mean square of `y` by all that `adapters` train.
pub(crate) fn gradients<M: Module, const D: usize>(y: Tensor<D>, adapters: &M) -> Vec<f32> {
    let found = GradientsParams::from_grads((y.clone() * y).mean().backward(), adapters);
    let mut all = Found { found: &found, all: Vec::new() };
    adapters.visit(&mut all);
    all.all
}

struct Found<'a> {
    found: &'a GradientsParams,
    all: Vec<f32>,
}

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.all.extend(self.found.get::<D>(param.id).into_iter().flat_map(values));
    }
}

impl<T: Method> Case<T> {
    /// Holds the case over this model to the numbers that the model stands for: as it begins, what it gives, and how it
    /// learns. Both, with what was compared.
    fn is_its_numbers(&self, half: bool) -> [(Self, Adapters<T::Adapter>); 2] {
        let [held, plain] = [false, true].map(|back| self.rounded(half, back));
        assert_ne!(
            plain.forward(&Scope::plain()),
            self.forward(&Scope::plain()),
            "nothing was rounded"
        );
        let [there, here] = [&held, &plain].map(|case| case.trained(1));
        assert_eq!(all_values(&there), all_values(&here), "{}", held.name);
        let [found, expected] = [(held, there), (plain, here)];
        let name = &found.0.name;
        let learned = [&found, &expected].map(|(case, adapters)| case.gradients(adapters));
        let [one, other] = &learned;
        // What draws while it trains gives other gradients now and then: a part is dropped or it isn't.
        let draws = || (0..256).any(|_| expected.0.gradients(&expected.1) != *other);
        let [distance, bound] = distance(one, other);
        assert!(distance <= bound || draws(), "{name} learns: {distance} apart, at most {bound}");
        let [one, other] =
            [&found, &expected].map(|(case, a)| case.forward(&Scope::new(&a.valid())));
        close(&one, &other, name);
        [found, expected]
    }
}

law!(
    /// An adapter over a quantized base is the adapter over the numbers that the base then stands for: as it
    /// begins, what it gives, how it learns, and merged.
    a_quantized_base_is_its_numbers,
    |case| {
        let [(quantized, adapters), _] = case.is_its_numbers(false);
        let adapters = adapters.valid();
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let found = quantized.forward(&Scope::new(&adapters));
        let merged = merge(&quantized.model, &[(&folds, 1.0)]).expect("is finite");
        close(&values(merged.plain(&case.ids)), &found, &format!("{} merged", quantized.name));
    }
);

law!(
    /// One over a base in bf16 is that over its numbers in f32; merged, it is the f32 model rounded once.
    a_base_in_half_precision_is_its_numbers,
    |case| {
        // ndarray has no such type.
        if !case.device.supports_dtype(DType::BF16) {
            return;
        }
        let merged = case.is_its_numbers(true).map(|(held, adapters)| {
            let adapters = adapters.valid();
            let folds = Folded::<T>::new(&adapters)?;
            Some(merge(&held.model, &[(&folds, 1.0)]).expect("is finite"))
        });
        let [Some(found), Some(expected)] = merged else { return };
        let rounded = expected.map(&mut Halves::default());
        assert_eq!(all_values(&found), all_values(&rounded), "{} merged", case.name);
    }
);
