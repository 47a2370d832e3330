//! Methods that are a criterion and nothing more: it chooses the numbers, once, and these are trained.

use crate::mask::{Chosen, Mask};
use crate::parameter::Parameter;
use crate::selected::SelectedAdapter;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Error, Finding, Fold, Kind, Method, Part, PlaceTensors, Policy, Site, Slope,
    Statistic, Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;

/// A rule by which the numbers are chosen that are trained.
pub trait Criterion:
    Clone + Debug + Default + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// `peft_type` in `adapter_config.json`.
    const NAME: &'static str;

    /// The share of the numbers that is chosen by default.
    const KEEP_RATIO: f64;

    /// The kinds of places that it chooses from.
    const KINDS: &'static [Kind] =
        &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d, Kind::Norm];

    /// Which parameters of a place it chooses from.
    const PART: Part = Part::Whole;

    /// Refuses what cannot work on any model.
    ///
    /// # Errors
    /// [`Error::Config`] with the field's name.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What must be known of the data; nothing where the weights decide, and then of each place alone.
    fn wants(&self) -> Option<Statistic> {
        None
    }

    /// Scores of a parameter's numbers `base [n]`, the higher the sooner chosen; `slope` is what was found of
    /// them in the data. `None` where that does not suffice.
    fn score(&self, base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>>;

    /// Chooses about `keep_ratio` of all scored numbers: by default the highest, wherever they stand.
    fn choose(&self, scored: &[Scored], keep_ratio: f64) -> Mask {
        highest(scored, share(scored, keep_ratio))
    }

    /// What happens between the steps of a training.
    fn policy(&self, keep_ratio: f64) -> Option<Box<dyn Policy<SelectedAdapter>>> {
        let _ = keep_ratio;
        None
    }

    /// Configurations for the laws, with a share each; the last must be the default.
    fn samples() -> Vec<(Self, f64)> {
        vec![(Self::default(), 0.5)]
    }
}

/// One parameter with the scores of its numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Path of its place.
    pub path: String,
    /// What stands there.
    pub kind: Kind,
    /// Which of the place's parameters it is.
    pub parameter: Parameter,
    /// Its name in the Hugging Face checkpoint.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// The scores of its numbers, as the checkpoint lays them out.
    pub scores: Vec<f32>,
}

impl Scored {
    /// All of it.
    pub fn whole(&self) -> Option<(String, Chosen)> {
        Some((self.name.clone(), Chosen::all(self.shape.clone())?))
    }
}

/// `⌊keep_ratio·n⌋` of all numbers.
pub fn share(scored: &[Scored], keep_ratio: f64) -> usize {
    let all: usize = scored.iter().map(|parameter| parameter.scores.len()).sum();
    (keep_ratio * all as f64) as usize
}

/// The `count` numbers with the highest scores; of equals, the first.
pub fn highest(scored: &[Scored], count: usize) -> Mask {
    let mut all: Vec<f32> = scored.iter().flat_map(|one| one.scores.iter().copied()).collect();
    if count == 0 {
        return Mask::default();
    }
    let last = count.min(all.len()).saturating_sub(1);
    let least = match all.is_empty() {
        true => return Mask::default(),
        false => *all.select_nth_unstable_by(last, |a, b| b.total_cmp(a)).1,
    };
    let above = all.iter().filter(|score| score.total_cmp(&least).is_gt()).count();
    let mut equals = count.min(all.len()) - above;
    let mut kept = |score: &f32| match score.total_cmp(&least) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => {
            let left = equals > 0;
            equals -= usize::from(left);
            left
        }
    };
    let mut one = |parameter: &Scored| {
        let scores = (0_u32..).zip(&parameter.scores);
        let indices: Vec<u32> = scores.filter(|(_, s)| kept(s)).map(|(at, _)| at).collect();
        Some((parameter.name.clone(), Chosen::new(parameter.shape.clone(), indices)?))
    };
    scored.iter().filter_map(&mut one).collect()
}

/// A method whose criterion `C` chooses numbers of the model's parameters, which are then trained as
/// differences: `W' = W + Δ`, where `Δ` is zero but at the chosen numbers.
///
/// The mask is decided before the training and stays: nothing is held, trained or stored of what is not
/// chosen, and a merged model has changed at the chosen numbers alone, bit for bit. Weights act through the
/// dense difference ([`composed`](burn_peft_core::composed)). Candidates are the weights and biases of the
/// target places; norms are places too. Parameters: as many as are chosen. Folds.
///
/// The file holds of each parameter of which something is chosen `PARAMETER.values [n]`, its differences,
/// `PARAMETER.indices [n]` (I32), where they stand in the Hugging Face checkpoint's parameter, counted row by
/// row, and `PARAMETER.shape [axes]` (I32), with `weight` and `bias` for `PARAMETER`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, bound = "")]
pub struct Selective<C: Criterion> {
    /// The options of the criterion.
    #[serde(flatten)]
    pub criterion: C,
    /// Share of the candidates that is chosen, in (0, 1]; the default is the criterion's.
    pub keep_ratio: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
    #[serde(skip)]
    found: Arc<Found>,
}

/// What is known before adapters are built.
#[derive(Debug, Clone, Default, PartialEq)]
struct Found {
    scored: Vec<Scored>,
    mask: Option<Mask>,
}

impl<C: Criterion> Default for Selective<C> {
    fn default() -> Self {
        Self {
            criterion: C::default(),
            keep_ratio: C::KEEP_RATIO,
            targets: Targets::default(),
            found: Arc::default(),
        }
    }
}

