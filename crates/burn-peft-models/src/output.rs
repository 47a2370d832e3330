//! The output layer of language models: a layer of its own, or the table of words.

use burn::module::Param;
use burn::nn::{Embedding, Linear};
use burn::tensor::{Int, Tensor};
use burn_peft_core::Scope;
use burn_peft_kernels::{composed, cross_entropy, linear};

/// `lm_head` where the model has one, and the table `[vocab, hidden]` that serves where it has none.
pub(crate) struct Output<'a> {
    pub(crate) head: Option<&'a Linear>,
    pub(crate) table: &'a Embedding,
}

impl Output<'_> {
    /// `[batch, seq, hidden]` → `[batch, seq, vocab]`.
    pub(crate) fn logits(&self, hidden: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        match self.head {
            Some(head) => cx.at("lm_head").linear(head, hidden),
            None => linear(hidden, self.table.weight.val().transpose(), None),
        }
    }

    /// Cross-entropy of `hidden [n, hidden]` with a token each: the sum, and how many have it on top. The
    /// logits are not kept, unless something lies over the layer.
    pub(crate) fn cross_entropy(
        &self,
        hidden: Tensor<2>,
        targets: Vec<i32>,
        cx: &Scope<'_>,
    ) -> (Tensor<1>, Tensor<1, Int>) {
        let bare = |head: &&Linear| head.bias.is_none() && cx.at("lm_head").is_bare();
        let weight = match self.head {
            None => Some(self.table.weight.val().transpose()), // [hidden, vocab]
            Some(head) => Some(head).filter(bare).map(|head| Param::val(&head.weight)),
        };
        match weight {
            Some(weight) => cross_entropy(hidden, weight, targets),
            None => {
                let logits = self.logits(hidden.unsqueeze_dim(0), cx).squeeze_dim(0); // [n, vocab]
                composed::cross_entropy(logits, targets)
            }
        }
    }
}
