//! The core of burn-peft: parameter-efficient fine-tuning for Burn.
//!
//! > **An adapter is a difference laid over one place of a frozen model.**
//! > on activations `y = y0 + Σ wᵢ·δᵢ(x, y0)`, on weights `W' = W + Σ wᵢ·Δᵢ(W)`.
//!
//! Adapters are values, apart from the model. The base is an ordinary Burn module that is never
//! changed and lives on the plain device; adapters live on `device.autodiff()`. Burn treats the
//! plain tensor as a constant, so there is nothing to freeze, and a checkpoint is the adapters alone.
//!
//! * [`Sites`] finds the places of a model, [`Targets`] chooses among them by HF PEFT's rules.
//! * A [`Method`] is what was asked for; [`adapt`] builds [`Adapters`] of it, after a [`survey`](survey()) of the data
//!   where it wants one.
//! * A model of ours takes a [`Scope`] in its forward; the scope adds what lies at each place. Any
//!   other Burn model is trained through [`attach`].
//! * [`merge`] makes a plain model. A [`Bank`] holds several adapters and selects among them.
//! * [`save`] and [`load`] speak HF PEFT's file format; [`save_together`] holds several adapters in one folder.

mod adapter;
mod adapters;
mod bank;
mod beside;
mod blocks;
mod buffer;
mod carried;
pub mod composed;
mod copy;
mod erased;
mod error;
mod fold;
mod format;
mod hidden;
mod mark;
mod mask;
mod method;
mod overlay;
mod policy;
mod product;
mod quantize;
mod riemannian;
mod routed;
mod scope;
mod several;
mod shared;
mod site;
mod slopes;
mod sum;
mod summary;
mod survey;
mod targets;
mod tensors;
mod widened;

pub use adapter::{Adapter, Fold};
pub use adapters::{Adapters, Folded, Folds, adapt};
pub use bank::{BASE, Bank, Selection};
pub use beside::{Batch, Beside};
pub use blocks::{Blocks, untracked};
pub use buffer::{Buffer, Trained, trained_parameters};
pub use carried::Carried;
pub use copy::{Part, TrainedCopy};
pub use erased::AnyAdapter;
pub use error::Error;
pub use fold::{Attached, attach, merge};
pub use format::{
    AdapterConfig, CONFIG_FILE, TENSORS_FILE, adapter_files, load, peft_type, save, save_with,
};
pub use hidden::{Grid, Hidden, HiddenPlace, SeenTokens};
pub use mask::{Mask, MaskPlace};
pub use method::{Biases, Method, site_rng};
pub use overlay::{Laid, Overlay, Strength};
pub use policy::{Guide, Policy};
pub use product::Product;
pub use quantize::quantize;
/// What [`Method::init`] draws with.
pub use rand;
pub use riemannian::ridge_inverse;
pub use routed::{Routed, Whole};
pub use scope::{Front, HIDDEN, Scope};
pub use several::{LIST_FILE, Unwritten, adapter_folders, save_together};
pub use site::{Kind, Site, Sites, Value, as_matrix, from_matrix, hf_component, hf_path};
pub use slopes::{Slope, Slopes, Tuning, hardest, slopes_at};
pub use summary::{Summary, grouped};
pub use survey::{Counted, Finding, Moments, Passes, Statistic, held_together, survey};
pub use targets::{ALL_LINEAR, Names, OneOrMany, Strictness, Targets, pattern_value};
pub use tensors::{
    PlaceTensors, TensorFile, tensor_bytes, write_atomic, write_tensors, write_together,
};
pub use widened::widened;
