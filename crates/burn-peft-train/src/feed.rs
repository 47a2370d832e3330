//! Batches for the learner: the whole run's optimizer steps in one deterministic order.

use crate::data::{in_order, length_grouped, plain};
use crate::{Options, Step};
use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::DatasetError;
use burn::tensor::Device;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Makes a batch of items, by their indices.
pub type Collate<B> = Arc<dyn Fn(&[usize]) -> B + Send + Sync>;

/// All optimizer steps of a run, made when asked for. The order depends on the seed alone.
pub struct TrainFeed<B> {
    collate: Collate<B>,
    lengths: Arc<Vec<usize>>,
    batch_size: usize,
    accumulation: usize,
    grouped: bool,
    seed: u64,
    steps_per_epoch: usize,
    range: Range<usize>,
}

impl<B> fmt::Debug for TrainFeed<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let items = self.lengths.len();
        f.debug_struct("TrainFeed").field("items", &items).field("steps", &self.range).finish()
    }
}

impl<B> Clone for TrainFeed<B> {
    fn clone(&self) -> Self {
        Self {
            collate: self.collate.clone(),
            lengths: self.lengths.clone(),
            range: self.range.clone(),
            ..*self
        }
    }
}

impl<B> TrainFeed<B> {
    /// Over items of these lengths.
    pub fn new(lengths: Vec<usize>, collate: Collate<B>, options: &Options) -> Self {
        let batches = lengths.len().div_ceil(options.per_device_train_batch_size);
        let steps_per_epoch = batches.div_ceil(options.gradient_accumulation_steps);
        let steps = steps_per_epoch.saturating_mul(options.num_train_epochs);
        Self {
            collate,
            lengths: Arc::new(lengths),
            batch_size: options.per_device_train_batch_size,
            accumulation: options.gradient_accumulation_steps,
            grouped: options.group_by_length,
            seed: options.seed,
            steps_per_epoch,
            range: 0..options.max_steps.unwrap_or(steps),
        }
    }

    /// Optimizer steps in the whole run.
    pub fn steps(&self) -> usize {
        self.range.len()
    }

    /// Optimizer steps in one epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps_per_epoch
    }

    /// At most `count` batches of the first epoch, however many steps there are.
    pub fn first(&self, count: usize) -> Vec<B> {
        let batches = self.epoch(0);
        batches.iter().take(count).map(|items| (self.collate)(items)).collect()
    }

    /// A batch of the longest item alone.
    pub fn longest(&self) -> Option<B> {
        let (longest, _) = self.lengths.iter().enumerate().max_by_key(|(_, length)| **length)?;
        Some((self.collate)(&[longest]))
    }

    /// The items of [`first`](Self::first), each in a batch of its own.
    pub fn first_cut(&self, count: usize) -> Vec<B> {
        let batches = self.epoch(0);
        batches.iter().take(count).flatten().map(|&item| (self.collate)(&[item])).collect()
    }

    /// The items of these optimizer steps, each in a batch of its own.
    pub fn cut(&self, steps: Range<usize>) -> Vec<B> {
        let mut planned = None;
        let items: Vec<usize> =
            steps.flat_map(|at| self.items(at, &mut planned)).flatten().collect();
        items.iter().map(|&item| (self.collate)(&[item])).collect()
    }

    /// The items of an optimizer step, batch by batch; `planned` is an epoch that is known.
    fn items(&self, index: usize, planned: &mut Option<Planned>) -> Vec<Vec<usize>> {
        let (epoch, within) = (index / self.steps_per_epoch, index % self.steps_per_epoch);
        if planned.as_ref().is_none_or(|(known, _)| *known != epoch) {
            *planned = Some((epoch, self.epoch(epoch)));
        }
        let batches = planned.as_ref().map_or(&[][..], |(_, batches)| batches);
        let first = within * self.accumulation;
        let last = (first + self.accumulation).min(batches.len());
        batches[first..last].to_vec()
    }

    fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        let epoch = epoch as u64;
        match self.grouped {
            true => length_grouped(&self.lengths, self.batch_size, self.seed, epoch),
            false => plain(self.lengths.len(), self.batch_size, self.seed, epoch),
        }
    }
}

