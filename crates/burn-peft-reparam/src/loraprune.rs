//! LoRAPrune's criterion (arXiv 2305.18403): which heads and neurons of the merged weight `W + s·A·B` matter,
//! told from the gradients of LoRA's factors alone.
//!
//! What of the paper is here: the estimated gradient and importance of each weight ([`importance`]), its sum
//! over a head or a neuron ([`grouped`]), the moving average over steps ([`moving_average`]), the choice
//! ([`keep`]) and a merge without what was not chosen ([`Pruned`]). Not here: the schedule by which a
//! training prunes more and more, the masks in a training's forward, and a smaller model made of what is
//! left (pruned groups are zeros in a model of the old shape).

use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Error, Folds, Kind, Sites, TrainedCopy};
use std::collections::BTreeMap;

/// The gradient by `s·A·B` as LoRAPrune estimates it: what a step of size 1 along the factors' gradients
/// would take off the difference, `s·(A·B - (A - ∇A)(B - ∇B)) = s·(∇A·B + A·∇B - ∇A·∇B)`.
///
/// `a`, `grad_a [fan_in, r]`; `b`, `grad_b [r, fan_out]`. No weight-shaped gradient is ever computed by
/// automatic differentiation; this estimate is its image in the directions that the factors span.
pub fn estimated_gradient(
    (a, grad_a): (&Tensor<2>, &Tensor<2>),
    (b, grad_b): (&Tensor<2>, &Tensor<2>),
    scaling: f64,
) -> Tensor<2> {
    // ∇A·B + (A - ∇A)·∇B: one product less.
    let left = grad_a.clone().matmul(b.clone());
    (left + (a.clone() - grad_a.clone()).matmul(grad_b.clone())) * scaling
}

/// The importance of each merged weight, `[fan_in, fan_out]`: `(Ĝ ∘ (W + s·A·B))²`, the square of the
/// first-order change of the loss if that weight were zero. `w [fan_in, fan_out]` is frozen; the
/// factors come with their gradients, as for [`estimated_gradient`].
pub fn importance(
    w: &Tensor<2>,
    (a, grad_a): (&Tensor<2>, &Tensor<2>),
    (b, grad_b): (&Tensor<2>, &Tensor<2>),
    scaling: f64,
) -> Tensor<2> {
    let merged = w.clone() + a.clone().matmul(b.clone()) * scaling;
    (estimated_gradient((a, grad_a), (b, grad_b), scaling) * merged).square()
}

/// The side of a weight along which groups lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Columns of `[fan_in, fan_out]`: queries, keys and values of a head; what a neuron is fed.
    Outputs,
    /// Rows: what the projection behind attention reads of a head, and the one behind neurons of one.
    Inputs,
}

/// The importance of each group of `size` neighbouring outputs or inputs (a head of that width; 1 for
/// neurons): the sum over all their weights, `[groups]`. Layers that lose a group together (queries,
/// keys, values and the projection behind them) add theirs up.
///
/// # Errors
/// A `size` that does not divide the side.
pub fn grouped(importance: &Tensor<2>, side: Side, size: usize) -> Result<Tensor<1>, Error> {
    let [fan_in, fan_out] = importance.dims();
    let (width, sums) = match side {
        Side::Outputs => (fan_out, importance.clone().sum_dim(0)),
        Side::Inputs => (fan_in, importance.clone().sum_dim(1)),
    };
    if size == 0 || !width.is_multiple_of(size) {
        let reason = format!("expected a divisor of {width}, found {size}");
        return Err(Error::config("size", reason));
    }
    let sums: Tensor<2> = sums.reshape([width / size, size]);
    Ok(sums.sum_dim(1).flatten(0, 1))
}

/// The importance over steps, `λ·before + (1 - λ)·now`; the paper's program has `λ = 0.9`
/// and begins at zero.
pub fn moving_average(before: Tensor<1>, now: Tensor<1>, decay: f64) -> Tensor<1> {
    before * decay + now * (1.0 - decay)
}

/// Which groups stay if the `ratio` of them that matter least go, rounded down; the first among equals
/// goes first.
///
/// # Errors
/// A ratio outside of [0, 1], or an importance that is no number.
pub fn keep(importance: &Tensor<1>, ratio: f64) -> Result<Vec<bool>, Error> {
    if !(0.0..=1.0).contains(&ratio) {
        return Err(Error::config("ratio", format!("expected a share in [0, 1], found {ratio}")));
    }
    let values: Vec<f64> = importance.clone().into_data().iter::<f64>().collect();
    if let Some(found) = values.iter().find(|value| value.is_nan()) {
        return Err(Error::config("importance", format!("expected numbers, found {found}")));
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut keep = vec![true; values.len()];
    // A ratio of 0.3 is a little less than that: 10 groups lose 3 and not 2.
    let pruned = (values.len() as f64 * ratio + 1e-9).floor() as usize;
    order.into_iter().take(pruned).for_each(|group| keep[group] = false);
    Ok(keep)
}

/// Which groups of a layer stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Where they lie.
    pub side: Side,
    /// For each group whether it stays; the side is cut into as many groups of one size.
    pub keep: Vec<bool>,
}

