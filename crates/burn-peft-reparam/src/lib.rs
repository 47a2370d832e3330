//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod common;
mod glora;
mod gralora;
mod hira;
mod loha;
mod lokr;
mod lora;
mod lycoris;
mod miss;
mod random;
mod source;

pub use common::Bias;
pub use glora::{Glora, GloraAdapter, GloraForm};
pub use gralora::{Gralora, GraloraAdapter};
pub use hira::{Hira, HiraAdapter, HiraInit};
pub use loha::{Loha, LohaAdapter, LohaFactor};
pub use lokr::{Lokr, LokrAdapter, LokrInit};
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use lycoris::Drops;
pub use miss::{Miss, MissAdapter, MissBat, MissInit, MissShards};
pub use source::Factor;
