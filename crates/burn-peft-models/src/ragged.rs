//! Batches without their padding.
//!
//! Most of a model's arithmetic goes token by token: norms, linear layers, activations. Where all that lies over it does so
//! too ([`Scope::by_token`]), the tokens of a padded batch are laid one after the other, and padding costs nothing
//! there; only attention sees rows.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::Scope;

/// Where the tokens of a padded batch stand.
#[derive(Debug, Clone)]
pub(crate) struct Ragged {
    batch: usize,
    seq: usize,
    /// Where each token stands in the padded batch, `[tokens]`.
    padded: Tensor<1, Int>,
    /// Which token stands at each place of the padded batch, `[batch · seq]`: at padding, the first of its row.
    tokens: Tensor<1, Int>,
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
        if whole || !begins || !burn_peft_kernels::any_shape(device) || !cx.by_token() {
            return None;
        }
        let (mut padded, mut tokens) = (Vec::new(), Vec::with_capacity(mask.len()));
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
        Some(Self { batch, seq, padded, tokens })
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
