//! A model of any task with adapters over it.

use crate::args::ModelArgs;
use crate::failure::Failure;
use crate::files::{head_rows, read_labels};
use crate::options::precision;
use burn::tensor::Device;
use burn_peft::core::{Overlay, Scope, Site, Sites, adapter_folders, peft_type};
pub(crate) use burn_peft::models::{
    BertForSequenceClassification as Bert, Dinov2ForImageClassification as Dinov2,
    ViTForImageClassification as Vit,
};
use burn_peft::models::{Classes, Classifier, LlamaForCausalLM, Loaded, Pretrained, model_type};
use burn_peft::registry::{AnyAdapters, load_any};
use std::path::{Path, PathBuf};

/// What a model is trained or asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// Of texts.
    Classification,
    /// Classification of images.
    Images(Vision),
    CausalLm,
}

/// The models of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vision {
    Vit,
    Dinov2,
}

impl Task {
    /// HF PEFT's name; it has none for images.
    pub(crate) fn task_type(self) -> Option<&'static str> {
        match self {
            Self::Classification => Some("SEQ_CLS"),
            Self::Images(_) => None,
            Self::CausalLm => Some("CAUSAL_LM"),
        }
    }

    /// The name by which a user asks for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Classification => "text-classification",
            Self::Images(_) => "image-classification",
            Self::CausalLm => "causal-lm",
        }
    }

    /// What was asked for, checked against what the model is.
    pub(crate) fn of(folder: &Path, asked: Option<&str>) -> Result<Self, Failure> {
        let found = model_type(folder)?;
        let own = match found.as_str() {
            Bert::MODEL_TYPE => Self::Classification,
            LlamaForCausalLM::MODEL_TYPE => Self::CausalLm,
            Vit::MODEL_TYPE => Self::Images(Vision::Vit),
            Dinov2::MODEL_TYPE => Self::Images(Vision::Dinov2),
            other => {
                let path = folder.join("config.json");
                return Err(Failure::new(format!(
                    "{}: model_type: expected bert, llama, vit or dinov2, found {other}",
                    path.display()
                )));
            }
        };
        let asked = match asked {
            None => own.name(),
            Some("text-classification" | "sequence-classification" | "SEQ_CLS") => {
                "text-classification"
            }
            Some("image-classification") => "image-classification",
            Some("causal-lm" | "text-generation" | "CAUSAL_LM") => "causal-lm",
            Some(other) => {
                return Err(Failure::new(format!(
                    "--task: expected text-classification, image-classification or causal-lm, found {other}"
                )));
            }
        };
        if asked != own.name() {
            return Err(Failure::new(format!(
                "--task {asked}: {} holds a {found} model, which is for {}",
                folder.display(),
                own.name()
            )));
        }
        Ok(own)
    }
}

/// A loaded model with its adapters.
pub(crate) struct Ready<M> {
    pub(crate) model: M,
    pub(crate) adapters: Vec<Box<dyn AnyAdapters>>,
    pub(crate) device: Device,
    /// Parameters drawn at random because nothing held them.
    pub(crate) fresh: Vec<String>,
    /// A parameter that the model lacks and several adapters bring, if there is one.
    contested: Option<String>,
}

impl<M> Ready<M> {
    pub(crate) fn overlay(&self) -> &dyn Overlay {
        &self.adapters
    }
}

