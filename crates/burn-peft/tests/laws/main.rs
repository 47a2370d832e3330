//! The laws, over every registered method, every option that it samples, and every backend of the
//! build. A method needs no tests of its own to be held to them. Backends after the first are held
//! to what the first gives by all samples, and to the laws of numbers by each method's first.

mod adapterhub;
#[path = "../../examples/any_model.rs"]
mod any_model;
mod beside;
mod combine;
mod hf;
mod hf_convolutions;
mod hf_methods;
mod matrix;
mod mixed;
mod names;
mod other_models;
mod probe;
mod prompts;
mod ragged;
mod seq2seq;
mod variants;
mod vision;
mod whole_sequence;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::core::{
    Adapter, AdapterConfig, Adapters, BASE, Bank, Error, Folded, Folds, Method, Scope, Sites,
    Trained, Value, adapt, load, merge, save, survey, trained_parameters,
};
use burn_peft::device;
use burn_peft::registry::{ForEach, for_each_method};
use probe::{Drawn, Probe, all_values, close, fresh, ids, serves_linear, targets, values};
use std::panic::Location;

/// One configuration of a method over the probe, on one backend.
struct Case<T: Method> {
    name: String,
    method: T,
    device: Device,
    model: Probe,
    sites: Sites,
    ids: Tensor<2, Int>,
    linear_only: bool,
}

impl<T: Method> Case<T> {
    fn adapters(&self, seed: u64) -> Result<Adapters<T::Adapter>, Error> {
        adapt(&self.sites, &self.method, seed, &self.device.clone().autodiff())
    }

    /// As after training: every parameter moved.
    fn trained(&self, seed: u64) -> Adapters<T::Adapter> {
        let fresh = self.adapters(seed).expect("fits: the cases are those that do");
        fresh.map(&mut Drawn::new(seed + 100, 0.4))
    }

    /// Whether it stands in front of the sequence.
    fn in_front(&self) -> bool {
        self.adapters(0).expect("fits").iter().any(|(_, adapter)| adapter.virtual_tokens() > 0)
    }

    fn forward(&self, cx: &Scope<'_>) -> Vec<f32> {
        values(self.model.forward(&self.ids, cx))
    }
}

/// A law over one case.
trait Law {
    /// How many of a method's samples are taken on later backends, where shaders take long: none, but of laws of numbers.
    const ELSEWHERE: usize = 0;

    fn holds<T: Method>(&self, case: &Case<T>);
}

struct Over<'a, L>(&'a L);

impl<L: Law> ForEach for Over<'_, L> {
    fn visit<T: Method>(&mut self) {
        for (nth, backend) in device::names().into_iter().enumerate() {
            let most = if nth == 0 { usize::MAX } else { L::ELSEWHERE };
            if most == 0 {
                continue;
            }
            let device = device::by_name(backend).expect("is in the build");
            let model = Probe::new(&device);
            let sites = Sites::of(&model, Some("head"));
            let ids = ids(&device);
            let mut served = [0, 0];
            for (wide, targets) in targets::<T>(&sites).into_iter().enumerate() {
                for (index, method) in T::samples(&targets).into_iter().enumerate() {
                    if served[wide] == most {
                        break;
                    }
                    let name = format!("{} sample {index} {wide} on {backend}", T::NAME);
                    let method = survey(method, &sites, &model);
                    let case = Case {
                        method: method.unwrap_or_else(|error| panic_at(&name, &error)),
                        name,
                        device: device.clone(),
                        model: model.clone(),
                        sites: sites.clone(),
                        ids: ids.clone(),
                        linear_only: wide == 0,
                    };
                    match case.adapters(0) {
                        // An option may not serve every kind of place, but must serve linear ones.
                        Err(Error::Place { .. }) if wide == 1 => continue,
                        Err(error) => panic_at(&case.name, &error),
                        Ok(_) => served[wide] += 1,
                    }
                    self.0.holds(&case);
                }
            }
            assert!(served.iter().all(|&count| count > 0), "{}: {served:?}", T::NAME);
        }
    }
}

#[track_caller]
#[allow(clippy::panic)]
fn panic_at(name: &str, error: &Error) -> ! {
    panic!("{name}: {error} ({})", Location::caller())
}

fn check(law: &impl Law) {
    for_each_method(&mut Over(law));
}

