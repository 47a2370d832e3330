//! A LoRA step through the scope (factored) against Burn's own `apply_lora` (dense on every read),
//! over the same blocks, and over Burn's own blocks of the same shape: `cargo xtask bench`.
//!
//! Two blocks of BERT-base's and of a Llama's shape, width 768, 4 rows of 128 tokens, rank 8 on
//! every linear layer, on flex. Our blocks have fused kernels, which `apply_lora` over them has the use of;
//! `burn::nn`'s encoder, which there is of BERT's shape, is what one has without this library. Time is criterion's median; memory is the peak of a process of its
//! own that makes three steps, weights counted in, so that both ratios are of one run.

mod common;

use burn::module::{Lora as BuiltIn, Module, ParamGroup};
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor};
use burn_peft_core::{Adapters, Scope, Sites, Targets, adapt};
use burn_peft_models::{BertForSequenceClassification, LlamaForCausalLM, Pretrained, Tokens};
use burn_peft_reparam::{Lora, LoraAdapter};
use criterion::{Criterion, SamplingMode};
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

const BATCH: usize = 4;
const SEQ: usize = 128;
const WIDTH: usize = 768;
const RANK: usize = 8;
/// Names the step that a process of its own makes.
const STEP: &str = "BURN_PEFT_BENCH_STEP";
const BLOCKS: [&str; 2] = ["bert", "llama"];

/// Whose step is measured, the last being what the others are held against.
fn ways(blocks: &str) -> &'static [&'static str] {
    match blocks {
        "bert" => &["burn", "apply_lora", "factored"],
        _ => &["apply_lora", "factored"],
    }
}

/// A model that turns tokens into hidden states.
trait Blocks: Pretrained {
    const LINEARS: &'static [&'static str];
    fn config() -> Value;
    fn hidden_states(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<3>;

    fn new(device: &Device) -> Self {
        let config = serde_json::from_value(Self::config()).expect("is a configuration");
        Self::init(&config, device).expect("describes a model")
    }
}

impl Blocks for BertForSequenceClassification {
    const LINEARS: &'static [&'static str] = &["query", "key", "value", "dense"];

    fn config() -> Value {
        json!({
            "vocab_size": 1000, "hidden_size": WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 12, "intermediate_size": 4 * WIDTH, "hidden_act": "gelu",
            "max_position_embeddings": SEQ, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        })
    }

    fn hidden_states(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<3> {
        self.encoder().forward(tokens, &cx.at("bert"))
    }
}

impl Blocks for LlamaForCausalLM {
    const LINEARS: &'static [&'static str] =
        &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    fn config() -> Value {
        json!({
            "vocab_size": 1000, "hidden_size": WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048,
            "hidden_act": "silu", "max_position_embeddings": SEQ, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
        })
    }

    fn hidden_states(&self, tokens: &Tokens, cx: &Scope<'_>) -> Tensor<3> {
        self.hidden(tokens, cx, None)
    }
}

fn tokens() -> Tokens {
    let ids = (0..(BATCH * SEQ) as i32).map(|i| i * 7 % 1000).collect();
    Tokens { ids, mask: vec![1; BATCH * SEQ], batch: BATCH, seq: SEQ, ..Tokens::default() }
}

/// Forward and backward; the number is there so that nothing can be left out.
fn gradients<M: Module>(hidden: Tensor<3>, trained: &M, count: usize) -> GradientsParams {
    let loss = hidden.powi_scalar(2).mean();
    let grads = GradientsParams::from_grads(loss.backward(), trained);
    assert_eq!(grads.len(), count, "not every factor has a gradient");
    grads
}

/// Burn's own way: the factors are part of the model, composed densely on every read.
fn built_in<M: Blocks>() -> impl FnMut() -> GradientsParams {
    let model = M::new(&Device::flex().autodiff());
    let names = M::LINEARS.iter().map(|name| format!("{name}.weight")).collect();
    let group = ParamGroup::from_any_predicates(names);
    let lora = BuiltIn::new(RANK, 16.0).set_param_group(group);
    let model = model.apply_lora(lora);
    let (tokens, count) = (tokens(), factors::<M>());
    move || gradients(model.hidden_states(&tokens, &Scope::plain()), &model, count)
}

/// What one has without this library: Burn's encoder and Burn's LoRA.
fn burn_alone() -> impl FnMut() -> GradientsParams {
    const LINEARS: [&str; 6] = ["query", "key", "value", "output", "linear_inner", "linear_outer"];
    const LAYERS: usize = 2;
    let device = Device::flex().autodiff();
    let config = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 12, LAYERS);
    let model = config.with_dropout(0.0).init(&device);
    let names = LINEARS.iter().map(|name| format!("{name}.weight")).collect();
    let group = ParamGroup::from_any_predicates(names);
    let model = model.apply_lora(BuiltIn::new(RANK, 16.0).set_param_group(group));
    let x = Tensor::<3>::random([BATCH, SEQ, WIDTH], Distribution::Default, &Device::flex());
    let count = 2 * LINEARS.len() * LAYERS;
    let input = move || TransformerEncoderInput::new(Tensor::from_inner(x.clone()));
    move || gradients(model.forward(input()), &model, count)
}

