//! The one list of methods. What works on any method is a [`Job`], so that no code names one.

use burn::tensor::Device;
use burn_peft_core::{
    AdapterConfig, Adapters, Error, Folded, Folds, Laid, Method, Overlay, Product, Sites, Summary,
    adapter_folders, load, peft_type,
};
use std::path::Path;

/// Something to do with a method that is known only at run time.
pub trait Job {
    /// What comes out.
    type Output;

    /// Does it with `T`.
    fn run<T: Method>(self) -> Self::Output;
}

/// Something to do with every method.
pub trait ForEach {
    /// Does it with `T`.
    fn visit<T: Method>(&mut self);
}

macro_rules! methods {
    ($($method:ty),+ $(,)?) => {
        /// `peft_type` of every method, in the order of the list.
        pub const NAMES: &[&str] = &[$(<$method as Method>::NAME),+];

        /// Does `job` with the method of that `peft_type`, in any case.
        ///
        /// # Errors
        /// A name that no method has; the message lists those there are.
        pub fn with_method<J: Job>(name: &str, job: J) -> Result<J::Output, Error> {
            $(if <$method as Method>::NAME.eq_ignore_ascii_case(name) {
                return Ok(job.run::<$method>());
            })+
            Err(Error::config(
                "peft_type",
                format!("`{name}` is not implemented; expected one of {}", NAMES.join(", ")),
            ))
        }

        /// Does something with every method.
        pub fn for_each_method(job: &mut impl ForEach) {
            $(job.visit::<$method>();)+
        }
    };
}

methods![
    burn_peft_reparam::Lora,
    burn_peft_reparam::AdaLora,
    burn_peft_reparam::AfLora,
    burn_peft_reparam::AutoLora,
    burn_peft_reparam::Boft,
    burn_peft_reparam::C3a,
    burn_peft_reparam::CapaBoost,
    burn_peft_reparam::Delora,
    burn_peft_reparam::DeltaLora,
    burn_peft_reparam::DyLora,
    burn_peft_reparam::FourierFt,
    burn_peft_reparam::Glora,
    burn_peft_reparam::Gralora,
    burn_peft_reparam::HiWi,
    burn_peft_reparam::Hira,
    burn_peft_reparam::Hra,
    burn_peft_reparam::IncreLora,
    burn_peft_reparam::KAdaptation,
    burn_peft_reparam::KronA,
    burn_peft_reparam::Loha,
    burn_peft_reparam::Lokr,
    burn_peft_reparam::LoraDropout,
    burn_peft_reparam::LoraFa,
    burn_peft_reparam::LoraSp,
    burn_peft_reparam::Miss,
    burn_peft_reparam::MosLora,
    burn_peft_reparam::Nola,
    burn_peft_reparam::Oft,
    burn_peft_reparam::PeriodicLora,
    burn_peft_reparam::Psoft,
    burn_peft_reparam::Pvera,
    burn_peft_reparam::RandLora,
    burn_peft_reparam::Road,
    burn_peft_reparam::Said,
    burn_peft_reparam::Shira,
    burn_peft_reparam::Sora,
    burn_peft_reparam::SuperLora,
    burn_peft_reparam::TinyLora,
    burn_peft_reparam::VbLora,
    burn_peft_reparam::Vera,
    burn_peft_reparam::WaveFt,
    burn_peft_additive::APrompt,
    burn_peft_additive::AdapterDrop,
    burn_peft_additive::AdaptionPrompt,
    burn_peft_additive::Apt,
    burn_peft_additive::Beft,
    burn_peft_additive::Bottleneck,
    burn_peft_additive::Coda,
    burn_peft_additive::Compacter,
    burn_peft_additive::Convpass,
    burn_peft_additive::DePt,
    burn_peft_additive::Hadamard,
    burn_peft_additive::Ia3,
    burn_peft_additive::Idpg,
    burn_peft_additive::InfoPrompt,
    burn_peft_additive::Invertible,
    burn_peft_additive::LnTuning,
    burn_peft_additive::Lpt,
    burn_peft_additive::Mov,
    burn_peft_additive::MultiHeadAdapter,
    burn_peft_additive::PTuning,
    burn_peft_additive::Pasta,
    burn_peft_additive::PrefixPropagation,
    burn_peft_additive::PrefixTuning,
    burn_peft_additive::PromptTuning,
    burn_peft_additive::Ptp,
    burn_peft_additive::Reft,
    burn_peft_additive::RepAdapter,
    burn_peft_additive::SelectivePromptTuning,
    burn_peft_additive::Smop,
    burn_peft_additive::SparseAdapter,
    burn_peft_additive::Ssf,
    burn_peft_additive::TinyAttention,
    burn_peft_additive::TrainableTokens,
    burn_peft_additive::Vpt,
    burn_peft_additive::Warp,
    burn_peft_additive::XPrompt,
    burn_peft_selective::BiasPruning,
    burn_peft_selective::BitFit,
    burn_peft_selective::ChildTuning,
    burn_peft_selective::CrossAttention,
    burn_peft_selective::DiffPruning,
    burn_peft_selective::Far,
    burn_peft_selective::FishDip,
    burn_peft_selective::FishMask,
    burn_peft_selective::LtSft,
    burn_peft_selective::PaFi,
    burn_peft_selective::Sam,
    burn_peft_selective::Spt,
    burn_peft_selective::ThresholdMask,
];

