//! PSOFT: the principal subspace of the weight rotated (arXiv 2505.11235).

use crate::common::{drop, finite, positive, probability};
use crate::orthogonal::{MOST_TERMS, Skew, cayley, identity, neumann};
use crate::random::normal;
use crate::source::laid_out;
use burn::linalg::svd;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, site_rng};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// PSOFT (arXiv 2505.11235): `y = xW + b + s·dropout(x)·A·(R - I)ᵀ·B`, `s = psoft_alpha / r`.
///
/// `A [fan_in, r]` and `B [r, fan_out]` are constants: `s·A·B` is the best approximation of `W` of rank `r`.
/// `R = diag(b)·O·diag(a) [r, r]` is trained, `O = (I + Q)(I - Q)⁻¹` orthogonal with a skew-symmetric `Q = 0` at
/// the start, `a = b = 1`. Parameters: `r·(r - 1)/2 + 2r` a place. Folds: `Δ(W) = s·A·(R - I)ᵀ·B`. Names
/// and defaults are HF PEFT's.
///
/// Singular vectors are known up to their signs, and `R` is learnt for some choice of them. HF PEFT's file
/// holds `R` alone and takes the singular value decomposition of the weight anew, so that what it means
/// depends on the library and the machine that does this. Files written here hold `psoft_A` and `psoft_B`
/// too, in HF PEFT's layout, and reading asks for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Psoft {
    /// Rank of the subspace; default 32.
    pub r: usize,
    /// Scale of the difference, divided by `r`; default 32.
    pub psoft_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub psoft_dropout: f64,
    /// Where the singular values go: all to `B`, or half to each factor; default psoft_init.
    pub ab_svd_init: Split,
    /// How they are found: exactly, or by a random projection, sharpened; default full.
    pub psoft_svd: Svd,
    /// How often the random projection is sharpened; default 10.
    pub psoft_svd_lowrank_niter: usize,
    /// Decides the random projection; default 0.
    pub random_seed: u64,
    /// `O` is orthogonal; `false` trains a free matrix `O [r, r]`, `r²` numbers. Default true.
    pub psoft_orth: bool,
    /// Trains `b`; default true.
    pub psoft_mag_b: bool,
    /// Trains `a`; default true.
    pub psoft_mag_a: bool,
    /// Neumann's series in place of the inverse in `O`; default false.
    pub use_cayley_neumann: bool,
    /// Terms of the series; default 5.
    pub num_cayley_neumann_terms: usize,
    /// Length of `Q` from which on it is shortened for the series, in (0, 1); default none.
    pub cayley_neumann_eps: Option<f64>,
    /// An identity at the start; `false` adds `N(0, 0.1²)` to `Q`, or to the free `O`. Default true.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Psoft {
    fn default() -> Self {
        Self {
            r: 32,
            psoft_alpha: 32.0,
            psoft_dropout: 0.0,
            ab_svd_init: Split::Psoft,
            psoft_svd: Svd::Full,
            psoft_svd_lowrank_niter: 10,
            random_seed: 0,
            psoft_orth: true,
            psoft_mag_b: true,
            psoft_mag_a: true,
            use_cayley_neumann: false,
            num_cayley_neumann_terms: 5,
            cayley_neumann_eps: None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// Where the singular values go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Split {
    /// To `B`: the columns of `A` are orthonormal.
    #[default]
    #[serde(rename = "psoft_init")]
    Psoft,
    /// Their square roots to each factor.
    #[serde(rename = "pissa_init")]
    Pissa,
}

/// How singular values are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Svd {
    /// All of them, exactly.
    #[default]
    Full,
    /// Those of a random projection, sharpened (arXiv 0909.4061).
    Lowrank,
}

/// What PSOFT trains at one place.
#[derive(Module, Debug)]
pub struct PsoftAdapter {
    /// `[1, r·(r - 1)/2]`, the numbers above the diagonal of `Q`, or the free `O [r, r]`.
    pub weight: Param<Tensor<2>>,
    /// `b [r]`.
    pub vector_b: Option<Param<Tensor<1>>>,
    /// `a [r]`.
    pub vector_a: Option<Param<Tensor<1>>>,
    /// `A [fan_in, r]`, a constant.
    pub psoft_a: Tensor<2>,
    /// `B [r, fan_out]`, a constant.
    pub psoft_b: Tensor<2>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
    /// Terms of the series; `None` for the inverse.
    pub terms: Option<usize>,
    /// Length of `Q` from which on it is shortened for the series.
    pub eps: Option<f64>,
    /// Reads `Q`; `None` for a free `O`.
    skew: Option<Skew>,
}

