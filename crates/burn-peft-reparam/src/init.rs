//! How LoRA's factors begin. Each initialisation is a function of the weight, the rank and the seed.
//!
//! Several split the weight, `W = (W - s·A0·B0) + s·A0·B0`, train the second part, and in HF PEFT leave
//! the first in the base model. Here the base stays as it is and `A0`, `B0` are constants of the adapter:
//! `Δ(W) = s·(A·B - A0·B0)`, which is the same function.

use crate::random::{normal, uniform};
use burn::linalg::{qr, svd};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, Kind, Site};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How the factors begin: HF PEFT's `init_lora_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Word", into = "Word")]
pub enum Init {
    /// `true`: `A ~ U(±1/√fan_in)`, `B = 0`, an exact identity at the start.
    #[default]
    Default,
    /// `false`: `B` is drawn like `A` with bound `1/√r`, which is no identity and serves tests.
    Random,
    /// "gaussian": `A ~ N(0, 1/r²)`, `B = 0`.
    Gaussian,
    /// "orthogonal": both are drawn, `A` in one half of the rank's space and `B` in the other, so
    /// that `A·B = 0` up to rounding. The rank must be even.
    Orthogonal,
    /// "pissa" (arXiv 2404.02948): the `r` largest singular directions of the weight. The exact
    /// decomposition takes minutes for widths of thousands; "pissa_niter_4" takes seconds.
    Pissa {
        /// Rounds of subspace iteration of the randomized decomposition, "pissa_niter_N"; none: exact.
        iterations: Option<usize>,
    },
    /// "olora" (arXiv 2406.01775): the first `r` directions of the weight's QR decomposition.
    Olora,
    /// "mica" (arXiv 2604.01694): `B` is the `r` smallest singular directions and stays constant;
    /// `A = 0`.
    Mica,
    /// "eva" (arXiv 2410.07170): `A` is the main directions of the layer's inputs, `B = 0`; looks at data.
    Eva,
    /// "corda" (arXiv 2406.05223): the directions of the weight that the layer's inputs use most, or
    /// least; looks at data.
    Corda,
    /// "lora_ga" (arXiv 2407.05000): the main directions of the weight's gradient; looks at data.
    LoraGa,
    /// One that is not implemented, by its name; adapters that began so can often be read.
    Other(String),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Word {
    Bool(bool),
    Name(String),
}

impl From<&str> for Init {
    fn from(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            "true" => Self::Default,
            "false" => Self::Random,
            "gaussian" => Self::Gaussian,
            "orthogonal" => Self::Orthogonal,
            "pissa" => Self::Pissa { iterations: None },
            "olora" => Self::Olora,
            "mica" => Self::Mica,
            "eva" => Self::Eva,
            "corda" => Self::Corda,
            "lora_ga" => Self::LoraGa,
            _ => match name.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok()) {
                Some(n) => Self::Pissa { iterations: Some(n) },
                None => Self::Other(name),
            },
        }
    }
}

impl From<Word> for Init {
    fn from(word: Word) -> Self {
        match word {
            Word::Bool(true) => Self::Default,
            Word::Bool(false) => Self::Random,
            Word::Name(name) => Self::from(name.as_str()),
        }
    }
}

impl From<Init> for Word {
    fn from(init: Init) -> Self {
        Self::Name(match init {
            Init::Default => return Self::Bool(true),
            Init::Random => return Self::Bool(false),
            Init::Gaussian => "gaussian".into(),
            Init::Orthogonal => "orthogonal".into(),
            Init::Pissa { iterations: None } => "pissa".into(),
            Init::Pissa { iterations: Some(n) } => format!("pissa_niter_{n}"),
            Init::Olora => "olora".into(),
            Init::Mica => "mica".into(),
            Init::Eva => "eva".into(),
            Init::Corda => "corda".into(),
            Init::LoraGa => "lora_ga".into(),
            Init::Other(name) => name,
        })
    }
}

