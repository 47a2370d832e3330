//! A model with a place of every kind, and what the laws need around it.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig1d,
};
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::core::{
    Counted, Front, Grid, HIDDEN, Hidden, HiddenPlace, Kind, MaskPlace, Method, Names, Passes,
    Scope, SeenTokens, Sites, Targets, Trained, Whole,
};

const VOCAB: usize = 11;
const WIDTH: usize = 8;
const SEQ: usize = 5;

/// A residual sum with its norm: a place for hidden states.
#[derive(Module, Debug)]
pub(crate) struct Block {
    norm: LayerNorm,
    place: HiddenPlace,
}

/// The one block of a list of them: what lies between the words and the convolutions, by [`Probe::block`].
#[derive(Module, Debug)]
struct Step {
    place: HiddenPlace,
}

/// Words, two linear layers, a place for hidden states, an attention, both convolutions, a norm and a head. Widths of linear layers are multiples
/// of 4, for methods that cut them into blocks.
#[derive(Module, Debug)]
pub(crate) struct Probe {
    words: Embedding,
    mask: MaskPlace,
    query: Linear,
    block: Block,
    mixer: MixerAttention,
    stack: Vec<Step>,
    conv: Conv1d,
    image: Conv2d,
    norm: LayerNorm,
    mix: Linear,
    head: Linear,
}

/// Two heads that read what they mix: queries are the input.
#[derive(Module, Debug)]
struct MixerAttention {
    key: Linear,
    value: Linear,
}

/// `[batch, seq, 8] → [batch, 2, seq, 4]`.
fn heads(x: Tensor<3>) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, 2, width / 2]).swap_dims(1, 2)
}

/// `softmax(q·kᵀ + mask)·v` beside a score of 0 that has no value, so that a bias of all keys counts; `mask [batch or 1, 1,
/// 1, total]`, and what is `added` to the score of each pair, `[batch or 1, seq, total]`.
fn mixed(
    q: &Tensor<4>,
    [k, v]: [Tensor<3>; 2],
    mask: Option<Tensor<4>>,
    added: Option<Tensor<3>>,
) -> Tensor<3> {
    let [batch, _, seq, _] = q.dims();
    let mut scores = q.clone().matmul(heads(k).swap_dims(2, 3));
    if let Some(mask) = mask {
        scores = scores + mask;
    }
    if let Some(added) = added {
        scores = scores + added.unsqueeze_dim::<4>(1);
    }
    let [_, heads_of, _, total] = scores.dims();
    let beside = Tensor::zeros([batch, heads_of, seq, 1], &q.device().inner());
    let weights = softmax(Tensor::cat(vec![scores, beside], 3), 3).narrow(3, 0, total);
    weights.matmul(heads(v)).swap_dims(1, 2).reshape([batch, seq, WIDTH])
}

/// Scores of columns as a mask, `[1, 1, 1, n]`.
fn row(scores: &[f32], device: &Device) -> Tensor<4> {
    let data = TensorData::new(scores.to_vec(), [1, 1, 1, scores.len()]);
    Tensor::from_data(data, &device.clone().inner())
}

impl MixerAttention {
    /// Reads `x`, and `all` where these are more.
    fn forward(
        &self,
        x: Tensor<3>,
        all: Option<Whole<'_>>,
        mask: Option<Tensor<4>>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let all = all.unwrap_or_else(|| Whole { x: x.clone(), cx: cx.clone() });
        let mut k = all.cx.at("key").linear(&self.key, all.x.clone());
        let mut v = all.cx.at("value").linear(&self.value, all.x.clone());
        let ([_, seq, _], [_, total, _], mut mask) = (x.dims(), all.x.dims(), mask);
        let mut added = cx.products(seq, total);
        if let Some(Front { parts: [keys, values], scores: own }) = all.cx.prefix(&all.x) {
            (k, v) = (Tensor::cat(vec![keys, k], 1), Tensor::cat(vec![values, v], 1));
            added = added.map(|added| {
                let [batch, ..] = added.dims();
                let none = Tensor::zeros([batch, seq, own.len()], &x.device().inner());
                Tensor::cat(vec![none, added], 2)
            });
            let device = &x.device();
            let rest = mask.unwrap_or_else(|| row(&vec![0.0; total], device));
            let [batch, ..] = rest.dims();
            let front = row(&own, device).expand([batch, 1, 1, own.len()]);
            mask = Some(Tensor::cat(vec![front, rest], 3));
        }
        let q = heads(x.clone());
        let y = mixed(&q, [k, v], mask, added);
        cx.attention(&x, &q, &self.key, &self.value, y)
    }
}

