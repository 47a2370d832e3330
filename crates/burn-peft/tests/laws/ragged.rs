//! What goes token by token gives the same without a batch's padding, and in a last block that is run for those tokens
//! alone whose states are read.

use crate::hf::{base, device, fixtures, tokens};
use crate::probe::{Drawn, close, values};
use crate::vision::images;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn_peft::core::{Adapters, Laid, Method, Overlay, Scope, Sites, Targets, adapt, merge};
use burn_peft::models::{
    BertForSequenceClassification, Classifier, Pretrained, Tokens, ViTForImageClassification,
};
use burn_peft::registry::load_any;
use burn_peft::reparam::Lora;

/// Adapters over a batch with its padding, and over all tokens of the last block.
struct Padded<'a>(&'a dyn Overlay);

impl Overlay for Padded<'_> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        self.0.at(path, laid);
    }
}

/// Every adapter that is committed for BERT, and what merges goes token by token: VeLoRA alone is
/// of batches as they are.
#[test]
fn padding_changes_nothing() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let batch = tokens("bert", true);
    assert!(batch.mask.contains(&0));
    let logits = |cx: &Scope<'_>| values(model.forward(&batch, cx));
    close(&logits(&Scope::plain()), &logits(&Scope::new(&Padded(&()))), "nothing");
    let (mut by_token, mut others) = (0, Vec::new());
    for kind in std::fs::read_dir(fixtures()).expect("is committed").flatten() {
        for folder in std::fs::read_dir(kind.path()).into_iter().flatten().flatten() {
            let (name, folder) =
                (folder.file_name().into_string().expect("is text"), folder.path());
            if !name.ends_with("-bert") || !folder.join("adapter_config.json").exists() {
                continue;
            }
            let adapters = load_any(&folder, &sites, &device()).expect("is whole");
            let overlay = &*adapters;
            if overlay.by_token() {
                let found = logits(&Scope::new(&overlay));
                close(&found, &logits(&Scope::new(&Padded(&overlay))), &name);
                by_token += 1;
            } else if let Some(folds) = adapters.folds()
                && merge(&model, &[(folds.as_ref(), 1.0)]).is_ok()
            {
                others.push(name);
            }
        }
    }
    assert!(by_token > 40, "{by_token}");
    assert!(others.iter().all(|name| name.starts_with("velora")), "{others:?}");
}

struct Gradients<'a>(&'a GradientsParams, Vec<Vec<f32>>);

impl ModuleVisitor for Gradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.extend(self.0.get::<D>(param.id).map(values));
    }
}

#[test]
fn gradients_are_those_of_the_padded_batch() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let batch = tokens("bert", true);
    let lora = Lora::new(3, 6.0, Targets::list(["query", "value", "dense", "word_embeddings"]));
    let fresh = adapt(&sites, &lora, 0, &device().autodiff()).expect("fits");
    let adapters = fresh.map(&mut Drawn::new(7, 0.8));
    same_gradients(&model, &batch, &adapters);
}

fn same_gradients<M: Classifier>(
    model: &M,
    batch: &M::Input,
    adapters: &Adapters<<Lora as Method>::Adapter>,
) {
    let gradients = |cx: &Scope<'_>| {
        let y = model.forward(batch, cx);
        let grads = GradientsParams::from_grads((y.clone() * y).mean().backward(), adapters);
        let mut found = Gradients(&grads, Vec::new());
        adapters.visit(&mut found);
        found.1
    };
    let found = gradients(&Scope::new(adapters));
    let expected = gradients(&Scope::new(&Padded(adapters)));
    assert!(found.len() > 10 && found.len() == expected.len(), "{}", found.len());
    for (found, expected) in found.iter().zip(&expected) {
        close(found, expected, "a gradient");
    }
}

/// A row that begins with padding, or has nothing else, is read as ever.
#[test]
fn rows_that_begin_with_padding_stay() {
    let model: BertForSequenceClassification = base("bert");
    let mut batch = tokens("bert", true);
    batch.mask[0] = 0;
    batch.mask[batch.seq..2 * batch.seq].fill(0);
    // All states to the bit, and what is read of them, which the last block is run for alone.
    let states = |cx: &Scope<'_>| values(model.encoder().forward(&batch, &cx.at("bert")));
    assert_eq!(states(&Scope::plain()), states(&Scope::new(&Padded(&()))));
    let logits = |cx: &Scope<'_>| values(model.forward(&batch, cx));
    close(&logits(&Scope::plain()), &logits(&Scope::new(&Padded(&()))), "padding in front");
}

/// Where nothing is padding, and of images: the last block is run for what is read alone.
#[test]
fn a_last_block_for_what_is_read() {
    let model: BertForSequenceClassification = base("bert");
    let batch = Tokens { mask: vec![1; tokens("bert", true).mask.len()], ..tokens("bert", true) };
    reads_the_first(&model, &batch, Lora::new(3, 6.0, Targets::list(["query", "value", "dense"])));
    let model: ViTForImageClassification = base("vit");
    reads_the_first(&model, &images("vit"), Lora::new(3, 6.0, Targets::list(["key", "dense"])));
}

fn reads_the_first<M: Classifier>(model: &M, batch: &M::Input, lora: Lora) {
    let sites = Sites::of(model, Some(M::OUTPUT));
    let fresh = adapt(&sites, &lora, 0, &device().autodiff()).expect("fits");
    let adapters = fresh.map(&mut Drawn::new(7, 0.8));
    same_gradients(model, batch, &adapters);
    let logits = |cx: &Scope<'_>| values(model.forward(batch, cx));
    let [some, all] =
        [&adapters as &dyn Overlay, &Padded(&adapters)].map(|o| logits(&Scope::new(o)));
    close(&some, &all, M::MODEL_TYPE);
    let plain = logits(&Scope::plain());
    close(&plain, &logits(&Scope::new(&Padded(&()))), M::MODEL_TYPE);
    assert!(plain.iter().zip(&some).any(|(a, b)| (a - b).abs() > 1e-3), "does nothing");
}