/// Inits of HF PEFT that changed the base model in a way that the base alone does not tell.
const CHANGED_BASE: &[&str] = &["corda", "loftq", "lora_ga"];

/// The name of an init, as in a configuration.
fn name(init: &Init) -> String {
    match Word::from(init.clone()) {
        Word::Bool(word) => word.to_string(),
        Word::Name(name) => name,
    }
}

/// Where factors are asked for.
pub(crate) struct Place<'a> {
    pub(crate) site: &'a Site,
    pub(crate) r: usize,
    pub(crate) scaling: f64,
    /// Where they shall live.
    pub(crate) device: &'a Device,
}

/// `A [fan_in, r]` and `B [r, fan_out]`.
pub(crate) type Pair = (Tensor<2>, Tensor<2>);

impl Init {
    /// Whether `s·A0·B0` is a part of the base, so that the difference is `s·(A·B - A0·B0)`.
    pub(crate) fn splits_base(&self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora | Self::Corda | Self::LoraGa)
    }

    /// Whether it follows from data.
    fn looks_at_data(&self) -> bool {
        matches!(self, Self::Eva | Self::Corda | Self::LoraGa)
    }

    /// Whether `B` is a constant.
    pub(crate) fn freezes_b(&self) -> bool {
        *self == Self::Mica
    }

    /// Whether the seed decides anything at a place that is no embedding.
    pub(crate) fn draws(&self) -> bool {
        let follows = matches!(self, Self::Pissa { iterations: None } | Self::Olora | Self::Mica);
        !follows && !self.looks_at_data()
    }

    /// Refuses adapters whose files do not say by how much HF PEFT changed the base.
    pub(crate) fn check_readable(&self) -> Result<(), Error> {
        let reason = match self {
            Self::Pissa { iterations: Some(n) } => format!(
                "`pissa_niter_{n}` split the base by random numbers that no file holds; convert the \
                 adapter in HF PEFT with save_pretrained(path_initial_model_for_weight_conversion=..)"
            ),
            _ if CHANGED_BASE.iter().any(|init| name(self).starts_with(init)) => format!(
                "`{}` changed the base model; convert the adapter in HF PEFT with \
                 save_pretrained(path_initial_model_for_weight_conversion=..), or use the changed base \
                 and set init_lora_weights to true",
                name(self)
            ),
            _ => return Ok(()),
        };
        Err(Error::config("init_lora_weights", reason))
    }

    /// The factors at the start.
    pub(crate) fn factors(&self, place: &Place<'_>, rng: &mut ChaCha8Rng) -> Result<Pair, Error> {
        let embedding = place.site.kind == Kind::Embedding;
        match self {
            Self::Random => Ok(random(place, rng)),
            Self::Mica => mica(place),
            // HF PEFT draws B and zeroes A here, whatever the init says, so that unseen rows of the
            // table do not move.
            Self::Default
            | Self::Gaussian
            | Self::Orthogonal
            | Self::Pissa { .. }
            | Self::Olora
            | Self::Eva
            | Self::Corda
            | Self::LoraGa
                if embedding =>
            {
                Ok(table(place, rng))
            }
            Self::Default => Ok(kaiming(place, rng)),
            Self::Gaussian => Ok(gaussian(place, rng)),
            Self::Orthogonal => orthogonal(place, rng),
            Self::Pissa { iterations: None } => pissa(place),
            Self::Pissa { iterations: Some(n) } => pissa_randomized(place, *n, rng),
            Self::Olora => olora(place),
            Self::Eva | Self::Corda | Self::LoraGa => {
                place.linear()?;
                let reason = format!(
                    "`{}` looks at data first, and none was shown for {}: let `survey` tell the \
                     method of it, and make adapters of what it gives back",
                    name(self),
                    place.site.path
                );
                Err(Error::config("init_lora_weights", reason))
            }
            Self::Other(name) if name == "loftq" => {
                let reason = "`loftq` makes up for the quantization of the base, and this one is not \
                              quantized; expected another init";
                Err(Error::config("init_lora_weights", reason))
            }
            Self::Other(name) => {
                let reason = format!(
                    "`{name}` is not implemented; expected true, false, \"gaussian\", \"orthogonal\", \
                     \"pissa\", \"pissa_niter_N\", \"olora\", \"mica\", \"eva\", \"corda\" or \"lora_ga\""
                );
                Err(Error::config("init_lora_weights", reason))
            }
        }
    }
}

