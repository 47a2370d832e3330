//! aLoRA (arXiv 2504.12397): LoRA from its invocation on.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use burn_peft_core::{Error, Kind, SeenTokens, Sites};

/// aLoRA (arXiv 2504.12397, section 3): the difference is LoRA's on the tokens of the last invocation in a row and on all
/// that follow, and nothing before, so that keys and values of what stands before are the base model's. A row without an
/// invocation is the base model's. Documents that are packed into one row are one row.
///
/// Trains what LoRA trains. It does not fold: no weight knows of tokens. What a model reads is told by
/// [`Scope::reading`](burn_peft_core::Scope::reading); a place that is told of no tokens stays frozen. In HF PEFT that is
/// every place of a model other than a causal one, unless its forward is given `alora_offsets`.
#[derive(Module, Debug)]
pub struct Invocation {
    /// `alora_invocation_tokens`.
    #[module(skip)]
    pub tokens: Vec<u32>,
}

impl Invocation {
    /// 1 for the columns from the last invocation on and 0 for others, `[batch, columns]`: those of the last
    /// tokens read, of which some layers are shown a part.
    pub(crate) fn mask(&self, read: &SeenTokens, columns: usize) -> Tensor<2> {
        let ids = match &read.before {
            Some(before) => Tensor::cat(vec![before.clone(), read.ids.clone()], 1),
            None => read.ids.clone(),
        };
        let ([batch, total], device) = (ids.dims(), ids.device());
        let Some(starts) = (total + 1).checked_sub(self.tokens.len()).filter(|&n| n > 0) else {
            return Tensor::zeros([batch, columns], &device);
        };
        // Counted from 1: of the last start of an invocation, 0 for none.
        let counted = |from: usize, to: usize| -> Tensor<2, Int> {
            Tensor::arange(from as i64..to as i64, &device).unsqueeze()
        };
        let found = self.tokens.iter().enumerate().fold(
            counted(1, starts + 1).expand([batch, starts]),
            |found, (i, &token)| {
                found * ids.clone().narrow(1, i, starts).equal_elem(i64::from(token)).int()
            },
        );
        let last = found.max_dim(1); // [batch, 1]
        let shown = counted(total + 1 - columns, total + 1).expand([batch, columns]);
        let last = last.expand([batch, columns]);
        (shown.greater_equal(last.clone()).int() * last.greater_elem(0).int()).float()
    }
}

/// Refuses tokens that no table of the model has.
pub(crate) fn check_tokens(tokens: &[u32], sites: &Sites) -> Result<(), Error> {
    let tables = sites.all.iter().filter(|site| site.kind == Kind::Embedding);
    let Some(vocabulary) = tables.map(|table| table.fan_in()).max() else {
        return Ok(());
    };
    match tokens.iter().find(|&&token| token as usize >= vocabulary) {
        Some(token) => {
            let reason = format!("expected tokens below {vocabulary}, found {token}");
            Err(Error::config("alora_invocation_tokens", reason))
        }
        None => Ok(()),
    }
}
