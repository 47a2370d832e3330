//! T5's relative positions (arXiv 1910.10683, section 2.1): a score for each head and each distance, where
//! far distances share one.

use burn::nn::Embedding;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{Error, Scope};

/// Which distances are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Distances {
    /// Rows of the table of scores.
    pub(crate) buckets: usize,
    /// From here on all are one.
    pub(crate) farthest: usize,
    /// Whether what comes later is seen, and has half of the rows.
    pub(crate) both_ways: bool,
}

impl Distances {
    /// Rows of one direction, and the distances below which each has a row of its own.
    fn one_way(self) -> (usize, usize) {
        let one_way = if self.both_ways { self.buckets / 2 } else { self.buckets };
        (one_way, one_way / 2)
    }

    /// Refuses rows that do not reach from the exact distances to the farthest.
    pub(crate) fn check(self) -> Result<(), Error> {
        if !self.buckets.is_multiple_of(2) || self.buckets < 4 {
            let reason = format!("expected an even number of 4 or more, found {}", self.buckets);
            return Err(Error::config("relative_attention_num_buckets", reason));
        }
        let (half, farthest) = (self.buckets / 2, self.farthest);
        if farthest <= half {
            let reason = format!(
                "expected more than {half}, half of relative_attention_num_buckets, found {farthest}"
            );
            return Err(Error::config("relative_attention_max_distance", reason));
        }
        Ok(())
    }

    /// The row of a key that stands `offset` behind its query, counted forwards. Half of the rows are for exact
    /// distances, the others for ever wider ranges of them, in f32 as in `transformers`.
    pub(crate) fn bucket(self, offset: i64) -> i32 {
        let (one_way, exact) = self.one_way();
        let (first, distance) = match (self.both_ways, offset > 0) {
            (true, true) => (one_way, offset as usize),
            (true, false) => (0, -offset as usize),
            (false, later) => (0, if later { 0 } else { -offset as usize }),
        };
        if distance < exact {
            return (first + distance) as i32;
        }
        let reach = (self.farthest as f64 / exact as f64).ln() as f32;
        let far = (distance as f32 / exact as f32).ln() / reach * (one_way - exact) as f32;
        (first + (exact + far as usize).min(one_way - 1)) as i32
    }
}

/// The scores of distances in one pass of an encoder or decoder.
#[derive(Debug, Clone)]
pub(crate) struct Relative {
    table: Embedding,
    /// Where the table lies, below the encoder or decoder.
    path: String,
    distances: Distances,
    rows: usize,
    total: usize,
    /// All blocks share them; but where the table is trained, so that each block reads its inputs alone.
    own: Option<Tensor<4>>,
}

impl Relative {
    /// Of `rows` tokens, the last of `total`, by the first block's table at `path` below `cx`.
    pub(crate) fn new(
        table: &Embedding,
        distances: Distances,
        [rows, total]: [usize; 2],
        (path, cx): (&str, &Scope<'_>),
    ) -> Self {
        let own = scores(table, distances, [rows, total, 0], &cx.at(path));
        let own = (!own.is_autodiff()).then_some(own);
        Self { table: table.clone(), path: path.to_owned(), distances, rows, total, own }
    }

    /// `[1, heads, rows, front + total]`: keys that a prefix sets in front stand where tokens before the first
    /// would, as in HF PEFT. `cx` is the encoder or decoder.
    pub(crate) fn scores(&self, front: usize, cx: &Scope<'_>) -> Tensor<4> {
        match &self.own {
            Some(own) if front == 0 => own.clone(),
            _ => {
                let size = [self.rows, self.total, front];
                scores(&self.table, self.distances, size, &cx.at(&self.path))
            }
        }
    }
}

fn scores(
    table: &Embedding,
    distances: Distances,
    [rows, total, front]: [usize; 3],
    cx: &Scope<'_>,
) -> Tensor<4> {
    let first = (total - rows) as i64;
    let keys = -(front as i64)..total as i64;
    let row = |query: i64| keys.clone().map(move |key| distances.bucket(key - query));
    let buckets: Vec<i32> = (first..first + rows as i64).flat_map(row).collect();
    let data = TensorData::new(buckets, [rows, front + total]);
    let buckets = Tensor::<2, Int>::from_data(data, &table.weight.device());
    cx.embedding(table, buckets).permute([2, 0, 1]).unsqueeze() // [1, heads, rows, front + total]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_peft_core::TensorFile;
    use std::path::Path;

    #[test]
    fn distances_fall_into_the_rows_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/t5");
        let mut file = TensorFile::open(path.join("golden.safetensors")).expect("is committed");
        for (both_ways, name) in [(true, "buckets.both_ways"), (false, "buckets.backwards")] {
            let distances = Distances { buckets: 32, farthest: 128, both_ways };
            let found: Vec<i64> =
                (-200..=200).map(|offset| i64::from(distances.bucket(offset))).collect();
            let expected = file.take_ints(name).expect("is in the golden file").1;
            assert_eq!(found, expected, "{name}");
        }
    }
}
