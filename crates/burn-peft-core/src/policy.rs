//! What a method does around an optimizer step: a rank that is shared out anew, factors that are frozen
//! one by one.

use crate::{Adapters, Beside, Error, Method, Overlay, Passes};
use burn::module::{Module, ModuleDisplay};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use serde_json::Value as Json;
use std::fmt;
use std::sync::Arc;

/// A method's rule for what happens between steps, with what it knows so far. Steps count from 1.
///
/// What it changes of the adapters is a trained parameter or a [`Buffer`](crate::Buffer): anything else
/// would not come back from a checkpoint.
pub trait Policy<A: Module + ModuleDisplay>: Send {
    /// Sees the gradients of a step, clipped, and says which the optimizer gets: a parameter without one
    /// keeps its value.
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<A>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        let _ = (step, adapters);
        gradients
    }

    /// The examples of how many of the latest steps it wants to [look](Policy::look) at after this step; 0 for none.
    fn looks_back(&self, step: usize) -> usize {
        let _ = step;
        0
    }

    /// Sees those examples before [`Policy::adjust`]; `beside` lies over the model with the adapters: what else
    /// is trained.
    ///
    /// # Errors
    /// Data that it cannot work with.
    fn look(
        &mut self,
        adapters: &Adapters<A>,
        beside: &dyn Overlay,
        passes: &dyn Passes,
    ) -> Result<(), Error> {
        let _ = (adapters, beside, passes);
        Ok(())
    }

    /// The adapters as they go on after the optimizer's step at this learning rate, with the same
    /// parameter ids, or new ones for parameters whose optimizer state shall begin anew; `None` where
    /// they stay as they are. Step 0 is before the first, at rate 0.
    ///
    /// # Errors
    /// What the method cannot work with.
    fn adjust(
        &mut self,
        step: usize,
        learning_rate: f64,
        adapters: &Adapters<A>,
    ) -> Result<Option<Adapters<A>>, Error>;

    /// What a checkpoint holds.
    ///
    /// # Errors
    /// A state that JSON cannot hold.
    fn state(&self) -> Result<Json, Error>;

    /// Goes on where `state` was taken.
    ///
    /// # Errors
    /// A state that is not this policy's.
    fn resume(&mut self, state: Json, device: &Device) -> Result<(), Error>;
}

/// Makes something of adapters as they are, if there is anything to make.
pub(crate) type Made<A, T> = Arc<dyn Fn(&Adapters<A>) -> Option<T> + Send + Sync>;

/// What a trainer needs to know of a method: what it adds to the loss, and its [`Policy`].
pub struct Guide<A: Module + ModuleDisplay> {
    /// A term of the loss that depends on the adapters alone, `[1]`.
    pub penalty: Option<Made<A, Tensor<1>>>,
    /// A term of the loss of each batch, made anew for it.
    pub beside: Option<Made<A, Box<dyn Beside>>>,
    /// What happens between steps.
    pub policy: Option<Box<dyn Policy<A>>>,
}

impl<A: Module + ModuleDisplay> fmt::Debug for Guide<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guide")
            .field("penalty", &self.penalty.is_some())
            .field("beside", &self.beside.is_some())
            .field("policy", &self.policy.is_some())
            .finish()
    }
}

impl<A: Module + ModuleDisplay> Default for Guide<A> {
    fn default() -> Self {
        Self { penalty: None, beside: None, policy: None }
    }
}

impl<A: Module + ModuleDisplay> Guide<A> {
    /// Of a method, for a training of these adapters.
    ///
    /// # Errors
    /// A configuration that the policy cannot work with.
    pub fn of<T: Method<Adapter = A>>(method: &T, adapters: &Adapters<A>) -> Result<Self, Error> {
        let penalty = method.has_penalty().then(|| {
            let method = method.clone();
            let of = move |adapters: &Adapters<A>| method.penalty(adapters);
            Arc::new(of) as Made<A, Tensor<1>>
        });
        let beside = method.beside(adapters).map(|_| {
            let method = method.clone();
            let of = move |adapters: &Adapters<A>| method.beside(adapters);
            Arc::new(of) as Made<A, Box<dyn Beside>>
        });
        Ok(Self { penalty, beside, policy: method.policy(adapters)? })
    }
}
