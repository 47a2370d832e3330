//! Models against what `transformers` computes on the same folders (`interop/fixtures.py`).

mod precision;
mod seq2seq;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_peft_core::{Kind, Laid, Overlay, Scope, Sites, TensorFile, write_tensors};
use burn_peft_models::{
    BertForSequenceClassification, Classifier, Dinov2ForImageClassification, Images, KvCache,
    LlamaForCausalLM, Loaded, Precision, Pretrained, Sampling, T5ForConditionalGeneration, Tokens,
    ViTForImageClassification, generate, save_model,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The bound on logits in f32.
const BOUND: f32 = 1e-4;
const LLAMAS: [&str; 3] = ["llama", "llama-tied-llama3-bf16", "llama-linear-sharded-f16"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models").join(name)
}

fn load<M: Pretrained>(folder: &Path) -> Loaded<M> {
    M::load(folder, Precision::F32, 0, &Device::flex(), |_| ()).expect("is a whole model")
}

fn golden(folder: &Path) -> TensorFile {
    TensorFile::open(folder.join("golden.safetensors")).expect("is committed")
}

fn ints(file: &mut TensorFile, name: &str) -> (Vec<usize>, Vec<i32>) {
    let (shape, values) = file.take_ints(name).expect("is in the golden file");
    (shape, values.into_iter().map(|v| v as i32).collect())
}

fn tokens(file: &mut TensorFile) -> Tokens {
    let (shape, ids) = ints(file, "input_ids");
    let (_, mask) = ints(file, "attention_mask");
    let type_ids = file.has("token_type_ids").then(|| ints(file, "token_type_ids").1);
    Tokens { ids, mask, type_ids, batch: shape[0], seq: shape[1], ..Tokens::default() }
}

fn floats(file: &mut TensorFile, name: &str) -> Vec<f32> {
    let data = file.take_data(name).expect("is in the golden file").convert::<f32>();
    data.try_to_vec().expect("is f32")
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("is f32")
}

#[track_caller]
fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let far = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .max_by(f32::total_cmp)
        .unwrap_or_default();
    assert!(far <= BOUND, "differs by {far}");
}

/// Rows of padding mean nothing, on neither side.
fn kept(values: &[f32], tokens: &Tokens) -> Vec<f32> {
    let width = values.len() / tokens.mask.len();
    let rows = values.chunks(width).zip(&tokens.mask).filter(|(_, mask)| **mask != 0);
    rows.flat_map(|(row, _)| row.iter().copied()).collect()
}

#[test]
fn bert_equals_transformers() {
    let folder = fixture("bert");
    let model: BertForSequenceClassification = load(&folder).model;
    let mut file = golden(&folder);
    let tokens = tokens(&mut file);
    close(&values(model.forward(&tokens, &Scope::plain())), &floats(&mut file, "logits"));
    let embedding = model.encoder().embed(&tokens, &Scope::plain().at("bert"));
    close(&values(embedding), &floats(&mut file, "embedding"));
}

fn images(file: &mut TensorFile, name: &str) -> Images {
    let shape = file.shape(name).expect("is in the golden file").to_vec();
    Images { pixels: floats(file, name), batch: shape[0], shape: [shape[1], shape[2], shape[3]] }
}