impl Probe {
    /// The same numbers on every device.
    pub(crate) fn new(device: &Device) -> Self {
        let conv = Conv1dConfig::new(WIDTH, 6, 3).with_padding(PaddingConfig1d::Same);
        let model = Self {
            words: EmbeddingConfig::new(VOCAB, WIDTH).init(device),
            mask: MaskPlace { word: Some(5), missing: Vec::new() },
            query: LinearConfig::new(WIDTH, WIDTH).init(device),
            block: Block {
                norm: LayerNormConfig::new(WIDTH).init(device),
                place: HiddenPlace::new(WIDTH),
            },
            mixer: MixerAttention {
                key: LinearConfig::new(WIDTH, WIDTH).init(device),
                value: LinearConfig::new(WIDTH, WIDTH).init(device),
            },
            stack: vec![Step { place: HiddenPlace::new(WIDTH) }],
            conv: conv.init(device),
            image: Conv2dConfig::new([1, 4], [2, 2]).with_stride([1, 2]).init(device),
            norm: LayerNormConfig::new(12).init(device),
            mix: LinearConfig::new(12, 8).init(device),
            head: LinearConfig::new(8, 4).init(device),
        };
        model.map(&mut Drawn::new(1, 0.5))
    }

    /// As a model of the zoo is written: every layer through the scope.
    pub(crate) fn forward(&self, ids: &Tensor<2, Int>, cx: &Scope<'_>) -> Tensor<3> {
        let words = cx.at("words");
        let (mut x, mut front) = (words.embedding(&self.words, ids.clone()), Vec::new());
        x = words.positional(x, || {
            let columns = Tensor::arange(0..SEQ as i64, &ids.device()).unsqueeze::<2>();
            columns.expand(ids.dims())
        });
        // The last rows end in padding; virtual tokens are none of the sequence's own.
        let kept = ids.clone().ones_like().slice_fill([2..4, SEQ - 1..SEQ], 0);
        let own = || SeenTokens {
            ids: ids.clone(),
            kept: kept.clone(),
            past: 0,
            before: None,
            scores: None,
        };
        if let Some(Front { parts: [prompt], scores }) = words.prompt(&x, own) {
            (x, front) = (Tensor::cat(vec![prompt, x], 1), scores);
        }
        let virtual_tokens =
            |value: i64| Tensor::<2, Int>::full([ids.dims()[0], front.len()], value, &ids.device());
        let (seen, kept) = match front.is_empty() {
            true => (ids.clone(), kept),
            false => (
                Tensor::cat(vec![virtual_tokens(-1), ids.clone()], 1),
                Tensor::cat(vec![virtual_tokens(0), kept], 1),
            ),
        };
        let scores = Some(seen_scores(&kept, 0));
        let mut cx =
            cx.reading(SeenTokens { ids: seen, kept: kept.clone(), past: 0, before: None, scores });
        // The words as a picture: the first alone, the others in two rows.
        cx = cx.over(Grid { first: kept.dims()[1] - SEQ + 1, rows: 2, columns: 2 });
        let mut carried = cx.at("stack").carried();
        if let Some(Front { parts: [tokens], scores }) = carried.before(0, &x) {
            cx = cx.behind(scores.len(), Some(seen_scores(&kept, scores.len())));
            (x, front) = (Tensor::cat(vec![tokens, x], 1), [scores, front].concat());
        }
        // Nobody is hidden from the mixer but virtual tokens that count for nothing.
        let mask = (!front.is_empty()).then(|| {
            let mut scores = front.clone();
            scores.resize(x.dims()[1], 0.0);
            row(&scores, &ids.device())
        });
        let block =
            |x, whole: Option<&Whole<'_>>, mask, cx: &Scope<'_>| self.block(x, whole, mask, cx);
        let x = carried.after(cx.at("stack").routed(0, x, mask, &cx, block));
        let x = cx.at("conv").conv1d(&self.conv, x.swap_dims(1, 2)); // [batch, 6, seq]
        let x = cx.at("image").conv2d(&self.image, x.swap_dims(1, 2).unsqueeze_dim(1));
        let x = cx.at("norm").layer_norm(&self.norm, 1e-5, flat(x));
        let mut x = relu(cx.at("mix").linear(&self.mix, x));
        if let Some(mask) = cx.at("words").masks().first() {
            // Columns are one less behind the picture.
            x = x.narrow(1, mask.column, 1);
            x = if mask.transform { x.tanh() } else { x };
        }
        cx.at("head").linear(&self.head, x)
    }