impl Mask {
    /// Ones and zeros over a side of `width`, `[width]`.
    fn over(&self, width: usize) -> Result<Vec<f32>, Error> {
        let groups = self.keep.len();
        match width.checked_div(groups).filter(|size| size * groups == width) {
            Some(size) => {
                let kept = self.keep.iter();
                Ok(kept.flat_map(|&kept| std::iter::repeat_n(f32::from(kept), size)).collect())
            }
            None => {
                let reason = format!("expected groups that divide {width}, found {groups} of them");
                Err(Error::config("keep", reason))
            }
        }
    }

    /// A weight `[fan_in, fan_out]` with zeros in place of the groups that go.
    ///
    /// # Errors
    /// Groups that do not divide the side.
    pub fn weight(&self, w: Tensor<2>) -> Result<Tensor<2>, Error> {
        let [fan_in, fan_out] = w.dims();
        let shape = match self.side {
            Side::Outputs => [1, fan_out],
            Side::Inputs => [fan_in, 1],
        };
        let ones = TensorData::new(self.over(shape[0] * shape[1])?, shape);
        let ones: Tensor<2> = Tensor::from_data(ones, &w.device().inner());
        Ok(w.clone() * ones.cast(w.dtype()))
    }

    /// A bias `[fan_out]`, likewise; groups of inputs have none and leave it.
    ///
    /// # Errors
    /// As [`Mask::weight`].
    pub fn bias(&self, b: Tensor<1>) -> Result<Tensor<1>, Error> {
        match self.side {
            Side::Inputs => Ok(b),
            Side::Outputs => {
                let [width] = b.dims();
                let ones = TensorData::new(self.over(width)?, [width]);
                let ones: Tensor<1> = Tensor::from_data(ones, &b.device().inner());
                Ok(b.clone() * ones.cast(b.dtype()))
            }
        }
    }
}

/// Adapters to be merged without the groups that do not stay: `W' = M ∘ (W + Δ(W))`, as a difference for
/// [`merge`](burn_peft_core::merge). Nothing may be merged beside it.
pub struct Pruned<'a> {
    adapters: &'a dyn Folds,
    masks: BTreeMap<String, Vec<Mask>>,
}

impl<'a> Pruned<'a> {
    /// `masks` by the path of the layer, adapted or not: one that reads what others no longer give has a
    /// mask over its inputs.
    ///
    /// # Errors
    /// A path that is no linear layer of the model, or groups that do not divide its side.
    pub fn new(
        adapters: &'a dyn Folds,
        sites: &Sites,
        masks: BTreeMap<String, Vec<Mask>>,
    ) -> Result<Self, Error> {
        for (path, masks) in &masks {
            let linear = sites.all.iter().filter(|site| site.kind == Kind::Linear);
            let Some(site) = sites.get(path).filter(|site| site.kind == Kind::Linear) else {
                let names = linear.map(|site| site.path.as_str());
                return Err(Error::no_match("masks", path, "linear layer", names));
            };
            for mask in masks {
                let width = match mask.side {
                    Side::Outputs => site.fan_out(),
                    Side::Inputs => site.fan_in(),
                };
                mask.over(width).map_err(|e| Error::place(path, e.to_string()))?;
            }
        }
        Ok(Self { adapters, masks })
    }

    /// `mask(v + delta) - v`, or the delta where nothing is pruned.
    fn masked<const D: usize>(
        &self,
        path: &str,
        v: &Tensor<D>,
        delta: Option<Tensor<D>>,
        apply: impl Fn(&Mask, Tensor<D>) -> Result<Tensor<D>, Error>,
    ) -> Option<Tensor<D>> {
        let Some(masks) = self.masks.get(path) else { return delta };
        let dtype = delta.as_ref().map_or(v.dtype(), Tensor::dtype);
        let v = v.clone().cast(dtype);
        let whole = match delta {
            Some(delta) => v.clone() + delta.without_autodiff(),
            None => v.clone(),
        };
        // `new` has seen that every mask fits.
        let masked = masks.iter().try_fold(whole, |whole, mask| apply(mask, whole)).ok()?;
        Some(masked - v)
    }
}