/// On images of the size that positions were learnt on, and of another.
fn classifies_as_transformers<M: Classifier<Input = Images>>(name: &str) {
    let folder = fixture(name);
    let model: M = load(&folder).model;
    let mut file = golden(&folder);
    for size in ["", "other_"] {
        let images = images(&mut file, &format!("{size}pixel_values"));
        model.check(&images, &Scope::plain()).expect("are images of its own");
        let logits = values(model.forward(&images, &Scope::plain()));
        close(&logits, &floats(&mut file, &format!("{size}logits")));
    }
    let small = Images { pixels: vec![0.0; 27], batch: 1, shape: [3, 3, 3] };
    let gray = Images { pixels: vec![0.0; 144], batch: 1, shape: [1, 12, 12] };
    let short = Images { pixels: vec![0.0; 5], batch: 1, shape: [3, 12, 12] };
    for (images, says) in [
        (small, "expected at least 4 by 4, found 3 by 3"),
        (gray, "expected 3 channels, found 1"),
        (short, "found 5 numbers"),
    ] {
        let said = model.check(&images, &Scope::plain()).expect_err("is refused").to_string();
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn vision_transformers_equal_transformers() {
    classifies_as_transformers::<ViTForImageClassification>("vit");
    classifies_as_transformers::<Dinov2ForImageClassification>("dinov2");
}

#[test]
fn llamas_equal_transformers() {
    for name in LLAMAS {
        let folder = fixture(name);
        let model: LlamaForCausalLM = load(&folder).model;
        let mut file = golden(&folder);
        let tokens = tokens(&mut file);
        let found = values(model.forward(&tokens, &Scope::plain()));
        close(&kept(&found, &tokens), &kept(&floats(&mut file, "logits"), &tokens));
    }
}

#[test]
fn greedy_generation_equals_transformers() {
    for name in LLAMAS {
        let folder = fixture(name);
        let model: LlamaForCausalLM = load(&folder).model;
        let mut file = golden(&folder);
        let unsigned = |values: Vec<i32>| values.into_iter().map(|v| v as u32).collect::<Vec<_>>();
        let prompt = unsigned(ints(&mut file, "prompt").1);
        let expected = unsigned(ints(&mut file, "generated").1);
        let sampling = Sampling { max_new_tokens: expected.len(), ..Sampling::default() };
        let found = generate(&model, &Scope::plain(), &prompt, &sampling, |_| true);
        assert_eq!(found.expect("is a good prompt"), expected, "{name}");
    }
}

#[test]
fn a_cache_changes_nothing() {
    let model: LlamaForCausalLM = load(&fixture("llama")).model;
    let ids = [5_u32, 40, 17, 9, 61, 33];
    let whole = values(model.hidden(&Tokens::row(&ids), &Scope::plain(), None));
    let mut cache = KvCache::default();
    let mut parts = Vec::new();
    for part in [&ids[..3], &ids[3..4], &ids[4..]] {
        parts.extend(values(model.hidden(&Tokens::row(part), &Scope::plain(), Some(&mut cache))));
    }
    close(&parts, &whole);
    assert_eq!(cache.len(), ids.len());
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let model: LlamaForCausalLM = load(&fixture("llama")).model;
    let (one, two) = ([5_u32, 40, 17, 9], [61_u32, 33, 8]);
    let alone = [&one[..], &two[..]]
        .map(|ids| values(model.forward(&Tokens::row(ids), &Scope::plain())))
        .concat();
    let mut packed = Tokens::row(&[&one[..], &two[..]].concat());
    packed.segments = Some(vec![0, 0, 0, 0, 1, 1, 1]);
    packed.positions = Some(vec![0, 1, 2, 3, 0, 1, 2]);
    close(&values(model.forward(&packed, &Scope::plain())), &alone);
}

#[test]
fn sampling_repeats_by_its_seed_and_stays_among_the_likeliest() {
    let model: LlamaForCausalLM = load(&fixture("llama")).model;
    let draw = |sampling: Sampling| {
        generate(&model, &Scope::plain(), &[1, 17, 33, 5], &sampling, |_| true).expect("is good")
    };
    let wild = Sampling { do_sample: true, max_new_tokens: 16, top_k: 0, ..Sampling::default() };
    let drawn = draw(Sampling { temperature: 1.5, ..wild.clone() });
    assert_eq!(drawn, draw(Sampling { temperature: 1.5, ..wild.clone() }));
    assert_ne!(drawn, draw(Sampling { temperature: 1.5, seed: 1, ..wild.clone() }));
    let greedy = draw(Sampling { do_sample: false, ..wild.clone() });
    assert_eq!(draw(Sampling { top_k: 1, ..wild.clone() }), greedy);
    assert_eq!(draw(Sampling { top_p: 1e-9, ..wild.clone() }), greedy);
    for wrong in [
        Sampling { temperature: 0.0, ..wild.clone() },
        Sampling { temperature: f64::NAN, ..wild.clone() },
        Sampling { top_p: 0.0, ..wild.clone() },
    ] {
        assert!(generate(&model, &Scope::plain(), &[1], &wrong, |_| true).is_err(), "{wrong:?}");
    }
    let long = vec![1; 65];
    for prompt in [&[][..], &[1000], &long] {
        let found = generate(&model, &Scope::plain(), prompt, &wild, |_| true);
        assert!(found.is_err(), "{prompt:?}");
    }
}

#[test]
fn a_saved_model_is_the_model() {
    let folder = tempfile::tempdir().expect("makes a folder");
    for name in LLAMAS {
        let from = fixture(name);
        let model: LlamaForCausalLM = load(&from).model;
        let to = folder.path().join(name);
        save_model(&model, &from, &to, &[]).expect("is written");
        let again: LlamaForCausalLM = load(&to).model;
        let tokens = Tokens::row(&[5, 40, 17]);
        let [a, b] = [&model, &again].map(|m| values(m.forward(&tokens, &Scope::plain())));
        assert_eq!(a, b, "{name}");
    }
}

#[test]
fn sites_bear_the_checkpoints_names() {
    fn same<M: Pretrained>(name: &str) {
        let folder = fixture(name);
        let model: M = load(&folder).model;
        let file = TensorFile::open(folder.join("model.safetensors")).expect("is committed");
        let sites = Sites::of(&model, Some(M::OUTPUT));
        for site in sites.all.iter().filter(|site| site.kind != Kind::Hidden) {
            assert!(file.has(&format!("{}.weight", site.path)), "{}", site.path);
        }
        assert!(sites.get(M::OUTPUT).is_some());
        let ours = file.names().filter(|name| !name.ends_with("mask_token"));
        let count: usize = ours.map(|n| file.shape(n).map_or(0, |s| s.iter().product())).sum();
        assert_eq!(Module::num_params(&model), count);
    }
    same::<BertForSequenceClassification>("bert");
    same::<ViTForImageClassification>("vit");
    same::<Dinov2ForImageClassification>("dinov2");
    same::<T5ForConditionalGeneration>("t5-gated");
}

/// Takes note of the places that a forward pass asks for.
#[derive(Default)]
struct Visited(Mutex<BTreeSet<String>>);

impl Overlay for Visited {
    fn at<'a>(&'a self, path: &str, _laid: &mut Vec<Laid<'a>>) {
        self.0.lock().expect("is whole").insert(path.to_owned());
    }
}

fn same_places<M: Pretrained>(name: &str, forward: impl Fn(&M, &Scope<'_>)) {
    let model: M = load(&fixture(name)).model;
    let visited = Visited::default();
    forward(&model, &Scope::new(&visited));
    let sites = Sites::of(&model, Some(M::OUTPUT));
    let found: BTreeSet<String> = sites.places().map(|site| site.path.clone()).collect();
    assert_eq!(visited.0.into_inner().expect("is whole"), found, "{name}");
    let hidden = sites.all.iter().filter(|site| site.kind == Kind::Hidden);
    assert!(hidden.clone().count() > 5 && hidden.clone().all(|site| site.fan_out() == 32));
}

#[test]
fn a_forward_pass_visits_the_places_that_are_found() {
    let images = Images { pixels: vec![0.5; 3 * 12 * 12], batch: 1, shape: [3, 12, 12] };
    same_places::<ViTForImageClassification>("vit", |model, cx| {
        model.forward(&images, cx);
    });
    same_places::<Dinov2ForImageClassification>("dinov2", |model, cx| {
        model.forward(&images, cx);
    });
    let tokens = Tokens::row(&[5, 40, 17]);
    same_places::<BertForSequenceClassification>("bert", |model, cx| {
        model.forward(&tokens, cx);
    });
    for name in LLAMAS {
        same_places::<LlamaForCausalLM>(name, |model, cx| {
            model.forward(&tokens, cx);
        });
    }
}

/// A copy of a fixture with one file changed.
fn changed(name: &str, file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("makes a folder");
    for entry in std::fs::read_dir(fixture(name)).expect("is committed").flatten() {
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copies");
    }
    let path = folder.path().join(file);
    let bytes = std::fs::read(&path).expect("is committed");
    std::fs::write(path, change(bytes)).expect("writes");
    folder
}

fn refusal<M: Pretrained>(folder: &Path) -> String {
    let loaded = M::load(folder, Precision::F32, 0, &Device::flex(), |_| ());
    loaded.expect_err("is broken").to_string()
}

#[test]
fn broken_folders_are_refused_with_a_sentence() {
    type Bert = BertForSequenceClassification;
    type Llama = LlamaForCausalLM;
    let tensors = "model.safetensors";
    let edit = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).expect("is text");
            assert!(text.contains(from), "{text}");
            text.replace(from, to).into_bytes()
        }
    };
    assert!(refusal::<Bert>(Path::new("no-such-folder")).contains("no-such-folder"));
    assert!(refusal::<Llama>(&fixture("bert")).contains("expected llama, found bert"));
    for (file, bytes) in
        [(tensors, &b""[..]), (tensors, b"abc"), ("config.json", b"{"), ("config.json", b"[]")]
    {
        let folder = changed("bert", file, |_| bytes.to_vec());
        assert!(refusal::<Bert>(folder.path()).contains(file));
    }
    let cut = changed("bert", tensors, |b| b[..b.len() - 100].to_vec());
    assert!(refusal::<Bert>(cut.path()).contains("is not a whole safetensors file"));
    let huge = changed("bert", tensors, |mut b| {
        b[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        b
    });
    assert!(refusal::<Bert>(huge.path()).contains("is not a whole safetensors file"));
    let wide = changed(
        "bert",
        "config.json",
        edit("\"intermediate_size\": 48", "\"intermediate_size\": 64"),
    );
    let said = refusal::<Bert>(wide.path());
    assert!(said.contains("intermediate.dense.weight") && said.contains("[48, 32]"), "{said}");
    for wrong in ["0", "3", "7", "1000000000000"] {
        let text = format!("\"num_attention_heads\": {wrong}");
        for name in ["bert", "llama"] {
            let bad = changed(name, "config.json", |b| {
                String::from_utf8(b)
                    .expect("is text")
                    .replace("\"num_attention_heads\": 4", &text)
                    .into_bytes()
            });
            match name {
                "bert" => refusal::<Bert>(bad.path()),
                _ => refusal::<Llama>(bad.path()),
            };
        }
    }
    let yarn = changed("llama-tied-llama3-bf16", "config.json", edit("llama3", "yarn"));
    assert!(refusal::<Llama>(yarn.path()).contains("yarn"));
    let lost =
        changed("llama-linear-sharded-f16", "model.safetensors.index.json", edit("00002", "00009"));
    assert!(refusal::<Llama>(lost.path()).contains("00009"));
    let (no, yes) = ("\"use_swiglu_ffn\": false", "\"use_swiglu_ffn\": true");
    let swiglu = changed("dinov2", "config.json", edit(no, yes));
    assert!(refusal::<Dinov2ForImageClassification>(swiglu.path()).contains("use_swiglu_ffn"));
    let coarse = changed("vit", "config.json", edit("\"patch_size\": 4", "\"patch_size\": 13"));
    assert!(refusal::<ViTForImageClassification>(coarse.path()).contains("patch_size"));
    let act = changed("bert", "config.json", edit("\"gelu\"", "\"swish\""));
    assert!(refusal::<Bert>(act.path()).contains("swish"));
}

#[test]
fn old_names_of_norms_are_known() {
    let folder = tempfile::tempdir().expect("makes a folder");
    let source = fixture("bert");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).expect("copies");
    let mut file = TensorFile::open(source.join("model.safetensors")).expect("is committed");
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let renamed = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let tensors: Vec<_> = names
        .iter()
        .map(|name| (renamed(name), file.take_data(name).expect("is in the file")))
        .collect();
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, tensors.iter().map(|(name, data)| (name.clone(), data))).expect("writes");
    let [old, new] = [folder.path(), &source].map(|folder| {
        let model = load::<BertForSequenceClassification>(folder).model;
        let tokens = tokens(&mut golden(&source));
        values(model.forward(&tokens, &Scope::plain()))
    });
    assert_eq!(old, new);
}
