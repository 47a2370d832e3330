//! Compacter: bottleneck adapters out of sums of Kronecker products (arXiv 2106.04647).

use crate::bottleneck::{check_factor, read, width};
use crate::fields::{finite, positive};
use crate::nonlinearity::Nonlinearity;
use crate::numbers::Draw;
use crate::source::{Fresh, Source, Stored};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Hidden, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Compacter (arXiv 2106.04647): `y' = y + f(h·D + d)·U + u`, where `D [hidden, r]` and `U [r, hidden]` are sums
/// of Kronecker products `Σᵢ Aᵢ ⊗ Bᵢ`, `i < n = phm_dim`.
///
/// The rules `A [n, n, n] ~ N(0, phm_init_range²)` are shared by all places and by both matrices;
/// `Bᵢ = sᵢ·tᵢ` has the rank `phm_rank`, and begins by Glorot's uniform rule. Nothing as large as `D` is formed.
/// Compacter lies after attention and feed-forward part, Compacter++ after the latter alone, both as
/// [`Bottleneck`](crate::Bottleneck)'s serial adapters do. Without sharing and factors it is the PHM adapter
/// ([`phm`](Self::phm)). Parameters: `phm_rank·(hidden + r)` for each of `D` and `U`, `r + hidden` for the biases, and
/// `n³` once. It does not fold. Fields and defaults are those of AdapterHub's `CompacterConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Compacter {
    /// `hidden / r`; default 32. `hidden` and `r` are multiples of `phm_dim`.
    pub reduction_factor: f64,
    /// `f`; default gelu.
    pub non_linearity: Nonlinearity,
    /// `h` is the sum of `y` and the residual stream, after the model's own norm where it has one there;
    /// default false: `h` is `y`.
    pub original_ln_before: bool,
    /// `n`; default 4.
    pub phm_dim: usize,
    /// Rank of each `Bᵢ`; default 1.
    pub phm_rank: usize,
    /// One `A` for all places and both matrices, the default; otherwise one for each matrix.
    pub shared_phm_rule: bool,
    /// `Bᵢ` is a product of thin factors, the default; otherwise a matrix.
    #[serde(rename = "factorized_phm_W")]
    pub factorized_phm_w: bool,
    /// Standard deviation with which `A` begins; default 0.0001.
    pub phm_init_range: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Compacter {
    fn default() -> Self {
        Self {
            reduction_factor: 32.0,
            non_linearity: Nonlinearity::Gelu,
            original_ln_before: false,
            phm_dim: 4,
            phm_rank: 1,
            shared_phm_rule: true,
            factorized_phm_w: true,
            phm_init_range: 1e-4,
            targets: Targets::default(),
        }
    }
}

/// `x·(Σᵢ Aᵢ ⊗ Bᵢ) + b`: a layer over parameterised hypercomplex numbers.
#[derive(Module, Debug)]
pub struct Phm {
    /// `A [n, n, n]`.
    pub rule: Param<Tensor<3>>,
    /// `B [n, in/n, out/n]`, or its left factors `s [n, in/n, rank]`.
    pub left: Param<Tensor<3>>,
    /// The right factors `t [n, rank, out/n]`.
    pub right: Option<Param<Tensor<3>>>,
    /// `b [out]`.
    pub bias: Param<Tensor<1>>,
}

impl Phm {
    /// `[rows, in]` → `[rows, out]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (rule, left) = (self.rule.val(), self.left.val());
        let ([rows, fan_in], [n, _, _]) = (x.dims(), rule.dims());
        let each = fan_in / n;
        // [n, rows, k, n]: what each rule mixes, `k` numbers a part.
        let (parts, last) = match &self.right {
            None => {
                let parts = x.reshape([1, rows, n, each]).swap_dims(2, 3);
                (parts.expand([n, rows, each, n]), left)
            }
            Some(right) => {
                let k = left.dims()[2];
                let thin = left.swap_dims(0, 1).reshape([each, n * k]);
                let parts = x.reshape([rows * n, each]).matmul(thin).reshape([rows, n, n, k]);
                (parts.permute([2, 0, 3, 1]), right.val())
            }
        };
        let [_, k, out] = last.dims();
        let mixed = parts.reshape([n, rows * k, n]).matmul(rule).reshape([n, rows, k, n]);
        let mixed = mixed.permute([1, 3, 0, 2]).reshape([rows * n, n * k]);
        let y = mixed.matmul(last.reshape([n * k, out])).reshape([rows, n * out]);
        y + self.bias.val().unsqueeze()
    }
}

