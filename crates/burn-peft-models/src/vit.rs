//! ViT (arXiv 2010.11929), laid out as the checkpoints of `transformers` are.

use crate::activation::Activation;
use crate::attention::{first_of_rows, through};
use crate::load::{Pretrained, linear};
use crate::patches::{Sizes, ViTEmbeddings, ViTSelfAttention};
use crate::{Classes, Classifier, Images};
use burn::module::Module;
use burn::nn::{LayerNorm, Linear};
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Error, Hidden, HiddenPlace, Scope, Whole};
use serde::Deserialize;

/// The fields of `config.json` that shape the model, with `transformers`' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ViTConfig {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub initializer_range: f64,
    pub image_size: usize,
    pub patch_size: usize,
    pub num_channels: usize,
    pub qkv_bias: bool,
    #[serde(flatten)]
    pub classes: Classes,
}

impl Default for ViTConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            classes: Classes::default(),
        }
    }
}

impl ViTConfig {
    fn sizes(&self) -> Sizes {
        Sizes {
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            wide: self.intermediate_size,
            image: self.image_size,
            patch: self.patch_size,
            channels: self.num_channels,
            bias: self.qkv_bias,
            epsilon: self.layer_norm_eps,
            classes: self.classes.count(),
        }
    }
}

/// A projection on its way back into the stream.
#[derive(Module, Debug)]
pub(crate) struct ViTOutput {
    dense: Linear,
    place: HiddenPlace,
}

/// Self-attention with its output.
#[derive(Module, Debug)]
pub(crate) struct ViTAttention {
    attention: ViTSelfAttention,
    output: ViTOutput,
}

/// A projection alone.
#[derive(Module, Debug)]
pub(crate) struct ViTIntermediate {
    dense: Linear,
}

/// One block, with its norms in front.
#[derive(Module, Debug)]
pub(crate) struct ViTLayer {
    attention: ViTAttention,
    intermediate: ViTIntermediate,
    output: ViTOutput,
    layernorm_before: LayerNorm,
    layernorm_after: LayerNorm,
    place: HiddenPlace,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    epsilon: f64,
}

/// The blocks.
#[derive(Module, Debug)]
pub(crate) struct ViTEncoder {
    layer: Vec<ViTLayer>,
}

/// The encoder with its embeddings and its last norm.
#[derive(Module, Debug)]
pub struct ViTModel {
    embeddings: ViTEmbeddings,
    encoder: ViTEncoder,
    layernorm: LayerNorm,
    #[module(skip)]
    epsilon: f64,
}

/// ViT with a classifier on the class token. It reads images of any size from one patch on: for another than
/// it was trained on, positions are interpolated, as `transformers` does with `interpolate_pos_encoding`.
///
/// The frozen base runs without its own dropout, in training too: only adapters drop.
#[derive(Module, Debug)]
pub struct ViTForImageClassification {
    vit: ViTModel,
    classifier: Linear,
    #[module(skip)]
    sizes: Sizes,
}

impl ViTOutput {
    fn init(fan_in: usize, hidden: usize, device: &Device) -> Self {
        Self { dense: linear(fan_in, hidden, true, device), place: HiddenPlace::new(hidden) }
    }

    /// The stream `x` with what a sublayer has made of it added.
    fn forward(&self, y: Tensor<3>, x: Tensor<3>, cx: &Scope<'_>) -> Tensor<3> {
        let y = cx.at("dense").linear(&self.dense, y);
        cx.hidden(Hidden::sublayer(&x, y)) + x
    }
}

