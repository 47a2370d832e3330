//! XPrompt: a prompt that is pruned by tokens and by pieces of tokens, and trained again (arXiv 2210.04457).

use crate::numbers::STANDARD;
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, between, in_front, only_saved, saved_only, words,
};
use crate::prompt_tuning::restored;
use crate::prompt_xprompt_policy::Pruning;
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Buffer, Error, Kind, Method, PlaceTensors, Policy, SeenTokens, Site, Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// XPrompt (arXiv 2210.04457): the model reads `[M·P; E(x)]` without the rows of the mask `M` that are all 0.
///
/// `P [n, hidden]` is trained first as a prompt. Then the tokens that matter least are left out, by
/// `Σ |∂L/∂γᵢ| = Σ |Pᵢ·∂L/∂Pᵢ|` over some batches, and then the pieces of those that stay, likewise; `P` goes
/// back to where it began, and what is left is trained for the rest of the steps. Parameters: `n·hidden`, of which
/// those that are left are written. HF PEFT does not have it: the same file. All else is as in
/// [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct XPrompt {
    /// How many virtual tokens; after a training, how many are left.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// Pieces of a token; default 16, as in the paper.
    pub num_pieces: usize,
    /// Share of the tokens that stay; default 0.5.
    pub token_share: f64,
    /// Share of their pieces that stay; default 0.5.
    pub piece_share: f64,
    /// Share of the steps before tokens are left out; default 0.4.
    pub prune_at: f64,
    /// Share of the steps over which it is measured what matters, before each of the two cuts; default 0.1.
    pub measured: f64,
    /// Steps of the whole training; default: as many as it has.
    pub total_step: Option<usize>,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for XPrompt {
    fn default() -> Self {
        Self {
            virtual_tokens: VirtualTokens::default(),
            num_pieces: 16,
            token_share: 0.5,
            piece_share: 0.5,
            prune_at: 0.4,
            measured: 0.1,
            total_step: None,
            targets: Targets::default(),
        }
    }
}

/// The virtual tokens, and which of their numbers stay.
#[derive(Module, Debug)]
pub struct PrunedPrompt {
    /// `P [n, hidden]`.
    pub prompt_embeddings: Param<Tensor<2>>,
    /// `M [n, hidden]`, 1 for what stays and 0 for what does not.
    pub mask: Buffer<2>,
    /// Where `P` began.
    pub start: Buffer<2>,
}

impl PrunedPrompt {
    pub(crate) fn new(prompt: Tensor<2>) -> Self {
        Self {
            mask: Buffer::new(prompt.ones_like()),
            start: Buffer::new(prompt.clone()),
            prompt_embeddings: Param::from_tensor(prompt),
        }
    }

    /// Numbers of the tokens that stay, in whole or in part.
    pub(crate) fn kept(&self) -> Vec<usize> {
        let sums = self.mask.val().sum_dim(1).into_data().convert::<f32>();
        let sums = sums.iter::<f32>().enumerate().filter(|(_, sum)| *sum > 0.0);
        sums.map(|(token, _)| token).collect()
    }

    /// What the model reads, `[tokens that stay, hidden]`.
    fn tokens(&self) -> Tensor<2> {
        let prompt = self.prompt_embeddings.val();
        let masked = prompt.clone() * self.mask.val();
        let kept = self.kept();
        if kept.len() == prompt.dims()[0] {
            return masked;
        }
        let at: Vec<i32> = kept.iter().map(|&token| token as i32).collect();
        let data = TensorData::new(at, [kept.len()]);
        masked.select(0, Tensor::<1, Int>::from_data(data, &prompt.device().inner()))
    }
}

impl Adapter for PrunedPrompt {
    fn prompt(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.tokens().unsqueeze())
    }

    fn virtual_tokens(&self) -> usize {
        self.kept().len()
    }
}

impl Method for XPrompt {
    type Adapter = PrunedPrompt;
    type Shared = Option<PrunedPrompt>;
    const NAME: &'static str = "XPROMPT";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(words);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        between("num_pieces", self.num_pieces, 1, 1 << 16)?;
        for (field, share) in [
            ("token_share", self.token_share),
            ("piece_share", self.piece_share),
            ("prune_at", self.prune_at),
            ("measured", self.measured),
        ] {
            if !(share > 0.0 && share <= 1.0) {
                let reason = format!("expected a share in (0, 1], found {share}");
                return Err(Error::config(field, reason));
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
    ) -> Result<PrunedPrompt, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        self.virtual_tokens.fits(site, width)?;
        between("num_pieces", self.num_pieces, 1, width)?;
        Ok(PrunedPrompt::new(STANDARD.tensor([n, width], rng, device)))
    }

    fn planned(self, steps: usize) -> Self {
        Self { total_step: self.total_step.or(Some(steps)), ..self }
    }

    fn policy(
        &self,
        _adapters: &Adapters<PrunedPrompt>,
    ) -> Result<Option<Box<dyn Policy<PrunedPrompt>>>, Error> {
        Ok(Some(Box::new(Pruning::new(self)?)))
    }

    /// As many virtual tokens as are left.
    fn finished(mut self, adapters: &Adapters<PrunedPrompt>) -> Self {
        if let Some((_, adapter)) = adapters.iter().next() {
            self.virtual_tokens.num_virtual_tokens = adapter.kept().len();
        }
        self
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let virtual_tokens = VirtualTokens::of(4);
        let plain = Self { virtual_tokens, targets: only_saved(targets), ..Self::default() };
        vec![Self {
            num_pieces: 4,
            token_share: 0.6,
            piece_share: 0.7,
            prune_at: 0.3,
            measured: 0.2,
            total_step: Some(20),
            ..plain
        }]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.virtual_tokens.num_virtual_tokens * site.fan_out()
    }

    fn tensors(&self, _site: &Site, _adapter: &PrunedPrompt) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<PrunedPrompt, Error> {
        shared.clone().ok_or_else(|| Error::place(&site.path, UNREAD))
    }

    fn shared_tensors(&self, adapters: &[&PrunedPrompt]) -> Vec<(String, TensorData)> {
        let data = |prompt: &&PrunedPrompt| prompt.tokens().into_data();
        adapters.iter().map(|prompt| (EMBEDDINGS.to_owned(), data(prompt))).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let found = restored(&self.virtual_tokens, sites, file, device)?;
        Ok(found.map(|prompt| PrunedPrompt::new(prompt.prompt_embeddings.val())))
    }
}
