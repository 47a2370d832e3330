//! What was asked for: flags over the file of `--config`, and the method's configuration out of both.

use crate::args::TrainArgs;
use crate::failure::Failure;
use burn_peft::core::{Method, Names, OneOrMany};
use burn_peft::models::Precision;
use burn_peft::train::data::{TextUnit, data_files};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Parts of the arguments that say nothing about the numbers a run comes to.
const NOT_THE_RUN: &[&str] = &["output_dir"];

/// Lays flags over the file of `--config`.
pub(crate) fn merged(args: TrainArgs) -> Result<(TrainArgs, Map<String, Value>), Failure> {
    let file = match &args.config {
        None => TrainArgs::default(),
        Some(path) => {
            let said = |e: String| Failure::new(format!("{}: {e}", path.display()));
            let text = std::fs::read_to_string(path).map_err(|e| said(e.to_string()))?;
            toml::from_str(&text).map_err(|e| {
                let start = e.span().map_or(0, |span| span.start);
                let line = text[..start].matches('\n').count() + 1;
                said(format!("line {line}: {}", e.message().replace('\n', ", ")))
            })?
        }
    };
    let object = |args: &TrainArgs| match serde_json::to_value(args) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Ok(Map::new()),
        // A path that is no UTF-8.
        Err(e) => Err(Failure::new(format!("options: {e}"))),
    };
    let mut fields = object(&file)?;
    let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    fields.extend(object(&args)?.into_iter().filter(|(_, value)| !empty(value)));
    let (resume, overwrite) = (args.resume, args.overwrite);
    let all: TrainArgs = serde_json::from_value(Value::Object(fields.clone()))
        .map_err(|e| Failure::new(format!("options: {e}")))?;
    fields.retain(|_, value| !empty(value));
    Ok((TrainArgs { resume, overwrite, ..all }, fields))
}

/// The fields that a struct has, taken out of all arguments.
pub(crate) fn part<T: Serialize + DeserializeOwned>(
    whole: &T,
    fields: &Map<String, Value>,
    what: &str,
) -> Result<T, Failure> {
    let Ok(Value::Object(own)) = serde_json::to_value(whole) else {
        return Err(Failure::new(format!("{what}: cannot be read")));
    };
    let given = fields.iter().filter(|(name, _)| own.contains_key(*name));
    let given = given.map(|(name, value)| (name.clone(), value.clone())).collect();
    read(&own, &given, what)
}

/// A struct out of `start` with `given` laid over it; an error names the field.
fn read<T: DeserializeOwned>(
    start: &Map<String, Value>,
    given: &Map<String, Value>,
    what: &str,
) -> Result<T, Failure> {
    let mut whole = start.clone();
    whole.extend(given.clone());
    serde_json::from_value(Value::Object(whole)).map_err(|error| {
        let alone = |(name, value): (&String, &Value)| {
            let mut one = start.clone();
            one.insert(name.clone(), value.clone());
            let error = serde_json::from_value::<T>(Value::Object(one)).err()?;
            Some(format!("{what}: {name}: {error}"))
        };
        Failure::new(given.iter().find_map(alone).unwrap_or(format!("{what}: {error}")))
    })
}

pub(crate) fn need<'a>(value: &'a Option<PathBuf>, flag: &str) -> Result<&'a Path, Failure> {
    value
        .as_deref()
        .ok_or_else(|| Failure::new(format!("--{flag} is not set; see burn-peft train --help")))
}

/// Names as a user writes them: a list with commas, "all-linear", or a regular expression.
fn names(text: &str) -> Names {
    if text.chars().any(|c| "*+?()[]|^$\\".contains(c)) || text.eq_ignore_ascii_case("all-linear") {
        Names::Pattern(text.to_owned())
    } else {
        text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect()
    }
}

