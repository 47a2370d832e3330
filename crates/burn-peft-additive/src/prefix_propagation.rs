//! Prefix propagation: a prefix of states that goes through the blocks, and is added to in front of each (arXiv 2305.12086).

use crate::numbers::Draw;
use crate::prompt::{between, blocks, in_front, only_saved, saved_only};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Targets};
use serde::{Deserialize, Serialize};

/// Prefix propagation (arXiv 2305.12086, section 3): block `i` reads `[Hᵢ + Pᵢ; X]`, where `X` are the states of the
/// sequence and `Hᵢ` what the block before made of the `n` of the prefix, none at the first.
///
/// `P [blocks, n, hidden]` is trained, `N(0, 0.02²)` at first, as BERT's own weights: our choice. Parameters:
/// `blocks·n·hidden`, half of prefix tuning's, whose keys and values are apart. Two things are not the authors': their
/// prefix passes the embeddings as tokens of zeros, whose positions and norm `P₁` takes up here; and the sequence's
/// positions don't move. A classifier reads the token that it reads without the prefix, as theirs. It does not fold. HF PEFT
/// does not have it; the file holds `prefix`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixPropagation {
    /// `n`; default 20.
    pub num_virtual_tokens: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for PrefixPropagation {
    fn default() -> Self {
        Self::new(20)
    }
}

/// The prefixes of all blocks.
#[derive(Module, Debug)]
pub struct PropagatedPrefix {
    /// `P [blocks, n, hidden]`.
    pub prefix: Param<Tensor<3>>,
}

impl Adapter for PropagatedPrefix {
    fn carried(
        &self,
        block: usize,
        _x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        _: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        let own = self.prefix.val().narrow(0, block, 1); // [1, n, hidden]
        Some(match held {
            Some(held) => held.clone() + own.cast(held.dtype()),
            None => own,
        })
    }

    fn virtual_tokens(&self) -> usize {
        self.prefix.dims()[1]
    }
}

impl PrefixPropagation {
    /// With this many states in front of each block's.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { num_virtual_tokens, targets: Targets::default() }
    }

    fn shape(&self, site: &Site) -> [usize; 3] {
        [site.fan_in(), self.num_virtual_tokens, site.fan_out()]
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<PropagatedPrefix, Error> {
        let prefix = from.take("prefix", self.shape(site), Draw::Normal(0.0, 0.02))?;
        Ok(PropagatedPrefix { prefix })
    }
}

impl Method for PrefixPropagation {
    type Adapter = PropagatedPrefix;
    type Shared = ();
    const NAME: &'static str = "PREFIX_PROPAGATION";
    const KINDS: &'static [Kind] = &[Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(blocks);
    built!(PropagatedPrefix);

    fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 12)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        vec![Self { targets: only_saved(targets), ..Self::new(3) }]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).iter().product()
    }

    fn tensors(&self, _site: &Site, adapter: &PropagatedPrefix) -> Vec<(&'static str, TensorData)> {
        vec![("prefix", adapter.prefix.val().into_data())]
    }
}
