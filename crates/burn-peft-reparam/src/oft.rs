//! OFT: blocks of the input rotated by trained orthogonal matrices (arXiv 2306.07280, 2506.19847).

use crate::common::{Bias, finite, probability};
use crate::orthogonal::{MOST_TERMS, Skew, cayley, drop_blocks, neumann, turn, turn_rows};
use crate::random::normal;
use burn::module::{Module, Param};
use burn::nn::conv::Conv2d;
use burn::nn::{Dropout, DropoutConfig, Embedding, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Scope, Site, Targets, composed,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Orthogonal fine-tuning (arXiv 2306.07280; on the input as in OFTv2, arXiv 2506.19847):
/// `y = x·diag(R₁ … Rₙ)·W + b`, each `Rᵢ [size, size]` orthogonal, out of a skew-symmetric `Qᵢ`.
///
/// With Cayley and Neumann `R = I + 2Q + 2Q² + … + Qᵏ`, nearly `(I + Q)(I - Q)⁻¹`; with Cayley alone
/// `R = (I - Q)(I + Q)⁻¹`, exactly: HF PEFT's two formulas turn in opposite directions, and so do these.
/// Parameters: `n·size·(size - 1)/2` a place, or `size·(size - 1)/2` with `block_share`. `Q = 0` at the
/// start. Folds: `Δ(W) = (diag(R) - I)·W`; an embedding is rotated behind its table, `Δ(W) = W·(diag(R) - I)`.
/// A convolution's kernels are rotated as they are when HF PEFT merges (its forward on unmerged
/// kernels larger than 1x1 sums overlapping patches). Names and defaults are HF PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Oft {
    /// Number of blocks `n`; 0 (the default) leaves it to `oft_block_size`. As in HF PEFT, the nearest
    /// number that divides the width is taken.
    pub r: usize,
    /// `size`; 0 leaves it to `r`. Default 32; as in HF PEFT, the nearest that divides the width is taken.
    pub oft_block_size: usize,
    /// Share of the blocks that are left out in training, chosen anew each time; default 0. HF PEFT has
    /// the field and does not apply it.
    pub module_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "oft_only"; default none.
    pub bias: Bias,
    /// `Q = 0` at the start; `false` draws it from `N(0, 0.1²)`. Default true.
    pub init_weights: bool,
    /// COFT: each `Q` is held within a ball of radius `eps/√n`; default false. The gradient passes
    /// the projection as it is; [`OftAdapter::projected`] between steps is HF PEFT's way of it.
    pub coft: bool,
    /// The constraint of `coft`; default 6e-5.
    pub eps: f64,
    /// One `R` for all blocks; default false.
    pub block_share: bool,
    /// The series in place of the inverse; default true.
    pub use_cayley_neumann: bool,
    /// Terms of the series; default 5.
    pub num_cayley_neumann_terms: usize,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Oft {
    fn default() -> Self {
        Self {
            r: 0,
            oft_block_size: 32,
            module_dropout: 0.0,
            bias: Bias::None,
            init_weights: true,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            targets: Targets::default(),
        }
    }
}

/// What OFT trains at one place.
#[derive(Module, Debug)]
pub struct OftAdapter {
    /// The numbers above the diagonal of each `Q`, `[n, size·(size - 1)/2]`; `n = 1` where shared.
    pub oft_r: Param<Tensor<2>>,
    /// Terms of the series; `None` for the inverse.
    pub terms: Option<usize>,
    /// `eps` of COFT.
    pub eps: Option<f64>,
    /// Leaves blocks out in training.
    pub dropout: Dropout,
    /// Whether it is the outputs that are rotated, behind an embedding's table.
    pub behind: bool,
    skew: Skew,
}

impl OftAdapter {
    /// COFT's projection of the trained numbers, for between steps; nothing without `coft`.
    pub fn projected(mut self) -> Self {
        if let Some(eps) = self.eps {
            self.oft_r = self.oft_r.map(|q| within(q, eps));
        }
        self
    }

    /// `R [n, size, size]`.
    fn rotation(&self) -> Tensor<3> {
        let mut numbers = self.oft_r.val();
        if let Some(eps) = self.eps {
            let constant = numbers.clone().without_autodiff();
            numbers = (numbers - constant.clone()) + within(constant, eps);
        }
        let q = self.skew.of(numbers);
        let r = match self.terms {
            Some(terms) => neumann(q, terms), // ≈ (I + Q)(I - Q)⁻¹
            None => cayley(-q),               // (I - Q)(I + Q)⁻¹
        };
        drop_blocks(r, 1, &self.dropout)
    }
}

/// `Q·min(1, eps/√n / ‖Q‖)`, block by block; each number stands twice in `Q`.
fn within(numbers: Tensor<2>, eps: f64) -> Tensor<2> {
    let eps = eps / (numbers.dims()[0] as f64).sqrt();
    let norm = (numbers.clone() * numbers.clone() * 2.0).sum_dim(1).sqrt();
    numbers * (norm.clamp_min(1e-30).recip() * eps).clamp_max(1.0)
}

impl Adapter for OftAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let r = self.rotation();
        Some(Scope::plain().linear(layer, turn(x.clone().cast(r.dtype()), &r).cast(x.dtype())))
    }

    fn embedding(
        &self,
        _layer: &Embedding,
        _ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let r = self.rotation();
        let table = y.clone().cast(r.dtype());
        Some((turn(table.clone(), &r) - table).cast(y.dtype()))
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, _y: &Tensor<4>) -> Option<Tensor<4>> {
        composed::conv2d(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for OftAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let r = self.rotation();
        let own = w.clone().cast(r.dtype());
        let turned = match self.behind {
            true => turn(own.clone().unsqueeze(), &r).squeeze_dim(0),
            false => turn_rows(own.clone(), &r),
        };
        Some((turned - own).cast(w.dtype()))
    }
}

