//! Each fused operation of `burn-peft-kernels` against its plain composition, the same call on the same inputs:
//! `cargo xtask bench --kernels`, and `-- NAME` behind it for some of them.
//!
//! On flex, in f32, 1024 tokens (256 in front of the vocabulary), at the shapes of MiniLM, BERT-base and SmolLM2-135M. A
//! backward pass begins with a gradient of ones and forms what training forms: `linear` and the norms with trained weights,
//! `low_rank` over a frozen layer, `cross_entropy` behind a frozen one, attention with a constant mask. Times are criterion's
//! medians. GFLOP/s are of the products that there must be (of attention the pairs that see each other, and no scores that
//! a backward pass makes again), GB/s of each input read and each output written once in either pass.

mod common;

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft_kernels::{self as kernels, composed};
use criterion::{Criterion, SamplingMode};
use std::hint::black_box;
use std::time::Duration;

const TOKENS: usize = 1024;
const RANK: usize = 8;
const SCALE: f64 = 2.0;
const EPSILON: f64 = 1e-5;
/// Tokens whose next one is guessed, and the words to guess from.
const GUESSED: usize = 256;
const VOCAB: usize = 49_152;

/// Shapes of a model, its rows so many that they are 1024 tokens.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    seq: usize,
    width: usize,
    inner: usize,
    heads: usize,
    groups: usize,
    biased: bool,
}

const fn model(
    name: &'static str,
    seq: usize,
    [width, inner]: [usize; 2],
    [heads, groups]: [usize; 2],
    biased: bool,
) -> Model {
    Model { name, seq, width, inner, heads, groups, biased }
}

const MINILM: Model = model("minilm", 64, [384, 1536], [12, 12], true);
const BERT: Model = model("bert-base", 128, [768, 3072], [12, 12], true);
const SMOLLM2: Model = model("smollm2", 1024, [576, 1536], [9, 3], false);
const MODELS: [Model; 3] = [MINILM, BERT, SMOLLM2];

/// What must be done or moved: forward, and forward and backward.
#[derive(Clone, Copy)]
enum Work {
    Flops([f64; 2]),
    Bytes([f64; 2]),
}

impl Work {
    /// Tensors of so many numbers that are read or written.
    fn moved(numbers: usize, [forward, both]: [usize; 2]) -> Self {
        Self::Bytes([forward, both].map(|tensors| 4.0 * (tensors * numbers) as f64))
    }

    fn rate(self, backward: bool, seconds: f64) -> String {
        let (work, unit) = match self {
            Self::Flops(work) => (work, "GFLOP/s"),
            Self::Bytes(work) => (work, "GB/s"),
        };
        format!("{:.1} {unit}", work[usize::from(backward)] / seconds / 1e9)
    }
}

/// Makes one pass.
type Pass = Box<dyn FnMut()>;

/// A call of one function on inputs of one shape.
struct Case {
    kernel: &'static str,
    model: &'static str,
    sizes: String,
    work: Work,
    /// A pass, fused or composed, with backward or without.
    ready: Box<dyn Fn(bool, bool) -> Pass>,
}

fn case<I: Clone + 'static, const D: usize>(
    kernel: &'static str,
    model: Model,
    sizes: String,
    work: Work,
    inputs: impl Fn(&Device) -> I + 'static,
    fused: fn(I) -> Tensor<D>,
    composed: fn(I) -> Tensor<D>,
) -> Case {
    let ready = move |is_fused: bool, backward: bool| -> Pass {
        let device = Device::flex();
        let inputs = inputs(&if backward { device.autodiff() } else { device });
        let run = if is_fused { fused } else { composed };
        Box::new(move || {
            let y = run(inputs.clone());
            match backward {
                true => drop(black_box(y.backward())),
                false => drop(black_box(y)),
            }
        })
    };
    Case { kernel, model: model.name, sizes, work, ready: Box::new(ready) }
}

/// An input that has a gradient where there are gradients.
fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let x = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
    if device.is_autodiff() { x.require_grad() } else { x }
}

fn constant<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    random(shape, &Device::flex())
}

/// `2·m·k·n`
fn product(m: usize, k: usize, n: usize) -> f64 {
    2.0 * (m * k * n) as f64
}

fn linear(model: Model) -> Case {
    let Model { width, inner, biased, .. } = model;
    let whole = product(TOKENS, width, inner);
    case(
        "linear",
        model,
        format!("{width} to {inner}"),
        Work::Flops([whole, 3.0 * whole]),
        move |device| {
            let bias = biased.then(|| random([inner], device));
            (random([1, TOKENS, width], device), random([width, inner], device), bias)
        },
        |(x, w, bias)| kernels::linear(x, w, bias),
        |(x, w, bias)| composed::linear(x, w, bias),
    )
}

