//! Batches without their padding.
//!
//! Most of a model's arithmetic goes token by token: norms, linear layers, activations. Where all that lies over it does so
//! too, and is the same for all rows ([`Scope::by_token`], [`Scope::rows_alike`]), the tokens of a padded batch are laid one
//! after the other, and padding costs nothing; only attention is told where a row ends.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::Scope;
use burn_peft_kernels::attention_rows;

/// Where the tokens of a padded batch stand.
#[derive(Debug, Clone)]
pub(crate) struct Ragged {
    batch: usize,
    seq: usize,
    /// Where each token stands in the padded batch, `[tokens]`.
    padded: Tensor<1, Int>,
    /// Which token stands at each place of the padded batch, `[batch · seq]`: at padding, the first of its row.
    tokens: Tensor<1, Int>,
    /// How many tokens each row has.
    lengths: Vec<usize>,
}

impl Ragged {
    /// `None` where nothing is gained: without padding, and on a device whose kernels are made for one shape and made anew
    /// for the next; or where the padded batch has to stay: something over the model asks for rows, or a row
    /// begins with padding, whose state is read as that of its first token.
    pub(crate) fn of(
        mask: &[i32],
        [batch, seq]: [usize; 2],
        cx: &Scope<'_>,
        device: &Device,
    ) -> Option<Self> {
        let whole = mask.iter().all(|kept| *kept != 0);
        let begins = mask.iter().step_by(seq.max(1)).all(|kept| *kept != 0);
        let may_lie_so = cx.by_token() && cx.rows_alike() && burn_peft_kernels::any_shape(device);
        if whole || !begins || !may_lie_so {
            return None;
        }
        let (mut padded, mut tokens) = (Vec::new(), Vec::with_capacity(mask.len()));
        let lengths = mask.chunks(seq).map(|row| row.iter().filter(|kept| **kept != 0).count());
        let lengths = lengths.collect();
        for (row, mask) in mask.chunks(seq).enumerate() {
            let first = padded.len() as i32;
            for (column, kept) in mask.iter().enumerate() {
                if *kept == 0 {
                    tokens.push(first);
                } else {
                    tokens.push(padded.len() as i32);
                    padded.push((row * seq + column) as i32);
                }
            }
        }
        let [padded, tokens] = [padded, tokens].map(|places| {
            let count = places.len();
            Tensor::from_data(TensorData::new(places, [count]), device)
        });
        Some(Self { batch, seq, padded, tokens, lengths })
    }

    /// Where the first token of each row stands, `[batch]`.
    pub(crate) fn first_of_rows(&self) -> Tensor<1, Int> {
        let rows: Tensor<2, Int> = self.tokens.clone().reshape([self.batch, self.seq]);
        rows.narrow(1, 0, 1).squeeze_dim(1)
    }

    /// What the tokens of each row mix, `[1, queries, heads · d]`, for all of them or for the first of each row:
    /// `q [1, heads, queries, d]`, `k`, `v [1, heads, tokens, d]`.
    pub(crate) fn mix(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, first: bool) -> Tensor<3> {
        let queries = |keys: usize| if first { 1 } else { keys };
        attention_rows(q, k, v, self.lengths.iter().map(|keys| [queries(*keys), *keys]).collect())
    }

    /// `[batch, seq, width]` → `[1, tokens, width]`.
    pub(crate) fn pack(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, width] = x.dims();
        let rows: Tensor<2> = x.reshape([self.batch * self.seq, width]);
        rows.select(0, self.padded.clone()).unsqueeze()
    }

    /// `[1, tokens, width]` → `[batch, seq, width]`. At padding stand the states of the row's first token.
    pub(crate) fn unpack(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, count, width] = x.dims();
        let rows: Tensor<2> = x.reshape([count, width]);
        rows.select(0, self.tokens.clone()).reshape([self.batch, self.seq, width])
    }
}
