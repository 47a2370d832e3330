//! P-tuning: virtual tokens that come out of a small network while they are trained (arXiv 2103.10385).

use crate::fields::probability;
use crate::numbers::STANDARD;
use crate::p_tuning_encoder::PromptEncoder;
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, between, in_front, only_saved, saved_only, words,
};
use crate::prompt_tuning::{Prompt, restored};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, PlaceTensors, SeenTokens, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// P-tuning (arXiv 2103.10385) as HF PEFT has it: the model reads `[f(E); E(x)]`, with an embedding
/// `E [n, hidden]` and a network `f` trained, the same for every row.
///
/// `f` is `hidden → h → h → hidden` with `relu` between ("MLP"), or a bidirectional LSTM of
/// `encoder_num_layers` layers and `2·h → 2·h → hidden` ("LSTM"). Only what comes out, `[n, hidden]`, is written,
/// as HF PEFT does, without dropout. Parameters: `n·hidden` and those of `f`. All else is as in
/// [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PTuning {
    /// How many virtual tokens, and what HF PEFT says of the model beside.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// `f`; default "MLP".
    pub encoder_reparameterization_type: Reparameterization,
    /// `h`; default: the model's hidden size.
    pub encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM; default 2. The MLP has three, whatever stands here.
    pub encoder_num_layers: usize,
    /// Between layers of the LSTM, in training; default 0.
    pub encoder_dropout: f64,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

/// The network of [`PTuning`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Reparameterization {
    /// Three linear layers.
    #[default]
    Mlp,
    /// A bidirectional LSTM and two linear layers.
    Lstm,
}

impl Default for PTuning {
    fn default() -> Self {
        Self {
            virtual_tokens: VirtualTokens::default(),
            encoder_reparameterization_type: Reparameterization::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            targets: Targets::default(),
        }
    }
}

/// The virtual tokens.
#[derive(Module, Debug)]
pub struct EncodedPrompt {
    /// `E [n, hidden]`, or the virtual tokens themselves where a file held them.
    pub prompt: Prompt,
    /// Makes the virtual tokens in training.
    pub encoder: Option<PromptEncoder>,
}

impl EncodedPrompt {
    /// The virtual tokens, `[n, hidden]`.
    fn tokens(&self, drop: bool) -> Tensor<2> {
        let table = self.prompt.prompt_embeddings.val();
        match &self.encoder {
            None => table,
            Some(encoder) => encoder.forward(table, drop),
        }
    }
}

impl Adapter for EncodedPrompt {
    fn prompt(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.tokens(true).unsqueeze())
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt.virtual_tokens()
    }
}

impl PTuning {
    /// With this many virtual tokens that come out of an MLP.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { virtual_tokens: VirtualTokens::of(num_virtual_tokens), ..Self::default() }
    }
}

impl Method for PTuning {
    type Adapter = EncodedPrompt;
    type Shared = Option<Prompt>;
    const NAME: &'static str = "P_TUNING";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(words);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        between("encoder_num_layers", self.encoder_num_layers, 1, 64)?;
        if let Some(hidden) = self.encoder_hidden_size {
            between("encoder_hidden_size", hidden, 1, 1 << 16)?;
        }
        probability("encoder_dropout", self.encoder_dropout)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<EncodedPrompt, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        self.virtual_tokens.fits(site, width)?;
        let prompt_embeddings = Param::from_tensor(STANDARD.tensor([n, width], rng, device));
        let h = self.encoder_hidden_size.unwrap_or(width);
        let encoder = match self.encoder_reparameterization_type {
            Reparameterization::Mlp => PromptEncoder::mlp(width, h, rng, device),
            Reparameterization::Lstm => {
                let (layers, dropout) = (self.encoder_num_layers, self.encoder_dropout);
                PromptEncoder::lstm(width, h, layers, dropout, rng, device)
            }
        };
        Ok(EncodedPrompt { prompt: Prompt { prompt_embeddings }, encoder: Some(encoder) })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3) };
        let lstm = Self {
            encoder_reparameterization_type: Reparameterization::Lstm,
            encoder_hidden_size: Some(5),
            ..plain.clone()
        };
        vec![
            Self { encoder_num_layers: 1, ..lstm.clone() },
            Self { encoder_dropout: 0.2, ..lstm },
            Self { encoder_hidden_size: Some(12), ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (n, d) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        let h = self.encoder_hidden_size.unwrap_or(d);
        let dense = |fan_in, fan_out| (fan_in + 1) * fan_out;
        let lstm = |fan_in| 2 * (dense(fan_in, 4 * h) + dense(h, 4 * h));
        n * d
            + match self.encoder_reparameterization_type {
                Reparameterization::Mlp => dense(d, h) + dense(h, h) + dense(h, d),
                Reparameterization::Lstm => {
                    let above = (self.encoder_num_layers - 1) * lstm(2 * h);
                    lstm(d) + above + dense(2 * h, 2 * h) + dense(2 * h, d)
                }
            }
    }

    fn tensors(&self, _site: &Site, _adapter: &EncodedPrompt) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<EncodedPrompt, Error> {
        let prompt = shared.clone().ok_or_else(|| Error::place(&site.path, UNREAD))?;
        Ok(EncodedPrompt { prompt, encoder: None })
    }

    fn shared_tensors(&self, adapters: &[&EncodedPrompt]) -> Vec<(String, TensorData)> {
        let data = |prompt: &&EncodedPrompt| prompt.tokens(false).into_data();
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
