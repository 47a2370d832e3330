//! What the places of a model share: constant random matrices, as large as the largest place asks for,
//! of which each place works with a corner.

use crate::torch_random::TorchRandom;
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, PlaceTensors, Site};

/// The widest input and output among the places, and who has them.
pub(crate) struct Largest {
    pub(crate) fan_in: usize,
    pub(crate) fan_out: usize,
    places: String,
}

impl Largest {
    pub(crate) fn of(sites: &[&Site]) -> Self {
        let widest_in = sites.iter().max_by_key(|site| site.fan_in());
        let widest_out = sites.iter().max_by_key(|site| site.fan_out());
        let path = |site: Option<&&Site>| site.map_or_else(String::new, |site| site.path.clone());
        Self {
            fan_in: widest_in.map_or(0, |site| site.fan_in()),
            fan_out: widest_out.map_or(0, |site| site.fan_out()),
            places: format!("for `{}` and `{}`", path(widest_in), path(widest_out)),
        }
    }

    /// Refuses matrices of `count` numbers for each input and output that no tensor holds.
    pub(crate) fn check(&self, field: &'static str, count: usize) -> Result<(), Error> {
        let numbers = count.checked_mul(self.fan_in.max(self.fan_out));
        match numbers.is_some_and(|numbers| numbers <= i32::MAX as usize) {
            true => Ok(()),
            false => {
                let reason = format!("{count} makes more than 2^31 numbers {}", self.places);
                Err(Error::config(field, reason))
            }
        }
    }

    /// Takes a matrix of this size out of the file; where another size is found, the places say why
    /// this one is expected.
    pub(crate) fn take<const D: usize>(
        &self,
        file: &mut PlaceTensors<'_>,
        name: &str,
        shape: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, Error> {
        file.take(name, shape, device).map_err(|error| match error {
            Error::Tensor { tensor, expected, found } => {
                Error::tensor(tensor, format!("{expected} {}", self.places), found)
            }
            other => other,
        })
    }
}

/// What [`Method::share`](burn_peft_core::Method::share) made.
pub(crate) fn held<T: Clone>(shared: &Option<T>, field: &'static str) -> Result<T, Error> {
    let reason = "the places share what it describes, which is made before any of them";
    shared.clone().ok_or_else(|| Error::config(field, reason))
}

/// Frozen `A [fan_in, _]` and `B [_, fan_out]` of the largest place.
#[derive(Module, Debug)]
pub struct Projections {
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Projections {
    /// As HF PEFT draws them from its key: `A` with `inner_a` columns, `B` with `inner_b` rows, both
    /// Kaiming-uniform.
    pub(crate) fn draw(
        largest: &Largest,
        [inner_a, inner_b]: [usize; 2],
        key: u64,
        device: &Device,
    ) -> Self {
        let mut torch = TorchRandom::manual_seed(key);
        let device = device.clone().inner();
        let mut matrix = |shape: [usize; 2]| -> Tensor<2> {
            let values = torch.kaiming_uniform(shape[0] * shape[1], shape[1]);
            Tensor::from_data(TensorData::new(values, shape), &device)
        };
        let a = matrix([inner_a, largest.fan_in]).transpose();
        Self { a, b: matrix([largest.fan_out, inner_b]).transpose() }
    }

    /// Out of HF PEFT's file, where they lie transposed.
    pub(crate) fn take(
        largest: &Largest,
        [inner_a, inner_b]: [usize; 2],
        file: &mut PlaceTensors<'_>,
        names: [&str; 2],
        device: &Device,
    ) -> Result<Self, Error> {
        let device = device.clone().inner();
        let a = largest.take(file, names[0], [inner_a, largest.fan_in], &device)?;
        let b = largest.take(file, names[1], [largest.fan_out, inner_b], &device)?;
        Ok(Self { a: a.transpose(), b: b.transpose() })
    }

    pub(crate) fn tensors(&self, [a, b]: [&str; 2]) -> Vec<(String, TensorData)> {
        let data = |matrix: &Tensor<2>| matrix.clone().transpose().into_data();
        vec![(a.into(), data(&self.a)), (b.into(), data(&self.b))]
    }

    /// The place's `A [fan_in, columns]`.
    pub(crate) fn a(&self, fan_in: usize, columns: usize) -> Tensor<2> {
        corner(&self.a, [fan_in, columns])
    }

    /// The place's `B [_, fan_out]`.
    pub(crate) fn b(&self, fan_out: usize) -> Tensor<2> {
        corner(&self.b, [self.b.dims()[0], fan_out])
    }
}

/// The first `shape` numbers along each axis.
pub(crate) fn corner<const D: usize>(tensor: &Tensor<D>, shape: [usize; D]) -> Tensor<D> {
    match tensor.dims() == shape {
        true => tensor.clone(),
        false => tensor.clone().slice(shape.map(|size| 0..size)),
    }
}
