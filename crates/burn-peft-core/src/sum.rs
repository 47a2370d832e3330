//! What lies over a place, summed: `y0 + Σ wᵢ·δᵢ(x, y0)`.

use crate::{Adapter, Hidden, Laid, SeenTokens, Strength};
use burn::tensor::{Int, Tensor};

/// What enters a layer: it can be cut to some rows of the batch.
pub(crate) trait Input {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self;
}

impl<const D: usize> Input for Tensor<D> {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self {
        self.clone().select(0, rows.clone())
    }
}

impl<const D: usize> Input for Tensor<D, Int> {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self {
        self.clone().select(0, rows.clone())
    }
}

/// What enters a linear layer, and the tokens that it is the states of.
pub(crate) struct States {
    pub(crate) x: Tensor<3>,
    pub(crate) tokens: Option<SeenTokens>,
}

impl Input for States {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self {
        Self {
            x: self.x.rows(rows),
            tokens: self.tokens.as_ref().map(|tokens| tokens.select(rows)),
        }
    }
}

/// What an attention reads, and its queries.
pub(crate) struct Read {
    pub(crate) x: Tensor<3>,
    pub(crate) q: Tensor<4>,
}

impl Input for Read {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self {
        Self { x: self.x.rows(rows), q: self.q.rows(rows) }
    }
}

impl Input for Hidden<'_> {
    fn rows(&self, rows: &Tensor<1, Int>) -> Self {
        self.select(rows)
    }
}

/// `y0 + Σ wᵢ·δᵢ(x, y0)`. An adapter routed to some rows sees only those: a batch with many
/// adapters costs what a batch with one costs.
pub(crate) fn sum<'a, const D: usize, X: Input>(
    laid: impl IntoIterator<Item = Laid<'a>>,
    x: &X,
    y0: Tensor<D>,
    delta: impl Fn(&dyn Adapter, &X, &Tensor<D>) -> Option<Tensor<D>>,
) -> Tensor<D> {
    let mut y = y0.clone();
    for Laid { adapter, strength } in laid {
        match strength {
            Strength::Scale(w) => {
                if let Some(d) = delta(adapter, x, &y0) {
                    y = y + if w == 1.0 { d } else { d * w };
                }
            }
            Strength::Rows(rows) => {
                if let Some(d) = delta(adapter, &x.rows(rows), &y0.clone().select(0, rows.clone()))
                {
                    let update = burn::tensor::IndexingUpdateOp::Add;
                    y = y.select_assign(0, rows.clone(), d, update);
                }
            }
        }
    }
    y
}
