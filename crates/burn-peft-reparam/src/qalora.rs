//! QA-LoRA (arXiv 2309.14717): LoRA over the means of groups of inputs.

use crate::init::{Pair, Place, bound};
use crate::random::uniform;
use burn::module::Module;
use burn_peft_core::{Error, Site};
use rand::rngs::ChaCha8Rng;

/// QA-LoRA (arXiv 2309.14717, section 3.3): inputs are pooled in groups of `g`, so that the difference is one number
/// for each group and output, which a quantized base can take into its zero points.
///
/// `y = xW + b + s·(fan_in / g)·pool(x)·A·B` with `A [fan_in / g, r]`, `U(±√(g / fan_in))`, and LoRA's `B`; as a
/// difference of weights each row of `A` stands for the `g` inputs of its group, divided by `g` and times
/// `fan_in / g` (the scale of HF PEFT, where the paper sums). `g` divides `fan_in`. Parameters: `r·(fan_in / g +
/// fan_out)` a place.
///
/// HF PEFT has it over GPTQ layers, and a plain LoRA over others whatever `use_qalora` says. Here it is the same function
/// over a base of floats, such as the quantized one with its weights written out.
#[derive(Module, Debug)]
pub struct Pooled {
    /// `g`.
    pub group_size: usize,
}

/// The number of groups at a place.
pub(crate) fn groups(group_size: usize, site: &Site) -> Result<usize, Error> {
    let fan_in = site.fan_in();
    match fan_in.checked_rem(group_size) {
        Some(0) => Ok(fan_in / group_size),
        _ => {
            let reason = format!(
                "expected a divisor of the {fan_in} inputs of {}, found {group_size}",
                site.path
            );
            Err(Error::config("qalora_group_size", reason))
        }
    }
}

impl Pooled {
    /// How the factors begin: `A` is drawn for the groups, whatever `init_lora_weights` says.
    pub(crate) fn drawn(
        groups: usize,
        place: &Place<'_>,
        (_, b): Pair,
        rng: &mut ChaCha8Rng,
    ) -> Pair {
        (uniform([groups, place.r], bound(groups), rng, place.device), b)
    }

    /// `A [fan_in, r]` of all inputs.
    pub(crate) fn whole(&self, (a, b): Pair) -> Pair {
        let ([groups, r], g) = (a.dims(), self.group_size);
        let each = a.unsqueeze_dim::<3>(1).repeat_dim(1, g).reshape([groups * g, r]);
        (each * (groups as f64 / g as f64), b)
    }
}
