//! AutoLoRA: LoRA whose ranks are found by meta-learning (arXiv 2403.09113).

use crate::LoraAdapter;
use crate::auto_lora_policy::Search;
use crate::low_rank::{LowRank, faces_by_lora, stored};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Error, Fold, Kind, Method, PlaceTensors, Policy, Site, Targets,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// AutoLoRA (arXiv 2403.09113): `y = xW + b + s·dropout(x)·Σ_j α_j·a_j·b_j` with the columns `a_j` of
/// `A [fan_in, r]`, the rows `b_j` of `B [r, fan_out]` and selection variables `α = softmax(β)`, `β [r]`.
///
/// `A ~ U(±1/√fan_in)`, `B` and `β` zero at first; `s = lora_alpha`, so that with all `α_j = 1/r` it is LoRA
/// with `lora_alpha / r`. Parameters: `r·(fan_in + fan_out + 1)` a place. Folds.
///
/// The training has two parts. For `search_steps` steps, each `selection_every`-th step moves `β` alone and
/// every other one all else: the bilevel problem of the paper, to first order. The paper takes the steps of
/// `β` from held-out examples. Here each step has the next batch of the training data: in one pass over
/// them the two kinds of steps see different examples, in the next pass the batches are drawn anew.
///
/// Then each place keeps the components with `α_j ≥ threshold`, the largest at least, and the rest of the
/// training is LoRA's with the ranks that were found: `A` is drawn again, `B` is zero, and `α` is equal over
/// what was kept. Where `search_steps` are all steps, nothing is drawn again and `α` stays what it is.
///
/// The ranks go into the configuration as `rank_pattern`, and the file holds what was kept. With that
/// `rank_pattern` and this `lora_alpha`, LORA trains the same places at the same ranks and scales.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoLora {
    /// Rank at the start, scale, dropout and places, as in LoRA; without `use_rslora`.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// Steps before the ranks are set; default: half of all.
    pub search_steps: Option<usize>,
    /// In the search, every so many steps one is the selection's; default 2.
    pub selection_every: usize,
    /// Least `α_j` of a component that stays; default `1/r`, the mean (the paper's threshold as remembered).
    pub threshold: Option<f64>,
    /// Steps of the whole training; default: as many as it has.
    pub total_step: Option<usize>,
    /// Seed of the factors that are drawn again; default 0.
    pub second_seed: u64,
}

impl Default for AutoLora {
    fn default() -> Self {
        Self {
            low_rank: LowRank::default(),
            search_steps: None,
            selection_every: 2,
            threshold: None,
            total_step: None,
            second_seed: 0,
        }
    }
}

/// `β` of a component that was dropped: its `α` is 0, whatever the others are.
pub(crate) const DROPPED: f32 = -1e30;

/// What AutoLoRA trains at one place.
#[derive(Module, Debug)]
pub struct AutoLoraAdapter {
    /// `A [fan_in, r]`.
    pub autolora_a: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub autolora_b: Param<Tensor<2>>,
    /// `β [r]`.
    pub autolora_beta: Param<Tensor<1>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl AutoLoraAdapter {
    fn lora(&self) -> LoraAdapter {
        let alpha = softmax(self.autolora_beta.val(), 0);
        let b = self.autolora_b.val() * alpha.unsqueeze_dim(1);
        crate::lora::LoraAdapter::of(self.autolora_a.val(), b, self.scaling)
    }

    /// `β`, on the host.
    pub(crate) fn beta(&self) -> Vec<f32> {
        self.autolora_beta.val().into_data().convert::<f32>().iter().collect()
    }

    /// Which components were not dropped.
    fn kept(&self) -> Vec<i32> {
        let kept = |(index, beta): (i32, f32)| (beta > DROPPED / 2.0).then_some(index);
        (0..).zip(self.beta()).filter_map(kept).collect()
    }
}

faces_by_lora!(AutoLoraAdapter, autolora_a);

impl AutoLora {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        beta: Tensor<1>,
    ) -> Result<AutoLoraAdapter, Error> {
        let [_, r] = a.dims();
        Ok(AutoLoraAdapter {
            autolora_a: Param::from_tensor(a),
            autolora_b: Param::from_tensor(b),
            autolora_beta: Param::from_tensor(beta),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)? * r as f64,
        })
    }
}

