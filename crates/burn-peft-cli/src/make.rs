//! Adapters of the methods that were asked for: one, or several that are trained together.

use crate::args::TrainArgs;
use crate::failure::Failure;
use crate::model::Task;
use crate::options::{configure, further};
use burn::tensor::Device;
use burn_peft::core::{
    Adapter, AdapterConfig, Adapters, AnyAdapter, CONFIG_FILE, Guide, LIST_FILE, Method, Passes,
    Sites, Summary, Unwritten, adapt, adapter_files, save_together, survey, write_together,
};
use burn_peft::registry::{Job, with_method};
use burn_peft::train::Part;
use burn_peft::train::data::TextTokenizer;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Files of trained adapters in a folder, with those beside them.
type Files =
    dyn FnOnce(&Adapters<AnyAdapter>, &Path, &[(&str, Vec<u8>)]) -> Result<Vec<Unwritten>, Failure>;

/// What a method makes of what was asked for.
pub(crate) struct Made {
    pub(crate) name: &'static str,
    pub(crate) summary: Summary,
    pub(crate) part: Part,
    pub(crate) files: Box<Files>,
}

/// Tells a method the tokens of the text that it begins with, if it does.
fn tokenized<T: Method>(method: T, model: &Path) -> Result<T, Failure> {
    let Some((text, named)) = method.text() else { return Ok(method) };
    let folder = named.map_or_else(|| model.to_owned(), PathBuf::from);
    let ids = TextTokenizer::load(&folder)?.encode_whole(&[text], true)?.concat();
    Ok(method.tokenized(&ids, &folder.display().to_string()))
}

/// For which model and training adapters are made.
pub(crate) struct Make<'a> {
    pub(crate) args: &'a TrainArgs,
    pub(crate) fields: &'a Map<String, Value>,
    pub(crate) model: &'a Path,
    pub(crate) task: Task,
    pub(crate) seed: u64,
    pub(crate) device: &'a Device,
    /// Layers that must be trained whole.
    pub(crate) saved: &'a [String],
    pub(crate) sites: &'a Sites,
    /// How many the training will have.
    pub(crate) steps: usize,
    pub(crate) sample: &'a dyn Passes,
}

/// One of the methods: that of the arguments, or the one of `--also` at this place.
struct One<'a>(&'a Make<'a>, Option<usize>);

impl Job for One<'_> {
    type Output = Result<Made, Failure>;

    fn run<T: Method>(self) -> Self::Output {
        let Self(of, also) = self;
        let method: T = match also {
            None => configure(of.args, of.fields, of.saved)?,
            Some(at) => further(&of.args.also[at])?,
        };
        let method = tokenized(method, of.model)?;
        let method = survey(method.planned(of.steps), of.sites, of.sample)?;
        // Two of one method begin apart.
        let seed = of.seed.wrapping_add(also.map_or(0, |at| at as u64 + 1));
        let adapters = adapt(of.sites, &method, seed, &of.device.clone().autodiff())?;
        let guide = Guide::of(&method, &adapters)?;
        let guide = match of.args.riemannian_reg.filter(|_| also.is_none()) {
            Some(delta) => guide.riemannian(T::PAIR, &adapters, delta.into())?,
            None => guide,
        };
        let (guide, summary) = (guide.erased(), Summary::new(of.sites, &adapters));
        let part = Part { adapters: adapters.erased(), guide, faster: T::FASTER };
        let sites = of.sites.clone();
        let (task, model) = (of.task.task_type(), of.model.display().to_string());
        let files =
            move |adapters: &Adapters<AnyAdapter>, folder: &Path, beside: &[(&str, Vec<u8>)]| {
                let Some(adapters) = adapters.typed() else {
                    return Err(Failure::new("the training returned another method's adapters"));
                };
                let mut config = AdapterConfig::new(method.finished(&adapters));
                config.task_type = task.map(str::to_owned);
                config.base_model_name_or_path = Some(model);
                Ok(adapter_files(folder, &config, &sites, &adapters, beside)?)
            };
        Ok(Made { name: T::NAME, summary, part, files: Box::new(files) })
    }
}

impl Make<'_> {
    /// Adapters of every method that was asked for.
    pub(crate) fn all(&self) -> Result<Vec<Made>, Failure> {
        let name = self.args.method.as_deref().unwrap_or("lora");
        let mut made = vec![with_method(name, One(self, None))??];
        for (at, fields) in self.args.also.iter().enumerate() {
            let name = fields.get("peft_type").and_then(Value::as_str).ok_or_else(|| {
                Failure::new("--also: has no peft_type; expected one, such as \"BOTTLENECK\"")
            })?;
            made.push(with_method(name, One(self, Some(at)))??);
        }
        let masked = |one: &&Made| one.part.adapters.iter().any(|(_, a)| a.mask().is_some());
        if let (Some(answers), Some(output)) = (made.iter().find(masked), &self.sites.output)
            && let Some(other) = made.iter().find(|one| one.part.adapters.copy(output).is_some())
        {
            return Err(Failure::new(format!(
                "{output}: {} trains it, and {} answers in its place; give {} as --method, and the other by --also",
                other.name, answers.name, answers.name
            )));
        }
        for (at, one) in made.iter().enumerate() {
            for (path, _) in one.part.adapters.copies() {
                if let Some(other) =
                    made[..at].iter().find(|other| other.part.adapters.copy(path).is_some())
                {
                    return Err(Failure::new(format!(
                        "{path}: {} and {} both train it itself; name it in one of them only",
                        other.name, one.name
                    )));
                }
            }
        }
        Ok(made)
    }
}

/// Writes trained adapters: one into `out` itself, several each into a subfolder by its method's name.
pub(crate) fn save(
    out: &Path,
    made: Vec<(&'static str, Box<Files>)>,
    trained: &[Adapters<AnyAdapter>],
    labels: Option<(&str, Vec<u8>)>,
    summary: (&str, Vec<u8>),
) -> Result<(), Failure> {
    let (list, config) = (out.join(LIST_FILE), out.join(CONFIG_FILE));
    let alone = made.len() == 1;
    let mut names: Vec<String> = Vec::new();
    let mut all = Vec::new();
    for (at, ((name, files), adapters)) in made.into_iter().zip(trained).enumerate() {
        let name = name.to_lowercase();
        let same = names.iter().filter(|known| known.split('-').next() == Some(&name)).count();
        let name = if same == 0 { name } else { format!("{name}-{}", same + 1) };
        let folder = if alone { out.to_owned() } else { out.join(&name) };
        names.push(name);
        // The head is the first one's, and so are the names of its classes.
        let mut beside: Vec<_> = labels.iter().filter(|_| at == 0).cloned().collect();
        beside.extend(alone.then(|| summary.clone()));
        all.extend(files(adapters, &folder, &beside)?);
    }
    let stale = match alone {
        true => {
            let files: Vec<(PathBuf, &[u8])> =
                all.iter().map(|(path, bytes)| (path.clone(), bytes.as_slice())).collect();
            write_together(&files)?;
            list
        }
        false => {
            let (name, bytes) = summary;
            all.push((out.join(name), bytes));
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            save_together(out, &names, &all)?;
            config
        }
    };
    // What --overwrite replaced.
    match std::fs::remove_file(&stale) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("{}: {e}", stale.display())))
        }
        _ => Ok(()),
    }
}
