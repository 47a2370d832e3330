//! SuperLoRA: `W' = W + s·(A₁B₁)⊗..⊗(A_K B_K)`, a Kronecker product of low-rank matrices (arXiv 2403.11887).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::low_rank::{bounded, stored, taken};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The part of SuperLoRA (arXiv 2403.11887) that the paper calls LoNKr, with one group a place:
/// `y = xW + b + s·dropout(x)·⊗ₖ(Aₖ·Bₖ)` over `splits` factors. One split is LoRA.
///
/// `Aₖ [pₖ, r]`, `Bₖ [r, qₖ]`; the `pₖ` multiply to `fan_in` and the `qₖ` to `fan_out`, cut as evenly as the
/// widths allow. The product is never formed in a forward pass: each factor acts along its own axis.
/// `Aₖ ~ U(±1/√pₖ)` and `Bₖ ~ U(±1/√r)` but the last `B`, which is zero at first (our choice). Parameters:
/// `r·Σₖ(pₖ + qₖ)` a place. Folds.
///
/// Absent of the paper's family: groups over several layers and their folding, tensor (Tucker) factors of
/// more than two axes (LoRTA), and the fixed projection or shuffle of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SuperLora {
    /// Rank of each factor; default 8.
    pub r: usize,
    /// Number of Kronecker factors, 1 to 4; default 2.
    pub splits: usize,
    /// `s`; default 1.
    pub scale: f64,
    /// Probability with which an input is zeroed in training; default 0.
    pub superlora_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "superlora_only"; default none.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for SuperLora {
    fn default() -> Self {
        Self {
            r: 8,
            splits: 2,
            scale: 1.0,
            superlora_dropout: 0.0,
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// What SuperLoRA trains at one place.
#[derive(Module, Debug)]
pub struct SuperLoraAdapter {
    /// All `Aₖ [pₖ, r]`.
    pub superlora_a: Vec<Param<Tensor<2>>>,
    /// All `Bₖ [r, qₖ]`.
    pub superlora_b: Vec<Param<Tensor<2>>>,
    /// Drops inputs in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl SuperLoraAdapter {
    fn factors(&self) -> impl Iterator<Item = (Tensor<2>, Tensor<2>)> {
        self.superlora_a.iter().zip(&self.superlora_b).map(|(a, b)| (a.val(), b.val()))
    }
}

impl Adapter for SuperLoraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let x = drop(x, &self.dropout, &self.superlora_a.first()?.val());
        let [batch, seq, mut width] = x.dims();
        let tokens = batch * seq;
        let mut h = x * self.scaling;
        // Each step takes the first axis off, [tokens, pₖ, rest], and appends what it becomes: after the
        // last, the axes are q₁ .. q_K.
        for (a, b) in self.factors() {
            let ([p, _], [_, q]) = (a.dims(), b.dims());
            let rest = width / p;
            let axis = h.reshape([tokens, p, rest]).swap_dims(1, 2).reshape([tokens * rest, p]);
            width = rest * q;
            h = axis.matmul(a).matmul(b).reshape([batch, seq, width]);
        }
        Some(h.cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for SuperLoraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let factors = self.factors().map(|(a, b)| a.matmul(b));
        let product = factors.reduce(|left, right| {
            let ([a, b], [c, d]) = (left.dims(), right.dims());
            let product: Tensor<4> = left.reshape([a, 1, b, 1]) * right.reshape([1, c, 1, d]);
            product.reshape([a * c, b * d])
        })?;
        Some(product * self.scaling)
    }
}

/// The names of the factors in the file.
const FACTORS: [[&str; 2]; 4] = [
    ["superlora_A1", "superlora_B1"],
    ["superlora_A2", "superlora_B2"],
    ["superlora_A3", "superlora_B3"],
    ["superlora_A4", "superlora_B4"],
];

/// `width` as a product of `parts` divisors, about equally large.
fn cut(mut width: usize, parts: usize) -> Vec<usize> {
    let mut sizes = Vec::with_capacity(parts);
    for left in (1..=parts).rev() {
        let fits = |size: &usize| {
            width.is_multiple_of(*size)
                && size.checked_pow(left as u32).is_some_and(|whole| whole <= width)
        };
        let size =
            if left == 1 { width } else { (1..=width.isqrt()).rev().find(fits).unwrap_or(1) };
        sizes.push(size);
        width /= size;
    }
    sizes
}

impl SuperLora {
    /// `(pₖ, qₖ)` of each factor at `site`.
    fn shapes(&self, site: &Site) -> Result<Vec<(usize, usize)>, Error> {
        bounded("r", &site.path, &[self.r, site.fan_in() + site.fan_out()])?;
        let (inner, outer) = (cut(site.fan_in(), self.splits), cut(site.fan_out(), self.splits));
        Ok(inner.into_iter().zip(outer).collect())
    }

    fn adapter(&self, factors: Vec<[Tensor<2>; 2]>) -> SuperLoraAdapter {
        let (a, b) = factors
            .into_iter()
            .map(|[a, b]| (Param::from_tensor(a), Param::from_tensor(b)))
            .unzip();
        SuperLoraAdapter {
            superlora_a: a,
            superlora_b: b,
            dropout: DropoutConfig::new(self.superlora_dropout).init(),
            scaling: self.scale,
        }
    }
}

impl Method for SuperLora {
    type Adapter = SuperLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "SUPERLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn biases(&self) -> Biases {
        self.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        if !(1..=FACTORS.len()).contains(&self.splits) {
            let reason = format!("expected 1 to {}, found {}", FACTORS.len(), self.splits);
            return Err(Error::config("splits", reason));
        }
        finite("scale", self.scale)?;
        probability("superlora_dropout", self.superlora_dropout)?;
        self.bias.check("superlora_only")
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<SuperLoraAdapter, Error> {
        let bound = |fan_in: usize| (1.0 / fan_in as f32).sqrt();
        let mut factors = Vec::with_capacity(self.splits);
        for (p, q) in self.shapes(site)? {
            let a = uniform([p, self.r], bound(p), rng, device);
            factors.push([a, uniform([self.r, q], bound(self.r), rng, device)]);
        }
        if let Some([_, last]) = factors.last_mut() {
            *last = last.zeros_like();
        }
        Ok(self.adapter(factors))
    }

    fn fold(adapter: &SuperLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { r: 2, targets: targets.clone(), ..Self::default() };
        let bias = Bias::Only("superlora_only".into());
        vec![
            Self { splits: 3, superlora_dropout: 0.2, bias, ..plain.clone() },
            Self { splits: 1, scale: 0.5, bias: Bias::All, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let shapes = self.shapes(site).unwrap_or_default();
        shapes.iter().map(|(p, q)| self.r * (p + q)).sum()
    }

    fn tensors(&self, _site: &Site, adapter: &SuperLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let factors = FACTORS.into_iter().zip(adapter.factors());
        factors.flat_map(|([a, b], (x, y))| [(a, stored(x)), (b, stored(y))]).collect()
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<SuperLoraAdapter, Error> {
        let mut factors = Vec::with_capacity(self.splits);
        for ((p, q), [a, b]) in self.shapes(site)?.into_iter().zip(FACTORS) {
            let a = taken(a, [p, self.r], file, device)?;
            factors.push([a, taken(b, [self.r, q], file, device)?]);
        }
        Ok(self.adapter(factors))
    }
}
