//! One process that measures: our example or HF PEFT's script, what it is asked, and whether two of them agree.

use super::case::{Case, Settings};
use super::flops::Shape;
use crate::failure::Failure;
use crate::{exec, fetch, places};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// What is measured of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(super) enum Measure {
    /// The loss of a batch with a LoRA adapter over the model, without gradients
    Forward,
    /// A training step of LoRA's factors
    Lora,
    /// The same over a base whose matrices are held in bf16: ours alone, since HF PEFT computes in bf16 then
    LoraBf16,
    /// The same with gradient checkpointing
    LoraCheckpointed,
    /// A training step of all parameters
    Full,
    /// A text continued with a cache of keys and values
    Generate,
    /// The loss of a batch whose rows have adapters of their own
    Mixed,
}

impl Measure {
    /// What the table calls it.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Lora => "LoRA step",
            Self::LoraBf16 => "LoRA step, bf16",
            Self::LoraCheckpointed => "checkpointed LoRA",
            Self::Full => "full step",
            Self::Generate => "generation",
            Self::Mixed => "adapters by row",
        }
    }

    /// Who makes it.
    pub(super) fn sides(self) -> &'static [Side] {
        match self {
            Self::Lora => &[Side::Ours, Side::Peft, Side::ApplyLora],
            Self::LoraBf16 => &[Side::Ours],
            _ => &[Side::Ours, Side::Peft],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Lora => "lora",
            Self::LoraBf16 => "lora_bf16",
            Self::LoraCheckpointed => "lora_checkpointed",
            Self::Full => "full",
            Self::Generate => "generate",
            Self::Mixed => "mixed",
        }
    }
}

/// Who measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Ours,
    Peft,
    /// Burn's own LoRA.
    ApplyLora,
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Peft => "peft",
            Self::ApplyLora => "apply_lora",
        }
    }
}

/// What a process found: the words of `benches/examples/measure` and `interop/bench.py`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Measured {
    pub(super) step_seconds: Vec<f64>,
    pub(super) start_seconds: f64,
    pub(super) peak_memory_bytes: Option<u64>,
    pub(super) losses: Vec<f64>,
    pub(super) grad_norm: Option<f64>,
    pub(super) trained_parameters: Option<u64>,
    pub(super) load_seconds: Vec<f64>,
    pub(super) switch_seconds: Vec<f64>,
    pub(super) switched_loss: Option<f64>,
    pub(super) adapter_bytes: Option<u64>,
    pub(super) one_seconds: Vec<f64>,
    pub(super) new_tokens: Vec<u32>,
    pub(super) rate: Option<f64>,
    pub(super) versions: Option<Value>,
}

/// What all processes share.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) program: PathBuf,
    /// A Python with `peft`, and the script for it, where there are two sides.
    pub(super) python: Option<(PathBuf, PathBuf)>,
    pub(super) settings: Settings,
    pub(super) steps: Option<usize>,
    pub(super) threads: usize,
    pub(super) output: PathBuf,
}

/// A case's model and adapters, made.
pub(super) struct Made {
    folder: PathBuf,
    pub(super) shape: Shape,
}

impl Made {
    fn model(folder: &Path) -> PathBuf {
        folder.join("model")
    }
}

/// What a process is to do beside [`Settings`].
struct Asked<'a> {
    what: &'a str,
    source: Option<&'a Path>,
    rows: Vec<Vec<usize>>,
    steps: usize,
    products: Vec<[usize; 3]>,
    /// How many adapters it is told of: those that there are, again and again.
    adapters: usize,
}

impl Desk {
    /// The model and the adapters of a case, out of the cache or made now.
    pub(super) fn made(&self, case: &Case) -> Result<Made, Failure> {
        const REMEDY: &str = "leave its case out with --cases";
        let cache = places::cache()?.join("bench");
        let folder = cache.join(case.folder(&self.settings));
        if !folder.is_dir() {
            println!("Making the model of {}", case.name);
            places::make(&cache)?;
            let part = tempfile::Builder::new().prefix(".part-").tempdir_in(&cache);
            let part = part.map_err(|e| Failure::at(&cache, e))?;
            let model = Made::model(part.path());
            places::make(&model)?;
            let source = match &case.config {
                Some(config) => {
                    let path = model.join("config.json");
                    fs::write(&path, config.to_string()).map_err(|e| Failure::at(&path, e))?;
                    None
                }
                None => Some(fetch::fetch(&crate::assets::MINILM, REMEDY)?),
            };
            let asked = Asked {
                what: "prepare",
                source: source.as_deref(),
                rows: Vec::new(),
                steps: 0,
                products: Vec::new(),
                adapters: self.settings.adapters,
            };
            self.process(Side::Ours, &case.name, 0, part.path(), &case.target_modules, asked)?;
            match fs::rename(part.path(), &folder) {
                // Another process has been quicker.
                Err(_) if folder.is_dir() => {}
                done => done.map_err(|e| Failure::at(&folder, e))?,
            }
        }
        let path = Made::model(&folder).join("config.json");
        let text = fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
        let config = serde_json::from_str(&text).map_err(|e| Failure::at(&path, e))?;
        Ok(Made { folder, shape: Shape::of(&config)? })
    }

