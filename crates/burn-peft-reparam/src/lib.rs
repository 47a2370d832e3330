//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod boft;
mod common;
mod delora;
mod hra;
mod lora;
mod oft;
mod orthogonal;
mod psoft;
mod random;
mod road;

pub use boft::{Boft, BoftAdapter};
pub use common::Bias;
pub use delora::{Delora, DeloraAdapter};
pub use hra::{Hra, HraAdapter};
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use oft::{Oft, OftAdapter};
pub use psoft::{Psoft, PsoftAdapter, Split, Svd};
pub use road::{Road, RoadAdapter, Variant};
