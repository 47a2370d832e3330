//! One run of one row: our program or the reference in Python as a process, and what comes out of it.

use super::recipe::Row;
use crate::exec;
use crate::failure::Failure;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Python,
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Python => "python",
        }
    }
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Share of the held-out examples that are labelled right.
    pub(super) accuracy: f64,
    pub(super) trainable_parameters: u64,
    /// Size of `adapter_model.safetensors`, the trained head in it; of all of them where there are several.
    pub(super) adapter_bytes: u64,
    /// Mean time of an optimizer step; evaluation is not in it.
    pub(super) step_seconds: f64,
    /// Largest resident memory of the training process, where the system says.
    pub(super) peak_memory_bytes: Option<u64>,
    /// 1 less the mean cosine between a neutral sentence's embeddings before and after, of a model of texts.
    pub(super) forgetting: Option<f64>,
    /// Time of the whole run: loading, training, evaluating.
    #[serde(default)]
    pub(super) seconds: f64,
}

/// What all runs of a table share.
pub(crate) struct Desk {
    pub(crate) program: PathBuf,
    /// A Python with `peft`, and the script for it.
    pub(crate) python: Option<(PathBuf, PathBuf)>,
    pub(crate) model: PathBuf,
    pub(crate) train: PathBuf,
    pub(crate) held_out: PathBuf,
    /// Sentences that have nothing to do with the task, for a model of texts.
    pub(crate) neutral: Option<PathBuf>,
    /// Sums of the data, which are part of what was run.
    pub(crate) sums: Vec<String>,
    pub(crate) output: PathBuf,
    pub(crate) threads: usize,
}

/// One run.
pub(crate) struct Job<'r> {
    pub(crate) row: &'r Row,
    pub(crate) training: Map<String, Value>,
    pub(crate) seed: u64,
    pub(crate) side: Side,
}

