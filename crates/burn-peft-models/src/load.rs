//! Hugging Face folders, both directions: `config.json` with one safetensors file or several.

use crate::Precision;
use burn::module::{Module, ModuleDisplay, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, TensorFile, hf_path, site_rng, tensor_bytes, write_together};
use rand::RngExt;
use rand_distr::StandardNormal;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Refuses sizes that no model has, before anything is made of that size.
pub(crate) fn plausible(sizes: &[(&str, usize)]) -> Result<(), Error> {
    const MOST: usize = 1 << 24;
    for (field, size) in sizes {
        let most = if field.ends_with("_layers") { 1 << 12 } else { MOST };
        if *size == 0 || *size > most {
            let reason = format!("expected a number from 1 to {most}, found {size}");
            return Err(Error::config(*field, reason));
        }
    }
    Ok(())
}

/// What [`Pretrained::read_config`] does unless a model must look at more than `config.json`.
pub(crate) fn config_of<M: Pretrained>(folder: &Path) -> Result<M::Config, Error> {
    let path = folder.join("config.json");
    let found = model_type(folder)?;
    if found != M::MODEL_TYPE {
        let reason = format!("model_type: expected {}, found {found}", M::MODEL_TYPE);
        return Err(Error::format(path, reason));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::format(&path, format!("is not a {found} configuration: {e}")))
}

/// A model that can be read from a Hugging Face folder.
pub trait Pretrained: Module + ModuleDisplay + Sync + 'static {
    /// What `config.json` holds.
    type Config: DeserializeOwned + Clone + std::fmt::Debug;
    /// `model_type` in `config.json`.
    const MODEL_TYPE: &'static str;
    /// Path of the layer that makes the output.
    const OUTPUT: &'static str;
    /// What stands before the names of the bare model inside this one; a checkpoint may leave it out.
    const PREFIX: &'static str;
    /// Beginnings of names that are drawn at random where the checkpoint lacks them.
    const MAY_BE_FRESH: &'static [&'static str];
    /// Beginnings of names in checkpoints that this model has no use for.
    const IGNORED: &'static [&'static str];

    /// The model with parameters that are still to be loaded.
    ///
    /// # Errors
    /// A configuration that describes no model.
    fn init(config: &Self::Config, device: &Device) -> Result<Self, Error>;

    /// Standard deviation of fresh weights.
    fn initializer_range(config: &Self::Config) -> f64;

    /// The configuration of the model in a folder.
    ///
    /// # Errors
    /// A missing or malformed file, or one of another architecture.
    fn read_config(folder: &Path) -> Result<Self::Config, Error> {
        config_of::<Self>(folder)
    }

    /// Takes what the model keeps of a checkpoint beside its own parameters: frozen parts that a forward pass reads only when
    /// an adapter asks for them. They are no places, are not counted and not written with the model.
    ///
    /// # Errors
    /// Tensors that do not fit.
    fn beside(&mut self, config: &Self::Config, from: &mut Beside<'_>) -> Result<(), Error> {
        let _ = (config, from);
        Ok(())
    }

    /// Loads the model from a folder to the plain `device`, each tensor converted to `precision` as it is read.
    /// `edit` changes the configuration first, such as the number of classes. Fresh weights depend on `seed`.
    ///
    /// # Errors
    /// Missing or broken files, a configuration of another architecture, and the first tensor that
    /// is missing or does not fit, with both shapes; one that `precision` cannot hold.
    fn load(
        folder: &Path,
        precision: Precision,
        seed: u64,
        device: &Device,
        edit: impl FnOnce(&mut Self::Config),
    ) -> Result<Loaded<Self>, Error> {
        let mut config = Self::read_config(folder)?;
        edit(&mut config);
        let model = Self::init(&config, device)?;
        let mut linears = Linears::default();
        model.visit(&mut linears);
        let mut loader = Loader {
            file: TensorFile::open_shards(weight_files(folder)?)?,
            stack: Vec::new(),
            matrices: Vec::new(),
            linears: linears.weights,
            prefix: Self::PREFIX,
            fresh_names: Self::MAY_BE_FRESH,
            std: Self::initializer_range(&config) as f32,
            precision,
            seed,
            device: device.clone(),
            fresh: Vec::new(),
            missing: Vec::new(),
            broken: None,
        };
        let mut model = model.map(&mut loader);
        if let Some(error) = loader.broken.take() {
            return Err(error);
        }
        if let Some(first) = loader.missing.first() {
            let count = loader.missing.len();
            let found =
                format!("none ({count} tensors of the model are missing in {})", folder.display());
            return Err(Error::tensor(first, "a tensor of that name", found));
        }
        model.beside(&config, &mut Beside(&mut loader))?;
        for name in loader.file.names() {
            if !Self::IGNORED.iter().any(|known| name.contains(known)) {
                log::warn!("{}: tensor `{name}` is not part of the model", folder.display());
            }
        }
        Ok(Loaded { model, config, fresh: loader.fresh })
    }
}

