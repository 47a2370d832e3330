//! What a text model reads: token ids on the host, where they can be checked.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Error, SeenTokens};
use std::ops::Range;

/// A padded batch of token sequences, row by row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// `input_ids`, `[batch · seq]`.
    pub ids: Vec<i32>,
    /// `attention_mask`: 1 for a token, 0 for padding, `[batch · seq]`.
    pub mask: Vec<i32>,
    /// `token_type_ids` (BERT); `None` is all 0.
    pub type_ids: Option<Vec<i32>>,
    /// Position of each token; `None` counts columns.
    pub positions: Option<Vec<i32>>,
    /// Number of the document that a token belongs to; tokens see their own document only.
    pub segments: Option<Vec<i32>>,
    /// Rows.
    pub batch: usize,
    /// Columns.
    pub seq: usize,
}

impl Tokens {
    /// One unpadded row.
    pub fn row(ids: &[u32]) -> Self {
        Self {
            ids: ids.iter().map(|id| *id as i32).collect(),
            mask: vec![1; ids.len()],
            batch: 1,
            seq: ids.len(),
            ..Self::default()
        }
    }

    /// Refuses what a forward pass could not take behind `front` virtual tokens.
    ///
    /// # Errors
    /// Parts of different sizes, ids outside the vocabulary, or more columns than the model has
    /// positions.
    pub fn check(&self, vocab: usize, positions: usize, front: usize) -> Result<(), Error> {
        let count = self.batch * self.seq;
        let parts = [
            ("input_ids", Some(&self.ids)),
            ("attention_mask", Some(&self.mask)),
            ("token_type_ids", self.type_ids.as_ref()),
            ("position_ids", self.positions.as_ref()),
        ];
        if count == 0 {
            return Err(Error::config("input_ids", "is empty; expected at least one token"));
        }
        for (name, part) in parts {
            if let Some(part) = part
                && part.len() != count
            {
                let (batch, seq) = (self.batch, self.seq);
                let found = format!("expected {batch} x {seq} numbers, found {}", part.len());
                return Err(Error::config(name, found));
            }
        }
        if self.seq + front > positions {
            let virtual_ones = match front {
                0 => String::new(),
                n => format!(" behind {n} virtual tokens"),
            };
            let found = format!(
                "expected at most {} tokens a row{virtual_ones}, found {}",
                positions.saturating_sub(front),
                self.seq
            );
            return Err(Error::config("input_ids", found));
        }
        let outside = self.ids.iter().position(|&id| id < 0 || id as usize >= vocab);
        if let Some(at) = outside {
            let (row, column) = (at / self.seq, at % self.seq);
            let found = format!(
                "expected ids below {vocab}, found {} at row {row}, column {column}",
                self.ids[at]
            );
            return Err(Error::config("input_ids", found));
        }
        Ok(())
    }

    pub(crate) fn tensor(&self, values: &[i32], device: &Device) -> Tensor<2, Int> {
        let columns = values.len() / self.batch.max(1);
        Tensor::from_data(TensorData::new(values.to_vec(), [self.batch, columns]), device)
    }

    /// For what lies over the model, behind `n` virtual tokens and after the ids of `past`, a row of the batch
    /// each, that were read before. Virtual tokens have no id, and are none of the sequence's own; `scores` are
    /// those of the model's attention.
    pub(crate) fn seen(
        &self,
        n: usize,
        past: &[Vec<i32>],
        scores: Option<Tensor<4>>,
        device: &Device,
    ) -> SeenTokens {
        let [ids, kept] = [(&self.ids, -1), (&self.mask, 0)]
            .map(|(values, front)| self.tensor(&self.behind(n, front, values), device));
        let columns = past.first().map_or(0, Vec::len);
        let before = (columns > 0).then(|| self.tensor(&past.concat(), device));
        SeenTokens { ids, kept, past: columns, before, scores }
    }

    /// The `values` of each row behind `n` times `front`, for the virtual tokens that stand there.
    pub(crate) fn behind(&self, n: usize, front: i32, values: &[i32]) -> Vec<i32> {
        let row = |own: &[i32]| [vec![front; n], own.to_vec()].concat();
        values.chunks(self.seq.max(1)).flat_map(row).collect()
    }

    /// Positions of each row: those in `front`, of virtual tokens, and its own behind them. These are counted
    /// by column from `first`; as in `transformers`, padding counts: rotary positions act by their distances
    /// alone. Where positions are given, their 0 is `zero`.
    pub(crate) fn positions(&self, front: Range<usize>, first: usize, zero: usize) -> Vec<i32> {
        let mut all = Vec::with_capacity(self.batch * (front.len() + self.seq));
        for row in 0..self.batch {
            all.extend(front.clone().map(|position| position as i32));
            match &self.positions {
                None => all.extend(first as i32..(first + self.seq) as i32),
                Some(given) => {
                    let own = &given[row * self.seq..(row + 1) * self.seq];
                    all.extend(own.iter().map(|position| position + zero as i32));
                }
            }
        }
        all
    }
}
