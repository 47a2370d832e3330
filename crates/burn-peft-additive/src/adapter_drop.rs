//! AdapterDrop: the first blocks go without their adapters (arXiv 2010.11918).

use crate::bottleneck::{Bottleneck, BottleneckAdapter};
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Buffer, Error, Hidden, Kind, Method, PlaceTensors, Policy, Site, Sites,
    Strictness, Targets, site_rng,
};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// AdapterDrop (arXiv 2010.11918, section 3): [`Bottleneck`] adapters that the first `n` blocks go without.
///
/// Specialized, `n = drop_layers` is fixed: these blocks have no adapters at all, and nothing is computed or trained
/// there. Robust, `n ~ U{0, …, drop_layers}` is drawn for each optimizer step by the seed and the step, and
/// evaluation has all adapters; [`without_first`](Self::without_first) leaves out as many as an answer shall be faster
/// by. A block is the first number of a path; what has none is never left out. Options, init, parameters a place
/// and the file are [`Bottleneck`]'s. It does not fold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterDrop {
    /// `n`, or the most that is drawn; default 5. At least one adapter stays.
    pub drop_layers: usize,
    /// Draw `n` anew for each step; default false.
    pub robust: bool,
    /// Decides what is drawn; default 0.
    pub drop_seed: u64,
    /// The adapters that are left out.
    #[serde(flatten)]
    pub adapter: Bottleneck,
}

impl Default for AdapterDrop {
    fn default() -> Self {
        Self { drop_layers: 5, robust: false, drop_seed: 0, adapter: Bottleneck::default() }
    }
}

/// A bottleneck adapter with a switch.
#[derive(Module, Debug)]
pub struct DroppedAdapter {
    /// The adapter.
    pub adapter: BottleneckAdapter,
    /// `[1]`: 0 where the step at hand goes without it. Nobody asks outside of training.
    pub active: Buffer<1>,
}

impl Adapter for DroppedAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let active = !self.active.is_training() || self.active.val().into_scalar::<f32>() != 0.0;
        if active { self.adapter.hidden(at) } else { None }
    }

    fn by_token(&self) -> bool {
        self.adapter.by_token()
    }
}

