//! WaveFT: a few trained coefficients of the difference's wavelet transform (arXiv 2505.12532).

use crate::common::{Bias, finite, positive};
use crate::random::normal;
use crate::sparse::{indices, scatter};
use crate::torch_random::TorchRandom;
use crate::wavelets::{FAMILIES, high_pass};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed,
    pattern_value,
};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// WaveFT (arXiv 2505.12532): `W' = W + s·Σ cⱼ·ψⱼ`, where `ψⱼ` is the wavelet of the `j`th of
/// `n_frequency` trained coefficients `c [n]`.
///
/// `ψ` is the outer product of two filters of `wavelet_family`: one level of the inverse transform of a
/// coefficient matrix as large as the weight; without `use_idwt` a single 1. Which coefficients are
/// trained, a permutation by `random_loc_seed` decides: PyTorch's, so that HF PEFT draws the same;
/// places of one shape share their wavelets. `c` begins at zero. Parameters: `n_frequency` a place.
/// Folds, and acts on activations through the difference too. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WaveFt {
    /// Trained coefficients; default 2592.
    pub n_frequency: usize,
    /// Scale of the difference; default 25.
    pub scaling: f64,
    /// The wavelets: "db1" (the default) to "db10", "sym2" to "sym10" or "coif1" to "coif3".
    pub wavelet_family: String,
    /// Whether the trained numbers are coefficients of wavelets, which is the default, or of the weight.
    pub use_idwt: bool,
    /// Decides which coefficients are trained; default 777.
    pub random_loc_seed: i64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "waveft_only".
    pub bias: Bias,
    /// Other numbers of coefficients for layers whose path ends in a match of the key; the first match
    /// wins.
    pub n_frequency_pattern: IndexMap<String, usize>,
    /// Share `n_frequency` a place out by the sizes of the weights, patterns aside; default false.
    pub proportional_parameters: bool,
    /// Begin at zero, which is the default; otherwise as `N(0, 0.01²)`.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for WaveFt {
    fn default() -> Self {
        Self {
            n_frequency: 2592,
            scaling: 25.0,
            wavelet_family: "db1".into(),
            use_idwt: true,
            random_loc_seed: 777,
            bias: Bias::None,
            n_frequency_pattern: IndexMap::new(),
            proportional_parameters: false,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// The numbers of all wavelets of a place, one after the other.
#[derive(Module, Debug)]
pub struct Wavelets {
    /// Of which coefficient each is.
    pub coefficients: Tensor<1, Int>,
    /// Where it stands in the weight `[fan_in, fan_out]`, counted row by row.
    pub places: Tensor<1, Int>,
    /// The number.
    pub values: Tensor<1>,
}

/// What WaveFT trains at one place.
#[derive(Module, Debug)]
pub struct WaveFtAdapter {
    /// `c [n]`.
    pub spectrum: Param<Tensor<1>>,
    /// `ψ` of every coefficient.
    pub wavelets: Wavelets,
    /// `s`.
    pub scaling: f64,
}

impl Adapter for WaveFtAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for WaveFtAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let Wavelets { coefficients, places, values } = &self.wavelets;
        let c = (self.spectrum.val() * self.scaling).select(0, coefficients.clone());
        Some(scatter(c * values.clone(), places, w.dims()))
    }
}

/// One side of a coefficient matrix: HF PEFT centres the trained coefficients of a weight of that
/// `length` in one that is long enough for the filter, and even.
struct Side {
    length: usize,
    filter: usize,
}

impl Side {
    /// The half in which a coefficient stands (0: smooth, 1: detail), and where in it.
    fn coefficient(&self, index: usize) -> (usize, usize) {
        let half = (self.length + self.filter - 2).div_ceil(2);
        let index = index + (2 * half - self.length) / 2;
        (index / half, index % half)
    }

