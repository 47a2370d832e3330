//! KronA: `W' = W + s·A⊗B`, a Kronecker product of two small trained factors (arXiv 2212.10650).

use crate::common::{Bias, drop, finite, probability};
use crate::low_rank::{stored, taken};
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::module::embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// KronA (arXiv 2212.10650): `y = xW + b + s·dropout(x)·(A⊗B)`.
///
/// `A [a1, a2]`, `B [b1, b2]` with `a1·b1 = fan_in` and `a2·b2 = fan_out`. The product is never formed:
/// with `X [a1, b1]` the input in rows, the output in rows `[a2, b2]` is `Aᵀ·X·B`, as in the paper.
/// `A ~ U(±1/√a1)` (our choice), `B` zero at first. Parameters: `a1·a2 + b1·b2` a place. Folds.
///
/// With `residual`, square linear layers get `s_res·x` on top, `s_res` a trained number, zero at first:
/// the learnable residual of the paper's KronA^B_res. That module and KronA^B stand beside a whole
/// feed-forward block in the paper; here they stand beside one linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KronA {
    /// Rows of `A`, a divisor of `fan_in`; default the largest one up to `√fan_in`.
    pub a1: Option<usize>,
    /// Columns of `A`, a divisor of `fan_out`; default the largest one up to `√fan_out`.
    pub a2: Option<usize>,
    /// `s`; default 1.
    pub scale: f64,
    /// A trained residual at square linear layers; default false.
    pub residual: bool,
    /// Probability with which an input is zeroed in training; default 0.
    pub krona_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "krona_only"; default none.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for KronA {
    fn default() -> Self {
        Self {
            a1: None,
            a2: None,
            scale: 1.0,
            residual: false,
            krona_dropout: 0.0,
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// What KronA trains at one place.
#[derive(Module, Debug)]
pub struct KronAAdapter {
    /// `A [a1, a2]`.
    pub krona_a: Param<Tensor<2>>,
    /// `B [b1, b2]`.
    pub krona_b: Param<Tensor<2>>,
    /// `s_res`, `[1]`.
    pub krona_residual: Option<Param<Tensor<1>>>,
    /// Drops inputs in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl Adapter for KronAAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (a, b) = (self.krona_a.val(), self.krona_b.val());
        let ([a1, a2], [b1, b2]) = (a.dims(), b.dims());
        let x = drop(x, &self.dropout, &a);
        let [batch, seq, _] = x.dims();
        let tokens = batch * seq;
        let h = x.clone().reshape([tokens * a1, b1]).matmul(b) * self.scaling; // X·B
        let h = h.reshape([tokens, a1, b2]).swap_dims(1, 2).reshape([tokens * b2, a1]);
        let h = h.matmul(a).reshape([tokens, b2, a2]).swap_dims(1, 2); // Aᵀ·X·B
        let mut delta = h.reshape([batch, seq, a2 * b2]);
        if let Some(residual) = &self.krona_residual {
            delta = delta + x * residual.val().unsqueeze();
        }
        Some(delta.cast(y.dtype()))
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        // Row `i` of A⊗B is row `i / b1` of A ⊗ row `i % b1` of B.
        let b1 = self.krona_b.dims()[0] as i64;
        let of_a = embedding(self.krona_a.val() * self.scaling, ids.clone().div_scalar(b1));
        let of_b = embedding(self.krona_b.val(), ids.clone().remainder_scalar(b1));
        let rows = of_a.unsqueeze_dim::<4>(3) * of_b.unsqueeze_dim::<4>(2); // [.., a2, b2]
        Some(rows.reshape(y.dims()).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for KronAAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let (a, b) = (self.krona_a.val() * self.scaling, self.krona_b.val());
        let ([a1, a2], [b1, b2]) = (a.dims(), b.dims());
        let product: Tensor<4> = a.reshape([a1, 1, a2, 1]) * b.reshape([1, b1, 1, b2]);
        let mut delta = product.reshape([a1 * b1, a2 * b2]);
        if let Some(residual) = &self.krona_residual {
            let residual = residual.val().unsqueeze::<2>();
            delta = delta.clone() + Tensor::eye(a1 * b1, &residual.device().inner()) * residual;
        }
        Some(delta)
    }
}

fn divisors(n: usize) -> impl DoubleEndedIterator<Item = usize> {
    (1..=n).filter(move |divisor| n.is_multiple_of(*divisor))
}

/// The asked-for divisor of `fan`, or the largest one up to its root.
fn part(field: &str, asked: Option<usize>, fan: usize, path: &str) -> Result<usize, Error> {
    match asked {
        Some(size) if size != 0 && fan.is_multiple_of(size) => Ok(size),
        Some(size) => {
            let fits: Vec<String> = divisors(fan).map(|divisor| divisor.to_string()).collect();
            let fits = fits.join(", ");
            let reason = format!("{field}: {size} does not divide {fan}; expected one of {fits}");
            Err(Error::place(path, reason))
        }
        None => Ok((1..=fan.isqrt()).rev().find(|size| fan.is_multiple_of(*size)).unwrap_or(1)),
    }
}

impl KronA {
    /// `[a1, a2]` and `[b1, b2]` at `site`.
    fn shapes(&self, site: &Site) -> Result<[[usize; 2]; 2], Error> {
        let a1 = part("a1", self.a1, site.fan_in(), &site.path)?;
        let a2 = part("a2", self.a2, site.fan_out(), &site.path)?;
        Ok([[a1, a2], [site.fan_in() / a1, site.fan_out() / a2]])
    }

    fn has_residual(&self, site: &Site) -> bool {
        self.residual && site.kind == Kind::Linear && site.fan_in() == site.fan_out()
    }

    fn adapter(&self, [a, b]: [Tensor<2>; 2], residual: Option<Tensor<1>>) -> KronAAdapter {
        KronAAdapter {
            krona_a: Param::from_tensor(a),
            krona_b: Param::from_tensor(b),
            krona_residual: residual.map(Param::from_tensor),
            dropout: DropoutConfig::new(self.krona_dropout).init(),
            scaling: self.scale,
        }
    }
}

impl Method for KronA {
    type Adapter = KronAAdapter;
    type Shared = ();
    const NAME: &'static str = "KRONA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["krona_b"];

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
        finite("scale", self.scale)?;
        probability("krona_dropout", self.krona_dropout)?;
        self.bias.check("krona_only")
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<KronAAdapter, Error> {
        let [a, b] = self.shapes(site)?;
        let factor = uniform(a, (1.0 / a[0] as f32).sqrt(), rng, device);
        let residual = self.has_residual(site).then(|| Tensor::zeros([1], device));
        Ok(self.adapter([factor, Tensor::zeros(b, device)], residual))
    }

    fn fold(adapter: &KronAAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        let bias = Bias::Only("krona_only".into());
        vec![
            Self { residual: true, bias, krona_dropout: 0.2, ..plain.clone() },
            Self { a1: Some(4), a2: Some(2), scale: 0.5, bias: Bias::All, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let factors = self.shapes(site).unwrap_or_default();
        factors.iter().map(|[rows, columns]| rows * columns).sum::<usize>()
            + usize::from(self.has_residual(site))
    }

    fn tensors(&self, _site: &Site, adapter: &KronAAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = vec![
            ("krona_A", stored(adapter.krona_a.val())),
            ("krona_B", stored(adapter.krona_b.val())),
        ];
        if let Some(residual) = &adapter.krona_residual {
            tensors.push(("krona_residual", residual.val().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<KronAAdapter, Error> {
        let [a, b] = self.shapes(site)?;
        let a = taken("krona_A", a, file, device)?;
        let b = taken("krona_B", b, file, device)?;
        let residual = match self.has_residual(site) {
            true => Some(file.take("krona_residual", [1], device)?),
            false => None,
        };
        Ok(self.adapter([a, b], residual))
    }
}
