//! Reparameterized methods: the difference is a product of smaller things. One file a method.

mod c3a;
mod common;
mod fourierft;
mod lora;
mod random;
mod shira;
mod sparse;
mod torch_random;
mod waveft;
mod wavelets;

pub use c3a::{C3a, C3aAdapter, C3aInit, Fourier};
pub use common::Bias;
pub use fourierft::{FourierFt, FourierFtAdapter, Waves};
pub use lora::{Init, Lora, LoraAdapter, LoraBias};
pub use shira::{Shira, ShiraAdapter};
pub use waveft::{WaveFt, WaveFtAdapter, Wavelets};