    /// Where the filter's numbers come to stand: `(its index, the weight's index)`.
    fn places(&self, at: usize) -> impl Iterator<Item = (usize, usize)> {
        let (length, cut) = (self.length, self.filter - 2);
        let places = (0..self.filter).map(move |tap| (tap, (2 * at + tap).checked_sub(cut)));
        places.filter_map(move |(tap, place)| Some((tap, place.filter(|place| *place < length)?)))
    }
}

impl WaveFt {
    /// With this many coefficients, and HF PEFT's defaults for the rest.
    pub fn new(n_frequency: usize, targets: Targets) -> Self {
        Self { n_frequency, targets, ..Self::default() }
    }

    /// The smoothing filter of the family.
    fn filter(&self) -> Result<&'static [f32], Error> {
        let name = &self.wavelet_family;
        match FAMILIES.iter().find(|(family, _)| family == name) {
            Some((_, filter)) => Ok(filter),
            None => {
                let known: Vec<&str> = FAMILIES.iter().map(|(family, _)| *family).collect();
                let reason =
                    format!("`{name}` is not implemented; expected one of {}", known.join(", "));
                Err(Error::config("wavelet_family", reason))
            }
        }
    }

    /// How many coefficients each place has.
    fn counts(&self, sites: &[&Site]) -> Result<Vec<usize>, Error> {
        let size = |site: &Site| site.fan_in() * site.fan_out();
        let total: usize = sites.iter().map(|site| size(site)).sum();
        let budget = self.n_frequency as f64 * sites.len() as f64;
        let count = |site: &&Site| {
            let pattern =
                pattern_value("n_frequency_pattern", &self.n_frequency_pattern, &site.path)?;
            let n = match self.proportional_parameters {
                // Halves go to the even number, as Python rounds.
                true => {
                    let share = size(site) as f64 / total as f64 * budget;
                    (share.round_ties_even() as usize).max(1)
                }
                false => pattern.unwrap_or(self.n_frequency),
            };
            let most = size(site);
            if n == 0 || n > most {
                let reason = format!(
                    "n_frequency: expected 1 to {most}, as its weight has numbers, found {n}"
                );
                return Err(Error::place(&site.path, reason));
            }
            Ok(n)
        };
        sites.iter().map(count).collect()
    }

    fn wavelets(
        &self,
        [fan_in, fan_out, n]: [usize; 3],
        device: &Device,
    ) -> Result<Wavelets, Error> {
        let smooth = self.filter()?;
        let filters = [smooth.to_vec(), high_pass(smooth)];
        let numbers = n.checked_mul(smooth.len() * smooth.len());
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("wavelets of {n} coefficients make more than 2^31 numbers");
            return Err(Error::config("n_frequency", reason));
        }
        let [inputs, outputs] =
            [fan_in, fan_out].map(|length| Side { length, filter: smooth.len() });
        let (mut coefficients, mut places, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let mut torch = TorchRandom::manual_seed(self.random_loc_seed as u64);
        // HF PEFT's coefficient matrix is [fan_out, fan_in], flat.
        for (j, at) in torch.randperm(fan_out * fan_in, n).into_iter().enumerate() {
            let (row, column) = (at / fan_in, at % fan_in);
            if !self.use_idwt {
                coefficients.push(j);
                places.push(column * fan_out + row);
                values.push(1.0);
                continue;
            }
            let ((row_half, row), (column_half, column)) =
                (outputs.coefficient(row), inputs.coefficient(column));
            for (u, i) in inputs.places(column) {
                for (t, o) in outputs.places(row) {
                    coefficients.push(j);
                    places.push(i * fan_out + o);
                    // HF PEFT hands the transform the top right quarter as the detail along rows.
                    values.push(filters[column_half][t] * filters[row_half][u]);
                }
            }
        }
        let count = values.len();
        let values = TensorData::new(values, [count]);
        Ok(Wavelets {
            coefficients: indices(coefficients, device),
            places: indices(places, device),
            values: Tensor::from_data(values, &device.clone().inner()),
        })
    }

    /// The number of coefficients and the wavelets of each place, by its path.
    fn all_wavelets(
        &self,
        sites: &[&Site],
        device: &Device,
    ) -> Result<BTreeMap<String, (usize, Wavelets)>, Error> {
        let mut shapes: BTreeMap<[usize; 3], Wavelets> = BTreeMap::new();
        let mut shared = BTreeMap::new();
        for (site, n) in sites.iter().zip(self.counts(sites)?) {
            let shape = [site.fan_in(), site.fan_out(), n];
            let wavelets = match shapes.get(&shape) {
                Some(wavelets) => wavelets.clone(),
                None => self.wavelets(shape, device)?,
            };
            shapes.insert(shape, wavelets.clone());
            shared.insert(site.path.clone(), (n, wavelets));
        }
        Ok(shared)
    }

    fn shared(
        &self,
        site: &Site,
        shared: &BTreeMap<String, (usize, Wavelets)>,
    ) -> Result<(usize, Wavelets), Error> {
        let missing = || Error::place(&site.path, "expected among the shared places, not found");
        shared.get(&site.path).cloned().ok_or_else(missing)
    }

    fn adapter(&self, spectrum: Tensor<1>, wavelets: Wavelets) -> WaveFtAdapter {
        let spectrum = Param::from_tensor(spectrum);
        WaveFtAdapter { spectrum, wavelets, scaling: self.scaling }
    }
}

