//! MoSLoRA: `W' = W + s·A·M·B`, a trained mixer between the factors (arXiv 2406.11909).

use crate::LoraAdapter;
use crate::low_rank::{LowRank, bounded, faces_by_lora, stored, taken};
use crate::random::{normal, uniform};
use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// MoSLoRA, mixture of subspaces (arXiv 2406.11909): `y = xW + b + s·dropout(x)·A·M·B`, which is
/// `W0 + B·M·A` in the paper's layout.
///
/// `A [fan_in, r]` as in LoRA, `M [r, r]` trained, `B [r, fan_out]` zero at first; `s = lora_alpha / r`.
/// Parameters: `r·(fan_in + fan_out + r)` a place. Folds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MosLora {
    /// Rank, scale, dropout and places, as in LoRA.
    #[serde(flatten)]
    pub low_rank: LowRank,
    /// How the mixer begins; default orthogonal.
    pub init_mixer: Mixer,
}

/// How the mixer of [`MosLora`] begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixer {
    /// A random rotation.
    #[default]
    Orthogonal,
    /// `U(±1/√r)`: PyTorch's Kaiming init of a linear layer.
    Kaiming,
}

/// What MoSLoRA trains at one place.
#[derive(Module, Debug)]
pub struct MosLoraAdapter {
    /// `A [fan_in, r]`.
    pub moslora_a: Param<Tensor<2>>,
    /// `M [r, r]`.
    pub moslora_m: Param<Tensor<2>>,
    /// `B [r, fan_out]`.
    pub moslora_b: Param<Tensor<2>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// `s`.
    pub scaling: f64,
}

impl MosLoraAdapter {
    fn lora(&self) -> LoraAdapter {
        let mixed = self.moslora_a.val().matmul(self.moslora_m.val());
        crate::lora::LoraAdapter::of(mixed, self.moslora_b.val(), self.scaling)
    }
}

faces_by_lora!(MosLoraAdapter, moslora_a);

/// A random orthogonal matrix: normal rows, made orthogonal one after the other.
fn orthogonal(r: usize, rng: &mut ChaCha8Rng, device: &Device) -> Tensor<2> {
    let drawn: Tensor<2> = normal([r, r], 1.0, rng, &device.clone().inner());
    let drawn: Vec<f64> = drawn.into_data().convert::<f64>().iter().collect();
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(r);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for row in drawn.chunks_exact(r) {
        let mut row = row.to_vec();
        for earlier in &rows {
            let along = dot(&row, earlier);
            row.iter_mut().zip(earlier).for_each(|(x, e)| *x -= along * e);
        }
        let length = dot(&row, &row).sqrt();
        rows.push(row.into_iter().map(|x| x / length).collect());
    }
    let values: Vec<f32> = rows.concat().into_iter().map(|x| x as f32).collect();
    Tensor::from_data(TensorData::new(values, [r, r]), device)
}

impl MosLora {
    fn adapter(
        &self,
        site: &Site,
        (a, b): (Tensor<2>, Tensor<2>),
        m: Tensor<2>,
    ) -> Result<MosLoraAdapter, Error> {
        let [r, _] = m.dims();
        Ok(MosLoraAdapter {
            moslora_a: Param::from_tensor(a),
            moslora_m: Param::from_tensor(m),
            moslora_b: Param::from_tensor(b),
            dropout: self.low_rank.dropout(),
            scaling: self.low_rank.scaling(site, r)?,
        })
    }
}

impl Method for MosLora {
    type Adapter = MosLoraAdapter;
    type Shared = ();
    const NAME: &'static str = "MOSLORA";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["moslora_b"];

    fn targets(&self) -> &Targets {
        &self.low_rank.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.low_rank.targets
    }

    fn biases(&self) -> Biases {
        self.low_rank.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        self.low_rank.check()
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<MosLoraAdapter, Error> {
        let r = self.low_rank.rank(site)?;
        bounded("r", &site.path, &[r, r])?;
        let pair = self.low_rank.drawn(site, rng, device)?;
        let mixer = match self.init_mixer {
            Mixer::Orthogonal => orthogonal(r, rng, device),
            Mixer::Kaiming => uniform([r, r], (1.0 / r as f32).sqrt(), rng, device),
        };
        self.adapter(site, pair, mixer)
    }

    fn fold(adapter: &MosLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let [dropping, patterned] = LowRank::samples(targets);
        vec![
            Self { low_rank: dropping, init_mixer: Mixer::Kaiming },
            Self { low_rank: patterned, init_mixer: Mixer::Orthogonal },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let r = self.low_rank.rank(site).unwrap_or(self.low_rank.r);
        self.low_rank.numbers(site) + r * r
    }

    fn tensors(&self, _site: &Site, adapter: &MosLoraAdapter) -> Vec<(&'static str, TensorData)> {
        vec![
            ("moslora_A", stored(adapter.moslora_a.val())),
            ("moslora_M", stored(adapter.moslora_m.val())),
            ("moslora_B", stored(adapter.moslora_b.val())),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<MosLoraAdapter, Error> {
        let r = self.low_rank.rank(site)?;
        let pair = self.low_rank.take(site, ["moslora_A", "moslora_B"], file, device)?;
        let mixer = taken("moslora_M", [r, r], file, device)?;
        self.adapter(site, pair, mixer)
    }
}
