//! What the models of the zoo are trained for.

use crate::data::{CausalBatch, ClassBatch, IGNORED, Seq2SeqBatch};
use crate::{Loss, Objective};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Counted, Error, Scope};
use burn_peft_kernels::composed::cross_entropy;
use burn_peft_models::{
    BertForSequenceClassification, Classifier, Dinov2ForImageClassification, Images,
    LlamaForCausalLM, T5ForConditionalGeneration, Tokens, ViTForImageClassification,
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

/// Cross-entropy of the next token where it is learnt: those positions of `hidden [batch, seq, h]` alone go to
/// `loss`, as `[n, h]`.
fn next_tokens(
    hidden: Tensor<3>,
    targets: &[i32],
    device: &Device,
    loss: impl FnOnce(Tensor<2>, Vec<i32>) -> (Tensor<1>, Tensor<1, Int>),
) -> Loss {
    let [rows, seq, width] = hidden.dims();
    let learnt = targets.iter().enumerate().filter(|(_, target)| **target != IGNORED);
    let (at, targets): (Vec<i32>, Vec<i32>) = learnt.map(|(i, t)| (i as i32, *t)).unzip();
    if targets.is_empty() {
        let correct = ints(vec![0], device);
        return Loss { sum: hidden.sum() * 0.0, correct };
    }
    let picked = hidden.reshape([rows * seq, width]).select(0, ints(at, device)); // [n, h]
    loss(picked, targets).into()
}

fn learnt(targets: &[i32]) -> usize {
    targets.iter().filter(|target| **target != IGNORED).count()
}

impl Objective for LlamaForCausalLM {
    type Batch = CausalBatch;

    /// The output layer is run on positions with a target only. Virtual tokens have none: the first token of a
    /// sequence is nobody's target, with a prompt in front as without.
    fn loss(&self, batch: &CausalBatch, device: &Device, cx: &Scope<'_>) -> Loss {
        let hidden = self.hidden(&batch.tokens, cx, None); // [b, s, h]
        next_tokens(hidden, &batch.targets, device, |picked, targets| {
            self.cross_entropy(picked, targets, cx)
        })
    }

    fn check(&self, batch: &CausalBatch, cx: &Scope<'_>) -> Result<(), Error> {
        self.check(&batch.tokens, cx)
    }

    fn targets(batch: &CausalBatch) -> usize {
        learnt(&batch.targets)
    }

    fn tokens(batch: &CausalBatch) -> (usize, usize) {
        count(&batch.tokens)
    }

    fn counted(batch: &CausalBatch, targets_only: bool) -> Counted {
        counted(&batch.tokens, |at| !targets_only || batch.targets.get(at) != Some(&IGNORED))
    }
}

impl Objective for T5ForConditionalGeneration {
    type Batch = Seq2SeqBatch;

    /// `-Σ log p(target | those before it, input)`, as `transformers` sums it for `labels`.
    fn loss(&self, batch: &Seq2SeqBatch, device: &Device, cx: &Scope<'_>) -> Loss {
        let encoded = self.encode(&batch.input, cx);
        let hidden = self.hidden(&batch.decoder, &encoded, cx, None); // [b, s, h]
        next_tokens(hidden, &batch.targets, device, |picked, targets| {
            self.cross_entropy(picked, targets, cx)
        })
    }

    fn check(&self, batch: &Seq2SeqBatch, cx: &Scope<'_>) -> Result<(), Error> {
        self.check(&batch.input, cx)?;
        self.check(&batch.decoder, cx)
    }

    fn targets(batch: &Seq2SeqBatch) -> usize {
        learnt(&batch.targets)
    }

    fn tokens(batch: &Seq2SeqBatch) -> (usize, usize) {
        let (input, decoder) = (count(&batch.input), count(&batch.decoder));
        (input.0 + decoder.0, input.1 + decoder.1)
    }

    /// Those of the decoder, unless the encoder has as many columns and cannot be told from it: all count then.
    fn counted(batch: &Seq2SeqBatch, targets_only: bool) -> Counted {
        let alike = batch.input.seq == batch.decoder.seq;
        let all = Counted { kept: vec![true; batch.targets.len()], ..batch.decoder.counted() };
        let at = |at: usize| !targets_only || batch.targets.get(at) != Some(&IGNORED);
        if alike { all } else { counted(&batch.decoder, at) }
    }
}