macro_rules! law {
    ($(#[$doc:meta])* $name:ident $(, $few:ident = $most:expr)?, |$case:ident| $body:block) => {
        $(#[$doc])*
        #[test]
        fn $name() {
            struct This;
            impl Law for This {
                $(const $few: usize = $most;)?
                fn holds<T: Method>(&self, $case: &Case<T>) $body
            }
            check(&This);
        }
    };
}

law!(
    /// `δ = 0` before the first step.
    a_fresh_adapter_changes_nothing,
    |case| {
        let adapters = case.adapters(3).expect("fits").valid();
        let (fresh, base) = (case.forward(&Scope::new(&adapters)), case.forward(&Scope::plain()));
        match case.method.starts_as_identity() {
            true => close(&fresh, &base, &case.name),
            false => assert_ne!(fresh, base, "{}", case.name),
        }
    }
);

law!(
    /// `δ(x, xW + b) = x·Δ(W) + Δ(b)`: overlay, attached and merged models are one function.
    the_faces_agree,
    ELSEWHERE = 1,
    |case| {
        let adapters = case.trained(1).valid();
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let overlaid = case.forward(&Scope::new(&adapters));
        let merged = merge(&case.model, &[(&folds, 1.0)]).expect("is finite");
        close(&values(merged.plain(&case.ids)), &overlaid, &format!("{} merged", case.name));
        assert_ne!(overlaid, case.forward(&Scope::plain()), "{}", case.name);
    }
);

law!(
    /// Adapters that don't count leave the plain forward's numbers, bit for bit; and these are Burn's own, bit
    /// for bit where operations are Burn's, and but for rounding where they are fused.
    off_is_the_base,
    ELSEWHERE = 1,
    |case| {
        let base = case.forward(&Scope::plain());
        let burns = values(case.model.plain(&case.ids));
        match device::by_name("flex").is_ok_and(|flex| flex == case.device) {
            true => close(&base, &burns, &case.name),
            false => assert_eq!(base, burns, "{}", case.name),
        }
        let mut bank = Bank::new();
        bank.insert("one", case.trained(1).valid());
        let none = bank.mix(&[("one", 0.0)]).expect("is held");
        assert_eq!(case.forward(&Scope::new(&none)), base);
        let nobody = bank.rows(&[BASE; 4], &case.device).expect("is held");
        assert_eq!(case.forward(&Scope::new(&nobody)), base);
    }
);

law!(
    /// Behind one type it is the same adapter with the same parameters, and comes back as what it was.
    erased_adapters_are_the_same,
    |case| {
        let adapters = case.trained(1);
        let erased = adapters.erased();
        let [there, here] = [
            case.forward(&Scope::new(&erased.valid())),
            case.forward(&Scope::new(&adapters.valid())),
        ];
        assert_eq!(there, here, "{}", case.name);
        assert_eq!(all_values(&erased), all_values(&adapters), "{}", case.name);
        let other = case.trained(5);
        let restored = erased.clone().load_record(other.clone().into_record());
        let back = restored.typed::<T::Adapter>().expect("is the method's");
        assert_eq!(all_values(&back), all_values(&other), "{}", case.name);
        let grads = |y: Tensor<3>| (y.clone() * y).mean().backward();
        let y = case.model.forward(&case.ids, &Scope::new(&erased));
        let found = GradientsParams::from_grads(grads(y), &erased);
        let y = case.model.forward(&case.ids, &Scope::new(&adapters));
        assert_eq!(found.len(), GradientsParams::from_grads(grads(y), &adapters).len());
        assert!(erased.typed::<burn_peft::core::TrainedCopy>().is_none(), "{}", case.name);
    }
);

law!(
    /// What is written is read back, bit for bit, and writing it again gives the same bytes.
    saving_loses_nothing,
    |case| {
        let adapters = case.trained(2).valid();
        let [first, second] = [1, 2].map(|_| tempfile::tempdir().expect("makes a folder"));
        let config = AdapterConfig::new(case.method.clone());
        save(first.path(), &config, &case.sites, &adapters).expect("is written");
        let (config, again) = load::<T>(first.path(), &case.sites, &case.device).expect("is whole");
        assert_eq!(again.places(), adapters.places(), "{}", case.name);
        let [found, expected] = [&again, &adapters].map(|a| case.forward(&Scope::new(a)));
        assert_eq!(found, expected, "{}", case.name);
        save(second.path(), &config, &case.sites, &again).expect("is written");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let [a, b] = [&first, &second].map(|f| std::fs::read(f.path().join(name)).expect("is there"));
            assert_eq!(a, b, "{} {name}", case.name);
        }
    }
);

law!(
    /// Weights add up the effects: mixing is merging with those weights, and (1, 0) is the first.
    mixing_is_a_weighted_sum,
    |case| {
        let [one, two] = [1, 2].map(|seed| case.trained(seed).valid());
        let mut bank = Bank::new();
        bank.insert("one", one.clone());
        bank.insert("two", two.clone());
        let alone = case.forward(&Scope::new(&one));
        let first = bank.mix(&[("one", 1.0), ("two", 0.0)]).expect("are held");
        assert_eq!(case.forward(&Scope::new(&first)), alone, "{}", case.name);
        let only = bank.only("one").expect("is held");
        assert_eq!(case.forward(&Scope::new(&only)), alone, "{}", case.name);
        let both = case.forward(&Scope::new(&(one.clone(), two.clone())));
        let mixed = bank.mix(&[("one", 1.0), ("two", 1.0)]).expect("are held");
        close(&case.forward(&Scope::new(&mixed)), &both, &case.name);
        let (Some(a), Some(b)) = (Folded::<T>::new(&one), Folded::<T>::new(&two)) else { return };
        let parts: [(&dyn Folds, f64); 2] = [(&a, 0.75), (&b, -0.5)];
        let merged = merge(&case.model, &parts).expect("is finite");
        let mixed = bank.mix(&[("one", 0.75), ("two", -0.5)]).expect("are held");
        close(&case.forward(&Scope::new(&mixed)), &values(merged.plain(&case.ids)), &case.name);
    }
);

law!(
    /// One adapter a row gives each row what a call with that adapter gives it.
    rows_are_separate_calls,
    ELSEWHERE = 1,
    |case| {
        let mut bank = Bank::new();
        for (name, seed) in [("one", 1), ("two", 2)] {
            bank.insert(name, case.trained(seed).valid());
        }
        let routed = ["two", BASE, "one", "two"];
        assert!(bank.only("three").is_err_and(|e| e.to_string().contains("one, two")));
        let selection = match bank.rows(&routed, &case.device) {
            Ok(selection) => selection,
            // What stands in front of a sequence does so for every row, or for none.
            Err(error) => {
                assert!(case.in_front() && error.to_string().contains("in front"), "{}: {error}", case.name);
                let all = bank.rows(&["two"; 4], &case.device).expect("is one for all");
                let only = bank.only("two").expect("is held");
                assert_eq!(case.forward(&Scope::new(&all)), case.forward(&Scope::new(&only)));
                return;
            }
        };
        assert!(!case.in_front(), "{}", case.name);
        let found = case.forward(&Scope::new(&selection));
        let width = found.len() / routed.len();
        for (row, name) in routed.iter().enumerate() {
            let whole = match *name {
                BASE => case.forward(&Scope::plain()),
                name => case.forward(&Scope::new(&bank.only(name).expect("is held"))),
            };
            let part = row * width..(row + 1) * width;
            close(&found[part.clone()], &whole[part], &format!("{} row {row}", case.name));
        }
    }
);

law!(
    /// As many as the paper's formula says, and as the summary shows.
    parameters_are_as_in_the_paper,
    |case| {
        let adapters = case.adapters(0).expect("fits");
        let sites: Vec<_> =
            adapters.iter().map(|(path, _)| case.sites.get(path).expect("was found by it")).collect();
        let mut expected: usize = sites.iter().map(|site| case.method.parameters(site)).sum();
        let shared = case.method.shared_parameters(&sites);
        for (path, adapter) in adapters.iter().filter(|_| shared == 0) {
            let site = case.sites.get(path).expect("was found by it");
            assert_eq!(trained_parameters(adapter), case.method.parameters(site), "{} {path}", case.name);
        }
        expected += shared;
        expected += adapters.copies().map(|(_, copy)| copy.num_params()).sum::<usize>();
        assert_eq!(trained_parameters(&adapters), expected, "{}", case.name);
        let summary = burn_peft::core::Summary::new(&case.sites, &adapters);
        assert_eq!(summary.trainable, expected, "{}", case.name);
        assert_eq!(summary.total, case.model.num_params() + expected, "{}", case.name);
    }
);

law!(
    /// The seed and the path decide, and nothing else.
    seeds_decide,
    |case| {
        let [a, again, other] = [7, 7, 8].map(|seed| all_values(&case.adapters(seed).expect("fits")));
        assert_eq!(a, again, "{}", case.name);
        if case.method.draws() {
            assert_ne!(a, other, "{}", case.name);
        }
    }
);

struct Broken(bool);

impl ModuleMapper for Broken {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if std::mem::replace(&mut self.0, true) {
            return param;
        }
        let mut values = values(param.base());
        values[0] = f32::NAN;
        let shape = param.dims();
        fresh(&param, TensorData::new(values, shape))
    }
}

