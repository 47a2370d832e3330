//! InfoPrompt: prompt tuning whose prompt shall tell of the head and of what the model makes of its input
//! (arXiv 2306.04933).

use crate::fields::{bounded, finite, positive};
use crate::numbers::{Draw, STANDARD};
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, in_front, only_saved, saved_only, words,
};
use crate::prompt_tuning::{Prompt, restored};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Batch, Beside, Error, Kind, Laid, Method, Overlay, PlaceTensors, SeenTokens,
    Site, Sites, Strength, Targets, TrainedCopy, widened,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// InfoPrompt (arXiv 2306.04933): prompt tuning, `[P; E(x)]`, with two lower bounds of mutual information in the loss,
/// `L + β·L_head + γ·L_state`.
///
/// Each is `L(v) = -log(e^s(P, v) / (e^s(P, v) + Σₖ e^s(Pₖ, v)))` with `s(P, v) = (p̄·U)·(v·V) / √d`, where `p̄ [hidden]` is the
/// mean of the virtual tokens, and `Pₖ`, `k` up to `K`, are prompts `N(0, 1)` as `P` began, drawn anew for every batch:
/// `log(K + 1) - L(v)` is below the information between `P` and `v`.
///
/// - `L_head` is the mean over the classes `c` of `L(θ_c)`: `θ_c [w]` are the weights of the head for that class, and learn by it
///   where the head is trained (`modules_to_save`).
/// - `L_state` is the mean over the batch of `L(z)`: `z [w]` is what the head reads of a row, for BERT its pooled first column.
///
/// `P [n, hidden] ~ N(0, 1)`. A bound has its own `U [hidden, d]` and `V [w, d]`, `U(±1/√hidden)` and `U(±1/√w)`, and none where its
/// weight is 0. Parameters: `n·hidden`, and `d·(hidden + w)` a bound while it is trained. `U` and `V` are of no use to a forward pass
/// and end with the training: no file holds them, and adapters that were read are refused as a training's beginning
/// unless both weights are 0. A step costs no further pass.
///
/// The paper's text was not at hand. That scores are bilinear by projections of width `d`, that prompts and not
/// states or heads are the negatives (with one prompt for all rows, another row's state is none), their distribution, the mean
/// over tokens and all defaults are our choices.
///
/// For models with a head of their own; refused where the output is over the words that are read. HF PEFT does not
/// have it: the same file as of [`PromptTuning`](crate::PromptTuning), and all else is as there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InfoPrompt {
    /// How many virtual tokens, and what HF PEFT says of the model beside.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// `β`, the weight of `L_head`; default 0.1.
    pub beta: f64,
    /// `γ`, the weight of `L_state`; default 0.05.
    pub gamma: f64,
    /// `d`; default 64.
    pub score_dim: usize,
    /// `K`; default 16.
    pub num_negatives: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for InfoPrompt {
    fn default() -> Self {
        Self::new(20)
    }
}

/// The virtual tokens, or nothing at the head; and what scores have of the place while they are trained.
#[derive(Module, Debug)]
pub struct InformedPrompt {
    /// `P`; none at the head.
    pub prompt: Option<Prompt>,
    /// `U` of `L_head` at the words, its `V` at the head.
    pub head: Option<Param<Tensor<2>>>,
    /// `U` of `L_state` at the words, its `V` at the head.
    pub state: Option<Param<Tensor<2>>>,
}

impl Adapter for InformedPrompt {
    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        self.prompt.as_ref()?.prompt(x, tokens)
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt.as_ref().map_or(0, Adapter::virtual_tokens)
    }
}

/// The two terms of [`InfoPrompt`] for one batch.
#[derive(Debug)]
pub struct Information {
    weights: [f64; 2],
    negatives: usize,
    words: InformedPrompt,
    /// With its path.
    head: (String, InformedPrompt),
    copy: Option<TrainedCopy>,
    seen: Seen,
}

/// Notes the weight of the head, `[w, classes]`, and what it reads, `[rows, w]`.
#[derive(Debug, Default)]
struct Seen(Mutex<Option<[Tensor<2>; 2]>>);

