//! KAdaptation: `W' = W + s·Σᵢ Aᵢ⊗(uᵢ·vᵢ)` with the `Aᵢ` shared by all places (arXiv 2203.16329).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::low_rank::bounded;
use crate::random::uniform;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// KAdaptation (arXiv 2203.16329): `y = xW + b + s·dropout(x)·Σᵢ Aᵢ⊗(uᵢ·vᵢ)`, `i < n = phm_dim`.
///
/// `Aᵢ [n, n]` are trained once for all places ("slow weights"); `uᵢ [fan_in/n, r]` and
/// `vᵢ [r, fan_out/n]` at each ("fast weights"). No product with a Kronecker factor is formed in a
/// forward pass. `A` and `u` are drawn by Glorot's uniform rule (our choice); `v` is zero at
/// first. Parameters: `r·(fan_in + fan_out)` a place and `n³` shared. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KAdaptation {
    /// `n`, which must divide both widths; default 4.
    pub phm_dim: usize,
    /// Rank of each `uᵢ·vᵢ`; default 1.
    pub r: usize,
    /// `s`; default 1.
    pub scale: f64,
    /// Probability with which an input is zeroed in training; default 0.
    pub kadaptation_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "kadaptation_only"; default none.
    pub bias: Bias,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for KAdaptation {
    fn default() -> Self {
        Self {
            phm_dim: 4,
            r: 1,
            scale: 1.0,
            kadaptation_dropout: 0.0,
            bias: Bias::None,
            targets: Targets::default(),
        }
    }
}

/// What KAdaptation trains at one place, and a handle on what all places train.
#[derive(Module, Debug)]
pub struct KAdaptationAdapter {
    /// All `Aᵢ`, `[n, n, n]`; one parameter of all places.
    pub kadaptation_a: Param<Tensor<3>>,
    /// All `uᵢ`, `[n, fan_in/n, r]`.
    pub kadaptation_u: Param<Tensor<3>>,
    /// All `vᵢ`, `[n, r, fan_out/n]`.
    pub kadaptation_v: Param<Tensor<3>>,
    /// Drops inputs in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl Adapter for KAdaptationAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (a, u, v) =
            (self.kadaptation_a.val(), self.kadaptation_u.val(), self.kadaptation_v.val());
        let ([n, inner, r], [_, _, outer]) = (u.dims(), v.dims());
        let x = drop(x, &self.dropout, &u);
        let [batch, seq, _] = x.dims();
        let tokens = batch * seq;
        // Each block of the input through each uᵢ: [tokens, block, i, r].
        let u = u.swap_dims(0, 1).reshape([inner, n * r]);
        let h =
            (x.reshape([tokens * n, inner]).matmul(u) * self.scaling).reshape([tokens, n, n, r]);
        // Aᵢ mixes the blocks.
        let h = h.permute([2, 0, 3, 1]).reshape([n, tokens * r, n]).matmul(a);
        // Each block of the output is the sum over i of what comes through vᵢ.
        let h = h.reshape([n, tokens, r, n]).permute([1, 3, 0, 2]).reshape([tokens * n, n * r]);
        let delta = h.matmul(v.reshape([n * r, outer])).reshape([batch, seq, n * outer]);
        Some(delta.cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for KAdaptationAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let (u, v) = (self.kadaptation_u.val(), self.kadaptation_v.val());
        let ([n, inner, _], [_, _, outer]) = (u.dims(), v.dims());
        let a = self.kadaptation_a.val().reshape([n, n * n]).transpose();
        let b = (u.matmul(v) * self.scaling).reshape([n, inner * outer]);
        let product = a.matmul(b).reshape([n, n, inner, outer]); // Σᵢ Aᵢ[j, k]·(uᵢ·vᵢ)[p, q]
        Some(product.swap_dims(1, 2).reshape([n * inner, n * outer]))
    }
}

/// Glorot's bound.
fn glorot(fan_in: usize, fan_out: usize) -> f32 {
    (6.0 / (fan_in + fan_out) as f32).sqrt()
}