/// Adapters whose method is known at run time only.
pub trait AnyAdapters: Overlay + Send + Sync {
    /// `peft_type`.
    fn name(&self) -> &'static str;
    /// HF PEFT's task type.
    fn task_type(&self) -> Option<&str>;
    /// As something to merge; `None` where the method does not fold into parameters.
    fn folds(&self) -> Option<Box<dyn Folds + '_>>;
    /// The adapters as plain products `s·A·B`, by path.
    ///
    /// # Errors
    /// The first place whose adapter is more than that, or another thing.
    fn products(&self) -> Result<Vec<(String, Product)>, Error>;
    /// What is adapted where.
    fn summary(&self, sites: &Sites) -> Summary;
}

struct Held<T: Method>(AdapterConfig<T>, Adapters<T::Adapter>);

impl<T: Method> Overlay for Held<T> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        self.1.at(path, laid);
    }

    fn by_token(&self) -> bool {
        self.1.by_token()
    }

    fn rows_alike(&self) -> bool {
        self.1.rows_alike()
    }
}

impl<T: Method> AnyAdapters for Held<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn task_type(&self) -> Option<&str> {
        self.0.task_type.as_deref()
    }

    fn folds(&self) -> Option<Box<dyn Folds + '_>> {
        Some(Box::new(Folded::<T>::new(&self.1)?))
    }

    fn products(&self) -> Result<Vec<(String, Product)>, Error> {
        let product = |(path, adapter): (&str, &T::Adapter)| match T::product(adapter) {
            Some(product) => Ok((path.to_owned(), product)),
            None => {
                let name = T::NAME;
                let reason = format!(
                    "expected an adapter that is two trained factors and nothing more, as plain LoRA \
                     is; found one of {name} that is not"
                );
                Err(Error::place(path, reason))
            }
        };
        self.1.iter().map(product).collect()
    }

    fn summary(&self, sites: &Sites) -> Summary {
        Summary::new(sites, &self.1)
    }
}

struct LoadJob<'a>(&'a Path, &'a Sites, &'a Device);

impl Job for LoadJob<'_> {
    type Output = Result<Box<dyn AnyAdapters>, Error>;

    fn run<T: Method>(self) -> Self::Output {
        let (config, adapters) = load::<T>(self.0, self.1, self.2)?;
        Ok(Box::new(Held::<T>(config, adapters)))
    }
}

/// Reads the adapter in `folder`, whatever its method, for a model with these sites.
///
/// # Errors
/// As [`load`], or a method that is not implemented.
pub fn load_any(
    folder: &Path,
    sites: &Sites,
    device: &Device,
) -> Result<Box<dyn AnyAdapters>, Error> {
    with_method(&peft_type(folder)?, LoadJob(folder, sites, device))?
}

/// Reads what [`save_together`](burn_peft_core::save_together) wrote, or the one adapter in `folder`, for a model
/// with these sites: an [`Overlay`] of all.
///
/// # Errors
/// As [`load_any`] and [`adapter_folders`].
pub fn load_all(
    folder: &Path,
    sites: &Sites,
    device: &Device,
) -> Result<Vec<Box<dyn AnyAdapters>>, Error> {
    adapter_folders(folder)?.iter().map(|folder| load_any(folder, sites, device)).collect()
}
