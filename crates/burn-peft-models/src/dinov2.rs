//! DINOv2 (arXiv 2304.07193): ViT with a learnt scale of each sublayer, laid out as the checkpoints of
//! `transformers` are.

use crate::activation::Activation;
use crate::attention::through;
use crate::load::{Pretrained, linear};
use crate::patches::{Sizes, ViTEmbeddings, ViTSelfAttention};
use crate::{Classes, Classifier, Images};
use burn::module::{Module, Param};
use burn::nn::{Initializer, LayerNorm, Linear};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, Hidden, HiddenPlace, Scope, Whole};
use serde::Deserialize;

/// The fields of `config.json` that shape the model, with `transformers`' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Dinov2Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub mlp_ratio: f64,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub initializer_range: f64,
    pub image_size: usize,
    pub patch_size: usize,
    pub num_channels: usize,
    pub qkv_bias: bool,
    pub use_swiglu_ffn: bool,
    #[serde(flatten)]
    pub classes: Classes,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4.0,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-6,
            initializer_range: 0.02,
            image_size: 224,
            patch_size: 14,
            num_channels: 3,
            qkv_bias: true,
            use_swiglu_ffn: false,
            classes: Classes::default(),
        }
    }
}

impl Dinov2Config {
    fn sizes(&self) -> Sizes {
        Sizes {
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            wide: (self.hidden_size as f64 * self.mlp_ratio) as usize,
            image: self.image_size,
            patch: self.patch_size,
            channels: self.num_channels,
            bias: self.qkv_bias,
            epsilon: self.layer_norm_eps,
            classes: self.classes.count(),
        }
    }

    fn check(&self) -> Result<Sizes, Error> {
        if self.use_swiglu_ffn {
            let reason = "the SwiGLU feed-forward part of the giant model is not implemented; \
                          expected false";
            return Err(Error::config("use_swiglu_ffn", reason));
        }
        let sizes = self.sizes();
        sizes.check()?;
        Ok(sizes)
    }
}

/// A projection alone.
#[derive(Module, Debug)]
pub(crate) struct Dinov2Output {
    dense: Linear,
}

/// Self-attention with its output.
#[derive(Module, Debug)]
pub(crate) struct Dinov2Attention {
    attention: ViTSelfAttention,
    output: Dinov2Output,
}

/// `λ ⊙ y` (LayerScale, arXiv 2103.17239, eq. 2): a sublayer on its way back into the stream.
#[derive(Module, Debug)]
pub(crate) struct Dinov2LayerScale {
    lambda1: Param<Tensor<1>>,
    place: HiddenPlace,
}

/// The feed-forward part.
#[derive(Module, Debug)]
pub(crate) struct Dinov2Mlp {
    fc1: Linear,
    fc2: Linear,
}

/// One block, with its norms in front.
#[derive(Module, Debug)]
pub(crate) struct Dinov2Layer {
    norm1: LayerNorm,
    attention: Dinov2Attention,
    layer_scale1: Dinov2LayerScale,
    norm2: LayerNorm,
    mlp: Dinov2Mlp,
    layer_scale2: Dinov2LayerScale,
    place: HiddenPlace,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    epsilon: f64,
}

/// The blocks.
#[derive(Module, Debug)]
pub(crate) struct Dinov2Encoder {
    layer: Vec<Dinov2Layer>,
}

/// The encoder with its embeddings and its last norm.
#[derive(Module, Debug)]
pub struct Dinov2Model {
    embeddings: ViTEmbeddings,
    encoder: Dinov2Encoder,
    layernorm: LayerNorm,
    #[module(skip)]
    epsilon: f64,
}

/// DINOv2 with a classifier on the class token beside the mean of the patches. It reads images of any size
/// from one patch on; positions are interpolated, as in `transformers`.
///
/// The frozen base runs without its own dropout, in training too: only adapters drop.
#[derive(Module, Debug)]
pub struct Dinov2ForImageClassification {
    dinov2: Dinov2Model,
    classifier: Linear,
    #[module(skip)]
    sizes: Sizes,
}

impl Dinov2LayerScale {
    fn init(hidden: usize, device: &Device) -> Self {
        let lambda1 = Initializer::Zeros.init([hidden], device);
        Self { lambda1, place: HiddenPlace::new(hidden) }
    }

    /// The stream `x` with what a sublayer has made of it added.
    fn forward(&self, y: Tensor<3>, x: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let y = y * self.lambda1.val().unsqueeze();
        cx.hidden(Hidden::sublayer(&x, y)) + x
    }
}

