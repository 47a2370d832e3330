//! What is asked for and what came out, in the words that `interop/bench.py` reads and writes too.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Why nothing was measured.
pub(crate) type Failed = Box<dyn std::error::Error>;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    /// Nothing: the model and its adapters are made.
    Prepare,
    /// The best rate of matrix products.
    Rate,
    /// The loss of a batch, an adapter laid over, without gradients.
    Forward,
    /// A training step of LoRA's factors.
    Lora,
    /// The same over a base whose matrices are held in bf16.
    LoraBf16,
    /// A training step of LoRA's factors with gradient checkpointing.
    LoraCheckpointed,
    /// A step of LoRA's factors through Burn's own `apply_lora`.
    ApplyLora,
    /// A training step of all parameters.
    Full,
    /// Continuing a prompt with a cache of keys and values.
    Generate,
    /// The loss of a batch whose rows have adapters of their own.
    Mixed,
    /// The loss of a batch under one of all adapters, which are loaded.
    Loaded,
}

/// A measurement.
#[derive(Debug, Deserialize)]
pub(crate) struct Job {
    pub(crate) measure: What,
    /// Folder of the model.
    pub(crate) model: PathBuf,
    /// Where the model's weights come from; drawn where there is nothing.
    pub(crate) source: Option<PathBuf>,
    /// Folders of LoRA adapters for it.
    pub(crate) adapters: Vec<PathBuf>,
    pub(crate) r: usize,
    pub(crate) lora_alpha: f64,
    pub(crate) target_modules: Vec<String>,
    pub(crate) learning_rate: f64,
    pub(crate) max_grad_norm: f64,
    /// Token ids, a row of the batch.
    pub(crate) rows: Vec<Vec<u32>>,
    /// Class of each row, for a classifier.
    pub(crate) labels: Vec<i32>,
    /// Steps that are made and not counted.
    pub(crate) warmup: usize,
    /// Steps that are counted.
    pub(crate) steps: usize,
    /// Tokens to add to the first row.
    pub(crate) new_tokens: usize,
    /// Sizes `[m, k, n]` of products whose rate is measured.
    pub(crate) products: Vec<[usize; 3]>,
    /// When the process was started, in seconds of Unix time.
    pub(crate) began: f64,
    /// An empty folder.
    pub(crate) folder: PathBuf,
}

/// What came out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Measured {
    /// Time of each step that counts.
    pub(crate) step_seconds: Vec<f64>,
    /// From the start of the process until the first step was made.
    pub(crate) start_seconds: f64,
    /// Largest resident memory when the steps were made; Linux only.
    pub(crate) peak_memory_bytes: Option<u64>,
    /// Loss of each step, those of the warm-up among them.
    pub(crate) losses: Vec<f64>,
    /// Norm of all gradients of the first step, before clipping.
    pub(crate) grad_norm: Option<f64>,
    pub(crate) trained_parameters: Option<usize>,
    pub(crate) load_seconds: Vec<f64>,
    pub(crate) switch_seconds: Vec<f64>,
    /// Loss under the adapter that was switched to.
    pub(crate) switched_loss: Option<f64>,
    pub(crate) adapter_bytes: Option<u64>,
    /// With one adapter for all rows, where it is measured beside one a row.
    pub(crate) one_seconds: Vec<f64>,
    pub(crate) new_tokens: Vec<u32>,
    /// Floating-point operations a second.
    pub(crate) rate: Option<f64>,
}

/// Makes the steps and takes their times. Returns what each step came to.
pub(crate) fn timed<T>(
    job: &Job,
    mut step: impl FnMut(usize) -> Result<T, Failed>,
) -> Result<(Measured, Vec<T>), Failed> {
    let mut measured = Measured::default();
    let mut all = Vec::new();
    for index in 0..job.warmup + job.steps {
        let (came, seconds) = took(|| step(index))?;
        all.push(came);
        if index == 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            measured.start_seconds = now.as_secs_f64() - job.began;
        }
        if index >= job.warmup {
            measured.step_seconds.push(seconds);
        }
    }
    measured.peak_memory_bytes = peak_memory();
    Ok((measured, all))
}

/// What `work` returns, and how long it took.
pub(crate) fn took<T>(work: impl FnOnce() -> Result<T, Failed>) -> Result<(T, f64), Failed> {
    let start = Instant::now();
    let came = work()?;
    Ok((came, start.elapsed().as_secs_f64()))
}

/// Largest resident memory of this process so far, in bytes; Linux only.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
