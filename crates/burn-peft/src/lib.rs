#![doc = include_str!("../../../README.md")]

pub mod device;
pub mod registry;

pub use burn_peft_core as core;
pub use burn_peft_models as models;
pub use burn_peft_reparam as reparam;
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
