//! Masks: nothing but what they choose changes or is stored, and plain torch chooses and learns the same
//! (`interop/selective.py`).

use super::{Case, Law, check};
use crate::hf::{base, device, fixtures, floats, open};
use crate::probe::{Probe, far, fresh, values};
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Tensor, TensorData};
use burn_peft::core::{
    AdapterConfig, Adapters, AnyAdapter, Counted, Error, Folded, Kind, Method, Passes, Scope, Site,
    Sites, Targets, Value, adapt, merge, save, survey, trained_parameters,
};
use burn_peft::models::{BertForSequenceClassification, Pretrained, Tokens};
use burn_peft::registry::{Job, with_method};
use burn_peft::selective::{
    BitFitAdapter, Chosen, FishDipAdapter, FishMask, Mask, PaFi, Parameter, Sam, SelectedAdapter,
    Smallest, SptAdapter, ThresholdMaskAdapter, mask_of,
};
use burn_peft::train::Objective;
use burn_peft::train::data::ClassBatch;
use serde_json::Value as Json;

/// A negative zero in each parameter: a sum with +0 would change it.
struct MinusZero;

impl ModuleMapper for MinusZero {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let mut numbers = values(param.base());
        let last = numbers.len() - 1;
        numbers[last] = -0.0;
        let shape = param.dims();
        fresh(&param, TensorData::new(numbers, shape))
    }
}

/// A parameter's numbers, as the checkpoint lays them out.
fn numbers(site: &Site, parameter: Parameter) -> Vec<f32> {
    match (parameter, &site.weight, site.kind) {
        (Parameter::Bias, ..) => site.bias.clone().map(values).unwrap_or_default(),
        (_, Value::D2(w), Kind::Linear) => values(w.clone().transpose()),
        (_, Value::D1(w), _) => values(w.clone()),
        (_, Value::D2(w), _) => values(w.clone()),
        (_, Value::D3(w), _) => values(w.clone()),
        (_, Value::D4(w), _) => values(w.clone()),
    }
}

/// The numbers that an adapter of this crate may change; `None` where it is another's, or where any may.
fn may_change(adapter: &AnyAdapter, site: &Site) -> Option<Mask> {
    if let Some(selected) = adapter.get::<SelectedAdapter>() {
        return Some(selected.chosen(site).into_iter().collect());
    }
    if let Some(dip) = adapter.get::<FishDipAdapter>() {
        return Some(dip.chosen(site).into_iter().collect());
    }
    if let Some(spt) = adapter.get::<SptAdapter>() {
        let alone = spt.low_rank.is_none();
        return alone.then(|| spt.sparse.chosen(site).into_iter().collect());
    }
    adapter.get::<BitFitAdapter>()?;
    let all = Chosen::all(Parameter::Bias.shape(site)?)?;
    Some([(Parameter::Bias.name(site), all)].into_iter().collect())
}

law!(
    /// Merged, a model has changed at the chosen numbers, and at no other by a bit.
    what_is_not_chosen_keeps_every_bit,
    |case| {
        let adapters = case.trained(1).valid();
        let erased = adapters.erased();
        let masked = |any: &AnyAdapter| any.get::<ThresholdMaskAdapter>().is_some();
        let ours = |(path, any): (&str, &AnyAdapter)| {
            masked(any) || may_change(any, case.sites.get(path).expect("was found by it")).is_some()
        };
        if !erased.iter().all(ours) {
            return;
        }
        let model = case.model.clone().map(&mut MinusZero);
        // A norm's adapter holds handles on the norm that it was made for; the fold does not need them.
        let folds = Folded::<T>::new(&adapters).expect("all of this crate fold");
        let merged = merge(&model, &[(&folds, 1.0)]).expect("is finite");
        let [before, after] = [&model, &merged].map(|model| Sites::of(model, None));
        let mut changed = 0;
        for site in &before.all {
            let now = after.get(&site.path).expect("is there");
            let adapter = erased.get(&site.path);
            let mask = adapter.and_then(|any| may_change(any, site)).unwrap_or_default();
            for parameter in Parameter::ALL {
                let name = parameter.name(site);
                let chosen = mask.get(&name).map_or(&[][..], Chosen::indices);
                let [before, after] = [site, now].map(|site| numbers(site, parameter));
                assert_eq!(before.len(), after.len());
                for (at, (before, after)) in (0_u32..).zip(before.iter().zip(&after)) {
                    let same = before.to_bits() == after.to_bits();
                    changed += usize::from(!same);
                    let expected = match adapter.is_some_and(masked) {
                        true => same || after.to_bits() == 0,
                        false => same != chosen.contains(&at),
                    };
                    assert!(expected, "{} {name}[{at}]: {before} {after}", case.name);
                }
            }
        }
        assert!(changed > 0, "{}", case.name);
    }
);

