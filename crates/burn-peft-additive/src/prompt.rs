//! What all methods have in common that set something in front of a sequence.

use crate::numbers::Draw;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, Kind, SeenTokens, Site, Sites, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What stands before the names in HF PEFT's file: the virtual tokens belong to the model as a whole, and a
/// layer that is trained whole stands under `base_model`.
pub(crate) const PREFIXES: [&str; 2] = ["", "base_model"];

/// The one tensor of a prompt or prefix in HF PEFT's file.
pub(crate) const EMBEDDINGS: &str = "prompt_embeddings";

/// Why a method says nothing for a place whose tensors no file held.
pub(crate) const UNREAD: &str = "was not read; expected it before any place";

/// The fields that HF PEFT has for every method with virtual tokens.
///
/// What the base model says is left out of new configurations, as HF PEFT finds it there too; where a file
/// states it, it must be what the model has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtualTokens {
    /// `n`; default 20, where HF PEFT has none and asks.
    pub num_virtual_tokens: usize,
    /// Width of a virtual token; default: the model's.
    pub token_dim: Option<usize>,
    /// 1, or 2 for an encoder with a decoder, which is not implemented; default 1.
    pub num_transformer_submodules: Option<usize>,
    /// Heads of the attention, for readers who need them; default: the model's.
    pub num_attention_heads: Option<usize>,
    /// Blocks of the model; default: the model's.
    pub num_layers: Option<usize>,
}

impl Default for VirtualTokens {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            token_dim: None,
            num_transformer_submodules: None,
            num_attention_heads: None,
            num_layers: None,
        }
    }
}

impl VirtualTokens {
    pub(crate) fn of(num_virtual_tokens: usize) -> Self {
        Self { num_virtual_tokens, ..Self::default() }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        between("num_virtual_tokens", self.num_virtual_tokens, 1, 1 << 16)?;
        match self.num_transformer_submodules {
            None | Some(1) => Ok(()),
            Some(found) => {
                let reason = format!("expected 1, a model of one part, found {found}");
                Err(Error::config("num_transformer_submodules", reason))
            }
        }
    }

    /// Refuses a place of another width than the file states.
    pub(crate) fn fits(&self, site: &Site, width: usize) -> Result<(), Error> {
        agree("token_dim", self.token_dim, width, &site.path)
    }
}

/// Refuses a number that a file states and the model does not have.
pub(crate) fn agree(
    field: &'static str,
    stated: Option<usize>,
    found: usize,
    path: &str,
) -> Result<(), Error> {
    match stated {
        Some(stated) if stated != found => {
            let reason =
                format!("{field}: expected {stated}, as the configuration says, found {found}");
            Err(Error::place(path, reason))
        }
        _ => Ok(()),
    }
}

/// Refuses what is not from `least` to `most`.
pub(crate) fn between(
    field: &'static str,
    value: usize,
    least: usize,
    most: usize,
) -> Result<(), Error> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Error::config(field, format!("expected {least} to {most}, found {value}"))),
    }
}

/// The model's embedding of words: the first that it declares, as in every checkpoint that the zoo reads.
pub(crate) fn words(sites: &Sites) -> Result<Vec<&Site>, Error> {
    match sites.all.iter().find(|site| site.kind == Kind::Embedding) {
        Some(site) => Ok(vec![site]),
        None => {
            let reason = "expected a model with an embedding of words, in front of which a prompt stands; \
                          found none";
            Err(Error::config("num_virtual_tokens", reason))
        }
    }
}

/// [`words`] of a model that may read a whole sequence before it answers.
pub(crate) fn words_to_read(sites: &Sites) -> Result<Vec<&Site>, Error> {
    unread(sites)?;
    words(sites)
}

/// Refuses a model that predicts the words it reads: none may know of them before.
pub(crate) fn unread(sites: &Sites) -> Result<(), Error> {
    match predicted(sites) {
        Some(path) => {
            let reason = "expected a model that does not predict the words it reads, since each virtual token is made \
                          of all of them; use a prompt that is the same for every row";
            Err(Error::place(path, reason))
        }
        None => Ok(()),
    }
}

/// The output of a model that predicts the words it reads.
pub(crate) fn predicted(sites: &Sites) -> Option<&String> {
    let words = sites.all.iter().find(|site| site.kind == Kind::Embedding);
    let vocabulary = words.map(Site::fan_in)?;
    // An output that is no layer of its own is the embedding once more.
    let head = |path: &String| sites.get(path).map_or(vocabulary, Site::fan_out);
    sites.output.as_ref().filter(|path| head(path) == vocabulary)
}

