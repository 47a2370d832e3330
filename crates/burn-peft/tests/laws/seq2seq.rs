//! An encoder with a decoder: HF PEFT's own adapters over T5 (`interop/seq2seq.py`), its loss, and what is
//! trained of it.

use crate::hf::{base, device, fixtures, floats, near, open, same_file};
use crate::probe::values;
use burn::tensor::Tensor;
use burn_peft::core::{
    Adapter, AdapterConfig, Scope, Sites, Targets, adapt, load, merge, save, trained_parameters,
};
use burn_peft::models::{
    Pretrained, Sampling, T5ForConditionalGeneration, Tokens, generate_seq2seq,
};
use burn_peft::reparam::Lora;
use burn_peft::selective::CrossAttention;
use burn_peft::train::Objective;
use burn_peft::train::data::{IGNORED, Seq2SeqBatch};

type T5 = T5ForConditionalGeneration;
const OUTPUT: Option<&str> = Some(<T5 as Pretrained>::OUTPUT);

/// What `transformers` read for its golden file.
fn batch(name: &str) -> Seq2SeqBatch {
    let mut file = open(fixtures().join("models").join(name).join("golden.safetensors"));
    let mut ints = |name: &str| {
        let (shape, values) = file.take_ints(name).expect("is in the file");
        ([shape[0], shape[1]], values.into_iter().map(|v| v as i32).collect::<Vec<_>>())
    };
    let mut tokens = |name: &str| {
        let ([batch, seq], ids) = ints(name);
        Tokens { mask: vec![1; ids.len()], ids, batch, seq, ..Tokens::default() }
    };
    let (mut input, decoder) = (tokens("input_ids"), tokens("decoder_input_ids"));
    input.mask = ints("attention_mask").1;
    let targets = ints("labels").1;
    Seq2SeqBatch { input, decoder, targets }
}

fn logits(model: &T5, name: &str, cx: &Scope<'_>) -> Vec<f32> {
    let Seq2SeqBatch { input, decoder, .. } = batch(name);
    values(model.forward(&input, &decoder, cx))
}

/// The mean over targets.
fn loss(model: &T5, batch: &Seq2SeqBatch, cx: &Scope<'_>) -> Tensor<1> {
    model.loss(batch, &device(), cx).sum / T5::targets(batch) as f64
}

#[test]
fn the_loss_is_that_of_transformers() {
    for name in ["t5", "t5-gated"] {
        let (model, batch) = (base::<T5>(name), batch(name));
        assert!(batch.targets.contains(&IGNORED) && batch.input.mask.contains(&0));
        let mut file = open(fixtures().join("models").join(name).join("golden.safetensors"));
        let found = values(loss(&model, &batch, &Scope::plain()));
        near(&found, &floats(&mut file, "loss"), name);
    }
}

#[test]
fn t5_adapters_of_hf_peft() {
    for (adapter, name) in
        [("lora-t5", "t5"), ("lora-t5-gated", "t5-gated"), ("lora-cross-t5-gated", "t5-gated")]
    {
        let base: T5 = base(name);
        let sites = Sites::of(&base, OUTPUT);
        let folder = fixtures().join("seq2seq").join(adapter);
        let adapters = same_file::<Lora>(&folder, &sites);
        let expected = floats(&mut open(folder.join("golden.safetensors")), "logits");
        near(&logits(&base, name, &Scope::new(&adapters)), &expected, adapter);
        let merged = merge(&base, &[(&adapters, 1.0)]).expect("is finite");
        near(&logits(&merged, name, &Scope::plain()), &expected, adapter);
        let plain = logits(&base, name, &Scope::plain());
        assert!(plain.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1e-2), "does nothing");
    }
}

#[test]
fn an_encoder_with_a_decoder_learns() {
    let batch = batch("t5");
    let lora = Lora::new(4, 8.0, Targets::list(["q", "v", "wo"]));
    crate::other_models::trains(base::<T5>("t5"), &lora, |model| {
        loss(model, &batch, &Scope::plain())
    });
}

#[test]
fn cross_attention_tuning_trains_the_cross_attention_alone() {
    let model: T5 = base("t5-gated");
    let sites = Sites::of(&model, OUTPUT);
    let method = CrossAttention::default();
    let adapters = adapt(&sites, &method, 0, &device().autodiff()).expect("has cross-attention");
    let blocks = 0..2;
    let names = blocks.flat_map(|block| {
        ["k", "o", "q", "v"]
            .map(|name| format!("decoder.block.{block}.layer.1.EncDecAttention.{name}"))
    });
    assert_eq!(adapters.places(), names.collect::<Vec<_>>());
    assert_eq!(trained_parameters(&adapters), 2 * 4 * 32 * 24);
    let grads = loss(&model, &batch("t5-gated"), &Scope::new(&adapters)).backward();
    let found = burn::optim::GradientsParams::from_grads(grads, &adapters);
    assert_eq!(found.len(), 8);
    let folder = tempfile::tempdir().expect("makes a folder");
    save(folder.path(), &AdapterConfig::new(method.clone()), &sites, &adapters)
        .expect("is written");
    let (config, again) =
        load::<CrossAttention>(folder.path(), &sites, &device()).expect("is whole");
    assert_eq!((config.method, again.places()), (method, adapters.places()));
    let last = CrossAttention {
        targets: Targets {
            layers_to_transform: Some(burn_peft::core::OneOrMany::One(1)),
            ..Targets::default()
        },
    };
    assert_eq!(adapt(&sites, &last, 0, &device()).expect("has two blocks").places().len(), 4);
    let bert: burn_peft::models::BertForSequenceClassification = base("bert");
    let refused = adapt(&Sites::of(&bert, None), &CrossAttention::default(), 0, &device());
    assert!(refused.expect_err("has none").to_string().contains("EncDecAttention"));
}

#[test]
fn what_stands_in_front_of_t5_is_kept_by_the_cache() {
    let model: T5 = base("t5-gated");
    let sites = Sites::of(&model, OUTPUT);
    let prefixes = adapt(&sites, &burn_peft::additive::PrefixTuning::new(3), 0, &device());
    let prefixes = prefixes.expect("has attentions");
    // Encoder, decoder, and between both.
    assert_eq!(prefixes.places().len(), 3 + 2 + 2);
    let prompts = adapt(&sites, &burn_peft::additive::PromptTuning::new(3), 0, &device());
    let prompts = prompts.expect("has an embedding");
    assert_eq!(prompts.places(), ["shared"]);
    assert!(prompts.iter().all(|(_, prompt)| prompt.virtual_tokens() == 3));
    let both = (prefixes, prompts);
    let cx = &Scope::new(&both);
    let input = [9, 31, 4, 76];
    let sampling = Sampling { max_new_tokens: 6, ..Sampling::default() };
    let text = generate_seq2seq(&model, cx, &input, &sampling, |_| true).expect("is a good prompt");
    let encoded = model.encode(&Tokens::row(&input), cx);
    for length in 0..text.len() {
        let read = Tokens::row(&[&[model.start()][..], &text[..length]].concat());
        let hidden = model.hidden(&read, &encoded, cx, None).narrow(1, length, 1);
        let best = model.logits(hidden, cx).argmax(2).into_data().iter::<i64>().next();
        assert_eq!(best, Some(i64::from(text[length])), "token {length}");
    }
    let plain = generate_seq2seq(&model, &Scope::plain(), &input, &sampling, |_| true);
    assert_ne!(plain.expect("is a good prompt"), text);
}
