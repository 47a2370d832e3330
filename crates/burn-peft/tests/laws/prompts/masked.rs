//! Classes that are read at a `[MASK]` behind the prompts.

use super::{Bert, Llama, differ, sites, trained};
use crate::hf::{base, device, fixtures, near, tokens};
use crate::probe::values;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::additive::{PromptTuning, Verbalizer, Warp, WarpAdapter, WarpInit};
use burn_peft::core::{Adapters, Error, Scope, Sites, Targets, adapt};
use burn_peft::models::{Classifier, Precision, Pretrained, Tokens, ViTForImageClassification};

/// The last word of the small models.
const MASK: usize = 95;

fn verbalizer(adapters: &Adapters<WarpAdapter>) -> Tensor<2> {
    match adapters.get(Bert::OUTPUT) {
        Some(WarpAdapter::Verbalizer(Verbalizer { verbalizer })) => verbalizer.val(),
        other => unreachable!("is at the output: {other:?}"),
    }
}

fn bert(name: &str, edit: impl FnOnce(&mut <Bert as Pretrained>::Config)) -> Result<Bert, Error> {
    let folder = fixtures().join("models").join(name);
    Ok(Bert::load(&folder, Precision::F32, 1, &device(), edit)?.model)
}

/// The rows of a padded batch, each without its padding.
fn rows(batch: &Tokens) -> Vec<Tokens> {
    let row = |row: usize| {
        let at = row * batch.seq..(row + 1) * batch.seq;
        let kept: Vec<usize> = at.filter(|at| batch.mask[*at] == 1).collect();
        let of = |values: &[i32]| kept.iter().map(|at| values[*at]).collect::<Vec<_>>();
        Tokens {
            ids: of(&batch.ids),
            mask: of(&batch.mask),
            type_ids: batch.type_ids.as_deref().map(of),
            batch: 1,
            seq: kept.len(),
            ..Tokens::default()
        }
    };
    (0..batch.batch).map(row).collect()
}

#[test]
fn a_row_of_a_padded_batch_is_the_row_alone() {
    let (model, batch): (Bert, _) = (base("bert-mlm"), tokens("bert", true));
    assert!(batch.mask.contains(&0));
    let adapters = trained(&sites(&model), &Warp::new(3));
    let cx = Scope::new(&adapters);
    let alone: Vec<f32> =
        rows(&batch).iter().flat_map(|row| values(model.forward(row, &cx))).collect();
    near(&values(model.forward(&batch, &cx)), &alone, "alone");
}

/// `θ·h` by hand, `h` the state at the mask behind its own prompts and those of others in front of these.
#[test]
fn the_class_is_read_at_the_mask() {
    let (model, batch): (Bert, _) = (base("bert"), tokens("bert", true));
    let sites = sites(&model);
    let warp = trained(&sites, &Warp { transform: false, ..Warp::new(3) });
    let both = (trained(&sites, &PromptTuning::new(2)), &warp);
    let (one, two) = (Scope::new(&warp), Scope::new(&both));
    for (cx, column) in [(one, 3), (two, 5)] {
        let hidden = model.encoder().forward(&batch, &cx.at("bert"));
        let state: Tensor<2> = hidden.narrow(1, column, 1).squeeze_dim(1);
        let expected = values(state.matmul(verbalizer(&warp).transpose()));
        near(&values(model.forward(&batch, &cx)), &expected, "by hand");
    }
}

/// Another head and another pooler, which that checkpoint lacks and each load draws, give the same answers.
#[test]
fn the_models_own_head_is_not_asked() {
    let (one, batch): (Bert, _) = (base("bert-mlm"), tokens("bert", true));
    let other = bert("bert-mlm", |_| ()).expect("is whole");
    let plain = |model: &Bert| values(model.forward(&batch, &Scope::plain()));
    differ(&plain(&one), &plain(&other));
    let adapters = trained(&sites(&one), &Warp::new(3));
    let logits = |model: &Bert| values(model.forward(&batch, &Scope::new(&adapters)));
    assert_eq!(logits(&one), logits(&other));
}

/// It is neither a place nor a parameter.
#[test]
fn the_transform_stands_beside_the_model() {
    let [masked, plain]: [Bert; 2] = ["bert-mlm", "bert"].map(base);
    assert_eq!(masked.num_params(), plain.num_params());
    let [masked, plain] = [sites(&masked), sites(&plain)];
    let paths = |sites: &Sites| sites.places().map(|site| site.path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&masked), paths(&plain));
    let said = |sites: &Sites| sites.all[0].mask.clone().expect("has a mask");
    assert_eq!([said(&masked).word, said(&plain).word], [Some(MASK); 2]);
    assert_eq!([said(&masked).missing.len(), said(&plain).missing.len()], [0, 4]);
}

