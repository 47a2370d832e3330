//! BD-LoRA (arXiv 2510.23346): one of LoRA's factors is block-diagonal.

use crate::init::{Pair, Place};
use crate::random::uniform;
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, Site};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Options of BD-LoRA (arXiv 2510.23346): where a layer is cut over devices by its inputs, `A` is block-diagonal, and
/// where by its outputs, `B` is (section 3), so that each device holds what it needs.
///
/// `A = diag(A₁, .., Aₙ)` with blocks `[fan_in / n, r / n]`, `U(±√(6n / fan_in))`; or `B = diag(B₁, .., Bₙ)` with
/// blocks `[r / n, fan_out / n]`, zero, whatever `init_lora_weights` says. `n` is `nblocks` and divides both sides of the
/// matrix. Parameters of the cut factor: an `n`th of LoRA's. The difference is LoRA's.
///
/// A place is meant where its path holds one of the words (HF PEFT's `pattern in target_name`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BdLoraConfig {
    /// Places where `A` is cut.
    pub target_modules_bd_a: Option<Vec<String>>,
    /// Places where `B` is cut.
    pub target_modules_bd_b: Option<Vec<String>>,
    /// Number of blocks; default 1.
    pub nblocks: usize,
    /// Refuse places that neither list means, which have a plain LoRA otherwise; default true.
    pub match_strict: bool,
}

impl Default for BdLoraConfig {
    fn default() -> Self {
        Self {
            target_modules_bd_a: None,
            target_modules_bd_b: None,
            nblocks: 1,
            match_strict: true,
        }
    }
}

/// Which factor is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    A,
    B,
}

fn refuse<T>(reason: String) -> Result<T, Error> {
    Err(Error::config("use_bdlora", reason))
}

impl BdLoraConfig {
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.nblocks == 0 {
            return refuse("nblocks: expected 1 or more, found 0".into());
        }
        let (a, b) = (words(&self.target_modules_bd_a), words(&self.target_modules_bd_b));
        match a.iter().find(|word| b.contains(word)) {
            Some(word) => refuse(format!(
                "`{word}` is in target_modules_bd_a and in target_modules_bd_b; expected it in one"
            )),
            None => Ok(()),
        }
    }

    /// The factor that is cut at a place of rank `r`, if one is.
    pub(crate) fn cut(&self, site: &Site, r: usize) -> Result<Option<Cut>, Error> {
        let path = &site.path;
        let meant = |list: &Option<Vec<String>>| {
            words(list).iter().any(|word| path.contains(word.as_str()))
        };
        let cut = match (meant(&self.target_modules_bd_a), meant(&self.target_modules_bd_b)) {
            (true, true) => {
                return refuse(format!(
                    "target_modules_bd_a and target_modules_bd_b both mean {path}; expected one of them"
                ));
            }
            (false, false) if self.match_strict => {
                return refuse(format!(
                    "neither target_modules_bd_a nor target_modules_bd_b means {path}; expected one \
                     of them, or match_strict = false for a plain LoRA there"
                ));
            }
            (true, false) => Cut::A,
            (false, true) => Cut::B,
            (false, false) => return Ok(None),
        };
        let (what, side) = match cut {
            Cut::A => ("inputs", site.fan_in()),
            Cut::B => ("outputs", site.fan_out()),
        };
        let n = self.nblocks;
        if !(r.is_multiple_of(n) && side.is_multiple_of(n)) {
            return refuse(format!(
                "nblocks: expected a divisor of the rank {r} and of the {side} {what} of {path}, found {n}"
            ));
        }
        Ok(Some(cut))
    }
}

fn words(list: &Option<Vec<String>>) -> &[String] {
    list.as_deref().unwrap_or_default()
}

/// The factor that is cut at a place: it is held as its blocks beside each other, `[rows / n, columns]`.
#[derive(Module, Debug)]
pub struct Blocks {
    /// 1 within the blocks and 0 beside them, `[rows, columns]`, constant.
    within: Tensor<2>,
    #[module(skip)]
    cut_a: bool,
}

impl Blocks {
    /// Of the factor's shape.
    pub(crate) fn new(cut: Cut, n: usize, place: &Place<'_>) -> Self {
        let shape = match cut {
            Cut::A => [place.site.fan_in(), place.r],
            Cut::B => [place.r, place.site.fan_out()],
        };
        Self { within: within(shape, n, place.device), cut_a: cut == Cut::A }
    }

    /// How the factors begin, the cut one drawn anew.
    pub(crate) fn drawn(
        cut: Cut,
        n: usize,
        place: &Place<'_>,
        (a, b): Pair,
        rng: &mut ChaCha8Rng,
    ) -> Pair {
        let (r, fan_in, fan_out) = (place.r, place.site.fan_in(), place.site.fan_out());
        match cut {
            Cut::A => {
                // PyTorch's `kaiming_uniform_` with its default slope of 0.
                let bound = (6.0 * n as f32 / fan_in as f32).sqrt();
                (uniform([fan_in / n, r], bound, rng, place.device), b)
            }
            Cut::B => (a, Tensor::zeros([r / n, fan_out], place.device)),
        }
    }

    /// `diag(F₁, .., Fₙ)` of the one that is cut.
    pub(crate) fn whole(&self, (a, b): Pair) -> Pair {
        let diagonal = |blocks: Tensor<2>| {
            let n = self.within.dims()[0] / blocks.dims()[0];
            self.within.clone().cast(blocks.dtype()) * blocks.repeat_dim(0, n)
        };
        if self.cut_a { (diagonal(a), b) } else { (a, diagonal(b)) }
    }
}

fn within([rows, columns]: [usize; 2], n: usize, device: &Device) -> Tensor<2> {
    let (height, width) = (rows / n, columns / n);
    let at = |i: usize| i / columns / height == i % columns / width;
    let values: Vec<f32> = (0..rows * columns).map(|i| f32::from(u8::from(at(i)))).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), device).without_autodiff()
}
