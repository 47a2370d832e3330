//! A block that is run for some tokens of each row alone: which these are, and what all get beside it.

use crate::{HIDDEN, Scope, SeenTokens, Strength};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use std::sync::Arc;

/// What an adapter says of a block `F` that it has run for `k` tokens of each row: `y = x + beside + share ⊙ (F(x) - x)`
/// for these, and `y = x + beside` for the others.
#[derive(Debug, Clone)]
pub struct Routed {
    /// Columns of the tokens that it is run for, `[batch, k]`, in their order; a constant.
    pub chosen: Tensor<2, Int>,
    /// 1 for each of these, and 0 where a row has fewer than `k`, `[batch, k]`; `None` where every row has `k`. Who is
    /// none is seen by nobody.
    pub real: Option<Tensor<2, Int>>,
    /// `[batch, k]`.
    pub share: Tensor<2>,
    /// `[batch, seq, hidden]`.
    pub beside: Tensor<3>,
    /// Whether the attention of `F` reads all tokens of a row, or those that it is run for alone.
    pub reads_all: bool,
}

/// All tokens of a sequence, where a block is run for some of them and its attention makes keys and values of all.
#[derive(Debug, Clone)]
pub struct Whole<'a> {
    /// Their states, `[batch, seq, hidden]`.
    pub x: Tensor<3>,
    /// What lies over them.
    pub cx: Scope<'a>,
}

/// Some tokens of each row.
#[derive(Debug)]
pub(crate) struct Cut {
    chosen: Tensor<2, Int>,
    real: Option<Tensor<2, Int>>,
    /// Columns that they are chosen of.
    seq: usize,
    reads_all: bool,
}

impl Cut {
    fn size(&self) -> [usize; 2] {
        self.chosen.dims()
    }

    /// Where they stand in the rows one after the other, `[batch · k]`.
    fn places(&self) -> Tensor<1, Int> {
        let [batch, k] = self.size();
        let rows = Tensor::<1, Int>::arange(0..batch as i64, &self.chosen.device());
        let first = (rows * self.seq as i64).reshape([batch, 1]).expand([batch, k]);
        (self.chosen.clone() + first).reshape([batch * k])
    }

    /// `[batch, seq, hidden]` → `[batch, k, hidden]`.
    fn taken(&self, x: &Tensor<3>) -> Tensor<3> {
        let ([batch, k], [_, seq, width]) = (self.size(), x.dims());
        let rows: Tensor<2> = x.clone().reshape([batch * seq, width]);
        rows.select(0, self.places()).reshape([batch, k, width])
    }

    /// `[batch, k, hidden]` → `[batch, seq, hidden]`, with zeros for the others.
    fn put_back(&self, y: Tensor<3>) -> Tensor<3> {
        let [batch, k, width] = y.dims();
        let shape = [batch * self.seq, width];
        let zeros = Tensor::<2>::zeros(shape, (&y.device().inner(), y.dtype()));
        let rows = y.reshape([batch * k, width]);
        zeros
            .select_assign(0, self.places(), rows, IndexingUpdateOp::Add)
            .reshape([batch, self.seq, width])
    }

    /// The rows of `[batch or 1, 1, seq or 1, total]` that are theirs.
    fn rows(&self, scores: Tensor<4>) -> Tensor<4> {
        let ([batch, k], [_, _, rows, total]) = (self.size(), scores.dims());
        if rows == 1 {
            return scores;
        }
        let at = self.chosen.clone().reshape([batch, 1, k, 1]).expand([batch, 1, k, total]);
        scores.expand([batch, 1, rows, total]).gather(2, at)
    }

    /// The columns of `[batch or 1, 1, rows, seq]` that are theirs.
    fn columns(&self, scores: Tensor<4>) -> Tensor<4> {
        let ([batch, k], [_, _, rows, total]) = (self.size(), scores.dims());
        let at = self.chosen.clone().reshape([batch, 1, 1, k]).expand([batch, 1, rows, k]);
        scores.expand([batch, 1, rows, total]).gather(3, at)
    }

    /// Scores among them, where those of all are `scores`: who is none is hidden.
    fn among(&self, scores: Option<Tensor<4>>) -> Option<Tensor<4>> {
        let own = scores.map(|scores| self.columns(self.rows(scores)));
        let Some(real) = &self.real else { return own };
        let [batch, k] = self.size();
        let own = own.unwrap_or_else(|| Tensor::zeros([batch, 1, 1, k], &real.device()));
        let none = real.clone().equal_elem(0).reshape([batch, 1, 1, k]);
        let shape = own.dims();
        Some(own.mask_fill(none.expand(shape), HIDDEN))
    }

    fn tokens(&self, tokens: &SeenTokens) -> SeenTokens {
        // Who is none has no id, as a virtual token has none.
        let [ids, kept] = [(&tokens.ids, -1), (&tokens.kept, 0)].map(|(all, none)| {
            let own = all.clone().gather(1, self.chosen.clone());
            match self.real.clone() {
                Some(real) => own.mask_fill(real.equal_elem(0), none),
                None => own,
            }
        });
        SeenTokens { ids, kept, past: 0, before: None, scores: self.among(tokens.scores.clone()) }
    }
}