impl PsoftAdapter {
    /// `s·(R - I)ᵀ`, out of `R = diag(b)·O·diag(a)`.
    fn change(&self) -> Tensor<2> {
        let weight = self.weight.val();
        let mut r = match &self.skew {
            None => weight.unsqueeze(),
            Some(skew) => match self.terms {
                Some(terms) => neumann(shortened(skew.of(weight), self.eps), terms),
                None => cayley(skew.of(weight)),
            },
        };
        let [_, size, _] = r.dims();
        if let Some(b) = &self.vector_b {
            r = r * b.val().reshape([1, size, 1]);
        }
        if let Some(a) = &self.vector_a {
            r = r * a.val().reshape([1, 1, size]);
        }
        let eye = identity(size, &r.device());
        ((r - eye) * self.scaling).squeeze_dim::<2>(0).transpose()
    }
}

/// `Q` no longer than `eps`. The bound is put on the square, so that `Q = 0` has a gradient.
fn shortened(q: Tensor<3>, eps: Option<f64>) -> Tensor<3> {
    let Some(eps) = eps else { return q };
    let square = (q.clone() * q.clone()).sum().clamp_min(eps * eps);
    q * (square.sqrt().recip() * eps).unsqueeze()
}

impl Adapter for PsoftAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let change = self.change();
        let h = linear(drop(x, &self.dropout, &change), self.psoft_a.clone(), None);
        Some(linear(linear(h, change, None), self.psoft_b.clone(), None).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for PsoftAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let turned = self.psoft_a.clone().matmul(self.change());
        Some(turned.matmul(self.psoft_b.clone()).cast(w.dtype()))
    }
}

/// Orthonormal columns with the span of those of `a`, which is higher than wide: each takes its share out
/// of those that follow, twice, because once leaves too much where columns are nearly parallel.
fn span(a: &Tensor<2>) -> Tensor<2> {
    let [rows, columns] = a.dims();
    let values: Vec<f64> = a.clone().transpose().into_data().iter::<f64>().collect();
    let mut done: Vec<Vec<f64>> = Vec::with_capacity(columns);
    for column in values.chunks_exact(rows) {
        let mut column = column.to_vec();
        for earlier in done.iter().chain(&done) {
            let share: f64 = column.iter().zip(earlier).map(|(a, b)| a * b).sum();
            column.iter_mut().zip(earlier).for_each(|(a, b)| *a -= share * b);
        }
        let length = column.iter().map(|a| a * a).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        column.iter_mut().for_each(|a| *a /= length);
        done.push(column);
    }
    let values: Vec<f32> = done.into_iter().flatten().map(|value| value as f32).collect();
    Tensor::<2>::from_data(TensorData::new(values, [columns, rows]), &a.device()).transpose()
}

/// Sweeps that a singular value may take, of which few are needed.
const SWEEPS: usize = 200;