impl ViTLayer {
    fn init(config: &ViTConfig, sizes: &Sizes, device: &Device) -> Result<Self, Error> {
        let (h, wide) = (sizes.hidden, sizes.wide);
        Ok(Self {
            attention: ViTAttention {
                attention: ViTSelfAttention::init(sizes, device),
                output: ViTOutput::init(h, h, device),
            },
            intermediate: ViTIntermediate { dense: linear(h, wide, true, device) },
            output: ViTOutput::init(wide, h, device),
            layernorm_before: sizes.norm(device),
            layernorm_after: sizes.norm(device),
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
            let at = whole.cx.at("layernorm_before");
            let x = at.layer_norm(&self.layernorm_before, self.epsilon, whole.x.clone());
            Whole { x, cx: whole.cx.at("attention.attention") }
        });
        let normed = norm("layernorm_before", &self.layernorm_before, x.clone()); // [b, s, h]
        let mixed =
            self.attention.attention.forward(normed, all, mask, &cx.at("attention.attention"));
        let h = self.attention.output.forward(mixed, x.clone(), &cx.at("attention.output"));
        let normed = norm("layernorm_after", &self.layernorm_after, h.clone());
        let wide = cx.at("intermediate.dense").linear(&self.intermediate.dense, normed);
        let y = self.output.forward(self.activation.apply(wide), h, &cx.at("output"));
        cx.hidden(Hidden::block(x, y))
    }
}

impl ViTModel {
    fn init(config: &ViTConfig, device: &Device) -> Result<Self, Error> {
        let sizes = config.sizes();
        sizes.check()?;
        let layer = |_| ViTLayer::init(config, &sizes, device);
        Ok(Self {
            embeddings: ViTEmbeddings::init(&sizes, device),
            encoder: ViTEncoder { layer: (0..sizes.layers).map(layer).collect::<Result<_, _>>()? },
            layernorm: sizes.norm(device),
            epsilon: sizes.epsilon,
        })
    }

    /// Hidden states of the last block after their norm, `[batch, 1 + patches, hidden]`, the class token's first.
    pub fn forward(&self, images: &Images, cx: &Scope<'_>) -> Tensor<3> {
        self.states(images, cx, false)
    }

    /// The same, or where only the class token is `read`, `[batch, 1, hidden]` of it where nothing that lies over the model
    /// asks for more.
    fn states(&self, images: &Images, cx: &Scope<'_>, read: bool) -> Tensor<3> {
        let pixels = images.tensor(&self.embeddings.device());
        let cx = &cx.over(self.embeddings.grid(&pixels));
        let x = self.embeddings.forward(pixels, &cx.at("embeddings"));
        let [batch, seq, _] = x.dims();
        let first = (read && cx.by_token()).then(|| first_of_rows([batch, seq], &x.device()));
        let layers = &self.encoder.layer;
        let x = through(layers, x, None, first, &cx.at("encoder"), ViTLayer::forward);
        cx.at("layernorm").layer_norm(&self.layernorm, self.epsilon, x)
    }
}

impl Classifier for ViTForImageClassification {
    type Input = Images;
    const ARCHITECTURE: &'static str = "ViTForImageClassification";

    fn classes(config: &ViTConfig) -> &Classes {
        &config.classes
    }

    fn classes_mut(config: &mut ViTConfig) -> &mut Classes {
        &mut config.classes
    }

    fn check(&self, images: &Images, _cx: &Scope<'_>) -> Result<(), Error> {
        images.check(self.sizes.channels, self.sizes.patch)
    }

    fn forward(&self, images: &Images, cx: &Scope<'_>) -> Tensor<2> {
        let states = self.vit.states(images, &cx.at("vit"), true);
        let [batch, _, width] = states.dims();
        let class = states.narrow(1, 0, 1).reshape([batch, width]);
        cx.at("classifier").linear(&self.classifier, class)
    }
}

impl Pretrained for ViTForImageClassification {
    type Config = ViTConfig;
    const MODEL_TYPE: &'static str = "vit";
    const OUTPUT: &'static str = "classifier";
    const PREFIX: &'static str = "vit.";
    /// A checkpoint of the bare encoder has no classifier.
    const MAY_BE_FRESH: &'static [&'static str] = &["classifier."];
    const IGNORED: &'static [&'static str] = &["embeddings.mask_token", "pooler.", "decoder."];

    fn init(config: &ViTConfig, device: &Device) -> Result<Self, Error> {
        let sizes = config.sizes();
        Ok(Self {
            vit: ViTModel::init(config, device)?,
            classifier: linear(sizes.hidden, sizes.classes, true, device),
            sizes,
        })
    }

    fn initializer_range(config: &ViTConfig) -> f64 {
        config.initializer_range
    }
}