/// The number of the block that a place is in.
fn block(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// Whether the place is in one of the first `n` blocks.
fn is_left_out(path: &str, n: usize) -> bool {
    block(path).is_some_and(|block| block < n)
}

impl AdapterDrop {
    /// The first `drop_layers` blocks have no adapters.
    pub fn specialized(drop_layers: usize, adapter: Bottleneck) -> Self {
        Self { drop_layers, adapter, ..Self::default() }
    }

    /// In each step of a training at most `drop_layers` blocks go without.
    pub fn robust(drop_layers: usize, adapter: Bottleneck) -> Self {
        Self { robust: true, ..Self::specialized(drop_layers, adapter) }
    }

    /// The adapters but for those of the first `n` blocks.
    pub fn without_first(
        n: usize,
        adapters: &Adapters<DroppedAdapter>,
    ) -> Adapters<DroppedAdapter> {
        let kept = adapters.iter().filter(|(path, _)| !is_left_out(path, n));
        let kept: Vec<_> = kept.map(|(path, a)| (path.to_owned(), a.clone())).collect();
        Adapters::new(kept, adapters.copies().map(|(path, copy)| (path.to_owned(), copy.clone())))
    }

    fn with_switch(adapter: BottleneckAdapter, device: &Device) -> DroppedAdapter {
        DroppedAdapter { adapter, active: Buffer::new(Tensor::ones([1], device)) }
    }
}

impl Method for AdapterDrop {
    type Adapter = DroppedAdapter;
    type Shared = ();
    const NAME: &'static str = "ADAPTER_DROP";
    const KINDS: &'static [Kind] = Bottleneck::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = Bottleneck::ABSENT;
    const HF_FORMAT: bool = false;

    fn targets(&self) -> &Targets {
        &self.adapter.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.adapter.targets
    }

    fn places<'s>(&self, sites: &'s Sites, strictness: Strictness) -> Result<Vec<&'s Site>, Error> {
        let mut chosen = self.targets().select(sites, Self::KINDS, strictness)?;
        if chosen.iter().all(|site| is_left_out(&site.path, self.drop_layers)) {
            let blocks = chosen.iter().filter_map(|site| block(&site.path)).max().unwrap_or(0);
            let reason = format!(
                "leaves no adapter; expected at most {blocks}, as the last adapted block is number \
                 {blocks}, found {}",
                self.drop_layers
            );
            return Err(Error::config("drop_layers", reason));
        }
        if !self.robust {
            chosen.retain(|site| !is_left_out(&site.path, self.drop_layers));
        }
        Ok(chosen)
    }

    fn check(&self) -> Result<(), Error> {
        self.adapter.check()
    }

    fn starts_as_identity(&self) -> bool {
        self.adapter.starts_as_identity()
    }

    fn init(
        &self,
        site: &Site,
        shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DroppedAdapter, Error> {
        Ok(Self::with_switch(self.adapter.init(site, shared, rng, device)?, device))
    }

    fn policy(
        &self,
        _adapters: &Adapters<DroppedAdapter>,
    ) -> Result<Option<Box<dyn Policy<DroppedAdapter>>>, Error> {
        let Self { drop_layers: most, drop_seed: seed, .. } = *self;
        Ok(self.robust.then(|| Box::new(Drawn { most, seed }) as Box<dyn Policy<_>>))
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let pfeiffer = Bottleneck::pfeiffer(2.0, targets.clone());
        vec![
            Self { drop_seed: 7, ..Self::robust(2, pfeiffer) },
            Self::specialized(1, Bottleneck::parallel(4.0, targets.clone())),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.adapter.parameters(site)
    }

    fn tensors(&self, site: &Site, adapter: &DroppedAdapter) -> Vec<(&'static str, TensorData)> {
        self.adapter.tensors(site, &adapter.adapter)
    }

    fn restore(
        &self,
        site: &Site,
        shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<DroppedAdapter, Error> {
        Ok(Self::with_switch(self.adapter.restore(site, shared, file, device)?, device))
    }
}

/// Draws how many blocks go without. It knows nothing between steps.
#[derive(Debug, Clone, Copy)]
struct Drawn {
    most: usize,
    seed: u64,
}

impl Drawn {
    fn blocks(self, step: usize) -> usize {
        site_rng(self.seed, &step.to_string()).random_range(0..=self.most)
    }
}

impl Policy<DroppedAdapter> for Drawn {
    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<DroppedAdapter>,
    ) -> Result<Option<Adapters<DroppedAdapter>>, Error> {
        let n = self.blocks(step + 1);
        Ok(Some(adapters.clone().map_layers(|path, mut adapter| {
            let old = adapter.active.val();
            let active = if is_left_out(path, n) { old.zeros_like() } else { old.ones_like() };
            adapter.active = adapter.active.with(active);
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
    use crate::Nonlinearity;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{HiddenPlace, Names, Scope, adapt};

    /// Embeddings and three blocks.
    #[derive(Module, Debug)]
    struct Stack {
        embeddings: Held,
        layer: Vec<Held>,
        /// Hidden states are found on the device of the weights.
        head: Linear,
    }

    #[derive(Module, Debug)]
    struct Held {
        place: HiddenPlace,
    }

    fn sites() -> Sites {
        let held = || Held { place: HiddenPlace::new(4) };
        let head = LinearConfig::new(4, 2).init(&Device::flex());
        let stack = Stack { embeddings: held(), layer: (0..3).map(|_| held()).collect(), head };
        Sites::of(&stack, None)
    }

    fn bottleneck(pattern: &str) -> Bottleneck {
        let target_modules = Some(Names::Pattern(pattern.into()));
        let targets = Targets { target_modules, ..Targets::default() };
        let non_linearity = Nonlinearity::Tanh; // is never off
        Bottleneck { reduction_factor: 2.0, non_linearity, targets, ..Bottleneck::default() }
    }

    /// Places at which something lies and does something.
    fn at_work(adapters: &Adapters<DroppedAdapter>) -> Vec<String> {
        let x = Tensor::<3>::ones([1, 2, 4], &Device::flex());
        let changes = |path: &str| {
            let cx = Scope::new(adapters).at(path);
            let y = cx.hidden(Hidden::block(x.clone(), x.clone())) - x.clone();
            y.abs().sum().into_scalar::<f32>() > 0.0
        };
        let places = adapters.places();
        places.into_iter().filter(|path| changes(path)).collect()
    }

    const LAYERS: [&str; 3] = ["layer.0", "layer.1", "layer.2"];

    #[test]
    fn fixed_blocks_have_no_adapters() {
        let adapters = |n, pattern| {
            let method = AdapterDrop::specialized(n, bottleneck(pattern));
            adapt(&sites(), &method, 1, &Device::flex())
        };
        assert_eq!(adapters(2, r"layer\.\d").expect("fits").places(), [LAYERS[2]]);
        assert_eq!(adapters(0, r"layer\.\d").expect("fits").places(), LAYERS);
        assert_eq!(adapters(3, ".*").expect("fits").places(), ["embeddings"]);
        let said = adapters(3, r"layer\.\d").expect_err("leaves none").to_string();
        assert!(said.contains("drop_layers") && said.contains("at most 2"), "{said}");
    }

    #[test]
    fn robust_draws_blocks_anew_for_each_step_of_a_training_alone() {
        let method = AdapterDrop::robust(2, bottleneck(r"layer\.\d"));
        let device = Device::flex().autodiff();
        let mut adapters = adapt(&sites(), &method, 1, &device).expect("fits");
        let mut policy = method.policy(&adapters).expect("works").expect("has one");
        let mut seen = [0; 3];
        for step in 0..40 {
            adapters = policy.adjust(step, 0.1, &adapters).expect("works").expect("draws");
            let left_out = Drawn { most: 2, seed: 0 }.blocks(step + 1);
            assert_eq!(at_work(&adapters), LAYERS[left_out..]);
            assert_eq!(at_work(&adapters.valid()), LAYERS);
            seen[left_out] += 1;
        }
        // Each n as often as another: 40/3, and a standard deviation of 3.
        assert!(seen.iter().all(|&times| times >= 4), "{seen:?}");
        let fast = AdapterDrop::without_first(1, &adapters.valid());
        assert_eq!(at_work(&fast), LAYERS[1..]);
    }
}
