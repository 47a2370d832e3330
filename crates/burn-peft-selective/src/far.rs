//! FAR: the outputs of layers that go farthest when all are trained (arXiv 2205.01541).

use crate::lt_sft::check_tuning;
use crate::mask::{Chosen, Mask};
use crate::parameter::Parameter;
use crate::selective::{Criterion, Scored, Selective, share};
use burn::tensor::Tensor;
use burn_peft_core::{Error, Kind, Part, Slope, Statistic, Tuning};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// FAR, freeze and reconfigure (arXiv 2205.01541): a short full fine-tuning comes first, the priming; the
/// nodes that went farthest by `Σ|w' - w|`, the sum over a node's weights and its bias, are then trained, and
/// the others stay frozen. A node is one output of a layer: a column of `W [fan_in, fan_out]`. The paper's
/// places are the layers of the feed-forward network ("intermediate.dense", "output.dense").
///
/// The priming is a full fine-tuning as in [`LtSft`](crate::LtSft), with the same options; the training
/// begins at the base model (whether the paper goes on from where the priming ended is not known to us). As
/// many nodes are chosen, of all places together, as `keep_ratio` of their numbers has room for; 0.4 by default
/// (from memory). Shapes, file, parameter count and errors are [`Selective`]'s.
pub type Far = Selective<Nodes>;

/// The criterion of [`Far`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nodes {
    /// Rate of the first step of the priming; default 5e-5.
    pub full_learning_rate: f64,
    /// How often the priming sees each batch; default 1.
    pub full_epochs: usize,
}

impl Default for Nodes {
    fn default() -> Self {
        Self { full_learning_rate: 5e-5, full_epochs: 1 }
    }
}

impl Criterion for Nodes {
    const NAME: &'static str = "FAR";
    const KEEP_RATIO: f64 = 0.4;
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv1d, Kind::Conv2d];

    fn check(&self) -> Result<(), Error> {
        check_tuning(self.full_learning_rate, self.full_epochs)
    }

    fn wants(&self) -> Option<Statistic> {
        let (learning_rate, epochs) = (self.full_learning_rate, self.full_epochs);
        let tuning = Some(Tuning { learning_rate, epochs });
        Some(Statistic::Slopes { part: Part::Whole, tuning })
    }

    fn score(&self, _base: Tensor<1>, slope: Option<&Slope>) -> Option<Tensor<1>> {
        Some(slope?.change.clone()?.abs())
    }

    fn choose(&self, scored: &[Scored], keep_ratio: f64) -> Mask {
        // Of each node: how far it went, and how many numbers it has.
        let mut nodes: BTreeMap<(usize, usize), (f64, usize)> = BTreeMap::new();
        let places: Vec<&str> = scored.iter().map(|one| one.path.as_str()).collect();
        let place = |one: &Scored| places.iter().position(|path| *path == one.path).unwrap_or(0);
        for one in scored {
            let width = width(one);
            for (node, row) in one.scores.chunks(width).enumerate() {
                let sum = nodes.entry((place(one), node)).or_default();
                sum.0 += row.iter().map(|change| f64::from(*change)).sum::<f64>();
                sum.1 += row.len();
            }
        }
        let mut order: Vec<_> = nodes.into_iter().collect();
        order.sort_by(|(a, (far_a, _)), (b, (far_b, _))| far_b.total_cmp(far_a).then(a.cmp(b)));
        let mut room = share(scored, keep_ratio);
        let learners: Vec<(usize, usize)> = order
            .into_iter()
            .take_while(|(_, (_, size))| {
                let fits = *size <= room;
                room = room.saturating_sub(*size);
                fits
            })
            .map(|(node, _)| node)
            .collect();
        let one = |parameter: &Scored| {
            let (width, at) = (width(parameter), place(parameter));
            let own = learners.iter().filter(|(place, _)| *place == at);
            let numbers = own.flat_map(|(_, node)| node * width..(node + 1) * width);
            let indices: Vec<u32> = numbers.filter_map(|at| u32::try_from(at).ok()).collect();
            Some((parameter.name.clone(), Chosen::new(parameter.shape.clone(), indices)?))
        };
        scored.iter().filter_map(one).collect()
    }

    fn samples() -> Vec<(Self, f64)> {
        let long = Self { full_learning_rate: 1e-2, full_epochs: 3 };
        vec![(long, 0.9), (Self::default(), 1.0)]
    }
}

/// Numbers of one node in a parameter: the checkpoint has outputs first.
fn width(parameter: &Scored) -> usize {
    match parameter.parameter {
        Parameter::Weight => parameter.shape.iter().skip(1).product::<usize>().max(1),
        Parameter::Bias => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_chosen_whole_with_their_bias() {
        let scored = |parameter, name: &str, shape: &[usize], scores: &[f32]| Scored {
            path: "dense".into(),
            kind: Kind::Linear,
            parameter,
            name: name.into(),
            shape: shape.to_vec(),
            scores: scores.to_vec(),
        };
        let weight = [0.5, 0.5, 3.0, 0.0, 0.0, 1.0];
        let all = [
            scored(Parameter::Weight, "dense.weight", &[3, 2], &weight),
            scored(Parameter::Bias, "dense.bias", &[3], &[2.5, 0.0, 0.5]),
        ];
        // Sums 3.5, 3 and 1.5; there is room for 7 of 9 numbers, and a node has 3.
        let mask = Nodes::default().choose(&all, 0.8);
        assert_eq!(mask.get("dense.weight").expect("is there").indices(), [0, 1, 2, 3]);
        assert_eq!(mask.get("dense.bias").expect("is there").indices(), [0, 1]);
        assert_eq!(Nodes::default().choose(&all, 0.4).count(), 3);
    }
}
