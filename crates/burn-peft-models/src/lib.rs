//! Models for burn-peft: ordinary Burn modules that know nothing of adapters but say, at every
//! layer, where they are.
//!
//! Field names are those of the Hugging Face checkpoint, so that paths of places, names in files
//! and HF PEFT's targets are the same words. A forward takes a [`Scope`](burn_peft_core::Scope).

mod activation;
mod attention;
mod bert;
mod cache;
mod classes;
mod dinov2;
mod generate;
mod images;
mod llama;
mod load;
mod masked;
mod output;
mod patches;
mod precision;
mod ragged;
mod t5;
mod tokens;
mod vit;

pub use bert::{BertConfig, BertForSequenceClassification, BertModel};
pub use cache::KvCache;
pub use classes::{Classes, Classifier};
pub use dinov2::{Dinov2Config, Dinov2ForImageClassification, Dinov2Model};
pub use generate::{Sampling, generate, generate_seq2seq};
pub use images::Images;
pub use llama::{LlamaConfig, LlamaForCausalLM, LlamaModel, Rope};
pub use load::{Beside, Loaded, Pretrained, model_type, save_model, weight_files};
pub use precision::Precision;
pub use t5::{EncoderOutput, T5Config, T5ForConditionalGeneration};
pub use tokens::Tokens;
pub use vit::{ViTConfig, ViTForImageClassification, ViTModel};
