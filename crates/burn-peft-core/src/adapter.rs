//! The two faces of a difference: on activations ([`Adapter`]) and on parameters ([`Fold`]).

use crate::{Hidden, Mask, Routed, SeenTokens};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Int, Tensor};
use std::fmt::Debug;

/// One trained difference at one place of a frozen model.
///
/// Each face is optional: a method implements those of the kinds of places that it serves. A face
/// returns the difference `δ(x, y0)` to the output `y0` of the frozen layer, or `None` where the
/// method has nothing to say at this kind of place.
///
/// A method that *replaces* what the layer computes (a trained copy; a rotation of the input)
/// gives the whole output by `linear_whole`, so that one matmul is paid and not two; its
/// difference is then the whole less `y0`, which is the default.
#[allow(unused_variables)]
pub trait Adapter: Debug + Send + Sync {
    /// `δ` of a linear layer: `x [batch, seq, in]`, `y [batch, seq, out]` → `[batch, seq, out]`.
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        self.linear_whole(layer, x).map(|whole| whole - y.clone())
    }

    /// [`Adapter::linear`] in a pass that reads `tokens`, for a method that asks which they are. `x` holds the states of
    /// the last of them, where it has fewer columns.
    fn linear_reading(
        &self,
        layer: &Linear,
        x: &Tensor<3>,
        y: &Tensor<3>,
        tokens: &SeenTokens,
    ) -> Option<Tensor<3>> {
        self.linear(layer, x, y)
    }

    /// The whole output of a linear layer, `[batch, seq, in] → [batch, seq, out]`.
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        None
    }

    /// `δ` of an embedding: `ids [batch, seq]`, `y [batch, seq, dim]` → `[batch, seq, dim]`.
    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        None
    }

    /// `δ` of a convolution over time: `x [batch, in, length]` → `[batch, out, length']`.
    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        None
    }

    /// `δ` of a convolution over an image: `x [batch, in, h, w]` → `[batch, out, h', w']`.
    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, y: &Tensor<4>) -> Option<Tensor<4>> {
        None
    }

    /// `δ` of a hidden state: what a sublayer or a block gives on, `[batch, seq, hidden]`.
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        None
    }

    /// Whether it reads hidden states of other tokens than the one at hand. No cache holds these: generation
    /// reads the whole sequence anew for each token then.
    fn whole_sequence(&self) -> bool {
        false
    }

    /// Whether `δ` of a token follows from that token's own states alone, wherever it lies. A padded batch may then
    /// come without its padding, its tokens one after the other as one row, `[1, tokens, hidden]`, and with no
    /// [`SeenTokens`]. Not so for what reads other tokens or their ids, stands in front of them, or draws a number
    /// for a row of the batch.
    fn by_token(&self) -> bool {
        false
    }

    /// `δ` of embedded tokens by where they stand: `positions [batch, seq]`, counted from 0 at the first token
    /// of a row or document → `[batch, seq, dim]`.
    fn positional(&self, positions: &Tensor<2, Int>) -> Option<Tensor<3>> {
        None
    }

    /// Virtual tokens in front of the embedded ones `x [batch, seq, dim]`: `[1, n, dim]` for every row, or
    /// `[batch, n, dim]`. `tokens` says which of `x` are padding, where the model reads tokens.
    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        None
    }

    /// Keys and values in front of those of an attention that reads `x [batch, seq, hidden]`: each
    /// `[1, n, width]` for every row, or `[batch, n, width]`, laid out as the attention's own projection
    /// gives them, before heads are split. `tokens` are as in [`Adapter::prompt`]; virtual ones among `x` are
    /// none of the sequence's own.
    fn prefix(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        None
    }

    /// Virtual tokens in front of `x [batch, seq, hidden]`, which the block number `block` of the model is about to
    /// read: `[1, n, hidden]` for every row, or `[batch, n, hidden]`. `held` is what the block before gave on for those
    /// that stood in front of it; without an answer none do from here on. `tokens` are as in [`Adapter::prompt`].
    fn carried(
        &self,
        block: usize,
        x: &Tensor<3>,
        held: Option<&Tensor<3>>,
        tokens: Option<&SeenTokens>,
    ) -> Option<Tensor<3>> {
        None
    }

    /// How many tokens, or keys and values, [`Adapter::prompt`], [`Adapter::prefix`] or [`Adapter::carried`] set in
    /// front.
    fn virtual_tokens(&self) -> usize {
        0
    }

    /// The one of the tokens of [`Adapter::prompt`] that is a `[MASK]`, at whose state a classifier reads its class.
    fn mask(&self) -> Option<Mask> {
        None
    }

    /// `δ` of what an attention mixes, before its output layer: what it reads, `x [batch, seq, hidden]`, queries
    /// `q [batch, heads, seq, d]` with their positions, and its own layers for keys and values →
    /// `[batch, seq, heads · d]`.
    fn attention(
        &self,
        x: &Tensor<3>,
        q: &Tensor<4>,
        key: &Linear,
        value: &Linear,
    ) -> Option<Tensor<3>> {
        None
    }

    /// What is added to the products `q·k` of an attention's queries and keys, before anything divides these:
    /// `[rows, total]`, the same for every row of the batch and every head. `total` keys are those that the attention makes
    /// of what it reads, and the queries those of the last `rows` of them; what a prefix sets in front has nothing added.
    /// An attention to the output of an encoder is not asked. Who answers must [stand in front](Adapter::virtual_tokens)
    /// as well: rows of a batch cannot have their own, and [`Bank::rows`](crate::Bank::rows) refuses it by that.
    fn products(&self, rows: usize, total: usize) -> Option<Tensor<2>> {
        None
    }

    /// For which tokens alone block number `block` of the model is run, of those whose states `x [batch, seq, hidden]` it is
    /// about to read, and what all of them get beside it; `None`: for all. `mask [batch or 1, 1, seq or 1, seq]` is what the
    /// block adds to the score of each pair: [`HIDDEN`](crate::HIDDEN) where the one must not see the other. What lies
    /// inside the block reads the chosen tokens as a sequence. Asked by models whose tokens all see each other.
    fn routed(&self, block: usize, x: &Tensor<3>, mask: Option<&Tensor<4>>) -> Option<Routed> {
        None
    }

    /// What takes the place of a norm's `(scale, shift)`, each `[dim]`, where this adapter trains them.
    fn norm(&self) -> (Option<Tensor<1>>, Option<Tensor<1>>) {
        (None, None)
    }
}

/// The same difference on parameters: `W' = W + Δ(W)`, `b' = b + Δ(b)`.
///
/// This is what makes merging, and models that know nothing of adapters, possible. A method that
/// cannot fold (because its difference is not linear in the input) does not implement it, and
/// merging it does not compile.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no difference of weights, so it cannot be merged or attached",
    label = "this adapter acts on activations only",
    note = "run the model with the adapter as an overlay instead: `model.forward(.., &Scope::new(&adapters))`"
)]
pub trait Fold: Adapter {
    /// `Δ(W)` for a weight read as the matrix `[fan_in, fan_out]` ([`as_matrix`](crate::as_matrix)).
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>>;

    /// `Δ(v)` for a vector that is a weight: the scale of a norm, `[dim]`.
    fn vector(&self, v: &Tensor<1>) -> Option<Tensor<1>> {
        let _ = v;
        None
    }

    /// Why it is no difference of weights after all, where its configuration makes it one of activations.
    fn unfoldable(&self) -> Option<&'static str> {
        None
    }

    /// Whether it has a bias of its own, which a layer without one has no place for.
    fn brings_bias(&self) -> bool {
        false
    }

    /// `Δ(b)` for a bias, `[fan_out]`.
    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        let _ = b;
        None
    }
}
