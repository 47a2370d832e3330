//! Adapters that read the states of other tokens see whom the model sees, and no cache stands in their way.

#[path = "routed.rs"]
mod routed;

use crate::hf::{base, device, kept, tokens};
use crate::probe::{Drawn, close, values};
use burn::module::Module;
use burn_peft::additive::{Convpass, TinyAttention, TinyAttentionAdapter};
use burn_peft::core::{Adapters, AnyAdapter, Method, Scope, Sites, Targets, adapt};
use burn_peft::models::{
    BertForSequenceClassification, LlamaForCausalLM, Pretrained, Sampling, Tokens, generate,
};

fn trained<M: Pretrained, T: Method>(model: &M, method: &T) -> Adapters<AnyAdapter> {
    let sites = Sites::of(model, Some(M::OUTPUT));
    let fresh = adapt(&sites, method, 1, &device()).expect("fits");
    fresh.map(&mut Drawn::new(5, 1.0)).erased()
}

/// Of each method that reads other tokens.
fn all<M: Pretrained>(model: &M, name: &str) -> Vec<(&'static str, Adapters<AnyAdapter>)> {
    let to = || Targets::list([name]);
    vec![
        (TinyAttention::NAME, trained(model, &TinyAttention::new(2, 3, to()))),
        (Convpass::NAME, trained(model, &Convpass::new(3, to()))),
    ]
}

#[test]
fn what_comes_later_is_not_read() {
    let model: LlamaForCausalLM = base("llama");
    for (name, adapters) in all(&model, "self_attn") {
        let logits = |ids: &[u32], cx: &Scope<'_>| model.forward(&Tokens::row(ids), cx);
        let cx = Scope::new(&adapters);
        let (short, long) = (logits(&[5, 9, 3], &cx), logits(&[5, 9, 3, 8, 1], &cx));
        let plain = logits(&[5, 9, 3], &Scope::plain());
        let far = values((short.clone() - plain).abs().max())[0];
        assert!(far > 0.01, "{name} does nothing: {far}");
        close(&values(long.narrow(1, 0, 3)), &values(short), name);
    }
}

/// The batch with other ids where there is padding.
fn padded_otherwise(batch: &Tokens) -> Tokens {
    let mut other = batch.clone();
    for (id, kept) in other.ids.iter_mut().zip(&batch.mask) {
        *id = if *kept == 0 { 7 } else { *id };
    }
    assert_ne!(other.ids, batch.ids);
    other
}

#[test]
fn padding_is_not_read() {
    let bert: BertForSequenceClassification = base("bert");
    let batch = tokens("bert", true);
    let other = padded_otherwise(&batch);
    for (name, adapters) in all(&bert, "attention.output") {
        let cx = Scope::new(&adapters);
        let [a, b] = [&batch, &other].map(|tokens| values(bert.forward(tokens, &cx)));
        close(&a, &b, name);
    }
    let llama: LlamaForCausalLM = base("llama");
    let batch = tokens("llama", false);
    let other = padded_otherwise(&batch);
    for (name, adapters) in all(&llama, "mlp") {
        let cx = Scope::new(&adapters);
        let [a, b] = [&batch, &other].map(|t| kept(&values(llama.forward(t, &cx)), &batch));
        close(&a, &b, name);
    }
}

#[test]
fn generation_is_that_of_whole_sequences() {
    let model: LlamaForCausalLM = base("llama");
    for (name, adapters) in all(&model, "self_attn") {
        let cx = Scope::new(&adapters);
        let sampling = Sampling { max_new_tokens: 8, ..Sampling::default() };
        let prompt = [5, 9, 3];
        let made = generate(&model, &cx, &prompt, &sampling, |_| true).expect("works");
        let mut all = prompt.to_vec();
        for _ in 0..8 {
            let logits = model.forward(&Tokens::row(&all), &cx);
            let last = values(logits.narrow(1, all.len() - 1, 1));
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
            all.push(best.expect("has a vocabulary") as u32);
        }
        assert_eq!(made, all[3..], "{name}");
        let plain = generate(&model, &Scope::plain(), &prompt, &sampling, |_| true);
        assert_ne!(made, plain.expect("works"), "{name} does nothing");
    }
}

#[test]
fn the_head_of_mean_weights_is_one_head_like_all_of_them() {
    let model: BertForSequenceClassification = base("bert");
    let sites = Sites::of(&model, Some(BertForSequenceClassification::OUTPUT));
    let method = TinyAttention::new(3, 2, Targets::list(["attention.output"]));
    let fresh = adapt(&sites, &method, 1, &device()).expect("fits");
    // Heads that agree are the one that takes their place.
    let alike = fresh.map_layers(|_, mut adapter| {
        let [wide, hidden] = adapter.qkv.dims();
        let one = adapter.qkv.val().reshape([3, 3, wide / 9, hidden]).narrow(1, 0, 1);
        adapter.qkv = adapter.qkv.map(|_| one.repeat_dim(1, 3).reshape([wide, hidden]));
        adapter.q_bias = adapter.q_bias.map(|bias| bias.narrow(0, 0, 2).repeat_dim(0, 3));
        adapter.out = adapter.out.map(|out| (out.narrow(1, 0, 2) * 100.0).repeat_dim(1, 3));
        adapter
    });
    let (averaged, one) = method.averaged(&alike);
    assert_eq!(averaged.heads, 1);
    let batch = tokens("bert", true);
    let logits = |a: &Adapters<TinyAttentionAdapter>| values(model.forward(&batch, &Scope::new(a)));
    close(&logits(&one), &logits(&alike), "averaged");
    assert_ne!(logits(&one), values(model.forward(&batch, &Scope::plain())));
}