impl Psoft {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, psoft_alpha: f64, targets: Targets) -> Self {
        Self { r, psoft_alpha, targets, ..Self::default() }
    }

    fn scaling(&self) -> f64 {
        self.psoft_alpha / self.r as f64
    }

    fn fits(&self, site: &Site) -> Result<(), Error> {
        let most = site.fan_in().min(site.fan_out());
        if self.r > most {
            let reason = format!("expected at most {most} at {}, found {}", site.path, self.r);
            return Err(Error::config("r", reason));
        }
        Ok(())
    }

    /// `U [fan_in, r]`, `S [1, r]`, `Vᵀ [r, fan_out]` of the `r` largest singular values.
    fn principal(&self, w: Tensor<2>, site: &Site) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let (u, s, vt) = match self.psoft_svd {
            Svd::Full => svd::<2, 1>(w, SWEEPS),
            Svd::Lowrank => {
                let mut rng = site_rng(self.random_seed, &site.path);
                let start = normal([site.fan_out(), self.r], 1.0, &mut rng, &w.device());
                let across = w.clone().transpose();
                let near = (0..self.psoft_svd_lowrank_niter)
                    .fold(span(&w.clone().matmul(start)), |near, _| {
                        span(&w.clone().matmul(span(&across.clone().matmul(near))))
                    });
                let (u, s, vt) = svd::<2, 1>(near.clone().transpose().matmul(w), SWEEPS);
                (near.matmul(u), s, vt)
            }
        };
        let r = self.r;
        (u.narrow(1, 0, r), s.narrow(0, 0, r).unsqueeze(), vt.narrow(0, 0, r))
    }

    /// `A` and `B` for a place, with `s·A·B` nearest to its weight.
    fn factors(&self, site: &Site, device: &Device) -> Result<(Tensor<2>, Tensor<2>), Error> {
        let w = site.matrix().filter(|w| w.dtype().is_float());
        let Some(w) = w.filter(|w| w.clone().is_finite().all().into_scalar::<bool>()) else {
            let reason = "expected a weight of finite floats, to find its principal subspace";
            return Err(Error::place(&site.path, reason));
        };
        let w = w.without_autodiff().cast(burn::tensor::DType::F32);
        let (u, s, vt) = self.principal(w, site);
        let s = s / self.scaling();
        let (a, b) = match self.ab_svd_init {
            Split::Psoft => (u, vt * s.transpose()),
            Split::Pissa => (u * s.clone().sqrt(), vt * s.sqrt().transpose()),
        };
        let device = device.clone().inner();
        Ok((a.to_device(&device), b.to_device(&device)))
    }

    fn adapter(
        &self,
        weight: Tensor<2>,
        [b, a]: [Option<Tensor<1>>; 2],
        factors: (Tensor<2>, Tensor<2>),
    ) -> PsoftAdapter {
        let plain = factors.0.device().without_autodiff();
        PsoftAdapter {
            skew: self.psoft_orth.then(|| Skew::new(self.r, &weight.device())),
            weight: Param::from_tensor(weight),
            vector_b: b.map(Param::from_tensor),
            vector_a: a.map(Param::from_tensor),
            psoft_a: laid_out(factors.0.without_autodiff(), &plain),
            psoft_b: laid_out(factors.1.without_autodiff(), &plain),
            dropout: DropoutConfig::new(self.psoft_dropout).init(),
            scaling: self.scaling(),
            terms: self.use_cayley_neumann.then_some(self.num_cayley_neumann_terms),
            eps: self.cayley_neumann_eps,
        }
    }

    /// Shape of the trained numbers; HF PEFT's file has those of `Q` without the first axis.
    fn shape(&self) -> [usize; 2] {
        let r = self.r;
        if self.psoft_orth { [1, r * (r - 1) / 2] } else { [r, r] }
    }
}

