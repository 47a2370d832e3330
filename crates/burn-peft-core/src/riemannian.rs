//! Riemannian preconditioning: the gradients of two factors, each measured by the other
//! (arXiv 2402.02347).

use crate::{Adapters, Error, Guide, Policy};
use burn::module::{Module, ModuleDisplay, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::Value as Json;

/// `(G + δI)⁻¹` of a Gram matrix `G [r, r]`, for `δ > 0`: by Cholesky's factors, in f64 on the host.
///
/// Every pivot of `G + δI` is at least `δ`; where the rounding of `G` made one less, it is taken as `δ`.
pub fn ridge_inverse(gram: &Tensor<2>, delta: f64) -> Tensor<2> {
    let [r, _] = gram.dims();
    let data = gram.to_data().convert::<f64>();
    let gram_values: Vec<f64> = data.iter().collect();
    let mut l = vec![0.0; r * r]; // lower, by rows
    for j in 0..r {
        for i in j..r {
            let known: f64 = (0..j).map(|k| l[i * r + k] * l[j * r + k]).sum();
            let rest = gram_values[i * r + j] - known;
            l[i * r + j] = match i == j {
                true => (rest + delta).max(delta).sqrt(),
                false => rest / l[j * r + j],
            };
        }
    }
    let mut inverse = vec![0.0_f32; r * r];
    for column in 0..r {
        let mut x = vec![0.0; r];
        for i in 0..r {
            let known: f64 = (0..i).map(|k| l[i * r + k] * x[k]).sum();
            x[i] = (f64::from(u8::from(i == column)) - known) / l[i * r + i];
        }
        for i in (0..r).rev() {
            let known: f64 = (i + 1..r).map(|k| l[k * r + i] * x[k]).sum();
            x[i] = (x[i] - known) / l[i * r + i];
            inverse[i * r + column] = x[i] as f32;
        }
    }
    Tensor::from_data(TensorData::new(inverse, [r, r]), &gram.device())
}

/// The two factors of one adapter, found by their names.
struct Factors<'n> {
    names: [&'n str; 2],
    stack: Vec<String>,
    found: [Option<(ParamId, Tensor<2>)>; 2],
}

impl<'n> Factors<'n> {
    fn of<A: Module>(adapter: &A, names: [&'n str; 2]) -> Option<[(ParamId, Tensor<2>); 2]> {
        let mut factors = Self { names, stack: Vec::new(), found: [None, None] };
        adapter.visit(&mut factors);
        let [a, b] = factors.found;
        Some([a?, b?])
    }
}

impl ModuleVisitor for Factors<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.stack.last().map(String::as_str);
        if let Some(which) = self.names.iter().position(|n| Some(*n) == name)
            && let [rows, columns] = param.dims()[..]
        {
            let value = param.val().without_autodiff().reshape([rows, columns]);
            self.found[which] = Some((param.id, value));
        }
    }
}

/// A method's policy, if it has one, with preconditioned gradients after it.
struct Riemannian<A: Module + ModuleDisplay> {
    names: [&'static str; 2],
    delta: f64,
    inner: Option<Box<dyn Policy<A>>>,
}

impl<A: Module + ModuleDisplay> Policy<A> for Riemannian<A> {
    fn gradients(
        &mut self,
        step: usize,
        adapters: &Adapters<A>,
        gradients: GradientsParams,
    ) -> GradientsParams {
        let mut gradients = match &mut self.inner {
            Some(policy) => policy.gradients(step, adapters, gradients),
            None => gradients,
        };
        for (_, adapter) in adapters.iter() {
            let Some([(id_a, a), (id_b, b)]) = Factors::of(adapter, self.names) else { continue };
            if let Some(gradient) = gradients.remove::<2>(id_a) {
                let metric = ridge_inverse(&b.clone().matmul(b.transpose()), self.delta);
                gradients.register(id_a, gradient.matmul(metric));
            }
            if let Some(gradient) = gradients.remove::<2>(id_b) {
                let metric = ridge_inverse(&a.clone().transpose().matmul(a), self.delta);
                gradients.register(id_b, metric.matmul(gradient));
            }
        }
        gradients
    }

