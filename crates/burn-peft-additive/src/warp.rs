//! WARP: a class is the trained vector that is nearest to what a masked language model says of its `[MASK]`
//! (arXiv 2101.00121).

use crate::fields::bounded;
use crate::numbers::Draw;
use crate::prompt::{EMBEDDINGS, PREFIXES, UNREAD, between, in_front};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Kind, Mask, Method, PlaceTensors, SeenTokens, Site, Sites, Targets,
};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Word-level Adversarial ReProgramming (arXiv 2101.00121, section 3), of a classifier over a frozen masked language model:
/// it reads `T(x) = [P; E([MASK]); E(x)]`, and `P(y = c | x) = exp(θ_c·f(T(x))) / Σᵢ exp(θᵢ·f(T(x)))`.
///
/// `f`, `[hidden]`, is the state of the `[MASK]` behind the frozen transform of the language model's head (dense, activation,
/// norm), which its table of words would be multiplied with. Trained are the prompts `P [n, hidden]` and the verbaliser `θ
/// [classes, hidden]`, one vector a class and no bias: `(n + classes)·hidden` parameters. The classifier's own head and
/// pooler are neither read, trained nor stored.
///
/// The paper also sets prompts behind the text and between two; here all stand in front, and the `[MASK]` behind them, so
/// that a row of a padded batch is what it is alone. Positions, mask and sentence numbers go on over them as in
/// [`PromptTuning`](crate::PromptTuning). The paper's WARP₀, without prompts, is not here.
///
/// It goes to the embedding of words and to the output layer of a classifier that can read a `[MASK]`: a BERT whose folder
/// names that token. Acts on activations only: it does not fold, and rows of one batch cannot have prompts of their own.
/// HF PEFT does not have it: the same layout, with `θ` by the name of the output layer's weight, whose place it takes.
///
/// # Errors
/// A model that reads no `[MASK]`, a folder whose tokenizer names none, a checkpoint without the transform (unless
/// [`transform`](Self::transform) is false), and `modules_to_save`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Warp {
    /// `n`; default 8, as in most of the paper.
    pub num_prompts: usize,
    /// How `P` begins; default as the `[MASK]`.
    pub prompt_init: WarpInit,
    /// A word's number for each class, in their order, as which `θ` begins, such as those of "great" and "bad"; default:
    /// `θ ~ N(0, 0.02²)`, which is our choice, as a new head of BERT's is drawn.
    pub class_tokens: Option<Vec<usize>>,
    /// Whether `f` goes through the transform; default true. Without it `θ` reads the last block's state at the `[MASK]`,
    /// which is our choice for checkpoints that have lost it, as those of sentence encoders have, and not the paper's method.
    pub transform: bool,
    /// Nothing is trained whole.
    #[serde(skip)]
    pub targets: Targets,
}

impl Default for Warp {
    fn default() -> Self {
        Self::new(8)
    }
}

/// How the prompts of [`Warp`] begin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WarpInit {
    /// Each as the `[MASK]`.
    #[default]
    Mask,
    /// As words of the model that are drawn at random.
    SampleVocab,
}

/// What WARP trains at one of its two places.
// Handles on tensors differ in size; there are two of these.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum WarpAdapter {
    /// In front of the words.
    Front(MaskedPrompt),
    /// In place of the output layer.
    Verbalizer(Verbalizer),
}

/// Prompts, and the `[MASK]` behind them.
#[derive(Module, Debug)]
pub struct MaskedPrompt {
    /// `P [n, hidden]`.
    pub prompt_embeddings: Param<Tensor<2>>,
    /// `E([MASK]) [1, hidden]`, frozen.
    pub mask: Tensor<2>,
    /// Whether the state at the `[MASK]` goes through the frozen transform.
    pub transform: bool,
}

/// A vector for each class.
#[derive(Module, Debug)]
pub struct Verbalizer {
    /// `θ [classes, hidden]`.
    pub verbalizer: Param<Tensor<2>>,
}

