//! What LoRA's kin have in common: the options of a pair of thin factors, and its faces once the factors
//! are computed.

use crate::common::{Bias, finite, positive, probability};
use crate::random::uniform;
use crate::source::laid_out;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, PlaceTensors, Site, Targets, pattern_value};
use indexmap::IndexMap;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Options of the methods that train a pair `A [fan_in, r]`, `B [r, fan_out]`, in LoRA's words.
///
/// In the file the factors are matrices `(r, fan_in)` and `(fan_out, r)` at every kind of place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LowRank {
    /// Rank of the difference; default 8.
    pub r: usize,
    /// Scale of the difference, divided by `r` (or `√r`); default 8.
    pub lora_alpha: f64,
    /// Probability with which an input of `A` is zeroed in training; default 0.
    pub lora_dropout: f64,
    /// Scale by `1/√r` in place of `1/r`; default false.
    pub use_rslora: bool,
    /// Which biases of the model are trained beside it: "none", "all" or "lora_only"; default none.
    pub bias: Bias,
    /// Other ranks for layers whose path ends in a match of the key; the first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for LowRank {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            bias: Bias::None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            targets: Targets::default(),
        }
    }
}

impl LowRank {
    /// With this rank, alpha and targets, and the defaults for the rest.
    pub fn new(r: usize, lora_alpha: f64, targets: Targets) -> Self {
        Self { r, lora_alpha, targets, ..Self::default() }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        finite("lora_alpha", self.lora_alpha)?;
        for alpha in self.alpha_pattern.values() {
            finite("alpha_pattern", *alpha)?;
        }
        probability("lora_dropout", self.lora_dropout)?;
        self.bias.check("lora_only")
    }

