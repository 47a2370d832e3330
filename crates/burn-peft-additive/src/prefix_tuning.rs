//! Prefix tuning: trained keys and values in front of those of every attention (arXiv 2101.00190).

use crate::numbers::STANDARD;
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, agree, attentions, between, dense, in_front,
    only_saved, saved_only,
};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, PlaceTensors, SeenTokens, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Prefix tuning (arXiv 2101.00190): every attention reads `[K'; K]` and `[V'; V]`, with `K'` and
/// `V' [n, width]` trained at each block, the same for every row.
///
/// `width` is that of the block's keys: less than the hidden size where heads share them. With
/// `prefix_projection`, `[K'; V'] = W₂·tanh(W₁·E + b₁) + b₂` of an embedding `E [n, width]`; `E` and `W₁` belong
/// to all blocks, and only what comes out is written, as HF PEFT does. Parameters: `2·n·width` a block; projected
/// `2·width·(h + 1)` a block and `n·width + h·(width + 1)` for all. Positions of a sequence begin at `n`, as in
/// HF PEFT. Acts on activations only: it does not fold, and rows of one batch cannot have prefixes of their own.
///
/// P-tuning v2 (arXiv 2110.07602) for classification is this without projection and with the head trained whole,
/// which is what `burn-peft train` does with any method on a classifier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixTuning {
    /// How many keys and values, and what HF PEFT says of the model beside.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// Whether keys and values come out of a small network while they are trained; default false.
    pub prefix_projection: bool,
    /// `h`, the width of that network; default: `width`.
    pub encoder_hidden_size: Option<usize>,
    /// "zero", or drawn at random; default random.
    pub init_weights: Option<String>,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

/// Keys and values in front of one attention's.
#[derive(Module, Debug)]
pub struct Prefix {
    /// `[n, 2·width]`, keys beside values; the embedding `E [n, width]` where an encoder makes them.
    pub table: Param<Tensor<2>>,
    /// Makes them in training.
    pub encoder: Option<PrefixEncoder>,
    /// Number of the block.
    pub layer: usize,
}

/// `W₂·tanh(W₁·E + b₁) + b₂`.
#[derive(Module, Debug)]
pub struct PrefixEncoder {
    /// `W₁ [width, h]` and `b₁`, one for all blocks.
    pub down: Linear,
    /// The block's part of `W₂ [h, 2·width]` and `b₂`.
    pub up: Linear,
}

impl Prefix {
    /// Keys beside values, `[n, 2·width]`.
    fn both(&self) -> Tensor<2> {
        let table = self.table.val();
        match &self.encoder {
            None => table,
            Some(encoder) => encoder.up.forward(encoder.down.forward(table).tanh()),
        }
    }
}

impl Adapter for Prefix {
    fn prefix(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        let both = self.both();
        let width = both.dims()[1] / 2;
        Some([0, 1].map(|part| both.clone().narrow(1, part * width, width).unsqueeze()))
    }

    fn virtual_tokens(&self) -> usize {
        self.table.dims()[0]
    }
}

/// What the blocks have in common.
#[derive(Debug, Clone, Default)]
pub struct Blocks {
    /// Their paths, in the model's order.
    paths: Vec<String>,
    /// `E` and `W₁`, where there is an encoder.
    encoder: Option<(Param<Tensor<2>>, Linear)>,
    /// What a file held, `[n, blocks·2·width]`.
    table: Option<Tensor<2>>,
}

impl Blocks {
    fn layer(&self, site: &Site) -> Result<usize, Error> {
        let found = self.paths.iter().position(|path| *path == site.path);
        found.ok_or_else(|| Error::place(&site.path, UNREAD))
    }
}

impl PrefixTuning {
    /// With this many keys and values at each block, drawn at random.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { virtual_tokens: VirtualTokens::of(num_virtual_tokens), ..Self::default() }
    }

    fn hidden(&self, width: usize) -> usize {
        self.encoder_hidden_size.unwrap_or(width)
    }

    fn zero(&self) -> bool {
        self.init_weights.is_some()
    }

    /// The width of keys, which all blocks must have in common.
    fn width(&self, sites: &[&Site]) -> Result<usize, Error> {
        let width = sites.first().map_or(0, |site| site.fan_out());
        for site in sites {
            self.virtual_tokens.fits(site, site.fan_out())?;
            if site.fan_out() != width {
                let reason = format!(
                    "expected keys of width {width}, as the first block has them, found {}",
                    site.fan_out()
                );
                return Err(Error::place(&site.path, reason));
            }
        }
        if let Some(site) = sites.last() {
            agree("num_layers", self.virtual_tokens.num_layers, sites.len(), &site.path)?;
        }
        Ok(width)
    }

    fn blocks(&self, sites: &[&Site]) -> Blocks {
        let paths = sites.iter().map(|site| site.path.clone()).collect();
        Blocks { paths, ..Blocks::default() }
    }
}

