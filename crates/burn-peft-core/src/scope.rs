//! Where a forward pass is and what lies over it.

use crate::routed::Cut;
use crate::sum::{Read, States, sum};
use crate::{
    Adapter, Blocks, Carried, Grid, Hidden, Laid, Mask, Overlay, SeenTokens, Strength, widened,
};
use burn::module::Param;
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, LayerNorm, Linear, RmsNorm};
use burn::tensor::{Int, Tensor};
use burn_peft_kernels as kernels;
use std::sync::Arc;

/// What is added to the score of a pair that must not see each other: finite, so that a row of padding
/// stays a number.
pub const HIDDEN: f32 = -1e9;

/// Tokens (`N = 1`), or keys and values (`N = 2`), that stand in front of a sequence.
#[derive(Debug, Clone)]
pub struct Front<const N: usize> {
    /// Each `[batch, n, width]`.
    pub parts: [Tensor<3>; N],
    /// What is added to the scores of each of the `n`, so that it counts as often as its strength says: its
    /// logarithm, 0 for the usual strength of 1, [`HIDDEN`] for none.
    pub scores: Vec<f32>,
}

/// Where a forward pass is, and what lies over the model; handed down the forward by argument.
///
/// A model says `cx.at("query").linear(&self.query, x)` and nothing more: the scope adds what
/// lies there, `y = y0 + Σ wᵢ·δᵢ(x, y0)`.
#[derive(Clone)]
pub struct Scope<'a> {
    pub(crate) overlay: &'a dyn Overlay,
    pub(crate) path: String,
    pub(crate) tokens: Option<SeenTokens>,
    pub(crate) grid: Option<Grid>,
    /// Which of a sequence's tokens are here, where these are some.
    pub(crate) cut: Option<Arc<Cut>>,
    pub(crate) blocks: Option<&'a Blocks<'a>>,
}

impl std::fmt::Debug for Scope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<'a> Scope<'a> {
    /// At the root of a model with `overlay` over it.
    pub fn new(overlay: &'a dyn Overlay) -> Self {
        Self { overlay, path: String::new(), tokens: None, grid: None, cut: None, blocks: None }
    }

