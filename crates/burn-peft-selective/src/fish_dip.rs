//! Fish-Dip: a Fisher mask that follows the hardest samples of the training (arXiv 2311.03748).

use crate::fish_dip_policy::Dips;
use crate::fish_mask::FishMask;
use crate::mask::{Chosen, Mask, chosen_of, index_data, shape_data};
use crate::parameter::Parameter;
use crate::selected::{Norm, conv1d, conv2d, fits, linear};
use crate::selective::{Scored, highest, share};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Buffer, Error, Finding, Fold, Kind, Method, PlaceTensors, Policy, Site,
    Statistic, Targets, composed,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Fish-Dip (arXiv 2311.03748, section 3): [`FishMask`] whose mask dips anew into the training. Trained are the
/// `k = ⌊keep_ratio·n⌋` numbers of all target places together with the largest
/// `F_i = (1/N)·Σ_n (∂L(x_n, y_n)/∂w_i)²` over the `N = top_examples` examples with the highest losses.
///
/// The first mask is of the batches of the survey (`--init-batches`) at the base model. After every `update_steps`-th
/// step it is chosen again by the model as it stands, of the examples of the last `update_steps` steps (the paper looks
/// at all of the training data). What a number has learnt stays when it is no longer chosen: `W' = W + S + Δ`, with
/// `S` what is settled and `Δ`, which begins anew at zero, what is trained.
///
/// Parameters: `k`, of all places together, in one tensor, and an optimizer's state is of these; it begins anew with
/// each mask (the trainer's keeps, unused, that of masks before, `2·k` numbers each). `S` is held as one number a
/// candidate in training, which nobody trains. The file holds of each parameter, as [`Selective`](crate::Selective)'s
/// does, the numbers that were ever moved. Adapters that were read train all of these, and their mask stays. Weights act
/// through the dense difference. Folds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct FishDip {
    /// `N`; default 128.
    pub top_examples: usize,
    /// How many steps a mask is trained; default 100.
    pub update_steps: usize,
    /// `keep_ratio`, 0.005 by default, and where it goes.
    #[serde(flatten)]
    pub fish_mask: FishMask,
    /// The target places, once a survey has shown them.
    #[serde(skip)]
    pub(crate) sites: Arc<Vec<Site>>,
}

impl Default for FishDip {
    fn default() -> Self {
        let (fish_mask, sites) = (FishMask::default(), Arc::default());
        Self { top_examples: 128, update_steps: 100, fish_mask, sites }
    }
}

/// The trained differences of all places, and which of them are this one's.
#[derive(Module, Debug)]
pub struct Picked {
    /// `Δ`, of all places together: `[k]`. All adapters hold the one parameter.
    pub values: Param<Tensor<1>>,
    /// Row and column of each in its weight as a matrix `[fan_in, fan_out]`, `[2, k]`; of a vector, 0 and where.
    pub places: Buffer<2>,
    /// First and number of this place's: of its weight's, and of its bias's. `[4]`.
    pub spans: Buffer<1>,
}

/// What Fish-Dip trains at one place.
#[derive(Module, Debug)]
pub struct FishDipAdapter {
    /// What is trained; adapters that were read and have nothing here go without.
    pub picked: Option<Picked>,
    /// `S` of the weight, its numbers in a row, `[n]`; adapters that were read have none.
    pub settled_weight: Option<Buffer<1>>,
    /// `S` of the bias.
    pub settled_bias: Option<Buffer<1>>,
    norm: Option<Norm>,
}

/// The most that `f32` counts one by one.
const COUNTED: usize = 1 << 24;

/// What is trained at all places, and which part of it is each one's.
#[derive(Debug, Clone)]
pub struct Pool {
    values: Param<Tensor<1>>,
    places: Buffer<2>,
    spans: BTreeMap<String, [usize; 4]>,
}

impl Pool {
    /// Zeros at what `mask` chooses of `sites`, trained on `device`.
    pub(crate) fn new(mask: &Mask, sites: &[&Site], device: &Device) -> Result<Self, Error> {
        let (mut rows, mut columns, mut spans) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut largest = 0;
        for site in sites {
            let mut span = [0; 4];
            for (at, parameter) in Parameter::ALL.into_iter().enumerate() {
                span[2 * at] = rows.len();
                let Some(chosen) = mask.get(&parameter.name(site)) else { continue };
                fits(site, parameter, chosen)?;
                let width = match (parameter, site.kind) {
                    (Parameter::Weight, kind) if kind != Kind::Norm => site.fan_out(),
                    _ => parameter.size(site),
                };
                for index in chosen.indices() {
                    let place = parameter.place(site, *index);
                    let (row, column) = (place / width, place % width);
                    largest = largest.max(row).max(column);
                    rows.push(row as f32);
                    columns.push(column as f32);
                }
                span[2 * at + 1] = chosen.indices().len();
            }
            spans.insert(site.path.clone(), span);
        }
        let count = rows.len();
        if count.max(largest) >= COUNTED {
            let reason = format!("chooses {count} numbers; expected fewer than 2^24");
            return Err(Error::config("keep_ratio", reason));
        }
        let places = TensorData::new([rows, columns].concat(), [2, count]);
        Ok(Self {
            values: Param::from_tensor(Tensor::zeros([count], device)),
            places: Buffer::new(Tensor::from_data(places, device)),
            spans,
        })
    }