impl Method for PrefixTuning {
    type Adapter = Prefix;
    type Shared = Blocks;
    const NAME: &'static str = "PREFIX_TUNING";
    const KINDS: &'static [Kind] = &[Kind::Attention];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const PREFIXES: [&'static str; 2] = PREFIXES;

    in_front!(attentions);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        if let Some(hidden) = self.encoder_hidden_size {
            between("encoder_hidden_size", hidden, 1, 1 << 16)?;
        }
        match self.init_weights.as_deref() {
            None | Some("zero") => Ok(()),
            Some(other) => Err(Error::config(
                "init_weights",
                format!("expected \"zero\" or null, found {other}"),
            )),
        }
    }

    fn draws(&self) -> bool {
        self.prefix_projection || !self.zero()
    }

    fn share(
        &self,
        sites: &[&Site],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Blocks, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, self.width(sites)?);
        let encoder = self.prefix_projection.then(|| {
            let table = Param::from_tensor(STANDARD.tensor([n, width], rng, device));
            (table, dense(width, self.hidden(width), rng, device))
        });
        Ok(Blocks { encoder, ..self.blocks(sites) })
    }

    fn init(
        &self,
        site: &Site,
        blocks: &Blocks,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Prefix, Error> {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        let layer = blocks.layer(site)?;
        if let Some((table, down)) = blocks.encoder.clone() {
            let mut up = dense(self.hidden(width), 2 * width, rng, device);
            if self.zero() {
                let bias = Tensor::zeros([2 * width], device);
                up.weight = Param::from_tensor(Tensor::zeros(up.weight.dims(), device));
                up.bias = Some(Param::from_tensor(bias));
            }
            return Ok(Prefix { table, encoder: Some(PrefixEncoder { down, up }), layer });
        }
        let table = match self.zero() {
            true => Tensor::zeros([n, 2 * width], device),
            false => STANDARD.tensor([n, 2 * width], rng, device),
        };
        Ok(Prefix { table: Param::from_tensor(table), encoder: None, layer })
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { targets: only_saved(targets), ..Self::new(3) };
        let projected = Self { prefix_projection: true, ..plain.clone() };
        let zero = Some("zero".to_owned());
        vec![
            Self { encoder_hidden_size: Some(5), ..projected.clone() },
            Self { init_weights: zero.clone(), ..projected },
            Self { init_weights: zero, ..plain.clone() },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let (n, width) = (self.virtual_tokens.num_virtual_tokens, site.fan_out());
        2 * width * if self.prefix_projection { self.hidden(width) + 1 } else { n }
    }

    fn shared_parameters(&self, sites: &[&Site]) -> usize {
        let (n, width) =
            (self.virtual_tokens.num_virtual_tokens, sites.first().map_or(0, |s| s.fan_out()));
        if self.prefix_projection { n * width + self.hidden(width) * (width + 1) } else { 0 }
    }

    fn tensors(&self, _site: &Site, _adapter: &Prefix) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        blocks: &Blocks,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<Prefix, Error> {
        let (layer, width) = (blocks.layer(site)?, 2 * site.fan_out());
        let table = blocks.table.clone().ok_or_else(|| Error::place(&site.path, UNREAD))?;
        let own = table.narrow(1, layer * width, width);
        Ok(Prefix { table: Param::from_tensor(own), encoder: None, layer })
    }

    fn shared_tensors(&self, adapters: &[&Prefix]) -> Vec<(String, TensorData)> {
        let mut blocks = adapters.to_vec();
        blocks.sort_by_key(|prefix| prefix.layer);
        let blocks: Vec<_> = blocks.into_iter().map(Prefix::both).collect();
        if blocks.is_empty() {
            return Vec::new();
        }
        vec![(EMBEDDINGS.to_owned(), Tensor::cat(blocks, 1).into_data())]
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Blocks, Error> {
        let width = self.width(sites)?;
        let shape = [self.virtual_tokens.num_virtual_tokens, sites.len() * 2 * width];
        let table = file.take(EMBEDDINGS, shape, device)?;
        Ok(Blocks { table: Some(table), ..self.blocks(sites) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_peft_core::TensorFile;
    use std::path::Path;

    /// `W₂·tanh(W₁·E + b₁) + b₂` with HF PEFT's own numbers, cut into blocks, is what it writes.
    #[test]
    fn a_projection_is_hf_pefts() {
        let device = Device::flex();
        for (name, width) in [("bert", 32), ("llama", 16)] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(format!("../../fixtures/methods/prefix_tuning-projection-{name}"));
            let open = |file| TensorFile::open(folder.join(file)).expect("is committed");
            let mut golden = open("golden.safetensors");
            let mut take =
                |part: &str| golden.take_data(&format!("encoder.{part}")).expect("is there");
            let table = Param::from_tensor(Tensor::from_data(take("embedding.weight"), &device));
            let mut layer = |index: usize| {
                let weight =
                    Tensor::<2>::from_data(take(&format!("transform.{index}.weight")), &device);
                let bias =
                    Tensor::<1>::from_data(take(&format!("transform.{index}.bias")), &device);
                (weight.transpose(), bias)
            };
            let linear = |(weight, bias)| Linear {
                weight: Param::from_tensor(weight),
                bias: Some(Param::from_tensor(bias)),
            };
            let (down, up) = (linear(layer(0)), layer(2));
            let block = |layer: usize| {
                let columns = layer * 2 * width;
                let weight = up.0.clone().narrow(1, columns, 2 * width);
                let up = linear((weight, up.1.clone().narrow(0, columns, 2 * width)));
                let encoder = Some(PrefixEncoder { down: down.clone(), up });
                Prefix { table: table.clone(), encoder, layer }
            };
            let (zeroth, first) = (block(0), block(1));
            let method = PrefixTuning { prefix_projection: true, ..PrefixTuning::new(3) };
            let mut written = method.shared_tensors(&[&first, &zeroth]);
            let (_, found) = written.pop().expect("is one");
            let expected =
                open("adapter_model.safetensors").take_data(EMBEDDINGS).expect("is there");
            let [found, expected] =
                [found, expected].map(|data| Tensor::<2>::from_data(data, &device));
            let far = (found - expected).abs().max().into_scalar::<f32>();
            assert!(far < 1e-5, "{name} differs by {far}");
        }
    }
}
