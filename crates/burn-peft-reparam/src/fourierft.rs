//! FourierFT: a few trained entries of the difference's spectrum (arXiv 2405.03003).

use crate::common::{Bias, finite, positive};
use crate::random::normal;
use crate::torch_random::TorchRandom;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed,
    pattern_value,
};
use burn_peft_kernels::linear;
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::f64::consts::TAU;

/// FourierFT (arXiv 2405.03003): `W' = W + s·Re(F⁻¹(C))`, where `C` is zero but for `n_frequency`
/// trained entries `c [n]`.
///
/// With the entries' frequencies `(p, q)`, and `i` and `o` counting inputs and outputs, `Δ(W)[i, o] =
/// s / (fan_in·fan_out) · Σ c·cos 2π(q·i / fan_in + p·o / fan_out)`. Which entries are trained, a
/// permutation by `random_loc_seed` decides: PyTorch's, so that HF PEFT draws the same; places of one
/// shape have the same ones and share the waves. `c` begins as `N(0, 1)`, which is no identity, or as
/// 0 with `init_weights`. Parameters: `n_frequency` a place. Folds. On activations, few frequencies act
/// as two thin matrices; where `2·n·(fan_in + fan_out)` is no less than the weight, the difference is
/// composed. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FourierFt {
    /// Trained entries of the spectrum; default 1000.
    pub n_frequency: usize,
    /// Scale of the difference; default 150.
    pub scaling: f64,
    /// Decides which entries are trained; default 777.
    pub random_loc_seed: i64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "fourier_only".
    pub bias: Bias,
    /// Other numbers of entries for layers whose path ends in a match of the key; the first match wins.
    pub n_frequency_pattern: IndexMap<String, usize>,
    /// Begin as an identity; default false.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for FourierFt {
    fn default() -> Self {
        Self {
            n_frequency: 1000,
            scaling: 150.0,
            random_loc_seed: 777,
            bias: Bias::None,
            n_frequency_pattern: IndexMap::new(),
            init_weights: false,
            targets: Targets::default(),
        }
    }
}

/// Waves that are added up at a time: rounding grows with the sum to which a term is added, and with
/// the default scale the difference is several times the model's weight.
const TERMS: usize = 256;

/// What the frequencies look like on both sides of a weight: `cos(a + b) = cos a·cos b − sin a·sin b`.
#[derive(Module, Debug)]
pub struct Waves {
    /// `[cos | sin]` of every frequency over the inputs: `[fan_in, 2n]`.
    pub inputs: Tensor<2>,
    /// `[cos | −sin]` over the outputs: `[fan_out, 2n]`.
    pub outputs: Tensor<2>,
}

/// `[cos | sign·sin]` of `2π·frequency·position / length`.
fn waves(length: usize, frequencies: &[usize], sign: f64, device: &Device) -> Tensor<2> {
    let angle = |i: usize, f: &usize| TAU * (i * f % length) as f64 / length as f64;
    let mut values = Vec::with_capacity(length * 2 * frequencies.len());
    for i in 0..length {
        values.extend(frequencies.iter().map(|f| angle(i, f).cos() as f32));
        values.extend(frequencies.iter().map(|f| (sign * angle(i, f).sin()) as f32));
    }
    Tensor::from_data(TensorData::new(values, [length, 2 * frequencies.len()]), device)
}

/// What FourierFT trains at one place.
#[derive(Module, Debug)]
pub struct FourierFtAdapter {
    /// `c [n]`.
    pub spectrum: Param<Tensor<1>>,
    /// The frequencies' waves.
    pub waves: Waves,
    /// `s / (fan_in·fan_out)`.
    pub scaling: f64,
}

impl FourierFtAdapter {
    /// Whether the two thin matrices are less than the weight.
    fn is_thin(&self) -> bool {
        let [[fan_in, waves], [fan_out, _]] = [self.waves.inputs.dims(), self.waves.outputs.dims()];
        waves * (fan_in + fan_out) < fan_in * fan_out
    }

    /// `[c, c]` and the scale.
    fn amplitudes(&self) -> Tensor<1> {
        self.spectrum.val().repeat_dim(0, 2) * self.scaling
    }
}

impl Adapter for FourierFtAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        if !self.is_thin() {
            return self.linear_whole(layer, x).map(|whole| whole - y.clone());
        }
        let amplitudes = self.amplitudes();
        let h = linear(x.clone().cast(amplitudes.dtype()), self.waves.inputs.clone(), None);
        let h = h * amplitudes.unsqueeze(); // [batch, seq, 2n]
        Some(linear(h, self.waves.outputs.clone().transpose(), None).cast(y.dtype()))
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        if self.is_thin() { None } else { composed::linear(self, layer, x) }
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for FourierFtAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let inputs = self.waves.inputs.clone() * self.amplitudes().unsqueeze();
        let [_, waves] = inputs.dims();
        let part = |start| {
            let length = TERMS.min(waves - start);
            let outputs = self.waves.outputs.clone().narrow(1, start, length);
            inputs.clone().narrow(1, start, length).matmul(outputs.transpose())
        };
        (0..waves).step_by(TERMS).map(part).reduce(|sum, part| sum + part)
    }
}

