//! VB-LoRA: LoRA's factors put together from one bank of vectors (arXiv 2405.15179).

use crate::common::{Bias, drop, finite, positive, probability};
use crate::random::{normal, uniform};
use crate::shared::held;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// VB-LoRA (arXiv 2405.15179): `y = xW + b + dropout(x)·A·B`, where every piece of `vector_length`
/// numbers in a column of `A [fan_in, r]` or a row of `B [r, fan_out]` is `Σ_k wₖ·bank[iₖ]`: the `topk`
/// vectors that its logits choose, weighted by their softmax.
///
/// One `bank [num_vectors, vector_length]`, trained, is shared by all places and begins as
/// `U(±init_vector_bank_bound)`; the logits begin as `N(0, init_logits_std²)`, which is no identity.
/// Parameters: `num_vectors·r·(fan_in + fan_out) / vector_length` a place and
/// `num_vectors·vector_length` in all. Folds: `Δ(W) = A·B`. Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VbLora {
    /// Rank of the difference; default 4.
    pub r: usize,
    /// Vectors in the bank; default 256.
    pub num_vectors: usize,
    /// Length of a vector, which must divide both widths of every place; default 256.
    pub vector_length: usize,
    /// How many vectors make a piece; default 2.
    pub topk: usize,
    /// Write the chosen vectors and their weights only. What is read back has made its choice: its bank
    /// can be trained further, its logits are gone. Default false.
    pub save_only_topk_weights: bool,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub vblora_dropout: f64,
    /// Which biases of the model are trained beside it: "none" (the default), "all" or "vblora_only".
    pub bias: Bias,
    /// Bound of the bank's first values; default 0.02.
    pub init_vector_bank_bound: f64,
    /// Standard deviation of the logits' first values; default 0.1.
    pub init_logits_std: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for VbLora {
    fn default() -> Self {
        Self {
            r: 4,
            num_vectors: 256,
            vector_length: 256,
            topk: 2,
            save_only_topk_weights: false,
            vblora_dropout: 0.0,
            bias: Bias::None,
            init_vector_bank_bound: 0.02,
            init_logits_std: 0.1,
            targets: Targets::default(),
        }
    }
}

/// Which vectors make each piece, and how strongly.
// Both are a few handles, of which there are two for each place.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum VectorChoice {
    /// By the largest of the trained logits, `[_, _, num_vectors]`.
    Logits(Param<Tensor<3>>),
    /// Once for all: read from a file that holds nothing else.
    Made(ChosenVectors),
}

/// A choice that is not trained any more.
#[derive(Module, Debug)]
pub struct ChosenVectors {
    /// The vectors, `[_, _, topk]`.
    pub indices: Tensor<3, Int>,
    /// Their weights but the last, which makes the sum 1: `[_, _, topk - 1]`.
    pub weights: Tensor<3>,
}

impl VectorChoice {
    /// The chosen vectors and their weights but the last.
    fn made(&self, topk: usize) -> ChosenVectors {
        match self {
            Self::Made(made) => made.clone(),
            Self::Logits(logits) => {
                let logits = logits.val();
                // Which are the largest has no gradient; how large they are has.
                let (_, indices) = logits.clone().without_autodiff().topk_with_indices(topk, 2);
                let weights = softmax(logits.gather(2, indices.clone()), 2);
                ChosenVectors { indices, weights: weights.narrow(2, 0, topk - 1) }
            }
        }
    }

    /// All pieces, `[_, _, vector_length]`.
    fn pieces(&self, topk: usize, bank: &Tensor<2>) -> Tensor<3> {
        let ChosenVectors { indices, weights } = self.made(topk);
        let [rows, columns, k] = indices.dims();
        let [_, length] = bank.dims();
        // The last weight is what is missing to 1, as HF PEFT's file has it, so that a choice is the same
        // to the bit before and after it was written.
        let weights = match k {
            1 => Tensor::ones([rows, columns, 1], &bank.device()),
            _ => Tensor::cat(vec![weights.clone(), -weights.sum_dim(2) + 1.0], 2),
        };
        let vectors = bank.clone().select(0, indices.reshape([rows * columns * k]));
        (vectors.reshape([rows * columns, k, length]) * weights.reshape([rows * columns, k, 1]))
            .sum_dim(1)
            .reshape([rows, columns, length])
    }
}