/// The divisor of `width` that HF PEFT takes for one asked for: the nearest, of two the smaller.
fn nearest_divisor(width: usize, asked: usize) -> usize {
    if asked >= width {
        return width;
    }
    let divides = |number: &usize| width.is_multiple_of(*number);
    let lower = (1..=asked).rev().find(divides).unwrap_or(1);
    let higher = (asked..=width).find(divides).unwrap_or(width);
    if asked - lower <= higher - asked { lower } else { higher }
}

impl Oft {
    /// With blocks of this size and these targets, and HF PEFT's defaults for the rest.
    pub fn new(oft_block_size: usize, targets: Targets) -> Self {
        Self { oft_block_size, targets, ..Self::default() }
    }

    /// Number and size of the blocks that are trained at a place.
    fn blocks(&self, site: &Site) -> Result<(usize, usize), Error> {
        let width = if site.kind == Kind::Embedding { site.fan_out() } else { site.fan_in() };
        let (field, asked, n, size) = if self.r == 0 {
            let size = nearest_divisor(width, self.oft_block_size);
            ("oft_block_size", self.oft_block_size, width / size, size)
        } else {
            let n = nearest_divisor(width, self.r);
            ("r", self.r, n, width / n)
        };
        if size < 2 {
            let reason = format!(
                "{asked} makes blocks of 1 out of the {width} inputs of {}; expected blocks of 2 or more",
                site.path
            );
            return Err(Error::config(field, reason));
        }
        if size.checked_mul(width).is_none_or(|numbers| numbers > i32::MAX as usize) {
            let reason = format!("blocks of {size} make more than 2^31 numbers at {}", site.path);
            return Err(Error::config(field, reason));
        }
        Ok((if self.block_share { 1 } else { n }, size))
    }

    fn adapter(&self, site: &Site, numbers: Tensor<2>, size: usize) -> OftAdapter {
        OftAdapter {
            terms: self.use_cayley_neumann.then_some(self.num_cayley_neumann_terms),
            eps: self.coft.then_some(self.eps),
            dropout: DropoutConfig::new(self.module_dropout).init(),
            skew: Skew::new(size, &numbers.device()),
            behind: site.kind == Kind::Embedding,
            oft_r: Param::from_tensor(numbers),
        }
    }
}

fn suffix(site: &Site) -> &'static str {
    if site.kind == Kind::Embedding { "oft_embedding_R.weight" } else { "oft_R.weight" }
}

