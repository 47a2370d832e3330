//! The words at which PTP's loss is highest, found by a few steps up (arXiv 2305.02423).

use crate::prompt::own;
use crate::prompt_ptp::{Ptp, ShakenPrompt};
use burn::tensor::{Int, Tensor};
use burn_peft_core::{
    Adapter, Adapters, Batch, Beside, Error, Laid, Overlay, SeenTokens, Strength,
};
use std::sync::{Mutex, PoisonError};

/// The adversarial term of [`Ptp`] for one batch: `λ · L(E(x) + δ*)`.
#[derive(Debug)]
pub struct Adversary {
    path: String,
    weight: f64,
    steps: usize,
    radius: f64,
    rate: f64,
    seen: Seen,
}

/// Notes which of the words that a pass embeds are a sequence's own: 1 or 0 for each of their numbers,
/// `[batch, seq, hidden]`.
#[derive(Debug, Default)]
struct Seen(Mutex<Option<Tensor<3>>>);

impl Adapter for Seen {
    fn prompt(&self, x: &Tensor<3>, tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        let own = own(x, tokens).expand(x.dims());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(own);
        None
    }
}

/// `δ` on embedded words. By their positions and not by their ids, since an encoder and a decoder may share one table, and
/// the prompt stands in front of one.
#[derive(Debug)]
struct Pushed(Tensor<3>);

impl Adapter for Pushed {
    fn positional(&self, _positions: &Tensor<2, Int>) -> Option<Tensor<3>> {
        Some(self.0.clone())
    }
}

/// One adapter at one path.
struct At<'p, A>(&'p str, A);

impl<A: Adapter> Overlay for At<'_, A> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path == self.0 {
            laid.push(Laid { adapter: &self.1, strength: Strength::Scale(1.0) });
        }
    }
}

impl Overlay for Adversary {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path == self.path {
            laid.push(Laid { adapter: &self.seen, strength: Strength::Scale(1.0) });
        }
    }
}

/// The length of each row, `[batch, 1, 1]`, and never 0.
fn length(x: &Tensor<3>) -> Tensor<3> {
    let [batch, seq, width] = x.dims();
    let flat = x.clone().reshape([batch, 1, seq * width]);
    flat.square().sum_dim(2).sqrt().clamp_min(1e-30)
}

impl Adversary {
    /// Of adapters in training; `None` where the term has no weight.
    pub fn of(method: &Ptp, adapters: &Adapters<ShakenPrompt>) -> Option<Self> {
        let (path, _) = adapters.iter().next()?;
        (method.adversarial_weight > 0.0).then(|| Self {
            path: path.to_owned(),
            weight: method.adversarial_weight,
            steps: method.adversarial_steps,
            radius: method.adversarial_radius,
            rate: method.adversarial_rate,
            seen: Seen::default(),
        })
    }

    /// `δ* [batch, seq, hidden]`, after the pass of the batch's loss; 0 at padding.
    ///
    /// # Errors
    /// A model that does not ask for what stands in front of its words, or what changes them by their positions.
    pub fn perturbation(&self, batch: &Batch<'_>) -> Result<Tensor<3>, Error> {
        let unasked = |what: &str| {
            let reason = format!(
                "expected a model that asks there for {what}, as adversarial_weight needs; found that it does not: set \
                 it to 0"
            );
            Error::place(&self.path, reason)
        };
        let own = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let own = own.ok_or_else(|| unasked("a prompt (`Scope::prompt`)"))?;
        let mut delta = own.zeros_like();
        for _ in 0..self.steps {
            let leaf = Tensor::<3>::from_inner(delta.clone()).require_grad();
            let loss = batch.still_loss(&At(&self.path, Pushed(leaf.clone())));
            let gradient = match loss.is_autodiff() {
                true => leaf.grad(&loss.backward()),
                false => None,
            };
            let gradient = gradient.ok_or_else(|| unasked("`Scope::positional`"))?;
            let up = gradient.without_autodiff() * own.clone();
            let further = delta + up.clone() / length(&up) * self.rate;
            // Back into the ball.
            let share = (length(&further).recip() * self.radius).clamp_max(1.0);
            delta = further * share;
        }
        Ok(delta)
    }
}

impl Beside for Adversary {
    fn term(&self, batch: &Batch<'_>) -> Result<Tensor<1>, Error> {
        let delta = self.perturbation(batch)?;
        Ok(batch.loss(&At(&self.path, Pushed(delta))) * self.weight)
    }
}
