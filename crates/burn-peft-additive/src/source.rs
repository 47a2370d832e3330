//! Where the tensors of a place come from: drawn, or read. A method says the names, shapes and beginnings of
//! its tensors once, to a [`Source`], and both ways follow.

use crate::numbers::Draw;
use burn::module::Param;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, PlaceTensors};
use rand::rngs::ChaCha8Rng;

/// Gives a place's tensors by their names in the file.
pub(crate) trait Source {
    /// The trained tensor of that name and shape, which begins as `draw` says.
    fn take<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
        draw: Draw,
    ) -> Result<Param<Tensor<D>>, Error>;
}

/// Draws them.
pub(crate) struct Fresh<'a> {
    pub(crate) rng: &'a mut ChaCha8Rng,
    pub(crate) device: &'a Device,
}

impl Source for Fresh<'_> {
    fn take<const D: usize>(
        &mut self,
        _name: &'static str,
        shape: [usize; D],
        draw: Draw,
    ) -> Result<Param<Tensor<D>>, Error> {
        Ok(Param::from_tensor(draw.tensor(shape, self.rng, self.device)))
    }
}

/// Reads them.
pub(crate) struct Stored<'a, 'f> {
    pub(crate) file: &'a mut PlaceTensors<'f>,
    pub(crate) device: &'a Device,
}

impl Source for Stored<'_, '_> {
    fn take<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
        _draw: Draw,
    ) -> Result<Param<Tensor<D>>, Error> {
        Ok(Param::from_tensor(self.file.take(name, shape, self.device)?))
    }
}

/// `init` and `restore` of a method by its `fn build(&self, &Site, &mut impl Source)`.
macro_rules! built {
    ($adapter:ty) => {
        fn init(
            &self,
            site: &::burn_peft_core::Site,
            _shared: &(),
            rng: &mut ::rand::rngs::ChaCha8Rng,
            device: &::burn::tensor::Device,
        ) -> Result<$adapter, ::burn_peft_core::Error> {
            self.build(site, &mut $crate::source::Fresh { rng, device })
        }

        fn restore(
            &self,
            site: &::burn_peft_core::Site,
            _shared: &(),
            file: &mut ::burn_peft_core::PlaceTensors<'_>,
            device: &::burn::tensor::Device,
        ) -> Result<$adapter, ::burn_peft_core::Error> {
            self.build(site, &mut $crate::source::Stored { file, device })
        }
    };
}
pub(crate) use built;

/// As [`built`], and `targets` by its field.
macro_rules! by_source {
    ($adapter:ty) => {
        fn targets(&self) -> &::burn_peft_core::Targets {
            &self.targets
        }

        fn targets_mut(&mut self) -> &mut ::burn_peft_core::Targets {
            &mut self.targets
        }

        $crate::source::built!($adapter);
    };
}
pub(crate) use by_source;