impl Method for Psoft {
    type Adapter = PsoftAdapter;
    type Shared = ();
    const NAME: &'static str = "PSOFT";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        if self.psoft_orth && self.r == 1 {
            let reason = "expected 2 or more, because one dimension cannot be rotated (psoft_orth)";
            return Err(Error::config("r", reason));
        }
        if self.r > 1 << 15 {
            let reason = format!("a rank of {} makes more than 2^30 numbers", self.r);
            return Err(Error::config("r", reason));
        }
        finite("psoft_alpha", self.psoft_alpha)?;
        if self.psoft_alpha <= 0.0 {
            let reason = format!("expected more than 0, found {}", self.psoft_alpha);
            return Err(Error::config("psoft_alpha", reason));
        }
        if self.psoft_svd_lowrank_niter > MOST_TERMS {
            let reason =
                format!("expected at most {MOST_TERMS}, found {}", self.psoft_svd_lowrank_niter);
            return Err(Error::config("psoft_svd_lowrank_niter", reason));
        }
        if self.use_cayley_neumann && !(2..=MOST_TERMS).contains(&self.num_cayley_neumann_terms) {
            let reason =
                format!("expected 2 to {MOST_TERMS}, found {}", self.num_cayley_neumann_terms);
            return Err(Error::config("num_cayley_neumann_terms", reason));
        }
        if let Some(eps) = self.cayley_neumann_eps
            && (eps <= 0.0 || eps >= 1.0 || eps.is_nan())
        {
            let reason = format!("expected a number in (0, 1), found {eps}");
            return Err(Error::config("cayley_neumann_eps", reason));
        }
        probability("psoft_dropout", self.psoft_dropout)
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<PsoftAdapter, Error> {
        self.fits(site)?;
        let mut weight = match self.init_weights {
            true => Tensor::zeros(self.shape(), device),
            false => normal(self.shape(), 0.1, rng, device),
        };
        if !self.psoft_orth {
            weight = weight + Tensor::eye(self.r, device);
        }
        let ones = |trained: bool| trained.then(|| Tensor::ones([self.r], device));
        let vectors = [ones(self.psoft_mag_b), ones(self.psoft_mag_a)];
        Ok(self.adapter(weight, vectors, self.factors(site, device)?))
    }

    fn fold(adapter: &PsoftAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 2.0, targets.clone());
        vec![
            Self {
                psoft_svd: Svd::Lowrank,
                psoft_svd_lowrank_niter: 3,
                random_seed: 1,
                psoft_dropout: 0.2,
                ..plain.clone()
            },
            Self { ab_svd_init: Split::Pissa, init_weights: false, ..plain.clone() },
            Self { psoft_orth: false, psoft_mag_b: false, ..plain.clone() },
            Self {
                use_cayley_neumann: true,
                num_cayley_neumann_terms: 4,
                cayley_neumann_eps: Some(0.5),
                psoft_mag_a: false,
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, _site: &Site) -> usize {
        let vectors = usize::from(self.psoft_mag_b) + usize::from(self.psoft_mag_a);
        self.shape().iter().product::<usize>() + vectors * self.r
    }

    fn tensors(&self, _site: &Site, adapter: &PsoftAdapter) -> Vec<(&'static str, TensorData)> {
        let weight = adapter.weight.val();
        let weight = match self.psoft_orth {
            true => weight.squeeze_dim::<1>(0).into_data(),
            false => weight.into_data(),
        };
        let mut tensors = vec![
            ("psoft_R.weight", weight),
            ("psoft_A", adapter.psoft_a.clone().transpose().into_data()),
            ("psoft_B", adapter.psoft_b.clone().transpose().into_data()),
        ];
        if let Some(b) = &adapter.vector_b {
            tensors.push(("psoft_R.vector_b", b.val().into_data()));
        }
        if let Some(a) = &adapter.vector_a {
            tensors.push(("psoft_R.vector_a", a.val().into_data()));
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<PsoftAdapter, Error> {
        self.fits(site)?;
        if !file.has("psoft_A") || !file.has("psoft_B") {
            let reason = "the file has no psoft_A and psoft_B, the factors between which R was learnt, \
                 and another decomposition of the weight may give them other signs; where it was trained, \
                 add the layer's _psoft_A_cache and _psoft_B_cache to the file by these names";
            return Err(Error::place(&site.path, reason));
        }
        let a = file.take("psoft_A", [self.r, site.fan_in()], device)?.transpose();
        let b = file.take("psoft_B", [site.fan_out(), self.r], device)?.transpose();
        let [rows, columns] = self.shape();
        let weight = match self.psoft_orth {
            true => file.take("psoft_R.weight", [columns], device)?.unsqueeze(),
            false => file.take("psoft_R.weight", [rows, columns], device)?,
        };
        let mut vector = |trained: bool, name: &str| match trained {
            true => file.take(name, [self.r], device).map(Some),
            false => Ok(None),
        };
        let vectors = [
            vector(self.psoft_mag_b, "psoft_R.vector_b")?,
            vector(self.psoft_mag_a, "psoft_R.vector_a")?,
        ];
        Ok(self.adapter(weight, vectors, (a, b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;
    use burn_peft_core::Sites;

    fn largest<const D: usize>(difference: Tensor<D>) -> f32 {
        difference.abs().max().into_scalar::<f32>()
    }

    #[test]
    fn the_factors_are_nearest_to_the_weight() {
        let device = Device::flex();
        for (fan_in, fan_out) in [(7, 5), (5, 7)] {
            let mut layer = LinearConfig::new(fan_in, fan_out).init(&device);
            let mut rng = burn_peft_core::site_rng(1, "psoft");
            let weight = crate::random::normal([fan_in, fan_out], 0.4, &mut rng, &device);
            layer.weight = Param::from_tensor(weight);
            let sites = Sites::of(&vec![layer], None);
            let w = sites.all[0].matrix().expect("is one");
            for (psoft_svd, ab_svd_init) in
                [(Svd::Full, Split::Psoft), (Svd::Lowrank, Split::Psoft), (Svd::Full, Split::Pissa)]
            {
                let of_rank = |r| {
                    let plain = Psoft::new(r, 3.0, Targets::default());
                    Psoft { psoft_svd, ab_svd_init, psoft_svd_lowrank_niter: 40, ..plain }
                };
                // The whole weight at the full rank.
                let method = of_rank(5);
                let (a, b) = method.factors(&sites.all[0], &device).expect("fits");
                assert!(largest(a.clone().matmul(b) * method.scaling() - w.clone()) < 1e-5);
                if ab_svd_init == Split::Psoft {
                    let square = a.clone().transpose().matmul(a);
                    assert!(largest(square - Tensor::eye(5, &device)) < 1e-5);
                }
                // What is left out at a lower one stands at right angles on what is kept.
                let method = of_rank(2);
                let (a, b) = method.factors(&sites.all[0], &device).expect("fits");
                let rest = w.clone() - a.clone().matmul(b.clone()) * method.scaling();
                assert!(largest(a.transpose().matmul(rest.clone())) < 1e-4);
                assert!(largest(rest.matmul(b.transpose())) < 1e-4);
            }
        }
    }
}