impl Place<'_> {
    fn shapes(&self) -> ([usize; 2], [usize; 2]) {
        ([self.site.fan_in(), self.r], [self.r, self.site.fan_out()])
    }

    pub(crate) fn zeros(&self, shape: [usize; 2]) -> Tensor<2> {
        Tensor::zeros(shape, self.device)
    }

    /// The weight `[fan_in, fan_out]`, fit to be decomposed to this rank.
    pub(crate) fn weight(&self) -> Result<Tensor<2>, Error> {
        self.linear()?;
        let path = &self.site.path;
        let most = self.site.fan_in().min(self.site.fan_out());
        if self.r > most {
            let reason =
                format!("is {} and {path} has {most} directions; expected at most as many", self.r);
            return Err(Error::config("r", reason));
        }
        let weight = self.site.matrix().map(|w| w.cast(burn::tensor::DType::F32));
        match weight {
            Some(w) if w.clone().is_finite().all().into_scalar::<bool>() => Ok(w),
            _ => {
                Err(Error::place(path, "the weight holds NaN or infinity and cannot be decomposed"))
            }
        }
    }

    pub(crate) fn linear(&self) -> Result<(), Error> {
        match self.site.kind {
            Kind::Linear | Kind::Embedding => Ok(()),
            _ => Err(Error::place(
                &self.site.path,
                "init_lora_weights: convolutions begin by true, false or \"gaussian\", as in HF PEFT",
            )),
        }
    }

    /// Refuses what cannot be divided by.
    pub(crate) fn scale(&self) -> Result<(), Error> {
        match self.scaling > 0.0 {
            true => Ok(()),
            false => Err(Error::config(
                "lora_alpha",
                "expected more than 0, because the init divides by it",
            )),
        }
    }

    pub(crate) fn here(&self, (a, b): Pair) -> Pair {
        let here = |t: Tensor<2>| Tensor::from_data(t.into_data(), self.device);
        (here(a), here(b))
    }
}

/// `1/√n`: PyTorch's bound for a linear layer of `n` inputs.
pub(crate) fn bound(inputs: usize) -> f32 {
    (1.0 / inputs as f32).sqrt()
}