fn low_rank(model: Model) -> Case {
    let Model { width, inner, biased, .. } = model;
    let (whole, thin) = (product(TOKENS, width, inner), product(TOKENS, width + inner, RANK));
    case(
        "low_rank",
        model,
        format!("{width} to {inner}, rank {RANK}"),
        Work::Flops([whole + thin, 2.0 * whole + 3.0 * thin]),
        move |device| {
            let bias = biased.then(|| constant([inner]));
            let factors = (random([width, RANK], device), random([RANK, inner], device));
            (random([1, TOKENS, width], device), constant([width, inner]), bias, factors)
        },
        |(x, w, bias, factors)| kernels::low_rank(x, w, bias, factors, SCALE),
        |(x, w, bias, factors)| composed::low_rank(x, w, bias, factors, SCALE),
    )
}

fn gelu(model: Model) -> Case {
    let inner = model.inner;
    case(
        "gelu",
        model,
        format!("{TOKENS} x {inner}"),
        Work::moved(TOKENS * inner, [2, 5]),
        move |device| random([TOKENS, inner], device),
        kernels::gelu,
        composed::gelu,
    )
}

fn silu_mul(model: Model) -> Case {
    let inner = model.inner;
    case(
        "silu_mul",
        model,
        format!("{TOKENS} x {inner}"),
        Work::moved(TOKENS * inner, [3, 8]),
        move |device| [random([TOKENS, inner], device), random([TOKENS, inner], device)],
        |[gate, up]| kernels::silu_mul(gate, up),
        |[gate, up]| composed::silu_mul(gate, up),
    )
}

fn layer_norm(model: Model) -> Case {
    let width = model.width;
    case(
        "layer_norm",
        model,
        format!("{TOKENS} x {width}"),
        Work::moved(TOKENS * width, [2, 5]),
        move |device| {
            let [gamma, beta] = [0, 1].map(|_| random([width], device));
            (random([TOKENS, width], device), gamma, beta)
        },
        |(x, gamma, beta)| kernels::layer_norm(x, gamma, Some(beta), EPSILON),
        |(x, gamma, beta)| composed::layer_norm(x, gamma, Some(beta), EPSILON),
    )
}

fn rms_norm(model: Model) -> Case {
    let width = model.width;
    case(
        "rms_norm",
        model,
        format!("{TOKENS} x {width}"),
        Work::moved(TOKENS * width, [2, 5]),
        move |device| (random([TOKENS, width], device), random([width], device)),
        |(x, gamma)| kernels::rms_norm(x, gamma, EPSILON),
        |(x, gamma)| composed::rms_norm(x, gamma, EPSILON),
    )
}

fn rotate(model: Model) -> Case {
    let Model { seq, width, heads, .. } = model;
    let (rows, d) = (TOKENS / seq, width / heads);
    case(
        "rotate",
        model,
        format!("{heads} heads of {d}"),
        Work::moved(TOKENS * width, [2, 4]),
        move |device| {
            let table = || {
                let half = constant([1, 1, seq, d / 2]);
                Tensor::cat(vec![half.clone(), half], 3)
            };
            (random([rows, seq, heads, d], device), table(), table())
        },
        |(x, cos, sin)| kernels::rotate(x.swap_dims(1, 2), cos, sin),
        |(x, cos, sin)| composed::rotate(x.swap_dims(1, 2), cos, sin),
    )
}

/// What attention does not see.
#[derive(Clone, Copy, PartialEq)]
enum Hidden {
    Nothing,
    /// The end of each row but the longest: a row sees from a third of the columns to all of them.
    Padding,
    Future,
}

impl Hidden {
    /// Columns that a row of a batch of so many sees from this position.
    fn seen(self, rows: usize, seq: usize, row: usize, at: usize) -> usize {
        match self {
            Self::Nothing => seq,
            Self::Padding => seq - (2 * seq / 3) * row / (rows - 1),
            Self::Future => at + 1,
        }
    }

    fn mask(self, rows: usize, seq: usize) -> Option<Tensor<4>> {
        let shape = match self {
            Self::Nothing => return None,
            Self::Padding => [rows, 1, 1, seq],
            Self::Future => [1, 1, seq, seq],
        };
        let [rows, _, queries, _] = shape;
        let mut values: Vec<f32> = Vec::new();
        for (row, at) in (0..rows).flat_map(|row| (0..queries).map(move |at| (row, at))) {
            let seen = self.seen(rows, seq, row, at);
            values.extend((0..seq).map(|key| if key < seen { 0.0 } else { -1e9 }));
        }
        Some(Tensor::from_data(TensorData::new(values, shape), &Device::flex()))
    }
}