impl Adapter for Seen {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        let [batch, rest, width] = x.dims();
        let found = [widened(layer.weight.val()), x.clone().reshape([batch * rest, width])];
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        None
    }
}

impl Overlay for Information {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path == self.head.0 {
            laid.push(Laid { adapter: &self.seen, strength: Strength::Scale(1.0) });
        }
    }
}

/// The mean of `L(v)` over the rows of `v [m, w]`, for `prompts [1 + K, hidden]` of which the first is `p̄`.
fn bound(prompts: Tensor<2>, v: Tensor<2>, scores: [&Param<Tensor<2>>; 2]) -> Tensor<1> {
    let [left, right] = scores.map(Param::val);
    let scale = (left.dims()[1] as f64).sqrt();
    let scores = v.matmul(right).matmul(prompts.matmul(left).transpose()) / scale; // [m, 1 + K]
    -log_softmax(scores, 1).narrow(1, 0, 1).mean()
}

impl Information {
    /// Of adapters in training; `None` where both terms have no weight.
    pub fn of(method: &InfoPrompt, adapters: &Adapters<InformedPrompt>) -> Option<Self> {
        let of = |at_head: bool| adapters.iter().find(|(_, a)| a.prompt.is_none() == at_head);
        let ((_, words), (path, head)) = (of(false)?, of(true)?);
        Some(Self {
            weights: [method.beta, method.gamma],
            negatives: method.num_negatives,
            words: words.clone(),
            head: (path.to_owned(), head.clone()),
            copy: adapters.copy(path).cloned(),
            seen: Seen::default(),
        })
    }

    /// `L_head` and `L_state` after the pass of the batch's loss, where they have a weight; `negatives [K, hidden]` are the
    /// means of the other prompts' tokens.
    ///
    /// # Errors
    /// Adapters that were read and not made; a model that does not ask for what lies over its head.
    pub fn bounds(&self, negatives: Tensor<2>) -> Result<[Option<Tensor<1>>; 2], Error> {
        let (path, head) = &self.head;
        let seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let [frozen, states] = seen.ok_or_else(|| {
            let reason = "expected a model that asks for what lies over its head (`Scope::linear`), as beta and gamma \
                          need; found that no pass did: set both to 0";
            Error::place(path, reason)
        })?;
        let prompt = self.words.prompt.as_ref().ok_or_else(|| Error::place(path, UNREAD))?;
        let own = prompt.prompt_embeddings.val().mean_dim(0); // [1, hidden]
        let prompts = Tensor::cat(vec![own, negatives], 0);
        let trained = self.copy.as_ref().and_then(|copy| copy.weight.as_ref());
        let classes = trained.map_or(frozen, Param::val).transpose(); // [classes, w]
        let of = |at: usize, v: Tensor<2>| {
            if self.weights[at] == 0.0 {
                return Ok(None);
            }
            let pick = |place: &InformedPrompt| [&place.head, &place.state][at].clone();
            let (Some(left), Some(right)) = (pick(&self.words), pick(head)) else {
                let reason = "expected adapters with the scores of beta and gamma, which no file holds; found some that \
                              were read: make new ones, or set both to 0";
                return Err(Error::place(path, reason));
            };
            Ok(Some(bound(prompts.clone(), v, [&left, &right])))
        };
        Ok([of(0, classes)?, of(1, states)?])
    }
}

impl Beside for Information {
    fn term(&self, _batch: &Batch<'_>) -> Result<Tensor<1>, Error> {
        let prompt = self.words.prompt.as_ref();
        let prompt = prompt.ok_or_else(|| Error::place(&self.head.0, UNREAD))?;
        let prompt = prompt.prompt_embeddings.val();
        let [n, width] = prompt.dims();
        // The mean of `n` numbers `N(0, 1)`.
        let mean = Distribution::Normal(0.0, 1.0 / (n as f64).sqrt());
        let device = prompt.device().inner();
        let bounds = self.bounds(Tensor::random([self.negatives, width], mean, &device))?;
        let weighted = bounds.into_iter().zip(self.weights);
        let terms = weighted.filter_map(|(bound, weight)| Some(bound? * weight));
        Ok(terms.reduce(|sum, term| sum + term).unwrap_or_else(|| Tensor::zeros([1], &device)))
    }
}