impl Job<'_> {
    /// All that decides what the run comes to.
    fn settings(&self, desk: &Desk) -> Value {
        let mut row = self.row.clone();
        if self.side == Side::Ours {
            row.reference = None;
        }
        json!({
            "side": self.side.name(),
            "seed": self.seed,
            "row": row,
            "training": self.training,
            "model": super::name(&desk.model),
            "data": desk.sums,
            "threads": desk.threads,
        })
    }

    /// A name for the run's files: who, what, and a sum of the settings.
    pub(super) fn stem(&self, desk: &Desk) -> String {
        let sum = Sha256::digest(self.settings(desk).to_string().as_bytes());
        let sum: String = sum.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-seed-{}-{sum}", self.row.name, self.side.name(), self.seed)
    }

    pub(super) fn file(&self, desk: &Desk, ending: &str) -> PathBuf {
        desk.output.join("runs").join(format!("{}.{ending}", self.stem(desk)))
    }

    /// What an earlier run with the same settings came to.
    pub(super) fn finished(&self, desk: &Desk) -> Result<Option<Measured>, Failure> {
        let path = self.file(desk, "json");
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| Failure::at(&path, e))?,
        };
        let mut run: Value = serde_json::from_str(&text).map_err(|e| Failure::at(&path, e))?;
        let measured = serde_json::from_value(run["measured"].take());
        measured.map(Some).map_err(|e| Failure::at(&path, format!("{e}; delete it to run anew")))
    }

    /// Trains, measures, and writes that down.
    pub(super) fn run(&self, desk: &Desk) -> Result<Measured, Failure> {
        let folder = desk.output.join("running");
        // Left by a run that was broken off.
        if folder.is_dir() {
            fs::remove_dir_all(&folder).map_err(|e| Failure::at(&folder, e))?;
        }
        crate::places::make(&folder)?;
        let log = self.file(desk, "log");
        fs::write(&log, b"").map_err(|e| Failure::at(&log, e))?;
        let start = Instant::now();
        let measured = match self.side {
            Side::Ours => self.ours(desk, &folder, &log)?,
            Side::Python => self.theirs(desk, &folder, &log)?,
        };
        let measured = Measured { seconds: start.elapsed().as_secs_f64(), ..measured };
        let run = json!({"settings": self.settings(desk), "measured": measured});
        crate::places::write(&self.file(desk, "json"), format!("{run:#}\n").as_bytes())?;
        fs::remove_dir_all(&folder).map_err(|e| Failure::at(&folder, e))?;
        Ok(measured)
    }

    /// Trains, and tells the mean time of an optimizer step.
    pub(super) fn step_seconds(&self, desk: &Desk) -> Result<f64, Failure> {
        let folder =
            tempfile::tempdir_in(&desk.output).map_err(|e| Failure::at(&desk.output, e))?;
        let (adapter, log) = (folder.path().join("adapter"), self.file(desk, "times.log"));
        fs::write(&log, b"").map_err(|e| Failure::at(&log, e))?;
        exec::logged(&mut self.train(desk, &adapter), &log)?;
        step_seconds(&summary(&adapter)?, &adapter)
    }

    fn ours(&self, desk: &Desk, folder: &Path, log: &Path) -> Result<Measured, Failure> {
        let adapter = folder.join("adapter");
        exec::logged(&mut self.train(desk, &adapter), log)?;
        let summary = summary(&adapter)?;
        let adapted = folder.join("adapted.safetensors");
        let forgetting = match desk.embed(Some(&adapter), &adapted, log)? {
            true => Some(1.0 - similarity(&desk.base_embeddings(), &adapted)?),
            false => None,
        };
        Ok(Measured {
            accuracy: self.accuracy(desk, &adapter, log)?,
            trainable_parameters: number(&summary, "trainable_parameters", &adapter)? as u64,
            adapter_bytes: tensor_bytes(&adapter)?,
            step_seconds: step_seconds(&summary, &adapter)?,
            peak_memory_bytes: summary["peak_memory_bytes"].as_u64(),
            forgetting,
            seconds: 0.0,
        })
    }

    /// What an adapter of ours gets right of the held-out examples.
    pub(crate) fn accuracy(&self, desk: &Desk, adapter: &Path, log: &Path) -> Result<f64, Failure> {
        let mut eval = desk.command("eval");
        eval.arg("--adapter").arg(adapter).arg("--test-file").arg(&desk.held_out);
        if let Some(length) = self.training.get("max_length") {
            eval.arg(format!("--max-length={length}"));
        }
        let report = exec::logged(&mut eval, log)?;
        let report: Value = serde_json::from_slice(&report).map_err(|e| Failure::at(log, e))?;
        number(&report, "accuracy", adapter)
    }

    /// `burn-peft train`, with nothing evaluated on the way.
    pub(crate) fn train(&self, desk: &Desk, adapter: &Path) -> Command {
        let Row { method, target_modules, options, .. } = self.row;
        let mut train = desk.command("train");
        train.arg("--train-file").arg(&desk.train).arg("--output-dir").arg(adapter);
        train.arg(format!("--method={method}"));
        if !target_modules.is_empty() {
            train.arg(format!("--target-modules={}", target_modules.join(",")));
        }
        for (name, value) in options {
            train.arg(format!("--method-option={name}={value}"));
        }
        for (name, value) in &self.training {
            let said = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            train.arg(format!("--{}={said}", name.replace('_', "-")));
        }
        train.arg(format!("--seed={}", self.seed));
        train
    }

    /// Where our training begins, for the other side to begin there too: our adapter after one step, whose
    /// rate is 0.
    pub(crate) fn start(&self, desk: &Desk, folder: &Path, log: &Path) -> Result<PathBuf, Failure> {
        let start = folder.join("start");
        let mut training = self.training.clone();
        for option in ["max_steps", "warmup_steps"] {
            training.insert(option.into(), 1.into());
        }
        let first = Job { training, ..*self };
        exec::logged(&mut first.train(desk, &start), log)?;
        Ok(start)
    }

    fn theirs(&self, desk: &Desk, folder: &Path, log: &Path) -> Result<Measured, Failure> {
        let Some((python, script)) = &desk.python else {
            return Err(Failure::new("there is no Python to run the reference with"));
        };
        let start = self.start(desk, folder, log)?;
        let (asked, told) = (folder.join("job.json"), folder.join("measured.json"));
        let job = json!({
            "model": desk.model, "train_file": desk.train, "held_out_file": desk.held_out,
            "neutral_file": desk.neutral, "threads": desk.threads, "seed": self.seed,
            "row": self.row, "training": self.training, "start": start,
        });
        fs::write(&asked, job.to_string()).map_err(|e| Failure::at(&asked, e))?;
        let mut run = Command::new(python);
        run.arg(script).arg("--job").arg(&asked).arg("--output").arg(&told);
        exec::logged(&mut run, log)?;
        let text = fs::read_to_string(&told).map_err(|e| Failure::at(&told, e))?;
        serde_json::from_str(&text).map_err(|e| Failure::at(&told, e))
    }
}

