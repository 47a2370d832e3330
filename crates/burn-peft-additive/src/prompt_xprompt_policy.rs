//! When XPrompt leaves what out: tokens, then pieces, then back to the start (arXiv 2210.04457).

use crate::prompt_xprompt::{PrunedPrompt, XPrompt};
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapters, Error, Method, Policy};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// What XPrompt knows between steps.
#[derive(Debug, Clone)]
pub(crate) struct Pruning {
    method: XPrompt,
    /// After which step tokens are left out, and after which pieces.
    cuts: [usize; 2],
    /// Steps that are measured before each.
    window: usize,
    known: Scores,
}

/// Sums over the measured steps, as a checkpoint holds them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Scores {
    /// `Σ |∂L/∂γᵢ|`, a number a token.
    tokens: Vec<f32>,
    /// The same for pieces, token by token.
    pieces: Vec<f32>,
}

/// Which piece of `pieces` a column of `width` belongs to: pieces differ by a column at most.
fn piece(column: usize, width: usize, pieces: usize) -> usize {
    column * pieces / width
}

/// The places of the `share` of `scores` that are highest, at least one; the first where they are equal.
fn highest(scores: &[f32], among: &[usize], share: f64) -> Vec<usize> {
    let mut order = among.to_vec();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(((among.len() as f64 * share).ceil() as usize).max(1));
    order
}

impl Pruning {
    /// # Errors
    /// A training without a length, or one too short for two cuts and some steps after them.
    pub(crate) fn new(method: &XPrompt) -> Result<Self, Error> {
        method.check()?;
        let Some(total) = method.total_step else {
            return Err(Error::config("total_step", "expected the number of training steps"));
        };
        let steps = |share: f64| ((total as f64 * share).round() as usize).max(1);
        let (first, window) = (steps(method.prune_at), steps(method.measured));
        let cuts = [first, first + window];
        if window > first || cuts[1] >= total {
            let reason = format!(
                "expected steps before and after the cuts, which come after steps {} and {} by \
                 prune_at and measured; found {total} steps, {window} of them measured",
                cuts[0], cuts[1]
            );
            return Err(Error::config("total_step", reason));
        }
        Ok(Self { method: method.clone(), cuts, window, known: Scores::default() })
    }

    /// `P·∂L/∂P`, summed over each of `pieces` of a token.
    fn moments(product: &[f32], width: usize, pieces: usize) -> Vec<f32> {
        let mut sums = vec![0.0; product.len() / width * pieces];
        for (at, value) in product.iter().enumerate() {
            let (token, column) = (at / width, at % width);
            sums[token * pieces + piece(column, width, pieces)] += value;
        }
        sums
    }

    fn observe(&mut self, step: usize, prompt: &PrunedPrompt, gradient: Tensor<2>) {
        let pieces = self.method.num_pieces;
        let [tokens, after] = self.cuts;
        let (held, pieces) = match step {
            _ if step + self.window > tokens && step <= tokens => (&mut self.known.tokens, 1),
            _ if step > tokens && step <= after => (&mut self.known.pieces, pieces),
            _ => return,
        };
        let value = prompt.prompt_embeddings.val().without_autodiff();
        let [_, width] = value.dims();
        let product = (value * gradient.without_autodiff()).into_data().convert::<f32>();
        let product: Vec<f32> = product.iter::<f32>().collect();
        let found = Self::moments(&product, width, pieces);
        held.resize(found.len(), 0.0);
        for (sum, found) in held.iter_mut().zip(found) {
            *sum += found.abs();
        }
    }

    /// The mask with only those tokens, or pieces, that matter most.
    fn mask(&self, prompt: &PrunedPrompt, pieces: usize, scores: &[f32], share: f64) -> Vec<f32> {
        let [n, width] = prompt.prompt_embeddings.dims();
        let among: Vec<usize> =
            prompt.kept().iter().flat_map(|token| token * pieces..(token + 1) * pieces).collect();
        let mut stays = vec![0.0; n * pieces];
        for place in highest(scores, &among, share) {
            stays[place] = 1.0;
        }
        (0..n * width)
            .map(|at| stays[at / width * pieces + piece(at % width, width, pieces)])
            .collect()
    }
}

