//! Hidden states as places: what flows between the layers of a model, `[batch, seq, hidden]`.

use crate::mark::mark;
use burn::nn::LayerNorm;
use burn::tensor::{Int, Tensor};

/// Marks the module that holds it as a place for hidden states: what that module gives on can be adapted, by
/// its path. It has no parameters; [`Sites`](crate::Sites) finds it.
#[derive(Debug, Clone, Copy)]
pub struct HiddenPlace {
    width: usize,
}

impl HiddenPlace {
    /// The type under which a visitor meets it; the name it is met by is the width.
    pub(crate) const MARK: &'static str = "Struct:HiddenPlace";

    /// For states of this width, `hidden`.
    pub fn new(width: usize) -> Self {
        Self { width }
    }

    fn names(&self) -> Vec<String> {
        vec![self.width.to_string()]
    }
}

mark!(HiddenPlace);

/// A hidden state where a sublayer or a block gives it on, all tensors `[batch, seq, hidden]`.
#[derive(Debug, Clone)]
pub struct Hidden<'a> {
    /// The residual stream that the sublayer (before any norm of the block's own) or the block read.
    pub x: Tensor<3>,
    /// What it gives on.
    pub y: Tensor<3>,
    /// Whether `y` is about to be added to `x`, as a sublayer's output is; a block's is the sum already.
    pub is_added: bool,
    /// The frozen norm over that sum, where the block has it there.
    pub norm: Option<&'a LayerNorm>,
    /// The tokens that it is the state of, where the model reads tokens.
    pub tokens: Option<SeenTokens>,
    /// Where its patches lie, where the model reads images.
    pub grid: Option<Grid>,
}

/// Patches of an image in a sequence, row by row: those at `first..first + rows · columns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Where they begin, behind a class token.
    pub first: usize,
    /// Patches from top to bottom.
    pub rows: usize,
    /// Patches from left to right.
    pub columns: usize,
}

impl<'a> Hidden<'a> {
    /// A sublayer `y = F(x)` on its way back into the residual stream `x`.
    pub fn sublayer(x: &Tensor<3>, y: Tensor<3>) -> Self {
        Self { x: x.clone(), y, is_added: true, norm: None, tokens: None, grid: None }
    }

    /// A block that read the stream `x` and gives on the stream `y`.
    pub fn block(x: Tensor<3>, y: Tensor<3>) -> Self {
        Self { x, y, is_added: false, norm: None, tokens: None, grid: None }
    }

    /// With this norm over `x + y`.
    pub fn before(mut self, norm: &'a LayerNorm) -> Self {
        self.norm = Some(norm);
        self
    }

    /// Only these rows of the batch.
    pub(crate) fn select(&self, rows: &Tensor<1, Int>) -> Self {
        Self {
            x: self.x.clone().select(0, rows.clone()),
            y: self.y.clone().select(0, rows.clone()),
            is_added: self.is_added,
            norm: self.norm,
            tokens: self.tokens.as_ref().map(|tokens| tokens.select(rows)),
            grid: self.grid,
        }
    }
}

/// The tokens that a forward pass reads.
#[derive(Debug, Clone)]
pub struct SeenTokens {
    /// Their ids, `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// 1 for a token and 0 for padding, `[batch, seq]`.
    pub kept: Tensor<2, Int>,
    /// Number of columns that earlier passes have read (generation).
    pub past: usize,
    /// The ids of those, `[batch, past]`; none where there are none.
    pub before: Option<Tensor<2, Int>>,
    /// What the model's own attention adds to the score of each pair, `[batch or 1, 1, seq or 1, past + seq]`:
    /// [`HIDDEN`](crate::HIDDEN) where the one must not see the other; `None` where all see all.
    pub scores: Option<Tensor<4>>,
}

impl SeenTokens {
    /// With `n` virtual tokens in front, which have no id and are none of the sequence's own.
    pub(crate) fn behind(&self, n: usize, scores: Option<Tensor<4>>) -> Self {
        let [batch, _] = self.ids.dims();
        let front = |value: i64, own: &Tensor<2, Int>| {
            let front = Tensor::<2, Int>::full([batch, n], value, &own.device());
            Tensor::cat(vec![front, own.clone()], 1)
        };
        Self { ids: front(-1, &self.ids), kept: front(0, &self.kept), scores, ..self.clone() }
    }

    pub(crate) fn select(&self, rows: &Tensor<1, Int>) -> Self {
        Self {
            ids: self.ids.clone().select(0, rows.clone()),
            kept: self.kept.clone().select(0, rows.clone()),
            past: self.past,
            before: self.before.as_ref().map(|before| before.clone().select(0, rows.clone())),
            scores: self.scores.clone().map(|scores| match scores.dims()[0] {
                1 => scores,
                _ => scores.select(0, rows.clone()),
            }),
        }
    }
}