fn targets<M: Blocks>() -> Lora {
    Lora::new(RANK, 16.0, Targets::list(M::LINEARS.iter().copied()))
}

/// Factors inside the blocks: what a step must have gradients for.
fn factors<M: Blocks>() -> usize {
    let sites = Sites::of(&M::new(&Device::flex()), None);
    let inside =
        |path: &str| path.contains("layer") && M::LINEARS.iter().any(|l| path.ends_with(l));
    2 * sites.all.iter().filter(|site| inside(&site.path)).count()
}

/// Ours: the base on the plain device, the factors beside it.
fn factored<M: Blocks>() -> impl FnMut() -> GradientsParams {
    let device = Device::flex();
    let model = M::new(&device);
    let sites = Sites::of(&model, None);
    let adapters: Adapters<LoraAdapter> =
        adapt(&sites, &targets::<M>(), 0, &device.autodiff()).expect("fits");
    let (tokens, count) = (tokens(), factors::<M>());
    move || gradients(model.hidden_states(&tokens, &Scope::new(&adapters)), &adapters, count)
}

/// The step of that name, ready to be made.
fn step(name: &str) -> Box<dyn FnMut() -> GradientsParams> {
    match name {
        "bert/burn" => Box::new(burn_alone()),
        "bert/apply_lora" => Box::new(built_in::<BertForSequenceClassification>()),
        "bert/factored" => Box::new(factored::<BertForSequenceClassification>()),
        "llama/apply_lora" => Box::new(built_in::<LlamaForCausalLM>()),
        "llama/factored" => Box::new(factored::<LlamaForCausalLM>()),
        other => unreachable!("no step is called {other}"),
    }
}

/// Largest resident memory of this process so far, in bytes; Linux only.
fn peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<f64>().ok().map(|kib| kib * 1024.0)
}

/// Median peak of three processes that make the step.
fn memory(name: &str) -> Option<f64> {
    let program = std::env::current_exe().ok()?;
    let mut peaks: Vec<f64> = Vec::new();
    for _ in 0..3 {
        let output = Command::new(&program).env(STEP, name).output().ok()?;
        peaks.push(String::from_utf8(output.stdout).ok()?.trim().parse().ok()?);
    }
    peaks.sort_by(f64::total_cmp);
    peaks.get(1).copied()
}

fn main() {
    burn_peft_kernels::keep_freed_memory();
    if let Ok(name) = std::env::var(STEP) {
        let mut step = step(&name);
        for _ in 0..3 {
            std::hint::black_box(step());
        }
        println!("{}", peak().unwrap_or_default());
        return;
    }
    let folder = tempfile::tempdir().expect("makes a folder");
    let mut criterion = Criterion::default()
        .configure_from_args()
        .output_directory(folder.path())
        .sample_size(10)
        .warm_up_time(Duration::from_secs(2))
        .measurement_time(Duration::from_secs(10));
    for blocks in BLOCKS {
        let mut group = criterion.benchmark_group(blocks);
        group.sampling_mode(SamplingMode::Flat);
        for way in ways(blocks) {
            let mut step = step(&format!("{blocks}/{way}"));
            group.bench_function(*way, |bencher| bencher.iter(&mut step));
        }
        group.finish();
    }
    criterion.final_summary();
    println!(
        "{:<8}{:<12}{:>11}{:>10}{:>14}{:>10}",
        "blocks", "way", "step", "factored", "peak memory", "factored"
    );
    for blocks in BLOCKS {
        let measured = |way: &&str| {
            let name = format!("{blocks}/{way}");
            (common::seconds(folder.path(), &name), memory(&name).filter(|bytes| *bytes > 0.0))
        };
        let found: Vec<_> = ways(blocks).iter().map(measured).collect();
        let (own_time, own_memory) = found.last().copied().unwrap_or_default();
        for (way, (time, memory)) in ways(blocks).iter().zip(found) {
            let told = |of: Option<f64>, own: Option<f64>, unit: f64, name: &str| match of {
                Some(of) => {
                    let faster = own.map_or_else(String::new, |own| format!("{:.2}x", of / own));
                    (format!("{:.0} {name}", unit * of), faster)
                }
                None => ("not known".to_owned(), String::new()),
            };
            let (step, faster) = told(time, own_time, 1e3, "ms");
            let (peak, smaller) = told(memory, own_memory, 1e-6, "MB");
            println!("{blocks:<8}{way:<12}{step:>11}{faster:>10}{peak:>14}{smaller:>10}");
        }
    }
}
