//! A seeded order that is the same on every machine and in every version.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Shuffles by Fisher and Yates with ChaCha8, whose numbers are fixed by its specification.
pub fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for last in (1..items.len()).rev() {
        // The bias of the remainder is below 2^-32 for any list that fits in memory.
        let other = (rng.random::<u64>() % (last as u64 + 1)) as usize;
        items.swap(last, other);
    }
}

/// Takes a seeded random share out of `items`, at least one; the rest keeps its shuffled order.
///
/// Returns `(rest, share)`, or `None` where one of them would be empty.
pub fn hold_out<T>(mut items: Vec<T>, share: f64, seed: u64) -> Option<(Vec<T>, Vec<T>)> {
    let count = ((items.len() as f64 * share).round() as usize).max(1);
    if count >= items.len() {
        return None;
    }
    shuffle(&mut items, seed);
    let held = items.split_off(items.len() - count);
    Some((items, held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_depends_on_the_seed_alone() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..8).collect();
            shuffle(&mut items, seed);
            items
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        let mut sorted = order(3);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_lost_between_the_parts() {
        let (rest, held) = hold_out((0..10).collect(), 0.2, 7).unwrap_or_default();
        assert_eq!((rest.len(), held.len()), (8, 2));
        assert!(hold_out(vec![1], 0.5, 7).is_none());
    }
}