impl Method for WaveFt {
    type Adapter = WaveFtAdapter;
    /// The number of coefficients and the wavelets of each place, by its path.
    type Shared = BTreeMap<String, (usize, Wavelets)>;
    const NAME: &'static str = "WAVEFT";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        !self.init_weights
    }

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
        positive("n_frequency", self.n_frequency)?;
        finite("scaling", self.scaling)?;
        self.filter()?;
        self.bias.check("waveft_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn share(
        &self,
        sites: &[&Site],
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        self.all_wavelets(sites, device)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<WaveFtAdapter, Error> {
        let (n, wavelets) = self.shared(site, shared)?;
        let spectrum = match self.init_weights {
            true => Tensor::zeros([n], device),
            false => normal([n], 0.01, rng, device),
        };
        Ok(self.adapter(spectrum, wavelets))
    }

    fn fold(adapter: &WaveFtAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(20, targets.clone());
        let family = |family: &str| Self { wavelet_family: family.into(), ..plain.clone() };
        vec![
            Self { random_loc_seed: 3, init_weights: false, ..family("sym4") },
            Self { scaling: 10.0, proportional_parameters: true, ..family("coif2") },
            Self { use_idwt: false, bias: Bias::Only("waveft_only".into()), ..plain.clone() },
            Self {
                n_frequency_pattern: IndexMap::from([("query".into(), 64)]),
                bias: Bias::All,
                ..family("db3")
            },
            plain,
        ]
    }

    /// 0 with `proportional_parameters`, where a place's number depends on all places.
    fn parameters(&self, site: &Site) -> usize {
        match self.proportional_parameters {
            true => 0,
            false => self.counts(&[site]).map_or(self.n_frequency, |counts| counts.iter().sum()),
        }
    }

    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        match self.proportional_parameters {
            true => self.counts(sites).map_or(0, |counts| counts.iter().sum()),
            false => 0,
        }
    }

    fn tensors(&self, _site: &Site, adapter: &WaveFtAdapter) -> Vec<(&'static str, TensorData)> {
        vec![("waveft_spectrum", adapter.spectrum.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<WaveFtAdapter, Error> {
        let (n, wavelets) = self.shared(site, shared)?;
        let spectrum = file.take("waveft_spectrum", [n], device)?;
        Ok(self.adapter(spectrum, wavelets))
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        _file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        self.all_wavelets(sites, device)
    }
}