/// What Compacter trains at one place.
#[derive(Module, Debug)]
pub struct CompacterAdapter {
    /// `D` and `d`.
    pub down: Phm,
    /// `U` and `u`.
    pub up: Phm,
    /// `f`.
    #[module(skip)]
    pub non_linearity: Nonlinearity,
    /// Whether the normed sum is read.
    pub original_ln_before: bool,
}

impl Adapter for CompacterAdapter {
    fn hidden(&self, at: &Hidden<'_>) -> Option<Tensor<3>> {
        let h = read(at, false, self.original_ln_before).cast(self.down.left.val().dtype());
        let [batch, seq, hidden] = h.dims();
        let h = self.down.forward(h.reshape([batch * seq, hidden]));
        let y = self.up.forward(self.non_linearity.apply(h));
        Some(y.reshape([batch, seq, hidden]).cast(at.y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

/// Names in the file: the matrix or its left factors, the right ones, the bias, the rules.
type Layer = [&'static str; 5];
const DOWN: Layer = [
    "adapter_down.W",
    "adapter_down.W_left",
    "adapter_down.W_right",
    "adapter_down.b",
    "adapter_down.phm_rule",
];
const UP: Layer = [
    "adapter_up.W",
    "adapter_up.W_left",
    "adapter_up.W_right",
    "adapter_up.b",
    "adapter_up.phm_rule",
];
const RULE: &str = "phm_rule";

/// Glorot's bound.
fn glorot(fan_in: usize, fan_out: usize) -> Draw {
    Draw::Uniform((6.0 / (fan_in + fan_out) as f32).sqrt())
}

impl Compacter {
    /// With this reduction and number of rules.
    pub fn new(reduction_factor: f64, phm_dim: usize, targets: Targets) -> Self {
        Self { reduction_factor, phm_dim, targets, ..Self::default() }
    }

    /// The PHM adapter: each matrix has rules of its own, and whole `Bᵢ`.
    pub fn phm(reduction_factor: f64, phm_dim: usize, targets: Targets) -> Self {
        let plain = Self::new(reduction_factor, phm_dim, targets);
        Self { shared_phm_rule: false, factorized_phm_w: false, ..plain }
    }

    fn rule_draw(&self) -> Draw {
        Draw::Normal(0.0, self.phm_init_range as f32)
    }

    fn sizes(&self, site: &Site) -> Result<[usize; 2], Error> {
        let sizes = [site.fan_out(), width(self.reduction_factor, site)?];
        match sizes.iter().find(|size| !size.is_multiple_of(self.phm_dim)) {
            None => Ok(sizes),
            Some(size) => {
                let (path, n) = (&site.path, self.phm_dim);
                let reason = format!(
                    "expected a divisor of the {} states of {path} and of the bottleneck's {}, found {n}, which does \
                     not divide {size}",
                    sizes[0], sizes[1]
                );
                Err(Error::config("phm_dim", reason))
            }
        }
    }

    fn layer(
        &self,
        [fan_in, fan_out]: [usize; 2],
        names: Layer,
        shared: &Option<Param<Tensor<3>>>,
        from: &mut impl Source,
    ) -> Result<Phm, Error> {
        let (n, k) = (self.phm_dim, self.phm_rank);
        let (wide, out) = (fan_in / n, fan_out / n);
        let [whole, left, right, bias, rule] = names;
        let (left, right) = match self.factorized_phm_w {
            true => (
                from.take(left, [n, wide, k], glorot(wide, k))?,
                Some(from.take(right, [n, k, out], glorot(k, out))?),
            ),
            false => (from.take(whole, [n, wide, out], glorot(wide, out))?, None),
        };
        let rule = match shared {
            Some(rule) => rule.clone(),
            None => from.take(rule, [n; 3], self.rule_draw())?,
        };
        Ok(Phm { rule, left, right, bias: from.take(bias, [fan_out], Draw::Constant(0.0))? })
    }

    fn build(
        &self,
        site: &Site,
        shared: &Option<Param<Tensor<3>>>,
        from: &mut impl Source,
    ) -> Result<CompacterAdapter, Error> {
        let [hidden, r] = self.sizes(site)?;
        Ok(CompacterAdapter {
            down: self.layer([hidden, r], DOWN, shared, from)?,
            up: self.layer([r, hidden], UP, shared, from)?,
            non_linearity: self.non_linearity,
            original_ln_before: self.original_ln_before,
        })
    }
}

impl Method for Compacter {
    type Adapter = CompacterAdapter;
    /// `A`, where it is shared.
    type Shared = Option<Param<Tensor<3>>>;
    const NAME: &'static str = "COMPACTER";
    const KINDS: &'static [Kind] = &[Kind::Hidden];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const HF_FORMAT: bool = false;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        check_factor(self.reduction_factor)?;
        positive("phm_dim", self.phm_dim)?;
        positive("phm_rank", self.phm_rank)?;
        finite("phm_init_range", self.phm_init_range)?;
        for (field, size) in [("phm_dim", self.phm_dim), ("phm_rank", self.phm_rank)] {
            if size > 1 << 10 {
                return Err(Error::config(field, format!("expected at most 1024, found {size}")));
            }
        }
        Ok(())
    }

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn share(
        &self,
        _sites: &[&Site],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let draw = || self.rule_draw().tensor([self.phm_dim; 3], rng, device);
        Ok(self.shared_phm_rule.then(draw).map(Param::from_tensor))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<CompacterAdapter, Error> {
        self.build(site, shared, &mut Fresh { rng, device })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        // With the default's small rules nothing of a fresh adapter is left after rounding.
        let plain = Self { phm_init_range: 0.5, ..Self::new(2.0, 2, targets.clone()) };
        let phm = Self { phm_init_range: 0.5, ..Self::phm(4.0, 2, targets.clone()) };
        vec![
            Self { phm_rank: 2, original_ln_before: true, ..plain.clone() },
            Self { non_linearity: Nonlinearity::Relu, shared_phm_rule: false, ..plain.clone() },
            Self { phm_dim: 4, factorized_phm_w: false, ..plain.clone() },
            phm,
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let Ok([hidden, r]) = self.sizes(site) else { return 0 };
        let n = self.phm_dim;
        let matrix = match self.factorized_phm_w {
            true => self.phm_rank * (hidden + r),
            false => hidden * r / n,
        };
        let rules = if self.shared_phm_rule { 0 } else { n * n * n };
        2 * (matrix + rules) + r + hidden
    }

    fn shared_parameters(&self, _sites: &[&Site]) -> usize {
        if self.shared_phm_rule { self.phm_dim.pow(3) } else { 0 }
    }

    fn tensors(&self, _site: &Site, adapter: &CompacterAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (phm, [whole, left, right, bias, rule]) in [(&adapter.down, DOWN), (&adapter.up, UP)] {
            let first = if phm.right.is_some() { left } else { whole };
            tensors.push((first, phm.left.val().into_data()));
            tensors.extend(phm.right.iter().map(|t| (right, t.val().into_data())));
            tensors.push((bias, phm.bias.val().into_data()));
            if !self.shared_phm_rule {
                tensors.push((rule, phm.rule.val().into_data()));
            }
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<CompacterAdapter, Error> {
        self.build(site, shared, &mut Stored { file, device })
    }

    fn shared_tensors(&self, adapters: &[&CompacterAdapter]) -> Vec<(String, TensorData)> {
        let first = adapters.first().filter(|_| self.shared_phm_rule);
        first
            .map(|adapter| (RULE.into(), adapter.down.rule.val().into_data()))
            .into_iter()
            .collect()
    }

    fn restore_shared(
        &self,
        _sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        match self.shared_phm_rule {
            true => Ok(Some(Param::from_tensor(file.take(RULE, [self.phm_dim; 3], device)?))),
            false => Ok(None),
        }
    }
}