    /// The rank at `site`.
    pub(crate) fn rank(&self, site: &Site) -> Result<usize, Error> {
        let path = &site.path;
        let r = pattern_value("rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.r);
        if r == 0 {
            let reason = format!("gives rank 0 at {path}; expected 1 or more");
            return Err(Error::config("rank_pattern", reason));
        }
        bounded("r", path, &[r, site.fan_in() + site.fan_out()])?;
        Ok(r)
    }

    /// `s` at `site` for the rank there.
    pub(crate) fn scaling(&self, site: &Site, r: usize) -> Result<f64, Error> {
        let alpha = pattern_value("alpha_pattern", &self.alpha_pattern, &site.path)?;
        let r = r as f64;
        Ok(alpha.unwrap_or(self.lora_alpha) / if self.use_rslora { r.sqrt() } else { r })
    }

    pub(crate) fn dropout(&self) -> Dropout {
        DropoutConfig::new(self.lora_dropout).init()
    }

    /// Numbers in `A` and `B`: `r·(fan_in + fan_out)`.
    pub(crate) fn numbers(&self, site: &Site) -> usize {
        self.rank(site).unwrap_or(self.r) * (site.fan_in() + site.fan_out())
    }

    /// `A ~ U(±1/√fan_in)` and `B = 0`, as LoRA begins.
    pub(crate) fn drawn(
        &self,
        site: &Site,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<(Tensor<2>, Tensor<2>), Error> {
        let r = self.rank(site)?;
        let bound = (1.0 / site.fan_in() as f32).sqrt();
        let a = uniform([site.fan_in(), r], bound, rng, device);
        Ok((a, Tensor::zeros([r, site.fan_out()], device)))
    }

    /// Both factors out of the file.
    pub(crate) fn take(
        &self,
        site: &Site,
        [a, b]: [&str; 2],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<(Tensor<2>, Tensor<2>), Error> {
        let r = self.rank(site)?;
        let a = taken(a, [site.fan_in(), r], file, device)?;
        Ok((a, taken(b, [r, site.fan_out()], file, device)?))
    }

    /// Two configurations that use every option.
    pub(crate) fn samples(targets: &Targets) -> [Self; 2] {
        let saving = Targets { modules_to_save: Some(vec!["head".into()]), ..targets.clone() };
        let dropping = Self {
            lora_dropout: 0.2,
            use_rslora: true,
            bias: Bias::Only("lora_only".into()),
            ..Self::new(4, 8.0, saving)
        };
        let patterned = Self {
            bias: Bias::All,
            rank_pattern: IndexMap::from([("query".into(), 2)]),
            alpha_pattern: IndexMap::from([("query".into(), 6.0)]),
            ..Self::new(4, 8.0, targets.clone())
        };
        [dropping, patterned]
    }
}

/// A factor as PyTorch stores it.
pub(crate) fn stored(factor: Tensor<2>) -> TensorData {
    factor.transpose().into_data()
}

/// The product of `sizes`, refused beyond 2^31 - 1.
pub(crate) fn bounded(field: &'static str, path: &str, sizes: &[usize]) -> Result<usize, Error> {
    let numbers = sizes.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
    match numbers.filter(|numbers| *numbers <= i32::MAX as usize) {
        Some(numbers) => Ok(numbers),
        None => {
            let reason = format!("makes more than 2^31 numbers at {path}; expected a smaller one");
            Err(Error::config(field, reason))
        }
    }
}

/// The inverse of [`stored`]: a factor of the file.
pub(crate) fn taken(
    name: &str,
    [rows, columns]: [usize; 2],
    file: &mut PlaceTensors<'_>,
    device: &Device,
) -> Result<Tensor<2>, Error> {
    let factor: Tensor<2> = file.take(name, [columns, rows], &device.clone().inner())?;
    Ok(laid_out(factor.transpose(), device))
}

/// The place's widths `(fan_in, fan_out)`, for the file of a method whose trained numbers would fit any.
pub(crate) fn shape(site: &Site) -> TensorData {
    TensorData::new(vec![site.fan_in() as i64, site.fan_out() as i64], [2])
}

/// Refuses a file whose [`shape`] by this name is another place's.
pub(crate) fn check_shape(
    name: &str,
    site: &Site,
    file: &mut PlaceTensors<'_>,
) -> Result<(), Error> {
    let (_, found) = file.take_ints(name)?;
    let expected = [site.fan_in() as i64, site.fan_out() as i64];
    match found == expected {
        true => Ok(()),
        false => {
            let tensor = format!("{}.{name}", site.path);
            Err(Error::tensor(tensor, format!("{expected:?}"), format!("{found:?}")))
        }
    }
}

/// The faces of an adapter by its `fn lora(&self) -> LoraAdapter`, with its `dropout` on the input;
/// `$trained` is a parameter of it, whose type the input takes.
macro_rules! faces_by_lora {
    ($adapter:ty, $($trained:ident).+) => {
        impl ::burn_peft_core::Adapter for $adapter {
            fn linear(
                &self,
                layer: &::burn::nn::Linear,
                x: &Tensor<3>,
                y: &Tensor<3>,
            ) -> Option<Tensor<3>> {
                let x = $crate::common::drop(x, &self.dropout, &self.$($trained).+.val());
                self.lora().linear(layer, &x, y)
            }

            fn linear_whole(
                &self,
                layer: &::burn::nn::Linear,
                x: &Tensor<3>,
            ) -> Option<Tensor<3>> {
                let drops = $crate::common::drops(&self.dropout, &self.$($trained).+.val());
                (!drops).then(|| self.lora().linear_whole(layer, x)).flatten()
            }

            fn embedding(
                &self,
                layer: &::burn::nn::Embedding,
                ids: &Tensor<2, ::burn::tensor::Int>,
                y: &Tensor<3>,
            ) -> Option<Tensor<3>> {
                self.lora().embedding(layer, ids, y)
            }

            fn conv1d(
                &self,
                layer: &::burn::nn::conv::Conv1d,
                x: &Tensor<3>,
                y: &Tensor<3>,
            ) -> Option<Tensor<3>> {
                let x = $crate::common::drop(x, &self.dropout, &self.$($trained).+.val());
                self.lora().conv1d(layer, &x, y)
            }

            fn conv2d(
                &self,
                layer: &::burn::nn::conv::Conv2d,
                x: &Tensor<4>,
                y: &Tensor<4>,
            ) -> Option<Tensor<4>> {
                let x = $crate::common::drop(x, &self.dropout, &self.$($trained).+.val());
                self.lora().conv2d(layer, &x, y)
            }

            fn by_token(&self) -> bool {
                true
            }
        }

        impl ::burn_peft_core::Fold for $adapter {
            fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
                self.lora().weight(w)
            }
        }
    };
}
pub(crate) use faces_by_lora;