impl InfoPrompt {
    /// With this many virtual tokens.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self {
            virtual_tokens: VirtualTokens::of(num_virtual_tokens),
            beta: 0.1,
            gamma: 0.05,
            score_dim: 64,
            num_negatives: 16,
            targets: Targets::default(),
        }
    }

    /// The words, and the head where a term needs it.
    fn places_of<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>, Error> {
        let mut places = words(sites)?;
        if [self.beta, self.gamma] == [0.0; 2] {
            return Ok(places);
        }
        let vocabulary = places.first().map(|site| site.fan_in());
        let head = sites.output.as_ref().and_then(|path| sites.get(path));
        match head.filter(|site| site.kind == Kind::Linear && Some(site.fan_out()) != vocabulary) {
            Some(head) => places.push(head),
            None => {
                let reason = "expected a model with a head of its own, such as a classifier's, of which the prompt shall \
                              tell; found none, or one over the words that it reads: set beta and gamma to 0";
                return Err(Error::config("beta", reason));
            }
        }
        Ok(places)
    }
}

impl Method for InfoPrompt {
    type Adapter = InformedPrompt;
    type Shared = Option<Prompt>;
    const NAME: &'static str = "INFOPROMPT";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(self);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        positive("score_dim", self.score_dim)?;
        positive("num_negatives", self.num_negatives)?;
        for (field, value) in [("beta", self.beta), ("gamma", self.gamma)] {
            finite(field, value)?;
            if value < 0.0 {
                return Err(Error::config(field, format!("expected 0 or more, found {value}")));
            }
        }
        Ok(())
    }

    fn init(
        &self,
        site: &Site,
        _shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<InformedPrompt, Error> {
        let (prompt, width) = match site.kind {
            Kind::Embedding => {
                let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
                self.virtual_tokens.fits(site, width)?;
                let drawn = Param::from_tensor(STANDARD.tensor([n, width], rng, device));
                (Some(Prompt { prompt_embeddings: drawn }), width)
            }
            _ => (None, site.fan_in()),
        };
        bounded("score_dim", &site.path, [width, self.score_dim])?;
        let draw = Draw::Uniform((1.0 / width as f32).sqrt());
        let mut score = |weight: f64| {
            let drawn = || draw.tensor([width, self.score_dim], rng, device);
            (weight > 0.0).then(drawn).map(Param::from_tensor)
        };
        Ok(InformedPrompt { prompt, head: score(self.beta), state: score(self.gamma) })
    }

    fn beside(&self, adapters: &Adapters<InformedPrompt>) -> Option<Box<dyn Beside>> {
        Some(Box::new(Information::of(self, adapters)?))
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let both =
            Self { score_dim: 4, num_negatives: 5, targets: only_saved(targets), ..Self::new(3) };
        vec![Self { beta: 0.0, ..both.clone() }, Self { gamma: 0.0, ..both.clone() }, both]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (n, d) = (self.virtual_tokens.num_virtual_tokens, self.score_dim);
        let bounds = [self.beta, self.gamma].into_iter().filter(|weight| *weight > 0.0).count();
        match site.kind {
            Kind::Embedding => (n + bounds * d) * site.fan_out(),
            _ => bounds * d * site.fan_in(),
        }
    }

    fn tensors(&self, _site: &Site, _adapter: &InformedPrompt) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<InformedPrompt, Error> {
        let unread = || Error::place(&site.path, UNREAD);
        let prompt = match site.kind {
            Kind::Embedding => Some(shared.clone().ok_or_else(unread)?),
            _ => None,
        };
        Ok(InformedPrompt { prompt, head: None, state: None })
    }

    fn shared_tensors(&self, adapters: &[&InformedPrompt]) -> Vec<(String, TensorData)> {
        let prompts = adapters.iter().filter_map(|adapter| adapter.prompt.as_ref());
        let data = |prompt: &Prompt| prompt.prompt_embeddings.val().into_data();
        prompts.map(|prompt| (EMBEDDINGS.to_owned(), data(prompt))).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        restored(&self.virtual_tokens, sites, file, device)
    }
}
