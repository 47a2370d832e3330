//! How AutoLoRA searches: which steps move what, and the ranks that come out of it (arXiv 2403.09113).

use crate::auto_lora::{AutoLora, AutoLoraAdapter, DROPPED};
use crate::random::uniform;
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Policy, site_rng};
use serde_json::Value as Json;

/// AutoLoRA's policy. It knows nothing but the configuration: all else follows from the step.
pub(crate) struct Search {
    /// Steps of the search, and of the training.
    steps: (usize, usize),
    every: usize,
    threshold: Option<f64>,
    seed: u64,
}

impl Search {
    /// # Errors
    /// A number of steps that leaves no step for the selection.
    pub(crate) fn new(method: &AutoLora) -> Result<Self, Error> {
        let total = method.total_step.unwrap_or(0);
        if total == 0 {
            return Err(Error::config("total_step", "expected the number of training steps"));
        }
        let (search, every) = (method.search_steps.unwrap_or(total / 2), method.selection_every);
        if search > total || search < every {
            let reason = format!(
                "expected from selection_every = {every} to total_step = {total} steps, found {search}"
            );
            return Err(Error::config("search_steps", reason));
        }
        let (threshold, seed) = (method.threshold, method.second_seed);
        Ok(Self { steps: (search, total), every, threshold, seed })
    }

    /// Whether `step` moves `β`, and nothing else.
    fn selects(&self, step: usize) -> bool {
        step <= self.steps.0 && step.is_multiple_of(self.every)
    }

    /// The adapter with the components that stay; drawn again if a second part follows.
    fn chosen(&self, path: &str, mut adapter: AutoLoraAdapter) -> AutoLoraAdapter {
        let kept = keep(&adapter.beta(), self.threshold);
        let again = self.steps.0 < self.steps.1;
        let beta = adapter.beta().into_iter().zip(kept).map(|(beta, kept)| match (kept, again) {
            (false, _) => DROPPED,
            (true, true) => 0.0,
            (true, false) => beta,
        });
        let device = adapter.autolora_a.val().device();
        let beta: Vec<f32> = beta.collect();
        let (id, r) = (adapter.autolora_beta.id, beta.len());
        let beta = Param::from_tensor(Tensor::from_data(TensorData::new(beta, [r]), &device));
        adapter.autolora_beta = Param::initialized(id, beta.val());
        if again {
            let ([fan_in, _], [_, fan_out]) =
                (adapter.autolora_a.dims(), adapter.autolora_b.dims());
            let bound = (1.0 / fan_in as f32).sqrt();
            let a = uniform([fan_in, r], bound, &mut site_rng(self.seed, path), &device);
            // With new ids, by which the optimizer knows nothing of them.
            adapter.autolora_a = Param::from_tensor(a);
            adapter.autolora_b = Param::from_tensor(Tensor::zeros([r, fan_out], &device));
        }
        adapter
    }
}

/// Which components have an `α = softmax(β)` of at least the threshold, by default the mean; the largest
/// always has.
fn keep(beta: &[f32], threshold: Option<f64>) -> Vec<bool> {
    let most = beta.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sizes: Vec<f64> = beta.iter().map(|beta| f64::from(beta - most).exp()).collect();
    let sum: f64 = sizes.iter().sum();
    let threshold = threshold.unwrap_or(1.0 / beta.len() as f64);
    // Equal ones are the mean of themselves, whatever the sum's rounding.
    let least = threshold * (1.0 - 1e-9);
    sizes.iter().zip(beta).map(|(size, beta)| size / sum >= least || *beta >= most).collect()
}

