//! Gradient checkpointing changes no number: loss and gradients of a step are those of a step that keeps everything, dropout
//! and all else that is drawn among them. A binary of its own, because a device has one generator for the whole process.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor};
use burn::train::TrainStep;
use burn_peft::additive::{Bottleneck, LnTuning, PrefixTuning, PromptTuning, Vpt};
use burn_peft::core::{
    Adapter, Adapters, AnyAdapter, Batch, Beside, Counted, Error, Guide, Laid, Method, Names,
    Overlay, Passes, Scope, Sites, Strength, Targets, TensorFile, Trained, adapt, survey,
};
use burn_peft::models::{
    BertForSequenceClassification, Images, LlamaForCausalLM, Precision, Pretrained,
    T5ForConditionalGeneration, Tokens, ViTForImageClassification,
};
use burn_peft::registry::{ForEach, NAMES, for_each_method};
use burn_peft::reparam::{Lora, Vera};
use burn_peft::train::data::{CausalBatch, ClassBatch, IGNORED, Seq2SeqBatch};
use burn_peft::train::{Objective, Step, StepSettings, Tuned};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One test after the other: they share the device's generator.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device() -> Device {
    burn_peft::device::by_name(burn_peft::device::names()[0]).expect("is in the build")
}

fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models").join(model)
}

fn base<M: Pretrained>(name: &str) -> Arc<M> {
    let model = M::load(&folder(name), Precision::F32, 0, &device(), |_| ()).expect("is whole");
    Arc::new(model.model)
}

fn tokens(model: &str) -> Tokens {
    let path = folder(model).join("golden.safetensors");
    let mut file = TensorFile::open(path).expect("is committed");
    let mut ints = |name: &str| {
        let (shape, values) = file.take_ints(name).expect("is in the file");
        (shape, values.into_iter().map(|v| v as i32).collect::<Vec<_>>())
    };
    let ((shape, ids), mask) = (ints("input_ids"), ints("attention_mask").1);
    assert!(mask.contains(&0));
    Tokens { ids, mask, batch: shape[0], seq: shape[1], ..Tokens::default() }
}

fn classes() -> ClassBatch {
    ClassBatch { input: tokens("bert"), labels: vec![1, 0, 1] }
}

/// Each token's target is the next, but at padding and at the end.
fn words() -> CausalBatch {
    let tokens = tokens("llama");
    let target = |at: usize| match tokens.mask.get(at + 1) {
        Some(1) if !(at + 1).is_multiple_of(tokens.seq) => tokens.ids[at + 1],
        _ => IGNORED,
    };
    CausalBatch { targets: (0..tokens.ids.len()).map(target).collect(), tokens }
}

/// The first of these has padding.
fn pairs() -> Seq2SeqBatch {
    let row = |seq: usize, by: i32, kept: &dyn Fn(usize) -> bool| Tokens {
        ids: (0..2 * seq as i32).map(|i| 3 + i * by % 60).collect(),
        mask: (0..2 * seq).map(|at| i32::from(kept(at))).collect(),
        batch: 2,
        seq,
        ..Tokens::default()
    };
    let (input, decoder) = (row(6, 7, &|at| !(4..6).contains(&at)), row(4, 11, &|_| true));
    Seq2SeqBatch { targets: decoder.ids.iter().map(|id| id + 1).collect(), input, decoder }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("is f32")
}

/// Every trained parameter moved, so that each has a gradient that shows.
#[derive(Default)]
struct Moved(Trained);

impl ModuleMapper for Moved {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.0.enter(container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.0.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.0.here() {
            return param;
        }
        let (shape, device) = (param.dims(), param.val().device());
        let plain = Tensor::<D>::random(shape, Distribution::Uniform(-0.3, 0.3), &device.inner());
        let leaf = Param::from_tensor(Tensor::from_inner(plain));
        Param::initialized(param.id, leaf.val())
    }
}

