//! Additive methods: something new stands beside the frozen layers, or in front of what they read. One file a method.

mod adaption_prompt;
mod p_tuning;
mod p_tuning_encoder;
mod prefix_tuning;
mod prompt;
mod prompt_dept;
mod prompt_tuning;
mod prompt_xprompt;
mod prompt_xprompt_policy;

pub use adaption_prompt::{AdaptionPrompt, GatedPrompt};
pub use p_tuning::{EncodedPrompt, PTuning, Reparameterization};
pub use p_tuning_encoder::{BiLstm, Lstm, PromptEncoder};
pub use prefix_tuning::{Blocks, Prefix, PrefixEncoder, PrefixTuning};
pub use prompt::VirtualTokens;
pub use prompt_dept::{DePt, DecomposedPrompt};
pub use prompt_tuning::{Prompt, PromptInit, PromptTuning};
pub use prompt_xprompt::{PrunedPrompt, XPrompt};
