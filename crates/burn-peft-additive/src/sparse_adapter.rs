//! SparseAdapter: a bottleneck adapter of which most numbers are left out at the start (arXiv 2210.04284).

use crate::bottleneck::{
    Bottleneck, BottleneckAdapter, BottleneckInit, OwnNorm, Scaling, TrainedScaling, width,
};
use crate::fields::probability;
use crate::numbers::Draw;
use crate::source::{Fresh, Source, Stored};
use burn::module::{Module, Param};
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, AnyAdapter, Error, Finding, Hidden, Kind, Method, PlaceTensors, Site, Statistic,
    Targets, site_rng,
};
use rand::rngs::ChaCha8Rng;
use rand::seq::index;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// SparseAdapter (arXiv 2210.04284): a [`Bottleneck`] whose matrices `D` and `U` keep a share `1 - sparsity` of
/// their numbers, chosen where they begin; only these are held, trained and written.
///
/// Chosen are in each matrix any, the largest, or, by SNIP, those with the largest `|w·∂L/∂w|`, the gradient of the mean
/// loss over the batches of the survey (`--init-batches`) with all adapters in place as they begin. Erdős–Rényi's rule is
/// the first, as both matrices have the same sizes; GraSP is not here. The paper's Large-Sparse is a smaller `reduction_factor` with a `sparsity`
/// that makes up for it. Parameters: `2·round((1 - sparsity)·r·hidden)` in place of the matrices' `2·r·hidden`. It
/// does not fold. The file holds, for `adapter_down` and `adapter_up`, the numbers `values` and where they stand
/// in the matrix, `indices`, row by row; the rest is [`Bottleneck`]'s.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SparseAdapter {
    /// Share of the numbers that are left out; default 0.8.
    pub sparsity: f64,
    /// Which stay; default "random".
    pub pruning: Pruning,
    /// Decides with SNIP what is drawn, in the place of the training's own seed: the data see it before; default 0.
    pub pruning_seed: u64,
    /// The adapter that is made sparse.
    #[serde(flatten)]
    pub adapter: Bottleneck,
    /// By path, which numbers of `Dᵀ` and `Uᵀ` SNIP keeps.
    #[serde(skip)]
    kept: Arc<BTreeMap<String, [Vec<usize>; 2]>>,
}

impl Default for SparseAdapter {
    fn default() -> Self {
        Self {
            sparsity: 0.8,
            pruning: Pruning::default(),
            pruning_seed: 0,
            adapter: Bottleneck::default(),
            kept: Arc::default(),
        }
    }
}

/// Which numbers of a [`SparseAdapter`] stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pruning {
    /// Any, by the seed.
    #[default]
    Random,
    /// The largest of those that were drawn.
    Magnitude,
    /// Those with the largest `|w·∂L/∂w|` (arXiv 1810.02340).
    Snip,
}

/// A matrix of which only some numbers are not zero.
#[derive(Module, Debug)]
pub struct SparseMatrix {
    /// These numbers, row by row.
    pub values: Param<Tensor<1>>,
    /// Where they stand, counted row by row.
    pub indices: Tensor<1, Int>,
    /// `[rows, columns]`.
    pub shape: [usize; 2],
}

impl SparseMatrix {
    fn new(values: Tensor<1>, indices: &[i32], shape: [usize; 2], device: &Device) -> Self {
        let indices = TensorData::new(indices.to_vec(), [indices.len()]);
        let indices = Tensor::from_data(indices, &device.clone().inner());
        Self { values: Param::from_tensor(values), indices, shape }
    }

    /// `[rows, columns]`.
    fn dense(&self) -> Tensor<2> {
        let (values, [rows, columns]) = (self.values.val(), self.shape);
        let zeros = Tensor::<1>::zeros([rows * columns], &self.indices.device());
        let zeros = zeros.cast(values.dtype());
        let add = IndexingUpdateOp::Add;
        zeros.select_assign(0, self.indices.clone(), values, add).reshape([rows, columns])
    }
}

/// What SparseAdapter trains at one place.
#[derive(Module, Debug)]
pub struct SparseBottleneck {
    /// `Dᵀ [r, hidden]`.
    pub down: SparseMatrix,
    /// `d [r]`.
    pub down_bias: Param<Tensor<1>>,
    /// `Uᵀ [hidden, r]`.
    pub up: SparseMatrix,
    /// `u [hidden]`.
    pub up_bias: Param<Tensor<1>>,
    /// The norm before `D`.
    pub norm: Option<OwnNorm>,
    /// `s`, where it is trained: `[1]` or `[hidden]`.
    pub scaling: Option<Param<Tensor<1>>>,
    /// What was asked for.
    #[module(skip)]
    pub how: Bottleneck,
}