    /// What the place at `path` holds of it.
    pub(crate) fn at(&self, path: &str) -> Picked {
        let spans = self.spans.get(path).copied().unwrap_or_default().map(|n| n as f32);
        let spans = Buffer::new(Tensor::from_floats(spans, &self.values.val().device()));
        Picked { values: self.values.clone(), places: self.places.clone(), spans }
    }
}

impl Picked {
    /// `Δ` and its places of a parameter whose matrix is so wide; `None` where nothing is chosen.
    fn of(&self, parameter: Parameter, width: usize) -> Option<(Tensor<1>, Tensor<1, Int>)> {
        // Where they are changes with the mask, so that no number on the host can say it.
        let spans: Vec<f32> = self.spans.val().into_data().iter::<f32>().collect();
        let at = if parameter == Parameter::Weight { 0 } else { 2 };
        let [first, count] = [at, at + 1].map(|at| spans.get(at).map_or(0, |n| *n as usize));
        if count == 0 {
            return None;
        }
        let [row, column] = [0, 1].map(|axis| {
            let places = self.places.val().narrow(0, axis, 1).narrow(1, first, count);
            places.reshape([count]).int()
        });
        Some((self.values.val().narrow(0, first, count), row * width as i64 + column))
    }
}

impl FishDipAdapter {
    /// `S + Δ` of a parameter of `size` numbers, whose matrix is `width` wide.
    pub(crate) fn delta(
        &self,
        parameter: Parameter,
        size: usize,
        width: usize,
    ) -> Option<Tensor<1>> {
        let settled = match parameter {
            Parameter::Weight => self.settled_weight.as_ref(),
            Parameter::Bias => self.settled_bias.as_ref(),
        };
        let settled = settled.map(Buffer::val);
        let Some((values, places)) = self.picked.as_ref().and_then(|p| p.of(parameter, width))
        else {
            return settled;
        };
        // Adding -0 leaves every number as it is, bit for bit.
        let nothing = || Tensor::full([size], -0.0, &places.device());
        let settled = settled.unwrap_or_else(nothing).cast(values.dtype());
        Some(settled.select_assign(0, places, values, IndexingUpdateOp::Add))
    }

    /// `S + Δ` of a parameter of `site`.
    pub(crate) fn delta_at(&self, parameter: Parameter, site: &Site) -> Option<Tensor<1>> {
        self.delta(parameter, parameter.size(site), site.fan_out())
    }

    /// The numbers that are trained at `site`, by the names of their parameters.
    pub fn chosen(&self, site: &Site) -> Vec<(String, Chosen)> {
        let one = |parameter: Parameter| {
            let (_, places) = self.picked.as_ref()?.of(parameter, site.fan_out())?;
            let indices = parameter.indices(site, &places);
            Some((parameter.name(site), Chosen::new(parameter.shape(site)?, indices)?))
        };
        Parameter::ALL.into_iter().filter_map(one).collect()
    }

    /// The numbers that are trained or were, in order, with `S + Δ` of each.
    fn moved(&self, parameter: Parameter, site: &Site) -> Option<(Vec<u32>, Vec<f32>)> {
        let all = parameter.in_checkpoint_order(site, self.delta_at(parameter, site)?);
        let name = parameter.name(site);
        let chosen = self.chosen(site).into_iter().find(|(of, _)| *of == name);
        let trained =
            |at: &u32| chosen.as_ref().is_some_and(|(_, c)| c.indices().binary_search(at).is_ok());
        let counted = (0_u32..).zip(all);
        let (indices, values): (Vec<u32>, Vec<f32>) =
            counted.filter(|(at, value)| *value != 0.0 || trained(at)).unzip();
        (!indices.is_empty()).then_some((indices, values))
    }
}

impl Adapter for FishDipAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        linear(self, layer, x, y)
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        _y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        composed::embedding(self, layer, ids)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        conv1d(self, layer, x, y)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        conv2d(self, layer, x, y)
    }

    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        self.norm.as_ref().map_or((None, None), |norm| norm.moved(self))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for FishDipAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let [rows, columns] = w.dims();
        let delta = self.delta(Parameter::Weight, rows * columns, columns)?;
        Some(delta.reshape([rows, columns]))
    }

    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        self.delta(Parameter::Weight, v.dims()[0], 0)
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        self.delta(Parameter::Bias, b.dims()[0], 0)
    }
}

impl FishDip {
    /// With a share of the numbers that is trained at a time.
    pub fn new(keep_ratio: f64, targets: Targets) -> Self {
        Self { fish_mask: FishMask::new(keep_ratio, targets), ..Self::default() }
    }