impl Adapter for WarpAdapter {
    fn prompt(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<Tensor<3>> {
        let Self::Front(front) = self else { return None };
        let parts = vec![front.prompt_embeddings.val(), front.mask.clone()];
        Some(Tensor::cat(parts, 0).unsqueeze())
    }

    fn virtual_tokens(&self) -> usize {
        self.mask().map_or(0, |mask| mask.column + 1)
    }

    fn mask(&self) -> Option<Mask> {
        let Self::Front(front) = self else { return None };
        Some(Mask { column: front.prompt_embeddings.dims()[0], transform: front.transform })
    }

    /// `x` is `f`.
    fn linear_whole(&self, _layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let Self::Verbalizer(Verbalizer { verbalizer }) = self else { return None };
        Some(x.clone().matmul(verbalizer.val().transpose().unsqueeze()))
    }
}

/// Rows of the table of words at `site`, `[n, hidden]` in f32.
fn rows(site: &Site, field: &'static str, ids: &[usize]) -> Result<TensorData, Error> {
    let known = site.fan_in();
    if let Some(id) = ids.iter().find(|id| **id >= known) {
        let reason = format!("expected tokens below {known}, as the model has them, found {id}");
        return Err(Error::config(field, reason));
    }
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let count = ids.len();
    let ids = TensorData::new(ids, [count]);
    match site.rows(Tensor::from_data(ids, &site.device().inner())) {
        Some(rows) => Ok(rows.into_data().convert::<f32>()),
        None => Err(Error::place(&site.path, "expected a table of words, found a vector")),
    }
}

/// The number of the `[MASK]` in the table at `site`.
fn mask_word(site: &Site) -> Result<usize, Error> {
    let word = site.mask.as_ref().and_then(|mask| mask.word);
    word.filter(|word| *word < site.fan_in()).ok_or_else(|| {
        let reason = match word {
            Some(word) => format!(
                "expected a [MASK] below {}, as the model has words, found {word}; is the tokenizer in its folder \
                 its own?",
                site.fan_in()
            ),
            None => "expected the number of a [MASK], found none; put the tokenizer.json that has it, with \
                     \"mask_token\" in tokenizer_config.json, into the model's folder"
                .to_owned(),
        };
        Error::place(&site.path, reason)
    })
}

impl Warp {
    /// With this many prompts that begin as the `[MASK]`.
    pub fn new(num_prompts: usize) -> Self {
        Self {
            num_prompts,
            prompt_init: WarpInit::Mask,
            class_tokens: None,
            transform: true,
            targets: Targets::default(),
        }
    }

    /// The words, and the output layer.
    fn places_of<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>, Error> {
        let words = sites.all.iter().find(|site| site.kind == Kind::Embedding);
        let output = sites.output.as_ref().and_then(|path| sites.get(path));
        let (Some(words), Some(head)) = (words, output) else {
            let reason = "expected a classifier with an embedding of words and an output layer, found a model \
                          without";
            return Err(Error::config("peft_type", format!("{}: {reason}", Self::NAME)));
        };
        let Some(mask) = &words.mask else {
            let reason = format!(
                "{} reads a class at a [MASK]: expected a model that can, as a classifier of BERT's, found one that \
                 cannot",
                Self::NAME
            );
            return Err(Error::place(&words.path, reason));
        };
        mask_word(words)?;
        if self.transform && !mask.missing.is_empty() {
            let reason = format!(
                "expected the transform of the masked language model's head, found a checkpoint without {}; give one \
                 that has it (a BertForMaskedLM), or set transform = false to read the last block's state as it is",
                mask.missing.join(", ")
            );
            return Err(Error::config("transform", reason));
        }
        if head.kind != Kind::Linear || head.fan_in() != words.fan_out() {
            let reason = format!(
                "expected an output layer over states [{}], as wide as words, found one over [{}]",
                words.fan_out(),
                head.fan_in()
            );
            return Err(Error::place(&head.path, reason));
        }
        if let Some(tokens) = self.class_tokens.as_ref().filter(|of| of.len() != head.fan_out()) {
            let reason = format!(
                "expected a token for each of {} classes, found {}",
                head.fan_out(),
                tokens.len()
            );
            return Err(Error::config("class_tokens", reason));
        }
        Ok(vec![words, head])
    }