impl Policy<PrunedPrompt> for Pruning {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<PrunedPrompt>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        for (_, prompt) in adapters.iter() {
            if let Some(gradient) = gradients.get::<2>(prompt.prompt_embeddings.id) {
                self.observe(step, prompt, gradient);
            }
        }
        gradients
    }

    fn adjust(
        &mut self,
        step: usize,
        _learning_rate: f64,
        adapters: &Adapters<PrunedPrompt>,
    ) -> Result<Option<Adapters<PrunedPrompt>>, Error> {
        let XPrompt { token_share, piece_share, num_pieces, .. } = self.method;
        let (pieces, share, scores) = match step {
            _ if step == self.cuts[0] => (1, token_share, &self.known.tokens),
            _ if step == self.cuts[1] => (num_pieces, piece_share, &self.known.pieces),
            _ => return Ok(None),
        };
        let again = step == self.cuts[1];
        let count = |prompt: &PrunedPrompt| prompt.prompt_embeddings.dims()[0] * pieces;
        if let Some((path, _)) = adapters.iter().find(|(_, prompt)| count(prompt) != scores.len()) {
            let reason = "nothing was measured of it before this step";
            return Err(Error::place(path, reason));
        }
        Ok(Some(adapters.clone().map_layers(|_, mut prompt| {
            let shape = prompt.prompt_embeddings.dims();
            let device = prompt.prompt_embeddings.device();
            let mask = TensorData::new(self.mask(&prompt, pieces, scores, share), shape);
            prompt.mask = prompt.mask.with(Tensor::from_data(mask, &device));
            if again {
                // A new parameter: what the optimizer knows of the old one is of no use to it.
                let start = Tensor::from_data(prompt.start.val().into_data(), &device);
                prompt.prompt_embeddings = Param::from_tensor(start);
            }
            prompt
        })))
    }

    fn state(&self) -> Result<Json, Error> {
        serde_json::to_value(&self.known).map_err(|e| Error::config("policy", e.to_string()))
    }

    fn resume(&mut self, state: Json, _device: &Device) -> Result<(), Error> {
        self.known = serde_json::from_value(state)
            .map_err(|e| Error::config("policy", format!("is not XPrompt's state: {e}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VirtualTokens;

    fn method() -> XPrompt {
        let virtual_tokens = VirtualTokens { num_virtual_tokens: 4, ..VirtualTokens::default() };
        XPrompt { virtual_tokens, num_pieces: 2, total_step: Some(10), ..XPrompt::default() }
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    fn adapters() -> Adapters<PrunedPrompt> {
        let prompt = Tensor::<2>::ones([4, 6], &Device::flex().autodiff());
        Adapters::new([("words".to_owned(), PrunedPrompt::new(prompt))], [])
    }

    fn only(adapters: &Adapters<PrunedPrompt>) -> &PrunedPrompt {
        adapters.get("words").expect("is there")
    }

    /// A step whose gradient is `rows`, each the same number for the first and for the second half.
    fn step(
        pruning: &mut Pruning,
        index: usize,
        adapters: Adapters<PrunedPrompt>,
        rows: [[f32; 2]; 4],
    ) -> Adapters<PrunedPrompt> {
        let id = only(&adapters).prompt_embeddings.id;
        let numbers = rows.iter().flat_map(|[a, b]| [*a, *a, *a, *b, *b, *b]).collect::<Vec<_>>();
        let gradient = Tensor::<2>::from_data(TensorData::new(numbers, [4, 6]), &Device::flex());
        let mut gradients = GradientsParams::new();
        gradients.register(id, gradient);
        let gradients = pruning.gradients(index, &adapters, gradients);
        assert!(gradients.get::<2>(id).is_some(), "the optimizer gets them all");
        pruning.adjust(index, 0.1, &adapters).expect("was measured").unwrap_or(adapters)
    }

    #[test]
    fn tokens_and_then_pieces_are_left_out_and_the_rest_begins_again() {
        let mut pruning = Pruning::new(&method()).expect("is long enough");
        assert_eq!((pruning.cuts, pruning.window), ([4, 5], 1));
        let mut adapters = adapters();
        // Before the window nothing counts; in it, halves that cancel out make a token of no importance.
        for index in 1..=3 {
            adapters =
                step(&mut pruning, index, adapters, [[9.0, 9.0], [0.0; 2], [0.0; 2], [0.0; 2]]);
        }
        adapters = adapters.map_layers(|_, mut prompt| {
            prompt.prompt_embeddings = prompt.prompt_embeddings.map(|p| p * 2.0);
            prompt
        });
        let id = only(&adapters).prompt_embeddings.id;
        let rows = [[1.0, 1.0], [8.0, -8.0], [-2.0, -2.0], [0.5, 0.0]];
        adapters = step(&mut pruning, 4, adapters, rows);
        assert_eq!(only(&adapters).kept(), [0, 2]);
        assert_eq!(only(&adapters).prompt_embeddings.id, id);
        // Across a checkpoint.
        let mut resumed = Pruning::new(&method()).expect("is long enough");
        resumed.resume(pruning.state().expect("is JSON"), &Device::flex()).expect("is its own");
        let rows = [[0.1, 3.0], [9.0, 9.0], [2.0, 0.2], [9.0, 9.0]];
        adapters = step(&mut resumed, 5, adapters, rows);
        let prompt = only(&adapters);
        let (on, off) = ([1.0_f32; 3], [0.0_f32; 3]);
        let expected = [off, on, off, off, on, off, off, off].concat();
        assert_eq!(values(prompt.mask.val()), expected);
        // Back at the start, as another parameter.
        assert_eq!(values(prompt.prompt_embeddings.val()), [1.0; 24]);
        assert_ne!(prompt.prompt_embeddings.id, id);
        assert!(prompt.prompt_embeddings.val().is_require_grad());
        // What is written is what the model reads.
        let method = method().finished(&adapters);
        assert_eq!(method.virtual_tokens.num_virtual_tokens, 2);
        let (_, written) = method.shared_tensors(&[prompt]).pop().expect("is one");
        assert_eq!(written.shape().to_vec(), [2, 6]);
        let written: Vec<f32> = written.try_to_vec().expect("is f32");
        assert_eq!(written, [off, on, on, off].concat());
    }

    #[test]
    fn a_training_without_room_is_refused() {
        for (total, share) in [(None, 0.4), (Some(2), 0.4), (Some(10), 1.0), (Some(10), 0.95)] {
            let method = XPrompt { total_step: total, prune_at: share, ..method() };
            let said = Pruning::new(&method).expect_err("has no room").to_string();
            assert!(said.contains("total_step"), "{said}");
        }
    }
}
