//! LoRA: `W' = W + s·A·B` with two thin trained factors (arXiv 2106.09685).

use crate::common::{Bias, fifteen_digits, finite, number, positive, probability};
use crate::dora::Dora;
use crate::eva::{Asked, Shared, share_out};
use crate::init::{Init, Pair, Place, bound};
use crate::init_data::DataInit;
use crate::kasa::DIAGONAL;
use crate::layout::{Layout, MAGNITUDE, shaped, take};
use crate::lora_variant::{LoraVariant, LoraVariants};
use crate::random::uniform;
use crate::source::laid_out;
use burn::module::Param;
use burn::nn::DropoutConfig;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapters, Biases, Error, Finding, Fold, Kind, Method, PlaceTensors, Product, Site, Sites,
    Statistic, Strictness, Targets, pattern_value,
};
use indexmap::IndexMap;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use crate::lora_adapter::LoraAdapter;

/// LoRA (arXiv 2106.09685): `y = xW + b + s·dropout(x)·A·B`.
///
/// `A [fan_in, r]`, `B [r, fan_out]`; `s = lora_alpha / r`, or `lora_alpha / √r` with rsLoRA
/// (arXiv 2312.03732). Parameters: `r·(fan_in + fan_out)` a place (less `r·fan_out` with the init
/// "mica"), and `fan_out` more with `lora_bias` or `use_dora`. Folds: `Δ(W) = s·A·B`. The variants, of which a
/// place has one at most, are [`Dora`] and those of [`LoraVariants`]. Names and defaults are HF PEFT's.
///
/// With the inits "pissa", "olora", "corda" and "lora_ga" `Δ(W) = s·(A·B - A0·B0)`, `A0` and `B0` the
/// factors at the start. Their files are those of a LoRA of twice the rank, `[A, A0]` and `[B; -B0]`, as HF PEFT writes them
/// when it is told the initial adapter: they work on the untouched base. Dropout acts on the whole
/// difference, as it does for one who reads such a file.
///
/// "eva", "corda" and "lora_ga" look at data first: hand the configuration to
/// [`survey`](burn_peft_core::survey()), and what it gives back to `adapt` and `save`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank of the difference; default 8.
    pub r: usize,
    /// Scale of the difference, divided by `r` (or `√r`); default 8.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub lora_dropout: f64,
    /// Scale by `1/√r` in place of `1/r`, so that large ranks learn at the same speed.
    pub use_rslora: bool,
    /// Which biases of the model are trained beside it.
    pub bias: Bias,
    /// A bias of its own on `B`; with the inits true and false, and without DoRA.
    pub lora_bias: bool,
    /// DoRA: the length of each column of the weight is trained apart from its direction.
    pub use_dora: bool,
    /// Other variants, of which one may be asked for in DoRA's place.
    #[serde(flatten)]
    pub variants: LoraVariants,
    /// How `A` and `B` begin.
    pub init_lora_weights: Init,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Options of the inits that look at data, and what they found.
    #[serde(flatten)]
    pub data: DataInit,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            bias: Bias::None,
            lora_bias: false,
            use_dora: false,
            variants: LoraVariants::default(),
            init_lora_weights: Init::default(),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            data: DataInit::default(),
            targets: Targets::default(),
        }
    }
}

