//! What the methods out of LyCORIS (arXiv 2309.14859) share: drop-outs of outputs and of whole places,
//! and the Tucker form of a convolution's kernels.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Distribution, Tensor};
use burn_peft_core::{Error, Site, pattern_value};
use indexmap::IndexMap;

/// What training drops of a difference: outputs (`rank_dropout`, which HF PEFT draws over the rows of
/// the weight), and at times all of it (`module_dropout`).
#[derive(Module, Debug)]
pub struct Drops {
    /// Probability with which an output's difference is zeroed.
    pub outputs: Dropout,
    /// Probability with which the whole difference is zeroed.
    pub place: Dropout,
    /// Whether the outputs that are left make up for those that are not.
    #[module(skip)]
    pub rescale: bool,
}

impl Drops {
    pub(crate) fn new(outputs: f64, place: f64, rescale: bool) -> Self {
        let dropout = |probability| DropoutConfig::new(probability).init();
        Self { outputs: dropout(outputs), place: dropout(place), rescale }
    }

    /// `δ`, whose outputs lie along `axis`, with what is dropped set to zero.
    pub(crate) fn apply<const D: usize>(&self, delta: Tensor<D>, axis: usize) -> Tensor<D> {
        let training = self.outputs.training.is_enabled() && delta.is_autodiff();
        let device = delta.device().inner();
        let drawn = |dropout: &Dropout, shape: [usize; D]| -> Option<Tensor<D>> {
            let keep = Distribution::Bernoulli(1.0 - dropout.prob);
            let options = (&device, delta.dtype());
            (training && dropout.prob > 0.0).then(|| Tensor::random(shape, keep, options))
        };
        let mut outputs = [1; D];
        outputs[axis] = delta.dims()[axis];
        let [outputs, place] = [(&self.outputs, outputs), (&self.place, [1; D])]
            .map(|(dropout, shape)| drawn(dropout, shape));
        let rescale = |mask: Tensor<D>| {
            // Where none is left there is nothing to rescale, and 0/0 would be no number.
            let kept = mask.clone().mean().clamp_min(f32::MIN_POSITIVE);
            if self.rescale { mask / kept.unsqueeze() } else { mask }
        };
        [outputs.map(rescale), place].into_iter().flatten().fold(delta, |delta, mask| delta * mask)
    }
}

/// The rank at a place: of the first key of `rank_pattern` that matches, or `r`.
pub(crate) fn rank(
    r: usize,
    pattern: &IndexMap<String, usize>,
    site: &Site,
) -> Result<usize, Error> {
    let path = &site.path;
    match pattern_value("rank_pattern", pattern, path)?.unwrap_or(r) {
        0 => {
            let reason = format!("gives rank 0 at {path}; expected 1 or more");
            Err(Error::config("rank_pattern", reason))
        }
        r => Ok(r),
    }
}

/// `s = alpha / r` at a place, the alpha being that of the first key of `alpha_pattern` that matches.
pub(crate) fn scaling(
    alpha: f64,
    pattern: &IndexMap<String, f64>,
    site: &Site,
    r: usize,
) -> Result<f64, Error> {
    Ok(pattern_value("alpha_pattern", pattern, &site.path)?.unwrap_or(alpha) / r as f64)
}

/// Refuses ranks whose tensors have more numbers than can be indexed; `numbers` is `None` where they
/// cannot even be counted.
pub(crate) fn indexable(r: usize, numbers: Option<usize>, site: &Site) -> Result<(), Error> {
    match numbers.is_some_and(|numbers| numbers <= i32::MAX as usize) {
        true => Ok(()),
        false => {
            let reason = format!("a rank of {r} makes more than 2^31 numbers at {}", site.path);
            Err(Error::config("r", reason))
        }
    }
}

/// The kernel `[height, width]` of a place that gets a Tucker core: a convolution that looks at more
/// than one point. HF PEFT gives one over time a width of 1.
pub(crate) fn core(wanted: bool, site: &Site) -> Option<[usize; 2]> {
    match *site.weight.shape().as_slice() {
        [_, _, kernel] if wanted && kernel > 1 => Some([kernel, 1]),
        [_, _, height, width] if wanted && (height, width) != (1, 1) => Some([height, width]),
        _ => None,
    }
}

/// `W[j', p] = Σᵢⱼ core[i, j, ·]·a[i, p]·b[j, j']`, as `[inputs · kernel, outputs]`: FedPara's third
/// proposition, a core `[r, r, height, width]` between `a [r, outputs]` and `b [r, inputs]`.
pub(crate) fn tucker(core: Tensor<4>, a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let [r, _, height, width] = core.dims();
    let inputs = b.dims()[1];
    let core = core.permute([1, 2, 3, 0]).reshape([r, height * width * r]);
    b.transpose().matmul(core).reshape([inputs * height * width, r]).matmul(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn dropped(drops: &Drops, device: &Device) -> Vec<f32> {
        let delta = drops.apply(Tensor::<3>::ones([2, 3, 64], device), 2);
        delta.into_data().try_to_vec().expect("is f32")
    }

    #[test]
    fn outputs_are_dropped_for_all_rows_and_made_up_for() {
        let device = Device::flex().autodiff();
        for rescale in [true, false] {
            let found = dropped(&Drops::new(0.5, 0.0, rescale), &device);
            let (first, rest) = found.split_at(64);
            let left = first.iter().filter(|&&v| v != 0.0).count();
            assert!((1..64).contains(&left), "{left} of 64 are left");
            assert!(rest.chunks(64).all(|row| row == first));
            let value = if rescale { 64.0 / left as f32 } else { 1.0 };
            assert!(first.iter().all(|&v| v == 0.0 || (v - value).abs() < 1e-5));
        }
    }

    #[test]
    fn a_place_is_dropped_whole() {
        let device = Device::flex().autodiff();
        let drops = Drops::new(0.0, 0.5, true);
        let draws: Vec<Vec<f32>> = (0..64).map(|_| dropped(&drops, &device)).collect();
        for value in [0.0, 1.0] {
            assert!(draws.iter().any(|draw| draw.iter().all(|&v| v == value)));
        }
        assert!(draws.iter().all(|draw| draw.iter().all(|&v| v == draw[0])));
        assert!(dropped(&drops, &Device::flex()).iter().all(|&v| v == 1.0), "drops in use");
    }
}
