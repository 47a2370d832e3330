//! How much trained numbers matter, as the policies see it that share out ranks or freeze factors: smoothed
//! sensitivity times uncertainty (arXiv 2303.10512, section 3.2), and how such a policy moves with the
//! steps.

use crate::adalora::Triplets;
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::Error;
use std::collections::BTreeMap;

/// How much the loss feels each number of one tensor: `I = |w·∂w|`, smoothed (`Ī`), and how unsteady that
/// is (`Ū`).
#[derive(Debug, Clone)]
pub struct Sensitivity<const D: usize> {
    mean: Tensor<D>,
    deviation: Tensor<D>,
}

/// A [`Sensitivity`] at rest: `Ī` and `Ū`.
pub(crate) type SensitivityState = [TensorData; 2];

impl<const D: usize> Sensitivity<D> {
    /// Before the first step, of a tensor like `w`.
    pub fn zeros(w: &Tensor<D>) -> Self {
        let zeros = w.clone().without_autodiff().zeros_like();
        Self { mean: zeros.clone(), deviation: zeros }
    }

    /// [`observe`](Self::observe) of `I = |w·∂w|`.
    pub fn update(&mut self, w: &Tensor<D>, gradient: &Tensor<D>, beta1: f64, beta2: f64) {
        let [w, gradient] = [w, gradient].map(|t| t.clone().without_autodiff());
        self.observe((w * gradient).abs(), beta1, beta2);
    }

    /// `Ī ← β₁·Ī + (1-β₁)·I` and then `Ū ← β₂·Ū + (1-β₂)·|I - Ī|`.
    pub fn observe(&mut self, now: Tensor<D>, beta1: f64, beta2: f64) {
        self.mean = self.mean.clone() * beta1 + now.clone() * (1.0 - beta1);
        let off = (now - self.mean.clone()).abs();
        self.deviation = self.deviation.clone() * beta2 + off * (1.0 - beta2);
    }

    /// `Ī·Ū`.
    pub fn score(&self) -> Tensor<D> {
        self.mean.clone() * self.deviation.clone()
    }

    pub(crate) fn state(&self) -> SensitivityState {
        [self.mean.to_data(), self.deviation.to_data()]
    }

    /// `None` where the state is of another rank.
    pub(crate) fn restored([mean, deviation]: SensitivityState, device: &Device) -> Option<Self> {
        let fits = |data: &TensorData| data.shape().len() == D;
        (fits(&mean) && mean.shape() == deviation.shape()).then(|| {
            let [mean, deviation] = [mean, deviation].map(|data| Tensor::from_data(data, device));
            Self { mean, deviation }
        })
    }
}

/// The sensitivities of one place's triplets.
#[derive(Debug, Clone)]
pub struct Importance {
    /// Of `A [fan_in, r]`.
    pub a: Sensitivity<2>,
    /// Of `E [r]`.
    pub e: Sensitivity<1>,
    /// Of `B [r, fan_out]`.
    pub b: Sensitivity<2>,
}

impl Importance {
    /// One number a triplet: `S(E) + mean S(A) + mean S(B)`.
    pub fn triplets(&self) -> Vec<f32> {
        let a = self.a.score().mean_dim(0).flatten::<1>(0, 1);
        let b = self.b.score().mean_dim(1).flatten::<1>(0, 1);
        let data = (self.e.score() + a + b).into_data().convert::<f32>();
        data.try_to_vec().unwrap_or_default()
    }
}

/// Gradients `(∂A, ∂E, ∂B)` of one place's triplets.
pub(crate) type TripletGradients = (Tensor<2>, Tensor<1>, Tensor<2>);

/// Those of `triplets`, where all three have one.
pub(crate) fn gradients_of(
    triplets: &Triplets,
    gradients: &GradientsParams,
) -> Option<TripletGradients> {
    Some((
        gradients.get::<2>(triplets.lora_a.id)?,
        gradients.get::<1>(triplets.lora_e.id)?,
        gradients.get::<2>(triplets.lora_b.id)?,
    ))
}

/// The importance of the triplets of every place.
#[derive(Debug, Clone)]
pub(crate) struct Importances {
    /// By path.
    pub(crate) places: BTreeMap<String, Importance>,
    beta1: f64,
    beta2: f64,
}

/// [`Importances`] at rest: by place, the sensitivities of `A`, `E` and `B`.
pub(crate) type ImportancesState = BTreeMap<String, [SensitivityState; 3]>;

impl Importances {
    /// Before the first step; `beta1` and `beta2` say how slowly sensitivity and uncertainty forget.
    pub(crate) fn new(beta1: f64, beta2: f64) -> Self {
        Self { places: BTreeMap::new(), beta1, beta2 }
    }

    /// Learns from the gradients `(∂A, ∂E, ∂B)` of one place.
    pub(crate) fn learn(
        &mut self,
        path: &str,
        triplets: &Triplets,
        gradients: (&Tensor<2>, &Tensor<1>, &Tensor<2>),
    ) {
        let Triplets { lora_a, lora_e, lora_b } = triplets;
        let (a, e, b) = (lora_a.val(), lora_e.val(), lora_b.val());
        let known = self.places.entry(path.to_owned()).or_insert_with(|| Importance {
            a: Sensitivity::zeros(&a),
            e: Sensitivity::zeros(&e),
            b: Sensitivity::zeros(&b),
        });
        known.a.update(&a, gradients.0, self.beta1, self.beta2);
        known.e.update(&e, gradients.1, self.beta1, self.beta2);
        known.b.update(&b, gradients.2, self.beta1, self.beta2);
    }

