//! Parameter-efficient fine-tuning for Burn: the crates of the project under one name, the registry
//! of methods, and backends by name.
//!
//! Begin with [`prelude`]: find the places of a model ([`core::Sites`]), choose a method
//! ([`reparam::Lora`]), make adapters ([`core::adapt`]), and hand them to a model's forward
//! ([`core::Scope`]). The repository's README shows it in ten lines.

pub mod device;
pub mod registry;

pub use burn_peft_additive as additive;
pub use burn_peft_core as core;
pub use burn_peft_kernels as kernels;
pub use burn_peft_models as models;
pub use burn_peft_reparam as reparam;
pub use burn_peft_selective as selective;
pub use burn_peft_train as train;

/// What most programs need.
pub mod prelude {
    pub use burn_peft_core::{
        Adapter, AdapterConfig, Adapters, Bank, Error, Fold, Method, Overlay, Scope, Sites,
        Summary, Targets, adapt, attach, load, merge, save,
    };
    pub use burn_peft_models::*;
    pub use burn_peft_reparam::{Lora, LoraAdapter};
}

/// The README's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