    /// The one block of the list "stack", whose layers have names of their own.
    fn block(
        &self,
        x: Tensor<3>,
        whole: Option<&Whole<'_>>,
        mask: Option<Tensor<4>>,
        cx: &Scope<'_>,
    ) -> Tensor<3> {
        let first = |x: Tensor<3>, cx: &Scope<'_>| {
            let y = relu(cx.at("query").linear(&self.query, x.clone()));
            let at = cx.at("block");
            let y = at.hidden(Hidden::sublayer(&x, y).before(&self.block.norm));
            at.at("norm").layer_norm(&self.block.norm, 1e-5, x + y)
        };
        let read = x.clone();
        let x = first(x, cx);
        let all =
            whole.map(|all| Whole { x: first(all.x.clone(), &all.cx), cx: all.cx.at("mixer") });
        let x = x.clone() + self.mixer.forward(x, all, mask, &cx.at("mixer"));
        cx.block("stack", 0).hidden(Hidden::block(read, x))
    }

    /// As Burn's users write it: a model that knows of no adapters.
    pub(crate) fn plain(&self, ids: &Tensor<2, Int>) -> Tensor<3> {
        let x = self.words.forward(ids.clone());
        let y = relu(self.query.forward(x.clone()));
        let x = self.block.norm.forward(x + y);
        let (k, v) = (self.mixer.key.forward(x.clone()), self.mixer.value.forward(x.clone()));
        let x = x.clone() + mixed(&heads(x), [k, v], None, None);
        let x = self.conv.forward(x.swap_dims(1, 2));
        let x = self.image.forward(x.swap_dims(1, 2).unsqueeze_dim(1));
        let x = self.norm.forward(flat(x));
        self.head.forward(relu(self.mix.forward(x)))
    }
}

/// Padding is hidden, and what comes later; `n` tokens more stand in front.
fn seen_scores(kept: &Tensor<2, Int>, n: usize) -> Tensor<4> {
    let ([batch, own], device) = (kept.dims(), kept.device());
    let all = n + own;
    let later = Tensor::<2>::full([all, all], HIDDEN, &device).triu(1);
    let kept = match n {
        0 => kept.clone(),
        n => Tensor::cat(vec![Tensor::ones([batch, n], &device), kept.clone()], 1),
    };
    let padding = (kept.float() - 1.0) * -HIDDEN;
    padding.reshape([batch, 1, 1, all]) + later.reshape([1, 1, all, all])
}

/// `[batch, 4, h, w]` → `[batch, h, 4 · w]`.
fn flat(x: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = x.dims();
    x.swap_dims(1, 2).reshape([batch, height, channels * width])
}