impl Lora {
    /// With this rank, alpha and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, lora_alpha: f64, targets: Targets) -> Self {
        Self { r, lora_alpha, targets, ..Self::default() }
    }

    fn rank(&self, site: &Site) -> Result<usize, Error> {
        let path = &site.path;
        let r = pattern_value("rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.r);
        if r == 0 {
            let reason = format!("gives rank 0 at {path}; expected 1 or more");
            return Err(Error::config("rank_pattern", reason));
        }
        let numbers = r.checked_mul(site.fan_in() + site.fan_out());
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("a rank of {r} makes more than 2^31 numbers at {path}");
            return Err(Error::config("r", reason));
        }
        Ok(r)
    }

    fn alpha(&self, path: &str) -> Result<f64, Error> {
        let other = pattern_value("alpha_pattern", &self.alpha_pattern, path)?;
        Ok(other.unwrap_or(self.lora_alpha))
    }

    fn scaling(&self, path: &str, r: usize) -> Result<f64, Error> {
        let r = r as f64;
        Ok(self.alpha(path)? / if self.use_rslora { r.sqrt() } else { r })
    }

    /// The factors at the start.
    fn factors(&self, place: &Place<'_>, rng: &mut ChaCha8Rng) -> Result<Pair, Error> {
        let init = &self.init_lora_weights;
        match self.data.factors(init, place, rng)? {
            Some(pair) => Ok(pair),
            None => init.factors(place, rng),
        }
    }

    /// The adapter with these factors; `start` is what is taken off again.
    pub(crate) fn adapter(
        &self,
        site: &Site,
        (a, b): Pair,
        start: Option<Pair>,
        bias: Option<Tensor<1>>,
    ) -> Result<LoraAdapter, Error> {
        let scaling = self.scaling(&site.path, a.dims()[1])?;
        let freezes_b = self.init_lora_weights.freezes_b();
        let (constant_a, constant_b) = start.map(|(a0, b0)| (a0, -b0)).unzip();
        let constant_b = if freezes_b { Some(b.clone()) } else { constant_b };
        Ok(LoraAdapter {
            lora_a: Param::from_tensor(a),
            lora_b: (!freezes_b).then(|| Param::from_tensor(b)),
            lora_bias: bias.map(Param::from_tensor),
            variant: None,
            dropout: DropoutConfig::new(self.lora_dropout).init(),
            scaling,
            constant_a: constant_a.map(Tensor::without_autodiff),
            constant_b: constant_b.map(Tensor::without_autodiff),
        })
    }

    /// The factors of which `s·A·B` is a part of the base, where the init splits it.
    fn start(&self, site: &Site, (a, b): &Pair) -> Option<Pair> {
        self.init_lora_weights.splits_base().then(|| match site.kind {
            // As in HF PEFT, tables are not split.
            Kind::Embedding => (a.zeros_like(), b.zeros_like()),
            _ => (a.clone(), b.clone()),
        })
    }

    pub(crate) fn has_bias(&self, site: &Site) -> Result<bool, Error> {
        if self.lora_bias && site.kind != Kind::Linear {
            let reason = "lora_bias: works on linear layers only, as in HF PEFT";
            return Err(Error::place(&site.path, reason));
        }
        Ok(self.lora_bias)
    }
}