impl FourierFt {
    /// With this many frequencies, and HF PEFT's defaults for the rest.
    pub fn new(n_frequency: usize, targets: Targets) -> Self {
        Self { n_frequency, targets, ..Self::default() }
    }

    /// The shape and the number of entries at a place.
    fn shape(&self, site: &Site) -> Result<[usize; 3], Error> {
        let pattern = pattern_value("n_frequency_pattern", &self.n_frequency_pattern, &site.path)?;
        let n = pattern.unwrap_or(self.n_frequency);
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        if n == 0 || n > fan_in * fan_out {
            let most = fan_in * fan_out;
            let reason =
                format!("n_frequency: expected 1 to {most}, as its weight has numbers, found {n}");
            return Err(Error::place(&site.path, reason));
        }
        if n.checked_mul(2 * (fan_in + fan_out)).is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("waves of {n} entries make more than 2^31 numbers");
            return Err(Error::place(&site.path, format!("n_frequency: {reason}")));
        }
        Ok([fan_in, fan_out, n])
    }

    fn waves(&self, [fan_in, fan_out, n]: [usize; 3], device: &Device) -> Waves {
        let mut torch = TorchRandom::manual_seed(self.random_loc_seed as u64);
        // HF PEFT's spectrum is [fan_out, fan_in], flat.
        let places = torch.randperm(fan_out * fan_in, n);
        let (p, q): (Vec<usize>, Vec<usize>) =
            places.into_iter().map(|place| (place / fan_in, place % fan_in)).unzip();
        let device = device.clone().inner();
        Waves {
            inputs: waves(fan_in, &q, 1.0, &device),
            outputs: waves(fan_out, &p, -1.0, &device),
        }
    }

    fn all_waves(
        &self,
        sites: &[&Site],
        device: &Device,
    ) -> Result<BTreeMap<[usize; 3], Waves>, Error> {
        let mut shared = BTreeMap::new();
        for site in sites {
            let shape = self.shape(site)?;
            shared.entry(shape).or_insert_with(|| self.waves(shape, device));
        }
        Ok(shared)
    }

    fn adapter(
        &self,
        shape: [usize; 3],
        spectrum: Tensor<1>,
        shared: &BTreeMap<[usize; 3], Waves>,
        device: &Device,
    ) -> FourierFtAdapter {
        let [fan_in, fan_out, _] = shape;
        FourierFtAdapter {
            spectrum: Param::from_tensor(spectrum),
            waves: shared.get(&shape).cloned().unwrap_or_else(|| self.waves(shape, device)),
            scaling: self.scaling / (fan_in * fan_out) as f64,
        }
    }
}

impl Method for FourierFt {
    type Adapter = FourierFtAdapter;
    /// Waves by a place's shape and number of entries.
    type Shared = BTreeMap<[usize; 3], Waves>;
    const NAME: &'static str = "FOURIERFT";
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
        // HF PEFT documents the first and takes both.
        self.bias
            .check("fourier_only")
            .or_else(|e| self.bias.check("fourierft_only").map_err(|_| e))
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
        self.all_waves(sites, device)
    }

    fn init(
        &self,
        site: &Site,
        shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<FourierFtAdapter, Error> {
        let shape @ [_, _, n] = self.shape(site)?;
        let spectrum = match self.init_weights {
            true => Tensor::zeros([n], device),
            false => normal([n], 1.0, rng, device),
        };
        Ok(self.adapter(shape, spectrum, shared, device))
    }

    fn fold(adapter: &FourierFtAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(20, targets.clone());
        vec![
            // Thin at every place of the laws.
            Self { random_loc_seed: -5, scaling: 40.0, ..Self::new(1, targets.clone()) },
            Self { init_weights: true, bias: Bias::Only("fourier_only".into()), ..plain.clone() },
            Self {
                n_frequency_pattern: IndexMap::from([("query".into(), 64)]),
                bias: Bias::All,
                ..plain.clone()
            },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).map_or(self.n_frequency, |[_, _, n]| n)
    }

    fn tensors(&self, _site: &Site, adapter: &FourierFtAdapter) -> Vec<(&'static str, TensorData)> {
        vec![("fourierft_spectrum", adapter.spectrum.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<FourierFtAdapter, Error> {
        let shape @ [_, _, n] = self.shape(site)?;
        let spectrum = file.take("fourierft_spectrum", [n], device)?;
        Ok(self.adapter(shape, spectrum, shared, device))
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        _file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        self.all_waves(sites, device)
    }
}