/// A model with what is to be known about where it came from.
#[derive(Debug)]
pub struct Loaded<M: Pretrained> {
    /// The model, on the plain device.
    pub model: M,
    /// Its configuration.
    pub config: M::Config,
    /// Parameters that the checkpoint lacked and that were drawn at random.
    pub fresh: Vec<String>,
}

/// `model_type` of the folder's `config.json`.
///
/// # Errors
/// A missing or malformed file.
pub fn model_type(folder: &Path) -> Result<String, Error> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let json: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::format(&path, format!("is not JSON: {e}")))?;
    match json.get("model_type").and_then(|name| name.as_str()) {
        Some(name) => Ok(name.to_owned()),
        None => Err(Error::format(path, "has no model_type; expected one, such as \"bert\"")),
    }
}

/// The weights in one file, and the list of files where there are several.
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of a model's folder: the one, as `transformers` prefers it, or those that the
/// index names.
///
/// # Errors
/// An index that is broken or names what is not there.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let (single, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    if single.is_file() || !index.is_file() {
        return Ok(vec![single]);
    }
    let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
    let json: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::format(&index, format!("is not JSON: {e}")))?;
    let Some(map) = json.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(Error::format(
            index,
            "has no weight_map; expected tensor names with their files",
        ));
    };
    let mut names = BTreeSet::new();
    for file in map.values() {
        match file.as_str().map(Path::new) {
            // A shard lies beside its index, nowhere else.
            Some(file) if file.components().count() == 1 => names.insert(folder.join(file)),
            _ => {
                let reason = format!("weight_map names {file}; expected a file beside the index");
                return Err(Error::format(index, reason));
            }
        };
    }
    if let Some(absent) = names.iter().find(|path| !path.is_file()) {
        let reason = format!("names {}, which is not there", absent.display());
        return Err(Error::format(index, reason));
    }
    Ok(names.into_iter().collect())
}

/// A linear layer whose numbers are still to come: nothing is drawn for what is loaded anyway.
pub(crate) fn linear(fan_in: usize, fan_out: usize, bias: bool, device: &Device) -> Linear {
    let config = LinearConfig::new(fan_in, fan_out).with_bias(bias);
    config.with_initializer(Initializer::Zeros).init(device)
}

/// An embedding whose numbers are still to come.
pub(crate) fn table(rows: usize, dim: usize, device: &Device) -> Embedding {
    EmbeddingConfig::new(rows, dim).with_initializer(Initializer::Zeros).init(device)
}

/// Names of the weights of linear layers, which PyTorch stores `[out, in]`.
#[derive(Default)]
struct Linears {
    stack: Vec<(String, bool)>,
    weights: BTreeSet<String>,
}

impl ModuleVisitor for Linears {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.stack.push((name.to_owned(), container_type == "Struct:Linear"));
    }
    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }
    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        if D == 2 && self.stack.last().is_some_and(|(_, linear)| *linear) {
            let names: Vec<&str> = self.stack.iter().map(|(name, _)| name.as_str()).collect();
            self.weights.insert(hf_path(&names));
        }
    }
}

/// A checkpoint whose model is loaded, for what is kept [beside](Pretrained::beside) it.
pub struct Beside<'a>(&'a mut Loader);

impl Beside<'_> {
    /// Where the model was loaded to.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// `part` with its tensors, whose names begin with `path`; the full names of those that the checkpoint lacks, if there are
    /// any.
    ///
    /// # Errors
    /// A tensor that does not fit, with both shapes.
    pub fn read<M: Module>(
        &mut self,
        path: &str,
        part: M,
    ) -> Result<Result<M, Vec<String>>, Error> {
        let mut linears = Linears { stack: vec![(path.to_owned(), false)], ..Linears::default() };
        part.visit(&mut linears);
        let loader = &mut *self.0;
        loader.linears.extend(linears.weights);
        loader.stack = vec![path.to_owned()];
        loader.fresh_names = &[];
        let part = part.map(loader);
        loader.stack.clear();
        match loader.broken.take() {
            Some(error) => Err(error),
            None if loader.missing.is_empty() => Ok(Ok(part)),
            None => Ok(Err(std::mem::take(&mut loader.missing))),
        }
    }
}

struct Loader {
    file: TensorFile,
    stack: Vec<String>,
    /// Whether the modules on the way are linear layers or embeddings.
    matrices: Vec<bool>,
    linears: BTreeSet<String>,
    prefix: &'static str,
    fresh_names: &'static [&'static str],
    std: f32,
    precision: Precision,
    seed: u64,
    device: Device,
    fresh: Vec<String>,
    missing: Vec<String>,
    broken: Option<Error>,
}

impl Loader {
    fn find(&self, name: &str) -> Option<String> {
        // Checkpoints that came from TensorFlow (bert-base-uncased) keep its names for norms.
        let old = name
            .strip_suffix("Norm.weight")
            .map(|norm| format!("{norm}Norm.gamma"))
            .or_else(|| name.strip_suffix("Norm.bias").map(|norm| format!("{norm}Norm.beta")));
        let names = [Some(name), old.as_deref()].into_iter().flatten();
        let mut names = names.flat_map(|name| [Some(name), name.strip_prefix(self.prefix)]);
        names.find_map(|n| n.filter(|n| self.file.has(n))).map(str::to_owned)
    }