impl Policy<AutoLoraAdapter> for Search {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<AutoLoraAdapter>,
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        let mut selection = GradientsParams::new();
        for (_, adapter) in adapters.iter() {
            let id = adapter.autolora_beta.id;
            if let Some(gradient) = gradients.remove::<1>(id) {
                selection.register(id, gradient);
            }
        }
        match self.selects(step) {
            true => selection,
            false => gradients,
        }
    }

    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<AutoLoraAdapter>,
    ) -> Result<Option<Adapters<AutoLoraAdapter>>, Error> {
        Ok((step == self.steps.0)
            .then(|| adapters.clone().map_layers(|path, adapter| self.chosen(path, adapter))))
    }

    fn state(&self) -> Result<Json, Error> {
        Ok(Json::Null)
    }

    fn resume(&mut self, _state: Json, _device: &Device) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LowRank;
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Fold, Method, Site, Sites, Targets, adapt};

    #[derive(Module, Debug)]
    struct Two {
        key: Linear,
        query: Linear,
    }

    fn model() -> Two {
        let layer = || LinearConfig::new(5, 4).init(&Device::flex());
        Two { key: layer(), query: layer() }
    }

    fn method(search_steps: usize) -> AutoLora {
        AutoLora {
            low_rank: LowRank::new(3, 6.0, Targets::list(["key", "query"])),
            search_steps: Some(search_steps),
            total_step: Some(6),
            ..AutoLora::default()
        }
    }

    /// Adapters in the middle of a search.
    fn searched(sites: &Sites, method: &AutoLora) -> Adapters<AutoLoraAdapter> {
        let device = Device::flex().autodiff();
        adapt(sites, method, 1, &device).expect("fits").map_layers(|path, mut adapter| {
            let beta = if path == "key" { [0.0_f32, -2.0, 1.0] } else { [1.0, 3.0, 0.0] };
            adapter.autolora_beta = Param::from_tensor(Tensor::from_data(beta, &device));
            let b = Tensor::from_data(
                [[1.0_f32, 2.0, 3.0, 4.0], [2.0, 0.0, 1.0, 1.0], [5.0; 4]],
                &device,
            );
            adapter.autolora_b = Param::from_tensor(b);
            adapter
        })
    }

    fn delta(adapter: &AutoLoraAdapter) -> Tensor<2> {
        let nothing = Tensor::zeros([5, 4], &Device::flex());
        adapter.weight(&nothing).expect("folds").without_autodiff()
    }

    fn far(a: Tensor<2>, b: Tensor<2>) -> f32 {
        (a - b).abs().max().into_scalar()
    }

    /// `A` and `B` as the file holds them.
    fn written(method: &AutoLora, site: &Site, adapter: &AutoLoraAdapter) -> [Tensor<2>; 2] {
        let tensors = method.tensors(site, adapter);
        let factor = |i: usize| Tensor::<2>::from_data(tensors[i].1.clone(), &Device::flex());
        [factor(0).transpose(), factor(1).transpose()]
    }

    #[test]
    fn components_of_at_least_the_mean_stay() {
        assert_eq!(keep(&[0.0; 3], None), [true; 3], "equals are the mean");
        assert_eq!(keep(&[0.0, -2.0, 1.0], None), [false, false, true]);
        assert_eq!(keep(&[0.0, -2.0, 1.0], Some(0.2)), [true, false, true]);
        assert_eq!(keep(&[0.0, 0.1], Some(0.9)), [false, true], "the largest always does");
        assert_eq!(keep(&[DROPPED, 0.0, 0.0], None), [false, true, true]);
    }

    #[test]
    fn a_step_moves_the_selection_or_all_else() {
        let sites = Sites::of(&model(), None);
        let method = AutoLora { selection_every: 2, ..method(4) };
        let adapters = searched(&sites, &method);
        let mut search = Search::new(&method).expect("fits");
        for step in 1..=6 {
            let mut gradients = GradientsParams::new();
            for (_, adapter) in adapters.iter() {
                gradients.register(adapter.autolora_a.id, adapter.autolora_a.val().inner());
                gradients.register(adapter.autolora_b.id, adapter.autolora_b.val().inner());
                gradients.register(adapter.autolora_beta.id, adapter.autolora_beta.val().inner());
            }
            // Such as a head that is trained beside them.
            let head = Param::from_tensor(Tensor::<1>::ones([1], &Device::flex()));
            gradients.register(head.id, head.val());
            let left = search.gradients(step, &adapters, gradients);
            let selects = step == 2 || step == 4;
            assert_eq!(left.len(), if selects { 2 } else { 5 }, "step {step}");
            for (_, adapter) in adapters.iter() {
                assert_eq!(left.get::<1>(adapter.autolora_beta.id).is_some(), selects);
                assert_eq!(left.get::<2>(adapter.autolora_a.id).is_some(), !selects);
            }
            let adjusted = search.adjust(step, 0.1, &adapters).expect("works");
            assert_eq!(adjusted.is_some(), step == 4);
        }
    }

    #[test]
    fn the_second_part_is_lora_at_the_ranks_that_were_found() {
        let sites = Sites::of(&model(), None);
        let method = AutoLora { threshold: Some(0.2), ..method(4) };
        let adapters = searched(&sites, &method);
        let mut search = Search::new(&method).expect("fits");
        let chosen = search.adjust(4, 0.1, &adapters).expect("works").expect("is the end");
        let device = Device::flex().autodiff();
        for (path, adapter) in chosen.iter() {
            let old = adapters.get(path).expect("is there");
            assert!(old.autolora_a.id != adapter.autolora_a.id);
            assert_eq!(old.autolora_beta.id, adapter.autolora_beta.id);
            assert_eq!(far(delta(adapter), Tensor::zeros([5, 4], &Device::flex())), 0.0);
        }
        let trained = chosen.map_layers(|_, mut adapter| {
            let b = Tensor::from_data(
                [[1.0_f32, 2.0, 3.0, 4.0], [2.0, 0.0, 1.0, 1.0], [5.0; 4]],
                &device,
            );
            adapter.autolora_b = Param::from_tensor(b);
            adapter
        });
        let finished = method.finished(&trained);
        assert_eq!(finished.low_rank.rank_pattern.get("query"), Some(&1));
        assert_eq!(finished.low_rank.rank_pattern.get("key"), Some(&2));
        for (path, adapter) in trained.iter() {
            let site = sites.get(path).expect("is there");
            let [a, b] = written(&finished, site, adapter);
            let k = finished.low_rank.rank_pattern[path];
            assert_eq!((a.dims(), b.dims()), ([5, k], [k, 4]));
            let lora = a.matmul(b) * (6.0 / k as f64);
            assert!(far(delta(adapter), lora) < 1e-5, "{path}");
        }
    }

    #[test]
    fn a_search_alone_leaves_the_kept_as_they_are() {
        let sites = Sites::of(&model(), None);
        let method = method(6);
        let adapters = searched(&sites, &method);
        let mut search = Search::new(&method).expect("fits");
        let chosen = search.adjust(6, 0.1, &adapters).expect("works").expect("is the end");
        for (path, adapter) in chosen.iter() {
            let old = adapters.get(path).expect("is there");
            assert_eq!(old.autolora_a.id, adapter.autolora_a.id);
            let beta = adapter.beta();
            let kept: Vec<f32> = beta.into_iter().filter(|beta| *beta != DROPPED).collect();
            assert_eq!(kept, if path == "key" { [1.0] } else { [3.0] });
        }
    }

    #[test]
    fn a_search_without_a_selection_is_refused() {
        for (search_steps, total_step) in [(Some(1), Some(6)), (Some(7), Some(6)), (None, Some(3))]
        {
            let refused = Search::new(&AutoLora { search_steps, total_step, ..method(4) });
            let said = refused.err().expect("cannot work").to_string();
            assert!(said.starts_with("search_steps"), "{said}");
        }
        assert!(Search::new(&AutoLora { total_step: None, ..method(4) }).is_err());
    }
}