    /// One number a triplet, by place.
    pub(crate) fn scores(&self) -> BTreeMap<String, Vec<f32>> {
        self.places.iter().map(|(path, known)| (path.clone(), known.triplets())).collect()
    }

    pub(crate) fn state(&self) -> ImportancesState {
        let state = |i: &Importance| [i.a.state(), i.e.state(), i.b.state()];
        self.places.iter().map(|(path, known)| (path.clone(), state(known))).collect()
    }

    /// Goes on where `state` was taken, on the plain `device`.
    ///
    /// # Errors
    /// A state whose tensors are of other ranks.
    pub(crate) fn resume(&mut self, state: ImportancesState, device: &Device) -> Result<(), Error> {
        let mut places = BTreeMap::new();
        for (path, [a, e, b]) in state {
            let (a, e, b) = (
                Sensitivity::restored(a, device),
                Sensitivity::restored(e, device),
                Sensitivity::restored(b, device),
            );
            let (Some(a), Some(e), Some(b)) = (a, e, b) else {
                let reason = "the state's sensitivities of A, E and B have not 2, 1 and 2 axes";
                return Err(Error::place(path, reason));
            };
            places.insert(path, Importance { a, e, b });
        }
        self.places = places;
        Ok(())
    }
}

/// The mean over all `(A [fan_in, r], B [r, fan_out], I [r, r])` of `‖AᵀA - I‖` and `‖BBᵀ - I‖`: what is
/// added to the loss so that directions stay apart. `None` where there is none.
pub(crate) fn off_orthogonal(
    pairs: impl IntoIterator<Item = (Tensor<2>, Tensor<2>, Tensor<2>)>,
) -> Option<Tensor<1>> {
    // A root has no slope at 0, where columns are orthonormal to the last bit: none is passed on there.
    let off = |product: Tensor<2>, identity: Tensor<2>| {
        (product - identity).square().sum().clamp_min(1e-30).sqrt()
    };
    let mut terms = Vec::new();
    for (a, b, identity) in pairs {
        terms.push(off(a.clone().transpose().matmul(a), identity.clone()));
        terms.push(off(b.clone().matmul(b.transpose()), identity));
    }
    (!terms.is_empty()).then(|| Tensor::cat(terms, 0).mean())
}

/// What a cubic schedule has left at `step`: 1 until `start`, 0 from `end` on, `(1 - t)³` between.
pub(crate) fn cubic_left(step: usize, start: usize, end: usize) -> f64 {
    match step {
        _ if step <= start => 1.0,
        _ if step >= end => 0.0,
        _ => (1.0 - (step - start) as f64 / (end - start) as f64).powi(3),
    }
}

/// The same parameter with another value, on the device where it was: its id, and so its optimizer's
/// state, stays.
pub(crate) fn renewed<const D: usize>(
    param: &Param<Tensor<D>>,
    value: Tensor<D>,
) -> Param<Tensor<D>> {
    let plain = value.without_autodiff();
    let value = if param.val().is_autodiff() { Tensor::from_inner(plain) } else { plain };
    Param::initialized(param.id, Param::from_tensor(value.detach()).val())
}

/// Refuses a `beta1` or `beta2` that is not between 0 and 1.
pub(crate) fn check_betas(beta1: f64, beta2: f64) -> Result<(), Error> {
    for (field, beta) in [("beta1", beta1), ("beta2", beta2)] {
        if !(beta > 0.0 && beta < 1.0) {
            let reason = format!("expected a number between 0 and 1, found {beta}");
            return Err(Error::config(field, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("is f32")
    }

    #[test]
    fn sensitivity_is_the_formula() {
        let device = Device::flex();
        let [w, g] = [[2.0, -1.0], [0.5, 3.0]].map(|v| Tensor::<1>::from_floats(v, &device));
        let mut known = Sensitivity::zeros(&w);
        known.update(&w, &g, 0.8, 0.6);
        // I = (1, 3), Ī = 0.2·I = (0.2, 0.6), Ū = 0.4·|I - Ī| = (0.32, 0.96); every step is rounded.
        for (found, expected) in numbers(known.score()).iter().zip([0.064_f32, 0.576]) {
            assert!((found - expected).abs() < 8.0 * f32::EPSILON, "{found} and {expected}");
        }
        let again = Sensitivity::<1>::restored(known.state(), &device).expect("is its own");
        assert_eq!(numbers(again.score()), numbers(known.score()));
        assert!(Sensitivity::<2>::restored(known.state(), &device).is_none());
    }

    #[test]
    fn the_cubic_schedule_goes_from_one_to_zero() {
        let left: Vec<f64> = [0, 2, 4, 6, 7].map(|step| cubic_left(step, 2, 6)).to_vec();
        assert_eq!(left, [1.0, 1.0, 0.125, 0.0, 0.0]);
    }

    #[test]
    fn a_renewed_parameter_keeps_its_id_and_its_device() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            let param = Param::from_tensor(Tensor::<1>::zeros([2], &device));
            let other = renewed(&param, Tensor::ones([2], &Device::flex()));
            assert_eq!((other.id, numbers(other.val())), (param.id, vec![1.0, 1.0]));
            assert_eq!(other.val().is_autodiff(), device.is_autodiff());
            assert_eq!(other.val().is_require_grad(), device.is_autodiff());
        }
    }
}