/// What VB-LoRA trains at one place, and its handle on the bank.
#[derive(Module, Debug)]
pub struct VbLoraAdapter {
    /// Of `A`'s pieces: `[r, fan_in / vector_length, num_vectors]`.
    pub logits_a: VectorChoice,
    /// Of `B`'s pieces: `[fan_out / vector_length, r, num_vectors]`.
    pub logits_b: VectorChoice,
    /// The vectors, `[num_vectors, vector_length]`: one parameter for all places.
    pub bank: Param<Tensor<2>>,
    /// Drops inputs of `A` in training.
    pub dropout: Dropout,
    /// How many vectors make a piece.
    pub topk: usize,
}

impl VbLoraAdapter {
    /// `A [fan_in, r]` and `B [r, fan_out]`.
    fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let bank = self.bank.val();
        let a = self.logits_a.pieces(self.topk, &bank);
        let b = self.logits_b.pieces(self.topk, &bank).swap_dims(0, 1);
        let flat = |pieces: Tensor<3>| {
            let [r, count, length] = pieces.dims();
            pieces.reshape([r, count * length])
        };
        (flat(a).transpose(), flat(b))
    }
}

impl Adapter for VbLoraAdapter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        let (a, b) = self.factors();
        let h = linear(drop(x, &self.dropout, &a), a, None); // [batch, seq, r]
        Some(linear(h, b, None).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for VbLoraAdapter {
    fn weight(&self, _w: &Tensor<2>) -> Option<Tensor<2>> {
        let (a, b) = self.factors();
        Some(a.matmul(b))
    }
}

const NAMES: [&str; 2] = ["vblora_logits_A", "vblora_logits_B"];
const INDICES: [&str; 2] = ["vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"];
const WEIGHTS: [&str; 2] = ["vblora_logits_A_topk_weights", "vblora_logits_B_topk_weights"];
const BANK: &str = "vblora_vector_bank";

impl VbLora {
    /// With this rank and bank, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, num_vectors: usize, vector_length: usize, targets: Targets) -> Self {
        Self { r, num_vectors, vector_length, targets, ..Self::default() }
    }

    /// How many pieces `A` and `B` have, `[r, _]` and `[_, r]`.
    fn pieces(&self, site: &Site) -> Result<[[usize; 2]; 2], Error> {
        for (side, width) in [("inputs", site.fan_in()), ("outputs", site.fan_out())] {
            if width % self.vector_length != 0 {
                let length = self.vector_length;
                let reason = format!(
                    "vector_length: expected a divisor of its {width} {side}, found {length}"
                );
                return Err(Error::place(&site.path, reason));
            }
        }
        let pieces = [site.fan_in(), site.fan_out()].map(|width| width / self.vector_length);
        let numbers = self.r.checked_mul(pieces[0] + pieces[1]);
        let numbers = numbers.and_then(|numbers| numbers.checked_mul(self.num_vectors));
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason =
                format!("a rank of {} makes more than 2^31 logits at {}", self.r, site.path);
            return Err(Error::config("r", reason));
        }
        Ok([[self.r, pieces[0]], [pieces[1], self.r]])
    }

    fn adapter(
        &self,
        [logits_a, logits_b]: [VectorChoice; 2],
        bank: &Option<Param<Tensor<2>>>,
    ) -> Result<VbLoraAdapter, Error> {
        Ok(VbLoraAdapter {
            logits_a,
            logits_b,
            bank: held(bank, "num_vectors")?,
            dropout: DropoutConfig::new(self.vblora_dropout).init(),
            topk: self.topk,
        })
    }

    /// In the smallest type that holds them all, as HF PEFT writes them.
    fn indices(&self, indices: Tensor<3, Int>) -> TensorData {
        let data = indices.into_data();
        match self.num_vectors {
            ..0x100 => data.convert::<u8>(),
            0x100..0x8000 => data.convert::<i16>(),
            _ => data.convert::<i32>(),
        }
    }

    fn restore_made(
        &self,
        site: &Site,
        side: usize,
        [rows, columns]: [usize; 2],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<VectorChoice, Error> {
        let shape = [rows, columns, self.topk];
        let (found, indices) = file.take_ints(INDICES[side])?;
        let name = || format!("{}.{}", site.path, INDICES[side]);
        if found != shape {
            return Err(Error::tensor(
                name(),
                format!("shape {shape:?}"),
                format!("shape {found:?}"),
            ));
        }
        let out = |index: &&i64| usize::try_from(**index).is_ok_and(|i| i < self.num_vectors);
        if let Some(index) = indices.iter().find(|index| !out(index)) {
            let expected = format!("indices below num_vectors = {}", self.num_vectors);
            return Err(Error::tensor(name(), expected, index.to_string()));
        }
        let device = device.clone().inner();
        Ok(VectorChoice::Made(ChosenVectors {
            indices: Tensor::from_data(TensorData::new(indices, shape), &device),
            weights: file.take(WEIGHTS[side], [rows, columns, self.topk - 1], &device)?,
        }))
    }
}

