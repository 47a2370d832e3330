//! BOFT: the input rotated by a butterfly of orthogonal blocks (arXiv 2311.06243).

use crate::common::{Bias, positive, probability};
use crate::orthogonal::{cayley, drop_blocks, turn, turn_rows};
use crate::random::normal;
use burn::module::{Module, Param};
use burn::nn::conv::Conv2d;
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed,
};
use burn_peft_kernels::linear;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Butterfly orthogonal fine-tuning (arXiv 2311.06243): `y = (x·B_m ⋯ B₂·B₁·W)∘s + b`.
///
/// Each of the `m` factors is `Bᵢ = Pᵢ·diag(R_i1 … R_in)·Pᵢᵀ`: blocks `R [size, size]` on inputs that
/// the permutation `Pᵢ` brings together from twice as far as the factor before, so that the product mixes
/// `size·2^(m-1)` inputs. `R = (I - Q)(I + Q)⁻¹` with `Q` the skew-symmetric half of a trained matrix, 0 at the
/// start; `s = 1` then. Parameters: `m·n·size² + fan_out` a place. Folds: `Δ(W) = (B_m ⋯ B₁·W)∘s - W`.
/// Names and defaults are HF PEFT's, which takes `m = 1` where it cannot compile its CUDA extension,
/// whatever was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Boft {
    /// `size`, a divisor of `fan_in`; 0 leaves it to `boft_block_num`. Default 4.
    pub boft_block_size: usize,
    /// `n`; 0 (the default) leaves it to `boft_block_size`.
    pub boft_block_num: usize,
    /// `m`; with more than 1, `size` is even and `n` a multiple of `2^(m-1)`. Default 1.
    pub boft_n_butterfly_factor: usize,
    /// Share of the blocks of one factor that are left out in training, chosen anew each time; default 0.
    pub boft_dropout: f64,
    /// Which biases of the model are trained beside it: "none", "all" or "boft_only"; default none.
    pub bias: Bias,
    /// An identity at the start; `false` draws the matrices from `N(0, 0.1²)` and `s` from `N(1, 0.1²)`.
    /// Default true.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Boft {
    fn default() -> Self {
        Self {
            boft_block_size: 4,
            boft_block_num: 0,
            boft_n_butterfly_factor: 1,
            boft_dropout: 0.0,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What BOFT trains at one place.
#[derive(Module, Debug)]
pub struct BoftAdapter {
    /// Matrices whose skew-symmetric halves are the `Q`, `[m, n, size, size]`.
    pub boft_r: Param<Tensor<4>>,
    /// `s [fan_out]`.
    pub boft_s: Param<Tensor<1>>,
    /// Leaves blocks out in training.
    pub dropout: Dropout,
    /// For each factor but the first: which input stands where behind `P`, and the way back.
    orders: Vec<Order>,
}

#[derive(Module, Debug)]
struct Order {
    to: Tensor<1, Int>,
    back: Tensor<1, Int>,
}

impl Order {
    /// Of the factor `i > 0`: within each stretch of `size·2^i` inputs, cut into pieces of `size/2`, first
    /// the even pieces and then the odd ones.
    fn new(fan_in: usize, size: usize, i: usize, device: &Device) -> Self {
        let (stretch, piece) = (size << i, size / 2);
        let pieces = stretch / piece;
        let mut back = Vec::with_capacity(fan_in);
        for start in (0..fan_in).step_by(stretch) {
            for from in (0..pieces).step_by(2).chain((1..pieces).step_by(2)) {
                back.extend((0..piece).map(|k| (start + from * piece + k) as i32));
            }
        }
        let mut to = vec![0_i32; fan_in];
        for (place, from) in back.iter().enumerate() {
            to[*from as usize] = place as i32;
        }
        let device = device.clone().inner();
        let tensor = |order| Tensor::from_data(TensorData::new(order, [fan_in]), &device);
        Self { to: tensor(to), back: tensor(back) }
    }
}

impl BoftAdapter {
    /// The rotations of each factor, `m` times `[n, size, size]`.
    fn rotations(&self) -> Vec<Tensor<3>> {
        let [m, n, size, _] = self.boft_r.dims();
        let r = self.boft_r.val().reshape([m * n, size, size]);
        let q = (r.clone() - r.swap_dims(1, 2)) * 0.5;
        drop_blocks(cayley(-q), m, &self.dropout).chunk(m, 0)
    }

    /// `x·B_m ⋯ B₁`.
    fn turned(&self, x: Tensor<3>) -> Tensor<3> {
        self.rotations().iter().enumerate().rev().fold(x, |x, (i, r)| {
            match i.checked_sub(1).and_then(|i| self.orders.get(i)) {
                Some(Order { to, back }) => {
                    turn(x.select(2, to.clone()), r).select(2, back.clone())
                }
                None => turn(x, r),
            }
        })
    }

    /// `B_m ⋯ B₁·W`.
    fn turned_rows(&self, w: Tensor<2>) -> Tensor<2> {
        self.rotations().iter().enumerate().fold(w, |w, (i, r)| {
            match i.checked_sub(1).and_then(|i| self.orders.get(i)) {
                Some(Order { to, back }) => {
                    turn_rows(w.select(0, to.clone()), r).select(0, back.clone())
                }
                None => turn_rows(w, r),
            }
        })
    }
}

impl Adapter for BoftAdapter {
    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        let s = self.boft_s.val();
        let turned = self.turned(x.clone().cast(s.dtype())).cast(x.dtype());
        let y = linear(turned, layer.weight.val(), None);
        let scaled = (y.clone().cast(s.dtype()) * s.unsqueeze()).cast(y.dtype());
        Some(match &layer.bias {
            Some(bias) => scaled + bias.val().unsqueeze(),
            None => scaled,
        })
    }

    fn conv2d(&self, layer: &Conv2d, x: &Tensor<4>, _y: &Tensor<4>) -> Option<Tensor<4>> {
        composed::conv2d(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for BoftAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let s = self.boft_s.val();
        let own = w.clone().cast(s.dtype());
        Some((self.turned_rows(own.clone()) * s.unsqueeze() - own).cast(w.dtype()))
    }
}

impl Boft {
    /// With blocks of this size, so many factors and these targets, and HF PEFT's defaults for the rest.
    pub fn new(boft_block_size: usize, boft_n_butterfly_factor: usize, targets: Targets) -> Self {
        Self { boft_block_size, boft_n_butterfly_factor, targets, ..Self::default() }
    }

    /// `[m, n, size, size]` at a place.
    fn shape(&self, site: &Site) -> Result<[usize; 4], Error> {
        let (fan_in, m) = (site.fan_in(), self.boft_n_butterfly_factor);
        let refuse = |field: &str, found: usize, expected: &str| {
            let reason = format!(
                "expected {expected} at {}, which has {fan_in} inputs; found {found}",
                site.path
            );
            Err(Error::config(field, reason))
        };
        let (field, asked) = match self.boft_block_num {
            0 => ("boft_block_size", self.boft_block_size),
            n => ("boft_block_num", n),
        };
        if asked == 0 || !fan_in.is_multiple_of(asked) {
            return refuse(field, asked, "a divisor of the inputs");
        }
        let other = fan_in / asked;
        let (n, size) = if self.boft_block_num == 0 { (other, asked) } else { (asked, other) };
        if size < 2 || (m > 1 && !size.is_multiple_of(2)) {
            let even = if m > 1 { "an even size of blocks" } else { "blocks of 2 or more" };
            return refuse(field, asked, even);
        }
        let mixed = m.checked_sub(1).and_then(|m| 1_usize.checked_shl(u32::try_from(m).ok()?));
        if !mixed.is_some_and(|mixed| n.is_multiple_of(mixed)) {
            let expected = format!("so many factors that 2^(m-1) divides the {n} blocks");
            return refuse("boft_n_butterfly_factor", m, &expected);
        }
        let numbers = size.checked_mul(fan_in).and_then(|numbers| numbers.checked_mul(m));
        if numbers.is_none_or(|numbers| numbers > i32::MAX as usize) {
            return refuse(field, asked, "less than 2^31 numbers");
        }
        Ok([m, n, size, size])
    }

    fn adapter(&self, site: &Site, r: Tensor<4>, s: Tensor<1>) -> BoftAdapter {
        let [m, _, size, _] = r.dims();
        let order = |i| Order::new(site.fan_in(), size, i, &r.device());
        BoftAdapter {
            orders: (1..m).map(order).collect(),
            boft_r: Param::from_tensor(r),
            boft_s: Param::from_tensor(s),
            dropout: DropoutConfig::new(self.boft_dropout).init(),
        }
    }
}

/// HF PEFT's `s`: a column of a linear layer, a row of a convolution.
fn scale_shape(site: &Site) -> [usize; 2] {
    if site.kind == Kind::Linear { [site.fan_out(), 1] } else { [1, site.fan_out()] }
}

impl Method for Boft {
    type Adapter = BoftAdapter;
    type Shared = ();
    const NAME: &'static str = "BOFT";
    const KINDS: &'static [Kind] = &[Kind::Linear, Kind::Conv2d];
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
        let (size, n) = (self.boft_block_size, self.boft_block_num);
        if (size == 0) == (n == 0) {
            let reason = format!(
                "expected either boft_block_size or boft_block_num, and the other 0; \
                 found boft_block_size {size} and boft_block_num {n}"
            );
            return Err(Error::config("boft_block_size", reason));
        }
        positive("boft_n_butterfly_factor", self.boft_n_butterfly_factor)?;
        probability("boft_dropout", self.boft_dropout)?;
        self.bias.check("boft_only")
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
    ) -> Result<BoftAdapter, Error> {
        let (shape, out) = (self.shape(site)?, [site.fan_out()]);
        let (r, s) = match self.init_weights {
            true => (Tensor::zeros(shape, device), Tensor::ones(out, device)),
            false => {
                let r = normal(shape, 0.1, rng, device);
                (r, normal(out, 0.1, rng, device) + 1.0)
            }
        };
        Ok(self.adapter(site, r, s))
    }

    fn fold(adapter: &BoftAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(4, 1, targets.clone());
        vec![
            Self { init_weights: false, bias: Bias::Only("boft_only".into()), ..plain.clone() },
            Self { boft_dropout: 0.5, bias: Bias::All, ..plain.clone() },
            Self { boft_block_size: 2, boft_n_butterfly_factor: 2, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).map_or(0, |shape| shape.iter().product::<usize>() + site.fan_out())
    }

    fn tensors(&self, site: &Site, adapter: &BoftAdapter) -> Vec<(&'static str, TensorData)> {
        let s = adapter.boft_s.val().reshape(scale_shape(site));
        vec![("boft_R", adapter.boft_r.val().into_data()), ("boft_s", s.into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<BoftAdapter, Error> {
        let r = file.take("boft_R", self.shape(site)?, device)?;
        let s = file.take("boft_s", scale_shape(site), device)?;
        Ok(self.adapter(site, r, s.reshape([site.fan_out()])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_peft_core::Sites;

    #[test]
    fn pieces_from_twice_as_far_come_together() {
        let order = |size, i| -> Vec<i64> {
            Order::new(16, size, i, &Device::flex()).back.into_data().iter::<i64>().collect()
        };
        // By BOFTLayer.block_butterfly_perm.
        assert_eq!(order(2, 1), [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]);
        assert_eq!(order(2, 2), [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
        assert_eq!(order(4, 1), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
    }

    #[test]
    fn a_number_of_blocks_is_as_good_as_their_size() {
        let layer = burn::nn::LinearConfig::new(12, 4).init(&Device::flex());
        let site = &Sites::of(&vec![layer], None).all[0];
        let by_size = Boft::new(6, 2, Targets::default());
        let by_number = Boft { boft_block_num: 2, boft_block_size: 0, ..by_size.clone() };
        assert_eq!(by_size.shape(site).ok(), Some([2, 2, 6, 6]));
        assert_eq!(by_number.shape(site).ok(), Some([2, 2, 6, 6]));
        by_number.check().expect("is one of the two");
        for (size, factors, field) in [
            (5, 1, "boft_block_size"),
            (1, 1, "boft_block_size"),
            (3, 2, "boft_block_size"),
            (2, 3, "boft_n_butterfly_factor"),
            (2, 80, "boft_n_butterfly_factor"),
        ] {
            let refused = Boft::new(size, factors, Targets::default()).shape(site);
            assert!(refused.is_err_and(|e| e.to_string().contains(field)), "{size} {factors}");
        }
    }
}
