//! How a training pass runs the blocks of a model: with all that their gradients need kept, or computed again for them.

use crate::{Error, Laid, Overlay, Scope};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Gradients, Tensor};
use std::cell::{Cell, RefCell};
use std::fmt;

/// How a training pass runs the blocks of a model ([`Scope::run`]).
///
/// Each block draws its random numbers from a seed of its own, so that it draws the same when it is run again.
///
/// With [`Blocks::recomputed`], gradient checkpointing (arXiv 1604.06174): of a block `y = F(x)` only `x` is kept. The pass
/// goes on from `y` as from a leaf of the graph; [`Blocks::backward`] runs the blocks again, from the last to the first, and
/// takes the gradients of `Σ F(x) ⊙ ∂L/∂y`, which are those of the loss by the chain rule. Memory is that of one block, and
/// one hidden state a block; time is one more forward pass of the blocks. Loss and gradients are the same: the loss to the bit, a
/// gradient but for the order in which it is summed where several parts meet.
pub struct Blocks<'a> {
    device: Device,
    seed: u64,
    count: Cell<u64>,
    inside: Option<Inside<'a>>,
    ran: RefCell<Vec<Ran>>,
    fault: RefCell<Option<Error>>,
}

impl fmt::Debug for Blocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks")
            .field("seed", &self.seed)
            .field("recomputed", &self.inside.is_some())
            .finish_non_exhaustive()
    }
}

/// What lies over a block that keeps nothing for gradients.
struct Inside<'a> {
    still: &'a dyn Overlay,
    beside: &'a dyn Overlay,
    /// Where in a block something lies beside what is trained.
    met: RefCell<Option<String>>,
}

impl Overlay for Inside<'_> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        self.still.at(path, laid);
        let mut beside = Vec::new();
        self.beside.at(path, &mut beside);
        if !beside.is_empty() {
            self.met.borrow_mut().get_or_insert_with(|| path.to_owned());
        }
    }

    fn by_token(&self) -> bool {
        self.still.by_token() && self.beside.by_token()
    }

    fn rows_alike(&self) -> bool {
        self.still.rows_alike() && self.beside.rows_alike()
    }
}

type Block = dyn Fn(&[Tensor<3>], &Scope<'_>) -> Tensor<3>;

/// A block that was run and kept nothing.
struct Ran {
    inputs: Vec<Tensor<3>>,
    /// What it gave on, a leaf.
    output: Tensor<3>,
    block: Box<Block>,
    at: Scope<'static>,
    seed: u64,
}

impl Ran {
    /// Gradients of `Σ F(x) ⊙ slope`; none where nothing trained is on the way.
    fn again(self, slope: Tensor<3>, trained: &dyn Overlay, device: &Device) -> Option<Gradients> {
        device.seed(self.seed);
        let y = (self.block)(&self.inputs, &self.at.under(trained));
        y.is_tracked().then(|| (y * slope).sum().backward())
    }
}

/// Spreads the numbers of steps, batches and blocks over all seeds (the golden ratio's fraction).
fn mixed(seed: u64, number: u64) -> u64 {
    seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).rotate_left(23)
}

impl<'a> Blocks<'a> {
    /// Of a pass on the plain `device`, whose random numbers follow from `seed`.
    pub fn new(device: &Device, seed: u64) -> Self {
        Self {
            device: device.clone(),
            seed,
            count: Cell::new(0),
            inside: None,
            ran: RefCell::default(),
            fault: RefCell::default(),
        }
    }

    /// Nothing of a block but its inputs is kept, and it is run again in [`Blocks::backward`]. `still` is what is trained with
    /// [nothing tracked](untracked); `beside` is what else lies over the model, which must lie in no block.
    pub fn recomputed(self, still: &'a dyn Overlay, beside: &'a dyn Overlay) -> Self {
        Self { inside: Some(Inside { still, beside, met: RefCell::default() }), ..self }
    }

    /// Whether the blocks of the pass can be run again.
    ///
    /// # Errors
    /// Something took note of what flows inside of one, or one reads a tracked tensor that is none of its inputs.
    pub fn repeatable(&self) -> Result<(), Error> {
        self.fault.take().map_or(Ok(()), Err)
    }