    /// The largest rate of matrix products of the case's sizes.
    pub(super) fn rate(
        &self,
        case: &Case,
        made: &Made,
        side: Side,
        round: usize,
    ) -> Result<f64, Failure> {
        let tokens = case.lengths(Measure::Lora, &self.settings).iter().sum();
        let asked = Asked {
            what: "rate",
            source: None,
            rows: Vec::new(),
            steps: 5,
            products: made.shape.products(tokens),
            adapters: self.settings.adapters,
        };
        let targets = &case.target_modules;
        let found = self.process(side, &case.name, round, &made.folder, targets, asked)?.rate;
        found.ok_or_else(|| Failure::new("the rate of matrix products was not measured"))
    }

    pub(super) fn measure(
        &self,
        case: &Case,
        made: &Made,
        measure: Measure,
        side: Side,
        round: usize,
    ) -> Result<Measured, Failure> {
        let what = if side == Side::ApplyLora { side.name() } else { measure.name() };
        let asked = Asked {
            what,
            source: None,
            rows: Case::rows(&case.lengths(measure, &self.settings), made.shape.vocab),
            steps: self.steps.unwrap_or(case.steps),
            products: Vec::new(),
            adapters: self.settings.adapters,
        };
        self.process(side, &case.name, round, &made.folder, &case.target_modules, asked)
    }

    /// Ours alone, on rows of these lengths: a training step of LoRA, or a forward pass under one of so many
    /// adapters that are loaded.
    pub(super) fn grown(
        &self,
        case: &Case,
        made: &Made,
        lengths: &[usize],
        loaded: Option<usize>,
        round: usize,
    ) -> Result<Measured, Failure> {
        let asked = Asked {
            what: if loaded.is_some() { "loaded" } else { Measure::Lora.name() },
            source: None,
            rows: Case::rows(lengths, made.shape.vocab),
            steps: self.steps.unwrap_or(case.steps),
            products: Vec::new(),
            adapters: loaded.unwrap_or(self.settings.adapters),
        };
        self.process(Side::Ours, &case.name, round, &made.folder, &case.target_modules, asked)
    }

    fn process(
        &self,
        side: Side,
        case: &str,
        round: usize,
        made: &Path,
        target_modules: &[String],
        asked: Asked<'_>,
    ) -> Result<Measured, Failure> {
        let Asked { what, source, rows, steps, products, adapters } = asked;
        let fresh = tempfile::tempdir_in(&self.output);
        let fresh = fresh.map_err(|e| Failure::at(&self.output, e))?;
        let [job, told, folder] =
            ["job.json", "measured.json", "adapter"].map(|name| fresh.path().join(name));
        places::make(&folder)?;
        let log = format!("{case}-{what}-{}-{}.log", side.name(), round + 1);
        let log = self.output.join("logs").join(log);
        fs::write(&log, b"").map_err(|e| Failure::at(&log, e))?;
        let set = &self.settings;
        let number = |index: usize| made.join(format!("adapter-{}", index % set.adapters));
        let adapters: Vec<PathBuf> = (0..adapters).map(number).collect();
        let labels: Vec<usize> = (0..rows.len()).map(|row| row % 2).collect();
        let mut command = match side {
            Side::Peft => {
                let none = || Failure::new("there is no Python to measure with");
                let (python, script) = self.python.as_ref().ok_or_else(none)?;
                let mut command = Command::new(python);
                command.arg(script);
                command
            }
            _ => Command::new(&self.program),
        };
        command.arg("--job").arg(&job).arg("--output").arg(&told);
        exec::threads(&mut command, self.threads).env("HF_HUB_OFFLINE", "1");
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let began = now.map_err(|e| Failure::new(format!("the clock is wrong: {e}")))?;
        let asked = json!({
            "measure": what, "model": Made::model(made), "source": source, "adapters": adapters,
            "r": set.r, "lora_alpha": set.lora_alpha, "target_modules": target_modules,
            "learning_rate": set.learning_rate, "max_grad_norm": set.max_grad_norm,
            "rows": rows, "labels": labels, "warmup": set.warmup, "steps": steps,
            "new_tokens": set.new_tokens, "products": products, "threads": self.threads,
            "began": began.as_secs_f64(), "folder": folder,
        });
        fs::write(&job, asked.to_string()).map_err(|e| Failure::at(&job, e))?;
        exec::logged(&mut command, &log)?;
        let text = fs::read_to_string(&told).map_err(|e| Failure::at(&told, e))?;
        serde_json::from_str(&text).map_err(|e| Failure::at(&told, e))
    }
}

