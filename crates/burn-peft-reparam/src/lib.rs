//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod common;
mod lora;
mod random;
mod torch_random;

pub use common::Bias;
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
