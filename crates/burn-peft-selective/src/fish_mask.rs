//! FishMask: the numbers that the model's answers depend on most (arXiv 2111.09839).

use crate::selective::{Criterion, Selective};
use burn::tensor::Tensor;
use burn_peft_core::{Part, Slope, Statistic};
use serde::{Deserialize, Serialize};

/// FishMask, Fisher-induced sparse unchanging mask (arXiv 2111.09839): trains the numbers with the largest
/// empirical Fisher information, `F_i = (1/N)·Σ_n (∂L(x_n, y_n)/∂w_i)²` over `N` single examples at the base
/// model, the largest of all target places together.
///
/// The mask stays through the training. `keep_ratio` is 0.005 by default, as in the paper, whose 1,024
/// examples are the default here too, where a batch has 32 of them. Shapes, file, parameter count and errors
/// are [`Selective`]'s.
pub type FishMask = Selective<Fisher>;

/// The criterion of [`FishMask`]: the diagonal of the empirical Fisher information. It has no options.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fisher {}

impl Criterion for Fisher {
    const NAME: &'static str = "FISHMASK";
    const KEEP_RATIO: f64 = 0.005;

    fn wants(&self) -> Option<Statistic> {
        Some(Statistic::Slopes { part: Part::Whole, tuning: None })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(slope?.square.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Device, Int};
    use burn_peft_core::{
        AdapterConfig, Counted, Passes, Scope, Sites, TENSORS_FILE, Targets, adapt, save, survey,
        trained_parameters,
    };

    #[derive(Module, Debug)]
    struct One {
        query: Linear,
    }

    /// Four rows, of which each differs.
    struct Data<'a>(&'a One);

    impl Passes for Data<'_> {
        fn batches(&self) -> usize {
            4
        }

        fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
            let first = 400 * batch as i64;
            let x = Tensor::<1, Int>::arange(first..first + 400, &Device::flex()).float().sin();
            let y = cx.at("query").linear(&self.0.query, x.reshape([1, 1, 400]));
            y.square().mean()
        }

        fn counted(&self, _batch: usize, _targets_only: bool) -> Counted {
            Counted { batch: 1, seq: 1, kept: vec![true] }
        }
    }

    /// Numbers that are trained, and bytes of the optimizer's state after a step and of the file.
    fn held(keep_ratio: f64) -> [usize; 3] {
        let device = Device::flex();
        let model = One { query: LinearConfig::new(400, 300).init(&device) };
        let (sites, data) = (Sites::of(&model, None), Data(&model));
        let method = FishMask::new(keep_ratio, Targets::list(["query"]));
        let method = survey(method, &sites, &data).expect("fits");
        let adapters = adapt(&sites, &method, 0, &device.autodiff()).expect("fits");
        let mut optimizer = AdamWConfig::new().init();
        let loss = data.loss(0, &Scope::new(&adapters));
        let gradients = GradientsParams::from_grads(loss.backward(), &adapters);
        let adapters = optimizer.step(1e-3, adapters, gradients);
        let state = optimizer.to_record().into_bytes().expect("can be written");
        let folder = tempfile::tempdir().expect("makes a folder");
        save(folder.path(), &AdapterConfig::new(method), &sites, &adapters).expect("is written");
        let file = folder.path().join(TENSORS_FILE).metadata().expect("is there").len();
        [trained_parameters(&adapters), state.len(), file as usize]
    }

    #[test]
    fn half_a_percent_is_all_that_an_optimizer_holds_and_a_file_stores() {
        let [few, all] = [0.005, 1.0].map(held);
        println!("trained, bytes of the optimizer's state, of the file: {few:?} of {all:?}");
        assert_eq!([few[0], all[0]], [601, 120_300]);
        for [trained, state, file] in [few, all] {
            // Two moments of four bytes a number; in the file a value and an index; and what names them.
            for (bytes, least) in [(state, 8 * trained), (file, 8 * trained)] {
                assert!((least..least + 4096).contains(&bytes), "{bytes} bytes for {trained}");
            }
        }
    }
}
