//! Blocks that run for some tokens alone: how many these are, what rows and padding are to them, and how effects add up.

use crate::hf::{base, device, tokens};
use crate::probe::{Drawn, close, values};
use crate::vision::images;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Distribution, Tensor};
use burn_peft::additive::{APrompt, Coda, CodaAttention, TinyAttention, Vpt};
use burn_peft::core::{
    Adapter, Adapters, Bank, Laid, Method, Overlay, Scope, Sites, Strength, Targets, Whole, adapt,
};
use burn_peft::models::{
    BertForSequenceClassification, Classifier, LlamaForCausalLM, Pretrained,
    T5ForConditionalGeneration, Tokens, ViTForImageClassification,
};
use burn_peft::reparam::Lora;
use std::cell::Cell;
use std::sync::Mutex;

type Bert = BertForSequenceClassification;
const BOTH: [CodaAttention; 2] = [CodaAttention::KToAll, CodaAttention::KToK];

fn coda(reduction: usize, attention: CodaAttention) -> Coda {
    Coda { attention, ..Coda::new(reduction, 4) }
}

/// As after training, over a model with these sites.
fn trained<T: Method>(sites: &Sites, method: &T, seed: u64) -> Adapters<T::Adapter> {
    let fresh = adapt(sites, method, 0, &device().autodiff()).expect("fits");
    fresh.map(&mut Drawn::new(seed, 0.4)).valid()
}

fn sites<M: Pretrained>(model: &M) -> Sites {
    Sites::of(model, Some(M::OUTPUT))
}

/// Of all tokens, with an adapter that has learnt nothing, it is the base.
#[test]
fn all_tokens_are_the_block() {
    let (bert, vit): (Bert, ViTForImageClassification) = (base("bert"), base("vit"));
    let (batch, images) = (tokens("bert", true), images("vit"));
    let plain = [
        values(bert.forward(&batch, &Scope::plain())),
        values(vit.forward(&images, &Scope::plain())),
    ];
    for attention in BOTH {
        let fresh = |sites: &Sites| adapt(sites, &coda(1, attention), 3, &device()).expect("fits");
        let (text, picture) = (fresh(&sites(&bert)), fresh(&sites(&vit)));
        close(&values(bert.forward(&batch, &Scope::new(&text))), &plain[0], "bert");
        close(&values(vit.forward(&images, &Scope::new(&picture))), &plain[1], "vit");
    }
}

/// Counts the tokens that each layer reads, and changes nothing.
#[derive(Debug, Default)]
struct Counter(Mutex<Vec<usize>>);

impl Adapter for Counter {
    fn linear(&self, _layer: &Linear, x: &Tensor<3>, _y: &Tensor<3>) -> Option<Tensor<3>> {
        self.0.lock().expect("nobody panics").push(x.dims()[1]);
        None
    }
}

/// At layers whose paths end so.
struct AtEnd<'a>(&'a str, Counter);

impl Overlay for AtEnd<'_> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path.ends_with(self.0) {
            laid.push(Laid { adapter: &self.1, strength: Strength::Scale(1.0) });
        }
    }
}

/// The frozen layers of a block read ⌈n/r⌉ tokens and not all of them with a mask, which is what makes it fast.
#[test]
fn a_block_reads_the_chosen_alone() {
    let model: Bert = base("bert");
    let (sites, batch) = (sites(&model), tokens("bert", true));
    for (r, k) in [(2, 6), (3, 4), (11, 1)] {
        for attention in BOTH {
            let adapters = trained(&sites, &coda(r, attention), 7);
            let counted = |name| {
                let overlay = (AtEnd(name, Counter::default()), &adapters);
                let _ = model.forward(&batch, &Scope::new(&overlay));
                let (AtEnd(_, Counter(found)), _) = overlay;
                found.into_inner().expect("nobody panics")
            };
            for name in ["self.query", "attention.output.dense", "intermediate.dense"] {
                assert_eq!(counted(name), [k, k], "{name}, r = {r}");
            }
            let keys = if attention == CodaAttention::KToAll { batch.seq } else { k };
            assert_eq!(counted("self.key"), [keys, keys], "r = {r}");
            assert_eq!(counted("self.value"), [keys, keys], "r = {r}");
        }
    }
}

