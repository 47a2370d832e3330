//! Keys and values that generation keeps.

use burn::tensor::Tensor;
use burn_peft_core::Front;

/// Keys and values of the tokens so far, so that generation reads each token once.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<Cached>,
    /// What is added to the score of each token held, a row of the batch.
    pub(crate) scores: Vec<Vec<f32>>,
    /// The id of each token held, a row of the batch.
    pub(crate) ids: Vec<Vec<i32>>,
    /// What is added to the scores of virtual tokens that stand in front of a block alone, for each block.
    pub(crate) carried: Vec<Vec<f32>>,
}

/// Of one block.
#[derive(Debug, Clone)]
pub(crate) struct Cached {
    pub(crate) k: Tensor<4>,
    pub(crate) v: Tensor<4>,
    /// What stands in front of them, asked for once.
    pub(crate) prefix: Option<Front<2>>,
}

impl KvCache {
    /// Tokens held, padding and virtual ones counted in.
    pub fn len(&self) -> usize {
        self.scores.first().map_or(0, Vec::len)
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block's keys and values with new ones behind them, and what stands in front of all.
    pub(crate) fn extend(
        &mut self,
        layer: usize,
        [k, v]: [Tensor<4>; 2],
        prefix: impl FnOnce() -> Option<Front<2>>,
    ) -> Cached {
        let all = match self.layers.get(layer) {
            None => Cached { k, v, prefix: prefix() },
            Some(old) => Cached {
                k: Tensor::cat(vec![old.k.clone(), k], 2),
                v: Tensor::cat(vec![old.v.clone(), v], 2),
                prefix: old.prefix.clone(),
            },
        };
        match self.layers.get_mut(layer) {
            Some(held) => *held = all.clone(),
            None => self.layers.push(all.clone()),
        }
        all
    }
}
