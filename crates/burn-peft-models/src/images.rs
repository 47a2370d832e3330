//! Batches of images, on the host.

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::Error;

/// Images of one size, their values as the model's preprocessing leaves them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Images {
    /// `[batch, channels, height, width]`, row by row.
    pub pixels: Vec<f32>,
    /// Number of images.
    pub batch: usize,
    /// Channels, height and width of each.
    pub shape: [usize; 3],
}

impl Images {
    /// As a tensor, `[batch, channels, height, width]`.
    pub fn tensor(&self, device: &Device) -> Tensor<4> {
        let [channels, height, width] = self.shape;
        let shape = [self.batch, channels, height, width];
        Tensor::from_data(TensorData::new(self.pixels.clone(), shape), device)
    }

    /// Refuses what a model of this many channels, which cuts squares of `patch` by `patch` pixels, could not
    /// read.
    pub(crate) fn check(&self, channels: usize, patch: usize) -> Result<(), Error> {
        let [found, height, width] = self.shape;
        let count = self.shape.iter().try_fold(self.batch, |n, size| n.checked_mul(*size));
        if count != Some(self.pixels.len()) || self.pixels.is_empty() {
            let reason = format!(
                "expected images of shape {:?}, found {} numbers for {} of them",
                self.shape,
                self.pixels.len(),
                self.batch
            );
            return Err(Error::config("pixel_values", reason));
        }
        if found != channels {
            let reason = format!("expected {channels} channels, found {found}");
            return Err(Error::config("pixel_values", reason));
        }
        if height < patch || width < patch {
            let reason = format!("expected at least {patch} by {patch}, found {height} by {width}");
            return Err(Error::config("pixel_values", reason));
        }
        Ok(())
    }
}