/// A row of the batch, without its padding.
fn row_of(batch: &Tokens, row: usize) -> Tokens {
    let part = row * batch.seq..(row + 1) * batch.seq;
    let n = batch.mask[part.clone()].iter().filter(|kept| **kept != 0).count();
    let own = |all: &Vec<i32>| all[part.clone()][..n].to_vec();
    Tokens {
        ids: own(&batch.ids),
        mask: vec![1; n],
        type_ids: batch.type_ids.as_ref().map(own),
        batch: 1,
        seq: n,
        ..Tokens::default()
    }
}

/// A padded batch is its rows alone, also with others inside the blocks that read tokens, columns or rows in front.
#[test]
fn rows_are_rows_alone() {
    let model: Bert = base("bert");
    let (sites, batch) = (sites(&model), tokens("bert", true));
    let lora = trained(&sites, &Lora::new(2, 4.0, Targets::list(["query", "value", "dense"])), 1);
    let attention =
        trained(&sites, &TinyAttention::new(2, 3, Targets::list(["attention.output"])), 2);
    let aprompt = trained(&sites, &APrompt { max_length: 7, ..APrompt::new(3, 2, 4) }, 3);
    let vpt = trained(&sites, &Vpt::deep(2), 4);
    for way in BOTH {
        let adapters = trained(&sites, &coda(2, way), 7);
        let law = |overlay: &dyn Overlay, what: &str| {
            let cx = Scope::new(&overlay);
            let found = values(model.forward(&batch, &cx));
            let width = found.len() / batch.batch;
            for row in 0..batch.batch {
                let alone = values(model.forward(&row_of(&batch, row), &cx));
                let part = &found[row * width..(row + 1) * width];
                close(part, &alone, &format!("{what}, row {row}, {way:?}"));
            }
            found
        };
        let alone = law(&adapters, "alone");
        for (what, other) in [
            ("LoRA", &lora as &dyn Overlay),
            ("Tiny-Attention", &attention),
            ("APrompt", &aprompt),
            ("VPT", &vpt),
        ] {
            assert_ne!(law(&(&adapters, other), what), alone, "{what} does nothing");
        }
    }
}

/// Query-key prompts know tokens by their columns, of which the chosen have some: where keys are those of all tokens,
/// what is chosen reads what it reads in the whole block.
#[test]
fn columns_are_those_of_the_sequence() {
    let model: Bert = base("bert");
    let sites = sites(&model);
    let aprompt = trained(&sites, &APrompt::new(1, 1, 4), 3);
    let at = "bert.encoder.layer.0.attention.self";
    let whole = Scope::new(&aprompt).at(at).products(6, 6).expect("adds something");
    let whole = values(whole);
    for way in BOTH {
        let adapters = trained(&sites, &coda(3, way), 7);
        let overlay = (&adapters, &aprompt);
        let list = Scope::new(&overlay).at("bert.encoder.layer");
        let x = Tensor::<3>::random([2, 6, 32], Distribution::Default, &device());
        let routed = adapters.iter().next().and_then(|(_, a)| a.routed(0, &x, None));
        let chosen = routed.expect("is a block of it").chosen.into_data().convert::<i64>();
        let chosen: Vec<i64> = chosen.try_to_vec().expect("is i64");
        let seen = Cell::new(0);
        let block = list.at("0");
        let _ = list.routed(0, x, None, &block, |x, all: Option<&Whole<'_>>, _, cx| {
            let total = all.map_or(x.dims()[1], |all| all.x.dims()[1]);
            let own = cx.at("attention.self").products(x.dims()[1], total).expect("adds");
            assert_eq!(own.dims(), [2, 2, total]);
            let columns = |row: &[i64]| match all {
                Some(_) => (0..6).collect::<Vec<i64>>(),
                None => row.to_vec(),
            };
            let mut expected = Vec::new();
            for row in chosen.chunks(2) {
                for i in row {
                    expected.extend(columns(row).iter().map(|j| whole[(i * 6 + j) as usize]));
                }
            }
            assert_eq!(values(own), expected, "{way:?}");
            seen.set(seen.get() + 1);
            x
        });
        assert_eq!(seen.get(), 1);
    }
}

