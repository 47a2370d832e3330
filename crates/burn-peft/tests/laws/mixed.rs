//! Methods of several families over one model at once.

use crate::hf::{base, device, tokens};
use crate::probe::{Drawn, all_values, close, far, values};
use burn::module::Module;
use burn::optim::GradientsParams;
use burn_peft::additive::{Bottleneck, Ia3, LnTuning, PrefixTuning, VirtualTokens};
use burn_peft::core::{
    AdapterConfig, Adapters, AnyAdapter, Guide, LIST_FILE, Method, Overlay, Scope, Sites, Targets,
    Unwritten, adapt, adapter_files, load, save, save_together, survey, trained_parameters,
};
use burn_peft::models::{BertForSequenceClassification, Pretrained};
use burn_peft::registry::{load_all, load_any};
use burn_peft::reparam::Lora;
use burn_peft::selective::{FishDip, FishDipAdapter, Mask};
use burn_peft::train::data::{ClassBatch, ClassItem, class_batch};
use burn_peft::train::{Collate, EvalFeed, Options, Part, Run, Sample, TrainFeed, measure};
use std::path::Path;
use std::sync::Arc;

fn trained<T: Method>(sites: &Sites, method: &T, seed: u64) -> Adapters<T::Adapter> {
    let fresh = adapt(sites, method, seed, &device().autodiff()).expect("fits");
    fresh.map(&mut Drawn::new(seed, 1.0))
}

#[test]
fn families_lie_over_one_model_together() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let tokens = tokens("bert", true);
    let to = |name: &str| Targets::list([name]);
    let lora = trained(&sites, &Lora::new(4, 8.0, to("query")), 1);
    let bottleneck = trained(&sites, &Bottleneck::pfeiffer(4.0, to("output")), 2);
    let ia3 = trained(&sites, &Ia3::new(to("query"), []), 3);
    let norms = trained(&sites, &LnTuning::new(to("LayerNorm")), 4);

    let together = (&lora, &bottleneck, &ia3, &norms);
    let y = model.forward(&tokens, &Scope::new(&together));
    let mut gradients = (y.clone() * y.clone()).mean().backward();
    let mut reached = [
        GradientsParams::from_module(&mut gradients, &lora).len(),
        GradientsParams::from_module(&mut gradients, &bottleneck).len(),
        GradientsParams::from_module(&mut gradients, &ia3).len(),
        GradientsParams::from_module(&mut gradients, &norms).len(),
    ];
    reached.iter_mut().zip([4, 16, 2, 10]).for_each(|(found, all)| *found = all - *found);
    assert_eq!(reached, [0; 4], "parameters without a gradient");

    let found = values(y);
    let backwards = (&norms, &ia3, &bottleneck, &lora);
    close(&values(model.forward(&tokens, &Scope::new(&backwards))), &found, "in another order");
    let without: [&dyn Overlay; 4] = [
        &(&bottleneck, &ia3, &norms),
        &(&lora, &ia3, &norms),
        &(&lora, &bottleneck, &norms),
        &(&lora, &bottleneck, &ia3),
    ];
    for (left_out, others) in without.into_iter().enumerate() {
        let other = values(model.forward(&tokens, &Scope::new(&others)));
        let far = far(&found, &other);
        assert!(far > 1e-3, "{left_out} does nothing beside the others: {far}");
    }
}

fn part<T: Method>(sites: &Sites, method: &T) -> Part {
    let adapters = adapt(sites, method, 1, &device().autodiff()).expect("fits");
    let guide = Guide::of(method, &adapters).expect("fits").erased();
    Part { adapters: adapters.erased(), guide, faster: T::FASTER }
}

fn files<T: Method>(
    folder: &Path,
    method: &T,
    sites: &Sites,
    trained: &Adapters<AnyAdapter>,
) -> Vec<Unwritten> {
    let trained = trained.typed::<T::Adapter>().expect("is the method's");
    let config = AdapterConfig::new(method.clone().finished(&trained));
    adapter_files(folder, &config, sites, &trained, &[]).expect("fits")
}

/// Every parameter of each part moved.
fn all_moved(before: &[Adapters<AnyAdapter>], after: &[Adapters<AnyAdapter>]) {
    assert_eq!(before.len(), after.len());
    for (part, (before, after)) in before.iter().zip(after).enumerate() {
        for (one, other) in all_values(before).iter().zip(&all_values(after)) {
            assert!(one != other, "part {part} has a parameter that stayed");
        }
    }
}

/// Lengths of 24 texts of three classes, and what makes batches of them.
fn texts() -> (Vec<usize>, Collate<ClassBatch>) {
    let item = |i: u32| ClassItem {
        ids: vec![2 + i % 5, 7 + i % 3, 11, 5 + i % 7],
        type_ids: vec![0; 4],
        label: (i % 3) as i32,
    };
    let items: Arc<Vec<_>> = Arc::new((0..24).map(item).collect());
    (vec![4; items.len()], Arc::new(move |picked: &[usize]| class_batch(&items, picked, 0)))
}

/// Of 24 steps over these.
fn run(model: &BertForSequenceClassification) -> Run<BertForSequenceClassification> {
    let (lengths, collate) = texts();
    let options = Options { learning_rate: 1e-2, max_steps: Some(24), ..Options::default() };
    Run {
        base: Arc::new(model.clone()),
        device: device(),
        train: TrainFeed::new(lengths, collate.clone(), &options),
        valid: EvalFeed::new(&[], 8, collate),
        options,
        folder: None,
        fingerprint: String::new(),
        resume: false,
        stop: Arc::default(),
    }
}

