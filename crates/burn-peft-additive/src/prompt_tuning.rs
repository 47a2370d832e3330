//! Prompt tuning: trained virtual tokens in front of the embedded ones (arXiv 2104.08691).

use crate::numbers::STANDARD;
use crate::prompt::{EMBEDDINGS, PREFIXES, VirtualTokens, in_front, only_saved, saved_only, words};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, PlaceTensors, SeenTokens, Site, Targets};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Prompt tuning (arXiv 2104.08691): the model reads `[P; E(x)]`, `P [n, hidden]` trained, the same for
/// every row.
///
/// Parameters: `n·hidden`. Positions, mask and sentence numbers go on over the virtual tokens as in HF PEFT:
/// they are never padding, and a classifier of BERT's reads the first of them. Acts on activations only: it
/// does not fold, and rows of one batch cannot have prompts of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTuning {
    /// How many virtual tokens, and what HF PEFT says of the model beside.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// How `P` begins; default random.
    pub prompt_tuning_init: PromptInit,
    /// The text whose words `P` begins as, repeated or cut to `n` tokens.
    pub prompt_tuning_init_text: Option<String>,
    /// Folder of the text's tokenizer; default: the model's.
    pub tokenizer_name_or_path: Option<String>,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
    /// Tokens of the text, once they are known.
    #[serde(skip)]
    pub tokens: Option<Vec<u32>>,
}

/// How the virtual tokens of [`PromptTuning`] begin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptInit {
    /// `N(0, 1)`.
    #[default]
    Random,
    /// As words of the model that are drawn at random.
    SampleVocab,
    /// As the words of `prompt_tuning_init_text`.
    Text,
}

/// The virtual tokens.
#[derive(Module, Debug)]
pub struct Prompt {
    /// `P [n, hidden]`.
    pub prompt_embeddings: Param<Tensor<2>>,
}

impl Adapter for Prompt {
    fn prompt(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.prompt_embeddings.val().unsqueeze())
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt_embeddings.dims()[0]
    }
}

impl PromptTuning {
    /// With this many virtual tokens that begin at random.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { virtual_tokens: VirtualTokens::of(num_virtual_tokens), ..Self::default() }
    }

    /// The words that the virtual tokens begin as.
    fn ids(&self, vocabulary: usize, rng: &mut ChaCha8Rng) -> Result<Option<Vec<i32>>, Error> {
        let n = self.virtual_tokens.num_virtual_tokens;
        const FIELD: &str = "prompt_tuning_init_text";
        match (self.prompt_tuning_init, &self.tokens) {
            (PromptInit::Random, _) => Ok(None),
            (PromptInit::SampleVocab, _) => {
                Ok(Some((0..n).map(|_| rng.random_range(0..vocabulary) as i32).collect()))
            }
            (PromptInit::Text, None) => Err(Error::config(
                FIELD,
                "expected its tokens to be known; found that nobody told them",
            )),
            (PromptInit::Text, Some(ids)) if ids.is_empty() => {
                Err(Error::config(FIELD, "expected a text of one token or more, found none"))
            }
            (PromptInit::Text, Some(ids)) => {
                match ids.iter().find(|id| **id as usize >= vocabulary) {
                    None => Ok(Some(ids.iter().cycle().take(n).map(|id| *id as i32).collect())),
                    Some(id) => {
                        let reason = format!(
                            "expected tokens below {vocabulary}, as the model has them, found {id}; is \
                             it the model's tokenizer?"
                        );
                        Err(Error::config("tokenizer_name_or_path", reason))
                    }
                }
            }
        }
    }
}

impl Method for PromptTuning {
    type Adapter = Prompt;
    type Shared = Option<Prompt>;
    const NAME: &'static str = "PROMPT_TUNING";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(words);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        match (self.prompt_tuning_init, &self.prompt_tuning_init_text) {
            (PromptInit::Text, None) => {
                let reason = "is not set; prompt_tuning_init = \"TEXT\" begins with its words";
                Err(Error::config("prompt_tuning_init_text", reason))
            }
            _ => Ok(()),
        }
    }

    fn draws(&self) -> bool {
        self.prompt_tuning_init != PromptInit::Text
    }

    fn text(&self) -> Option<(&str, Option<&str>)> {
        let text = self.prompt_tuning_init_text.as_deref()?;
        let asked = self.prompt_tuning_init == PromptInit::Text;
        asked.then_some((text, self.tokenizer_name_or_path.as_deref()))
    }

    fn tokenized(mut self, ids: &[u32], tokenizer: &str) -> Self {
        self.tokens = Some(ids.to_vec());
        // HF PEFT refuses a text without it, also when it only reads the file.
        self.tokenizer_name_or_path.get_or_insert_with(|| tokenizer.to_owned());
        self
    }

    fn init(
        &self,
        site: &Site,
        _shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Prompt, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        self.virtual_tokens.fits(site, width)?;
        let rows = self.ids(site.fan_in(), rng)?.and_then(|ids| {
            let at = site.device().inner();
            site.rows(Tensor::<1, Int>::from_data(TensorData::new(ids, [n]), &at))
        });
        let drawn = match rows {
            Some(rows) => Tensor::from_data(rows.into_data().convert::<f32>(), device),
            None => STANDARD.tensor([n, width], rng, device),
        };
        Ok(Prompt { prompt_embeddings: Param::from_tensor(drawn) })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3) };
        let text = Self {
            prompt_tuning_init: PromptInit::Text,
            prompt_tuning_init_text: Some("two words".into()),
            ..plain.clone()
        };
        vec![
            text.tokenized(&[4, 7], "a folder"),
            Self { prompt_tuning_init: PromptInit::SampleVocab, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.virtual_tokens.num_virtual_tokens * site.fan_out()
    }

    fn tensors(&self, _site: &Site, _adapter: &Prompt) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<Prompt, Error> {
        shared.clone().ok_or_else(|| Error::place(&site.path, crate::prompt::UNREAD))
    }

    fn shared_tensors(&self, adapters: &[&Prompt]) -> Vec<(String, TensorData)> {
        let data = |prompt: &&Prompt| prompt.prompt_embeddings.val().into_data();
        adapters.iter().map(|prompt| (EMBEDDINGS.to_owned(), data(prompt))).collect()
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

/// The virtual tokens of a file.
pub(crate) fn restored(
    asked: &VirtualTokens,
    sites: &[&Site],
    file: &mut PlaceTensors<'_>,
    device: &Device,
) -> Result<Option<Prompt>, Error> {
    let Some(site) = sites.first() else { return Ok(None) };
    asked.fits(site, site.fan_out())?;
    let table = file.take(EMBEDDINGS, [asked.num_virtual_tokens, site.fan_out()], device)?;
    Ok(Some(Prompt { prompt_embeddings: Param::from_tensor(table) }))
}
