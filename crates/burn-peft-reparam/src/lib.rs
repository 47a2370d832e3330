//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod common;
mod loha;
mod lora;
mod lycoris;
mod random;
mod source;

pub use common::Bias;
pub use loha::{Loha, LohaAdapter, LohaFactor};
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use lycoris::Drops;
pub use source::Factor;