impl KAdaptation {
    /// Shapes of `u` and `v` at `site`.
    fn shapes(&self, site: &Site) -> Result<[[usize; 3]; 2], Error> {
        let (n, fans) = (self.phm_dim, [site.fan_in(), site.fan_out()]);
        if let Some(fan) = fans.iter().find(|fan| **fan % n != 0) {
            let reason =
                format!("phm_dim: {n} does not divide a width of {fan}; expected a divisor");
            return Err(Error::place(&site.path, reason));
        }
        bounded("r", &site.path, &[self.r, fans[0] + fans[1]])?;
        Ok([[n, fans[0] / n, self.r], [n, self.r, fans[1] / n]])
    }

    fn adapter(
        &self,
        site: &Site,
        shared: &Slow,
        [u, v]: [Tensor<3>; 2],
    ) -> Result<KAdaptationAdapter, Error> {
        let Some(a) = shared else {
            return Err(Error::place(&site.path, "has no shared A; expected phm_dim³ numbers"));
        };
        Ok(KAdaptationAdapter {
            kadaptation_a: a.clone(),
            kadaptation_u: Param::from_tensor(u),
            kadaptation_v: Param::from_tensor(v),
            dropout: DropoutConfig::new(self.kadaptation_dropout).init(),
            scaling: self.scale,
        })
    }
}

/// The shared `A`.
type Slow = Option<Param<Tensor<3>>>;

impl Method for KAdaptation {
    type Adapter = KAdaptationAdapter;
    type Shared = Slow;
    const NAME: &'static str = "KADAPTATION";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["kadaptation_v"];

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
        positive("phm_dim", self.phm_dim)?;
        positive("r", self.r)?;
        finite("scale", self.scale)?;
        probability("kadaptation_dropout", self.kadaptation_dropout)?;
        self.bias.check("kadaptation_only")
    }

    fn share(&self, sites: &[&Site], rng: &mut ChaCha8Rng, device: &Device) -> Result<Slow, Error> {
        for site in sites {
            self.shapes(site)?;
        }
        let n = self.phm_dim;
        bounded("phm_dim", "all places", &[n, n, n])?;
        Ok(Some(Param::from_tensor(uniform([n; 3], glorot(n, n), rng, device))))
    }

    fn init(
        &self,
        site: &Site,
        shared: &Slow,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<KAdaptationAdapter, Error> {
        let [u, v] = self.shapes(site)?;
        let drawn = uniform(u, glorot(u[1], u[2]), rng, device);
        self.adapter(site, shared, [drawn, Tensor::zeros(v, device)])
    }

    fn fold(adapter: &KAdaptationAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        let bias = Bias::Only("kadaptation_only".into());
        vec![
            Self { phm_dim: 2, r: 3, kadaptation_dropout: 0.2, bias, ..plain.clone() },
            Self { scale: 0.5, bias: Bias::All, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.r * (site.fan_in() + site.fan_out())
    }

    fn shared_parameters(&self, _sites: &[&Site]) -> usize {
        self.phm_dim.saturating_pow(3)
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &KAdaptationAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        vec![
            ("kadaptation_u", adapter.kadaptation_u.val().into_data()),
            ("kadaptation_v", adapter.kadaptation_v.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Slow,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<KAdaptationAdapter, Error> {
        let [u, v] = self.shapes(site)?;
        let u = file.take("kadaptation_u", u, device)?;
        let v = file.take("kadaptation_v", v, device)?;
        self.adapter(site, shared, [u, v])
    }

    fn shared_tensors(&self, adapters: &[&KAdaptationAdapter]) -> Vec<(String, TensorData)> {
        let rules = |adapter: &&KAdaptationAdapter| adapter.kadaptation_a.val().into_data();
        adapters.first().map(|a| ("kadaptation_A".into(), rules(a))).into_iter().collect()
    }

    fn restore_shared(
        &self,
        _sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Slow, Error> {
        let a = file.take("kadaptation_A", [self.phm_dim; 3], device)?;
        Ok(Some(Param::from_tensor(a)))
    }
}
