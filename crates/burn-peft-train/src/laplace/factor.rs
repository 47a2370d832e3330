//! Kronecker factors: sums of outer products `Σ r·rᵀ`, whole or of low rank.

use burn::linalg::svd;
use burn::tensor::{Device, Tensor, TensorData};

/// Rounds that the decomposition may take for each value; more than it is known to need.
const SWEEPS: usize = 100;

/// `Σ r·rᵀ` of rows `r [width]` as they come.
#[derive(Debug, Clone)]
pub(crate) enum Factor {
    /// The matrix itself, `[width, width]`.
    Whole(Tensor<2>),
    /// `F [width, rank]` with `F·Fᵀ` close to the sum: with each batch, the left singular directions of
    /// `[F, batchᵀ]` with the largest values (arXiv 2308.13111, appendix). The wide matrix never exists.
    Thin(Tensor<2>),
}

impl Factor {
    /// Of nothing yet; thin where `rank` is less than `width`.
    pub(crate) fn new(width: usize, rank: Option<usize>, device: &Device) -> Self {
        match rank.filter(|&rank| rank < width) {
            Some(rank) => Self::Thin(Tensor::zeros([width, rank], device)),
            None => Self::Whole(Tensor::zeros([width, width], device)),
        }
    }

    /// With `rows [count, width]` added.
    pub(crate) fn add(self, rows: Tensor<2>) -> Self {
        match self {
            Self::Whole(sum) => Self::Whole(sum + rows.clone().transpose().matmul(rows)),
            Self::Thin(thin) => {
                let [_, rank] = thin.dims();
                let (u, values, _) =
                    svd::<2, 1>(Tensor::cat(vec![thin, rows.transpose()], 1), SWEEPS);
                let kept = u.narrow(1, 0, rank) * values.narrow(0, 0, rank).unsqueeze_dim(0);
                Self::Thin(kept)
            }
        }
    }

    /// Its eigenvectors and eigenvalues.
    pub(crate) fn spectrum(self) -> Spectrum {
        // Of a matrix that is symmetric and has no negative eigenvalues they are the singular ones.
        let (vectors, values, power) = match self {
            Self::Whole(sum) => {
                let (u, values, _) = svd::<2, 1>(sum, SWEEPS);
                (u, values, 1)
            }
            Self::Thin(thin) => {
                let (u, values, _) = svd::<2, 1>(thin, SWEEPS);
                (u, values, 2)
            }
        };
        let values = numbers(values.into_data()).into_iter().map(|v| v.powi(power)).collect();
        Spectrum { vectors, values }
    }
}

/// Eigenvectors `[width, k]` and eigenvalues `[k]` of a factor; the other eigenvalues are 0.
#[derive(Debug, Clone)]
pub(crate) struct Spectrum {
    pub(crate) vectors: Tensor<2>,
    pub(crate) values: Vec<f64>,
}

impl Spectrum {
    pub(crate) fn width(&self) -> usize {
        self.vectors.dims()[0]
    }

    /// Whether all eigenvectors are there.
    pub(crate) fn is_whole(&self) -> bool {
        self.values.len() == self.width()
    }
}

/// The numbers of a tensor on the host.
pub(crate) fn numbers(data: TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}
