//! How Fish-Dip's mask moves: section 3 of arXiv 2311.03748.

use crate::fish_dip::{FishDip, FishDipAdapter, Pool};
use crate::mask::Mask;
use crate::parameter::Parameter;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{
    Adapters, Error, Overlay, Passes, Policy, Site, Value, from_matrix, hardest, held_together,
    slopes_at, widened,
};
use serde_json::Value as Json;

/// Chooses anew after every `update_steps`-th step. All that it knows between steps lies in the adapters.
pub(crate) struct Dips {
    method: FishDip,
    /// The mask of a look, until adapters are made of it.
    chosen: Option<Mask>,
}

impl Dips {
    pub(crate) fn new(method: FishDip) -> Self {
        Self { method, chosen: None }
    }
}

/// The place with its numbers as they stand: `W + S + Δ`.
fn moved(site: &Site, adapter: &FishDipAdapter) -> Site {
    let delta = |parameter| adapter.delta_at(parameter, site).map(Tensor::without_autodiff);
    let mut now = site.clone();
    if let Some(by) = delta(Parameter::Weight) {
        let matrix = || by.clone().reshape([site.fan_in(), site.fan_out()]);
        now.weight = match &site.weight {
            Value::D1(w) => Value::D1(w.clone().cast(by.dtype()) + by),
            Value::D2(w) => Value::D2(widened(w.clone()).cast(by.dtype()) + matrix()),
            Value::D3(w) => Value::D3(w.clone().cast(by.dtype()) + from_matrix(matrix(), w.dims())),
            Value::D4(w) => Value::D4(w.clone().cast(by.dtype()) + from_matrix(matrix(), w.dims())),
        };
    }
    if let (Some(bias), Some(by)) = (&site.bias, delta(Parameter::Bias)) {
        now.bias = Some(bias.clone().cast(by.dtype()) + by);
    }
    now
}

impl Policy<FishDipAdapter> for Dips {
    fn looks_back(&self, step: usize) -> usize {
        let every = self.method.update_steps;
        if step.is_multiple_of(every) { every } else { 0 }
    }

    fn look(
        &mut self,
        adapters: &Adapters<FishDipAdapter>,
        beside: &dyn Overlay,
        passes: &dyn Passes,
    ) -> Result<(), Error> {
        let still = adapters.valid();
        // Its own copies of layers lie in `beside`.
        let own = Adapters::new(still.iter().map(|(path, a)| (path.to_owned(), a.clone())), []);
        let examples = hardest(passes, self.method.top_examples, &(&own, beside));
        let sites = &self.method.sites;
        let now = |site: &Site| still.get(&site.path).map(|adapter| moved(site, adapter));
        let now: Vec<Site> = sites.iter().filter_map(now).collect();
        let (mut scored, mut rest) = (Vec::new(), now.as_slice());
        while !rest.is_empty() {
            let (group, after) = rest.split_at(held_together(rest));
            let here = |path: &str| group.iter().any(|site| site.path == path);
            let others = still.iter().filter(|(path, _)| !here(path));
            let others = Adapters::new(others.map(|(path, a)| (path.to_owned(), a.clone())), []);
            let found = slopes_at(group, passes, &examples, &(&others, beside));
            for site in group {
                let own = self.method.fish_mask.scored(site, found.get(&site.path))?;
                if own.iter().flat_map(|one| &one.scores).any(|score| !score.is_finite()) {
                    return Err(Error::place(&site.path, "the data brings NaN or infinity there"));
                }
                scored.extend(own);
            }
            rest = after;
        }
        self.chosen = Some(self.method.choose(&scored));
        Ok(())
    }