impl Folds for Pruned<'_> {
    fn fold_weight(&self, path: &str, w: &Tensor<2>) -> Option<Tensor<2>> {
        self.masked(path, w, self.adapters.fold_weight(path, w), Mask::weight)
    }

    fn fold_vector(&self, path: &str, v: &Tensor<1>) -> Option<Tensor<1>> {
        self.adapters.fold_vector(path, v)
    }

    fn fold_bias(&self, path: &str, b: &Tensor<1>) -> Option<Tensor<1>> {
        self.masked(path, b, self.adapters.fold_bias(path, b), Mask::bias)
    }

    fn unfoldable(&self, path: &str) -> Option<&'static str> {
        self.adapters.unfoldable(path)
    }

    fn brings_bias(&self, path: &str) -> bool {
        self.adapters.brings_bias(path)
    }

    /// None where groups go: the copy is not what is left of the layer.
    fn trained_copy(&self, path: &str) -> Option<&TrainedCopy> {
        self.adapters.trained_copy(path).filter(|_| !self.masks.contains_key(path))
    }

    fn broken(&self) -> Option<String> {
        self.adapters.broken()
    }

    fn paths(&self) -> Vec<String> {
        let mut paths = self.adapters.paths();
        paths.extend(self.masks.keys().cloned());
        paths.sort();
        paths.dedup();
        paths
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Lora;
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::activation::relu;
    use burn::tensor::{Device, Distribution};
    use burn_peft_core::{Adapters, Method, Targets, adapt, merge};

    fn normal(shape: [usize; 2], device: &Device) -> Tensor<2> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
    }

    fn numbers(tensor: Tensor<2>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    #[track_caller]
    fn close(found: &[f64], expected: &[f64], tolerance: f64) {
        let largest = expected.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
        let far = found
            .iter()
            .zip(expected)
            .map(|(f, e)| (f - e).abs())
            .max_by(f64::total_cmp)
            .unwrap_or_default();
        assert!(found.len() == expected.len() && far <= tolerance * largest, "{far} of {largest}");
    }

    /// Loss and gradients of `‖tanh(x·(W + s·A·B))·t‖²` by `A`, `B` and the merged weight.
    fn gradients(
        w: &Tensor<2>,
        (a, b): (&Tensor<2>, &Tensor<2>),
        s: f64,
        x: &Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let leaf = |t: &Tensor<2>| t.clone().autodiff().require_grad();
        let loss = |merged: Tensor<2>| x.clone().matmul(merged).tanh().square().sum();
        let (a, b) = (leaf(a), leaf(b));
        let grads = loss(w.clone() + a.clone().matmul(b.clone()) * s).backward();
        let merged =
            w.clone() + a.clone().without_autodiff().matmul(b.clone().without_autodiff()) * s;
        let dense = leaf(&merged);
        let dense_grads = loss(dense.clone()).backward();
        (a.grad(&grads).unwrap(), b.grad(&grads).unwrap(), dense.grad(&dense_grads).unwrap())
    }

    /// With `A = 0` and an orthogonal `B` of full rank, `∇A = s·G·Bᵀ` and `∇B = 0`, so that the estimate is
    /// `s²·G` and the importance `s⁴·(G ∘ W)²`: the dense gradient's, up to a factor.
    #[test]
    fn where_the_factors_span_everything_the_estimate_is_the_dense_gradient() {
        let device = Device::flex();
        device.seed(5);
        let (w, x, s) = (normal([6, 4], &device), normal([7, 6], &device), 0.5);
        let (turn, _) = burn::linalg::qr::<2>(normal([4, 4], &device), true);
        let zero = Tensor::zeros([6, 4], &device);
        let (ga, gb, dense) = gradients(&w, (&zero, &turn), s, &x);
        let estimate = estimated_gradient((&zero, &ga), (&turn, &gb), s);
        close(&numbers(estimate), &numbers(dense.clone() * (s * s)), 1e-5);
        let found = importance(&w, (&zero, &ga), (&turn, &gb), s);
        close(&numbers(found), &numbers((dense * w).square() * s.powi(4)), 1e-5);
    }

    /// The formula is what a step of size 1 takes off, and where steps are small it points with the dense
    /// gradient: `⟨Ĝ, G⟩ = s²·(‖G·Bᵀ‖² + ‖Aᵀ·G‖²)` up to third order.
    #[test]
    fn the_estimate_is_a_step_of_the_difference_and_points_with_the_dense_gradient() {
        let device = Device::flex();
        device.seed(6);
        let (w, x, s) = (normal([6, 4], &device), normal([7, 6], &device) * 1e-2, 0.5);
        let (a, b) = (normal([6, 2], &device), normal([2, 4], &device));
        let (ga, gb, dense) = gradients(&w, (&a, &b), s, &x);
        let estimate = estimated_gradient((&a, &ga), (&b, &gb), s);
        let after = (a.clone() - ga.clone()).matmul(b.clone() - gb.clone());
        let step = (a.clone().matmul(b.clone()) - after) * s;
        // A difference of products near 1 of which about 1e-3 is left.
        close(&numbers(estimate.clone()), &numbers(step), 1e-3);
        let inner: f32 = (estimate * dense.clone()).sum().into_scalar();
        let expected: f32 = ((dense.clone().matmul(b.transpose())).square().sum()
            + a.transpose().matmul(dense).square().sum())
        .into_scalar::<f32>()
            * (s * s) as f32;
        assert!(expected > 0.0 && (inner / expected - 1.0).abs() < 0.05, "{inner} {expected}");
    }

    #[test]
    fn groups_add_up_and_the_least_of_them_go() {
        let device = Device::flex();
        let values = TensorData::new(vec![1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [2, 4]);
        let importance = Tensor::<2>::from_data(values, &device);
        let of = |side, size| {
            let sums = grouped(&importance, side, size).unwrap().into_data();
            sums.iter::<f64>().collect::<Vec<_>>()
        };
        assert_eq!(of(Side::Outputs, 2), [14.0, 22.0]);
        assert_eq!(of(Side::Outputs, 1), [6.0, 8.0, 10.0, 12.0]);
        assert_eq!(of(Side::Inputs, 1), [10.0, 26.0]);
        assert!(
            grouped(&importance, Side::Outputs, 3)
                .unwrap_err()
                .to_string()
                .contains("divisor of 4")
        );
        let vector = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
        let mean = moving_average(vector(&[1.0, 2.0]), vector(&[3.0, 0.0]), 0.75).into_data();
        assert_eq!(mean.iter::<f64>().collect::<Vec<_>>(), [1.5, 1.5]);
        let four = vector(&[0.3, 0.1, 0.1, 0.2]);
        assert_eq!(keep(&four, 0.5).unwrap(), [true, false, false, true]);
        assert_eq!(keep(&four, 0.49).unwrap(), [true, false, true, true]);
        assert_eq!(keep(&four, 0.0).unwrap(), [true; 4]);
        assert_eq!(keep(&four, 1.0).unwrap(), [false; 4]);
        let ten = vector(&[0.5; 10]);
        assert_eq!(keep(&ten, 0.3).unwrap().iter().filter(|kept| !**kept).count(), 3);
        assert!(keep(&four, 1.5).unwrap_err().to_string().contains("ratio"));
        assert!(keep(&vector(&[f32::NAN]), 0.5).is_err());
    }

    #[derive(Module, Debug)]
    struct Block {
        up: Linear,
        down: Linear,
    }

    impl Block {
        fn forward(&self, x: Tensor<2>) -> Tensor<2> {
            self.down.forward(relu(self.up.forward(x)))
        }
    }

    /// A neuron without which the merged block answers as if it were absent.
    #[test]
    fn pruned_groups_are_gone_from_the_merged_model_and_nothing_else_is() {
        let device = Device::flex();
        device.seed(8);
        let block = Block {
            up: LinearConfig::new(4, 6).init(&device),
            down: LinearConfig::new(6, 3).init(&device),
        };
        let sites = Sites::of(&block, None);
        let mut lora = Lora::new(2, 4.0, Targets::list(["up"]));
        lora.init_lora_weights = crate::Init::Random;
        let adapters: Adapters<<Lora as Method>::Adapter> =
            adapt(&sites, &lora, 3, &device).unwrap();
        let keep = vec![true, false, true, true, false, true];
        let mask = |side| vec![Mask { side, keep: keep.clone() }];
        let masks = BTreeMap::from([
            ("up".to_owned(), mask(Side::Outputs)),
            ("down".to_owned(), mask(Side::Inputs)),
        ]);
        let pruned = Pruned::new(&adapters, &sites, masks.clone()).unwrap();
        let (whole, less) = (
            merge(&block, &[(&adapters, 1.0)]).unwrap(),
            merge(&block, &[(&pruned, 1.0)]).unwrap(),
        );
        let x = normal([5, 4], &device);
        let kept = Tensor::<2>::from_floats([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], &device);
        let expected = whole.down.forward(relu(whole.up.forward(x.clone())) * kept);
        close(&numbers(less.forward(x)), &numbers(expected), 1e-6);
        let gone = less.up.weight.val().slice([0..4, 1..2]).abs().sum().into_scalar::<f32>()
            + less.up.bias.as_ref().unwrap().val().narrow(0, 4, 1).abs().sum().into_scalar::<f32>()
            + less.down.weight.val().slice([4..5, 0..3]).abs().sum().into_scalar::<f32>();
        assert_eq!(gone, 0.0);
        let refused = |path: &str, groups: usize| {
            let mask = Mask { side: Side::Outputs, keep: vec![true; groups] };
            let masks = BTreeMap::from([(path.to_owned(), vec![mask])]);
            Pruned::new(&adapters, &sites, masks).err().unwrap().to_string()
        };
        assert!(refused("upp", 6).contains("near names: up"));
        assert!(refused("up", 4).contains("up: keep: expected groups that divide 6, found 4"));
    }
}
