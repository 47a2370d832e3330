//! LoRA-GA: the factors begin where the first step of full fine-tuning would go (arXiv 2407.05000).

use crate::init::{Pair, Place};
use crate::init_data::{Found, leading, numbers};
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_core::{Error, Site};
use rand::rngs::ChaCha8Rng;
use rand::seq::index::sample;
use serde::{Deserialize, Serialize};

/// Which of the `2r` main directions of the gradient go to which factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Direction {
    /// In turn: `B` the first, `A` the second, and so on.
    ArBr,
    /// `B` the first `r`, `A` the second `r`.
    A2rBr,
    /// `A` the first `r`, `B` the second `r`; the default.
    #[default]
    ArB2r,
    /// Both the same `r`, drawn by the seed.
    #[serde(rename = "random")]
    Random,
}

/// How the factors are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaScale {
    /// `B` times `fan_out^¼ / √stable_gamma`; the default.
    #[default]
    Stable,
    /// `B` so that its first direction is as large as the weight's.
    WeightSvd,
    /// Both divided by LoRA's `s`.
    GdScale,
    /// Not at all.
    Unit,
}

/// Options of the init "lora_ga" (arXiv 2407.05000): with the gradient of the loss `∇W = V·S·Uᵀ`, `A` is `r`
/// columns of `V` and `B` is `r` rows of `S·Uᵀ`, scaled, which are constants of the adapter too:
/// `Δ(W) = s·(A·B - A0·B0)`.
///
/// Names and defaults are HF PEFT's. The gradient is the mean over the batches of the data, without the
/// model's dropout. `2r` may be no more than a place's smaller side. Embeddings begin as by the init true.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraGaConfig {
    /// "ArBr", "A2rBr", "ArB2r" (the default) or "random".
    pub direction: Direction,
    /// "stable" (the default), "weight_svd", "gd_scale" or "unit".
    pub scale: GaScale,
    /// Of the scale "stable"; default 16.
    pub stable_gamma: usize,
}

impl Default for LoraGaConfig {
    fn default() -> Self {
        Self { direction: Direction::default(), scale: GaScale::default(), stable_gamma: 16 }
    }
}

/// The `2r` main directions of a gradient, of which HF PEFT sees `4r`.
pub(crate) fn find(site: &Site, r: usize, gradient: Tensor<2>) -> Result<Found, Error> {
    let (path, most) = (&site.path, site.fan_in().min(site.fan_out()));
    if r.saturating_mul(2) > most {
        let reason = format!(
            "is {r}, and lora_ga needs twice as many directions; the gradient of {path} has {most}"
        );
        return Err(Error::config("r", reason));
    }
    if gradient.clone().abs().max().into_scalar::<f32>() == 0.0 {
        return Err(Error::place(path, "the data give its weight no gradient"));
    }
    // Of the transpose, [fan_out, fan_in], as HF PEFT has it: signs go by the inputs' side.
    let (u, sizes, vt) = leading(gradient.transpose(), 2 * r, r.saturating_mul(4));
    Ok(Found::new(vt.transpose(), numbers(sizes), Some(u.transpose())))
}

impl LoraGaConfig {
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.stable_gamma {
            0 => Err(Error::config("lora_ga_config", "stable_gamma: expected 1 or more, found 0")),
            _ => Ok(()),
        }
    }

    pub(crate) fn draws(&self) -> bool {
        self.direction == Direction::Random
    }

    /// Which directions `A` and `B` take.
    fn picked(&self, r: usize, rng: &mut ChaCha8Rng) -> [Vec<usize>; 2] {
        match self.direction {
            Direction::ArBr => {
                [(0..r).map(|i| 2 * i + 1).collect(), (0..r).map(|i| 2 * i).collect()]
            }
            Direction::A2rBr => [(r..2 * r).collect(), (0..r).collect()],
            Direction::ArB2r => [(0..r).collect(), (r..2 * r).collect()],
            Direction::Random => {
                let drawn = sample(rng, 2 * r, r).into_vec();
                [drawn.clone(), drawn]
            }
        }
    }

    /// `A` and `B` out of the directions of the gradient.
    pub(crate) fn factors(
        &self,
        place: &Place<'_>,
        found: &Found,
        rng: &mut ChaCha8Rng,
    ) -> Result<Pair, Error> {
        let (r, device, fan_out) = (place.r, place.device, place.site.fan_out());
        let [first, second] = self.picked(r, rng);
        let at = |picked: &[usize]| {
            let picked: Vec<i32> = picked.iter().map(|i| *i as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(picked, [r]), device)
        };
        let a = found.left(device).select(1, at(&first));
        let sizes = found.sizes(device).select(0, at(&second));
        let b = found.right(fan_out, device).select(0, at(&second)) * sizes.unsqueeze_dim(1);
        let largest = second.first().and_then(|i| found.sizes.get(*i)).copied().unwrap_or(0.0);
        Ok(match self.scale {
            GaScale::Unit => (a, b),
            GaScale::Stable => {
                let scale = (fan_out as f64).powf(0.25) / (self.stable_gamma as f64).sqrt();
                (a, b * scale)
            }
            GaScale::GdScale => {
                place.scale()?;
                (a / place.scaling, b / place.scaling)
            }
            GaScale::WeightSvd if largest > 0.0 => {
                let (_, own, _) = leading(place.weight()?, 1, r);
                let own = numbers(own).first().copied().unwrap_or(0.0);
                (a, b * (own / largest))
            }
            GaScale::WeightSvd => (a, b),
        })
    }
}
