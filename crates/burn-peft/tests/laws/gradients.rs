//! What a step of a training learns by.

use super::probe::{Probe, all_values, values};
use super::*;
use burn_peft::core::{Batch, Beside, Counted, Passes};

/// The mean square of what the probe gives for some words, the one batch of a step.
struct Words<'a>(&'a Probe, &'a Tensor<2, Int>);

impl Passes for Words<'_> {
    fn batches(&self) -> usize {
        1
    }

    fn loss(&self, _batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.0.forward(self.1, cx).square().mean()
    }

    fn counted(&self, batch: usize, targets_only: bool) -> Counted {
        self.0.counted(batch, targets_only)
    }
}

impl<T: Method> Case<T> {
    /// The loss of a step, with what the method adds to it.
    fn loss(&self, adapters: &Adapters<T::Adapter>, read: bool) -> Tensor<1> {
        let words = Words(&self.model, &self.ids);
        let beside: Vec<Box<dyn Beside>> = self.method.beside(adapters).into_iter().collect();
        let (laid, still) = ((adapters, &beside), adapters.valid());
        let batch = Batch::new(&words, adapters, &still);
        let loss = words.loss(0, &Scope::new(&laid));
        beside.iter().fold(loss, |loss, beside| match beside.term(&batch) {
            Ok(term) => loss + term,
            // What a term trains of its own is in no file, and no training begins without.
            Err(error) if read => {
                assert!(error.to_string().contains("were read"), "{}: {error}", self.name);
                loss
            }
            Err(error) => panic_at(&self.name, &error),
        })
    }
}

/// Which parameters got no gradient.
struct Gradients<'a> {
    found: &'a GradientsParams,
    without: Vec<usize>,
    met: usize,
    trained: Trained,
}

impl ModuleVisitor for Gradients<'_> {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.trained.enter(container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.trained.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.trained.here() {
            return;
        }
        let moved =
            self.found.get::<D>(param.id).is_some_and(|g| values(g).iter().any(|&v| v != 0.0));
        if !moved {
            self.without.push(self.met);
        }
        self.met += 1;
    }
}

law!(
    /// Every trained tensor learns, also after loading; the base keeps every bit.
    gradients_reach_the_adapters_alone,
    ELSEWHERE = 1,
    |case| {
        let before = all_values(&case.model);
        let folder = tempfile::tempdir().expect("makes a folder");
        let config = AdapterConfig::new(case.method.clone());
        save(folder.path(), &config, &case.sites, &case.trained(1)).expect("is written");
        let device = case.device.clone().autodiff();
        let (_, loaded) = load::<T>(folder.path(), &case.sites, &device).expect("is whole");
        for (what, mut adapters) in [("made", case.trained(1)), ("loaded", loaded)] {
            let mut optimizer = AdamConfig::new().init();
            for step in 0..2 {
                // A gate that is drawn may be shut in one pass, or in two: more of them are one step then.
                let mut passes = 1;
                let grads = loop {
                    let pass = |_| case.loss(&adapters, what == "loaded");
                    let loss = (0..passes).map(pass).reduce(|sum, loss| sum + loss).expect("is one at least");
                    let grads = GradientsParams::from_grads(loss.backward(), &adapters);
                    let mut seen =
                        Gradients { found: &grads, without: Vec::new(), met: 0, trained: Trained::default() };
                    adapters.visit(&mut seen);
                    assert!(seen.met > 0 && grads.len() == seen.met, "{}", case.name);
                    match seen.without.is_empty() {
                        true => break grads,
                        false => assert!(passes < 16, "{} {what} step {step}: {:?}", case.name, seen.without),
                    }
                    passes *= 2;
                };
                let old = all_values(&adapters);
                adapters = optimizer.step(0.01, adapters, grads);
                assert!(all_values(&adapters).iter().zip(&old).all(|(new, old)| new != old));
            }
        }
        assert_eq!(all_values(&case.model), before, "{}", case.name);
    }
);
