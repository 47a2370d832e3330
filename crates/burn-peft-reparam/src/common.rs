//! What the configurations of many methods have in common.

use burn::nn::Dropout;
use burn::tensor::{Distribution, Tensor};
use burn_peft_core::{Biases, Error};
use serde::{Deserialize, Serialize, Serializer};

/// Which biases of the model are trained beside a method: HF PEFT's `bias`, which is "none", "all" or
/// the method's name with "_only".
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted layers; the word as it stands in the file, such as "vera_only".
    Only(String),
}

impl From<String> for Bias {
    fn from(word: String) -> Self {
        match word.as_str() {
            "none" => Self::None,
            "all" => Self::All,
            _ => Self::Only(word),
        }
    }
}

impl From<Bias> for String {
    fn from(bias: Bias) -> Self {
        match bias {
            Bias::None => "none".into(),
            Bias::All => "all".into(),
            Bias::Only(word) => word,
        }
    }
}

impl Bias {
    /// As the core wants it.
    pub(crate) fn biases(&self) -> Biases {
        match self {
            Self::None => Biases::None,
            Self::All => Biases::All,
            Self::Only(_) => Biases::Adapted,
        }
    }

    /// Refuses every word but "none", "all" and `only`.
    pub(crate) fn check(&self, only: &str) -> Result<(), Error> {
        match self {
            Self::Only(word) if word != only => {
                let reason = format!("expected none, all or {only}, found {word}");
                Err(Error::config("bias", reason))
            }
            _ => Ok(()),
        }
    }
}

/// Writes 16 and not 16.0: HF PEFT declares these fields as integers.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(crate) fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

/// `value` to 15 digits, which every reader of JSON reads as the same number.
pub(crate) fn fifteen_digits(value: f64) -> f64 {
    format!("{value:.14e}").parse().unwrap_or(value)
}

/// Refuses 0.
pub(crate) fn positive(field: &'static str, value: usize) -> Result<(), Error> {
    match value {
        0 => Err(Error::config(field, "expected 1 or more, found 0")),
        _ => Ok(()),
    }
}

/// Refuses NaN and infinity.
pub(crate) fn finite(field: &'static str, value: f64) -> Result<(), Error> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::config(field, format!("expected a finite number, found {value}"))),
    }
}

/// Refuses what is not in [0, 1).
pub(crate) fn probability(field: &'static str, value: f64) -> Result<(), Error> {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => {
            Err(Error::config(field, format!("expected a probability in [0, 1), found {value}")))
        }
    }
}

/// Whether [`drop`] changes anything.
pub(crate) fn drops<const F: usize>(dropout: &Dropout, factor: &Tensor<F>) -> bool {
    dropout.prob > 0.0 && dropout.training.is_enabled() && factor.is_autodiff()
}

/// `dropout(x)` in training, in the type of the trained `factor`. The mask is drawn here and not by
/// Burn's layer, because the input of the first adapted layer is a plain tensor, where that layer
/// believes it is not training.
pub(crate) fn drop<const D: usize, const F: usize>(
    x: &Tensor<D>,
    dropout: &Dropout,
    factor: &Tensor<F>,
) -> Tensor<D> {
    let x = x.clone().cast(factor.dtype());
    if !drops(dropout, factor) {
        return x;
    }
    let keep = 1.0 - dropout.prob;
    let mask = x.clone().without_autodiff().random_like(Distribution::Bernoulli(keep));
    x * (mask / keep)
}
