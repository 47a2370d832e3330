//! A part of the training data, for what must be known before adapters are built.

use crate::{Objective, TrainFeed};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Counted, Passes, Scope};
use std::sync::OnceLock;

/// The first batches of a training with its model, for a [`survey`](burn_peft_core::survey()). They are
/// made when they are first asked for.
#[derive(Debug)]
pub struct Sample<'a, B: Objective> {
    base: &'a B,
    device: &'a Device,
    feed: &'a TrainFeed<B::Batch>,
    count: usize,
    made: OnceLock<Vec<B::Batch>>,
    cut: OnceLock<Vec<B::Batch>>,
}

impl<'a, B: Objective> Sample<'a, B> {
    /// At most `count` batches of the first epoch of `feed`; `base` lives on the plain `device`.
    pub fn new(
        base: &'a B,
        device: &'a Device,
        feed: &'a TrainFeed<B::Batch>,
        count: usize,
    ) -> Self {
        Self { base, device, feed, count, made: OnceLock::new(), cut: OnceLock::new() }
    }

    /// These examples, each a batch of its own.
    pub(crate) fn of(
        base: &'a B,
        device: &'a Device,
        feed: &'a TrainFeed<B::Batch>,
        examples: Vec<B::Batch>,
    ) -> Self {
        let (count, cut) = (examples.len(), OnceLock::from(examples.clone()));
        Self { base, device, feed, count, made: OnceLock::from(examples), cut }
    }

    fn made(&self) -> &[B::Batch] {
        self.made.get_or_init(|| self.feed.first(self.count))
    }

    fn cut(&self) -> &[B::Batch] {
        self.cut.get_or_init(|| self.feed.first_cut(self.count))
    }

    fn mean(&self, batch: &B::Batch, cx: &Scope<'_>) -> Tensor<1> {
        self.base.loss(batch, self.device, cx).sum / B::targets(batch).max(1) as f64
    }
}

impl<B: Objective> Passes for Sample<'_, B> {
    fn batches(&self) -> usize {
        self.made().len()
    }

    fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.mean(&self.made()[batch], cx)
    }

    fn counted(&self, batch: usize, targets_only: bool) -> Counted {
        B::counted(&self.made()[batch], targets_only)
    }

    fn examples(&self) -> usize {
        self.cut().len()
    }

    fn example_loss(&self, example: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.mean(&self.cut()[example], cx)
    }
}