impl ModelArgs {
    /// The folders of all adapters, those of one folder in the order of its list.
    pub(crate) fn folders(&self) -> Result<Vec<PathBuf>, Failure> {
        let each = self.adapter.iter().map(|folder| adapter_folders(folder));
        Ok(each.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

fn ready<M: Pretrained>(
    args: &ModelArgs,
    loaded: Loaded<M>,
    device: Device,
) -> Result<Ready<M>, Failure> {
    let sites = Sites::of(&loaded.model, Some(M::OUTPUT));
    let load = |folder: &PathBuf| load_any(folder, &sites, &device);
    let adapters = args.folders()?.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    // What an adapter brings along is not missing.
    let brought = |name: &String| {
        let place = name.rsplit_once('.').map_or(name.as_str(), |(place, _)| place);
        let laid = |a: &dyn AnyAdapters| {
            let mut laid = Vec::new();
            a.at(place, &mut laid);
            !laid.is_empty()
        };
        adapters.iter().filter(|a| laid(a.as_ref())).count()
    };
    let contested = loaded.fresh.iter().find(|name| brought(name) > 1).cloned();
    // Nor what is not read: all that may be missing is a classifier's head, and the class may be read at a mask.
    let masked = |site: &Site| !Scope::new(&adapters).at(&site.path).masks().is_empty();
    let answered = sites.all.iter().any(|site| site.mask.is_some() && masked(site));
    let missing = |name: &String| !answered && brought(name) == 0;
    let fresh: Vec<String> = loaded.fresh.into_iter().filter(missing).collect();
    Ok(Ready { model: loaded.model, adapters, device, fresh, contested })
}

impl<M: Pretrained> Ready<M> {
    /// Refuses to answer with weights that nobody trained, or with the sum of several adapters' own.
    pub(crate) fn refuse_fresh(&self, folder: &Path) -> Result<(), Failure> {
        if let Some(name) = &self.contested {
            return Err(Failure::new(format!(
                "{}: has no `{name}`, and more than one --adapter brings it; give one of them, or make \
                 one of them all by burn-peft combine",
                folder.display()
            )));
        }
        match self.fresh.first() {
            None => Ok(()),
            Some(name) => Err(Failure::new(format!(
                "{}: has no `{name}`, and no --adapter brings it; train one first, or give its folder",
                folder.display()
            ))),
        }
    }
}

/// Most tokens of a sequence for a causal model: what was asked for, or 512.
pub(crate) fn causal_length(asked: Option<usize>, positions: usize) -> Result<usize, Failure> {
    match asked.unwrap_or(512.min(positions)) {
        length if (2..=positions).contains(&length) => Ok(length),
        found => Err(Failure::new(format!(
            "--max-length: expected 2 to {positions}, the model's positions, found {found}"
        ))),
    }
}

/// A classifier with the head of its adapters, or of its checkpoint, the names of its classes, and what its
/// configuration says of them.
pub(crate) fn classifier<M: Classifier>(
    args: &ModelArgs,
) -> Result<(Ready<M>, Vec<String>, Classes), Failure> {
    let device = burn_peft::device::by_name(&args.device)?;
    let mut labels: Option<Vec<String>> = None;
    let mut rows = None;
    for folder in &args.folders()? {
        peft_type(folder)?;
        let theirs = read_labels(folder)?;
        if let (Some(one), Some(other)) = (&labels, &theirs)
            && one != other
        {
            return Err(Failure::new(format!(
                "{}: its classes are {}, those of an adapter before it {}",
                folder.display(),
                other.join(", "),
                one.join(", ")
            )));
        }
        labels = labels.or(theirs);
        rows = rows.or(head_rows(folder, M::OUTPUT)?);
    }
    let edit = |config: &mut M::Config| {
        let classes = M::classes_mut(config);
        if let Some(rows) = rows.filter(|rows| *rows != classes.count()) {
            classes.resize(rows);
        }
    };
    let loaded = M::load(&args.model, precision(&args.dtype)?, 0, &device, edit)?;
    let classes = M::classes(&loaded.config).clone();
    let own = classes.names();
    let labels = labels.filter(|names| names.len() == own.len()).unwrap_or(own);
    Ok((ready(args, loaded, device)?, labels, classes))
}

/// A causal language model with its adapters.
pub(crate) fn causal(args: &ModelArgs) -> Result<Ready<LlamaForCausalLM>, Failure> {
    let device = burn_peft::device::by_name(&args.device)?;
    let precision = precision(&args.dtype)?;
    let loaded = LlamaForCausalLM::load(&args.model, precision, 0, &device, |_| ())?;
    let ready = ready(args, loaded, device)?;
    ready.refuse_fresh(&args.model)?;
    Ok(ready)
}