impl Method for AutoLora {
    type Adapter = AutoLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "AUTOLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["autolora_b"];

    fn targets(&self) -> &Targets {
        &self.low_rank.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.low_rank.targets
    }

    fn biases(&self) -> Biases {
        self.low_rank.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        self.low_rank.check()?;
        if self.low_rank.use_rslora {
            let reason = "works without: the scale must be the same whatever rank is found";
            return Err(Error::config("use_rslora", reason));
        }
        if self.selection_every < 2 {
            let reason = format!(
                "expected 2 or more, or nothing but β learns; found {}",
                self.selection_every
            );
            return Err(Error::config("selection_every", reason));
        }
        match self.threshold {
            Some(threshold) if !(threshold > 0.0 && threshold < 1.0) => {
                let reason = format!("expected a number between 0 and 1, found {threshold}");
                Err(Error::config("threshold", reason))
            }
            _ => Ok(()),
        }
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<AutoLoraAdapter, Error> {
        let (a, b) = self.low_rank.drawn(site, rng, device)?;
        let [_, r] = a.dims();
        self.adapter(site, (a, b), Tensor::zeros([r], device))
    }

    fn fold(adapter: &AutoLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self {
                low_rank: LowRank { use_rslora: false, ..dropping },
                search_steps: Some(6),
                selection_every: 3,
                threshold: Some(0.2),
                total_step: Some(10),
                second_seed: 4,
            },
            Self { low_rank: patterned, ..Self::default() },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.low_rank.numbers(site) + self.low_rank.rank(site).unwrap_or(self.low_rank.r)
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn policy(
        &self,
        _adapters: &Adapters<AutoLoraAdapter>,
    ) -> Result<Option<Box<dyn Policy<AutoLoraAdapter>>>, Error> {
        Ok(Some(Box::new(Search::new(self)?)))
    }

    /// With the ranks that were found, one entry a place where any component was dropped.
    fn finished(self, adapters: &Adapters<AutoLoraAdapter>) -> Self {
        let found: Vec<(&str, usize, usize)> = adapters
            .iter()
            .map(|(path, adapter)| (path, adapter.kept().len(), adapter.autolora_beta.dims()[0]))
            .collect();
        if found.iter().all(|(_, kept, all)| kept == all) {
            return self;
        }
        // A pattern matches the end of a path, and the first match wins: whole paths before their ends.
        let mut found: Vec<(&str, usize)> =
            found.into_iter().map(|(p, kept, _)| (p, kept)).collect();
        found.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        let ranks = found.into_iter().map(|(path, kept)| (path.to_owned(), kept));
        let rank_pattern: IndexMap<String, usize> = ranks.collect();
        Self { low_rank: LowRank { rank_pattern, ..self.low_rank }, ..self }
    }

    fn tensors(&self, site: &Site, adapter: &AutoLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let (mut a, mut b) = (adapter.autolora_a.val(), adapter.autolora_b.val());
        let mut beta = adapter.autolora_beta.val();
        let kept = adapter.kept();
        let asked = self.low_rank.rank(site).unwrap_or(self.low_rank.r);
        if kept.len() == asked && asked < beta.dims()[0] {
            // Dropped in training and not yet cut out.
            let kept = TensorData::new(kept, [asked]);
            let kept = Tensor::<1, Int>::from_data(kept, &a.device().inner());
            a = a.without_autodiff().select(1, kept.clone());
            b = b.without_autodiff().select(0, kept.clone());
            beta = beta.without_autodiff().select(0, kept);
        }
        vec![
            ("autolora_A", stored(a)),
            ("autolora_B", stored(b)),
            ("autolora_beta", beta.into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<AutoLoraAdapter, Error> {
        let pair = self.low_rank.take(site, ["autolora_A", "autolora_B"], file, device)?;
        let beta = file.take("autolora_beta", [pair.0.dims()[1]], device)?;
        self.adapter(site, pair, beta)
    }
}
