//! What lies beside the factors where LoRAs are combined: layers trained whole, and biases.

use crate::combine::Weighted;
use crate::lora::LoraAdapter;
use crate::plain::{bias_copy, is_whole, plain_copy};
use burn::module::Param;
use burn::tensor::Tensor;
use burn_peft_core::{Error, Site, TrainedCopy};

/// The trained copy at a place: a whole one of one adapter, the mean of several, or the biases of all.
pub(crate) fn copied(
    site: &Site,
    parts: &[Weighted<'_>],
    by_hf: bool,
) -> Result<Option<TrainedCopy>, Error> {
    let path = &site.path;
    let holders = || parts.iter().filter_map(|(of, _, weight)| Some((of.copy(path)?, *weight)));
    if holders().any(|(copy, _)| is_whole(copy)) {
        let adapted = parts.iter().any(|(adapters, ..)| adapters.get(path).is_some());
        if adapted || holders().any(|(copy, _)| !is_whole(copy)) {
            let reason = "one adapter trains the layer whole (modules_to_save) and another changes it in \
                          another way, which has no sum; expected all to train it whole, or one alone";
            return Err(Error::place(path, reason));
        }
        let wholes: Vec<(&TrainedCopy, f64)> = holders().collect();
        return match &wholes[..] {
            [(whole, _)] => Ok(Some(plain_copy(whole))),
            _ if by_hf => Err(hf_cannot(site, "has no rule for a layer that several train whole")),
            _ => mean(path, &wholes).map(Some),
        };
    }
    let Some(b) = &site.bias else {
        return Ok(None);
    };
    let mut sum: Option<Tensor<1>> = None;
    for (copy, weight) in holders() {
        if let Some(bias) = &copy.bias {
            let bias = bias.val().without_autodiff();
            let base = b.clone().cast(bias.dtype());
            let delta = (bias - base.clone()) * weight;
            sum = Some(sum.unwrap_or(base) + delta);
        }
    }
    match sum {
        Some(_) if by_hf => Err(hf_cannot(site, "has no rule for trained biases")),
        sum => Ok(sum.map(bias_copy)),
    }
}

/// `Σ wᵢ·Wᵢ / Σ wᵢ` of layers trained whole, their biases likewise.
fn mean(path: &str, wholes: &[(&TrainedCopy, f64)]) -> Result<TrainedCopy, Error> {
    fn of<const D: usize>(
        wholes: &[(&TrainedCopy, f64)],
        total: f64,
        part: impl Fn(&TrainedCopy) -> &Option<Param<Tensor<D>>>,
    ) -> Option<Param<Tensor<D>>> {
        let share = |(whole, weight): &(&TrainedCopy, f64)| {
            Some(part(whole).as_ref()?.val().without_autodiff() * (weight / total))
        };
        let shares: Option<Vec<Tensor<D>>> = wholes.iter().map(share).collect();
        shares?.into_iter().reduce(|sum, share| sum + share).map(Param::from_tensor)
    }
    let total: f64 = wholes.iter().map(|(_, weight)| weight).sum();
    if total.abs() < 1e-6 {
        let reason = "several adapters train the layer whole (modules_to_save) and their weights add up to \
                      0; expected weights with a mean";
        return Err(Error::place(path, reason));
    }
    Ok(TrainedCopy {
        weight: of(wholes, total, |whole| &whole.weight),
        scale: of(wholes, total, |whole| &whole.scale),
        bias: of(wholes, total, |whole| &whole.bias),
    })
}

/// `Σ wᵢ·sᵢ·biasᵢ` of `lora_bias`; none where no adapter has one.
pub(crate) fn own_bias(
    site: &Site,
    held: &[(&LoraAdapter, f64)],
    by_hf: bool,
) -> Result<Option<Tensor<1>>, Error> {
    let mut sum: Option<Tensor<1>> = None;
    for (adapter, weight) in held {
        if let Some(bias) = &adapter.lora_bias {
            let bias = bias.val().without_autodiff() * (weight * adapter.scaling);
            sum = Some(match sum {
                Some(sum) => sum + bias,
                None => bias,
            });
        }
    }
    match sum {
        Some(_) if by_hf => Err(hf_cannot(site, "loses lora_bias")),
        sum => Ok(sum),
    }
}

/// Refuses what HF PEFT's rules have no answer to.
pub(crate) fn hf_cannot(site: &Site, what: &str) -> Error {
    let reason = format!("HF PEFT {what} here; expected a rule without hf_ before its name");
    Error::place(&site.path, reason)
}
