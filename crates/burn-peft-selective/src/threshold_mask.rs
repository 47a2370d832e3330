//! Threshold-Mask: weights are kept or set to zero, and which is learnt (arXiv 2004.12406, 1801.06519).

use crate::mask::shape_data;
use crate::parameter::Parameter;
use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::nn::{Embedding, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Threshold-Mask (arXiv 2004.12406; Piggyback, 1801.06519): `W' = W ⊙ 1[M > τ]`, so that
/// `Δ(W) = -W ⊙ 1[M ≤ τ]`. The scores `M [fan_in, fan_out]` are trained, the gradient passing the step as if it
/// were not there; of the weights themselves none changes but to zero.
///
/// `M` begins at `mask_init`, above `τ = threshold`, so that nothing is masked before the first step. The
/// defaults are Piggyback's, 0.01 and 0.005. Parameters: `fan_in·fan_out` a place, in training; the file holds a
/// bit of each: `mask.bits [⌈n/8⌉]` (U8, the lowest bit first, 1 where the weight is kept, in the Hugging Face
/// checkpoint's order) and `mask.shape [axes]` (I32). Biases and norms stay as they are. Folds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ThresholdMask {
    /// `τ`; default 0.005.
    pub threshold: f64,
    /// Where the scores begin; default 0.01.
    pub mask_init: f64,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for ThresholdMask {
    fn default() -> Self {
        Self { threshold: 5e-3, mask_init: 1e-2, targets: Targets::default() }
    }
}

/// What Threshold-Mask trains at one place.
#[derive(Module, Debug)]
pub struct ThresholdMaskAdapter {
    /// `M [fan_in, fan_out]`.
    pub scores: Param<Tensor<2>>,
    /// `τ`.
    pub threshold: f64,
}

impl ThresholdMaskAdapter {
    /// `1[M > τ]`, with the gradient of `M`.
    fn mask(&self) -> Tensor<2> {
        let scores = self.scores.val();
        let still = scores.clone().without_autodiff();
        let hard = still.clone().greater_elem(self.threshold).float().cast(still.dtype());
        match scores.is_autodiff() {
            // M - M is 0 to the bit, and its slope is M's.
            true => (scores - Tensor::from_inner(still)) + Tensor::from_inner(hard),
            false => hard,
        }
    }

    /// Whether each weight is kept, in the checkpoint's order.
    fn bits(&self, site: &Site) -> Vec<bool> {
        let [rows, columns] = self.scores.dims();
        let scores = self.scores.val().without_autodiff().reshape([rows * columns]);
        let scores = Parameter::Weight.in_checkpoint_order(site, scores);
        scores.into_iter().map(|score| f64::from(score) > self.threshold).collect()
    }
}

impl Adapter for ThresholdMaskAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        composed::linear(self, layer, x)
    }

    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        _y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        composed::embedding(self, layer, ids)
    }

    fn conv1d(&self, layer: &Conv1d, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        composed::conv1d(self, layer, x)
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, _y: &Tensor<4>) -> Option<Tensor<4>> {
        composed::conv2d(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for ThresholdMaskAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let mask = self.mask();
        Some((mask.clone() - 1.0) * w.clone().cast(mask.dtype()))
    }
}

impl ThresholdMask {
    fn adapter(&self, scores: Tensor<2>) -> ThresholdMaskAdapter {
        ThresholdMaskAdapter { scores: Param::from_tensor(scores), threshold: self.threshold }
    }
}

impl Method for ThresholdMask {
    type Adapter = ThresholdMaskAdapter;
    type Shared = ();
    const NAME: &'static str = "THRESHOLDMASK";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv1d, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        true
    }

    fn draws(&self) -> bool {
        false
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        let (threshold, init) = (self.threshold, self.mask_init);
        match threshold.is_finite() && init.is_finite() && (init as f32) > (threshold as f32) {
            true => Ok(()),
            false => {
                let reason =
                    format!("expected a number above the threshold {threshold}, found {init}");
                Err(Error::config("mask_init", reason))
            }
        }
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        _rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<ThresholdMaskAdapter, Error> {
        Ok(self.adapter(Tensor::full([site.fan_in(), site.fan_out()], self.mask_init, device)))
    }

    fn fold(adapter: &ThresholdMaskAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: targets.clone(), ..Self::default() };
        vec![Self { threshold: 0.0, mask_init: 0.5, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        site.fan_in() * site.fan_out()
    }

    fn tensors(
        &self,
        site: &Site,
        adapter: &ThresholdMaskAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        let byte = |bits: &[bool]| {
            (0..).zip(bits).map(|(at, kept): (u32, _)| u8::from(*kept) << at).sum::<u8>()
        };
        let bytes: Vec<u8> = adapter.bits(site).chunks(8).map(byte).collect();
        let count = bytes.len();
        let shape = Parameter::Weight.shape(site).unwrap_or_default();
        vec![("mask.bits", TensorData::new(bytes, [count])), ("mask.shape", shape_data(&shape))]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<ThresholdMaskAdapter, Error> {
        let (_, bytes) = file.take_ints("mask.bits")?;
        let (_, found) = file.take_ints("mask.shape")?;
        let shape = Parameter::Weight.shape(site).unwrap_or_default();
        let count = shape.iter().product::<usize>();
        let same = found
            .iter()
            .map(|axis| usize::try_from(*axis).ok())
            .eq(shape.iter().copied().map(Some));
        if !same || bytes.len() != count.div_ceil(8) {
            let name = format!("{}.mask.bits", site.path);
            let found = format!("{} bytes for shape {found:?}", bytes.len());
            return Err(Error::tensor(name, format!("the bits of shape {shape:?}"), found));
        }
        // As far from the threshold as the scores began, on the side where each ended.
        let dropped = 2.0 * self.threshold - self.mask_init;
        let score = |at: usize| match bytes[at / 8] >> (at % 8) & 1 {
            1 => self.mask_init as f32,
            _ => dropped as f32,
        };
        let scores: Vec<f32> = (0..count).map(score).collect();
        let scores = Parameter::Weight.in_our_order(site, scores, device);
        let scores = scores.reshape([site.fan_in(), site.fan_out()]);
        Ok(self.adapter(scores))
    }
}