/// Gradients of all parameters, in the module's order.
struct Found<'a>(&'a GradientsParams, Vec<Option<Vec<f32>>>);

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.push(self.0.get::<D>(param.id).map(values));
    }
}

/// What is trained, with what it adds to the loss.
struct Part(Adapters<AnyAdapter>, Guide<AnyAdapter>);

impl Part {
    fn of<T: Method>(sites: &Sites, method: &T) -> Result<Self, Error> {
        let adapters = adapt(sites, method, 1, &device().autodiff())?;
        device().seed(7);
        let adapters = adapters.map(&mut Moved::default());
        let guide = Guide::of(method, &adapters)?.erased();
        Ok(Self(adapters.erased(), guide))
    }
}

fn tuned<B: Objective>(model: &Arc<B>, parts: &[Part], seed: u64, again: bool) -> Tuned<B> {
    let settings =
        StepSettings { device: device(), max_grad_norm: 0.0, seed, gradient_checkpointing: again };
    let adapters = parts.iter().map(|Part(adapters, _)| adapters.clone()).collect();
    Tuned::new(model.clone(), adapters, settings).guided(parts.iter().map(|Part(_, guide)| guide))
}

/// Loss and gradients of a step.
fn step<B: Objective>(
    tuned: &Tuned<B>,
    batches: &[B::Batch],
    what: &str,
) -> (f64, Vec<Option<Vec<f32>>>) {
    let batches = batches.to_vec();
    let output = TrainStep::step(tuned, Step { index: 5, epoch: 0, ends_epoch: false, batches });
    if let Some(error) = tuned.failure() {
        unexpected(what, &error);
    }
    let mut found = Found(&output.grads, Vec::new());
    tuned.adapters.visit(&mut found);
    (output.item.loss, found.1)
}

#[track_caller]
#[allow(clippy::panic)]
fn unexpected(what: &str, error: &Error) -> ! {
    panic!("{what}: {error}")
}

/// The loss is the same to the bit. So is a gradient but for the order of sums, which differs where several parts meet: of
/// some hundred roundings of numbers as large as the largest gradient, as in the other laws. Returns that one.
#[track_caller]
fn same<B: Objective>(model: &Arc<B>, batches: &[B::Batch], parts: &[Part], what: &str) -> f32 {
    let of = |again: bool| step(&tuned(model, parts, 3, again), batches, what);
    let ((loss, kept), (again, recomputed)) = (of(false), of(true));
    assert!(loss.is_finite() && loss == again, "{what}: {loss} and {again}");
    let all = kept.iter().flatten().flatten();
    let largest = all.fold(0.0_f32, |most, x| most.max(x.abs()));
    assert!(largest.is_finite(), "{what}: {largest}");
    for (place, (one, other)) in kept.iter().zip(&recomputed).enumerate() {
        assert_eq!(one.is_some(), other.is_some(), "{what}: parameter {place} has a gradient");
        let (Some(one), Some(other)) = (one, other) else { continue };
        assert_eq!(one.len(), other.len(), "{what}: parameter {place}");
        let far = one.iter().zip(other).map(|(a, b)| (a - b).abs());
        let far = far.max_by(f32::total_cmp).unwrap_or_default();
        let bound = 256.0 * f32::EPSILON * largest;
        assert!(far <= bound, "{what}: parameter {place} is {far} apart, at most {bound} expected");
    }
    largest
}

/// A batch, for methods that look at data first.
struct One<'a, B: Objective>(&'a B, &'a B::Batch);

impl<B: Objective> Passes for One<'_, B> {
    fn batches(&self) -> usize {
        1
    }

    fn loss(&self, _batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.0.loss(self.1, &device(), cx).sum / B::targets(self.1) as f64
    }

    fn counted(&self, _batch: usize, targets_only: bool) -> Counted {
        B::counted(self.1, targets_only)
    }
}