#[derive(Module, Debug)]
struct One {
    query: Linear,
}

#[test]
fn half_a_percent_of_a_layer_is_stored_as_half_a_percent() {
    let model = One { query: LinearConfig::new(400, 300).init(&device()) };
    let sites = Sites::of(&model, None);
    let method = PaFi::new(0.005, Targets::list(["query"]));
    let adapters = adapt(&sites, &method, 0, &device()).expect("fits");
    let chosen = 600 + 1; // of 120,000 weights and 300 biases
    assert_eq!(trained_parameters(&adapters), chosen);
    let folder = tempfile::tempdir().expect("makes a folder");
    save(folder.path(), &AdapterConfig::new(method), &sites, &adapters).expect("is written");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = path.metadata().expect("is there").len() as usize;
    // A value and an index each, and a header.
    let least = 8 * chosen;
    assert!((least..least + 1500).contains(&bytes), "{bytes} bytes");
    let mut file = open(path);
    let values = floats(&mut file, "base_model.model.query.weight.values");
    assert_eq!(values.len(), 600);
}

#[test]
fn a_mask_serves_other_trainings_and_combines() {
    let model = Probe::new(&device());
    let sites = Sites::of(&model, Some("head"));
    let targets = Targets::list(["query", "mix", "norm"]);
    let fish = survey(FishMask::new(0.3, targets.clone()), &sites, &model).expect("fits");
    let sam = survey(Sam::new(0.3, targets.clone()), &sites, &model).expect("fits");
    let [fish, sam] = [fish.mask(), sam.mask()].map(|mask| mask.expect("was chosen").clone());
    // 64 + 8, 96 + 8, 12 + 12 and 8 + 8 numbers: two norms have that name.
    assert_eq!([fish.count(), sam.count()], [64, 64]);
    assert_ne!(fish, sam);
    let file = tempfile::NamedTempFile::new().expect("makes a file");
    let both = fish.intersection(&sam).expect("fit");
    both.save(file.path()).expect("is written");
    let read = Mask::load(file.path()).expect("is whole");
    let alone = fish.difference(&sam).expect("fit");
    assert_eq!(read.count() + alone.count(), fish.count());
    // No data are asked for: there is no survey.
    let method = PaFi::new(0.1, targets).with_mask(read.clone());
    let adapters = adapt(&sites, &method, 0, &device()).expect("fits");
    assert_eq!((mask_of(&adapters, &sites), trained_parameters(&adapters)), (read, both.count()));

    let whole = ("query.weight".to_owned(), Chosen::all(vec![8, 8]).expect("can be counted"));
    let method = method.with_mask([whole].into_iter().collect());
    let other = LinearConfig::new(8, 12).init(&device());
    let mut others = sites.clone();
    for site in others.all.iter_mut().filter(|site| site.path == "query") {
        site.weight = Value::D2(other.weight.val());
    }
    let said = adapt(&others, &method, 0, &device()).expect_err("is of another shape").to_string();
    assert!(said.contains("query.weight") && said.contains("[12, 8]"), "{said}");
}

#[test]
fn what_cannot_be_chosen_is_refused() {
    let model = Probe::new(&device());
    let sites = Sites::of(&model, Some("head"));
    let targets = Targets::list(["query"]);
    let method = FishMask::new(0.3, targets.clone());
    let said = adapt(&sites, &method, 0, &device()).expect_err("saw no data").to_string();
    assert!(said.contains("FISHMASK") && said.contains("survey"), "{said}");
    for ratio in [0.0, 1.5, f64::NAN] {
        let method = FishMask::new(ratio, targets.clone());
        let said = survey(method, &sites, &model).expect_err("is no share").to_string();
        assert!(said.starts_with("keep_ratio: "), "{said}");
    }
    let few = survey(FishMask::new(0.01, targets), &sites, &model).expect_err("is none");
    assert!(few.to_string().contains("0.01 of 72"), "{few}");
}

/// A model with the fixture's texts, four a batch.
struct Texts {
    model: BertForSequenceClassification,
    batches: Vec<ClassBatch>,
    examples: Vec<ClassBatch>,
}

impl Texts {
    fn new() -> Self {
        let mut file = open(fixtures().join("selective/golden.safetensors"));
        let mut ints = |name: &str| {
            let (shape, values) = file.take_ints(name).expect("is in the file");
            (shape, values.into_iter().map(|value| value as i32).collect::<Vec<_>>())
        };
        let (shape, ids) = ints("input_ids");
        let [mask, types, labels] =
            ["attention_mask", "token_type_ids", "labels"].map(|name| ints(name).1);
        let seq = shape[1];
        let cut = |size: usize| -> Vec<ClassBatch> {
            let batch = |at: usize| {
                let part = |all: &[i32]| all[at * seq * size..(at + 1) * seq * size].to_vec();
                let (ids, mask, type_ids) = (part(&ids), part(&mask), Some(part(&types)));
                let tokens = Tokens { batch: size, seq, ids, mask, type_ids, ..Tokens::default() };
                ClassBatch { input: tokens, labels: labels[at * size..(at + 1) * size].to_vec() }
            };
            (0..labels.len() / size).map(batch).collect()
        };
        Self { model: base("bert"), batches: cut(4), examples: cut(1) }
    }

