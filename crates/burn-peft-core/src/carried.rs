//! What stands in front of a sequence from block to block.

use crate::scope::{front, score};
use crate::{Front, Laid, SeenTokens};
use burn::tensor::Tensor;

/// What stands in front of the states that the blocks of a model read, one block after the other; made by
/// [`Scope::carried`](crate::Scope::carried).
///
/// The sequence's own states go through the model as ever: a model sets tokens in front of each block's input
/// ([`Carried::before`]) and takes them off its output ([`Carried::after`]).
#[derive(Debug)]
pub struct Carried<'a> {
    laid: Vec<Laid<'a>>,
    /// What each of `laid` has in front: `[batch, n, hidden]`.
    held: Vec<Option<Tensor<3>>>,
    tokens: Option<SeenTokens>,
}

impl<'a> Carried<'a> {
    pub(crate) fn new(laid: Vec<Laid<'a>>, tokens: Option<SeenTokens>) -> Self {
        let held = laid.iter().map(|_| None).collect();
        Self { laid, held, tokens }
    }

    /// What stands in front of `x [batch, seq, hidden]`, which the block number `block` is about to read:
    /// `[batch, n, hidden]`.
    pub fn before(&mut self, block: usize, x: &Tensor<3>) -> Option<Front<1>> {
        let [batch, _, _] = x.dims();
        let mut parts = Vec::new();
        let mut scores = Vec::new();
        for (Laid { adapter, strength }, held) in self.laid.iter().zip(&mut self.held) {
            let made = adapter.carried(block, x, held.as_ref(), self.tokens.as_ref());
            *held = made.map(|tokens| {
                let [_, n, width] = tokens.dims();
                tokens.expand([batch, n, width]).cast(x.dtype())
            });
            if let Some(tokens) = held {
                scores.extend(std::iter::repeat_n(score(strength), tokens.dims()[1]));
                parts.push(tokens.clone());
            }
        }
        front([parts], scores)
    }

    /// What is the sequence's own in what a block gives on, `y [batch, n + seq, hidden]`; the rest is held for the next
    /// block.
    pub fn after(&mut self, y: Tensor<3>) -> Tensor<3> {
        let mut first = 0;
        for held in self.held.iter_mut().flatten() {
            let [_, n, _] = held.dims();
            *held = y.clone().narrow(1, first, n);
            first += n;
        }
        let [_, all, _] = y.dims();
        if first == 0 { y } else { y.narrow(1, first, all - first) }
    }
}