/// An epoch, and the items of its batches.
type Planned = (usize, Vec<Vec<usize>>);

struct Steps<'f, B> {
    feed: &'f TrainFeed<B>,
    next: usize,
    planned: Option<Planned>,
}

impl<B> Iterator for Steps<'_, B> {
    type Item = Result<Step<B>, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next;
        if index >= self.feed.range.end {
            return None;
        }
        self.next += 1;
        let items = self.feed.items(index, &mut self.planned);
        Some(Ok(Step {
            index,
            epoch: index / self.feed.steps_per_epoch,
            ends_epoch: (index + 1).is_multiple_of(self.feed.steps_per_epoch),
            batches: items.iter().map(|items| (self.feed.collate)(items)).collect(),
        }))
    }

    /// Skips without making batches: how a resumed run gets to its place.
    fn nth(&mut self, n: usize) -> Option<Self::Item> {
        self.next += n;
        self.next()
    }
}

impl<B> DataLoaderIterator<Step<B>> for Steps<'_, B> {
    fn progress(&self) -> Progress {
        Progress::new(self.next, self.feed.range.end, Some("steps".to_owned()))
    }
}

impl<B: Send + Sync + 'static> DataLoader<Step<B>> for TrainFeed<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Step<B>> + 'a> {
        Box::new(Steps { feed: self, next: self.range.start, planned: None })
    }

    fn num_items(&self) -> usize {
        self.steps()
    }

    fn to_device(&self, _device: &Device) -> Arc<dyn DataLoader<Step<B>>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<Step<B>>> {
        let first = self.range.start;
        let end = (first + end).min(self.range.end);
        Arc::new(Self { range: (first + start).min(end)..end, ..self.clone() })
    }
}

/// Batches in a fixed order, shortest items first so that little is padded.
pub struct EvalFeed<B> {
    collate: Collate<B>,
    batches: Arc<Vec<Vec<usize>>>,
}

impl<B> Clone for EvalFeed<B> {
    fn clone(&self) -> Self {
        Self { collate: self.collate.clone(), batches: self.batches.clone() }
    }
}

impl<B> EvalFeed<B> {
    /// Over items of these lengths.
    pub fn new(lengths: &[usize], batch_size: usize, collate: Collate<B>) -> Self {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&item| lengths[item]);
        let batches = in_order(lengths.len(), batch_size);
        let batches = batches.into_iter().map(|b| b.into_iter().map(|i| order[i]).collect());
        Self { collate, batches: Arc::new(batches.collect()) }
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether there is nothing to evaluate on.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// The batches, each with the indices of its items.
    pub fn batches(&self) -> impl Iterator<Item = (&[usize], B)> {
        self.batches.iter().map(|items| (items.as_slice(), (self.collate)(items)))
    }
}

struct Evals<'f, B> {
    feed: &'f EvalFeed<B>,
    next: usize,
}

impl<B> Iterator for Evals<'_, B> {
    type Item = Result<B, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let items = self.feed.batches.get(self.next)?;
        self.next += 1;
        Some(Ok((self.feed.collate)(items)))
    }
}

impl<B> DataLoaderIterator<B> for Evals<'_, B> {
    fn progress(&self) -> Progress {
        Progress::new(self.next, self.feed.len(), Some("batches".to_owned()))
    }
}

impl<B: Send + Sync + 'static> DataLoader<B> for EvalFeed<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<B> + 'a> {
        Box::new(Evals { feed: self, next: 0 })
    }

    fn num_items(&self) -> usize {
        self.len()
    }

    fn to_device(&self, _device: &Device) -> Arc<dyn DataLoader<B>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B>> {
        let end = end.min(self.len());
        let batches = Arc::new(self.batches[start.min(end)..end].to_vec());
        Arc::new(Self { collate: self.collate.clone(), batches })
    }
}