impl Adapter for SparseBottleneck {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let matrices = [self.down.dense(), self.up.dense()];
        let biases = [self.down_bias.val(), self.up_bias.val()];
        let trained = self.scaling.as_ref().map(Param::val);
        Some(self.how.difference(at, matrices, biases, self.norm.as_ref(), trained))
    }

    /// Stochastic depth draws a number for a row of the batch.
    fn by_token(&self) -> bool {
        self.how.stochastic_depth == 0.0
    }
}

/// Names in the file: the numbers, and where they stand.
const DOWN: [&str; 2] = ["adapter_down.values", "adapter_down.indices"];
const UP: [&str; 2] = ["adapter_up.values", "adapter_up.indices"];

impl SparseAdapter {
    /// A bottleneck adapter of which this share is left out.
    pub fn new(sparsity: f64, pruning: Pruning, adapter: Bottleneck) -> Self {
        Self { sparsity, pruning, adapter, ..Self::default() }
    }

    /// How many of `numbers` stay.
    fn count(&self, numbers: usize) -> usize {
        (((1.0 - self.sparsity) * numbers as f64).round() as usize).max(1)
    }

    /// Where the largest stand, and of equals the first; in order.
    fn largest(&self, sizes: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by(|&a, &b| sizes[b].total_cmp(&sizes[a]).then(a.cmp(&b)));
        order.truncate(self.count(sizes.len()));
        order.sort_unstable();
        order
    }

    /// The whole adapter as it begins, without what it drops.
    fn dense(&self, site: &Site, device: &Device) -> Result<BottleneckAdapter, Error> {
        let still = Bottleneck { dropout: 0.0, stochastic_depth: 0.0, ..self.adapter.clone() };
        still.init(site, &(), &mut site_rng(self.pruning_seed, &site.path), device)
    }