    fn read<const D: usize>(
        &mut self,
        name: &str,
        stored: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, Error> {
        let transposed = self.linears.contains(name);
        let mut expected = shape;
        if transposed {
            expected.reverse();
        }
        if let Some(found) = self.file.shape(stored)
            && found != expected
        {
            let found = format!("shape {found:?}");
            return Err(Error::tensor(stored, format!("shape {expected:?}"), found));
        }
        let matrix = D == 2 && self.matrices.last() == Some(&true);
        let data = self.file.take_data(stored)?;
        let data = self.precision.held(stored, data, matrix, &self.device)?;
        let dtype = data.dtype();
        let tensor = Tensor::<D>::from_data(data, (&self.device, dtype));
        Ok(if transposed { tensor.transpose() } else { tensor })
    }

    fn draw<const D: usize>(&mut self, name: String, shape: [usize; D]) -> Tensor<D> {
        let mut rng = site_rng(self.seed, &name);
        let std = if D == 1 { 0.0 } else { self.std };
        let count = shape.iter().product();
        let values = (0..count).map(|_| rng.sample::<f32, _>(StandardNormal) * std).collect();
        self.fresh.push(name);
        Tensor::from_data(TensorData::new::<f32, _>(values, shape), &self.device)
    }
}

impl ModuleMapper for Loader {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.stack.push(name.to_owned());
        self.matrices.push(matches!(container_type, "Struct:Linear" | "Struct:Embedding"));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
        self.matrices.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.broken.is_some() {
            return param;
        }
        let name = hf_path(&self.stack);
        let shape = param.lazy_shape().dims::<D>();
        let tensor = match self.find(&name) {
            Some(stored) => self.read(&name, &stored, shape),
            None if self.fresh_names.iter().any(|start| name.starts_with(start)) => {
                Ok(self.draw(name, shape))
            }
            None => {
                self.missing.push(name);
                return param;
            }
        };
        match tensor {
            Ok(tensor) => Param::initialized(param.id, tensor),
            Err(error) => {
                self.broken = Some(error);
                param
            }
        }
    }
}

struct Saver {
    stack: Vec<(String, bool)>,
    tensors: Vec<(String, TensorData)>,
}

impl ModuleVisitor for Saver {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.stack.push((name.to_owned(), container_type == "Struct:Linear"));
    }
    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let linear = D == 2 && self.stack.last().is_some_and(|(_, linear)| *linear);
        let names: Vec<&str> = self.stack.iter().map(|(name, _)| name.as_str()).collect();
        let tensor = if linear { param.val().transpose() } else { param.val() };
        self.tensors.push((hf_path(&names), tensor.into_data()));
    }
}

/// Files of a model's folder that say how to use it, beside the weights.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Writes a model as a Hugging Face folder: the weights of `model`, each in the type in which it is held, and
/// configuration and tokenizer of the folder that it came from, with `fields` of `config.json` changed.
///
/// # Errors
/// What the operating system says; a folder gets all files or none.
pub fn save_model<M: Pretrained>(
    model: &M,
    source: &Path,
    folder: &Path,
    fields: &[(&str, serde_json::Value)],
) -> Result<(), Error> {
    let from = source.join("config.json");
    let text = std::fs::read_to_string(&from).map_err(|e| Error::io(&from, e))?;
    let mut config: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::format(&from, format!("is not JSON: {e}")))?;
    if let Some(config) = config.as_object_mut() {
        for (name, value) in fields {
            config.insert((*name).to_owned(), value.clone());
        }
    }
    let to = folder.join("config.json");
    let bytes = serde_json::to_vec_pretty(&config)
        .map_err(|e| Error::format(&to, format!("cannot be written: {e}")))?;
    let mut companions = Vec::new();
    for name in COMPANIONS {
        let from = source.join(name);
        if from.is_file() {
            let bytes = std::fs::read(&from).map_err(|e| Error::io(&from, e))?;
            companions.push((folder.join(name), bytes));
        }
    }
    let mut saver = Saver { stack: Vec::new(), tensors: Vec::new() };
    model.visit(&mut saver);
    let path = folder.join(WEIGHTS);
    let tensors = saver.tensors.iter().map(|(name, data)| (name.clone(), data));
    let weights = tensor_bytes(&path, tensors)?;
    drop(saver);
    let mut files: Vec<(PathBuf, &[u8])> =
        companions.iter().map(|(path, bytes)| (path.clone(), bytes.as_slice())).collect();
    files.push((path, &weights));
    files.push((to, &bytes));
    write_together(&files)?;
    // Shards of a model that lay here before.
    match std::fs::remove_file(folder.join(INDEX)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, e)),
        _ => Ok(()),
    }
}
