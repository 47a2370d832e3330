//! The parameters of a place, in the checkpoint's layout and in ours.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Kind, Site, Value};

/// One of the two parameters of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Parameter {
    /// The weight; of a norm, its scale.
    Weight,
    /// The bias; of a norm, its shift.
    Bias,
}

impl Parameter {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Weight, Self::Bias];

    /// Its name in the Hugging Face checkpoint.
    pub fn name(self, site: &Site) -> String {
        match self {
            Self::Weight => format!("{}.weight", site.path),
            Self::Bias => format!("{}.bias", site.path),
        }
    }

    /// Its shape in the Hugging Face checkpoint; `None` where the place has none.
    pub fn shape(self, site: &Site) -> Option<Vec<usize>> {
        match (self, site.kind) {
            (Self::Bias, _) => site.bias.as_ref().map(|bias| bias.dims().to_vec()),
            (Self::Weight, Kind::Linear) => Some(vec![site.fan_out(), site.fan_in()]),
            (Self::Weight, _) => Some(site.weight.shape()),
        }
    }

    /// How many numbers it has; 0 where the place has none.
    pub(crate) fn size(self, site: &Site) -> usize {
        self.shape(site).map_or(0, |shape| shape.iter().product())
    }

    /// Its numbers in our order: of a weight read as a matrix `[fan_in, fan_out]`, row by row.
    pub(crate) fn numbers(self, site: &Site) -> Option<Tensor<1>> {
        let flat = |matrix: Tensor<2>| {
            let [rows, columns] = matrix.dims();
            matrix.reshape([rows * columns])
        };
        match (self, &site.weight) {
            (Self::Bias, _) => site.bias.clone(),
            (Self::Weight, Value::D1(scale)) => Some(scale.clone()),
            (Self::Weight, _) => site.matrix().map(flat),
        }
    }

    /// Whether the checkpoint has the outputs first, where ours come second.
    fn turned(self, site: &Site) -> bool {
        self == Self::Weight && !matches!(site.kind, Kind::Embedding | Kind::Norm)
    }

    /// Numbers in our order put into the checkpoint's, on the host.
    pub(crate) fn in_checkpoint_order(self, site: &Site, numbers: Tensor<1>) -> Vec<f32> {
        let numbers = match self.turned(site) {
            true => {
                let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
                let matrix = numbers.reshape([fan_in, fan_out]).transpose();
                matrix.reshape([fan_in * fan_out])
            }
            false => numbers,
        };
        numbers.into_data().convert::<f32>().iter::<f32>().collect()
    }

    /// The inverse of [`Parameter::in_checkpoint_order`], on `device`.
    pub(crate) fn in_our_order(self, site: &Site, numbers: Vec<f32>, device: &Device) -> Tensor<1> {
        let count = numbers.len();
        match self.turned(site) {
            true => {
                // Laid out anew: what is read must be multiplied in the order of what was written.
                let turned = TensorData::new(numbers, [site.fan_out(), site.fan_in()]);
                let plain = Tensor::<2>::from_data(turned, &device.clone().inner());
                let ours = plain.transpose().reshape([count]).into_data();
                Tensor::from_data(ours, device)
            }
            false => Tensor::from_data(TensorData::new(numbers, [count]), device),
        }
    }

    /// The places in our order of numbers counted in the checkpoint's, as a constant.
    pub(crate) fn places(self, site: &Site, indices: &[u32], device: &Device) -> Tensor<1, Int> {
        let places: Vec<i32> = indices.iter().map(|at| self.place(site, *at) as i32).collect();
        let count = places.len();
        Tensor::from_data(TensorData::new(places, [count]), &device.clone().inner())
    }

    /// The place of one of them.
    pub(crate) fn place(self, site: &Site, index: u32) -> usize {
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        match self.turned(site) {
            true => index as usize % fan_in * fan_out + index as usize / fan_in,
            false => index as usize,
        }
    }

    /// The inverse of [`Parameter::places`].
    pub(crate) fn indices(self, site: &Site, places: &Tensor<1, Int>) -> Vec<u32> {
        let (fan_in, fan_out) = (site.fan_in(), site.fan_out());
        let index = |place: i64| match self.turned(site) {
            true => (place as usize % fan_out * fan_in + place as usize / fan_out) as u32,
            false => place as u32,
        };
        places.to_data().iter::<i64>().map(index).collect()
    }
}