    fn adjust(
        &mut self,
        _step: usize,
        _learning_rate: f64,
        adapters: &Adapters<FishDipAdapter>,
    ) -> Result<Option<Adapters<FishDipAdapter>>, Error> {
        let Some(mask) = self.chosen.take() else { return Ok(None) };
        let first = adapters.iter().find_map(|(_, adapter)| adapter.picked.as_ref());
        let Some(device) = first.map(|picked| picked.values.val().device()) else {
            return Ok(None);
        };
        let sites = self.method.sites.clone();
        let places: Vec<&Site> = sites.iter().collect();
        let pool = Pool::new(&mask, &places, &device)?;
        Ok(Some(adapters.clone().map_layers(|path, mut adapter| {
            let Some(site) = places.iter().find(|site| site.path == path) else { return adapter };
            let [weight, bias] = Parameter::ALL.map(|part| adapter.delta_at(part, site));
            for (settled, now) in
                [(&mut adapter.settled_weight, weight), (&mut adapter.settled_bias, bias)]
            {
                if let (Some(old), Some(now)) = (settled.as_ref(), now) {
                    *settled = Some(old.with(now));
                }
            }
            adapter.picked = Some(pool.at(path));
            adapter
        })))
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
    use burn::module::Param;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Counted, Scope, Sites, Targets, adapt, survey, trained_parameters};

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    /// `L = ½·(c_n·(x_n·W) - t_n)²` with one of four inputs on: example `n` slopes at `W_n` alone.
    struct Data<'a> {
        model: &'a One,
        targets: [f32; 4],
    }

    impl Passes for Data<'_> {
        fn batches(&self) -> usize {
            4
        }

        fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
            let mut x = [0.0; 4];
            x[batch] = 1.0;
            let x = Tensor::<1>::from_floats(x, &Device::flex()).reshape([1, 1, 4]);
            let y = cx.at("query").linear(&self.model.query, x);
            ((y - self.targets[batch]).powi_scalar(2) * 0.5).reshape([1])
        }

        fn counted(&self, _batch: usize, _targets_only: bool) -> Counted {
            Counted { batch: 1, seq: 1, kept: vec![true] }
        }
    }

    fn numbers(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn the_mask_follows_the_hardest_examples_and_what_was_learnt_stays() {
        let device = Device::flex();
        let layer = LinearConfig::new(4, 1).with_bias(false).init(&device);
        let weight = Param::from_tensor(Tensor::zeros([4, 1], &device));
        let model = One { query: Linear { weight, ..layer } };
        let sites = Sites::of(&model, None);
        // Losses ½·t²: the two hardest examples slope at numbers 1 and 3.
        let data = Data { model: &model, targets: [1.0, 4.0, 2.0, 3.0] };
        let method = FishDip {
            top_examples: 2,
            update_steps: 5,
            ..FishDip::new(0.5, Targets::list(["query"]))
        };
        let method = survey(method, &sites, &data).expect("fits");
        let mut at = adapt(&sites, &method, 0, &device.clone().autodiff()).expect("fits");
        let mut policy =
            burn_peft_core::Method::policy(&method, &at).expect("fits").expect("is there");
        let site = sites.get("query").expect("is there");
        let chosen = |at: &Adapters<FishDipAdapter>| {
            let all = at.get("query").expect("is there").chosen(site);
            all.into_iter().map(|(_, chosen)| chosen.indices().to_vec()).collect::<Vec<_>>()
        };
        let delta = |at: &Adapters<FishDipAdapter>| {
            let adapter = at.get("query").expect("is there");
            numbers(adapter.delta_at(Parameter::Weight, site).expect("is there"))
        };
        assert_eq!((chosen(&at), trained_parameters(&at)), (vec![vec![1, 3]], 2));
        assert_eq!(
            (4..=10).map(|step| policy.looks_back(step)).collect::<Vec<_>>(),
            [0, 5, 0, 0, 0, 0, 5]
        );
        // As after some steps: number 1 has learnt all, number 3 half.
        at = at.map_layers(|_, mut adapter| {
            let picked = adapter.picked.as_mut().expect("is there");
            let learnt = Tensor::from_floats([4.0, 1.5], &picked.values.val().device());
            picked.values = Param::initialized(picked.values.id, Param::from_tensor(learnt).val());
            adapter
        });
        assert_eq!(delta(&at), [0.0, 4.0, 0.0, 1.5]);
        let id = at.get("query").and_then(|a| a.picked.as_ref()).expect("is there").values.id;
        assert!(policy.adjust(5, 0.1, &at).expect("can").is_none(), "it saw nothing");
        policy.look(&at, &(), &data).expect("is finite");
        at = policy.adjust(5, 0.1, &at).expect("can").expect("is another");
        // Losses 0.5, 0, 2 and 1.125.
        assert_eq!((chosen(&at), trained_parameters(&at)), (vec![vec![2, 3]], 2));
        assert_eq!(delta(&at), [0.0, 4.0, 0.0, 1.5], "nothing that was learnt is lost");
        let picked = at.get("query").and_then(|a| a.picked.as_ref()).expect("is there");
        assert!(picked.values.id != id && picked.values.val().is_require_grad());
        // And what is trained now adds to it.
        let loss = data.loss(3, &Scope::new(&at));
        let gradient = picked.values.val().grad(&loss.backward()).expect("is trained");
        assert_eq!(numbers(gradient), [0.0, -1.5]);
    }
}
