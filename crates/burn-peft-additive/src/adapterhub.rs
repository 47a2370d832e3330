//! AdapterHub's files, both directions: `adapter_config.json` and `adapter.safetensors` of its bottleneck adapters.

use crate::{Bottleneck, BottleneckAdapter, Compacter, CompacterAdapter};
use burn::tensor::{Device, TensorData};
use burn_peft_core::{
    Adapters, Error, Method, Names, PlaceTensors, Site, Sites, Targets, TensorFile, tensor_bytes,
    write_together,
};
use serde_json::{Map, Value as Json, json};
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter.safetensors";

/// Fields of AdapterHub's configuration that change the result and are not implemented, with the value that changes
/// nothing. A norm before the adapter is stored twice there, which its own safetensors files cannot hold.
fn neutral() -> [(&'static str, Json); 11] {
    [
        ("cross_adapter", json!(false)),
        ("factorized_phm_rule", json!(false)),
        ("inv_adapter", Json::Null),
        ("learn_phm", json!(true)),
        ("ln_after", json!(false)),
        ("ln_before", json!(false)),
        ("original_ln_after", json!(true)),
        ("phm_bias", json!(true)),
        ("residual_before_ln", json!(true)),
        ("shared_W_phm", json!(false)),
        ("use_gating", json!(false)),
    ]
}

/// Fields that [`Compacter`] does not have, likewise.
fn neutral_to_compacter() -> [(&'static str, Json); 4] {
    let (zero, one) = (json!(0.0), json!(1.0));
    [
        ("dropout", zero.clone()),
        ("is_parallel", json!(false)),
        ("scaling", one),
        ("stochastic_depth", zero),
    ]
}

/// All fields of AdapterHub's `BnConfig` with what [`save_to_hub`] writes where the method says nothing.
fn defaults() -> Map<String, Json> {
    let fields = json!({
        "adapter_residual_before_ln": false, "cross_adapter": false, "dropout": 0.0, "factorized_phm_W": true,
        "factorized_phm_rule": false, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
        "init_weights_seed": null, "inv_adapter": null, "inv_adapter_reduction_factor": null, "is_parallel": false,
        "learn_phm": true, "leave_out": [], "ln_after": false, "ln_before": false, "mh_adapter": false,
        "non_linearity": "relu", "original_ln_after": true, "original_ln_before": false, "output_adapter": false,
        "phm_bias": true, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": false,
        "phm_rank": 1, "reduction_factor": 16, "residual_before_ln": true, "scaling": 1.0, "shared_W_phm": false,
        "shared_phm_rule": true, "stochastic_depth": 0.0, "use_gating": false,
    });
    match fields {
        Json::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// A method whose adapters AdapterHub has.
pub trait HubMethod: Method {
    /// Whether its matrices are sums of Kronecker products.
    const PHM: bool;
}

impl HubMethod for Bottleneck {
    const PHM: bool = false;
}

impl HubMethod for Compacter {
    const PHM: bool = true;
}

/// What AdapterHub says of the model beside an adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HubModel {
    /// The adapter's name.
    pub name: String,
    /// Class of the model in `transformers`, such as `BertForSequenceClassification`.
    pub model_class: String,
    /// Name or folder of the base model.
    pub model_name: String,
    /// `model_type` of the base model's configuration, such as `bert`.
    pub model_type: String,
}

/// An adapter out of AdapterHub's files.
#[derive(Debug, Clone)]
pub enum FromHub {
    /// Without PHM layers.
    Bottleneck(Bottleneck, Adapters<BottleneckAdapter>),
    /// With PHM layers.
    Compacter(Compacter, Adapters<CompacterAdapter>),
}

/// Modules of AdapterHub's that stand beside a sublayer and not in it, and where that one is here.
const BESIDE: [(&str, &str); 2] =
    [(".attention_adapters", ".self_attn"), (".output_adapters", ".mlp")];

fn from_hub_path(path: &str) -> String {
    let beside =
        BESIDE.iter().find_map(|(hub, ours)| Some(format!("{}{ours}", path.strip_suffix(hub)?)));
    beside.unwrap_or_else(|| path.to_owned())
}

fn to_hub_path(path: &str) -> String {
    let beside =
        BESIDE.iter().find_map(|(hub, ours)| Some(format!("{}{hub}", path.strip_suffix(ours)?)));
    beside.unwrap_or_else(|| path.to_owned())
}

/// Whether the place is after attention, and not after a feed-forward part.
fn is_attention(path: &str) -> bool {
    path.ends_with(".self_attn") || path.ends_with(".attention.output")
}

/// The first layer of AdapterHub's `adapter_down` is the matrix, the second `f`.
const HUB_DOWN: &str = "adapter_down.0.";
const OUR_DOWN: &str = "adapter_down.";

/// The name of what all places share, among names that begin with paths.
const SHARED: &str = "shared";

/// Reads an adapter that AdapterHub's `adapters` wrote with `use_safetensors`, for a model with these sites. The head, which
/// lies in a file of its own, is not read.
///
/// # Errors
/// A missing or malformed file, options that change the result and are not implemented, a place that the model does
/// not have, a tensor that is missing, superfluous or does not fit.
pub fn load_from_hub(folder: &Path, sites: &Sites, device: &Device) -> Result<FromHub, Error> {
    let path = folder.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let json: Json = serde_json::from_str(&text)
        .map_err(|e| Error::format(&path, format!("is not JSON: {e}")))?;
    let (Some(Json::Object(fields)), Some(name)) =
        (json.get("config"), json.get("name").and_then(Json::as_str))
    else {
        let reason = "expected AdapterHub's `config` and `name`; is this an adapter of HF PEFT's?";
        return Err(Error::format(path, reason));
    };
    let phm = fields.get("phm_layer") == Some(&Json::Bool(true));
    let more = neutral_to_compacter();
    let checked = neutral().into_iter().chain(more.into_iter().filter(|_| phm));
    for (field, expected) in checked {
        if let Some(found) = fields.get(field)
            && *found != expected
        {
            let reason =
                format!("{field}: expected {expected}, found {found}, which is not implemented");
            return Err(Error::format(path, reason));
        }
    }
    let tensors = folder.join(TENSORS);
    let mut file = TensorFile::open(&tensors)?;
    let mark = format!(".adapters.{name}.");
    let shared = format!(".shared_parameters.{name}.");
    let mut places = Vec::new();
    file.rename(|hub| match (hub.split_once(&mark), hub.split_once(&shared)) {
        (Some((place, rest)), _) => {
            let place = from_hub_path(place);
            let ours = format!("{place}.{}", rest.replacen(HUB_DOWN, OUR_DOWN, 1));
            places.push(place);
            ours
        }
        (_, Some((_, rest))) => format!("{SHARED}.{rest}"),
        _ => hub.to_owned(),
    });
    places.sort();
    places.dedup();
    let mut found = Read { path: &path, fields, places, file, sites, device };
    Ok(match phm {
        false => {
            let (method, adapters) = found.method::<Bottleneck>()?;
            FromHub::Bottleneck(method, adapters)
        }
        true => {
            let (method, adapters) = found.method::<Compacter>()?;
            FromHub::Compacter(method, adapters)
        }
    })
}

struct Read<'a> {
    path: &'a Path,
    fields: &'a Map<String, Json>,
    places: Vec<String>,
    file: TensorFile,
    sites: &'a Sites,
    device: &'a Device,
}

impl Read<'_> {
    fn method<T: HubMethod>(&mut self) -> Result<(T, Adapters<T::Adapter>), Error> {
        let mut method: T =
            serde_json::from_value(Json::Object(self.fields.clone())).map_err(|e| {
                Error::format(self.path, format!("is not a {} configuration: {e}", T::NAME))
            })?;
        let target_modules: Option<Names> = Some(self.places.iter().cloned().collect());
        *method.targets_mut() = Targets { target_modules, ..Targets::default() };
        method.check()?;
        let mut chosen: Vec<&Site> = Vec::new();
        for place in &self.places {
            let site = self.sites.get(place).filter(|site| T::KINDS.contains(&site.kind));
            let known = self.sites.all.iter().filter(|site| T::KINDS.contains(&site.kind));
            let near = known.map(|site| site.path.as_str());
            chosen
                .push(site.ok_or_else(|| Error::no_match("adapter", place, "hidden state", near))?);
        }
        let mut shared = PlaceTensors::new(&mut self.file, SHARED);
        let shared = method.restore_shared(&chosen, &mut shared, self.device)?;
        let mut layers = Vec::with_capacity(chosen.len());
        for site in chosen {
            let mut place = PlaceTensors::new(&mut self.file, &site.path);
            layers
                .push((site.path.clone(), method.restore(site, &shared, &mut place, self.device)?));
        }
        match self.file.names().next() {
            None => Ok((method, Adapters::new(layers, []))),
            Some(left) => Err(Error::tensor(
                left,
                "no such tensor for this model and configuration",
                format!("it in {}; is this the adapter's base model?", self.path.display()),
            )),
        }
    }
}

/// Writes an adapter as AdapterHub's `adapters` does with `use_safetensors`.
///
/// # Errors
/// What AdapterHub's files cannot hold: a norm before the adapter, layers that were trained whole; and what the operating
/// system says.
pub fn save_to_hub<T: HubMethod>(
    folder: &Path,
    about: &HubModel,
    method: &T,
    sites: &Sites,
    adapters: &Adapters<T::Adapter>,
) -> Result<(), Error> {
    let path = folder.join(CONFIG);
    if let Some((copied, _)) = adapters.copies().next() {
        let reason = "is trained whole, which AdapterHub's adapters hold in a head of their own; not implemented";
        return Err(Error::place(copied, reason));
    }
    let own = serde_json::to_value(method)
        .map_err(|e| Error::format(&path, format!("cannot be written: {e}")))?;
    let mut config = defaults();
    for (field, value) in own.as_object().into_iter().flatten() {
        if let Some(known) = config.get_mut(field) {
            *known = value.clone();
        }
    }
    if config.get("ln_before") == Some(&Json::Bool(true)) {
        let reason = "AdapterHub stores the norm twice, which its safetensors files cannot hold";
        return Err(Error::config("ln_before", reason));
    }
    config.insert("phm_layer".into(), json!(T::PHM));
    let (mut hidden, mut blocks) = (0, [false; 2]);
    let HubModel { name, model_class, model_name, model_type } = about;
    let mut tensors: Vec<(String, TensorData)> = Vec::new();
    let mut prefix = None;
    for (place, adapter) in adapters.iter() {
        let Some(site) = sites.get(place) else {
            let near = sites.all.iter().map(|site| site.path.as_str());
            return Err(Error::no_match("adapter", place, "hidden state", near));
        };
        hidden = site.fan_out();
        blocks[usize::from(is_attention(place))] = true;
        prefix = prefix.or(place.split_once('.').map(|(first, _)| first));
        let hub = to_hub_path(place);
        for (suffix, data) in method.tensors(site, adapter) {
            let suffix = suffix.replacen(OUR_DOWN, HUB_DOWN, 1);
            tensors.push((format!("{hub}.adapters.{name}.{suffix}"), data));
        }
    }
    let all: Vec<&T::Adapter> = adapters.iter().map(|(_, adapter)| adapter).collect();
    for (suffix, data) in method.shared_tensors(&all) {
        let prefix = prefix.unwrap_or_default();
        tensors.push((format!("{prefix}.shared_parameters.{name}.{suffix}"), data));
    }
    config.insert("mh_adapter".into(), json!(blocks[1]));
    config.insert("output_adapter".into(), json!(blocks[0]));
    let json = json!({
        "config": config, "hidden_size": hidden, "model_class": model_class, "model_name": model_name,
        "model_type": model_type, "name": name, "version": "adapters.1.3.0",
    });
    let mut json = serde_json::to_vec_pretty(&json)
        .map_err(|e| Error::format(&path, format!("cannot be written: {e}")))?;
    json.push(b'\n');
    let file = folder.join(TENSORS);
    let bytes = tensor_bytes(&file, tensors.iter().map(|(name, data)| (name.clone(), data)))?;
    write_together(&[(file, &bytes), (path, &json)])
}
