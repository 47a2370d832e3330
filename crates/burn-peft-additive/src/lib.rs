//! Additive methods: something new stands beside the frozen layers, or in front of what they read. One file a
//! method.

mod adapterhub;
mod adaption_prompt;
mod beft;
mod bottleneck;
mod compacter;
mod fields;
mod hadamard;
mod ia3;
mod ln_tuning;
mod mov;
mod nonlinearity;
mod numbers;
mod p_tuning;
mod p_tuning_encoder;
mod pasta;
mod prefix_apt;
mod prefix_tuning;
mod prompt;
mod prompt_dept;
mod prompt_idpg;
mod prompt_smop;
mod prompt_tuning;
mod prompt_xprompt;
mod prompt_xprompt_policy;
mod reft;
mod repadapter;
mod scale_shift;
mod source;
mod ssf;
mod trainable_tokens;

pub use adapterhub::{FromHub, HubMethod, HubModel, load_from_hub, save_to_hub};
pub use adaption_prompt::{AdaptionPrompt, GatedPrompt};
pub use beft::{Beft, BeftAdapter};
pub use bottleneck::{
    Bottleneck, BottleneckAdapter, BottleneckInit, OwnNorm, Scaling, TrainedScaling,
};
pub use compacter::{Compacter, CompacterAdapter, Phm};
pub use hadamard::Hadamard;
pub use ia3::{Ia3, Ia3Adapter};
pub use ln_tuning::{LnTuning, LnTuningAdapter};
pub use mov::{Mov, MovAdapter};
pub use nonlinearity::Nonlinearity;
pub use p_tuning::{EncodedPrompt, PTuning, Reparameterization};
pub use p_tuning_encoder::{BiLstm, Lstm, PromptEncoder};
pub use pasta::{Pasta, PastaAdapter};
pub use prefix_apt::{Apt, GatedPrefix};
pub use prefix_tuning::{Blocks, Prefix, PrefixEncoder, PrefixTuning};
pub use prompt::VirtualTokens;
pub use prompt_dept::{DePt, DecomposedPrompt};
pub use prompt_idpg::{Idpg, PromptGenerator};
pub use prompt_smop::{RoutedPrompts, Smop};
pub use prompt_tuning::{Prompt, PromptInit, PromptTuning};
pub use prompt_xprompt::{PrunedPrompt, XPrompt};
pub use reft::{Reft, ReftAdapter, ReftUnit};
pub use repadapter::{RepAdapter, RepAdapterAdapter};
pub use scale_shift::ScaleShift;
pub use ssf::Ssf;
pub use trainable_tokens::{TrainableTokens, TrainableTokensAdapter};