/// All that a method serves but the output layer, and its linear places alone.
fn targets<T: Method>(sites: &Sites, output: &str) -> [Targets; 2] {
    let of = |linear_only: bool| {
        let served = sites.places().filter(|site| {
            let kind = site.kind;
            let linear = kind == burn_peft::core::Kind::Linear;
            T::KINDS.contains(&kind) && (linear || !linear_only) && site.path != output
        });
        let names = served.map(|site| site.path.clone()).collect::<Names>();
        Targets { target_modules: Some(names), ..Targets::default() }
    };
    [of(false), of(true)]
}

/// Samples of every method that this model can have.
struct Law<B: Objective + Pretrained> {
    name: &'static str,
    model: Arc<B>,
    batch: B::Batch,
    /// How many of each method.
    most: usize,
    served: BTreeSet<&'static str>,
    /// Whether some sample drew at all.
    drew: bool,
}

impl<B: Objective + Pretrained> Law<B> {
    fn over(name: &'static str, batch: B::Batch, most: usize) -> Self {
        let (model, served) = (base(name), BTreeSet::new());
        let mut law = Self { name, model, batch, most, served, drew: false };
        for_each_method(&mut law);
        law
    }

    fn part<T: Method>(&self, sites: &Sites, method: T) -> Result<Part, Error> {
        let method = survey(method.planned(100), sites, &One(&*self.model, &self.batch))?;
        let part = Part::of(sites, &method)?;
        Objective::check(&*self.model, &self.batch, &Scope::new(&part.0))?;
        Ok(part)
    }
}

impl<B: Objective + Pretrained> ForEach for Law<B> {
    fn visit<T: Method>(&mut self) {
        let sites = Sites::of(&*self.model, Some(B::OUTPUT));
        let [all, linear] = targets::<T>(&sites, B::OUTPUT).map(|targets| T::samples(&targets));
        for (number, (all, linear)) in all.into_iter().zip(linear).enumerate().take(self.most) {
            // An option may not serve every kind of place, nor a method every model.
            let part = self.part(&sites, all).or_else(|_| self.part(&sites, linear));
            let Ok(part) = part else { continue };
            let (parts, batches) = ([part], [self.batch.clone()]);
            let what = format!("{} sample {number} on {}", T::NAME, self.name);
            // Some act on tokens that this batch lacks.
            if same(&self.model, &batches, &parts, &what) > 0.0 {
                self.served.insert(T::NAME);
            }
            let of = |seed| step(&tuned(&self.model, &parts, seed, true), &batches, &what).0;
            self.drew = self.drew || of(3) != of(4);
        }
    }
}

#[test]
fn every_method_has_the_loss_and_gradients_of_a_step_that_keeps_all() {
    let _alone = alone();
    let bert = Law::<BertForSequenceClassification>::over("bert-mlm", classes(), usize::MAX);
    let llama = Law::<LlamaForCausalLM>::over("llama", words(), 2);
    assert!(bert.drew || llama.drew, "no sample draws anything");
    let served: BTreeSet<_> = bert.served.union(&llama.served).copied().collect();
    let left: Vec<_> = NAMES.iter().filter(|name| !served.contains(*name)).collect();
    assert!(left.is_empty(), "fit neither model: {left:?}");
}

fn sites<M: Pretrained>(model: &M) -> Sites {
    Sites::of(model, Some(M::OUTPUT))
}

fn part<T: Method>(sites: &Sites, method: &T) -> Part {
    Part::of(sites, method).unwrap_or_else(|error| unexpected(T::NAME, &error))
}

fn dropping(names: &[&str]) -> Lora {
    Lora { lora_dropout: 0.4, ..Lora::new(4, 8.0, Targets::list(names.iter().copied())) }
}