    /// Gradients of the `loss` of the pass: `found` is shown them part by part, and those of a parameter add up. `trained`
    /// lay over the model.
    ///
    /// # Errors
    /// Blocks that are not [repeatable](Blocks::repeatable).
    pub fn backward(
        &self,
        loss: &Tensor<1>,
        trained: &dyn Overlay,
        mut found: impl FnMut(Gradients),
    ) -> Result<(), Error> {
        self.repeatable()?;
        let mut ran = self.ran.take();
        let mut slopes: Vec<Option<Tensor<3>>> = vec![None; ran.len()];
        let mut gradients = Some(loss.backward());
        loop {
            if let Some(mut gradients) = gradients.take() {
                for (ran, slope) in ran.iter().zip(&mut slopes) {
                    if let Some(more) = ran.output.grad_remove(&mut gradients) {
                        // What several blocks read has a part from each.
                        *slope = Some(match slope.take() {
                            Some(sum) => more + sum,
                            None => more,
                        });
                    }
                }
                found(gradients);
            }
            let Some((last, slope)) = ran.pop().zip(slopes.pop()) else { return Ok(()) };
            gradients = slope.and_then(|slope| last.again(slope, trained, &self.device));
        }
    }

    fn run<const N: usize>(
        &'a self,
        inputs: [Tensor<3>; N],
        cx: &Scope<'a>,
        block: impl Fn([Tensor<3>; N], &Scope<'_>) -> Tensor<3> + 'static,
    ) -> Tensor<3> {
        let number = self.count.get() + 1;
        self.count.set(number);
        let seed = mixed(self.seed, number);
        self.device.seed(seed);
        let at = Scope { blocks: None, ..cx.clone() };
        let Some(inside) = &self.inside else { return block(inputs, &at) };
        // As constants that still lie on the device of a training, where dropout and its like act.
        let constants = inputs.each_ref().map(|x| x.clone().set_require_grad(false));
        let y = block(constants, &at.under(inside));
        self.check(&y, inside, cx);
        if !y.is_autodiff() {
            return y; // nothing trained is in it or before it
        }
        let output = Tensor::from_inner(y.inner()).require_grad();
        let block = move |inputs: &[Tensor<3>], cx: &Scope<'_>| {
            block(std::array::from_fn(|at| inputs[at].clone()), cx)
        };
        self.ran.borrow_mut().push(Ran {
            inputs: inputs.to_vec(),
            output: output.clone(),
            block: Box::new(block),
            at: at.under(&()),
            seed,
        });
        output
    }

    /// Whether running the block again gives all gradients.
    fn check(&self, y: &Tensor<3>, inside: &Inside<'_>, cx: &Scope<'_>) {
        let fault = match inside.met.take() {
            Some(path) => {
                let reason = "expected nothing there but what is trained, since gradient_checkpointing computes its block \
                              twice; found a term of the loss that takes note of what flows by: train without \
                              gradient_checkpointing";
                Error::place(path, reason)
            }
            None if y.is_tracked() => {
                let reason = "expected a block that reads its inputs alone (`Scope::run`), since gradient_checkpointing \
                              computes it twice; found that it holds another tensor with gradients: train without \
                              gradient_checkpointing";
                Error::place(cx.path(), reason)
            }
            None => return,
        };
        self.fault.borrow_mut().get_or_insert(fault);
    }
}

impl<'a> Scope<'a> {
    /// The same place, in a training pass that runs blocks so.
    pub fn running(&self, blocks: &'a Blocks<'a>) -> Self {
        Self { blocks: Some(blocks), ..self.clone() }
    }

    /// Runs a block of the model: `block(inputs, cx)` is what it gives on, where `cx` is this place. In a training it may be run
    /// [a second time](Blocks), so that it holds all that it needs, and of what has gradients reads `inputs` alone. What
    /// several blocks read is itself given on by a block, which may have no layer.
    pub fn run<const N: usize>(
        &self,
        inputs: [Tensor<3>; N],
        block: impl Fn([Tensor<3>; N], &Scope<'_>) -> Tensor<3> + 'static,
    ) -> Tensor<3> {
        match self.blocks {
            Some(blocks) => blocks.run(inputs, self, block),
            None => block(inputs, self),
        }
    }

    /// The same place of a model with this over it.
    fn under<'b>(&self, overlay: &'b dyn Overlay) -> Scope<'b> {
        Scope {
            overlay,
            path: self.path.clone(),
            tokens: self.tokens.clone(),
            grid: self.grid,
            cut: self.cut.clone(),
            blocks: None,
        }
    }
}