    fn mean(&self, batch: &ClassBatch, cx: &Scope<'_>) -> Tensor<1> {
        self.model.loss(batch, &device(), cx).sum / batch.labels.len() as f64
    }
}

impl Passes for Texts {
    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn loss(&self, batch: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.mean(&self.batches[batch], cx)
    }

    fn counted(&self, batch: usize, targets_only: bool) -> Counted {
        BertForSequenceClassification::counted(&self.batches[batch], targets_only)
    }

    fn examples(&self) -> usize {
        self.examples.len()
    }

    fn example_loss(&self, example: usize, cx: &Scope<'_>) -> Tensor<1> {
        self.mean(&self.examples[example], cx)
    }
}

/// What a configuration chooses over the texts, and its losses of some steps of training.
struct Learn<'a> {
    asked: &'a Json,
    texts: &'a Texts,
    steps: usize,
}

impl Job for Learn<'_> {
    type Output = Result<(Mask, Vec<f32>), Error>;

    fn run<T: Method>(self) -> Self::Output {
        let Self { asked, texts, steps } = self;
        let sites = Sites::of(&texts.model, Some(BertForSequenceClassification::OUTPUT));
        let method: T = serde_json::from_value(asked.clone()).expect("is the method's");
        let method = survey(method, &sites, texts)?;
        let mut adapters = adapt(&sites, &method, 0, &device().autodiff())?;
        let erased: Adapters<AnyAdapter> = adapters.erased();
        let own = erased.iter().filter_map(|(path, any)| may_change(any, sites.get(path)?));
        let mask = own.flat_map(|mask| {
            let parts = mask.iter().map(|(name, chosen)| (name.to_owned(), chosen.clone()));
            parts.collect::<Vec<_>>()
        });
        let mask = mask.collect();
        let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
        let mut losses = Vec::new();
        for step in 0..steps {
            let loss = texts.loss(step % texts.batches(), &Scope::new(&adapters));
            losses.push(loss.clone().into_scalar::<f32>());
            let gradients = GradientsParams::from_grads(loss.backward(), &adapters);
            adapters = optimizer.step(1e-2, adapters, gradients);
        }
        Ok((mask, losses))
    }
}

#[test]
fn torch_chooses_and_learns_the_same() {
    let folder = fixtures().join("selective");
    let cases = std::fs::read_to_string(folder.join("cases.json")).expect("is committed");
    let cases: serde_json::Map<String, Json> = serde_json::from_str(&cases).expect("is JSON");
    let mut golden = open(folder.join("golden.safetensors"));
    let texts = Texts::new();
    assert!(cases.len() >= 12);
    for (name, asked) in &cases {
        let expected = floats(&mut golden, &format!("{name}/losses"));
        let method = asked["peft_type"].as_str().expect("is a name");
        let job = Learn { asked, texts: &texts, steps: expected.len() };
        let (mask, losses) = with_method(method, job).expect("is listed").expect("fits");
        let start = format!("{name}/");
        let names = golden.names().filter_map(|held| held.strip_prefix(&start));
        let names: Vec<String> = names.map(str::to_owned).collect();
        assert_eq!(mask.iter().map(|(name, _)| name).collect::<Vec<_>>(), names, "{name}");
        for (parameter, chosen) in mask.iter() {
            let (_, there) = golden.take_ints(&format!("{start}{parameter}")).expect("is there");
            let here: Vec<i64> = chosen.indices().iter().map(|at| i64::from(*at)).collect();
            assert_eq!(here, there, "{name} {parameter}");
        }
        let far = far(&losses, &expected);
        assert!(far < 1e-4, "{name}: {losses:?}, expected {expected:?}");
        assert!(losses[3] < losses[0], "{name} learns nothing: {losses:?}");
    }
}

#[test]
fn norms_are_chosen_whole_or_by_number() {
    let model = Probe::new(&device());
    let sites = Sites::of(&model, None);
    let count = |norms: bool| {
        let mut method = PaFi::new(0.5, Targets::list(["norm"]));
        method.criterion = Smallest { norms };
        trained_parameters(&adapt(&sites, &method, 0, &device()).expect("fits"))
    };
    assert_eq!([count(true), count(false)], [40, 20]);
}