    /// The plain model.
    pub fn plain() -> Scope<'static> {
        Scope::new(&())
    }

    /// One level down. Names are those of the Hugging Face checkpoint; `name` may hold dots.
    pub fn at(&self, name: &str) -> Self {
        let mut path = String::with_capacity(self.path.len() + 1 + name.len());
        path.push_str(&self.path);
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(name);
        let (tokens, cut) = (self.tokens.clone(), self.cut.clone());
        Self { overlay: self.overlay, path, tokens, grid: self.grid, cut, blocks: self.blocks }
    }

    /// The same place, in a pass that reads these tokens: what lies over hidden states and linear layers may ask
    /// which.
    pub fn reading(&self, tokens: SeenTokens) -> Self {
        Self { tokens: Some(tokens), ..self.clone() }
    }

    /// The same place, in a pass over an image whose patches lie so: what lies over hidden states may ask.
    pub fn over(&self, grid: Grid) -> Self {
        Self { grid: Some(grid), ..self.clone() }
    }

    /// The block `index` of the list `name`, such as `layer.3`.
    pub fn block(&self, name: &str, index: usize) -> Self {
        self.at(&format!("{name}.{index}"))
    }

    /// Where we are.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn laid(&self) -> Vec<Laid<'a>> {
        let mut laid = Vec::new();
        self.overlay.at(&self.path, &mut laid);
        laid
    }

    /// Whether all that lies over the model goes [token by token](Adapter::by_token), so that a layer may be run for some
    /// tokens of each row.
    pub fn by_token(&self) -> bool {
        self.overlay.by_token()
    }

    /// Whether what lies over the model is the same for all rows of the batch, so that they may be read as one where it also
    /// goes token by token.
    pub fn rows_alike(&self) -> bool {
        self.overlay.rows_alike()
    }

    /// Whether nothing lies over this place, so that its layer may be computed in any way.
    pub fn is_bare(&self) -> bool {
        self.laid().is_empty()
    }

    /// A linear layer with what lies over it: `[batch, in]`, `[batch, seq, in]` or more axes → `[.., out]`.
    pub fn linear<const D: usize>(&self, layer: &Linear, x: Tensor<D>) -> Tensor<D> {
        let laid = self.laid();
        if laid.is_empty() {
            return frozen(layer, x);
        }
        let mut dims = x.dims();
        let (batch, width) = (dims[0], dims[D - 1]);
        let rest: usize = dims[1..D - 1].iter().product();
        let x = x.reshape([batch, rest, width]);
        // An adapter that replaces the layer outright spares the frozen matmul, if it lies there alone
        // and fully: others would need the frozen output.
        let alone = match laid.as_slice() {
            [Laid { adapter, strength: Strength::Scale(1.0) }] => adapter.linear_whole(layer, &x),
            _ => None,
        };
        let y = alone.unwrap_or_else(|| {
            let y0 = frozen(layer, x.clone());
            let at = States { x, tokens: self.tokens.clone() };
            sum(laid, &at, y0, |a, States { x, tokens }, y| match tokens {
                Some(tokens) => a.linear_reading(layer, x, y, tokens),
                None => a.linear(layer, x, y),
            })
        });
        let [_, _, out] = y.dims();
        dims[D - 1] = out;
        y.reshape(dims)
    }

    /// An embedding with what lies over it: `[batch, seq]` → `[batch, seq, dim]`. Of a table in half precision the rows
    /// that are asked for are widened, so that all activations of the model are f32.
    pub fn embedding(&self, layer: &Embedding, ids: Tensor<2, Int>) -> Tensor<3> {
        let y0 = widened(layer.forward(ids.clone()));
        sum(self.laid(), &ids, y0, |a, ids, y| a.embedding(layer, ids, y))
    }

    /// A convolution over time with what lies over it.
    pub fn conv1d(&self, layer: &Conv1d, x: Tensor<3>) -> Tensor<3> {
        let y0 = layer.forward(x.clone());
        sum(self.laid(), &x, y0, |a, x, y| a.conv1d(layer, x, y))
    }

    /// A convolution over images with what lies over it.
    pub fn conv2d(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
        let y0 = layer.forward(x.clone());
        sum(self.laid(), &x, y0, |a, x, y| a.conv2d(layer, x, y))
    }

    /// A hidden state with what lies over it: what the module at this path gives on,
    /// `[batch, seq, hidden]`.
    pub fn hidden(&self, mut at: Hidden<'_>) -> Tensor<3> {
        let laid = self.laid();
        if laid.is_empty() {
            return at.y;
        }
        at.tokens = self.tokens.clone();
        at.grid = self.grid;
        let y0 = at.y.clone();
        sum(laid, &at, y0, |a, at, _| a.hidden(at))
    }

    /// Whether something here reads [the states of other tokens](Adapter::whole_sequence).
    pub fn whole_sequence(&self) -> bool {
        self.laid().iter().any(|laid| laid.adapter.whole_sequence())
    }

    /// How many virtual tokens, or keys and values, stand in front here.
    pub fn virtual_tokens(&self) -> usize {
        self.laid().iter().map(|laid| laid.adapter.virtual_tokens()).sum()
    }

    /// The masks among the tokens that stand in front of the embedded ones here, where a classifier reads its class; what
    /// counts 0 times has none.
    pub fn masks(&self) -> Vec<Mask> {
        let (mut first, mut found) = (0, Vec::new());
        for Laid { adapter, strength } in self.laid() {
            let counts = !matches!(strength, Strength::Scale(w) if w == 0.0);
            if let Some(mask) = adapter.mask().filter(|_| counts) {
                found.push(Mask { column: first + mask.column, ..mask });
            }
            first += adapter.virtual_tokens();
        }
        found
    }

    /// Embedded tokens `x [batch, seq, dim]` with what lies over them by their positions, which are made when
    /// something does.
    pub fn positional(
        &self,
        x: Tensor<3>,
        positions: impl FnOnce() -> Tensor<2, Int>,
    ) -> Tensor<3> {
        let laid = self.laid();
        if laid.is_empty() {
            return x;
        }
        sum(laid, &positions(), x, |a, positions, _| a.positional(positions))
    }

    /// What stands in front of the embedded tokens `x [batch, seq, dim]`: `[batch, n, dim]`. Which tokens these
    /// are is asked when something does.
    pub fn prompt(&self, x: &Tensor<3>, tokens: impl FnOnce() -> SeenTokens) -> Option<Front<1>> {
        let laid = self.laid();
        if laid.is_empty() {
            return None;
        }
        let tokens = tokens();
        asked(laid, x, |adapter| adapter.prompt(x, Some(&tokens)).map(|prompt| [prompt]))
    }

    /// What stands in front of the keys and values of an attention that reads `x [batch, seq, hidden]`:
    /// each `[batch, n, width]`.
    pub fn prefix(&self, x: &Tensor<3>) -> Option<Front<2>> {
        asked(self.laid(), x, |adapter| adapter.prefix(x, self.tokens.as_ref()))
    }

    /// What stands in front of the states that the blocks of the list at this path read.
    pub fn carried(&self) -> Carried<'a> {
        Carried::new(self.laid(), self.tokens.clone())
    }

    /// The same place, where `n` virtual tokens stand in front of what is read; `scores` are then the model's own of
    /// each pair, as in [`SeenTokens`].
    pub fn behind(&self, n: usize, scores: Option<Tensor<4>>) -> Self {
        let tokens = self.tokens.as_ref().map(|tokens| tokens.behind(n, scores));
        let grid = self.grid.map(|grid| Grid { first: grid.first + n, ..grid });
        Self { tokens, grid, ..self.clone() }
    }

    /// What an attention that reads `x [batch, seq, hidden]` mixes, `y [batch, seq, heads · d]`, with what lies over
    /// it; see [`Adapter::attention`].
    pub fn attention(
        &self,
        x: &Tensor<3>,
        q: &Tensor<4>,
        key: &Linear,
        value: &Linear,
        y: Tensor<3>,
    ) -> Tensor<3> {
        let laid = self.laid();
        if laid.is_empty() {
            return y;
        }
        let read = Read { x: x.clone(), q: q.clone() };
        sum(laid, &read, y, |a, Read { x, q }, _| a.attention(x, q, key, value))
    }

    /// A layer norm with what lies over it, `[.., dim]`. `epsilon` is the one that `layer` was made with:
    /// Burn's layer keeps it to itself, and its own forward is not fused in training.
    pub fn layer_norm<const D: usize>(
        &self,
        layer: &LayerNorm,
        epsilon: f64,
        x: Tensor<D>,
    ) -> Tensor<D> {
        self.norm(x, |x, parts| {
            let (scale, shift) = own(layer, parts);
            kernels::layer_norm(x, scale, shift, epsilon)
        })
    }

    /// A layer norm of `x + residual`, as [`Scope::layer_norm`].
    pub fn layer_norm_of_sum<const D: usize>(
        &self,
        layer: &LayerNorm,
        epsilon: f64,
        x: Tensor<D>,
        residual: Tensor<D>,
    ) -> Tensor<D> {
        let laid = self.laid();
        let Some(parts) = alone(&laid) else {
            return self.layer_norm(layer, epsilon, x + residual);
        };
        let (scale, shift) = own(layer, parts);
        kernels::layer_norm_of_sum(x, residual, scale, shift, epsilon)
    }

    /// A root-mean-square norm with what lies over it, `[.., dim]`.
    pub fn rms_norm<const D: usize>(&self, layer: &RmsNorm, x: Tensor<D>) -> Tensor<D> {
        self.norm(x, |x, (scale, _)| {
            kernels::rms_norm(x, scale.unwrap_or_else(|| layer.gamma.val()), layer.epsilon)
        })
    }

    fn norm<const D: usize>(
        &self,
        x: Tensor<D>,
        forward: impl Fn(Tensor<D>, Parts) -> Tensor<D>,
    ) -> Tensor<D> {
        let laid = self.laid();
        if let Some(parts) = alone(&laid) {
            return forward(x, parts);
        }
        let y0 = forward(x.clone(), (None, None));
        sum(laid, &x, y0, |a, x, y| match a.norm() {
            (None, None) => None,
            parts => Some(forward(x.clone(), parts) - y.clone()),
        })
    }
}

