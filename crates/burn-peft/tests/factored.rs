//! No method falls back to a dense difference in silence, unless it says that it has no other way
//! (`Method::weight_only`): a forward pass through a wide layer must not
//! allocate as much as its weight. A binary of its own, because it counts every allocation.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use burn::train::TrainStep;
use burn_peft::core::{
    Counted, Kind, Method, Passes, Scope, Sites, Targets, adapt, attach, survey,
};
use burn_peft::models::{LlamaConfig, LlamaForCausalLM, Pretrained, Tokens};
use burn_peft::registry::{ForEach, for_each_method};
use burn_peft::reparam::Lora;
use burn_peft::selective::PaFi;
use burn_peft::train::data::CausalBatch;
use burn_peft::train::{Step, StepSettings, Tuned};
use std::sync::{Arc, Mutex, PoisonError};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const WIDTH: usize = 768;
const WEIGHT: u64 = (WIDTH * WIDTH * size_of::<f32>()) as u64;

#[derive(Module, Debug)]
struct Wide {
    query: Linear,
    head: Linear,
}

impl Wide {
    fn forward(&self, x: &Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let x = cx.at("query").linear(&self.query, x.clone());
        cx.at("head").linear(&self.head, x)
    }
}

/// What methods see that look at data first.
struct Data<'a>(&'a Wide, Tensor<3>);

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

/// Bytes that were allocated by `work`, freed or not.
fn allocated<T>(work: impl FnOnce() -> T) -> u64 {
    let before = dhat::HeapStats::get().total_bytes;
    drop(work());
    dhat::HeapStats::get().total_bytes - before
}

struct Factored {
    device: Device,
    model: Wide,
    x: Tensor<3>,
    plain: u64,
}

impl ForEach for Factored {
    fn visit<T: Method>(&mut self) {
        // A hidden state or a norm has no weight to be as large as.
        if !T::KINDS.contains(&Kind::Linear) {
            return;
        }
        let sites = Sites::of(&self.model, None);
        for method in T::samples(&Targets::list(["query"])) {
            if method.weight_only() {
                continue;
            }
            let data = Tensor::random([4, 16, WIDTH], Distribution::Default, &self.device);
            let method = survey(method, &sites, &Data(&self.model, data)).expect("fits");
            let adapters =
                adapt(&sites, &method, 0, &self.device.clone().autodiff()).expect("fits");
            let forward = || self.model.forward(&self.x, &Scope::new(&adapters));
            let _ = forward();
            let forwards = allocated(forward);
            assert!(forwards < self.plain + WEIGHT / 2, "{method:?}: {forwards} bytes forward");
        }
    }
}

/// Bytes that adapters over a share of the layer's numbers and their optimizer hold after a step.
fn held(model: &Wide, x: &Tensor<3>, keep_ratio: f64) -> i64 {
    let device = x.device().autodiff();
    let current = || dhat::HeapStats::get().curr_bytes as i64;
    let before = current();
    let method = PaFi::new(keep_ratio, Targets::list(["query"]));
    let mut adapters = adapt(&Sites::of(model, None), &method, 0, &device).expect("fits");
    let mut optimizer = AdamWConfig::new().init();
    for _ in 0..2 {
        let loss = model.forward(x, &Scope::new(&adapters)).powi_scalar(2).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &adapters);
        adapters = optimizer.step(1e-3, adapters, gradients);
    }
    let held = current() - before;
    drop((adapters, optimizer));
    held
}

/// One test after the other: all allocations are counted together.
static ALONE: Mutex<()> = Mutex::new(());

