//! HF PEFT's files, both directions: `adapter_config.json` and `adapter_model.safetensors`.

use crate::adapters::copies;
use crate::widened::is_half;
use crate::{
    Adapters, Error, Method, Part, PlaceTensors, Site, Sites, Strictness, TensorFile, TrainedCopy,
    Unwritten, Value, tensor_bytes, write_together,
};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Map, Value as Json};
use std::path::{Path, PathBuf};

/// Name of the configuration in an adapter's folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors in an adapter's folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// What stands in `adapter_config.json`: the method and where it belongs.
#[derive(Debug, Clone)]
pub struct AdapterConfig<T> {
    /// What was asked for.
    pub method: T,
    /// HF PEFT's task type, such as `SEQ_CLS` or `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Name or folder of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Fields that this library does not know; kept when the adapter is written again.
    pub other: Map<String, Json>,
}

/// Fields of every configuration that are about the file and not about the method.
const ABOUT_FILE: &[&str] =
    &["base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"];

/// Fields that say how HF finds the base model: kept as they are, to no effect here.
const ABOUT_BASE: &[&str] = &["auto_mapping", "revision"];

impl<T: Method> AdapterConfig<T> {
    /// For a method that was just asked for.
    pub fn new(method: T) -> Self {
        Self { method, task_type: None, base_model_name_or_path: None, other: Map::new() }
    }

