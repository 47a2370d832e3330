//! T5 against `transformers` (`interop/seq2seq.py`), and what it says of its places.

use crate::{close, fixture, floats, golden, ints, load, same_places, values};
use burn::nn::Linear;
use burn::tensor::Tensor;
use burn_peft_core::{Adapter, Laid, Overlay, Scope, SeenTokens, Strength, TensorFile};
use burn_peft_models::{
    KvCache, Sampling, T5ForConditionalGeneration, Tokens, generate_seq2seq, save_model,
};
use std::collections::BTreeMap;
use std::sync::Mutex;

type T5 = T5ForConditionalGeneration;
pub(crate) const T5S: [&str; 2] = ["t5", "t5-gated"];

/// What the encoder reads, with padding, and what the decoder does, without.
fn read(file: &mut TensorFile) -> (Tokens, Tokens) {
    let (shape, ids) = ints(file, "decoder_input_ids");
    let mask = vec![1; ids.len()];
    let decoder = Tokens { ids, mask, batch: shape[0], seq: shape[1], ..Tokens::default() };
    (crate::tokens(file), decoder)
}

#[test]
fn t5s_equal_transformers() {
    for name in T5S {
        let model: T5 = load(&fixture(name)).model;
        let mut file = golden(&fixture(name));
        let (tokens, decoder) = read(&mut file);
        assert!(tokens.mask.contains(&0));
        for tokens in [&tokens, &decoder] {
            model.check(tokens, &Scope::plain()).expect("are tokens of its own");
        }
        let expected = floats(&mut file, "logits");
        close(&values(model.forward(&tokens, &decoder, &Scope::plain())), &expected);
        let untied = model.untied();
        close(&values(untied.forward(&tokens, &decoder, &Scope::plain())), &expected);
    }
}

#[test]
fn its_greedy_generation_equals_transformers() {
    for name in T5S {
        let model: T5 = load(&fixture(name)).model;
        let mut file = golden(&fixture(name));
        let prompt: Vec<u32> = {
            let (shape, ids) = ints(&mut file, "input_ids");
            ids[..shape[1]].iter().zip(ints(&mut file, "attention_mask").1).for_each(
                |(_, kept)| {
                    assert_eq!(kept, 1);
                },
            );
            ids[..shape[1]].iter().map(|id| *id as u32).collect()
        };
        let expected: Vec<u32> =
            ints(&mut file, "generated").1.into_iter().map(|id| id as u32).collect();
        let sampling = Sampling { max_new_tokens: expected.len(), ..Sampling::default() };
        let found = generate_seq2seq(&model, &Scope::plain(), &prompt, &sampling, |_| true);
        assert_eq!(found.expect("is a good prompt"), expected, "{name}");
        let ends = Sampling { eos: vec![expected[2]], ..sampling };
        let found = generate_seq2seq(&model, &Scope::plain(), &prompt, &ends, |_| true);
        assert_eq!(found.expect("is a good prompt"), expected[..2], "{name}");
    }
}

#[test]
fn its_cache_changes_nothing() {
    for name in T5S {
        let model: T5 = load(&fixture(name)).model;
        let encoded = model.encode(&Tokens::row(&[9, 31, 4, 4, 76]), &Scope::plain());
        let hidden = |ids: &[u32], cache: Option<&mut KvCache>| {
            values(model.hidden(&Tokens::row(ids), &encoded, &Scope::plain(), cache))
        };
        let ids = [0_u32, 40, 17, 9, 61, 33];
        let mut cache = KvCache::default();
        let mut parts = Vec::new();
        for part in [&ids[..3], &ids[3..4], &ids[4..]] {
            parts.extend(hidden(part, Some(&mut cache)));
        }
        close(&parts, &hidden(&ids, None));
        assert_eq!(cache.len(), ids.len());
    }
}

#[test]
fn its_forward_pass_visits_the_places_that_are_found() {
    for name in T5S {
        let (tokens, decoder) = (Tokens::row(&[5, 40, 17]), Tokens::row(&[0, 7]));
        same_places::<T5>(name, |model, cx| {
            model.forward(&tokens, &decoder, cx);
        });
    }
}

#[test]
fn a_saved_t5_is_the_model() {
    let folder = tempfile::tempdir().expect("makes a folder");
    for name in T5S {
        let from = fixture(name);
        let model: T5 = load(&from).model;
        for (model, kind) in [(model.clone(), "own"), (model.untied(), "untied")] {
            let to = folder.path().join(name).join(kind);
            save_model(&model, &from, &to, &[]).expect("is written");
            let again: T5 = load(&to).model;
            let (tokens, decoder) = (Tokens::row(&[5, 40, 17]), Tokens::row(&[0, 7]));
            let [a, b] = [&model, &again]
                .map(|model| values(model.forward(&tokens, &decoder, &Scope::plain())));
            assert_eq!(a, b, "{name} {kind}");
        }
    }
}

/// Words that stand in front of the others.
#[derive(Debug)]
struct Words(Tensor<3>);

impl Adapter for Words {
    fn prompt(&self, _x: &Tensor<3>, _tokens: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.0.clone())
    }
}