/// What `burn-peft train` left beside the adapter.
pub(crate) fn summary(adapter: &Path) -> Result<Value, Failure> {
    let path = adapter.join("summary.json");
    let text = fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
    serde_json::from_str(&text).map_err(|e| Failure::at(&path, e))
}

pub(crate) fn number(of: &Value, name: &str, adapter: &Path) -> Result<f64, Failure> {
    let found = of[name].as_f64();
    found.ok_or_else(|| Failure::at(adapter, format!("`{name}` is not known")))
}

fn step_seconds(summary: &Value, adapter: &Path) -> Result<f64, Failure> {
    Ok(number(summary, "train_seconds", adapter)? / number(summary, "steps", adapter)?)
}

impl Desk {
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(verb).arg("--model").arg(&self.model);
        command
    }

    fn base_embeddings(&self) -> PathBuf {
        self.output.join("base.safetensors")
    }

    /// The neutral sentences, if there are any, as the model without an adapter sees them.
    pub(super) fn embed_base(&self) -> Result<(), Failure> {
        let log = self.output.join("base.log");
        fs::write(&log, b"").map_err(|e| Failure::at(&log, e))?;
        self.embed(None, &self.base_embeddings(), &log).map(drop)
    }

    /// Whether there were sentences to embed.
    fn embed(&self, adapter: Option<&Path>, output: &Path, log: &Path) -> Result<bool, Failure> {
        let Some(neutral) = &self.neutral else { return Ok(false) };
        let mut embed = self.command("embed");
        embed.arg("--test-file").arg(neutral).arg("--output").arg(output);
        if let Some(adapter) = adapter {
            embed.arg("--adapter").arg(adapter);
        }
        exec::logged(&mut embed, log).map(|_| true)
    }
}

/// The mean over all sentences of the cosine between two files' embeddings, which have length 1.
fn similarity(one: &Path, other: &Path) -> Result<f64, Failure> {
    let [(rows, a), (found, b)] = [vectors(one)?, vectors(other)?];
    if rows != found || a.len() != b.len() {
        let reason = format!("expected as many numbers as {} has", one.display());
        return Err(Failure::at(other, reason));
    }
    let sum: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    Ok(sum / rows as f64)
}

/// How many vectors `embed` wrote, and their numbers.
fn vectors(path: &Path) -> Result<(usize, Vec<f32>), Failure> {
    let bytes = fs::read(path).map_err(|e| Failure::at(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Failure::at(path, e))?;
    let tensor = file.tensor("embeddings").map_err(|e| Failure::at(path, e))?;
    let numbers = tensor.data().as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four));
    let rows = tensor.shape().first().copied().unwrap_or(0);
    Ok((rows, numbers.collect()))
}

