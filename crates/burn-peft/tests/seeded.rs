//! What a method draws in training depends on the device's seed alone. A binary of its own, because
//! a device has one generator for the whole process.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft::core::{
    Counted, Hidden, HiddenPlace, Kind, Method, Passes, Scope, SeenTokens, Sites, Targets, adapt,
    survey,
};
use burn_peft::registry::{ForEach, for_each_method};

#[derive(Module, Debug)]
struct Two {
    query: Linear,
    block: Block,
    head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    place: HiddenPlace,
}

impl Two {
    fn forward(&self, x: &Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let ids = Tensor::<2, Int>::zeros([batch, seq], &x.device());
        let cx = &cx.reading(SeenTokens {
            kept: ids.ones_like(),
            ids,
            past: 0,
            before: None,
            scores: None,
        });
        let y = cx.at("query").linear(&self.query, x.clone());
        let y = cx.at("block").hidden(Hidden::sublayer(x, y));
        cx.at("head").linear(&self.head, y)
    }
}

/// What methods see that look at data first.
struct Data<'a>(&'a Two, Tensor<3>);

impl Passes for Data<'_> {
    fn batches(&self) -> usize {
        1
    }

    fn loss(&self, _batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.0.forward(&self.1, cx).powi_scalar(2).mean()
    }

    fn counted(&self, _batch: usize, _targets_only: bool) -> Counted {
        let [batch, seq, _] = self.1.dims();
        Counted { batch, seq, kept: vec![true; batch * seq] }
    }
}

struct Repeats {
    device: Device,
    /// Whether some configuration drew at all.
    drew: bool,
}

impl ForEach for Repeats {
    fn visit<T: Method>(&mut self) {
        if !T::KINDS.contains(&Kind::Linear) {
            return; // it lies over no weight
        }
        let model = Two {
            query: LinearConfig::new(16, 16).init(&self.device),
            block: Block { place: HiddenPlace::new(16) },
            head: LinearConfig::new(16, 4).init(&self.device),
        };
        let sites = Sites::of(&model, None);
        let x = Tensor::<3>::ones([2, 3, 16], &self.device);
        let serves = |kind| T::KINDS.contains(&kind);
        let place = match (serves(Kind::Linear), serves(Kind::Hidden)) {
            (true, _) => "query",
            (_, true) => "block",
            // What lies over words and norms alone draws nothing.
            _ => return,
        };
        for method in T::samples(&Targets::list([place])) {
            let data = Tensor::random([4, 8, 16], Distribution::Default, &self.device);
            let method = survey(method, &sites, &Data(&model, data)).expect("fits");
            // Two steps along the gradient, so that no factor is zero any more.
            let mut adapters =
                adapt(&sites, &method, 0, &self.device.clone().autodiff()).expect("fits");
            let forward = |adapters: &_| model.forward(&x, &Scope::new(adapters));
            let mut optimizer = burn::optim::AdamConfig::new().init();
            for _ in 0..2 {
                let gradients = forward(&adapters).powi_scalar(2).mean().backward();
                let gradients = burn::optim::GradientsParams::from_grads(gradients, &adapters);
                adapters = optimizer.step(0.1, adapters, gradients);
            }
            let draw = |seed| -> Vec<f32> {
                self.device.seed(seed);
                forward(&adapters).inner().into_data().try_to_vec().expect("is f32")
            };
            assert_eq!(draw(5), draw(5), "{method:?}");
            self.drew |= draw(5) != draw(6);
        }
    }
}

#[test]
fn draws_repeat_by_the_seed() {
    for name in burn_peft::device::names() {
        let device = burn_peft::device::by_name(name).expect("is in the build");
        let mut repeats = Repeats { device, drew: false };
        for_each_method(&mut repeats);
        assert!(repeats.drew, "no sample has dropout that acts on {name}");
    }
}