impl Overlay for Words {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        if path == "shared" {
            laid.push(Laid { adapter: self, strength: Strength::Scale(1.0) });
        }
    }
}

#[test]
fn a_prompt_is_read_by_the_encoder_as_words_are() {
    let model: T5 = load(&fixture("t5")).model;
    let decoder = Tokens::row(&[0, 7]);
    let words = Words(embedded(&fixture("t5"), &[61, 8]));
    let found = model.forward(&Tokens::row(&[5, 40, 17]), &decoder, &Scope::new(&words));
    let expected = model.forward(&Tokens::row(&[61, 8, 5, 40, 17]), &decoder, &Scope::plain());
    close(&values(found), &values(expected));
}

/// Rows of the checkpoint's embedding, `[1, n, d_model]`.
fn embedded(folder: &std::path::Path, ids: &[usize]) -> Tensor<3> {
    let mut file = TensorFile::open(folder.join("model.safetensors")).expect("is committed");
    let table = floats(&mut file, "shared.weight");
    let rows: Vec<f32> = ids.iter().flat_map(|id| table[id * 32..][..32].to_vec()).collect();
    let data = burn::tensor::TensorData::new(rows, [1, ids.len(), 32]);
    Tensor::from_data(data, &burn::tensor::Device::flex())
}

/// Takes note of the keys and values of the decoder's tokens, and sets them in front of others.
#[derive(Debug, Default)]
struct Kept(BTreeMap<String, Layer>);

#[derive(Debug, Default)]
struct Layer {
    y: Mutex<Option<Tensor<3>>>,
    of: Option<[Tensor<3>; 2]>,
}

impl Adapter for Layer {
    fn linear(&self, _layer: &Linear, _x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        *self.y.lock().expect("is whole") = Some(y.clone());
        None
    }

    fn prefix(&self, _x: &Tensor<3>, _tokens: Option<&SeenTokens>) -> Option<[Tensor<3>; 2]> {
        self.of.clone()
    }
}

impl Overlay for Kept {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        let layer = self.0.get(path);
        laid.extend(layer.map(|adapter| Laid { adapter, strength: Strength::Scale(1.0) }));
    }
}

#[test]
fn a_prefix_is_seen_as_the_tokens_before_are() {
    let model: T5 = load(&fixture("t5-gated")).model;
    let encoded = model.encode(&Tokens::row(&[9, 31, 4, 76]), &Scope::plain());
    let attention = |block: usize| format!("decoder.block.{block}.layer.0.SelfAttention");
    let parts = (0..2).flat_map(|block| ["k", "v"].map(|part| (block, part)));
    let path = |(block, part): (usize, &str)| format!("{}.{part}", attention(block));
    let kept = Kept(parts.map(|part| (path(part), Layer::default())).collect());
    let ids = [0_u32, 40, 17, 9, 61];
    let whole = model.hidden(&Tokens::row(&ids), &encoded, &Scope::new(&kept), None);
    let before = |block: usize| {
        let of = ["k", "v"].map(|part| {
            let layer = kept.0[&path((block, part))].y.lock().expect("is whole").clone();
            layer.expect("was asked for").narrow(1, 0, 3)
        });
        (attention(block), Layer { of: Some(of), ..Layer::default() })
    };
    let front = Kept((0..2).map(before).collect());
    let found = model.hidden(&Tokens::row(&ids[3..]), &encoded, &Scope::new(&front), None);
    close(&values(found), &values(whole.narrow(1, 3, 2)));
}

#[test]
fn what_is_no_t5_is_refused_with_a_sentence() {
    let model: T5 = load(&fixture("t5")).model;
    let packed = Tokens { segments: Some(vec![0, 1]), ..Tokens::row(&[5, 6]) };
    for (tokens, says) in
        [(Tokens::row(&[]), "empty"), (Tokens::row(&[96]), "below 96"), (packed, "one document")]
    {
        let said = model.check(&tokens, &Scope::plain()).expect_err("is refused").to_string();
        assert!(said.contains(says), "{said}");
    }
    let found = generate_seq2seq(&model, &Scope::plain(), &[], &Sampling::default(), |_| true);
    assert!(found.is_err());
    for (from, to, says) in [
        ("\"gated-gelu\"", "\"gated-silu\"", "`gated-silu` is not implemented"),
        ("\"relative_attention_num_buckets\": 8", "\"relative_attention_num_buckets\": 7", "even"),
        (
            "\"relative_attention_max_distance\": 12",
            "\"relative_attention_max_distance\": 4",
            "more than 4",
        ),
        (
            "\"decoder_start_token_id\": 0",
            "\"decoder_start_token_id\": 96",
            "decoder_start_token_id",
        ),
        ("\"num_heads\": 4", "\"num_heads\": 0", "num_heads"),
    ] {
        let folder = crate::changed("t5-gated", "config.json", |bytes| {
            let text = String::from_utf8(bytes).expect("is text");
            assert!(text.contains(from), "{text}");
            text.replace(from, to).into_bytes()
        });
        let said = crate::refusal::<T5>(folder.path());
        assert!(said.contains(says), "{said}");
    }
}
