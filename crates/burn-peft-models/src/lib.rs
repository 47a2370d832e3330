//! Models for burn-peft: ordinary Burn modules that know nothing of adapters but say, at every
//! layer, where they are.
//!
//! Field names are those of the Hugging Face checkpoint, so that paths of places, names in files
//! and HF PEFT's targets are the same words. A forward takes a [`Scope`](burn_peft_core::Scope).

mod attention;
mod bert;
mod cache;
mod generate;
mod llama;
mod load;
mod tokens;

pub use bert::{BertConfig, BertForSequenceClassification, BertModel};
pub use cache::KvCache;
pub use generate::{Sampling, generate};
pub use llama::{LlamaConfig, LlamaForCausalLM, LlamaModel, Rope};
pub use load::{Loaded, Precision, Pretrained, model_type, save_model, weight_files};
pub use tokens::Tokens;