impl Method for Oft {
    type Adapter = OftAdapter;
    type Shared = ();
    const NAME: &'static str = "OFT";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Embedding, Kind::Conv2d];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[("fan_in_fan_out", &[])];

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn biases(&self) -> Biases {
        self.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        if (self.r == 0) == (self.oft_block_size == 0) {
            let reason = format!(
                "expected either r or oft_block_size, and the other 0; found r {} and oft_block_size {}",
                self.r, self.oft_block_size
            );
            return Err(Error::config("oft_block_size", reason));
        }
        finite("eps", self.eps)?;
        if self.eps <= 0.0 {
            let reason = format!("expected more than 0, found {}", self.eps);
            return Err(Error::config("eps", reason));
        }
        if self.use_cayley_neumann && !(2..=MOST_TERMS).contains(&self.num_cayley_neumann_terms) {
            let reason =
                format!("expected 2 to {MOST_TERMS}, found {}", self.num_cayley_neumann_terms);
            return Err(Error::config("num_cayley_neumann_terms", reason));
        }
        probability("module_dropout", self.module_dropout)?;
        self.bias.check("oft_only")
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<OftAdapter, Error> {
        let (n, size) = self.blocks(site)?;
        let shape = [n, size * (size - 1) / 2];
        let numbers = match self.init_weights {
            true => Tensor::zeros(shape, device),
            false => normal(shape, 0.1, rng, device),
        };
        Ok(self.adapter(site, numbers, size))
    }

    fn fold(adapter: &OftAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, targets.clone());
        vec![
            Self { init_weights: false, bias: Bias::Only("oft_only".into()), ..plain.clone() },
            Self { module_dropout: 0.5, oft_block_size: 2, bias: Bias::All, ..plain.clone() },
            Self { coft: true, eps: 0.5, ..plain.clone() },
            Self { block_share: true, use_cayley_neumann: false, ..plain.clone() },
            Self { num_cayley_neumann_terms: 7, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.blocks(site).map_or(0, |(n, size)| n * size * (size - 1) / 2)
    }

    fn tensors(&self, site: &Site, adapter: &OftAdapter) -> Vec<(&'static str, TensorData)> {
        vec![(suffix(site), adapter.oft_r.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<OftAdapter, Error> {
        let (n, size) = self.blocks(site)?;
        let numbers = file.take(suffix(site), [n, size * (size - 1) / 2], device)?;
        Ok(self.adapter(site, numbers, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_of_hf_peft() {
        // By OFTLayer.adjust_oft_parameters.
        for (width, asked, found) in
            [(32, 32, 32), (48, 32, 24), (8, 6, 4), (8, 7, 8), (10, 4, 5), (7, 32, 7), (61, 32, 61)]
        {
            assert_eq!(nearest_divisor(width, asked), found, "{width} {asked}");
        }
    }

    #[test]
    fn a_number_of_blocks_is_as_good_as_their_size() {
        let layer = burn::nn::LinearConfig::new(12, 4).init(&Device::flex());
        let site = &burn_peft_core::Sites::of(&vec![layer], None).all[0];
        let by_size = Oft::new(3, Targets::default());
        let by_number = Oft { r: 4, oft_block_size: 0, ..by_size.clone() };
        assert_eq!(by_size.blocks(site).ok(), Some((4, 3)));
        assert_eq!(by_number.blocks(site).ok(), Some((4, 3)));
        by_number.check().expect("is one of the two");
        assert!(Oft { r: 4, ..by_size.clone() }.check().is_err());
        assert!(Oft { oft_block_size: 0, ..by_size }.check().is_err());
    }

    #[test]
    fn coft_holds_the_rotation_near() {
        let device = Device::flex();
        let numbers = Tensor::<2>::from_data([[0.3, 0.4, 0.0], [0.003, 0.0, 0.004]], &device);
        let held = within(numbers, 0.1 * 2.0).into_data();
        let held: Vec<f32> = held.iter::<f32>().collect();
        // The first block is brought to length eps/√2 = 0.5·√2·s, the second lies within.
        let expected = [0.06, 0.08, 0.0, 0.003, 0.0, 0.004];
        assert!(held.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{held:?}");
    }
}
