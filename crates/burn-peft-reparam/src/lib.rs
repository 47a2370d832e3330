//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod adalora;
mod adalora_policy;
mod common;
mod dora;
mod init;
mod layout;
mod loftq;
mod lora;
mod pvera;
mod randlora;
mod random;
mod shared;
mod tinylora;
mod torch_random;
mod vblora;
mod vera;

pub use adalora::{AdaLora, AdaLoraAdapter, Triplets};
pub use adalora_policy::{
    Budget, Importance, RankPolicy, RankPolicyState, Sensitivity, keep_highest, masked,
    orthogonality,
};
pub use common::Bias;
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use pvera::{Pvera, PveraAdapter};
pub use randlora::{Bases, RandLora, RandLoraAdapter};
pub use shared::Projections;
pub use tinylora::{Groups, TinyLora, TinyLoraAdapter, VInit};
pub use vblora::{ChosenVectors, VbLora, VbLoraAdapter, VectorChoice};
pub use vera::{Vera, VeraAdapter};
pub use dora::Dora;
pub use init::Init;
pub use loftq::{integers, loftq, nf4};
pub use lora::{Lora, LoraAdapter, LoraBias};