impl Method for Lora {
    type Adapter = LoraAdapter;
    type Shared = ();
    const NAME: &'static str = "LORA";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[
        ("arrow_config", &[]), // names experts that its file does not hold; see `arrow`
        ("ensure_weight_tying", &[]),
        ("fan_in_fan_out", &[]),
        ("layer_replication", &[]),
        ("megatron_config", &[]),
        ("megatron_core", &["\"megatron.core\""]),
        ("target_parameters", &[]),
        ("trainable_token_indices", &[]),
    ];

    const FASTER: &'static [&'static str] = &["lora_b"];
    const PAIR: Option<[&'static str; 2]> = Some(["lora_a", "lora_b"]);

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn places<'s>(&self, sites: &'s Sites, strictness: Strictness) -> Result<Vec<&'s Site>, Error> {
        let places = self.targets.select(sites, Self::KINDS, strictness)?;
        self.variants.check_places(sites, &places)?;
        Ok(places)
    }

    fn biases(&self) -> Biases {
        self.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        finite("lora_alpha", self.lora_alpha)?;
        probability("lora_dropout", self.lora_dropout)?;
        let plain = matches!(self.init_lora_weights, Init::Default | Init::Random);
        if self.lora_bias && (self.use_dora || !plain) {
            let reason = "works without use_dora and with init_lora_weights true or false only";
            return Err(Error::config("lora_bias", reason));
        }
        self.variants.check(self)?;
        self.data.check()?;
        self.bias.check("lora_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_lora_weights != Init::Random && self.variants.kasa_config.is_none()
    }

    fn draws(&self) -> bool {
        let init = &self.init_lora_weights;
        init.draws() || self.data.draws(init)
    }

    fn portable(&self) -> Self {
        if !self.init_lora_weights.splits_base() {
            return self.clone();
        }
        // Twice the rank at the same scale.
        let more = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let more = |alpha: &mut f64| *alpha = fifteen_digits(*alpha * more);
        let mut portable = self.clone();
        portable.init_lora_weights = Init::Default;
        portable.data = DataInit::default();
        portable.r = self.r.saturating_mul(2);
        portable.rank_pattern.values_mut().for_each(|r| *r = r.saturating_mul(2));
        more(&mut portable.lora_alpha);
        portable.alpha_pattern.values_mut().for_each(more);
        portable
    }

    fn wants(&self) -> Option<Statistic> {
        self.data.wants(&self.init_lora_weights)
    }

    fn learn(&mut self, site: &Site, finding: Finding) -> Result<(), Error> {
        let r = self.rank(site)?;
        self.data.learn(&self.init_lora_weights, site, r, finding)
    }

    fn surveyed(mut self, sites: &[&Site]) -> Result<Self, Error> {
        if self.init_lora_weights != Init::Eva {
            return Ok(self);
        }
        let mut asked = Vec::with_capacity(sites.len());
        for site in sites {
            asked.push(Asked { site, r: self.rank(site)?, alpha: self.alpha(&site.path)? });
        }
        let config = self.data.eva();
        let fields = Shared {
            targets: &mut self.targets,
            rank_pattern: &mut self.rank_pattern,
            alpha_pattern: &mut self.alpha_pattern,
        };
        share_out(config.adjust_scaling_factors, &asked, &self.data.found, fields)?;
        self.data.eva_config = Some(config); // HF PEFT asks for it beside the init's name
        Ok(self)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<LoraAdapter, Error> {
        let r = self.rank(site)?;
        let scaling = self.scaling(&site.path, r)?;
        let place = Place { site, r, scaling, device };
        let pair = self.variants.drawn(&place, self.factors(&place, rng)?, rng)?;
        let start = self.start(site, &pair);
        let bias = self.has_bias(site)?.then(|| match self.init_lora_weights {
            Init::Random => uniform([site.fan_out()], bound(r), rng, device),
            _ => Tensor::zeros([site.fan_out()], device),
        });
        let mut adapter = self.adapter(site, pair, start, bias)?;
        adapter.variant = match site.matrix() {
            Some(w) if self.use_dora => {
                Some(LoraVariant::Dora(Dora::new(w, &adapter.factors(), scaling, device)))
            }
            _ => self.variants.begin(&place, rng)?,
        };
        Ok(adapter)
    }

    fn has_penalty(&self) -> bool {
        self.variants.has_penalty()
    }

    fn penalty(&self, adapters: &Adapters<LoraAdapter>) -> Option<Tensor<1>> {
        self.variants.penalty(adapters.iter().map(|(_, adapter)| adapter))
    }

    fn fold(adapter: &LoraAdapter) -> Option<&dyn Fold> {
        adapter.unfoldable().is_none().then_some(adapter)
    }

    fn product(adapter: &LoraAdapter) -> Option<Product> {
        let more = adapter.lora_bias.is_some()
            || adapter.variant.is_some()
            || adapter.constant_a.is_some()
            || adapter.constant_b.is_some();
        let b = adapter.lora_b.as_ref().filter(|_| !more)?;
        Some(Product { a: adapter.lora_a.val(), b: b.val(), scaling: adapter.scaling })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 8.0, targets.clone());
        let saving = Targets { modules_to_save: Some(vec!["head".into()]), ..targets.clone() };
        let patterned = |method| Self {
            rank_pattern: IndexMap::from([("query".into(), 2)]),
            alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
            ..method
        };
        let of_data = DataInit::samples().into_iter().map(|(init_lora_weights, data)| Self {
            init_lora_weights,
            data,
            ..plain.clone()
        });
        let mut samples: Vec<Self> = of_data.collect();
        samples.extend(LoraVariants::samples(&plain));
        samples.extend([
            Self { use_rslora: true, bias: Bias::Only("lora_only".into()), ..plain.clone() },
            Self { lora_dropout: 0.2, bias: Bias::All, ..plain.clone() },
            Self { init_lora_weights: "gaussian".into(), targets: saving, ..plain.clone() },
            Self { init_lora_weights: Init::Random, lora_bias: true, ..plain.clone() },
            Self { use_dora: true, lora_dropout: 0.1, ..plain.clone() },
            Self { use_dora: true, init_lora_weights: Init::Random, ..plain.clone() },
            Self { use_dora: true, init_lora_weights: "pissa_niter_4".into(), ..plain.clone() },
            Self { init_lora_weights: Init::Orthogonal, ..plain.clone() },
            Self { init_lora_weights: "pissa".into(), ..plain.clone() },
            patterned(Self { init_lora_weights: Init::Olora, use_rslora: true, ..plain.clone() }),
            Self { init_lora_weights: Init::Mica, ..plain.clone() },
            patterned(plain.clone()),
            plain,
        ]);
        samples
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.rank(site).unwrap_or(self.r);
        let size = |[rows, columns]: [usize; 2]| rows * columns;
        let [a, b] = self.variants.shapes(site, r).map_or([0; 2], |shapes| shapes.map(size));
        let b = if self.init_lora_weights.freezes_b() { 0 } else { b };
        let vectors = usize::from(self.lora_bias) + usize::from(self.use_dora);
        a + b + vectors * site.fan_out() + self.variants.parameters(r)
    }

    fn tensors(&self, site: &Site, adapter: &LoraAdapter) -> Vec<(&'static str, TensorData)> {
        let (a, b) = adapter.stored();
        let layout = Layout::new(site, [a.dims(), b.dims()]);
        let mut tensors = vec![
            (layout.a, shaped(a.transpose(), layout.shape_a)), // (r, fan_in) in PyTorch
            (layout.b, shaped(b.transpose(), layout.shape_b)), // (fan_out, r)
        ];
        if let Some(bias) = &adapter.lora_bias {
            tensors.push(("lora_B.bias", bias.val().into_data()));
        }
        match &adapter.variant {
            Some(LoraVariant::Dora(dora)) => {
                tensors.push((MAGNITUDE, shaped(dora.magnitude.val(), layout.shape_m)));
            }
            Some(LoraVariant::Kasa(kasa)) => {
                tensors.push((DIAGONAL, kasa.lora_diag.val().into_data()));
            }
            Some(LoraVariant::Monteclora(sampler)) => tensors.extend(sampler.tensors()),
            Some(LoraVariant::Velora(velora)) => tensors.extend(velora.tensors()),
            _ => {}
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<LoraAdapter, Error> {
        self.init_lora_weights.check_readable()?;
        let r = self.rank(site)?;
        let shapes = self.variants.shapes(site, r)?;
        let layout = Layout::new(site, shapes);
        let [[rows_a, columns_a], [rows_b, columns_b]] = shapes;
        let a = take(file, layout.a, &layout.shape_a, [columns_a, rows_a], device)?;
        let b = take(file, layout.b, &layout.shape_b, [columns_b, rows_b], device)?;
        let bias = match self.has_bias(site)? {
            true => Some(file.take("lora_B.bias", [site.fan_out()], device)?),
            false => None,
        };
        let place = Place { site, r, scaling: self.scaling(&site.path, r)?, device };
        // HF PEFT splits the base again when it reads an adapter that was not converted.
        let start = match self.init_lora_weights.splits_base() {
            true => {
                let drawn = &mut ChaCha8Rng::seed_from_u64(0); // what is read draws nothing
                self.start(site, &self.init_lora_weights.factors(&place, drawn)?)
            }
            false => None,
        };
        let pair = (laid_out(a.transpose(), device), laid_out(b.transpose(), device));
        let mut adapter = self.adapter(site, pair, start, bias)?;
        adapter.variant = match site.matrix() {
            Some(w) if self.use_dora => {
                let shape = [1, site.fan_out()];
                let m = take(file, MAGNITUDE, &layout.shape_m, shape, device)?;
                Some(LoraVariant::Dora(Dora::restored(&w, m.flatten(0, 1))))
            }
            _ => self.variants.restore(&place, file)?,
        };
        Ok(adapter)
    }
}