impl<C: Criterion> Selective<C> {
    /// With the criterion's defaults.
    pub fn new(keep_ratio: f64, targets: Targets) -> Self {
        Self { keep_ratio, targets, ..Self::default() }
    }

    /// With this mask in place of the criterion's choice: no data are asked for then.
    pub fn with_mask(self, mask: Mask) -> Self {
        Self { found: Arc::new(Found { scored: Vec::new(), mask: Some(mask) }), ..self }
    }

    /// The numbers that were chosen, once a [`survey`](burn_peft_core::survey()) has decided them.
    pub fn mask(&self) -> Option<&Mask> {
        self.found.mask.as_ref()
    }

    pub(crate) fn scored(
        &self,
        site: &Site,
        finding: Option<&Finding>,
    ) -> Result<Vec<Scored>, Error> {
        let slopes = match finding {
            Some(Finding::Slopes(slopes)) => Some(slopes),
            _ => None,
        };
        let mut scored = Vec::new();
        for parameter in Parameter::ALL {
            let looked_at = C::PART == Part::Whole || parameter == Parameter::Bias;
            let found = slopes.map(|slopes| match parameter {
                Parameter::Weight => slopes.weight.as_ref(),
                Parameter::Bias => slopes.bias.as_ref(),
            });
            let (Some(base), Some(shape), true) =
                (parameter.numbers(site), parameter.shape(site), looked_at)
            else {
                continue;
            };
            let Some(scores) = self.criterion.score(base, found.flatten()) else {
                return Err(Error::place(&site.path, "the data say nothing of its parameters"));
            };
            scored.push(Scored {
                path: site.path.clone(),
                kind: site.kind,
                parameter,
                name: parameter.name(site),
                shape,
                scores: parameter.in_checkpoint_order(site, scores),
            });
        }
        Ok(scored)
    }

    /// What is chosen at `site`: by the mask that there is, or by its weights alone.
    pub(crate) fn chosen(&self, site: &Site) -> Result<Mask, Error> {
        if let Some(mask) = &self.found.mask {
            let own = |parameter: Parameter| {
                let name = parameter.name(site);
                mask.get(&name).map(|chosen| (name, chosen.clone()))
            };
            return Ok(Parameter::ALL.into_iter().filter_map(own).collect());
        }
        if self.criterion.wants().is_some() {
            let reason = format!(
                "{} chooses by data, and none were looked at; call `survey` first, or give it a mask",
                C::NAME
            );
            return Err(Error::config("keep_ratio", reason));
        }
        Ok(self.criterion.choose(&self.scored(site, None)?, self.keep_ratio))
    }
}

/// The numbers that trained adapters stand for, as a mask for other trainings.
pub fn mask_of(adapters: &Adapters<SelectedAdapter>, sites: &burn_peft_core::Sites) -> Mask {
    let places = adapters.iter();
    let own = places.filter_map(|(path, adapter)| Some(adapter.chosen(sites.get(path)?)));
    own.flatten().collect()
}

impl<C: Criterion> Method for Selective<C> {
    type Adapter = SelectedAdapter;
    type Shared = ();
    const NAME: &'static str = C::NAME;
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = C::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        C::PART == Part::Whole
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        let ratio = self.keep_ratio;
        if !(ratio > 0.0 && ratio <= 1.0) {
            let reason = format!("expected a share above 0 and at most 1, found {ratio}");
            return Err(Error::config("keep_ratio", reason));
        }
        self.criterion.check()
    }

    fn wants(&self) -> Option<Statistic> {
        self.criterion.wants().filter(|_| self.found.mask.is_none())
    }

    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        let scored = self.scored(site, Some(&finding))?;
        Arc::make_mut(&mut self.found).scored.extend(scored);
        Ok(())
    }

    fn surveyed(mut self, _sites: &[&Site]) -> Result<Self, Error> {
        let found = Arc::make_mut(&mut self.found);
        let scored = std::mem::take(&mut found.scored);
        let mask = self.criterion.choose(&scored, self.keep_ratio);
        if mask.count() == 0 {
            let all: usize = scored.iter().map(|one| one.scores.len()).sum();
            let reason = format!("{} of {all} numbers is none; expected more", self.keep_ratio);
            return Err(Error::config("keep_ratio", reason));
        }
        found.mask = Some(mask);
        Ok(self)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SelectedAdapter, Error> {
        if C::PART == Part::Bias && site.bias.is_none() {
            return Err(Error::place(&site.path, "has no bias to choose from; expected one"));
        }
        SelectedAdapter::new(site, &self.chosen(site)?, device)
    }

    fn policy(
        &self,
        _adapters: &Adapters<SelectedAdapter>,
    ) -> Result<Option<Box<dyn Policy<SelectedAdapter>>>, Error> {
        Ok(self.criterion.policy(self.keep_ratio))
    }

    fn fold(adapter: &SelectedAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let one = |(criterion, keep_ratio)| Self {
            criterion,
            keep_ratio,
            targets: targets.clone(),
            found: Arc::default(),
        };
        C::samples().into_iter().map(one).collect()
    }

    fn parameters(&self, site: &Site) -> usize {
        self.chosen(site).map_or(0, |mask| mask.count())
    }

    fn tensors(&self, site: &Site, adapter: &SelectedAdapter) -> Vec<(&'static str, TensorData)> {
        adapter.tensors(site)
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SelectedAdapter, Error> {
        SelectedAdapter::restore(site, file, device)
    }
}
