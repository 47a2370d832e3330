//! How selective prompt tuning searches: which steps move what, and the blocks that come out of it (arXiv 2310.20127).

use crate::prompt_selective::{OPEN, SHUT, SelectedPrompts, SelectivePromptTuning};
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Policy, site_rng};
use serde_json::Value as Json;

/// The policy. It knows nothing but the configuration: all else follows from the step.
#[derive(Debug)]
pub(crate) struct Search {
    /// Steps of the search, and of the training.
    steps: (usize, usize),
    every: usize,
    most: Option<usize>,
    seed: u64,
}

impl Search {
    /// # Errors
    /// A number of steps that leaves no step for the gates.
    pub(crate) fn new(method: &SelectivePromptTuning) -> Result<Self, Error> {
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
        let (most, seed) = (method.num_prompt_layers, method.second_seed);
        Ok(Self { steps: (search, total), every, most, seed })
    }

    /// Whether `step` moves the gates, and nothing else.
    fn selects(&self, step: usize) -> bool {
        step <= self.steps.0 && step.is_multiple_of(self.every)
    }

    /// The networks with the highest gates, which alone go on; drawn again if a second part follows.
    fn chosen(&self, path: &str, mut adapter: SelectedPrompts) -> SelectedPrompts {
        let (Some(alphas), Some(gates)) = (adapter.alphas(), &adapter.gates) else {
            return adapter;
        };
        let kept = highest(&alphas, self.most.unwrap_or(alphas.len().div_ceil(2)));
        let (id, device) = (gates.id, gates.val().device());
        let alphas: Vec<f32> = kept.iter().map(|kept| if *kept { OPEN } else { SHUT }).collect();
        let shape = [alphas.len()];
        let alphas = Param::from_tensor(Tensor::from_data(TensorData::new(alphas, shape), &device));
        adapter.gates = Some(Param::initialized(id, alphas.val()));
        match self.steps.0 < self.steps.1 {
            true => adapter.again(&mut site_rng(self.seed, path), &device),
            false => adapter,
        }
    }
}

/// Which are the `most` highest; the first where they are equal.
fn highest(alphas: &[f32], most: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..alphas.len()).collect();
    order.sort_by(|&a, &b| alphas[b].total_cmp(&alphas[a]).then(a.cmp(&b)));
    let mut kept = vec![false; alphas.len()];
    order.into_iter().take(most).for_each(|at| kept[at] = true);
    kept
}

