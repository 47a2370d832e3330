//! What a text model reads: token ids on the host, where they can be checked.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Error, SeenTokens};

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

    /// Refuses what a forward pass could not take.
    ///
    /// # Errors
    /// Parts of different sizes, ids outside the vocabulary, or more columns than the model has
    /// positions.
    pub fn check(&self, vocab: usize, positions: usize) -> Result<(), Error> {
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
        if self.seq > positions {
            let found = format!("expected at most {positions} tokens a row, found {}", self.seq);
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
        Tensor::from_data(TensorData::new(values.to_vec(), [self.batch, self.seq]), device)
    }

    /// For what lies over the model, after `past` columns that were read before.
    pub(crate) fn seen(&self, past: usize, device: &Device) -> SeenTokens {
        let [ids, kept] = [&self.ids, &self.mask].map(|values| self.tensor(values, device));
        SeenTokens { ids, kept, past }
    }

    /// Positions by column, after `past` columns that were read before. As in `transformers`, padding
    /// counts: rotary positions act by their distances alone.
    pub(crate) fn positions(&self, past: usize) -> Vec<i32> {
        if let Some(positions) = &self.positions {
            return positions.clone();
        }
        let row = past as i32..(past + self.seq) as i32;
        std::iter::repeat_n(row, self.batch).flatten().collect()
    }
}