/// Size of the tensors in the folder of an adapter, or of several.
fn tensor_bytes(adapter: &Path) -> Result<u64, Failure> {
    let said = |e| Failure::at(adapter, e);
    let mut files = vec![adapter.join("adapter_model.safetensors")];
    for entry in fs::read_dir(adapter).map_err(said)? {
        files.push(entry.map_err(said)?.path().join("adapter_model.safetensors"));
    }
    match files
        .iter()
        .filter_map(|file| fs::metadata(file).ok())
        .map(|file| file.len())
        .sum::<u64>()
    {
        0 => Err(Failure::at(adapter, "holds no adapter_model.safetensors")),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::compare::recipe::Recipe;
    use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

    pub(in crate::compare) fn desk_at(output: &Path) -> Desk {
        Desk {
            program: "burn-peft".into(),
            python: None,
            model: "minilm".into(),
            train: "train.tsv".into(),
            held_out: "held-out.tsv".into(),
            neutral: Some("neutral.tsv".into()),
            sums: vec!["1".into()],
            output: output.into(),
            threads: 2,
        }
    }

    fn job(recipe: &Recipe, seed: u64) -> Job<'_> {
        let row = &recipe.rows[0];
        Job { row, training: recipe.training(row), seed, side: Side::Ours }
    }

    #[test]
    fn a_run_is_known_again_by_all_of_its_settings() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let desk = desk_at(Path::new("out"));
        let name = job(&recipe, 1).stem(&desk);
        assert!(name.starts_with("lora-ours-seed-1-"), "{name}");
        assert_eq!(name, job(&recipe, 1).stem(&desk));
        assert_eq!(name, job(&recipe, 1).stem(&desk_at(Path::new("elsewhere"))));
        let mut others = vec![job(&recipe, 2), job(&recipe, 1), job(&recipe, 1)];
        others[1].training.insert("max_steps".into(), json!(7));
        others[2].side = Side::Python;
        for other in others {
            assert_ne!(name, other.stem(&desk));
        }
        let data = Desk { sums: vec!["2".into()], ..desk_at(Path::new("out")) };
        assert_ne!(name, job(&recipe, 1).stem(&data));
    }

    #[test]
    fn a_finished_run_is_read_and_a_broken_file_is_named() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let desk = desk_at(folder.path());
        let recipe = Recipe::sentiment().expect("is a recipe");
        let job = job(&recipe, 1);
        assert_eq!(job.finished(&desk).expect("is no failure"), None);
        fs::create_dir(folder.path().join("runs")).expect("makes a folder");
        let measured = Measured {
            accuracy: 0.75,
            trainable_parameters: 9,
            adapter_bytes: 40,
            step_seconds: 0.5,
            peak_memory_bytes: None,
            forgetting: Some(0.01),
            seconds: 60.0,
        };
        let text = json!({"measured": measured}).to_string();
        fs::write(job.file(&desk, "json"), text).expect("writes");
        assert_eq!(job.finished(&desk).expect("is well formed"), Some(measured));
        fs::write(job.file(&desk, "json"), "{}").expect("writes");
        assert!(job.finished(&desk).is_err_and(|e| e.to_string().contains("lora-ours-seed-1-")));
    }

    #[test]
    fn options_become_the_programs_flags() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let mut job = job(&recipe, 3);
        job.training = Map::new();
        job.training.insert("lr_scheduler_type".into(), json!("linear"));
        job.training.insert("max_steps".into(), json!(5));
        let train = job.train(&desk_at(Path::new("out")), Path::new("a"));
        let said: Vec<_> = train.get_args().map(|arg| arg.to_string_lossy()).collect();
        let line = said.join(" ");
        let expected = "--method=lora --target-modules=query,value --method-option=r=8 \
                        --method-option=lora_alpha=16 --lr-scheduler-type=linear --max-steps=5 --seed=3";
        assert!(line.ends_with(expected), "{line}");
    }

    #[test]
    fn similarity_is_the_mean_cosine() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let write = |name: &str, numbers: &[f32]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            let view = TensorView::new(Dtype::F32, vec![numbers.len() / 2, 2], &bytes);
            let path = folder.path().join(name);
            let view = view.expect("fits");
            serialize_to_file([("embeddings", view)], None, &path).expect("writes");
            path
        };
        let one = write("one", &[1.0, 0.0, 0.0, 1.0]);
        let other = write("other", &[1.0, 0.0, 1.0, 0.0]);
        assert!((similarity(&one, &one).expect("is read") - 1.0).abs() < 1e-12);
        assert!((similarity(&one, &other).expect("is read") - 0.5).abs() < 1e-12);
        let short = write("short", &[1.0, 0.0]);
        assert!(similarity(&one, &short).is_err());
    }
}
