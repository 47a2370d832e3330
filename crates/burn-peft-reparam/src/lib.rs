//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod adalora;
mod adalora_policy;
mod common;
mod dora;
mod init;
mod layout;
mod loftq;
mod lora;
mod random;

pub use adalora::{AdaLora, AdaLoraAdapter, Triplets};
pub use adalora_policy::{
    Budget, Importance, RankPolicy, RankPolicyState, Sensitivity, keep_highest, masked,
    orthogonality,
};
pub use common::Bias;
pub use dora::Dora;
pub use init::Init;
pub use loftq::{integers, loftq, nf4};
pub use lora::{Lora, LoraAdapter, LoraBias};