/// Most bytes that are held at a time in a step of LoRA, over a Llama of so many blocks.
fn most_held(blocks: usize, gradient_checkpointing: bool) -> f64 {
    let device = Device::flex();
    let config = LlamaConfig {
        vocab_size: 64,
        hidden_size: HIDDEN,
        intermediate_size: 2 * HIDDEN,
        num_hidden_layers: blocks,
        num_attention_heads: 4,
        ..LlamaConfig::default()
    };
    let model = LlamaForCausalLM::init(&config, &device).expect("is a good configuration");
    let sites = Sites::of(&model, Some(LlamaForCausalLM::OUTPUT));
    let lora = Lora::new(2, 4.0, Targets::list(["q_proj"]));
    let adapters = adapt(&sites, &lora, 0, &device.clone().autodiff()).expect("fits");
    let settings = StepSettings { device, max_grad_norm: 0.0, seed: 0, gradient_checkpointing };
    let tuned = Tuned::new(Arc::new(model), vec![adapters.erased()], settings);
    let ids: Vec<i32> = (0..TOKENS as i32).map(|i| i * 7 % 64).collect();
    let targets = ids.clone();
    let tokens =
        Tokens { ids, mask: vec![1; TOKENS], batch: 4, seq: TOKENS / 4, ..Tokens::default() };
    let step = || {
        let batches = vec![CausalBatch { tokens: tokens.clone(), targets: targets.clone() }];
        TrainStep::step(&tuned, Step { index: 0, epoch: 0, ends_epoch: false, batches })
    };
    drop(step()); // what threads keep, and weights that are made when they are read
    let _counting = dhat::Profiler::builder().testing().build();
    drop(step());
    dhat::HeapStats::get().max_bytes as f64
}

const HIDDEN: usize = 128;
const TOKENS: usize = 1024;

/// With gradient checkpointing a block more costs its hidden state, and without it all that the block makes of it.
#[test]
fn a_block_that_is_run_again_holds_its_input_alone() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let state = (TOKENS * HIDDEN * size_of::<f32>()) as f64;
    let [kept, again] = [false, true].map(|again| {
        let [few, many] = [2, 6].map(|blocks| most_held(blocks, again));
        (many - few) / 4.0 / state
    });
    // Queries, keys, values, two norms, and the feed-forward part's two at twice the width.
    assert!(kept > 5.0, "{kept} hidden states a block");
    // The graph's own entries beside it.
    assert!(again < 2.0, "{again} hidden states a block");
}

#[test]
fn a_forward_pass_allocates_less_than_a_weight() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _counting = dhat::Profiler::builder().testing().build();
    let device = Device::flex();
    let model = Wide {
        query: LinearConfig::new(WIDTH, WIDTH).init(&device),
        head: LinearConfig::new(WIDTH, 2).init(&device),
    };
    let x = Tensor::random([1, 2, WIDTH], Distribution::Default, &device);
    let plain = || model.forward(&x, &Scope::plain());
    let _ = plain();
    let bytes = allocated(plain);

    // The measure can fail: the dense way does allocate a weight.
    let lora = Lora::new(4, 8.0, Targets::list(["query"]));
    let adapters = adapt(&Sites::of(&model, None), &lora, 0, &device.clone().autodiff());
    let attached = attach(model.clone(), &adapters.expect("fits")).expect("is the same model");
    let dense = allocated(|| attached.forward(&x, &Scope::plain()));
    assert!(dense > bytes + WEIGHT / 2, "{dense} bytes dense, {bytes} plain");

    // Weights that were read from a file lie transposed; a site is a handle on them all the same.
    let turned = Linear { weight: model.query.weight.clone().map(Tensor::transpose), bias: None };
    let turned = Wide { query: turned, head: model.head.clone() };
    let sites = allocated(|| Sites::of(&turned, None));
    assert!(sites < WEIGHT / 2, "{sites} bytes for finding the places");

    // Values, two moments of them, and their places.
    let [some, all] = [0.005, 1.0].map(|ratio| held(&model, &x, ratio));
    let weight = WEIGHT as i64;
    assert!(some < weight / 20 && all > 3 * weight, "{some} and {all} bytes of {weight}");

    for_each_method(&mut Factored { device, plain: bytes, x, model: model.clone() });
}
