//! What vision transformers have in common: patches with positions, and attention among them.

use crate::attention::{mix, split_heads};
use crate::load::{linear, plausible};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{Error, Grid, Hidden, HiddenPlace, Scope, Whole};

/// The sizes by which they differ.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    /// Width of the feed-forward part.
    pub(crate) wide: usize,
    /// Side of the square images that the positions were learnt on.
    pub(crate) image: usize,
    /// Side of a patch.
    pub(crate) patch: usize,
    pub(crate) channels: usize,
    /// Whether queries, keys and values have a bias.
    pub(crate) bias: bool,
    pub(crate) epsilon: f64,
    pub(crate) classes: usize,
}

impl Sizes {
    /// Refuses sizes that no model has, by their names in `config.json`.
    pub(crate) fn check(&self) -> Result<(), Error> {
        plausible(&[
            ("hidden_size", self.hidden),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("intermediate_size", self.wide),
            ("image_size", self.image),
            ("patch_size", self.patch),
            ("num_channels", self.channels),
            ("num_labels", self.classes),
        ])?;
        if !self.hidden.is_multiple_of(self.heads) {
            let found = format!("{} does not divide by {}", self.hidden, self.heads);
            return Err(Error::config("hidden_size", format!("{found}, the num_attention_heads")));
        }
        if self.patch > self.image {
            let reason =
                format!("expected at most image_size {}, found {}", self.image, self.patch);
            return Err(Error::config("patch_size", reason));
        }
        // Positions are a table like any other.
        plausible(&[("image_size", (self.image / self.patch).saturating_pow(2))])
    }

    pub(crate) fn norm(&self, device: &Device) -> LayerNorm {
        LayerNormConfig::new(self.hidden).with_epsilon(self.epsilon).init(device)
    }
}

/// A linear map of each patch, which a convolution with the patch as its stride is.
#[derive(Module, Debug)]
pub(crate) struct ViTPatchEmbeddings {
    projection: Conv2d,
}

/// A class token and patches, each with its position: `[batch, 1 + rows · columns, hidden]`.
#[derive(Module, Debug)]
pub(crate) struct ViTEmbeddings {
    cls_token: Param<Tensor<3>>,
    position_embeddings: Param<Tensor<3>>,
    patch_embeddings: ViTPatchEmbeddings,
    place: HiddenPlace,
}

impl ViTEmbeddings {
    pub(crate) fn init(sizes: &Sizes, device: &Device) -> Self {
        let (h, patch) = (sizes.hidden, [sizes.patch; 2]);
        let grid = sizes.image / sizes.patch;
        let zeros = |rows| Initializer::Zeros.init([1, rows, h], device);
        let projection = Conv2dConfig::new([sizes.channels, h], patch).with_stride(patch);
        Self {
            cls_token: zeros(1),
            position_embeddings: zeros(1 + grid * grid),
            patch_embeddings: ViTPatchEmbeddings {
                projection: projection.with_initializer(Initializer::Zeros).init(device),
            },
            place: HiddenPlace::new(h),
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.cls_token.device()
    }

    /// Where the patches of `pixels [batch, channels, height, width]` lie.
    pub(crate) fn grid(&self, pixels: &Tensor<4>) -> Grid {
        let [_, _, height, width] = pixels.dims();
        let [_, _, high, wide] = self.patch_embeddings.projection.weight.dims();
        Grid { first: 1, rows: height / high, columns: width / wide }
    }

    /// `pixels [batch, channels, height, width]`.
    pub(crate) fn forward(&self, pixels: Tensor<4>, cx: &Scope<'_>) -> Tensor<3> {
        let at = cx.at("patch_embeddings.projection");
        let patches = at.conv2d(&self.patch_embeddings.projection, pixels);
        let [batch, width, rows, columns] = patches.dims();
        let patches = patches.reshape([batch, width, rows * columns]).swap_dims(1, 2);
        let class = self.cls_token.val().expand([batch, 1, width]);
        let x = Tensor::cat(vec![class, patches], 1);
        let y = x.clone() + self.positions(rows, columns);
        cx.hidden(Hidden::block(x, y))
    }

    /// `[1, 1 + rows · columns, hidden]`: as they were learnt for the grid that they were learnt on, and
    /// for another what `transformers` makes of them, which is bicubic interpolation in each direction.
    fn positions(&self, rows: usize, columns: usize) -> Tensor<3> {
        let table = self.position_embeddings.val();
        let [_, count, width] = table.dims();
        let grid = (count - 1).isqrt();
        if (rows, columns) == (grid, grid) {
            return table;
        }
        let (device, dtype) = (table.device(), table.dtype());
        let weights = |to| {
            let data = TensorData::new(bicubic(grid, to), [to, grid]);
            Tensor::<2>::from_data(data, (&device, dtype))
        };
        let class = table.clone().narrow(1, 0, 1);
        let patches = table.narrow(1, 1, grid * grid).reshape([grid, grid * width]);
        let tall = weights(rows).matmul(patches).reshape([rows, grid, width]);
        let wide = weights(columns).unsqueeze::<3>().expand([rows, columns, grid]).matmul(tall);
        Tensor::cat(vec![class, wide.reshape([1, rows * columns, width])], 1)
    }
}

/// Keys' bicubic convolution from `from` samples to `to`, `[to][from]`, as `torch.nn.functional.interpolate`
/// has it: a = -0.75, pixels with their centres between the corners, edges repeated.
fn bicubic(from: usize, to: usize) -> Vec<f32> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f64| ((x - 5.0) * x + 8.0) * x * A - 4.0 * A; // 1 < |x| < 2
    let mut weights = vec![0.0; to * from];
    for (target, row) in weights.chunks_mut(from.max(1)).enumerate() {
        let source = (target as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let (first, t) = (source.floor(), source - source.floor());
        for (offset, weight) in
            [(-1.0, far(t + 1.0)), (0.0, near(t)), (1.0, near(1.0 - t)), (2.0, far(2.0 - t))]
        {
            let index = (first + offset).clamp(0.0, from as f64 - 1.0);
            row[index as usize] += weight as f32;
        }
    }
    weights
}

/// Queries, keys and values, none of which is hidden from another unless something in front of them is.
#[derive(Module, Debug)]
pub(crate) struct ViTSelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    #[module(skip)]
    heads: usize,
}

impl ViTSelfAttention {
    pub(crate) fn init(sizes: &Sizes, device: &Device) -> Self {
        let part = || linear(sizes.hidden, sizes.hidden, sizes.bias, device);
        Self { query: part(), key: part(), value: part(), heads: sizes.heads }
    }

    /// What it mixes for the normed stream `x [batch, seq, hidden]`, out of that or of the normed `whole`.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        whole: Option<Whole<'_>>,
        mask: Option<Tensor<4>>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let all = whole.unwrap_or_else(|| Whole { x: x.clone(), cx: cx.clone() });
        let q = cx.at("query").linear(&self.query, x.clone());
        let k = all.cx.at("key").linear(&self.key, all.x.clone());
        let v = all.cx.at("value").linear(&self.value, all.x.clone());
        let [q, k, v] = [q, k, v].map(|part| split_heads(part, self.heads)); // [b, n, s, d]
        let mixed = mix(cx, q.clone(), [k, v], mask, all.cx.prefix(&all.x));
        cx.attention(&x, &q, &self.key, &self.value, mixed)
    }
}
