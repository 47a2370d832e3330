//! What a method adds to the loss of a batch, with the model at hand.

use crate::{Error, Overlay, Passes, Scope};
use burn::tensor::Tensor;
use std::fmt;

/// A term of one batch's loss that needs more than the adapters: what layers read, or further passes of the model.
///
/// It lies over the model, behind all that is trained, in the pass of the batch's loss, where it may take note of what
/// flows by. After that pass it is asked for its term.
///
/// Where blocks are [computed again](crate::Blocks) it takes no note inside of one, which is refused, and what it notes in
/// front of them must be constant. Its further passes are run as ever, with all that their gradients need kept.
pub trait Beside: Overlay {
    /// The term, `[1]`, as large as a mean over the batch: where a step has several batches, each counts by its share of
    /// the targets.
    ///
    /// # Errors
    /// A model that does not show or ask what the term needs.
    fn term(&self, batch: &Batch<'_>) -> Result<Tensor<1>, Error>;
}

/// A batch in training, and all that is trained over its model.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    passes: &'a dyn Passes,
    trained: &'a dyn Overlay,
    still: &'a dyn Overlay,
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").finish_non_exhaustive()
    }
}

impl<'a> Batch<'a> {
    /// The first of `passes`, with `trained` over the model; `still` is the same without gradients
    /// ([`valid`](burn::module::Module::valid)).
    pub fn new(passes: &'a dyn Passes, trained: &'a dyn Overlay, still: &'a dyn Overlay) -> Self {
        Self { passes, trained, still }
    }

    /// One more pass: the mean loss over the batch's targets, `[1]`, with `more` over the model behind all that is
    /// trained, and gradients to both.
    pub fn loss(&self, more: &dyn Overlay) -> Tensor<1> {
        self.passes.loss(0, &Scope::new(&(self.trained, more)))
    }

    /// [`Batch::loss`] with all that is trained as it is outside of training: gradients reach `more` alone.
    pub fn still_loss(&self, more: &dyn Overlay) -> Tensor<1> {
        self.passes.loss(0, &Scope::new(&(self.still, more)))
    }
}