fn attention(kernel: &'static str, model: Model, groups: usize, hidden: Hidden) -> Case {
    let Model { seq, width, heads, .. } = model;
    let (rows, d) = (TOKENS / seq, width / heads);
    let places = (0..rows).flat_map(|row| (0..seq).map(move |at| (row, at)));
    let pairs: usize = places.map(|(row, at)| hidden.seen(rows, seq, row, at)).sum();
    // q·kᵀ and p·v forward; backward dp, dv, dq and dk.
    let one = product(heads * pairs, d, 1);
    case(
        kernel,
        model,
        format!("{rows} x {seq}, {heads}/{groups} heads of {d}"),
        Work::Flops([2.0 * one, 6.0 * one]),
        move |device| {
            let [k, v] = [0, 1].map(|_| random([rows, seq, groups, d], device));
            (random([rows, seq, heads, d], device), k, v, hidden.mask(rows, seq))
        },
        |(q, k, v, mask)| {
            let [q, k, v] = [q, k, v].map(|x| x.swap_dims(1, 2));
            kernels::attention(q, k, v, mask)
        },
        |(q, k, v, mask)| {
            let [q, k, v] = [q, k, v].map(|x| x.swap_dims(1, 2));
            composed::attention(q, k, v, mask)
        },
    )
}

fn cross_entropy(model: Model) -> Case {
    let width = model.width;
    let whole = product(GUESSED, width, VOCAB);
    case(
        "cross_entropy",
        model,
        format!("{GUESSED} x {width} to {VOCAB}"),
        Work::Flops([whole, 2.0 * whole]),
        move |device| {
            let targets: Vec<i32> = (0..GUESSED).map(|n| (n * 7919 % VOCAB) as i32).collect();
            // As small as weights are, so that no probability is one.
            let w = constant([width, VOCAB]) * 0.02;
            (random([GUESSED, width], device), w, targets)
        },
        |(x, w, targets)| kernels::cross_entropy(x, w, targets).0,
        |(x, w, targets)| composed::cross_entropy(composed::linear(x, w, None), targets).0,
    )
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = MODELS.into_iter().map(linear).collect();
    cases.extend(MODELS.into_iter().map(low_rank));
    cases.extend([gelu(MINILM), gelu(BERT), silu_mul(SMOLLM2)]);
    cases.extend([layer_norm(MINILM), layer_norm(BERT), rms_norm(SMOLLM2), rotate(SMOLLM2)]);
    cases.push(attention("attention", BERT, BERT.groups, Hidden::Nothing));
    cases.push(attention("attention-padded", MINILM, MINILM.groups, Hidden::Padding));
    cases.push(attention("attention-causal", SMOLLM2, SMOLLM2.heads, Hidden::Future));
    cases.push(attention("attention-grouped", SMOLLM2, SMOLLM2.groups, Hidden::Future));
    cases.push(cross_entropy(SMOLLM2));
    cases
}

const PASSES: [(&str, bool); 2] = [("forward", false), ("and-backward", true)];
const WAYS: [(&str, bool); 2] = [("composed", false), ("fused", true)];

fn told(seconds: f64) -> String {
    if seconds < 1e-3 {
        format!("{:.0} µs", 1e6 * seconds)
    } else {
        format!("{:.2} ms", 1e3 * seconds)
    }
}

fn main() {
    kernels::keep_freed_memory();
    let folder = tempfile::tempdir().expect("makes a folder");
    let mut criterion = Criterion::default()
        .configure_from_args()
        .output_directory(folder.path())
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    let cases = cases();
    for case in &cases {
        let mut group = criterion.benchmark_group(case.kernel);
        group.sampling_mode(SamplingMode::Flat);
        for (pass, backward) in PASSES {
            for (way, fused) in WAYS {
                // Made where it is measured, and once: criterion asks for it sample by sample.
                let mut step: Option<Pass> = None;
                group.bench_function(format!("{}-{pass}-{way}", case.model), |bencher| {
                    bencher.iter(step.get_or_insert_with(|| (case.ready)(fused, backward)));
                });
            }
        }
        group.finish();
    }
    criterion.final_summary();
    println!(
        "{:<19}{:<11}{:<31}{:<14}{:>10}{:>10}{:>7}{:>16}",
        "kernel", "model", "sizes", "pass", "composed", "fused", "ratio", "fused"
    );
    for case in &cases {
        for (pass, backward) in PASSES {
            let median = |(way, _)| {
                let name = format!("{}/{}-{pass}-{way}", case.kernel, case.model);
                common::seconds(folder.path(), &name)
            };
            let [Some(composed), Some(fused)] = WAYS.map(median) else { continue };
            println!(
                "{:<19}{:<11}{:<31}{pass:<14}{:>10}{:>10}{:>7.2}{:>16}",
                case.kernel,
                case.model,
                case.sizes,
                told(composed),
                told(fused),
                fused / composed,
                case.work.rate(backward, fused)
            );
        }
    }
}