/// The same parameters on the same device, but no operation on them is kept for a gradient. Unlike
/// [`valid`](Module::valid), what acts in training alone acts.
pub fn untracked<M: Module>(module: &M) -> M {
    struct Untracked;
    impl ModuleMapper for Untracked {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            Param::initialized(param.id, param.val().set_require_grad(false))
        }
    }
    module.clone().map(&mut Untracked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Adapter, Hidden, Strength};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// `y → w·y` at every path, counting how often.
    #[derive(Debug)]
    struct Times(Tensor<1>, AtomicUsize);

    impl Adapter for Times {
        fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Some(at.y.clone() * self.0.clone().unsqueeze() - at.y.clone())
        }
    }

    impl Overlay for Times {
        fn at<'a>(&'a self, _path: &str, laid: &mut Vec<Laid<'a>>) {
            laid.push(Laid { adapter: self, strength: Strength::Scale(1.0) });
        }
    }

    fn scale(trained: bool) -> Times {
        let w = Tensor::from_data([2.0], &Device::flex().autodiff());
        Times(w.set_require_grad(trained), AtomicUsize::new(0))
    }

    fn ones(device: &Device) -> Tensor<3> {
        Tensor::ones([1, 2, 3], device)
    }

    fn block([x]: [Tensor<3>; 1], cx: &Scope<'_>) -> Tensor<3> {
        cx.hidden(Hidden::block(x.clone(), x))
    }

    /// `Σ (w³·x + w²·x)`, where what two blocks gave is read by a third and by the loss.
    fn loss(cx: &Scope<'_>) -> Tensor<1> {
        let twice = cx.run([cx.run([ones(&Device::flex())], block)], block);
        (cx.run([twice.clone()], block) + twice).sum()
    }

    #[test]
    fn gradients_come_from_blocks_that_are_run_again() {
        let (trained, still) = (scale(true), scale(false));
        let blocks = Blocks::new(&Device::flex(), 0).recomputed(&still, &());
        let loss = loss(&Scope::new(&trained).running(&blocks));
        let ran = |times: &Times| times.1.load(Ordering::Relaxed);
        assert_eq!([ran(&still), ran(&trained)], [3, 0]);
        let mut slope = 0.0;
        let done = blocks.backward(&loss, &trained, |gradients| {
            slope += trained.0.grad(&gradients).map_or(0.0, |g| g.into_scalar::<f32>());
        });
        assert!(done.is_ok());
        assert_eq!([ran(&still), ran(&trained)], [3, 3]);
        // 6 · (2³ + 2²) and 6 · (3·2² + 2·2).
        assert_eq!((loss.into_scalar::<f32>(), slope), (72.0, 96.0));
    }

    #[test]
    fn a_block_that_trains_nothing_is_not_run_again() {
        let trained = scale(true);
        let blocks = Blocks::new(&Device::flex(), 0).recomputed(&(), &());
        let cx = Scope::new(&trained).running(&blocks);
        let x = cx.run([ones(&Device::flex())], block);
        assert!(!x.is_autodiff() && blocks.ran.borrow().is_empty());
        let loss = cx.hidden(Hidden::block(x.clone(), x)).sum();
        let mut slope = None;
        let found = |gradients: Gradients| slope = trained.0.grad(&gradients);
        assert!(blocks.backward(&loss, &trained, found).is_ok());
        assert_eq!(slope.map(|slope| slope.into_scalar::<f32>()), Some(6.0));
    }

    #[test]
    fn a_gradient_that_would_be_lost_is_refused() {
        let (trained, still) = (scale(true), scale(false));
        let refused = |beside: &dyn Overlay, held: Option<Tensor<1>>| {
            let blocks = Blocks::new(&Device::flex(), 0).recomputed(&still, beside);
            let cx = Scope::new(&trained).running(&blocks).at("here");
            let x = cx.run([ones(&Device::flex())], move |[x], cx| {
                let y = block([x], cx);
                held.clone().map_or(y.clone(), |held| y * held.unsqueeze())
            });
            let said = blocks.backward(&x.sum(), &trained, drop).err();
            said.map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(refused(&(), None), "");
        for said in [refused(&still, None), refused(&(), Some(trained.0.clone()))] {
            assert!(
                said.starts_with("here: ") && said.contains("gradient_checkpointing"),
                "{said}"
            );
        }
    }
}
