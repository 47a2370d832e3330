//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod common;
mod lora;
mod pvera;
mod randlora;
mod random;
mod shared;
mod tinylora;
mod torch_random;
mod vblora;
mod vera;

pub use common::Bias;
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use pvera::{Pvera, PveraAdapter};
pub use randlora::{Bases, RandLora, RandLoraAdapter};
pub use shared::Projections;
pub use tinylora::{Groups, TinyLora, TinyLoraAdapter, VInit};
pub use vblora::{ChosenVectors, VbLora, VbLoraAdapter, VectorChoice};
pub use vera::{Vera, VeraAdapter};
