//! What was asked for: plain data in HF PEFT's words, which checks itself and builds adapters.

use crate::{
    Adapter, Adapters, AnyAdapter, Beside, Error, Finding, Fold, Kind, PlaceTensors, Policy,
    Product, Site, Sites, Statistic, Strictness, Targets,
};
use burn::module::{Module, ModuleDisplay};
use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// Which biases are trained beside the adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Biases {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted layers.
    Adapted,
}

/// A method of fine-tuning: its configuration and how its adapters are built, named and stored.
///
/// Plain data with HF PEFT's field names; [`Method::init`] checks everything and returns the
/// adapter, and nothing reads the configuration after that.
pub trait Method: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// What is trained at one place.
    type Adapter: Adapter + Module + ModuleDisplay + Sync + 'static;

    /// What the places of one model share: constant matrices, or a trained parameter of which each
    /// adapter holds a handle (a clone of one [`Param`](burn::module::Param), id and all). `()` for
    /// most methods.
    type Shared: Clone + Debug + Default;

    /// `peft_type` in `adapter_config.json`.
    const NAME: &'static str;

    /// The kinds of places that it can be laid over.
    const KINDS: &'static [Kind];

    /// Fields of HF PEFT's configuration that change the result and are not implemented, each with
    /// the JSON values (besides null, false and empty) that change nothing.
    const ABSENT: &'static [(&'static str, &'static [&'static str])];

    /// Whether its files are HF PEFT's; a method that HF PEFT does not have writes the same layout.
    const HF_FORMAT: bool = true;

    /// What stands in its file before the names of what all places share, and before the paths of places.
    const PREFIXES: [&'static str; 2] = ["base_model", "base_model.model"];

    /// Names of the parameters that begin at zero and bring the method's effect to life: LoRA+
    /// (arXiv 2402.12354) makes them learn faster.
    const FASTER: &'static [&'static str] = &[];

    /// Names of the two trained parameters `A [fan_in, r]` and `B [r, fan_out]` by whose product alone
    /// they act, where the method has such: what [`Guide::riemannian`](crate::Guide::riemannian) needs.
    const PAIR: Option<[&'static str; 2]> = None;

    /// Whether it answers in place of a classifier's head, of which nothing is read, trained or stored then.
    const ANSWERS: bool = false;

    /// Where it goes.
    fn targets(&self) -> &Targets;

    /// Where it goes, to be changed.
    fn targets_mut(&mut self) -> &mut Targets;

    /// The places that it goes to, in the model's order: those that its [targets](Method::targets)
    /// name, unless a method has but one place to go.
    ///
    /// # Errors
    /// As [`Targets::select`]; or a model without the place that it needs.
    fn places<'s>(&self, sites: &'s Sites, strictness: Strictness) -> Result<Vec<&'s Site>, Error> {
        self.targets().select(sites, Self::KINDS, strictness)
    }

    /// Which biases are trained beside it.
    fn biases(&self) -> Biases {
        Biases::None
    }

    /// Refuses what cannot work on any model: ranks of zero, options that are not implemented.
    ///
    /// # Errors
    /// [`Error::Config`] with the field's name.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Whether a fresh adapter changes nothing: `δ = 0` until the first step.
    fn starts_as_identity(&self) -> bool {
        true
    }

    /// Whether the effect on an activation is computed through the dense difference of the weight,
    /// because nothing cheaper is known ([`composed`](crate::composed)).
    fn weight_only(&self) -> bool {
        false
    }

    /// Whether the seed decides anything: not where all that is trained begins at constants or follows
    /// from the base model.
    fn draws(&self) -> bool {
        true
    }

    /// The configuration that is written with the adapters, where it is another than the one that made
    /// them: what lies in a file must mean the same on the untouched base, whoever reads it.
    fn portable(&self) -> Self {
        self.clone()
    }

    /// What must be known of the data before adapters can be built: a [`survey`](crate::survey()) finds it.
    fn wants(&self) -> Option<Statistic> {
        None
    }

    /// What lies over a place while the data are seen, for [`Statistic::Trial`].
    ///
    /// # Errors
    /// A place that cannot carry it; a method that has none.
    fn trial(&self, site: &Site, device: &Device) -> Result<AnyAdapter, Error> {
        let _ = device;
        Err(Error::place(&site.path, format!("{} has no adapter to try there", Self::NAME)))
    }

    /// Told what was found at one of the places; what is needed of it is kept in the configuration, and
    /// never written.
    ///
    /// # Errors
    /// Data that do not give what the place needs.
    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        let _ = (site, finding);
        Ok(())
    }

    /// The configuration after [`Method::learn`] was told of all places among `sites`, the chosen ones,
    /// that the statistic is about: ranks and places may follow from the data.
    ///
    /// # Errors
    /// Data that do not give what the places need together.
    fn surveyed(self, sites: &[&Site]) -> Result<Self, Error> {
        let _ = sites;
        Ok(self)
    }

    /// A text of which it must know the tokens before adapters can be built, and the folder of the tokenizer
    /// where it names one, which is the model's if not.
    fn text(&self) -> Option<(&str, Option<&str>)> {
        None
    }

    /// Told the tokens of [`Method::text`], by the tokenizer in the folder `tokenizer`.
    fn tokenized(self, ids: &[u32], tokenizer: &str) -> Self {
        let _ = (ids, tokenizer);
        self
    }

    /// What all of `sites`, the adapted places, share. `rng` depends on the seed alone.
    ///
    /// # Errors
    /// [`Error::Config`] where the places do not fit together.
    fn share(
        &self,
        sites: &[&Site],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let _ = (sites, rng, device);
        Ok(Self::Shared::default())
    }

    /// The adapter for one place, trainable on `device`. `rng` depends on the seed and the path
    /// alone, so that the numbers are the same on every device.
    ///
    /// # Errors
    /// [`Error::Place`] or [`Error::Config`] where the place cannot carry it.
    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Adapter, Error>;

    /// Told how many optimizer steps the training will have, where a schedule needs that.
    fn planned(self, steps: usize) -> Self {
        let _ = steps;
        self
    }

    /// Whether [`Method::penalty`] adds anything.
    fn has_penalty(&self) -> bool {
        false
    }

    /// A term of the loss that depends on the adapters alone, `[1]`.
    fn penalty(&self, adapters: &Adapters<Self::Adapter>) -> Option<Tensor<1>> {
        let _ = adapters;
        None
    }

    /// What the method adds to the loss of one batch in training, where it needs the model for that.
    fn beside(&self, adapters: &Adapters<Self::Adapter>) -> Option<Box<dyn Beside>> {
        let _ = adapters;
        None
    }

    /// What the method does between the steps of a training of `adapters`.
    ///
    /// # Errors
    /// A configuration that it cannot work with.
    fn policy(
        &self,
        adapters: &Adapters<Self::Adapter>,
    ) -> Result<Option<Box<dyn Policy<Self::Adapter>>>, Error> {
        let _ = adapters;
        Ok(None)
    }

    /// The configuration that belongs to adapters whose training has ended: what the training
    /// decided, the adapters being the same function under it.
    fn finished(self, adapters: &Adapters<Self::Adapter>) -> Self {
        let _ = adapters;
        self
    }

    /// The adapter's face on parameters, where the method has one: what merging needs when the
    /// method is only known at run time.
    fn fold(adapter: &Self::Adapter) -> Option<&dyn Fold> {
        let _ = adapter;
        None
    }

    /// The factors of an adapter whose difference is `s·A·B` and nothing more, both of them trained.
    fn product(adapter: &Self::Adapter) -> Option<Product> {
        let _ = adapter;
        None
    }

    /// Configurations over which the shared laws run: every option of the method at least once.
    fn samples(targets: &Targets) -> Vec<Self>;

    /// Number of trained parameters at `site` by the paper's formula, without shared ones; a law
    /// compares it with what [`Method::init`] makes.
    fn parameters(&self, site: &Site) -> usize;

    /// Number of trained parameters that all of `sites` share.
    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        let _ = sites;
        0
    }

    /// The adapter's tensors by the names they have in HF PEFT's file after the place's path, in
    /// HF's layout.
    fn tensors(&self, site: &Site, adapter: &Self::Adapter) -> Vec<(&'static str, TensorData)>;

    /// The inverse of [`Method::tensors`]: takes the place's tensors out of `file`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or has another shape or type than the place asks for.
    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Adapter, Error>;

    /// What the places share, out of their adapters, by the names that it has in HF PEFT's file after
    /// `base_model.`.
    fn shared_tensors(&self, adapters: &[&Self::Adapter]) -> Vec<(String, TensorData)> {
        let _ = adapters;
        Vec::new()
    }

    /// The inverse of [`Method::shared_tensors`], before any place is restored. Where the file leaves
    /// something out that HF PEFT draws again from a seed, this draws the same numbers or refuses.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or does not fit the places; [`Error::Config`] where it
    /// cannot be drawn.
    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let _ = (sites, file, device);
        Ok(Self::Shared::default())
    }
}

/// The generator for one place: the same for the same seed and path, whatever else is adapted.
pub fn site_rng(seed: u64, path: &str) -> ChaCha8Rng {
    // FNV-1a: a fixed, portable hash, which std's hashers are not.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in path.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    ChaCha8Rng::seed_from_u64(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