    fn front(
        &self,
        site: &Site,
        prompt_embeddings: Tensor<2>,
        device: &Device,
    ) -> Result<WarpAdapter, Error> {
        let mask = Tensor::from_data(rows(site, "mask_token", &[mask_word(site)?])?, device);
        let prompt_embeddings = Param::from_tensor(prompt_embeddings);
        let transform = self.transform;
        Ok(WarpAdapter::Front(MaskedPrompt { prompt_embeddings, mask, transform }))
    }
}

impl Method for Warp {
    type Adapter = WarpAdapter;
    /// Of a file the prompts, or of a fresh adapter the rows of words that `θ` begins as.
    type Shared = Option<Tensor<2>>;
    const NAME: &'static str = "WARP";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const PREFIXES: [&'static str; 2] = PREFIXES;
    const ANSWERS: bool = true;

    in_front!(self);

    fn check(&self) -> Result<(), Error> {
        between("num_prompts", self.num_prompts, 1, 1 << 16)?;
        match &self.targets.modules_to_save {
            None => Ok(()),
            Some(names) => {
                let reason = format!(
                    "expected none, since {} trains prompts and class vectors alone, found {}; train layers by another \
                     method beside it",
                    Self::NAME,
                    names.join(", ")
                );
                Err(Error::config("modules_to_save", reason))
            }
        }
    }

    fn draws(&self) -> bool {
        self.class_tokens.is_none() || self.prompt_init == WarpInit::SampleVocab
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let words = sites.iter().find(|site| site.kind == Kind::Embedding);
        let (Some(words), Some(tokens)) = (words, &self.class_tokens) else { return Ok(None) };
        Ok(Some(Tensor::from_data(rows(words, "class_tokens", tokens)?, device)))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<WarpAdapter, Error> {
        if site.kind != Kind::Embedding {
            let shape = [site.fan_out(), site.fan_in()];
            bounded("num_labels", &site.path, shape)?;
            let drawn = || Draw::Normal(0.0, 0.02).tensor(shape, rng, device);
            let verbalizer = Param::from_tensor(shared.clone().unwrap_or_else(drawn));
            return Ok(WarpAdapter::Verbalizer(Verbalizer { verbalizer }));
        }
        bounded("num_prompts", &site.path, [self.num_prompts, site.fan_out()])?;
        let ids: Vec<usize> = match self.prompt_init {
            WarpInit::Mask => vec![mask_word(site)?; self.num_prompts],
            WarpInit::SampleVocab => {
                (0..self.num_prompts).map(|_| rng.random_range(0..site.fan_in())).collect()
            }
        };
        let begins = Tensor::from_data(rows(site, "num_prompts", &ids)?, device);
        self.front(site, begins, device)
    }

    fn samples(_targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3);
        vec![
            Self { transform: false, prompt_init: WarpInit::SampleVocab, ..plain.clone() },
            // A class for each output of the probe.
            Self { class_tokens: Some(vec![4, 2, 7, 1]), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        match site.kind {
            Kind::Embedding => self.num_prompts * site.fan_out(),
            _ => site.fan_in() * site.fan_out(),
        }
    }

    fn tensors(&self, _site: &Site, adapter: &WarpAdapter) -> Vec<(&'static str, TensorData)> {
        match adapter {
            WarpAdapter::Front(_) => Vec::new(),
            WarpAdapter::Verbalizer(Verbalizer { verbalizer }) => {
                vec![(VERBALIZER, verbalizer.val().into_data())]
            }
        }
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<WarpAdapter, Error> {
        if site.kind != Kind::Embedding {
            let read = file.take(VERBALIZER, [site.fan_out(), site.fan_in()], device)?;
            return Ok(WarpAdapter::Verbalizer(Verbalizer {
                verbalizer: Param::from_tensor(read),
            }));
        }
        let prompts = shared.clone().ok_or_else(|| Error::place(&site.path, UNREAD))?;
        self.front(site, prompts, device)
    }

    fn shared_tensors(&self, adapters: &[&WarpAdapter]) -> Vec<(String, TensorData)> {
        let prompts = adapters.iter().filter_map(|adapter| match adapter {
            WarpAdapter::Front(front) => Some(front.prompt_embeddings.val().into_data()),
            WarpAdapter::Verbalizer(_) => None,
        });
        prompts.map(|data| (EMBEDDINGS.to_owned(), data)).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let words = sites.iter().find(|site| site.kind == Kind::Embedding);
        let take = |site: &&Site| file.take(EMBEDDINGS, [self.num_prompts, site.fan_out()], device);
        words.map(take).transpose()
    }
}

/// The name of `θ` after the output layer's path.
const VERBALIZER: &str = "weight";