impl Policy<SelectedPrompts> for Search {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<SelectedPrompts>,
        mut gradients: GradientsParams,
    ) -> GradientsParams {
        let mut selection = GradientsParams::new();
        for gates in adapters.iter().filter_map(|(_, adapter)| adapter.gates.as_ref()) {
            if let Some(gradient) = gradients.remove::<1>(gates.id) {
                selection.register(gates.id, gradient);
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
        adapters: &Adapters<SelectedPrompts>,
    ) -> Result<Option<Adapters<SelectedPrompts>>, Error> {
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
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Adapter, HiddenPlace, Method, Sites, adapt};

    #[derive(Module, Debug)]
    struct Step {
        place: HiddenPlace,
    }

    #[derive(Module, Debug)]
    struct Stack {
        layer: Vec<Step>,
        head: Linear,
    }

    fn sites() -> Sites {
        let device = Device::flex();
        let step = |_| Step { place: HiddenPlace::new(6) };
        let head = LinearConfig::new(6, 2).init(&device);
        Sites::of(&Stack { layer: (0..4).map(step).collect(), head }, None)
    }

    fn method(search_steps: usize) -> SelectivePromptTuning {
        SelectivePromptTuning {
            proj_down_size: 3,
            search_steps: Some(search_steps),
            total_step: Some(6),
            ..SelectivePromptTuning::new(2, 2)
        }
    }

    /// Adapters in the middle of a search.
    fn searched(method: &SelectivePromptTuning) -> Adapters<SelectedPrompts> {
        let device = Device::flex().autodiff();
        adapt(&sites(), method, 1, &device).expect("fits").map_layers(|_, mut adapter| {
            let alphas = Tensor::<1>::from_data([0.3_f32, -0.1, 0.7, 0.3], &device);
            adapter.gates = Some(Param::from_tensor(alphas));
            adapter
        })
    }

    fn only(adapters: &Adapters<SelectedPrompts>) -> &SelectedPrompts {
        adapters.get("layer").expect("is there")
    }

    /// What four blocks read that give on what they read.
    fn read(adapter: &SelectedPrompts) -> Vec<Option<Vec<f32>>> {
        let x = Tensor::<1>::from_data([0.5_f32, -1.0, 2.0, 0.1, 0.9, -0.3], &Device::flex());
        let x = Tensor::cat(vec![x.clone().unsqueeze(), x.neg().unsqueeze::<2>()], 0).unsqueeze();
        let mut held: Option<Tensor<3>> = None;
        let block = |index| {
            held =
                adapter.carried(index, &x, held.as_ref(), None).map(|held| held.without_autodiff());
            held.clone().map(|held| held.into_data().try_to_vec().expect("is f32"))
        };
        (0..4).map(block).collect()
    }

    fn close(found: &[Option<Vec<f32>>], expected: &[Option<Vec<f32>>]) {
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.is_some(), expected.is_some());
            let mut both = found.iter().flatten().zip(expected.iter().flatten());
            assert!(both.all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {expected:?}");
        }
    }

    /// `p_l = (1 - τ·a_l)·p' + τ·a_l·PG_l(X)` with numbers.
    #[test]
    fn gates_mix_what_was_held_with_what_is_new() {
        let adapters = searched(&method(4));
        let found = read(only(&adapters));
        let shares = [0.3_f32, -0.1, 0.7, 0.3].map(|alpha| 0.5 / (1.0 + (-alpha).exp()));
        let mut held = vec![0.0_f32; 12];
        for (layer, (found, share)) in found.iter().zip(shares).enumerate() {
            // A network alone, at its full share.
            let mut alone = only(&adapters).clone();
            (alone.gates, alone.tau) = (None, 1.0);
            alone.layers = (0..4).map(|at| if at == layer { layer } else { 9 }).collect();
            let new = read(&alone)[layer].clone().expect("makes one");
            held = held.iter().zip(&new).map(|(p, new)| (1.0 - share) * p + share * new).collect();
            close(std::slice::from_ref(found), &[Some(held.clone())]);
        }
    }

    #[test]
    fn every_second_step_of_the_search_is_the_gates() {
        let mut search = Search::new(&method(4)).expect("is long enough");
        let adapters = searched(&method(4));
        let adapter = only(&adapters);
        let gates = adapter.gates.as_ref().expect("is a search").id;
        let got = |search: &mut Search, step| {
            let mut all = GradientsParams::new();
            all.register(gates, Tensor::<1>::ones([4], &Device::flex()));
            all.register(adapter.up_bias.id, Tensor::<2>::ones([4, 6], &Device::flex()));
            let left = search.gradients(step, &adapters, all);
            [left.get::<1>(gates).is_some(), left.get::<2>(adapter.up_bias.id).is_some()]
        };
        let steps: Vec<_> = (1..=6).map(|step| got(&mut search, step)[0]).collect();
        assert_eq!(steps, [false, true, false, true, false, false]);
        assert!((1..=6).all(|step| got(&mut search, step)[0] != got(&mut search, step)[1]));
    }

    #[test]
    fn the_highest_gates_stay_and_the_rest_of_the_training_is_theirs() {
        for (steps, again) in [(4, true), (6, false)] {
            let method = method(steps);
            let mut search = Search::new(&method).expect("is long enough");
            let before = searched(&method);
            assert!(search.adjust(steps - 1, 0.1, &before).expect("works").is_none());
            let after = search.adjust(steps, 0.1, &before).expect("works").expect("chooses");
            let (old, new) = (only(&before), only(&after));
            // The first of the two that are equal.
            assert_eq!((old.kept(), new.kept()), (None, Some(vec![0, 2])));
            assert_eq!(old.down.id != new.down.id, again);
            assert_eq!(old.up.val().into_data() != new.up.val().into_data(), again);
            assert!(new.down.val().is_require_grad());
            let ids = [old, new].map(|adapter| adapter.gates.as_ref().expect("has them").id);
            assert_eq!(ids[0], ids[1]);

            // The first is τ·PG, and blocks 1 and 3 read what 0 and 2 did.
            let found = read(new);
            assert!(found[0] == found[1] && found[2] == found[3] && found[0] != found[2]);
            // What is written makes the same prompts, and has only what was kept.
            let finished = method.clone().finished(&after);
            assert_eq!(finished.prompt_layers, Some(vec![0, 2]));
            assert!(finished.policy(&after).expect("is whole").is_none());
            let fresh = adapt(&sites(), &finished, 1, &Device::flex()).expect("fits");
            let mut loaded = only(&fresh).clone();
            assert!(loaded.gates.is_none() && loaded.down.dims() == [2, 6, 3]);
            let sites = sites();
            let written = method.tensors(sites.get("layer").expect("is there"), new);
            let names: Vec<&str> = written.iter().map(|(name, _)| *name).collect();
            let expected =
                ["generators_down", "generators_down_bias", "generators_up", "generators_up_bias"];
            assert_eq!(names, expected);
            let data = |at: usize| written[at].1.clone();
            loaded.down = Param::from_data(data(0), &Device::flex());
            loaded.down_bias = Param::from_data(data(1), &Device::flex());
            loaded.up = Param::from_data(data(2), &Device::flex());
            loaded.up_bias = Param::from_data(data(3), &Device::flex());
            close(&read(&loaded), &found);
        }
        // Below the first that was chosen nothing stands in front.
        let later = SelectivePromptTuning { prompt_layers: Some(vec![1, 3]), ..method(4) };
        let adapters = adapt(&sites(), &later, 1, &Device::flex()).expect("fits");
        let found: Vec<bool> = read(only(&adapters)).iter().map(Option::is_some).collect();
        assert_eq!(found, [false, true, true, true]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let long = SelectivePromptTuning { search_steps: Some(7), ..method(4) };
        let unplanned = SelectivePromptTuning { total_step: None, ..method(4) };
        for (method, name) in
            [(long, "search_steps"), (unplanned, "total_step"), (method(1), "search_steps")]
        {
            let said = Search::new(&method).expect_err("has no room").to_string();
            assert!(said.contains(name), "{said}");
        }
        let with = |layers: &[usize]| SelectivePromptTuning {
            prompt_layers: Some(layers.to_vec()),
            ..method(4)
        };
        let many = SelectivePromptTuning { num_prompt_layers: Some(5), ..method(4) };
        for (method, name) in [
            (with(&[]), "prompt_layers"),
            (with(&[2, 1]), "prompt_layers"),
            (with(&[1, 4]), "prompt_layers"),
            (many, "num_prompt_layers"),
        ] {
            let refused = adapt(&sites(), &method, 0, &Device::flex());
            let said = refused.expect_err("does not fit").to_string();
            assert!(said.contains(name), "{said}");
        }
    }
}