    /// A matrix that is drawn, of which `chosen` stay, if that is known.
    fn draw(
        &self,
        shape: [usize; 2],
        draw: Draw,
        chosen: Option<&[usize]>,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> SparseMatrix {
        let all = draw.tensor(shape, rng, &device.clone().inner()).into_data();
        let all: Vec<f32> = all.iter::<f32>().collect();
        let count = self.count(all.len());
        let mut kept = match (chosen, self.pruning) {
            (Some(chosen), _) => chosen.to_vec(),
            (None, Pruning::Magnitude) => {
                self.largest(&all.iter().map(|w| w.abs()).collect::<Vec<f32>>())
            }
            (None, _) => index::sample(rng, all.len(), count).into_vec(),
        };
        kept.sort_unstable();
        let values: Vec<f32> = kept.iter().map(|&at| all[at]).collect();
        let values = Tensor::from_data(TensorData::new(values, [count]), device);
        let indices: Vec<i32> = kept.iter().map(|&at| at as i32).collect();
        SparseMatrix::new(values, &indices, shape, device)
    }

    fn stored(
        &self,
        shape: [usize; 2],
        [values, indices]: [&str; 2],
        site: &Site,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SparseMatrix, Error> {
        let numbers = shape[0] * shape[1];
        let count = self.count(numbers);
        let values = file.take(values, [count], device)?;
        let (found, places) = file.take_ints(indices)?;
        let ascending = places.windows(2).all(|pair| pair[0] < pair[1]);
        let within = places.iter().all(|at| usize::try_from(*at).is_ok_and(|at| at < numbers));
        if found != [count] || !ascending || !within {
            let name = format!("{}.{indices}", site.path);
            let expected = format!("{count} ascending numbers below {numbers}");
            return Err(Error::tensor(name, expected, format!("others, of shape {found:?}")));
        }
        let indices: Vec<i32> = places.into_iter().map(|at| at as i32).collect();
        Ok(SparseMatrix::new(values, &indices, shape, device))
    }

    /// `[r, hidden]`.
    fn shape(&self, site: &Site) -> Result<[usize; 2], Error> {
        Ok([width(self.adapter.reduction_factor, site)?, site.fan_out()])
    }

    fn rest(
        &self,
        [r, hidden]: [usize; 2],
        [down, up]: [SparseMatrix; 2],
        from: &mut impl Source,
    ) -> Result<SparseBottleneck, Error> {
        let (zero, one) = (Draw::Constant(0.0), Draw::Constant(1.0));
        let scaling = match self.adapter.scaling {
            Scaling::Fixed(_) => None,
            Scaling::Trained(TrainedScaling::Learned) => Some([1]),
            Scaling::Trained(TrainedScaling::Channel) => Some([hidden]),
        };
        let norm = match self.adapter.ln_before {
            true => Some(OwnNorm {
                weight: from.take("adapter_norm_before.weight", [hidden], one)?,
                bias: from.take("adapter_norm_before.bias", [hidden], zero)?,
            }),
            false => None,
        };
        Ok(SparseBottleneck {
            down,
            down_bias: from.take("adapter_down.bias", [r], zero)?,
            up,
            up_bias: from.take("adapter_up.bias", [hidden], zero)?,
            norm,
            scaling: scaling.map(|shape| from.take("scaling", shape, one)).transpose()?,
            how: self.adapter.clone(),
        })
    }
}

impl Method for SparseAdapter {
    type Adapter = SparseBottleneck;
    type Shared = ();
    const NAME: &'static str = "SPARSE_ADAPTER";
    const KINDS: &'static [Kind] = Bottleneck::KINDS;
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = Bottleneck::ABSENT;
    const HF_FORMAT: bool = false;

    fn targets(&self) -> &Targets {
        &self.adapter.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.adapter.targets
    }

    fn check(&self) -> Result<(), Error> {
        self.adapter.check()?;
        probability("sparsity", self.sparsity)?;
        let zero = self.adapter.init_weights == BottleneckInit::MamAdapter;
        match zero && self.pruning != Pruning::Random {
            false => Ok(()),
            true => {
                let reason = "magnitude and snip find no largest among the zeros with which \
                              mam_adapter begins; expected random";
                Err(Error::config("pruning", reason))
            }
        }
    }

    fn draws(&self) -> bool {
        self.pruning != Pruning::Snip
    }

    fn wants(&self) -> Option<Statistic> {
        let unknown = self.pruning == Pruning::Snip && self.kept.is_empty();
        unknown.then_some(Statistic::Trial)
    }

    fn trial(&self, site: &Site, device: &Device) -> Result<AnyAdapter, Error> {
        self.dense(site, device).map(AnyAdapter::new)
    }

    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        let Finding::Trial(gradients) = finding else { return Ok(()) };
        // In the order of the adapter's fields.
        let [down, _, up, ..] = gradients.as_slice() else { return Ok(()) };
        let adapter = self.dense(site, &site.device())?;
        let chosen = [(adapter.down, down), (adapter.up, up)].map(|(matrix, gradient)| {
            let w = matrix.val().reshape(gradient.dims());
            let sizes = (w * gradient.clone()).abs().into_data();
            self.largest(&sizes.iter::<f32>().collect::<Vec<f32>>())
        });
        Arc::make_mut(&mut self.kept).insert(site.path.clone(), chosen);
        Ok(())
    }

    fn starts_as_identity(&self) -> bool {
        self.adapter.starts_as_identity()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SparseBottleneck, Error> {
        let [r, hidden] = self.shape(site)?;
        let [down, up] = self.adapter.init_weights.draws(hidden);
        let kept = self.kept.get(&site.path);
        if kept.is_none() && self.pruning == Pruning::Snip {
            let reason = "snip chooses by data, and none were looked at; call `survey` first";
            return Err(Error::config("pruning", reason));
        }
        let count = self.count(r * hidden);
        if let Some([found, _]) = kept.filter(|kept| kept.iter().any(|own| own.len() != count)) {
            let found = found.len();
            let reason = format!(
                "snip chose {found} numbers of another base's matrices; expected {count}, call `survey` with this base"
            );
            return Err(Error::place(&site.path, reason));
        }
        let mut own = site_rng(self.pruning_seed, &site.path);
        let rng = if kept.is_some() { &mut own } else { rng };
        let [first, second] = [0, 1].map(|at| kept.map(|kept| kept[at].as_slice()));
        let matrices = [
            self.draw([r, hidden], down, first, rng, device),
            self.draw([hidden, r], up, second, rng, device),
        ];
        self.rest([r, hidden], matrices, &mut Fresh { rng, device })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let pfeiffer = Bottleneck::pfeiffer(1.0, targets.clone());
        let channel = Scaling::Trained(TrainedScaling::Channel);
        let own = Bottleneck { scaling: channel, ..Bottleneck::ciat(2.0, targets.clone()) };
        let snip = Self::new(0.5, Pruning::Snip, pfeiffer.clone());
        vec![
            Self { pruning_seed: 5, ..snip },
            Self::new(0.75, Pruning::Magnitude, pfeiffer),
            Self::new(0.5, Pruning::Random, own),
            Self::new(0.0, Pruning::Random, Bottleneck::parallel(2.0, targets.clone())),
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let Ok([r, hidden]) = self.shape(site) else { return 0 };
        self.adapter.parameters(site) - 2 * r * hidden + 2 * self.count(r * hidden)
    }

    fn tensors(&self, _site: &Site, adapter: &SparseBottleneck) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (matrix, [values, indices]) in [(&adapter.down, DOWN), (&adapter.up, UP)] {
            tensors.push((values, matrix.values.val().into_data()));
            tensors.push((indices, matrix.indices.to_data().convert::<i32>()));
        }
        tensors.push(("adapter_down.bias", adapter.down_bias.val().into_data()));
        tensors.push(("adapter_up.bias", adapter.up_bias.val().into_data()));
        if let Some(norm) = &adapter.norm {
            tensors.push(("adapter_norm_before.weight", norm.weight.val().into_data()));
            tensors.push(("adapter_norm_before.bias", norm.bias.val().into_data()));
        }
        tensors.extend(adapter.scaling.iter().map(|s| ("scaling", s.val().into_data())));
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SparseBottleneck, Error> {
        let [r, hidden] = self.shape(site)?;
        let down = self.stored([r, hidden], DOWN, site, file, device)?;
        let up = self.stored([hidden, r], UP, site, file, device)?;
        self.rest([r, hidden], [down, up], &mut Stored { file, device })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn_peft_core::{Adapters, Counted, HiddenPlace, Passes, Scope, Sites, adapt, survey};

    #[derive(Module, Debug)]
    struct Stack {
        block: Held,
        head: Linear,
    }

    #[derive(Module, Debug)]
    struct Held {
        place: HiddenPlace,
    }

    impl Passes for Stack {
        fn batches(&self) -> usize {
            3
        }

        fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
            let first = 16 * batch as i64;
            let x = Tensor::<1, Int>::arange(first..first + 16, &Device::flex()).float().sin();
            let x = x.reshape([1, 2, 8]);
            let y = cx.at("block").hidden(Hidden::block(x.clone(), x));
            self.head.forward(y).square().mean()
        }

        fn counted(&self, _batch: usize, _targets_only: bool) -> Counted {
            Counted { batch: 1, seq: 2, kept: vec![true; 2] }
        }
    }

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn snip_keeps_what_the_loss_depends_on_and_as_it_was() {
        let device = Device::flex();
        let place = HiddenPlace::new(8);
        let model = Stack { block: Held { place }, head: LinearConfig::new(8, 3).init(&device) };
        let sites = Sites::of(&model, None);
        let adapter = Bottleneck::houlsby(2.0, Targets::list(["block"]));
        let method =
            SparseAdapter { pruning_seed: 4, ..SparseAdapter::new(0.75, Pruning::Snip, adapter) };
        let said = adapt(&sites, &method, 0, &device).expect_err("saw no data").to_string();
        assert!(said.contains("survey"), "{said}");
        let known = survey(method.clone(), &sites, &model).expect("fits");
        let sparse = adapt(&sites, &known, 9, &device).expect("fits");
        let sparse = sparse.get("block").expect("is there");
        // Anew: |w·g| of the whole adapter, by one loss over all batches.
        let site = sites.get("block").expect("is there");
        let dense = method.dense(site, &device.clone().autodiff()).expect("fits");
        let laid = Adapters::new([("block".to_owned(), dense.clone())], []);
        let losses = (0..3).map(|batch| model.loss(batch, &Scope::new(&laid)));
        let gradients = losses.reduce(|a, b| a + b).expect("are some").backward();
        for (matrix, kept) in [(dense.down, &sparse.down), (dense.up, &sparse.up)] {
            let (w, g) = (matrix.val(), matrix.val().grad(&gradients).expect("is trained"));
            let w = numbers(w);
            let sizes: Vec<f32> = w.iter().zip(numbers(g)).map(|(w, g)| (w * g).abs()).collect();
            let mut order: Vec<usize> = (0..32).collect();
            order.sort_by(|&a, &b| sizes[b].total_cmp(&sizes[a]));
            let mut expected = order[..8].to_vec();
            expected.sort_unstable();
            let found: Vec<usize> =
                kept.indices.to_data().iter::<i64>().map(|at| at as usize).collect();
            assert_eq!(found, expected);
            let values: Vec<f32> = expected.iter().map(|&at| w[at]).collect();
            assert_eq!(numbers(kept.values.val()), values);
            let largest = SparseAdapter::new(0.75, Pruning::Magnitude, method.adapter.clone())
                .largest(&w.iter().map(|w| w.abs()).collect::<Vec<f32>>());
            assert_ne!(found, largest, "the data decide");
        }
    }
}