    /// Reads a folder's `adapter_config.json`.
    ///
    /// # Errors
    /// A missing or malformed file, another `peft_type`, or a field that changes the result and is
    /// not implemented; unknown fields are kept and warned about.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(CONFIG_FILE);
        let fields = read_config(&path)?;
        let found = fields.get("peft_type").and_then(Json::as_str).unwrap_or("none");
        if found != T::NAME {
            let reason = format!("peft_type: expected {}, found {found}", T::NAME);
            return Err(Error::format(path, reason));
        }
        Self::from_fields(fields, &path)
    }

    fn from_fields(fields: Map<String, Json>, path: &Path) -> Result<Self, Error> {
        for (field, neutral) in T::ABSENT {
            if let Some(value) = fields.get(*field)
                && !is_neutral(value)
                && !neutral.contains(&value.to_string().as_str())
            {
                let reason = format!(
                    "{field} = {value} changes the result and is not implemented; \
                     expected it to be absent or neutral"
                );
                return Err(Error::format(path, reason));
            }
        }
        let text = |name: &str| fields.get(name).and_then(Json::as_str).map(str::to_owned);
        let (task_type, base) = (text("task_type"), text("base_model_name_or_path"));
        let method: T = serde_json::from_value(Json::Object(fields.clone()))
            .map_err(|e| Error::format(path, format!("is not a {} configuration: {e}", T::NAME)))?;
        let known = method_fields(&method, path)?;
        let mut other = Map::new();
        for (name, value) in fields {
            let absent = T::ABSENT.iter().any(|(field, _)| *field == name);
            if !known.contains_key(&name) && !absent && !ABOUT_FILE.contains(&name.as_str()) {
                if !is_neutral(&value) && !ABOUT_BASE.contains(&name.as_str()) {
                    log::warn!(
                        "{}: unknown field `{name}` is kept, without effect",
                        path.display()
                    );
                }
                other.insert(name, value);
            }
        }
        Ok(Self { method, task_type, base_model_name_or_path: base, other })
    }

    fn to_json(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let mut fields = method_fields(&self.method, path)?;
        fields.extend(self.other.clone());
        let text = |value: &Option<String>| value.clone().map_or(Json::Null, Json::String);
        for name in ABOUT_BASE {
            fields.entry(*name).or_insert(Json::Null);
        }
        fields.insert("base_model_name_or_path".into(), text(&self.base_model_name_or_path));
        fields.insert("inference_mode".into(), Json::Bool(true));
        fields.insert("peft_type".into(), Json::String(T::NAME.into()));
        fields.insert("task_type".into(), text(&self.task_type));
        fields.sort_keys();
        let mut bytes = serde_json::to_vec_pretty(&fields)
            .map_err(|e| Error::format(path, format!("cannot be written: {e}")))?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

fn is_neutral(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => true,
        Json::Array(items) => items.is_empty(),
        Json::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn method_fields<T: Method>(method: &T, path: &Path) -> Result<Map<String, Json>, Error> {
    match serde_json::to_value(method) {
        Ok(Json::Object(fields)) => Ok(fields),
        Ok(other) => Err(Error::format(path, format!("expected an object, found {other}"))),
        Err(e) => Err(Error::format(path, format!("cannot be written: {e}"))),
    }
}

fn read_config(path: &Path) -> Result<Map<String, Json>, Error> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    match serde_json::from_str(&text) {
        Ok(Json::Object(fields)) => Ok(fields),
        Ok(_) => Err(Error::format(path, "expected a JSON object")),
        Err(e) => Err(Error::format(path, format!("is not JSON: {e}"))),
    }
}

/// The `peft_type` of the adapter in `folder`.
///
/// # Errors
/// A missing or malformed configuration.
pub fn peft_type(folder: &Path) -> Result<String, Error> {
    let path = folder.join(CONFIG_FILE);
    let fields = read_config(&path)?;
    match fields.get("peft_type").and_then(Json::as_str) {
        Some(name) => Ok(name.to_owned()),
        None => Err(Error::format(path, "has no peft_type; expected one, such as \"LORA\"")),
    }
}

/// Writes an adapter as HF PEFT does: all files or none, the configuration last, so that a folder with
/// one is complete.
///
/// # Errors
/// What the operating system says.
pub fn save<T: Method>(
    folder: &Path,
    config: &AdapterConfig<T>,
    sites: &Sites,
    adapters: &Adapters<T::Adapter>,
) -> Result<(), Error> {
    save_with(folder, config, sites, adapters, &[])
}

/// [`save`], with other files that belong to the adapter (names of classes, a summary).
///
/// # Errors
/// As [`save`].
pub fn save_with<T: Method>(
    folder: &Path,
    config: &AdapterConfig<T>,
    sites: &Sites,
    adapters: &Adapters<T::Adapter>,
    others: &[(&str, Vec<u8>)],
) -> Result<(), Error> {
    let files = adapter_files(folder, config, sites, adapters, others)?;
    let files: Vec<(PathBuf, &[u8])> =
        files.iter().map(|(path, bytes)| (path.clone(), bytes.as_slice())).collect();
    write_together(&files)
}

/// What [`save_with`] writes, the configuration last.
///
/// # Errors
/// Adapters of another model, or tensors that the format cannot hold.
pub fn adapter_files<T: Method>(
    folder: &Path,
    config: &AdapterConfig<T>,
    sites: &Sites,
    adapters: &Adapters<T::Adapter>,
    others: &[(&str, Vec<u8>)],
) -> Result<Vec<Unwritten>, Error> {
    let config = AdapterConfig { method: config.method.portable(), ..config.clone() };
    let mut tensors: Vec<(String, TensorData)> = Vec::new();
    let [shared, places] = T::PREFIXES;
    let all: Vec<&T::Adapter> = adapters.iter().map(|(_, adapter)| adapter).collect();
    for (suffix, data) in config.method.shared_tensors(&all) {
        tensors.push((dotted(shared, &suffix), data));
    }
    for (path, adapter) in adapters.iter() {
        let site = site(sites, path)?;
        for (suffix, data) in config.method.tensors(site, adapter) {
            tensors.push((format!("{places}.{path}.{suffix}"), data));
        }
    }
    for (path, copy) in adapters.copies() {
        let site = site(sites, path)?;
        let bias = bias_name(places, path, adapters.get(path).is_some(), copy_is_whole(copy));
        if let Some(weight) = &copy.weight {
            let name = format!("{places}.{path}.weight");
            tensors.push((name, weight_data(site, weight.val())));
        }
        if let Some(scale) = &copy.scale {
            tensors.push((format!("{places}.{path}.weight"), scale.val().into_data()));
        }
        if let Some(value) = &copy.bias {
            tensors.push((bias, value.val().into_data()));
        }
    }
    let path = folder.join(TENSORS_FILE);
    let bytes = tensor_bytes(&path, tensors.iter().map(|(name, data)| (name.clone(), data)))?;
    let mark = folder.join(CONFIG_FILE);
    let json = config.to_json(&mark)?;
    let others = others.iter().map(|(name, bytes)| (folder.join(name), bytes.clone()));
    Ok(others.chain([(path, bytes), (mark, json)]).collect())
}

fn copy_is_whole(copy: &TrainedCopy) -> bool {
    copy.weight.is_some() || copy.scale.is_some()
}

/// HF PEFT wraps an adapted layer, so the bias of one stands under `base_layer`.
fn bias_name(places: &str, path: &str, adapted: bool, whole: bool) -> String {
    let wrapper = if adapted && !whole { ".base_layer" } else { "" };
    format!("{places}.{path}{wrapper}.bias")
}

/// A name with what stands before it, if anything does.
fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// A copied weight in PyTorch's layout: linear `[out, in]`, embedding as it is, convolutions as they are.
fn weight_data(site: &Site, weight: Tensor<2>) -> TensorData {
    let shape = site.weight.shape();
    match site.kind {
        crate::Kind::Linear => weight.transpose().into_data(),
        crate::Kind::Embedding
        | crate::Kind::Norm
        | crate::Kind::Hidden
        | crate::Kind::Attention
        | crate::Kind::Blocks => weight.into_data(),
        crate::Kind::Conv1d | crate::Kind::Conv2d => {
            let (bytes, _, dtype) = weight.transpose().into_data().into_parts();
            TensorData::from_bytes(bytes, shape, dtype)
        }
    }
}

fn site<'s>(sites: &'s Sites, path: &str) -> Result<&'s Site, Error> {
    sites.get(path).ok_or_else(|| {
        Error::no_match("adapter", path, "layer", sites.places().map(|s| s.path.as_str()))
    })
}