fn kaiming(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Pair {
    let (a, b) = place.shapes();
    (uniform(a, bound(a[0]), rng, place.device), place.zeros(b))
}

fn random(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Pair {
    let (a, b) = place.shapes();
    (uniform(a, bound(a[0]), rng, place.device), uniform(b, bound(b[0]), rng, place.device))
}

fn table(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Pair {
    let (a, b) = place.shapes();
    (place.zeros(a), normal(b, 1.0, rng, place.device))
}

fn gaussian(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Pair {
    let (a, b) = place.shapes();
    (normal(a, 1.0 / place.r as f32, rng, place.device), place.zeros(b))
}

/// `Q [r, r]` orthogonal; `A = X·Q₁ / 10` out of its odd rows and `B = Q₂ᵀ·Y / 10` out of its even ones.
fn orthogonal(place: &Place<'_>, rng: &mut ChaCha8Rng) -> Result<Pair, Error> {
    place.linear()?;
    let (r, device) = (place.r, &place.site.device());
    if r % 2 != 0 {
        let reason = format!("expected an even rank for the init \"orthogonal\", found {r}");
        return Err(Error::config("r", reason));
    }
    let (q, _) = qr(normal([r, r], 1.0, rng, device), true);
    let halves = q.reshape([r / 2, 2, r]);
    let half = |row: usize| halves.clone().narrow(1, row, 1).reshape([r / 2, r]);
    let x: Tensor<2> = normal([place.site.fan_in(), r / 2], 0.1, rng, device);
    let y: Tensor<2> = normal([r / 2, place.site.fan_out()], 0.1, rng, device);
    Ok(place.here((x.matmul(half(0)), half(1).transpose().matmul(y))))
}

/// More sweeps for a singular value than any matrix of finite numbers needs.
pub(crate) const SWEEPS: usize = 300;

/// `W = U·S·Vᵀ`; `A = U·√(S/s)`, `B = √(S/s)·Vᵀ`, of each the first `r`.
fn pissa(place: &Place<'_>) -> Result<Pair, Error> {
    place.scale()?;
    Ok(place.here(truncated(place.weight()?, place.r, place.scaling)))
}

/// `U`, the singular values, falling, and `Vᵀ` of a finite matrix.
pub(crate) type Singular = (Tensor<2>, Tensor<1>, Tensor<2>);

/// `w = U·S·Vᵀ`.
pub(crate) fn decomposed(w: Tensor<2>) -> Singular {
    svd::<2, 1>(w, SWEEPS)
}

/// The factors of the best approximation of `w` of rank `r`: `s·A·B ≈ w`.
pub(crate) fn truncated(w: Tensor<2>, r: usize, s: f64) -> Pair {
    first(decomposed(w), r, s)
}

/// The same of a matrix that is decomposed: `A = U·√(S/s)`, `B = √(S/s)·Vᵀ`, of each the first `r`.
pub(crate) fn first((u, values, vt): Singular, r: usize, s: f64) -> Pair {
    let roots = (values.narrow(0, 0, r) / s).sqrt();
    let a = u.narrow(1, 0, r) * roots.clone().unsqueeze_dim(0);
    (a, vt.narrow(0, 0, r) * roots.unsqueeze_dim(1))
}

/// The same, the weight seen through a [`basis`].
fn pissa_randomized(place: &Place<'_>, n: usize, rng: &mut ChaCha8Rng) -> Result<Pair, Error> {
    place.scale()?;
    let w = place.weight()?;
    let q = basis(&w, place.r, n, rng); // [fan_in, r]
    let (a, b) = truncated(q.clone().transpose().matmul(w), place.r, place.scaling);
    Ok(place.here((q.matmul(a), b)))
}

/// `k` orthonormal columns that span what matters most of the columns of `w [m, n]`, by Halko et al. (arXiv
/// 0909.4061, algorithm 4.4): random directions that `rounds` of iteration turned towards the largest.
pub(crate) fn basis(w: &Tensor<2>, k: usize, rounds: usize, rng: &mut ChaCha8Rng) -> Tensor<2> {
    let start: Tensor<2> = normal([w.dims()[1], k], 1.0, rng, &w.device());
    let basis = |y: Tensor<2>| qr(y, true).0;
    let mut q = basis(w.clone().matmul(start)); // [m, k]
    for _ in 0..rounds {
        q = basis(w.clone().matmul(basis(w.clone().transpose().matmul(q))));
    }
    q
}

/// `Wᵀ = Q·R`; `B = Qᵀ`, `A = Rᵀ = W·Q`, of each the first `r`, which the first `r` columns decide.
fn olora(place: &Place<'_>) -> Result<Pair, Error> {
    let w = place.weight()?;
    let (q, _) = qr(w.clone().narrow(0, 0, place.r).transpose(), true); // [fan_out, r]
    Ok(place.here((w.matmul(q.clone()), q.transpose())))
}

/// `B` the last `r` rows of `Vᵀ` in `W = U·S·Vᵀ`; `A = 0`.
fn mica(place: &Place<'_>) -> Result<Pair, Error> {
    let (_, _, vt) = svd::<2, 1>(place.weight()?, SWEEPS);
    let [directions, _] = vt.dims();
    let b = vt.narrow(0, directions - place.r, place.r);
    let (a, _) = place.shapes();
    Ok(place.here((Tensor::zeros(a, &place.site.device()), b)))
}