    fn adjust(
        &mut self,
        step: usize,
        learning_rate: f64,
        adapters: &Adapters<A>,
    ) -> Result<Option<Adapters<A>>, Error> {
        match &mut self.inner {
            Some(policy) => policy.adjust(step, learning_rate, adapters),
            None => Ok(None),
        }
    }

    fn state(&self) -> Result<Json, Error> {
        self.inner.as_ref().map_or(Ok(Json::Null), |policy| policy.state())
    }

    fn resume(&mut self, state: Json, device: &Device) -> Result<(), Error> {
        match &mut self.inner {
            Some(policy) => policy.resume(state, device),
            None => Ok(()),
        }
    }
}

impl<A: Module + ModuleDisplay + 'static> Guide<A> {
    /// With Riemannian preconditioning (arXiv 2402.02347): before the optimizer's step
    /// `∂A ← ∂A·(B·Bᵀ + δI)⁻¹` and `∂B ← (Aᵀ·A + δI)⁻¹·∂B`, with `A [fan_in, r]` and `B [r, fan_out]`
    /// named `pair` ([`Method::PAIR`](crate::Method::PAIR)) and `δ = delta`. Up to `δ` the step that `A·B`
    /// takes no longer depends on how the product is shared out between `A` and `B`.
    ///
    /// Gradients come clipped. Two `[r, r]` matrices a place are inverted on the host at each step.
    ///
    /// # Errors
    /// A method or an adapter without two trained factors, or a `delta` that is not above 0.
    pub fn riemannian(
        self,
        pair: Option<[&'static str; 2]>,
        adapters: &Adapters<A>,
        delta: f64,
    ) -> Result<Self, Error> {
        if !delta.is_finite() || delta <= 0.0 {
            let reason = format!("expected a number above 0, found {delta}");
            return Err(Error::config("riemannian_reg", reason));
        }
        let reason =
            "riemannian_reg: expected two trained factors A and B, as LoRA has; there are none";
        let Some(names) = pair else { return Err(Error::config("riemannian_reg", reason)) };
        for (path, adapter) in adapters.iter() {
            if Factors::of(adapter, names).is_none() {
                return Err(Error::place(path, reason));
            }
        }
        let policy = Riemannian { names, delta, inner: self.policy };
        Ok(Self { policy: Some(Box::new(policy)), ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Module, Debug)]
    struct Pair {
        lora_a: Param<Tensor<2>>,
        lora_b: Param<Tensor<2>>,
    }

    const NAMES: Option<[&str; 2]> = Some(["lora_a", "lora_b"]);

    fn tensor<const R: usize, const C: usize>(rows: [[f32; C]; R]) -> Tensor<2> {
        Tensor::from_data(rows, &Device::flex())
    }

    fn far(a: Tensor<2>, b: Tensor<2>) -> f32 {
        (a - b).abs().max().into_scalar()
    }

    /// The gradients of `A` and `B` where the loss has the gradient `g` by their product.
    fn plain(a: &Tensor<2>, b: &Tensor<2>, g: &Tensor<2>) -> [Tensor<2>; 2] {
        [g.clone().matmul(b.clone().transpose()), a.clone().transpose().matmul(g.clone())]
    }

    /// What the policy makes of [`plain`].
    fn preconditioned(a: &Tensor<2>, b: &Tensor<2>, g: &Tensor<2>, delta: f64) -> [Tensor<2>; 2] {
        let [lora_a, lora_b] = [a, b].map(|t| Param::from_tensor(t.clone()));
        let ids = [lora_a.id, lora_b.id];
        let adapters = Adapters::new([("one".to_owned(), Pair { lora_a, lora_b })], []);
        let guide = Guide::default().riemannian(NAMES, &adapters, delta).expect("has a pair");
        let mut gradients = GradientsParams::new();
        for (id, gradient) in ids.into_iter().zip(plain(a, b, g)) {
            gradients.register(id, gradient);
        }
        let mut policy = guide.policy.expect("is there");
        let found = policy.gradients(1, &adapters, gradients);
        ids.map(|id| found.get::<2>(id).expect("is kept"))
    }

    fn example() -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let a = tensor([[1.0, 0.5], [-0.5, 2.0], [0.25, -1.0]]);
        let b = tensor([[0.5, -1.0, 0.75, 1.0], [2.0, 0.5, -0.25, 0.125]]);
        let g = tensor([[1.0, -2.0, 0.5, 0.25], [0.75, 1.0, -1.0, 2.0], [-0.5, 0.25, 1.5, -1.0]]);
        (a, b, g)
    }

    #[test]
    fn multiplied_back_it_is_the_gradient() {
        let (a, b, g) = example();
        let delta = 0.1;
        let [of_a, of_b] = preconditioned(&a, &b, &g, delta);
        let [plain_a, plain_b] = plain(&a, &b, &g);
        let ridge = Tensor::eye(2, &Device::flex()) * delta;
        let back = of_a.matmul(b.clone().matmul(b.transpose()) + ridge.clone());
        // A few roundings of numbers of size 10.
        assert!(far(back, plain_a) < 1e-5);
        let back = (a.clone().transpose().matmul(a) + ridge).matmul(of_b);
        assert!(far(back, plain_b) < 1e-5);
    }

    #[test]
    fn the_step_of_the_product_is_the_same_however_it_is_shared_out() {
        let (a, b, g) = example();
        // The same product with other factors: A·C and C⁻¹·B.
        let (a2, b2) = (
            a.clone().matmul(tensor([[4.0, 1.0], [0.0, 0.5]])),
            tensor([[0.25, -0.5], [0.0, 2.0]]).matmul(b.clone()),
        );
        assert!(far(a.clone().matmul(b.clone()), a2.clone().matmul(b2.clone())) < 1e-5);
        let moved = |(a, b): (&Tensor<2>, &Tensor<2>), [da, db]: [Tensor<2>; 2]| {
            (a.clone() - da * 0.1).matmul(b.clone() - db * 0.1)
        };
        let one = moved((&a, &b), preconditioned(&a, &b, &g, 1e-8));
        let other = moved((&a2, &b2), preconditioned(&a2, &b2, &g, 1e-8));
        assert!(far(one, other) < 1e-4);
        let one = moved((&a, &b), plain(&a, &b, &g));
        let other = moved((&a2, &b2), plain(&a2, &b2, &g));
        assert!(far(one, other) > 0.1, "gradient descent does depend on it");
    }

    #[test]
    fn factors_of_too_low_a_rank_have_an_inverse_too() {
        let b = tensor([[1e4, 2e4, 3e4], [1e4, 2e4, 3e4]]);
        let inverse = ridge_inverse(&b.clone().matmul(b.transpose()), 1e-6);
        assert!(inverse.is_finite().all().into_scalar::<bool>());
        let zero = ridge_inverse(&Tensor::zeros([2, 2], &Device::flex()), 0.5);
        assert!(far(zero, Tensor::eye(2, &Device::flex()) * 2.0) < 1e-6);
    }

    #[test]
    fn what_has_no_pair_is_refused() {
        let (a, b, _) = example();
        let [lora_a, lora_b] = [a, b].map(Param::from_tensor);
        let adapters = Adapters::new([("one".to_owned(), Pair { lora_a, lora_b })], []);
        for (pair, delta, said) in [
            (None, 1e-6, "two trained factors"),
            (Some(["lora_a", "other"]), 1e-6, "one: "),
            (NAMES, 0.0, "above 0"),
        ] {
            let refused = Guide::default().riemannian(pair, &adapters, delta).expect_err("cannot");
            assert!(refused.to_string().contains(said), "{refused}");
        }
    }
}