/// Scale and shift of a norm, where they are replaced.
type Parts = (Option<Tensor<1>>, Option<Tensor<1>>);

/// The parts of a norm under nothing, or under one adapter that counts fully.
fn alone(laid: &[Laid<'_>]) -> Option<Parts> {
    match laid {
        [] => Some((None, None)),
        [Laid { adapter, strength: Strength::Scale(1.0) }] => Some(adapter.norm()),
        _ => None,
    }
}

/// A layer norm's scale and shift, or what replaces them; it has no shift to replace where it was made without.
fn own(layer: &LayerNorm, (scale, shift): Parts) -> (Tensor<1>, Option<Tensor<1>>) {
    let own_shift = layer.beta.as_ref().map(Param::val);
    let scale = scale.unwrap_or_else(|| layer.gamma.val());
    (scale, own_shift.map(|own| shift.unwrap_or(own)))
}

fn frozen<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    kernels::linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val))
}

/// What is added to the scores of tokens in front that count as often as this strength says. Rows of their own have no
/// meaning there, and `Bank::rows` refuses them.
pub(crate) fn score(strength: &Strength<'_>) -> f32 {
    match strength {
        Strength::Scale(weight) => (weight.ln() as f32).max(HIDDEN),
        Strength::Rows(_) => 0.0,
    }
}

/// Parts one after the other, if there are any.
pub(crate) fn front<const N: usize>(
    parts: [Vec<Tensor<3>>; N],
    scores: Vec<f32>,
) -> Option<Front<N>> {
    (!scores.is_empty()).then(|| Front { parts: parts.map(|part| Tensor::cat(part, 1)), scores })
}

/// What adapters set in front of `x [batch, seq, width]`, one after the other.
fn asked<const N: usize>(
    laid: Vec<Laid<'_>>,
    x: &Tensor<3>,
    of: impl Fn(&dyn Adapter) -> Option<[Tensor<3>; N]>,
) -> Option<Front<N>> {
    let [batch, _, _] = x.dims();
    let mut parts: [Vec<Tensor<3>>; N] = std::array::from_fn(|_| Vec::new());
    let mut scores = Vec::new();
    for Laid { adapter, strength } in laid {
        let Some(found) = of(adapter) else { continue };
        let [_, n, _] = found[0].dims();
        scores.extend(std::iter::repeat_n(score(&strength), n));
        for (part, tensor) in parts.iter_mut().zip(found) {
            let [_, n, width] = tensor.dims();
            part.push(tensor.expand([batch, n, width]).cast(x.dtype()));
        }
    }
    front(parts, scores)
}
