//! What the models of the zoo are trained for.

use crate::data::{CausalBatch, ClassBatch, IGNORED};
use crate::{Loss, Objective};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Counted, Error, Scope};
use burn_peft_kernels::composed::cross_entropy;
use burn_peft_models::{
    BertForSequenceClassification, Classifier, Dinov2ForImageClassification, Images,
    LlamaForCausalLM, Tokens, ViTForImageClassification,
};

fn ints(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

impl From<(Tensor<1>, Tensor<1, Int>)> for Loss {
    /// A sum over targets, and how many were right.
    fn from((sum, correct): (Tensor<1>, Tensor<1, Int>)) -> Self {
        Self { sum, correct }
    }
}

fn counted(tokens: &Tokens, also: impl Fn(usize) -> bool) -> Counted {
    let kept = tokens.mask.iter().enumerate().map(|(at, kept)| *kept != 0 && also(at));
    Counted { batch: tokens.batch, seq: tokens.seq, kept: kept.collect() }
}

fn count(tokens: &Tokens) -> (usize, usize) {
    (tokens.mask.iter().filter(|kept| **kept != 0).count(), tokens.ids.len())
}

/// What a classifier reads: how much of it is padding.
trait Reading {
    fn count(&self) -> (usize, usize);
    fn counted(&self) -> Counted;
}

impl Reading for Tokens {
    fn count(&self) -> (usize, usize) {
        count(self)
    }

    fn counted(&self) -> Counted {
        counted(self, |_| true)
    }
}

/// An image is all there: it counts as one, with all its patches.
impl Reading for Images {
    fn count(&self) -> (usize, usize) {
        (self.batch, self.batch)
    }

    fn counted(&self) -> Counted {
        Counted { batch: self.batch, seq: 1, kept: vec![true; self.batch] }
    }
}

macro_rules! classifiers {
    ($($model:ty),+) => {$(
        impl Objective for $model {
            type Batch = ClassBatch<<$model as Classifier>::Input>;

            fn loss(&self, batch: &Self::Batch, _device: &Device, cx: &Scope<'_>) -> Loss {
                let logits = Classifier::forward(self, &batch.input, cx);
                cross_entropy(logits, batch.labels.clone()).into()
            }

            fn check(&self, batch: &Self::Batch, cx: &Scope<'_>) -> Result<(), Error> {
                Classifier::check(self, &batch.input, cx)
            }

            fn targets(batch: &Self::Batch) -> usize {
                batch.labels.len()
            }

            fn tokens(batch: &Self::Batch) -> (usize, usize) {
                batch.input.count()
            }

            fn counted(batch: &Self::Batch, _targets_only: bool) -> Counted {
                batch.input.counted()
            }
        }
    )+};
}
classifiers!(
    BertForSequenceClassification,
    ViTForImageClassification,
    Dinov2ForImageClassification
);

impl Objective for LlamaForCausalLM {
    type Batch = CausalBatch;

    /// The output layer is run on positions with a target only. Virtual tokens have none: the first token of a
    /// sequence is nobody's target, with a prompt in front as without.
    fn loss(&self, batch: &CausalBatch, device: &Device, cx: &Scope<'_>) -> Loss {
        let hidden = self.hidden(&batch.tokens, cx, None); // [b, s, h]
        let [rows, seq, width] = hidden.dims();
        let learnt = batch.targets.iter().enumerate().filter(|(_, target)| **target != IGNORED);
        let (at, targets): (Vec<i32>, Vec<i32>) = learnt.map(|(i, t)| (i as i32, *t)).unzip();
        if targets.is_empty() {
            let correct = ints(vec![0], device);
            return Loss { sum: hidden.sum() * 0.0, correct };
        }
        let picked = hidden.reshape([rows * seq, width]).select(0, ints(at, device)); // [n, h]
        self.cross_entropy(picked, targets, cx).into()
    }

    fn check(&self, batch: &CausalBatch, cx: &Scope<'_>) -> Result<(), Error> {
        self.check(&batch.tokens, cx)
    }

    fn targets(batch: &CausalBatch) -> usize {
        batch.targets.iter().filter(|target| **target != IGNORED).count()
    }

    fn tokens(batch: &CausalBatch) -> (usize, usize) {
        count(&batch.tokens)
    }

    fn counted(batch: &CausalBatch, targets_only: bool) -> Counted {
        counted(&batch.tokens, |at| !targets_only || batch.targets.get(at) != Some(&IGNORED))
    }
}
