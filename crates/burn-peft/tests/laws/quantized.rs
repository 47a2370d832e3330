//! A base whose linear weights are in 8 bits.

use super::probe::distance;
use super::*;
use burn::tensor::quantization::QuantValue;
use burn_peft::core::quantize;

/// What quantized weights stand for.
struct Floats;

impl ModuleMapper for Floats {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(Tensor::dequantize)
    }
}

impl<T: Method> Case<T> {
    /// Over the same model in 8 bits; `back` in floats, of the numbers that are left.
    fn rounded(&self, back: bool) -> Self {
        let scheme = self.device.settings().quantization.scheme.with_value(QuantValue::Q8S);
        let rounded = quantize(self.model.clone(), &scheme);
        let model = if back { rounded.map(&mut Floats) } else { rounded };
        Self {
            name: format!("{} over 8 bits", self.name),
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
        let y = self.model.forward(&self.ids, &Scope::new(adapters));
        let found = GradientsParams::from_grads((y.clone() * y).mean().backward(), adapters);
        let mut all = Found { found: &found, all: Vec::new() };
        adapters.visit(&mut all);
        all.all
    }
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

law!(
    /// An adapter over a quantized base is the adapter over the numbers that the base then stands for: as it
    /// begins, what it gives, how it learns, and merged.
    a_quantized_base_is_its_numbers,
    |case| {
        let [quantized, plain] = [false, true].map(|back| case.rounded(back));
        assert_ne!(plain.forward(&Scope::plain()), case.forward(&Scope::plain()), "nothing was rounded");
        let [there, here] = [&quantized, &plain].map(|case| case.trained(1));
        assert_eq!(all_values(&there), all_values(&here), "{}", quantized.name);
        let [found, expected] = [(&quantized, &there), (&plain, &here)];
        let name = &quantized.name;
        let learned = [found, expected].map(|(case, adapters)| case.gradients(adapters));
        let [one, other] = &learned;
        // What draws while it trains gives other gradients now and then: a part is dropped or it isn't.
        let draws = || (0..256).any(|_| expected.0.gradients(expected.1) != *other);
        let [distance, bound] = distance(one, other);
        assert!(distance <= bound || draws(), "{name} learns: {distance} apart, at most {bound}");
        let [found, expected] = [found, expected].map(|(case, a)| case.forward(&Scope::new(&a.valid())));
        close(&found, &expected, name);
        let adapters = there.valid();
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let merged = merge(&quantized.model, &[(&folds, 1.0)]).expect("is finite");
        close(&values(merged.plain(&case.ids)), &found, &format!("{name} merged"));
    }
);
