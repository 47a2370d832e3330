//! APrompt: prompts of queries, keys and values inside every attention (EMNLP 2023, Wang and others).

use crate::numbers::{Draw, STANDARD};
use crate::prompt::{attentions, between, blocks, in_front, only_saved, saved_only};
use crate::source::{Source, built};
use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, SeenTokens, Site, Sites, Targets};
use serde::{Deserialize, Serialize};

/// Attention prompt tuning (APrompt, EMNLP 2023, section 4): block `j` reads `[P_iʲ; X]`, and its attention mixes
/// `softmax(Q_new·K_newᵀ/√d)·V_new` with `Q_new = [Q, P_q]`, `K_new = [P_kv; [K, P_k]]` and `V_new = [P_v; V]`.
///
/// - Input prompts `P_i [blocks, n, hidden]`, of which the next block reads its own.
/// - Key-value prompts `P_kv`, `P_v [m, width]`: further rows, which all tokens see, as in prefix tuning.
/// - Query-key prompts `P_q`, `P_k [max_length, r]`: further features, a row for each column that the attention reads, the
///   input prompts' first. They add `P_q·P_kᵀ` to `Q·Kᵀ`, and what is mixed stays as long as it was.
///
/// The last is how we read the paper, which has no published code: a further row of queries would be a further row of
/// what is mixed, which nobody reads, as only the text's rows go on (section 3.2), and so would change nothing; and further
/// rows of keys alone would be more than there are values. Our choice too: query-key prompts are one for all heads, a
/// padded column counts as one, columns from `max_length` on have none, and nor has what reads an encoder's output.
/// Documents packed into one row count columns together.
///
/// `P_i ~ N(0, 0.02²)`; `P_kv`, `P_v`, `P_k ~ N(0, 1)`; `P_q = 0`. Parameters: `blocks·n·hidden`, and
/// `2·m·width + 2·max_length·r` an attention. It does not fold. HF PEFT does not have it: the same layout. Positions go on
/// over the keys as in [`PrefixTuning`](crate::PrefixTuning).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct APrompt {
    /// `n`; default 10, as in the paper.
    pub num_virtual_tokens: usize,
    /// `m`; default 10; the paper searches 1, 5, 10, 20 and 50.
    pub key_value_length: usize,
    /// `r`; default 10; searched likewise.
    pub query_key_length: usize,
    /// Columns that have query-key prompts; default 128.
    pub max_length: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for APrompt {
    fn default() -> Self {
        Self::new(10, 10, 10)
    }
}

/// The input prompts at the list of blocks, or what an attention has of its own.
#[derive(Module, Debug)]
pub struct AttentionPrompts {
    /// `P_i [blocks, n, hidden]`.
    pub input: Option<Param<Tensor<3>>>,
    /// `[P_kv, P_v] [m, 2·width]`, keys beside values.
    pub key_value: Option<Param<Tensor<2>>>,
    /// `P_q [max_length, r]`.
    pub query: Option<Param<Tensor<2>>>,
    /// `P_k [max_length, r]`.
    pub key: Option<Param<Tensor<2>>>,
}

/// Names of its tensors in the file.
const NAMES: [&str; 4] = ["input_prompts", "key_value_prompts", "query_prompts", "key_prompts"];

/// The last `count` of `total` rows of `prompts`, behind which all rows are 0.
fn rows(prompts: &Param<Tensor<2>>, count: usize, total: usize) -> Tensor<2> {
    let prompts = prompts.val();
    let [length, r] = prompts.dims();
    let all = match total.saturating_sub(length) {
        0 => prompts,
        more => {
            let none = Tensor::zeros([more, r], (&prompts.device().inner(), prompts.dtype()));
            Tensor::cat(vec![prompts, none], 0)
        }
    };
    all.narrow(0, total - count, count)
}

impl Adapter for AttentionPrompts {
    fn carried(
        &self,
        block: usize,
        _x: &Tensor<3>,
        _held: Option<&Tensor<3>>,
        _: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        self.input.as_ref().map(|input| input.val().narrow(0, block, 1)) // [1, n, hidden]
    }

    fn prefix(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        let both = self.key_value.as_ref()?.val().unsqueeze::<3>(); // [1, m, 2·width]
        let width = both.dims()[2] / 2;
        Some([0, 1].map(|part| both.clone().narrow(2, part * width, width)))
    }

    fn products(&self, count: usize, total: usize) -> Option<Tensor<2>> {
        let (query, key) = (self.query.as_ref()?, self.key.as_ref()?);
        Some(rows(query, count, total).matmul(rows(key, total, total).transpose()))
    }

    fn virtual_tokens(&self) -> usize {
        let input = self.input.as_ref().map(|input| input.dims()[1]);
        input.or(self.key_value.as_ref().map(|both| both.dims()[0])).unwrap_or(0)
    }
}

impl APrompt {
    /// With input prompts, key-value prompts and query-key prompts of these lengths.
    pub fn new(
        num_virtual_tokens: usize,
        key_value_length: usize,
        query_key_length: usize,
    ) -> Self {
        let targets = Targets::default();
        Self { num_virtual_tokens, key_value_length, query_key_length, max_length: 128, targets }
    }

    fn places_of<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>, Error> {
        Ok([blocks(sites)?, attentions(sites)?].concat())
    }

    fn build(&self, site: &Site, from: &mut impl Source) -> Result<AttentionPrompts, Error> {
        let mut made = AttentionPrompts { input: None, key_value: None, query: None, key: None };
        if site.kind == Kind::Blocks {
            let shape = [site.fan_in(), self.num_virtual_tokens, site.fan_out()];
            made.input = Some(from.take(NAMES[0], shape, Draw::Normal(0.0, 0.02))?);
        } else {
            let both = [self.key_value_length, 2 * site.fan_out()];
            let features = [self.max_length, self.query_key_length];
            made.key_value = Some(from.take(NAMES[1], both, STANDARD)?);
            made.query = Some(from.take(NAMES[2], features, Draw::Constant(0.0))?);
            made.key = Some(from.take(NAMES[3], features, STANDARD)?);
        }
        Ok(made)
    }
}

impl Method for APrompt {
    type Adapter = AttentionPrompts;
    type Shared = ();
    const NAME: &'static str = "APROMPT";
    const KINDS: &'static [Kind] = &[Kind::Attention, Kind::Blocks];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    in_front!(self);
    built!(AttentionPrompts);

    fn check(&self) -> Result<(), Error> {
        for (field, length) in [
            ("num_virtual_tokens", self.num_virtual_tokens),
            ("key_value_length", self.key_value_length),
            ("query_key_length", self.query_key_length),
        ] {
            between(field, length, 1, 1 << 12)?;
        }
        between("max_length", self.max_length, 1, 1 << 16)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3, 2, 4) };
        vec![Self { max_length: 4, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        match site.kind {
            Kind::Blocks => site.fan_in() * self.num_virtual_tokens * site.fan_out(),
            _ => {
                let key_value = self.key_value_length * site.fan_out();
                2 * key_value + 2 * self.max_length * self.query_key_length
            }
        }
    }

    fn tensors(&self, _site: &Site, adapter: &AttentionPrompts) -> Vec<(&'static str, TensorData)> {
        let input = adapter.input.iter().map(|input| (NAMES[0], input.val().into_data()));
        let own = [&adapter.key_value, &adapter.query, &adapter.key];
        let named = NAMES[1..].iter().zip(own);
        let own = named.filter_map(|(name, own)| Some((*name, own.as_ref()?.val().into_data())));
        input.chain(own).collect()
    }
}
