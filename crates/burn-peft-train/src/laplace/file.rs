//! A posterior's files, beside those of the adapter that it belongs to.

use super::block::Block;
use super::factor::{Spectrum, numbers};
use super::{Place, Posterior, Settings};
use burn::tensor::{Tensor, TensorData};
use burn_peft_core::{Error, Product, TensorFile, tensor_bytes, write_together};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Name of the posterior's numbers in an adapter's folder; it marks a whole one.
pub const LAPLACE_FILE: &str = "laplace.json";
/// Name of the posterior's factors: for `A` and `B` of each place the eigenvectors and eigenvalues of
/// the factor over its inputs and the one over its outputs, `PATH.lora_A.inputs.vectors [fan_in, k]`.
pub const LAPLACE_TENSORS: &str = "laplace.safetensors";

#[derive(Serialize, Deserialize)]
struct Header {
    prior_precision: f64,
    n_kfac: Option<usize>,
    examples: usize,
    log_likelihood: f64,
    /// Checksum of the factors that were trained.
    adapter: String,
}

/// FNV-1a over the numbers of the factors: tells another training from this one.
fn checksum<'p>(products: impl Iterator<Item = (&'p str, &'p Product)>) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for (path, product) in products {
        take(path.as_bytes());
        take(&product.scaling.to_le_bytes());
        for factor in [&product.a, &product.b] {
            for number in numbers(factor.clone().into_data()) {
                take(&number.to_le_bytes());
            }
        }
    }
    format!("{hash:016x}")
}

/// Names of a spectrum's two tensors.
fn names(path: &str, factor: &str, side: &str) -> [String; 2] {
    ["vectors", "values"].map(|what| format!("{path}.{factor}.{side}.{what}"))
}

impl Posterior {
    fn checksum(&self) -> String {
        checksum(self.places.iter().map(|(path, place)| (path.as_str(), &place.product)))
    }

    /// Writes it into the adapter's `folder`: both files or none.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let (tensors, mark) = (folder.join(LAPLACE_TENSORS), folder.join(LAPLACE_FILE));
        let mut parts: Vec<(String, TensorData)> = Vec::new();
        for (path, place) in &self.places {
            for (factor, block) in ["lora_A", "lora_B"].iter().zip(&place.blocks) {
                for (side, part) in [("inputs", &block.inputs), ("outputs", &block.outputs)] {
                    let [vectors, values] = names(path, factor, side);
                    let count = part.values.len();
                    parts.push((vectors, part.vectors.clone().into_data()));
                    parts.push((values, TensorData::new(part.values.clone(), [count])));
                }
            }
        }
        let header = Header {
            prior_precision: self.prior_precision,
            n_kfac: self.settings.n_kfac,
            examples: self.examples,
            log_likelihood: self.log_likelihood,
            adapter: self.checksum(),
        };
        let bytes = tensor_bytes(&tensors, parts.iter().map(|(name, data)| (name.clone(), data)))?;
        let mut json = serde_json::to_vec_pretty(&header)
            .map_err(|e| Error::format(&mark, format!("cannot be written: {e}")))?;
        json.push(b'\n');
        write_together(&[(tensors, &bytes), (mark, &json)])
    }

    /// Reads the posterior of the adapter in `folder`, whose factors are `products`.
    ///
    /// # Errors
    /// No posterior, one of another adapter, or a file that is not whole.
    pub fn load(folder: &Path, products: Vec<(String, Product)>) -> Result<Self, Error> {
        let mark = folder.join(LAPLACE_FILE);
        let text = std::fs::read_to_string(&mark).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::format(&mark, "is not there; fit it by burn-peft laplace")
            }
            _ => Error::io(&mark, e),
        })?;
        let header: Header = serde_json::from_str(&text)
            .map_err(|e| Error::format(&mark, format!("expected a posterior's numbers: {e}")))?;
        let positive = header.prior_precision.is_finite() && header.prior_precision > 0.0;
        if !positive {
            let found = header.prior_precision;
            let reason = format!("prior_precision: expected a positive number, found {found}");
            return Err(Error::format(&mark, reason));
        }
        let mut file = TensorFile::open(folder.join(LAPLACE_TENSORS))?;
        let mut places = std::collections::BTreeMap::new();
        for (path, product) in products {
            let mut block = |factor: &str, weight: &Tensor<2>| -> Result<Block, Error> {
                let ([p, q], device) = (weight.dims(), weight.device().inner());
                let mut side = |side: &str, width: usize| -> Result<Spectrum, Error> {
                    let [vectors, values] = names(&path, factor, side);
                    let kept = header.n_kfac.unwrap_or(width).min(width);
                    let vectors = file.take(&vectors, [width, kept], &device)?;
                    let found = numbers(file.take_data(&values)?);
                    match found.len() == kept && found.iter().all(|v| v.is_finite() && *v >= 0.0) {
                        true => Ok(Spectrum { vectors, values: found }),
                        false => {
                            let expected = format!("{kept} numbers that are not negative");
                            Err(Error::tensor(values, expected, format!("{found:?}")))
                        }
                    }
                };
                Ok(Block { inputs: side("inputs", p)?, outputs: side("outputs", q)? })
            };
            let blocks = [block("lora_A", &product.a)?, block("lora_B", &product.b)?];
            places.insert(path, Place { product, blocks });
        }
        let posterior = Self {
            places,
            prior_precision: header.prior_precision,
            settings: Settings { n_kfac: header.n_kfac, prior_precision: None },
            examples: header.examples,
            log_likelihood: header.log_likelihood,
        };
        match posterior.checksum() == header.adapter {
            true => Ok(posterior),
            false => {
                let reason = "was fitted to another adapter than the one beside it; fit it again by \
                              burn-peft laplace";
                Err(Error::format(&mark, reason))
            }
        }
    }
}