    /// The numbers with the largest scores.
    pub(crate) fn choose(&self, scored: &[Scored]) -> Mask {
        highest(scored, share(scored, self.fish_mask.keep_ratio))
    }

    /// What the survey chose at `sites`.
    fn first(&self, sites: &[&Site]) -> Result<Mask, Error> {
        let mut all = Mask::default();
        for site in sites {
            all = all.union(&self.fish_mask.chosen(site)?)?;
        }
        Ok(all)
    }
}

/// Names in the file, by parameter.
const NAMES: [(Parameter, [&str; 3]); 2] = [
    (Parameter::Weight, ["weight.values", "weight.indices", "weight.shape"]),
    (Parameter::Bias, ["bias.values", "bias.indices", "bias.shape"]),
];

impl Method for FishDip {
    type Adapter = FishDipAdapter;
    type Shared = Option<Pool>;
    const NAME: &'static str = "FISHDIP";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = FishMask::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        self.fish_mask.targets()
    }

    fn targets_mut(&mut self) -> &mut Targets {
        self.fish_mask.targets_mut()
    }

    fn check(&self) -> Result<(), Error> {
        for (field, size) in
            [("top_examples", self.top_examples), ("update_steps", self.update_steps)]
        {
            if size == 0 {
                return Err(Error::config(field, "expected 1 or more, found 0"));
            }
        }
        self.fish_mask.check()
    }

    fn wants(&self) -> Option<Statistic> {
        self.fish_mask.wants().map(|_| Statistic::Hardest(self.top_examples))
    }

    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        self.fish_mask.learn(site, finding)
    }

    fn surveyed(self, sites: &[&Site]) -> Result<Self, Error> {
        let places = sites.iter().map(|site| (*site).clone()).collect();
        Ok(Self { fish_mask: self.fish_mask.surveyed(sites)?, sites: Arc::new(places), ..self })
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Option<Pool>, Error> {
        Pool::new(&self.first(sites)?, sites, device).map(Some)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Option<Pool>,
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<FishDipAdapter, Error> {
        let settled = |parameter: Parameter| {
            let size = parameter.size(site);
            (size > 0).then(|| Buffer::new(Tensor::full([size], -0.0, device)))
        };
        Ok(FishDipAdapter {
            picked: shared.as_ref().map(|pool| pool.at(&site.path)),
            settled_weight: settled(Parameter::Weight),
            settled_bias: settled(Parameter::Bias),
            norm: Norm::of(site),
        })
    }

    fn policy(
        &self,
        adapters: &Adapters<FishDipAdapter>,
    ) -> Result<Option<Box<dyn Policy<FishDipAdapter>>>, Error> {
        // Adapters that were read have places of their own, and keep them.
        let whole = adapters.iter().all(|(_, adapter)| adapter.settled_weight.is_some());
        let surveyed = !self.sites.is_empty();
        Ok((whole && surveyed).then(|| Box::new(Dips::new(self.clone())) as Box<dyn Policy<_>>))
    }

    fn fold(adapter: &FishDipAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(0.5, targets.clone());
        vec![Self { top_examples: 2, update_steps: 3, ..plain.clone() }, plain]
    }

    fn parameters(&self, _site: &Site) -> usize {
        0
    }

    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        self.first(sites).map_or(0, |mask| mask.count())
    }

    fn tensors(&self, site: &Site, adapter: &FishDipAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (parameter, [values, indices, shape]) in NAMES {
            let Some((places, numbers)) = adapter.moved(parameter, site) else { continue };
            let held = index_data(indices, &places);
            let (Ok(held), Some(sizes)) = (held, parameter.shape(site)) else { continue };
            let count = numbers.len();
            tensors.push((values, TensorData::new(numbers, [count])));
            tensors.push((indices, held));
            tensors.push((shape, shape_data(&sizes)));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &Option<Pool>,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<FishDipAdapter, Error> {
        let (mut all, mut numbers) = (Vec::new(), Vec::new());
        for (parameter, [values, indices, shape]) in NAMES {
            if !file.has(values) {
                continue;
            }
            let (_, held) = file.take_ints(indices)?;
            let (_, sizes) = file.take_ints(shape)?;
            let chosen = chosen_of(&parameter.name(site), &sizes, &held)?;
            numbers.push(file.take(values, [chosen.indices().len()], &device.clone().inner())?);
            all.push((parameter.name(site), chosen));
        }
        let mask: Mask = all.into_iter().collect();
        let picked = match numbers.is_empty() {
            true => None,
            false => {
                let values = Tensor::<1>::from_data(Tensor::cat(numbers, 0).into_data(), device);
                let pool = Pool::new(&mask, &[site], device)?;
                Some(Picked { values: Param::from_tensor(values), ..pool.at(&site.path) })
            }
        };
        Ok(FishDipAdapter {
            picked,
            settled_weight: None,
            settled_bias: None,
            norm: Norm::of(site),
        })
    }
}
