//! PASTA: vectors added to the states of special tokens (arXiv 2210.04382).

use crate::fields::{bounded, distinct};
use crate::numbers::Draw;
use crate::source::Source;
use crate::trainable_tokens::{is_token, token_tensor};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Hidden, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// PASTA (arXiv 2210.04382): `h' = h + eₖ` where `h` is the state of the special token number `k`, and `h` at
/// all other tokens. `e [tokens, hidden]` is zero at first.
///
/// Over hidden states. The paper adds before each self-attention: at `embeddings` and at every block but the
/// last. Parameters: `tokens·hidden` a place. It does not fold. HF PEFT does not have it; the file holds
/// `pasta_vectors`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pasta {
    /// Ids of the special tokens, each once; default 101 and 102, BERT's `[CLS]` and `[SEP]`.
    pub special_tokens: Vec<usize>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Pasta {
    fn default() -> Self {
        Self { special_tokens: vec![101, 102], targets: Targets::default() }
    }
}

/// What PASTA trains at one place.
#[derive(Module, Debug)]
pub struct PastaAdapter {
    /// `e [tokens, hidden]`.
    pub pasta_vectors: Param<Tensor<2>>,
    /// The tokens' ids, `[tokens]`.
    pub special_tokens: Tensor<1, Int>,
}

impl Adapter for PastaAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let vectors = self.pasta_vectors.val();
        let ids = at.tokens.as_ref()?.ids.clone();
        let which = is_token(ids, &self.special_tokens).cast(vectors.dtype());
        Some(which.matmul(vectors.unsqueeze()).cast(at.y.dtype()))
    }
}

impl Pasta {
    /// With these special tokens.
    pub fn new(special_tokens: impl IntoIterator<Item = usize>, targets: Targets) -> Self {
        Self { special_tokens: special_tokens.into_iter().collect(), targets }
    }

    fn build(
        &self,
        site: &Site,
        device: &Device,
        from: &mut impl Source,
    ) -> Result<PastaAdapter, Error> {
        let shape = [self.special_tokens.len(), site.fan_out()];
        bounded("special_tokens", &site.path, shape)?;
        let pasta_vectors = from.take("pasta_vectors", shape, Draw::Constant(0.0))?;
        Ok(PastaAdapter {
            pasta_vectors,
            special_tokens: token_tensor(&self.special_tokens, device),
        })
    }
}

impl Method for Pasta {
    type Adapter = PastaAdapter;
    type Shared = ();
    const NAME: &'static str = "PASTA";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        distinct("special_tokens", &self.special_tokens)
    }

    fn draws(&self) -> bool {
        false
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<PastaAdapter, Error> {
        self.build(site, device, &mut crate::source::Fresh { rng, device })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self::new([0, 7], targets.clone())]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.special_tokens.len() * site.fan_out()
    }

    fn tensors(&self, _site: &Site, adapter: &PastaAdapter) -> Vec<(&'static str, TensorData)> {
        vec![("pasta_vectors", adapter.pasta_vectors.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<PastaAdapter, Error> {
        self.build(site, device, &mut crate::source::Stored { file, device })
    }
}
