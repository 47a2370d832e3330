//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod aflora;
mod capaboost;
mod common;
mod hiwi;
mod kadaptation;
mod krona;
mod lora;
mod lora_dropout;
mod lora_fa;
mod lora_sp;
mod low_rank;
mod moslora;
mod nola;
mod random;
mod said;
mod seeded;
mod superlora;

pub use aflora::{AfLora, AfLoraAdapter};
pub use capaboost::{CapaBoost, CapaBoostAdapter};
pub use common::Bias;
pub use hiwi::{HiWi, HiWiAdapter, Nonlinearity, Parameters};
pub use kadaptation::{KAdaptation, KAdaptationAdapter};
pub use krona::{KronA, KronAAdapter};
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use lora_dropout::{LoraDropout, LoraDropoutAdapter};
pub use lora_fa::{LoraFa, LoraFaAdapter};
pub use lora_sp::{LoraSp, LoraSpAdapter, Partial};
pub use low_rank::LowRank;
pub use moslora::{Mixer, MosLora, MosLoraAdapter};
pub use nola::{Nola, NolaAdapter};
pub use said::{Said, SaidAdapter, Subspace};
pub use superlora::{SuperLora, SuperLoraAdapter};