/// `F(x) + Σ wᵢ·(cᵢ(x) - F(x))`; `F` is not run for all tokens where the weights sum up to 1.
#[test]
fn effects_add_up() {
    let model: Bert = base("bert");
    let sites = sites(&model);
    let mut bank = Bank::new();
    for (name, seed) in [("one", 1), ("two", 2)] {
        bank.insert(name, trained(&sites, &coda(2, CodaAttention::KToK), seed));
    }
    let x = Tensor::<3>::random([3, 6, 32], Distribution::Default, &device());
    let full = Cell::new(0);
    let frozen = |x: Tensor<3>| x.clone().tanh() * 3.0 - x;
    let run = |overlay: &dyn Overlay| {
        full.set(0);
        let list = Scope::new(&overlay).at("bert.encoder.layer");
        let y = list.routed(1, x.clone(), None, &list.at("1"), |x, _, _, _| {
            full.set(full.get() + usize::from(x.dims()[1] == 6));
            frozen(x)
        });
        (values(y), full.get())
    };
    let only = |name| run(&bank.only(name).expect("is held"));
    let ((one, first), (two, second)) = (only("one"), only("two"));
    assert_eq!([first, second], [0, 0]);
    assert_ne!(one, two);
    let plain = values(frozen(x.clone()));
    for (a, b, times) in
        [(0.5, 0.5, 0), (0.75, 0.5, 1), (1.0, 1.0, 1), (0.0, 0.4, 1), (1.0, 0.0, 0)]
    {
        let (found, full) = run(&bank.mix(&[("one", a), ("two", b)]).expect("are held"));
        let sum =
            |((f, one), two): ((&f32, &f32), &f32)| f + a as f32 * (one - f) + b as f32 * (two - f);
        let expected: Vec<f32> = plain.iter().zip(&one).zip(&two).map(sum).collect();
        close(&found, &expected, &format!("{a} and {b}"));
        assert_eq!(full, times, "{a} and {b}");
    }
    struct Weighed<'a>(&'a dyn Overlay, f64);
    impl Overlay for Weighed<'_> {
        fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
            let before = laid.len();
            self.0.at(path, laid);
            laid[before..].iter_mut().for_each(|laid| laid.strength = Strength::Scale(self.1));
        }
    }
    let selection = bank.only("one").expect("is held");
    assert_eq!(run(&Weighed(&selection, 0.0)), (plain, 1));
}

#[test]
fn what_cannot_work_is_refused() {
    fn refused(sites: &Sites, method: &Coda, words: &[&str]) {
        let said = adapt(sites, method, 0, &device()).expect_err("cannot work").to_string();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    let (bert, llama): (Bert, LlamaForCausalLM) = (base("bert"), base("llama"));
    let t5: T5ForConditionalGeneration = base("t5");
    refused(&sites(&llama), &Coda::default(), &["lm_head", "predict"]);
    refused(&sites(&t5), &Coda::default(), &["lm_head", "predict"]);
    let none = Sites::of(&burn::nn::LinearConfig::new(2, 2).init(&device()), None);
    refused(&none, &Coda::default(), &["list of blocks"]);
    let sites = sites(&bert);
    refused(&sites, &Coda::new(0, 4), &["reduction"]);
    refused(&sites, &Coda::new(2, 0), &["bottleneck"]);
    refused(&sites, &Coda { iterations: 0, ..Coda::default() }, &["iterations"]);
    for epsilon in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(&sites, &Coda { epsilon, ..Coda::default() }, &["epsilon"]);
    }
}