impl<'a> Scope<'a> {
    /// Runs block number `index` of the list at this path, which reads `x [batch, seq, hidden]` and of whose tokens
    /// `mask [batch or 1, 1, seq or 1, seq]` hides some from others: for all tokens, or for those alone that what lies here
    /// [chooses](crate::Adapter::routed).
    ///
    /// `run(x, whole, mask, cx)` is the block over the states of so many tokens, at `block`: `cx` is that place among
    /// them. Where there is a `whole`, keys and values are to be made of that instead.
    ///
    /// The effects of several add up: `F(x) + Σ wᵢ·(cᵢ(x) - F(x))`, where `F` is the block for all tokens, which is not
    /// run where the `w` sum up to 1. For rows of their own each is run over the whole batch, since what lies inside
    /// the block knows rows by their number.
    pub fn routed(
        &self,
        index: usize,
        x: Tensor<3>,
        mask: Option<Tensor<4>>,
        block: &Scope<'a>,
        run: impl Fn(Tensor<3>, Option<&Whole<'a>>, Option<Tensor<4>>, &Scope<'a>) -> Tensor<3>,
    ) -> Tensor<3> {
        let mut found = Vec::new();
        for laid in self.laid() {
            if matches!(laid.strength, Strength::Scale(0.0)) {
                continue;
            }
            if let Some(routed) = laid.adapter.routed(index, &x, mask.as_ref()) {
                found.push((routed, laid.strength));
            }
        }
        if found.is_empty() {
            return run(x, None, mask, block);
        }
        let weights = found.iter().map(|(_, strength)| match strength {
            Strength::Scale(weight) => Some(*weight),
            Strength::Rows(_) => None,
        });
        let sum = weights.sum::<Option<f64>>();
        // Weights such as a third are not exact.
        let base = match sum.is_some_and(|sum| (sum - 1.0).abs() < 1e-9) {
            true => None,
            false => Some(run(x.clone(), None, mask.clone(), block)),
        };
        let mut y = base.clone();
        for (routed, strength) in found {
            let one = one(routed, &x, mask.as_ref(), block, &run);
            let d = base.clone().map_or(one.clone(), |base| one - base);
            let d = match strength {
                Strength::Scale(1.0) => d,
                Strength::Scale(weight) => d * weight,
                Strength::Rows(rows) => {
                    let own = d.select(0, rows.clone());
                    x.zeros_like().select_assign(0, rows.clone(), own, IndexingUpdateOp::Add)
                }
            };
            y = Some(y.map_or(d.clone(), |y| y + d));
        }
        y.unwrap_or(x)
    }

    /// What is added to the products of an attention's queries and keys, `[batch or 1, rows, total]`; see
    /// [`Adapter::products`](crate::Adapter::products).
    pub fn products(&self, rows: usize, total: usize) -> Option<Tensor<3>> {
        // Columns are those of the sequence, of which here are some.
        let (rows, total) = match &self.cut {
            Some(cut) => (cut.seq, cut.seq),
            None => (rows, total),
        };
        let weighted = |laid: crate::Laid<'_>| {
            let added = laid.adapter.products(rows, total)?;
            Some(match laid.strength {
                Strength::Scale(w) if w != 1.0 => added * w,
                _ => added,
            })
        };
        let added =
            self.laid().into_iter().filter_map(weighted).reduce(|sum, added| sum + added)?;
        let Some(cut) = &self.cut else { return Some(added.unsqueeze()) };
        let own = cut.rows(added.unsqueeze());
        let own = if cut.reads_all { own } else { cut.columns(own) };
        Some(own.squeeze_dim(1))
    }

    /// The same place among some of its tokens.
    fn among(&self, cut: Arc<Cut>) -> Self {
        let mut own = self.clone();
        own.tokens = own.tokens.map(|tokens| cut.tokens(&tokens));
        // Patches that were neighbours may not be there.
        own.grid = None;
        own.cut = Some(cut);
        own
    }
}

/// `x + beside + share ⊙ (F(x) - x)`, with `F` for the chosen alone.
fn one<'a>(
    routed: Routed,
    x: &Tensor<3>,
    mask: Option<&Tensor<4>>,
    block: &Scope<'a>,
    run: &impl Fn(Tensor<3>, Option<&Whole<'a>>, Option<Tensor<4>>, &Scope<'a>) -> Tensor<3>,
) -> Tensor<3> {
    let Routed { chosen, real, share, beside, reads_all } = routed;
    let [_, seq, _] = x.dims();
    let cut = Arc::new(Cut { chosen, real, seq, reads_all });
    let own = cut.taken(x);
    let whole = reads_all.then(|| Whole { x: x.clone(), cx: block.clone() });
    let mask = match reads_all {
        true => mask.map(|mask| cut.rows(mask.clone())),
        false => cut.among(mask.cloned()),
    };
    let y = run(own.clone(), whole.as_ref(), mask, &block.among(cut.clone()));
    let share = match &cut.real {
        Some(real) => share.clone() * real.clone().float().cast(share.dtype()),
        None => share,
    };
    let added = (y - own) * share.unsqueeze_dim::<3>(2).cast(x.dtype());
    x.clone() + beside.cast(x.dtype()) + cut.put_back(added)
}