/// Reads an adapter that this library or HF PEFT wrote, for a model with these sites.
///
/// # Errors
/// What is missing, superfluous or does not fit is named: the first tensor, with the shapes.
pub fn load<T: Method>(
    folder: &Path,
    sites: &Sites,
    device: &Device,
) -> Result<(AdapterConfig<T>, Adapters<T::Adapter>), Error> {
    let config = AdapterConfig::<T>::load(folder)?;
    config.method.check()?;
    let path = folder.join(TENSORS_FILE);
    let mut file = TensorFile::open(&path)?;
    let method = &config.method;
    let chosen = method.places(sites, Strictness::Any)?;
    let adapted: Vec<&str> = chosen.iter().map(|site| site.path.as_str()).collect();
    let [shared, places] = T::PREFIXES;
    let mut place = PlaceTensors::new(&mut file, shared);
    let shared = method.restore_shared(&chosen, &mut place, device)?;
    let mut layers = Vec::with_capacity(chosen.len());
    for site in &chosen {
        let mut place = PlaceTensors::new(&mut file, format!("{places}.{}", site.path));
        layers.push((site.path.clone(), method.restore(site, &shared, &mut place, device)?));
    }
    for site in &chosen {
        drop_base_weight(places, site, &mut file)?;
    }
    let mut copied = Vec::new();
    for (path, part) in copies(sites, method, &adapted, Strictness::Any)? {
        let site = site(sites, path)?;
        let adapted = adapted.contains(&path);
        if let Some(copy) = restore_copy(places, site, part, adapted, &mut file, device)? {
            copied.push((path.to_owned(), copy));
        }
    }
    // With bias = "all" HF PEFT also writes the wrapper's two copies of a saved head's bias.
    let noise =
        |name: &&str| name.contains(".original_module.") || name.contains(".modules_to_save.");
    if let Some(left) = file.names().find(|name| !noise(name)) {
        return Err(Error::tensor(
            left,
            "no such tensor for this model and configuration",
            format!("it in {}; is this the adapter's base model?", path.display()),
        ));
    }
    Ok((config, Adapters::new(layers, copied).map(&mut LaidOut)))
}

/// Lays parameters out without gaps: a transposed view is multiplied in another order, and what was read
/// must give what was written, bit for bit.
struct LaidOut;

impl ModuleMapper for LaidOut {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let device = param.device();
        let value = Tensor::from_data(param.val().into_data(), &device);
        Param::initialized(param.id, Param::from_tensor(value).val())
    }
}

/// HF PEFT writes the weight of an adapted embedding along; here it stays with the base model.
fn drop_base_weight(places: &str, site: &Site, file: &mut TensorFile) -> Result<(), Error> {
    let name = format!("{places}.{}.base_layer.weight", site.path);
    let (true, Some(own)) = (file.has(&name), site.matrix()) else {
        return Ok(());
    };
    let own = weight_data(site, own).convert::<f32>();
    let stored = file.take_data(&name)?;
    // The same model, whichever of both was rounded to half precision.
    let stored = match &site.weight {
        Value::D2(weight) if is_half(weight.dtype()) => stored.convert_dtype(weight.dtype()),
        _ => stored,
    };
    let stored = stored.convert::<f32>();
    match stored.shape() == own.shape() && stored.as_bytes() == own.as_bytes() {
        true => Ok(()),
        false => Err(Error::tensor(
            name,
            "the base model's own weight",
            "another one; was the base resized or trained with the adapter?",
        )),
    }
}

fn restore_copy(
    places: &str,
    site: &Site,
    part: Part,
    adapted: bool,
    file: &mut TensorFile,
    device: &Device,
) -> Result<Option<TrainedCopy>, Error> {
    let path = &site.path;
    let mut copy = TrainedCopy { weight: None, scale: None, bias: None };
    if part == Part::Whole {
        let name = format!("{places}.{path}.weight");
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        match site.weight.shape().as_slice() {
            [dim] => copy.scale = Some(Param::from_tensor(file.take(&name, [*dim], device)?)),
            [..] if site.kind == crate::Kind::Embedding => {
                let table = file.take(&name, [fan_in, fan_out], device)?;
                copy.weight = Some(Param::from_tensor(table));
            }
            [_, _] => {
                let stored = file.take(&name, [fan_out, fan_in], device)?;
                copy.weight = Some(Param::from_tensor(stored.transpose()));
            }
            [a, b, c] => {
                let stored = file.take(&name, [*a, *b, *c], device)?;
                copy.weight = Some(Param::from_tensor(crate::as_matrix(stored)));
            }
            [a, b, c, d] => {
                let stored = file.take(&name, [*a, *b, *c, *d], device)?;
                copy.weight = Some(Param::from_tensor(crate::as_matrix(stored)));
            }
            _ => {}
        }
    }
    if site.bias.is_some() {
        let name = bias_name(places, path, adapted, part == Part::Whole);
        copy.bias = Some(Param::from_tensor(file.take(&name, [site.fan_out()], device)?));
    }
    Ok((copy.num_params() > 0).then_some(copy))
}
