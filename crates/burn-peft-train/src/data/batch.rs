//! Items to batches: which go together, and how they are padded.

use super::split::shuffle;
use burn_peft_models::Tokens;

/// A tokenised text with its class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassItem {
    /// Token ids.
    pub ids: Vec<u32>,
    /// 0 for the first text, 1 for the second.
    pub type_ids: Vec<u32>,
    /// Class.
    pub label: i32,
}

/// A batch of what a classifier reads, with the class of each row.
#[derive(Debug, Clone)]
pub struct ClassBatch<I = Tokens> {
    /// What the model reads: padded tokens, or images.
    pub input: I,
    /// Class of each row.
    pub labels: Vec<i32>,
}

/// Pads rows on the right to the longest of them.
pub fn pad(rows: &[(&[u32], &[u32])], pad: u32) -> Tokens {
    let seq = rows.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    let mut tokens = Tokens { batch: rows.len(), seq, ..Tokens::default() };
    let mut type_ids = Vec::with_capacity(rows.len() * seq);
    for (ids, types) in rows {
        let fill = seq - ids.len();
        tokens.ids.extend(ids.iter().map(|id| *id as i32));
        tokens.ids.extend(std::iter::repeat_n(pad as i32, fill));
        tokens.mask.extend(std::iter::repeat_n(1, ids.len()));
        tokens.mask.extend(std::iter::repeat_n(0, fill));
        type_ids.extend(types.iter().map(|t| *t as i32));
        type_ids.extend(std::iter::repeat_n(0, seq - types.len().min(seq)));
    }
    tokens.type_ids = Some(type_ids);
    tokens
}

/// A batch of labelled texts.
pub fn class_batch(items: &[ClassItem], picked: &[usize], padding: u32) -> ClassBatch {
    let rows: Vec<(&[u32], &[u32])> =
        picked.iter().map(|&i| (&*items[i].ids, &*items[i].type_ids)).collect();
    ClassBatch {
        input: pad(&rows, padding),
        labels: picked.iter().map(|&i| items[i].label).collect(),
    }
}

/// Batches in the order of the items.
pub fn in_order(count: usize, batch_size: usize) -> Vec<Vec<usize>> {
    let items: Vec<usize> = (0..count).collect();
    items.chunks(batch_size).map(<[usize]>::to_vec).collect()
}

fn shuffled(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut items: Vec<usize> = (0..count).collect();
    shuffle(&mut items, seed.wrapping_add(epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    items
}

/// Batches of shuffled items; the order depends on seed and epoch alone.
pub fn plain(count: usize, batch_size: usize, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    shuffled(count, seed, epoch).chunks(batch_size).map(<[usize]>::to_vec).collect()
}

/// Batches of similar length, as `transformers` groups them: shuffled, cut into pools of 50
/// batches, each pool sorted by length, and the batches shuffled. The longest batch comes first,
/// so that a run that does not fit in memory ends at once.
pub fn length_grouped(
    lengths: &[usize],
    batch_size: usize,
    seed: u64,
    epoch: u64,
) -> Vec<Vec<usize>> {
    let mut batches = Vec::new();
    for pool in shuffled(lengths.len(), seed, epoch).chunks(batch_size.saturating_mul(50)) {
        let mut pool = pool.to_vec();
        pool.sort_by_key(|&item| std::cmp::Reverse(lengths[item]));
        batches.extend(pool.chunks(batch_size).map(<[usize]>::to_vec));
    }
    shuffle(&mut batches, seed.wrapping_add(epoch).wrapping_add(1));
    let longest = |batch: &Vec<usize>| batch.iter().map(|&item| lengths[item]).max();
    if let Some(first) =
        (0..batches.len()).max_by_key(|&i| (longest(&batches[i]), std::cmp::Reverse(i)))
    {
        batches.swap(0, first);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_item_is_in_one_batch(
            lengths in prop::collection::vec(1usize..200, 1..300),
            size in 1usize..9,
            seed in any::<u64>(),
            epoch in 0u64..4,
        ) {
            let both = [length_grouped(&lengths, size, seed, epoch), plain(lengths.len(), size, seed, epoch)];
            for batches in both {
                prop_assert_eq!(batches.len(), lengths.len().div_ceil(size));
                let mut items: Vec<usize> = batches.concat();
                items.sort_unstable();
                prop_assert_eq!(items, (0..lengths.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_longest_batch_comes_first_and_epochs_differ() {
        let lengths: Vec<usize> = (0..100).map(|i| i % 37 + 1).collect();
        let batches = length_grouped(&lengths, 4, 1, 0);
        assert!(batches[0].iter().any(|&item| lengths[item] == 37));
        assert_eq!(batches, length_grouped(&lengths, 4, 1, 0));
        assert_ne!(batches, length_grouped(&lengths, 4, 1, 1));
    }

    #[test]
    fn rows_are_padded_on_the_right() {
        let tokens = pad(&[(&[5, 6], &[0, 1]), (&[7], &[0])], 9);
        assert_eq!(tokens.ids, [5, 6, 7, 9]);
        assert_eq!(tokens.mask, [1, 1, 1, 0]);
        assert_eq!(tokens.type_ids, Some(vec![0, 1, 0, 0]));
    }
}
