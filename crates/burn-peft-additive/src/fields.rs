//! What the configurations of many methods check.

use burn_peft_core::Error;

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

/// Refuses a list that is empty or names a token twice.
pub(crate) fn distinct(field: &'static str, tokens: &[usize]) -> Result<(), Error> {
    if tokens.is_empty() {
        return Err(Error::config(field, "is empty; expected the ids of one token or more"));
    }
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(Error::config(field, format!("names the token {} twice", pair[0]))),
    }
}

/// The product of two sizes, refused beyond 2^31 - 1.
pub(crate) fn bounded(field: &'static str, path: &str, [a, b]: [usize; 2]) -> Result<usize, Error> {
    match a.checked_mul(b).filter(|numbers| *numbers <= i32::MAX as usize) {
        Some(numbers) => Ok(numbers),
        None => {
            let reason = format!("makes more than 2^31 numbers at {path}; expected a smaller one");
            Err(Error::config(field, reason))
        }
    }
}
