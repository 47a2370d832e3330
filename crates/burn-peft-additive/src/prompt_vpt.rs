//! VPT: trained tokens among the patches of a vision transformer (arXiv 2203.12119).

use crate::fields::probability;
use crate::numbers::{Draw, dropped};
use crate::prompt::{between, blocks, in_front, only_saved, saved_only};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Visual prompt tuning (arXiv 2203.12119, section 3.2): the blocks `Lᵢ` of a transformer read `n` trained tokens beside
/// the class token `x` and the patches `E`. Shallow: `[x₁, Z₁, E₁] = L₁([x₀, P, E₀])`, and each block reads the `Zᵢ`
/// before it. Deep: `[xᵢ, _, Eᵢ] = Lᵢ([xᵢ₋₁, Pᵢ₋₁, Eᵢ₋₁])`, with tokens of its own for each block.
///
/// `P [n, hidden]`, or deep `[blocks, n, hidden]`, is `U(±√(6/(768 + hidden)))`, the authors' bound for patches of
/// 16 by 16 in colour. Positions are added before, so that among the patches or in front of all is the same place; a
/// classifier reads what it reads without, the class token or the patches. Parameters: `n·hidden`, deep
/// `blocks·n·hidden`. It does not fold. HF PEFT does not have it; the file holds `prompt_embeddings`. A model of text has
/// such blocks as well: there the tokens have no position, or one before the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vpt {
    /// `n`; default 5, as in the authors' configuration; their search goes to 200.
    pub num_virtual_tokens: usize,
    /// Whether each block has tokens of its own; default true.
    pub deep: bool,
    /// Probability that a number of `P` is zero in training; default 0.
    pub prompt_dropout: f64,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for Vpt {
    fn default() -> Self {
        Self::deep(5)
    }
}

/// The tokens of all blocks.
#[derive(Module, Debug)]
pub struct VisualPrompts {
    /// `P [blocks, n, hidden]`; shallow `[1, n, hidden]`.
    pub prompt_embeddings: Param<Tensor<3>>,
    /// Probability that a number of them is zero in training.
    pub dropout: f64,
}

impl Adapter for VisualPrompts {
    fn carried(
        &self,
        block: usize,
        x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        _: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        let prompts = self.prompt_embeddings.val();
        let [count, n, hidden] = prompts.dims();
        if block >= count {
            return held.cloned();
        }
        let [batch, _, _] = x.dims();
        let own = prompts.clone().narrow(0, block, 1).expand([batch, n, hidden]);
        Some(dropped(own, self.dropout, [batch, n, hidden], &prompts))
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt_embeddings.dims()[1]
    }
}

impl Vpt {
    /// With this many tokens of its own for each block.
    pub fn deep(num_virtual_tokens: usize) -> Self {
        let targets = Targets::default();
        Self { num_virtual_tokens, deep: true, prompt_dropout: 0.0, targets }
    }

    /// With this many tokens in front of the first block.
    pub fn shallow(num_virtual_tokens: usize) -> Self {
        Self { deep: false, ..Self::deep(num_virtual_tokens) }
    }

    fn shape(&self, site: &Site) -> [usize; 3] {
        [if self.deep { site.fan_in() } else { 1 }, self.num_virtual_tokens, site.fan_out()]
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<VisualPrompts, Error> {
        let bound = (6.0 / (768 + site.fan_out()) as f32).sqrt();
        Ok(VisualPrompts {
            prompt_embeddings: from.take(
                "prompt_embeddings",
                self.shape(site),
                Draw::Uniform(bound),
            )?,
            dropout: self.prompt_dropout,
        })
    }
}

impl Method for Vpt {
    type Adapter = VisualPrompts;
    type Shared = ();
    const NAME: &'static str = "VPT";
    const KINDS: &'static [Kind] = &[Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(blocks);
    built!(VisualPrompts);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)?;
        probability("prompt_dropout", self.prompt_dropout)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let of = |vpt: Self| Self { targets: only_saved(targets), ..vpt };
        vec![of(Self { prompt_dropout: 0.1, ..Self::shallow(3) }), of(Self::deep(2))]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).iter().product()
    }

    fn tensors(&self, _site: &Site, adapter: &VisualPrompts) -> Vec<(&'static str, TensorData)> {
        vec![("prompt_embeddings", adapter.prompt_embeddings.val().into_data())]
    }
}
