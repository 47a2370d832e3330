//! PTP: prompt tuning over words that are shaken in training (arXiv 2305.02423).

use crate::fields::{finite, positive};
use crate::numbers::STANDARD;
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, in_front, only_saved, saved_only, words,
};
use crate::prompt_ptp_adversary::Adversary;
use crate::prompt_tuning::{Prompt, restored};
use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Adapters, Beside, Error, Kind, Method, PlaceTensors, SeenTokens, Site, Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Prompt tuning with a perturbation-based regularizer (arXiv 2305.02423, section 4), in the space of embeddings: by random
/// noise (PTP-RN), or by adversarial noise (PTP-ADV), which is off by default ([`Ptp::adversarial`]).
///
/// - Random: the model reads `[P; E(x) + δ]` in training, with `δ ~ N(0, σ²)` drawn anew for every number of every pass, and
///   `[P; E(x)]` after it. The loss is the mean over `δ`, which smooths it; no term is added.
/// - Adversarial: `L(E(x)) + λ · max_{‖δ‖ ≤ ε} L(E(x) + δ)`, with `L` the mean loss over a batch's targets. From `δ = 0` it
///   takes `J` steps `δ ← Π(δ + η · g/‖g‖)`, `g = ∂L/∂δ` and `Π` the way back into the ball, with everything trained held
///   still; the gradients of the step then flow through the pass at the last `δ`, which is a constant to them. `‖·‖` is the
///   Euclidean norm over all numbers of a row `[seq, hidden]`, so that no row depends on the others of its batch. `δ` is 0 at
///   padding and at virtual tokens. A step costs `J` forward and backward passes more for the search, and one for the
///   term, whose activations are held together with those of the loss itself.
///
/// The paper's text was not at hand: that the plain loss stays beside the adversarial one (`λ = 0` is plain prompt tuning), the
/// ball, the start at 0, the step along `g/‖g‖` and the defaults of `σ`, `J`, `ε` and `η` are our choices.
///
/// `P [n, hidden] ~ N(0, 1)`. Parameters: `n·hidden`. The noise of words in the space of texts is not here. HF PEFT does
/// not have it: the same file. All else is as in [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ptp {
    /// How many virtual tokens, and what HF PEFT says of the model beside.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// `σ`; default 0.01, which is our choice: words of BERT are some 0.05 large.
    pub sigma: f64,
    /// `λ`, the weight of the loss at adversarial words; default 0, for none.
    pub adversarial_weight: f64,
    /// `J`; default 2.
    pub adversarial_steps: usize,
    /// `ε`; default 0.3. A row of 40 words of BERT is some 9 long.
    pub adversarial_radius: f64,
    /// `η`; default 0.2, so that two steps reach the ball's edge.
    pub adversarial_rate: f64,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for Ptp {
    fn default() -> Self {
        Self::new(20, 0.01)
    }
}

/// The virtual tokens, and how much words are shaken.
#[derive(Module, Debug)]
pub struct ShakenPrompt {
    /// `P`.
    pub prompt: Prompt,
    /// `σ`.
    pub sigma: f64,
}

impl Adapter for ShakenPrompt {
    fn embedding(
        &self,
        _layer: &Embedding,
        _ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let prompt = self.prompt.prompt_embeddings.val();
        if self.sigma == 0.0 || !prompt.is_autodiff() {
            return None;
        }
        let noise = Distribution::Normal(0.0, self.sigma);
        Some(Tensor::<3>::random(y.dims(), noise, &prompt.device().inner()).cast(y.dtype()))
    }

    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        self.prompt.prompt(x, tokens)
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt.virtual_tokens()
    }
}

impl Ptp {
    /// With this many virtual tokens and this noise.
    pub fn new(num_virtual_tokens: usize, sigma: f64) -> Self {
        Self {
            virtual_tokens: VirtualTokens::of(num_virtual_tokens),
            sigma,
            adversarial_weight: 0.0,
            adversarial_steps: 2,
            adversarial_radius: 0.3,
            adversarial_rate: 0.2,
            targets: Targets::default(),
        }
    }

    /// PTP-ADV: with this many virtual tokens, this `λ`, and no random noise.
    pub fn adversarial(num_virtual_tokens: usize, weight: f64) -> Self {
        Self { adversarial_weight: weight, ..Self::new(num_virtual_tokens, 0.0) }
    }
}

impl Method for Ptp {
    type Adapter = ShakenPrompt;
    type Shared = Option<Prompt>;
    const NAME: &'static str = "PTP";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(words);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        positive("adversarial_steps", self.adversarial_steps)?;
        for (field, value, zero) in [
            ("sigma", self.sigma, true),
            ("adversarial_weight", self.adversarial_weight, true),
            ("adversarial_radius", self.adversarial_radius, false),
            ("adversarial_rate", self.adversarial_rate, false),
        ] {
            finite(field, value)?;
            if value < 0.0 || (value == 0.0 && !zero) {
                let expected = if zero { "0 or more" } else { "more than 0" };
                return Err(Error::config(field, format!("expected {expected}, found {value}")));
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
    ) -> Result<ShakenPrompt, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        self.virtual_tokens.fits(site, width)?;
        let prompt_embeddings = Param::from_tensor(STANDARD.tensor([n, width], rng, device));
        Ok(ShakenPrompt { prompt: Prompt { prompt_embeddings }, sigma: self.sigma })
    }

    fn beside(&self, adapters: &Adapters<ShakenPrompt>) -> Option<Box<dyn Beside>> {
        Some(Box::new(Adversary::of(self, adapters)?))
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let noisy = Self { targets: only_saved(targets), ..Self::new(3, 0.1) };
        vec![Self { targets: only_saved(targets), ..Self::adversarial(3, 0.5) }, noisy]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.virtual_tokens.num_virtual_tokens * site.fan_out()
    }

    fn tensors(&self, _site: &Site, _adapter: &ShakenPrompt) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<ShakenPrompt, Error> {
        let prompt = shared.clone().ok_or_else(|| Error::place(&site.path, UNREAD))?;
        Ok(ShakenPrompt { prompt, sigma: self.sigma })
    }

    fn shared_tensors(&self, adapters: &[&ShakenPrompt]) -> Vec<(String, TensorData)> {
        let data = |of: &&ShakenPrompt| of.prompt.prompt_embeddings.val().into_data();
        adapters.iter().map(|of| (EMBEDDINGS.to_owned(), data(of))).collect()
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