/// 1 for a token of the sequence's own and 0 for padding and virtual ones, `[batch, seq, 1]`, for states
/// `x [batch, seq, hidden]`.
pub(crate) fn own(x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<3> {
    let [batch, seq, _] = x.dims();
    match tokens {
        Some(tokens) => tokens.kept.clone().float().reshape([batch, seq, 1]),
        None => Tensor::ones([batch, seq, 1], &x.device().inner()),
    }
}

/// The mean state of a sequence's own tokens, `[batch, hidden]`.
pub(crate) fn mean(x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<2> {
    let own = own(x, tokens).cast(x.dtype());
    let sum = (x.clone() * own.clone()).sum_dim(1);
    (sum / own.sum_dim(1).clamp_min(1.0)).squeeze_dim(1)
}

/// The state of a sequence's first own token, `[batch, hidden]`.
pub(crate) fn first(x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Tensor<2> {
    let own = own(x, tokens);
    let first = own.clone().cumsum(1).equal_elem(1).float() * own;
    (x.clone() * first.cast(x.dtype())).sum_dim(1).squeeze_dim(1)
}

/// Every attention of the model.
pub(crate) fn attentions(sites: &Sites) -> Result<Vec<&Site>, Error> {
    let found: Vec<&Site> =
        sites.between.iter().filter(|site| site.kind == Kind::Attention).collect();
    match found.is_empty() {
        false => Ok(found),
        true => {
            let reason = "expected a model with attentions, in front of whose keys and values a prefix \
                          stands; found none";
            Err(Error::config("num_virtual_tokens", reason))
        }
    }
}

/// The blocks of the model: the first list that it declares, as every model of the zoo has one.
pub(crate) fn blocks(sites: &Sites) -> Result<Vec<&Site>, Error> {
    match sites.between.iter().find(|site| site.kind == Kind::Blocks) {
        Some(site) => Ok(vec![site]),
        None => {
            let reason = "expected a model with a list of blocks, in front of which tokens stand; found none";
            Err(Error::config("num_virtual_tokens", reason))
        }
    }
}

/// What a method says that has but these places to go: `targets` by its field, which hold no names, and that what
/// stands in front is no identity, even where it is zero: it takes its share of every attention.
///
/// `in_front!(self)` asks the method's own `places_of`.
macro_rules! in_front {
    (self) => {
        $crate::prompt::in_front!(@ (me, sites) me.places_of(sites));
    };
    ($places:path) => {
        $crate::prompt::in_front!(@ (_me, sites) $places(sites));
    };
    (@ ($me:ident, $sites:ident) $places:expr) => {
        fn targets(&self) -> &::burn_peft_core::Targets {
            &self.targets
        }

        fn targets_mut(&mut self) -> &mut ::burn_peft_core::Targets {
            &mut self.targets
        }

        fn places<'s>(
            &self,
            $sites: &'s ::burn_peft_core::Sites,
            _: ::burn_peft_core::Strictness,
        ) -> Result<Vec<&'s ::burn_peft_core::Site>, ::burn_peft_core::Error> {
            let $me = self;
            $places
        }

        fn starts_as_identity(&self) -> bool {
            false
        }
    };
}
pub(crate) use in_front;

/// `modules_to_save` alone, for methods that have but one place to go.
pub(crate) mod saved_only {
    use super::{Deserialize, Serialize, Targets};
    use serde::{Deserializer, Serializer};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Saved {
        #[serde(skip_serializing_if = "Option::is_none")]
        modules_to_save: Option<Vec<String>>,
    }

    pub(crate) fn serialize<S: Serializer>(targets: &Targets, to: S) -> Result<S::Ok, S::Error> {
        Saved { modules_to_save: targets.modules_to_save.clone() }.serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Targets, D::Error> {
        let Saved { modules_to_save } = Saved::deserialize(from)?;
        Ok(Targets { modules_to_save, ..Targets::default() })
    }
}

/// Of the targets of a sample, what such a method has.
pub(crate) fn only_saved(targets: &Targets) -> Targets {
    Targets { modules_to_save: targets.modules_to_save.clone(), ..Targets::default() }
}

/// A linear layer of an encoder as PyTorch draws it, weight and bias `U(±1/√fan_in)`.
pub(crate) fn dense(
    fan_in: usize,
    fan_out: usize,
    rng: &mut ChaCha8Rng,
    device: &Device,
) -> burn::nn::Linear {
    use burn::module::Param;
    let draw = Draw::Uniform((1.0 / fan_in as f32).sqrt());
    let weight = Param::from_tensor(draw.tensor([fan_in, fan_out], rng, device));
    let bias = Some(Param::from_tensor(draw.tensor([fan_out], rng, device)));
    burn::nn::Linear { weight, bias }
}
