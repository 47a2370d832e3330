//! What goes into a place and what comes back to it: inputs and gradients of the logits at its output.

use burn::nn::Linear;
use burn::tensor::Tensor;
use burn_peft_core::{Adapter, Error, Laid, Overlay, Scope, Strength};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Adds zero to the output of a linear layer. The gradient at that zero is the gradient at the output.
#[derive(Debug, Default)]
struct Tap {
    /// `x [batch, seq, in]` and the zero `[batch, seq, out]`, each time that the layer is run.
    seen: Mutex<Vec<(Tensor<3>, Tensor<3>)>>,
}

impl Adapter for Tap {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let zero = Tensor::zeros(y.dims(), &y.device().autodiff()).require_grad();
        let entry = (x.clone().without_autodiff(), zero.clone());
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        Some(zero)
    }
}

/// A tap at each of some places, for one forward.
struct Taps(BTreeMap<String, Tap>);

impl Overlay for Taps {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if let Some(tap) = self.0.get(path) {
            laid.push(Laid { adapter: tap, strength: Strength::Scale(1.0) });
        }
    }
}

/// What one place saw of a batch. A layer that runs several times in a forward has its runs one behind
/// the other along `seq`: a gradient of its weight is the sum over them, as it is over positions.
#[derive(Debug)]
pub(crate) struct Seen {
    /// `[batch, seq, in]`.
    pub(crate) inputs: Tensor<3>,
    /// The gradient of each class's logit at the output, each `[batch, seq, out]`.
    pub(crate) gradients: Vec<Tensor<3>>,
}

/// Logits `[batch, classes]` and what each place saw. A row's logit depends on that row alone, so that
/// one backward pass a class has the gradients of all rows in it.
pub(crate) fn observe<'p>(
    paths: impl Iterator<Item = &'p str> + Clone,
    overlay: &dyn Overlay,
    forward: &dyn Fn(&Scope<'_>) -> Tensor<2>,
) -> Result<(Tensor<2>, BTreeMap<String, Seen>), Error> {
    let mut places: BTreeMap<String, Seen> = BTreeMap::new();
    let mut class = 0;
    loop {
        let taps = Taps(paths.clone().map(|path| (path.to_owned(), Tap::default())).collect());
        let both = (overlay, &taps);
        let logits = forward(&Scope::new(&both));
        let [batch, classes] = logits.dims();
        let mut seen = Vec::with_capacity(taps.0.len());
        for (path, tap) in &taps.0 {
            let runs =
                std::mem::take(&mut *tap.seen.lock().unwrap_or_else(PoisonError::into_inner));
            if runs.is_empty() {
                let reason = "expected a linear layer that the model runs, found none there";
                return Err(Error::place(path, reason));
            }
            seen.push((path, runs));
        }
        let grads = logits.clone().slice([0..batch, class..class + 1]).sum().backward();
        for (path, runs) in seen {
            let gradient = |zero: &Tensor<3>| {
                zero.grad(&grads).unwrap_or_else(|| zero.clone().without_autodiff())
            };
            let gradient = Tensor::cat(runs.iter().map(|(_, zero)| gradient(zero)).collect(), 1);
            let place = places.entry(path.clone()).or_insert_with(|| Seen {
                inputs: Tensor::cat(runs.iter().map(|(x, _)| x.clone()).collect(), 1),
                gradients: Vec::with_capacity(classes),
            });
            place.gradients.push(gradient);
        }
        class += 1;
        if class >= classes {
            return Ok((logits.without_autodiff(), places));
        }
    }
}