law!(
    /// A broken adapter is not folded into a good model.
    nan_is_not_merged,
    |case| {
        let adapters = case.trained(1).valid().map(&mut Broken(false));
        let Some(folds) = Folded::<T>::new(&adapters) else { return };
        let refused = merge(&case.model, &[(&folds, 1.0)]);
        assert!(refused.is_err_and(|e| e.to_string().contains("NaN")), "{}", case.name);
    }
);

law!(
    /// Every backend of the build gives what the first gives.
    backends_agree,
    ELSEWHERE = usize::MAX,
    |case| {
        let first = device::by_name(device::names()[0]).expect("is in the build");
        let there = Case::<T> {
            name: case.name.clone(),
            method: case.method.clone(),
            model: Probe::new(&first),
            sites: Sites::of(&Probe::new(&first), Some("head")),
            ids: ids(&first),
            device: first,
            linear_only: case.linear_only,
        };
        let [a, b] = [case, &there].map(|case| case.forward(&Scope::new(&case.trained(1).valid())));
        close(&a, &b, &case.name);
    }
);

law!(
    /// Adapters for another model are refused with the name of what does not fit.
    another_base_is_refused,
    |case| {
        let folder = tempfile::tempdir().expect("makes a folder");
        let config = AdapterConfig::new(case.method.clone());
        let trained = case.trained(1);
        save(folder.path(), &config, &case.sites, &trained).expect("is written");
        let path = match serves_linear::<T>() {
            true => "query".to_owned(),
            false => trained.places()[0].clone(),
        };
        if case.method.targets().target_modules.is_none() {
            return; // it chooses its places by itself; see `prompts.rs`
        }
        let other = |fan_in| {
            let mut other = case.sites.clone();
            let wide = burn::nn::LinearConfig::new(fan_in, 12).init(&case.device);
            let bias = wide.bias.as_ref().map(|b| b.val());
            for site in other.all.iter_mut().filter(|site| site.path == path) {
                let vector = matches!(site.weight, Value::D1(_));
                site.weight = match &bias {
                    Some(bias) if vector => Value::D1(bias.clone()),
                    _ => Value::D2(wide.weight.val()),
                };
                site.bias = site.bias.as_ref().and(bias.clone());
            }
            other
        };
        // A spectrum says nothing of the size of its place.
        let shapes = |sites: &Sites| -> Vec<_> {
            let adapters = adapt(sites, &case.method, 1, &case.device);
            let site = sites.get(&path).expect("is there");
            let tensors = adapters.ok().map(|a| case.method.tensors(site, a.get(&path).expect("is there")));
            tensors.into_iter().flatten().map(|(_, data)| data.shape().to_vec()).collect()
        };
        for other in [other(8), other(10)] {
            if shapes(&other) == shapes(&case.sites) {
                continue;
            }
            let refused = load::<T>(folder.path(), &other, &case.device).expect_err("does not fit");
            let said = refused.to_string();
            assert!(said.contains(&path) && said.contains("expected"), "{}: {said}", case.name);
        }
        let mut other = case.sites.clone();
        other.all.retain(|site| site.path != path);
        assert!(load::<T>(folder.path(), &other, &case.device).is_err(), "{}", case.name);
    }
);

// After the macro, which it uses.
mod convert;
mod data_inits;
mod gradients;
mod half;
mod quantized;
mod selective;