/// Data for methods that look at some first: the mean square of the output over three batches.
impl Passes for Probe {
    fn batches(&self) -> usize {
        3
    }

    fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        let words = VOCAB as i32;
        let ids = ids(&self.words.weight.device()) * (batch as i32 + 2);
        self.forward(&ids.remainder_scalar(words), cx).powi_scalar(2).mean()
    }

    fn counted(&self, _batch: usize, _targets_only: bool) -> Counted {
        Counted { batch: 4, seq: SEQ, kept: vec![true; 4 * SEQ] }
    }
}

/// Four rows of words.
pub(crate) fn ids(device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..4 * SEQ as i32).map(|i| (i * 7 + i / 3) % VOCAB as i32).collect();
    Tensor::from_data(TensorData::new(values, [4, SEQ]), device)
}

/// Whether the method serves linear places; the laws that are about one place take one of these, if so.
pub(crate) fn serves_linear<T: Method>() -> bool {
    T::KINDS.contains(&Kind::Linear)
}

/// The linear places, if the method serves any, and all that it serves but the head, by name.
pub(crate) fn targets<T: Method>(sites: &Sites) -> [Targets; 2] {
    let of = |serves: &dyn Fn(Kind) -> bool| Targets {
        target_modules: Some(
            sites
                .places()
                .filter(|site| serves(site.kind) && site.path != "head")
                .map(|site| site.path.clone())
                .collect::<Names>(),
        ),
        ..Targets::default()
    };
    let all = |kind| T::KINDS.contains(&kind);
    let narrow = |kind| if serves_linear::<T>() { kind == Kind::Linear } else { all(kind) };
    [of(&narrow), of(&all)]
}

/// Gives every parameter values drawn from a seed.
///
/// A policy's buffers keep theirs: a mask is no number like any other.
pub(crate) struct Drawn {
    state: u64,
    size: f32,
    trained: Trained,
}

impl Drawn {
    pub(crate) fn new(seed: u64, size: f32) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), size, trained: Trained::default() }
    }

    fn next(&mut self) -> f32 {
        // Knuth's generator; its high bits are good enough here.
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let unit = (self.state >> 40) as f32 / (1_u64 << 24) as f32;
        (2.0 * unit - 1.0) * self.size
    }
}

impl ModuleMapper for Drawn {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.trained.enter(container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.trained.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.trained.here() {
            return param;
        }
        let shape = param.dims();
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| self.next()).collect();
        fresh(&param, TensorData::new(values, shape))
    }
}

/// The same parameter with other values, still a leaf.
pub(crate) fn fresh<const D: usize>(
    param: &Param<Tensor<D>>,
    data: TensorData,
) -> Param<Tensor<D>> {
    let leaf = Param::from_tensor(Tensor::from_data(data, &param.device()));
    Param::initialized(param.id, leaf.val())
}

/// All trained parameters' values, by the order of the module.
#[derive(Default)]
pub(crate) struct Values(Vec<Vec<f32>>, Trained);

impl ModuleVisitor for Values {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.1.enter(container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.1.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.1.here() {
            self.0.push(values(param.base()));
        }
    }
}

pub(crate) fn all_values<M: Module>(module: &M) -> Vec<Vec<f32>> {
    let mut found = Values::default();
    module.visit(&mut found);
    found.0
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("is f32")
}

/// The largest difference; what is no number is further than all numbers.
#[track_caller]
pub(crate) fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or_default()
}

/// The largest difference, and what it may be: a few hundred roundings of numbers of this size.
pub(crate) fn distance(found: &[f32], expected: &[f32]) -> [f32; 2] {
    let size = expected.iter().fold(1.0_f32, |size, x| size.max(x.abs()));
    [far(found, expected), 256.0 * f32::EPSILON * size]
}

#[track_caller]
pub(crate) fn close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let [far, bound] = distance(found, expected);
    assert!(far <= bound, "{what}: differs by {far}, expected at most {bound}");
}