#[test]
fn prompts_and_vectors_begin_as_words() {
    let model: Bert = base("bert-mlm");
    let sites = sites(&model);
    let table = values(sites.all[0].matrix().expect("has words"));
    let word = |id: usize| table[id * 32..(id + 1) * 32].to_vec();
    let method = Warp { class_tokens: Some(vec![7, 4, 9]), ..Warp::new(2) };
    let fresh = adapt(&sites, &method, 0, &device()).expect("fits");
    assert_eq!(values(verbalizer(&fresh)), [7, 4, 9].map(word).concat());
    let prompts = |adapters: &Adapters<WarpAdapter>| match adapters.iter().next() {
        Some((_, WarpAdapter::Front(front))) => {
            assert_eq!(values(front.mask.clone()), word(MASK));
            values(front.prompt_embeddings.val())
        }
        other => unreachable!("is in front of the words: {other:?}"),
    };
    assert_eq!(prompts(&fresh), [MASK; 2].map(word).concat());
    let drawn = Warp { prompt_init: WarpInit::SampleVocab, ..Warp::new(6) };
    let drawn = prompts(&adapt(&sites, &drawn, 3, &device()).expect("fits"));
    assert!(drawn.chunks(32).all(|row| table.chunks(32).any(|word| word == row)));
    differ(&drawn[..32], &drawn[32..64]);
}

#[test]
fn what_cannot_be_read_at_a_mask_is_refused() {
    let refused = |sites: &Sites, method: &Warp, says: &[&str]| {
        let said = adapt(sites, method, 0, &device()).expect_err("cannot work").to_string();
        assert!(says.iter().all(|part| said.contains(part)), "{said}");
    };
    let warp = Warp::new(3);
    let (llama, vit): (Llama, ViTForImageClassification) = (base("llama"), base("vit"));
    refused(&sites(&llama), &warp, &["model.embed_tokens", "[MASK]"]);
    refused(&sites(&vit), &warp, &["WARP", "embedding of words"]);
    refused(&Sites::of(&vit, None), &warp, &["WARP", "output layer"]);

    let plain = sites(&base::<Bert>("bert"));
    let names = ["dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"]
        .map(|name| format!("cls.predictions.transform.{name}"));
    refused(&plain, &warp, &names.each_ref().map(String::as_str));
    refused(&plain, &warp, &["BertForMaskedLM", "transform = false"]);

    let masked = sites(&base::<Bert>("bert-mlm"));
    let saved = Targets { modules_to_save: Some(vec!["classifier".into()]), ..Targets::default() };
    refused(&masked, &Warp { targets: saved, ..warp.clone() }, &["modules_to_save", "classifier"]);
    refused(&masked, &Warp::new(0), &["num_prompts"]);
    let begins = |ids: &[usize]| Warp { class_tokens: Some(ids.to_vec()), ..warp.clone() };
    refused(&masked, &begins(&[1, 2]), &["class_tokens", "3 classes, found 2"]);
    refused(&masked, &begins(&[1, 2, 96]), &["class_tokens", "96"]);
    for (word, says) in [(None, "tokenizer.json"), (Some(96), "below 96")] {
        let model = bert("bert-mlm", |config| config.mask_word = word).expect("is whole");
        refused(&sites(&model), &warp, &["word_embeddings", says]);
    }
}

/// A pass cannot say what is wrong with it; what checks it does.
#[test]
fn one_mask_at_a_time() {
    let (masked, batch): (Bert, _) = (base("bert-mlm"), tokens("bert", true));
    let adapters = trained(&sites(&masked), &Warp::new(3));
    let check = |model: &Bert, cx: &Scope<'_>| Classifier::check(model, &batch, cx);
    check(&masked, &Scope::new(&adapters)).expect("is one");
    let said = check(&masked, &Scope::new(&(&adapters, &adapters))).expect_err("are two");
    assert!(said.to_string().contains("found 2"), "{said}");
    // Adapters of the one model over the other.
    let said = check(&base("bert"), &Scope::new(&adapters)).expect_err("has no transform");
    assert!(said.to_string().contains("cls.predictions.transform"), "{said}");
}
