//! Keys and values that generation keeps.

use crate::Tokens;
use crate::attention::score;
use burn::tensor::Tensor;
use burn_peft_core::Front;

/// Keys and values of the tokens so far, so that generation reads each token once.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<Cached>,
    /// Those of an encoder's output, which stay.
    encoded: Vec<Cached>,
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

    /// What is added to the score of each token held and, behind those, of `front` and of `tokens`.
    pub(crate) fn scores_with(
        cache: Option<&Self>,
        tokens: &Tokens,
        front: &[f32],
    ) -> Vec<Vec<f32>> {
        let held = cache.filter(|cache| !cache.is_empty()).map(|cache| cache.scores.clone());
        let mut scores = held.unwrap_or_else(|| vec![Vec::new(); tokens.batch]);
        for (row, mask) in scores.iter_mut().zip(tokens.mask.chunks(tokens.seq)) {
            row.extend(front.iter().copied().chain(mask.iter().map(|&kept| score(kept))));
        }
        scores
    }

    /// Takes note of what was read: the scores of all, and the ids of the newest, `[batch · rows]`.
    pub(crate) fn hold(&mut self, scores: Vec<Vec<f32>>, ids: &[i32]) {
        let rows = ids.len() / scores.len().max(1);
        self.ids.resize(scores.len(), Vec::new());
        for (row, ids) in self.ids.iter_mut().zip(ids.chunks(rows.max(1))) {
            row.extend(ids);
        }
        self.scores = scores;
    }

    /// The block's keys and values of an encoder's output, made once.
    pub(crate) fn encoded(&mut self, block: usize, make: impl FnOnce() -> Cached) -> Cached {
        match self.encoded.get(block) {
            Some(held) => held.clone(),
            None => {
                let made = make();
                self.encoded.push(made.clone());
                made
            }
        }
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