/// How far two sides' losses may lie apart, as a share: rounding in single precision.
///
/// The error of a sum of `K` products is about `√K·u` of its size where roundings are independent
/// (`u = 2⁻²⁴`; Higham and Mary 2019), and a loss stands behind `depth` such sums, on both sides.
pub(super) fn tolerance(shape: &Shape, longest: usize) -> f64 {
    2.0 * shape.depth() * shape.longest_sum(longest).sqrt() * 2.0_f64.powi(-24)
}

/// Whether `one` did the same work as `other`; says what is apart if not.
///
/// The first loss shows the forward pass and the norm of its gradients the backward pass, which goes through
/// three times as many products. The second loss shows the update: Adam's first step moves each number by the
/// learning rate along the sign of its gradient, which changes the loss by `lr·Σ|g| <= lr·√n·‖g‖`; of
/// gradients with an error `e`, those up to `|e|` may have another sign, which changes it by `2·lr·√n·‖e‖`.
pub(super) fn agree(
    share: f64,
    learning_rate: f64,
    one: &Measured,
    other: &Measured,
) -> Result<(), String> {
    let near = |what: &str, a: f64, b: f64, most: f64| {
        let apart = (a - b).abs();
        // Written so that what is no number is apart.
        if apart <= most {
            return Ok(());
        }
        Err(format!("{what}: {a} and {b} are {apart:.1e} apart, expected at most {most:.1e}"))
    };
    let loss =
        |what: &str, a: f64, b: f64, more: f64| near(what, a, b, share * b.abs().max(1.0) + more);
    if one.trained_parameters != other.trained_parameters {
        let [a, b] = [one, other].map(|side| side.trained_parameters);
        return Err(format!("trained parameters: {a:?} and {b:?}"));
    }
    if one.new_tokens != other.new_tokens {
        return Err(format!("the text: {:?} and {:?}", one.new_tokens, other.new_tokens));
    }
    if one.losses.len() != other.losses.len() {
        return Err(format!("steps: {} and {}", one.losses.len(), other.losses.len()));
    }
    if one.losses.is_empty() && one.new_tokens.is_empty() {
        return Err("there is no loss to compare".into());
    }
    if let (Some(a), Some(b)) = (one.losses.first(), other.losses.first()) {
        loss("the first loss", *a, *b, 0.0)?;
    }
    if let (Some(a), Some(b)) = (one.switched_loss, other.switched_loss) {
        loss("the loss under the adapter that was switched to", a, b, 0.0)?;
    }
    let (Some(a), Some(norm)) = (one.grad_norm, other.grad_norm) else { return Ok(()) };
    near("the norm of the first gradients", a, norm, 3.0 * share * norm)?;
    if let (Some(a), Some(b)) = (one.losses.get(1), other.losses.get(1)) {
        let count = other.trained_parameters.unwrap_or(0) as f64;
        let moved = 2.0 * learning_rate * count.sqrt() * 3.0 * share * norm;
        loss("the second loss", *a, *b, moved)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> Measured {
        Measured {
            losses: vec![0.7, 0.6],
            grad_norm: Some(2.0),
            trained_parameters: Some(10_000),
            ..Measured::default()
        }
    }

    fn said(one: &Measured) -> String {
        agree(1e-4, 1e-3, one, &step()).err().unwrap_or_default()
    }

    #[test]
    fn the_same_work_agrees_and_other_work_is_told() {
        assert_eq!(said(&step()), "");
        // 1e-4 of rounding, and 2 · 1e-3 · 100 · 3e-4 · 2 more where an update has come between.
        assert_eq!(said(&Measured { losses: vec![0.70009, 0.60019], ..step() }), "");
        for (one, what) in [
            (Measured { losses: vec![0.70011, 0.6], ..step() }, "the first loss"),
            (Measured { losses: vec![f64::NAN, 0.6], ..step() }, "the first loss"),
            (Measured { losses: vec![0.7, 0.7], ..step() }, "the second loss"),
            (Measured { losses: vec![0.7], ..step() }, "steps: 1 and 2"),
            (Measured { grad_norm: Some(2.1), ..step() }, "the norm of the first gradients"),
            (Measured { trained_parameters: Some(9), ..step() }, "trained parameters"),
            (Measured { new_tokens: vec![1], ..step() }, "the text"),
        ] {
            assert!(said(&one).starts_with(what), "{what}: {}", said(&one));
        }
        let nothing = Measured::default();
        assert!(agree(1e-4, 1e-3, &nothing, &nothing).is_err());
    }

    #[test]
    fn the_tolerance_is_of_rounding_alone() {
        let config = json!({"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536,
            "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30_522});
        let share = tolerance(&Shape::of(&config).expect("is a model"), 64);
        let expected = 2.0 * 38.0 * 1536.0_f64.sqrt() / 16_777_216.0;
        assert!((share - expected).abs() < 1e-12, "{share}");
    }
}
