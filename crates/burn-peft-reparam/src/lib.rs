//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod lora;
mod random;

pub use lora::{Init, Lora, LoraAdapter, LoraBias};