/// The method's configuration out of the arguments, in the words of `adapter_config.json`.
fn method_fields(
    args: &TrainArgs,
    all: &Map<String, Value>,
) -> Result<Map<String, Value>, Failure> {
    let mut fields = Map::new();
    for name in ["r", "lora_alpha", "lora_dropout", "bias", "use_rslora"] {
        if let Some(value) = all.get(name) {
            fields.insert(name.into(), value.clone());
        }
    }
    if let Some(init) = &args.init_lora_weights {
        let value = match init.as_str() {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            name => Value::String(name.into()),
        };
        fields.insert("init_lora_weights".into(), value);
    }
    for option in &args.method_option {
        let Some((name, value)) = option.split_once('=') else {
            return Err(Failure::new(format!("--method-option {option}: expected NAME=JSON")));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
        fields.insert(name.into(), value);
    }
    Ok(fields)
}

/// A method out of its fields, and all that it has.
fn of_fields<T: Method>(fields: &Map<String, Value>, what: &str) -> Result<(T, Value), Failure> {
    let method: T = read(&Map::new(), fields, what)?;
    // A field that the method does not have would be lost silently.
    let known = serde_json::to_value(&method).map_err(|e| Failure::new(format!("{what}: {e}")))?;
    match fields.keys().find(|field| known.get(field.as_str()).is_none()) {
        None => Ok((method, known)),
        Some(unknown) => Err(Failure::new(format!("{what}: has no option `{unknown}`"))),
    }
}

/// A method of `--also`.
pub(crate) fn further<T: Method>(fields: &Map<String, Value>) -> Result<T, Failure> {
    let mut fields = fields.clone();
    fields.shift_remove("peft_type");
    Ok(of_fields(&fields, &format!("--also {}", T::NAME.to_lowercase()))?.0)
}

/// The method that was asked for, with `saved` among the layers that are trained whole.
pub(crate) fn configure<T: Method>(
    args: &TrainArgs,
    fields: &Map<String, Value>,
    saved: &[String],
) -> Result<T, Failure> {
    let fields = method_fields(args, fields)?;
    let what = format!("--method {}", T::NAME.to_lowercase());
    let (mut method, known) = of_fields::<T>(&fields, &what)?;
    // Nor would names for a method that has but one place to go.
    let given = [
        ("target_modules", args.target_modules.is_some()),
        ("exclude_modules", args.exclude_modules.is_some()),
        ("layers_to_transform", args.layers_to_transform.is_some()),
    ];
    let unknown = given.iter().find(|(field, given)| *given && known.get(*field).is_none());
    if let Some((field, _)) = unknown {
        return Err(Failure::new(format!("{what}: has no option `{field}`")));
    }
    let targets = method.targets_mut();
    if let Some(text) = &args.target_modules {
        targets.target_modules = Some(names(text));
    }
    if let Some(text) = &args.exclude_modules {
        targets.exclude_modules = Some(names(text));
    }
    if let Some(blocks) = &args.layers_to_transform {
        targets.layers_to_transform = Some(OneOrMany::Many(blocks.clone()));
    }
    let mut whole =
        args.modules_to_save.clone().or(targets.modules_to_save.clone()).unwrap_or_default();
    // What answers in the head's place has no use for it, nor for what lies under it.
    for name in saved.iter().filter(|_| !T::ANSWERS) {
        if !whole.iter().any(|known| name == known || name.ends_with(&format!(".{known}"))) {
            whole.push(name.clone());
        }
    }
    targets.modules_to_save = (!whole.is_empty()).then_some(whole);
    Ok(method)
}

/// A short name of everything that shapes a run's numbers: FNV-1a over its arguments and data.
pub(crate) fn fingerprint(
    args: &TrainArgs,
    fields: &Map<String, Value>,
    steps: usize,
) -> Result<String, Failure> {
    let mut fields = fields.clone();
    for name in NOT_THE_RUN {
        fields.remove(*name);
    }
    fields.sort_keys();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |bytes: &[u8]| {
        hash = bytes
            .iter()
            .fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    };
    take(format!("{} {steps}", Value::Object(fields)).as_bytes());
    for path in [&args.train_file, &args.validation_file].into_iter().flatten() {
        let files = data_files(path)?;
        // In a folder, names are labels.
        if path.is_dir() {
            let names = files.iter().filter_map(|file| file.strip_prefix(path).ok());
            take(names.map(|name| format!("{}\n", name.display())).collect::<String>().as_bytes());
        }
        for file in files {
            let read = std::fs::read(&file);
            take(&read.map_err(|e| Failure::new(format!("{}: {e}", file.display())))?);
        }
    }
    Ok(format!("{hash:016x}"))
}

/// What a document of a plain text is.
pub(crate) fn text_unit(name: Option<&str>) -> Result<TextUnit, Failure> {
    match name {
        None | Some("paragraph") => Ok(TextUnit::Paragraph),
        Some("line") => Ok(TextUnit::Line),
        Some("file") => Ok(TextUnit::File),
        Some(other) => Err(Failure::new(format!(
            "--text-unit: expected line, paragraph or file, found {other}"
        ))),
    }
}

/// In which type the matrices of the base are held, in the words of `from_pretrained(dtype=..)`.
pub(crate) fn precision(dtype: &str) -> Result<Precision, Failure> {
    match dtype {
        "float32" => Ok(Precision::F32),
        "bfloat16" => Ok(Precision::Bf16),
        "float16" => Ok(Precision::F16),
        other => Err(Failure::new(format!(
            "--dtype: expected float32, bfloat16 or float16, found {other}"
        ))),
    }
}