impl Dinov2Layer {
    fn init(config: &Dinov2Config, sizes: &Sizes, device: &Device) -> Result<Self, Error> {
        let (h, wide) = (sizes.hidden, sizes.wide);
        Ok(Self {
            norm1: sizes.norm(device),
            attention: Dinov2Attention {
                attention: ViTSelfAttention::init(sizes, device),
                output: Dinov2Output { dense: linear(h, h, true, device) },
            },
            layer_scale1: Dinov2LayerScale::init(h, device),
            norm2: sizes.norm(device),
            mlp: Dinov2Mlp {
                fc1: linear(h, wide, true, device),
                fc2: linear(wide, h, true, device),
            },
            layer_scale2: Dinov2LayerScale::init(h, device),
            place: HiddenPlace::new(h),
            activation: Activation::of(&config.hidden_act)?,
            epsilon: sizes.epsilon,
        })
    }

    /// `x [batch, seq, hidden]`; keys and values are those of the `whole` where there is one.
    fn forward(
        &self,
        x: Tensor<3>,
        whole: Option<&Whole<'_>>,
        mask: Option<Tensor<4>>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let norm = |name: &str, layer, x| cx.at(name).layer_norm(layer, self.epsilon, x);
        let all = whole.map(|whole| {
            let at = whole.cx.at("norm1");
            let x = at.layer_norm(&self.norm1, self.epsilon, whole.x.clone());
            Whole { x, cx: whole.cx.at("attention.attention") }
        });
        let normed = norm("norm1", &self.norm1, x.clone()); // [b, s, h]
        let own = &self.attention;
        let mixed = own.attention.forward(normed, all, mask, &cx.at("attention.attention"));
        let y = cx.at("attention.output.dense").linear(&own.output.dense, mixed);
        let h = self.layer_scale1.forward(y, x.clone(), &cx.at("layer_scale1"));
        let normed = norm("norm2", &self.norm2, h.clone());
        let wide = cx.at("mlp.fc1").linear(&self.mlp.fc1, normed);
        let y = cx.at("mlp.fc2").linear(&self.mlp.fc2, self.activation.apply(wide));
        let y = self.layer_scale2.forward(y, h, &cx.at("layer_scale2"));
        cx.hidden(Hidden::block(x, y))
    }
}

impl Dinov2Model {
    fn init(config: &Dinov2Config, device: &Device) -> Result<Self, Error> {
        let sizes = config.check()?;
        let layer = |_| Dinov2Layer::init(config, &sizes, device);
        Ok(Self {
            embeddings: ViTEmbeddings::init(&sizes, device),
            encoder: Dinov2Encoder {
                layer: (0..sizes.layers).map(layer).collect::<Result<_, _>>()?,
            },
            layernorm: sizes.norm(device),
            epsilon: sizes.epsilon,
        })
    }

    /// Hidden states of the last block after their norm, `[batch, 1 + patches, hidden]`, the class token's first.
    pub fn forward(&self, images: &Images, cx: &Scope<'_>) -> Tensor<3> {
        let pixels = images.tensor(&self.embeddings.device());
        let cx = &cx.over(self.embeddings.grid(&pixels));
        let x = self.embeddings.forward(pixels, &cx.at("embeddings"));
        let x =
            through(&self.encoder.layer, x, None, None, &cx.at("encoder"), Dinov2Layer::forward);
        cx.at("layernorm").layer_norm(&self.layernorm, self.epsilon, x)
    }
}

impl Classifier for Dinov2ForImageClassification {
    type Input = Images;
    const ARCHITECTURE: &'static str = "Dinov2ForImageClassification";

    fn classes(config: &Dinov2Config) -> &Classes {
        &config.classes
    }

    fn classes_mut(config: &mut Dinov2Config) -> &mut Classes {
        &mut config.classes
    }

    fn check(&self, images: &Images, _cx: &Scope<'_>) -> Result<(), Error> {
        images.check(self.sizes.channels, self.sizes.patch)
    }

    fn forward(&self, images: &Images, cx: &Scope<'_>) -> Tensor<2> {
        let states = self.dinov2.forward(images, &cx.at("dinov2"));
        let [batch, all, width] = states.dims();
        let class = states.clone().narrow(1, 0, 1).reshape([batch, width]);
        let mean = states.narrow(1, 1, all - 1).mean_dim(1).reshape([batch, width]);
        cx.at("classifier").linear(&self.classifier, Tensor::cat(vec![class, mean], 1))
    }
}

impl Pretrained for Dinov2ForImageClassification {
    type Config = Dinov2Config;
    const MODEL_TYPE: &'static str = "dinov2";
    const OUTPUT: &'static str = "classifier";
    const PREFIX: &'static str = "dinov2.";
    /// A checkpoint of the bare encoder has no classifier.
    const MAY_BE_FRESH: &'static [&'static str] = &["classifier."];
    const IGNORED: &'static [&'static str] = &["embeddings.mask_token"];

    fn init(config: &Dinov2Config, device: &Device) -> Result<Self, Error> {
        let sizes = config.check()?;
        Ok(Self {
            dinov2: Dinov2Model::init(config, device)?,
            classifier: linear(2 * sizes.hidden, sizes.classes, true, device),
            sizes,
        })
    }

    fn initializer_range(config: &Dinov2Config) -> f64 {
        config.initializer_range
    }
}