/// Several batches a step, each with numbers of its own, and several methods: with what stands in front of words, keys and
/// blocks, and a parameter that all blocks share.
#[test]
fn batches_and_methods_together() {
    let _alone = alone();
    let model: Arc<LlamaForCausalLM> = base("llama");
    let sites = sites(&*model);
    let parts = [
        part(&sites, &dropping(&["q_proj", "down_proj", "embed_tokens"])),
        part(&sites, &Vera::new(4, Targets::list(["v_proj"]))),
        part(&sites, &Bottleneck::pfeiffer(4.0, Targets::list(["mlp"]))),
        part(&sites, &PrefixTuning::new(3)),
        part(&sites, &PromptTuning::new(2)),
        part(&sites, &Vpt { prompt_dropout: 0.3, ..Vpt::deep(2) }),
        part(&sites, &LnTuning::new(Targets::list(["norm", "input_layernorm"]))),
    ];
    assert!(same(&model, &[words(), words()], &parts, "llama") > 0.0);
}

#[test]
fn images_and_pairs_of_texts() {
    let _alone = alone();
    let vit: Arc<ViTForImageClassification> = base("vit");
    let pixels = (0..2 * 3 * 12 * 12).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
    let input = Images { pixels, batch: 2, shape: [3, 12, 12] };
    let of_vit = sites(&*vit);
    let parts =
        [part(&of_vit, &dropping(&["query", "value", "projection"])), part(&of_vit, &Vpt::deep(2))];
    assert!(same(&vit, &[ClassBatch { input, labels: vec![1, 0] }], &parts, "vit") > 0.0);

    // Its blocks share the scores of distances, and those of the decoder what the encoder gives on.
    for name in ["t5", "t5-gated"] {
        let t5: Arc<T5ForConditionalGeneration> = base(name);
        let of_t5 = sites(&*t5);
        let lora = dropping(&["q", "v", "wo", "shared", "relative_attention_bias"]);
        let norms = LnTuning::new(Targets::list(["final_layer_norm", "layer_norm"]));
        let parts =
            [part(&of_t5, &lora), part(&of_t5, &norms), part(&of_t5, &PrefixTuning::new(2))];
        assert!(same(&t5, &[pairs()], &parts, name) > 0.0);
    }
}

/// Takes note of what a layer reads, and changes nothing.
#[derive(Debug)]
struct Spy(&'static str, Note);

#[derive(Debug, Default)]
struct Note(Mutex<Option<Tensor<3>>>);

impl Adapter for Note {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(x.clone());
        None
    }
}

impl Overlay for Spy {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path.ends_with(self.0) {
            laid.push(Laid { adapter: &self.1, strength: Strength::Scale(1.0) });
        }
    }
}

impl Beside for Spy {
    fn term(&self, _batch: &Batch<'_>) -> Result<Tensor<1>, Error> {
        let seen = self.1.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let seen = seen.ok_or_else(|| Error::place(self.0, "was not read"))?;
        Ok(seen.square().mean())
    }
}

/// A term of the loss may read what the head reads; of what flows inside a block no gradient would come.
#[test]
fn what_is_noted_inside_a_block_is_refused() {
    let _alone = alone();
    let model: Arc<BertForSequenceClassification> = base("bert");
    let of = |place: &'static str| {
        let Part(adapters, _) = part(&sites(&*model), &dropping(&["query", "value"]));
        let spy = move |_: &Adapters<AnyAdapter>| {
            Some(Box::new(Spy(place, Note::default())) as Box<dyn Beside>)
        };
        let guide = Guide { beside: Some(Arc::new(spy)), ..Guide::default() };
        [Part(adapters, guide)]
    };
    assert!(same(&model, &[classes()], &of("classifier"), "at the head") > 0.0);
    let batches = vec![classes()];
    let tuned = tuned(&model, &of("output.dense"), 3, true);
    let _ = TrainStep::step(&tuned, Step { index: 0, epoch: 0, ends_epoch: false, batches });
    let said = tuned.failure().expect("is refused").to_string();
    let place = "bert.encoder.layer.0.attention.output.dense: ";
    assert!(said.starts_with(place) && said.contains("gradient_checkpointing"), "{said}");
}