impl Method for VbLora {
    type Adapter = VbLoraAdapter;
    type Shared = Option<Param<Tensor<2>>>;
    const NAME: &'static str = "VBLORA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

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
        positive("vector_length", self.vector_length)?;
        positive("topk", self.topk)?;
        if self.topk > self.num_vectors {
            let (topk, vectors) = (self.topk, self.num_vectors);
            let reason = format!("expected at most num_vectors = {vectors}, found {topk}");
            return Err(Error::config("topk", reason));
        }
        let numbers = self.num_vectors.checked_mul(self.vector_length);
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason =
                format!("a bank of {} vectors has more than 2^31 numbers", self.num_vectors);
            return Err(Error::config("num_vectors", reason));
        }
        if self.save_only_topk_weights && self.topk == 1 {
            let reason = "expected 2 or more with save_only_topk_weights, found 1: a single vector \
                          has no weight to write";
            return Err(Error::config("topk", reason));
        }
        finite("init_vector_bank_bound", self.init_vector_bank_bound)?;
        finite("init_logits_std", self.init_logits_std)?;
        probability("vblora_dropout", self.vblora_dropout)?;
        self.bias.check("vblora_only")
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
        let shape = [self.num_vectors, self.vector_length];
        let bank = uniform(shape, self.init_vector_bank_bound as f32, rng, device);
        Ok(Some(Param::from_tensor(bank)))
    }

    fn init(
        &self,
        site: &Site,
        bank: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<VbLoraAdapter, Error> {
        let choices = self.pieces(site)?.map(|[rows, columns]| {
            let shape = [rows, columns, self.num_vectors];
            let logits = normal(shape, self.init_logits_std as f32, rng, device);
            VectorChoice::Logits(Param::from_tensor(logits))
        });
        self.adapter(choices, bank)
    }

    fn fold(adapter: &VbLoraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, 6, 4, targets.clone());
        vec![
            Self { save_only_topk_weights: true, topk: 3, ..plain.clone() },
            Self { bias: Bias::Only("vblora_only".into()), vblora_dropout: 0.2, ..plain.clone() },
            Self { init_vector_bank_bound: 0.5, init_logits_std: 1.0, bias: Bias::All, ..plain },
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.num_vectors * self.r * (site.fan_in() + site.fan_out()) / self.vector_length
    }

    fn shared_parameters(&self, _sites: &[&Site]) -> usize {
        self.num_vectors * self.vector_length
    }

    fn tensors(&self, _site: &Site, adapter: &VbLoraAdapter) -> Vec<(&'static str, TensorData)> {
        let mut tensors = Vec::new();
        for (side, choice) in [&adapter.logits_a, &adapter.logits_b].into_iter().enumerate() {
            match choice {
                VectorChoice::Logits(logits) if !self.save_only_topk_weights => {
                    tensors.push((NAMES[side], logits.val().into_data()));
                }
                _ => {
                    let ChosenVectors { indices, weights } = choice.made(self.topk);
                    tensors.push((INDICES[side], self.indices(indices)));
                    tensors.push((WEIGHTS[side], weights.into_data()));
                }
            }
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        bank: &Self::Shared,
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<VbLoraAdapter, Error> {
        let [a, b] = self.pieces(site)?;
        let mut choice = |side: usize, [rows, columns]: [usize; 2]| {
            if self.save_only_topk_weights {
                return self.restore_made(site, side, [rows, columns], file, device);
            }
            let logits = file.take(NAMES[side], [rows, columns, self.num_vectors], device)?;
            Ok(VectorChoice::Logits(Param::from_tensor(logits)))
        };
        let choices = [choice(0, a)?, choice(1, b)?];
        self.adapter(choices, bank)
    }

    fn shared_tensors(&self, adapters: &[&VbLoraAdapter]) -> Vec<(String, TensorData)> {
        let bank = |adapter: &&VbLoraAdapter| (BANK.into(), adapter.bank.val().into_data());
        adapters.first().map(bank).into_iter().collect()
    }

    fn restore_shared(
        &self,
        _sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let bank = file.take(BANK, [self.num_vectors, self.vector_length], device)?;
        Ok(Some(Param::from_tensor(bank)))
    }
}