#[test]
fn fish_dip_looks_back_while_it_trains_beside_another() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let run = run(&model);
    let targets = Targets::list(["query", "value"]);
    let mut method = FishDip::new(0.02, targets.clone());
    (method.top_examples, method.update_steps) = (4, 5);
    let device = device();
    let method = survey(method, &sites, &Sample::new(&model, &device, &run.train, 2));
    let method = method.expect("fits");
    let lora = Lora::new(4, 8.0, targets);
    let parts = vec![part(&sites, &method), part(&sites, &lora)];
    let fresh: Vec<_> = parts.iter().map(|part| part.adapters.clone()).collect();
    let trained = run.fit(parts, Box::new(())).expect("learns").adapters;
    all_moved(&fresh, &trained);
    let [fresh, trained] =
        [&fresh, &trained].map(|all| all[0].typed::<FishDipAdapter>().expect("is Fish-Dip's"));
    let chosen = |adapters: &Adapters<FishDipAdapter>| {
        let all = adapters.iter().map(|(path, a)| a.chosen(sites.get(path).expect("is there")));
        all.flatten().collect::<Mask>()
    };
    let [before, after] = [&fresh, &trained].map(chosen);
    // Of four places of 32·32 weights and 32 biases.
    let count = 84;
    assert_eq!([before.count(), after.count(), trained_parameters(&trained)], [count; 3]);
    let fixed = before.intersection(&after).expect("fit").count();
    assert!(fixed < count, "the mask stayed");
    // What was learnt before is in the file, and what was read trains all of it.
    let folder = tempfile::tempdir().expect("makes a folder");
    save(folder.path(), &AdapterConfig::new(method), &sites, &trained).expect("is written");
    let (_, read) = load::<FishDip>(folder.path(), &sites, &device).expect("is whole");
    assert!(trained_parameters(&read) > count, "{}", trained_parameters(&read));
    let tokens = tokens("bert", true);
    let [here, there] =
        [&trained.valid(), &read].map(|a| values(model.forward(&tokens, &Scope::new(a))));
    assert_eq!(here, there);
}

#[test]
fn families_are_trained_saved_and_loaded_together() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let saved = Some(vec!["classifier".into()]);
    let to = Targets { modules_to_save: saved, ..Targets::list(["query", "value"]) };
    let lora = Lora::new(4, 8.0, to);
    let bottleneck = Bottleneck::pfeiffer(4.0, Targets::list(["output"]));
    let virtual_tokens = VirtualTokens { num_virtual_tokens: 5, ..VirtualTokens::default() };
    let prefix = PrefixTuning { virtual_tokens, ..PrefixTuning::default() };
    let parts = vec![part(&sites, &lora), part(&sites, &bottleneck), part(&sites, &prefix)];
    let fresh: Vec<_> = parts.iter().map(|part| part.adapters.clone()).collect();

    let (lengths, collate) = texts();
    let trained = run(&model).fit(parts, Box::new(())).expect("learns").adapters;
    all_moved(&fresh, &trained);
    let loss = |adapters: &Vec<Adapters<AnyAdapter>>| {
        let adapters: Vec<_> = adapters.iter().map(Module::valid).collect();
        let all: Vec<usize> = (0..lengths.len()).collect();
        measure(&model, &collate(&all), &device(), &Scope::new(&adapters)).loss
    };
    let (before, after) = (loss(&fresh), loss(&trained));
    assert!(after < 0.8 * before, "{before} to {after}");

    let folder = tempfile::tempdir().expect("makes a folder");
    let out = folder.path();
    let all = [
        files(&out.join("lora"), &lora, &sites, &trained[0]),
        files(&out.join("bottleneck"), &bottleneck, &sites, &trained[1]),
        files(&out.join("prefix"), &prefix, &sites, &trained[2]),
    ];
    let names = ["lora", "bottleneck", "prefix"];
    save_together(out, &names, &all.concat()).expect("is written");
    let tokens = tokens("bert", true);
    let logits = |overlay: &dyn Overlay| values(model.forward(&tokens, &Scope::new(&overlay)));
    let loaded = load_all(out, &sites, &device()).expect("is whole");
    let valid: Vec<_> = trained.iter().map(Module::valid).collect();
    assert_eq!(logits(&loaded), logits(&valid));
    // Each is an adapter like any other, and the order is the list's.
    assert_eq!(
        loaded.iter().map(|a| a.name()).collect::<Vec<_>>(),
        ["LORA", "BOTTLENECK", "PREFIX_TUNING"]
    );
    let alone = load_any(&out.join("prefix"), &sites, &device()).expect("is whole");
    assert_eq!(logits(&alone), logits(&valid[2]));

    let refused = |list: &str, word: &str| {
        std::fs::write(out.join(LIST_FILE), list).expect("writes");
        let said = load_all(out, &sites, &device()).err().expect("is no list").to_string();
        assert!(said.contains(LIST_FILE) && said.contains(word), "{list}: {said}");
    };
    refused("[]", "is empty");
    refused("{}", "list of subfolders");
    refused("[\"../lora\"]", "`../lora`");
    refused("[\"lora\", \"lora\"]", "twice");
    assert!(save_together(out, &["a", ".."], &[]).is_err_and(|e| e.to_string().contains("`..`")));
    std::fs::copy(out.join("lora/adapter_config.json"), out.join("adapter_config.json"))
        .expect("copies");
    refused("[\"lora\"]", "remove the other");
}
