//! What lies over a place, summed: `y0 + Σ wᵢ·δᵢ(x, y0)`.

use crate::{Adapter, Hidden, Laid, SeenTokens, Strength};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

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

/// `y0 + Σ wᵢ·δᵢ(x, y0)`. An adapter routed to some rows sees only those, and what all of them add is added at
/// once: a batch with many adapters costs what a batch with one costs.
pub(crate) fn sum<'a, const D: usize, X: Input>(
    laid: impl IntoIterator<Item = Laid<'a>>,
    x: &X,
    y0: Tensor<D>,
    delta: impl Fn(&dyn Adapter, &X, &Tensor<D>) -> Option<Tensor<D>>,
) -> Tensor<D> {
    let mut y = y0.clone();
    let (mut rows, mut parts) = (Vec::new(), Vec::new());
    for Laid { adapter, strength } in laid {
        match strength {
            Strength::Scale(w) => {
                if let Some(d) = delta(adapter, x, &y0) {
                    y = y + if w == 1.0 { d } else { d * w };
                }
            }
            Strength::Rows(own) => {
                let Some(d) = delta(adapter, &x.rows(own), &y0.rows(own)) else { continue };
                rows.push(own.clone());
                parts.push(d);
            }
        }
    }
    if parts.is_empty() {
        return y;
    }
    drop(y0); // so that `y` is updated where it lies
    let dims = y.dims();
    // As a matrix: on more axes flex finds the place of every number by divisions.
    let flat = |t: Tensor<D>| t.flatten::<2>(1, D - 1);
    let (rows, parts) = (Tensor::cat(rows, 0), flat(Tensor::cat(parts, 0)));
    flat(y).select_assign(0, rows, parts, IndexingUpdateOp::Add).reshape(dims)
}
