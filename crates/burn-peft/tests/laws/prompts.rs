//! What stands in front of a sequence: its own identity law, its places, and what HF PEFT's files hold and
//! generate.

mod masked;

use crate::hf::{base, device, fixtures, floats, near, open, tokens};
use crate::probe::{Drawn, values};
use burn::module::Module;
use burn::tensor::{Int, Tensor};
use burn_peft::additive::{
    APrompt, Apt, DePt, GeneratorType, Idpg, Lpt, PTuning, PrefixPropagation, PrefixTuning,
    PromptInit, PromptTuning, Ptp, SelectivePromptTuning, ShakenPrompt, Smop, VirtualTokens, Vpt,
};
use burn_peft::core::{
    Adapter, AdapterConfig, Adapters, Laid, Method, Overlay, Scope, Sites, Strength, Targets,
    adapt, load, save,
};
use burn_peft::models::{
    BertForSequenceClassification, KvCache, LlamaForCausalLM, Pretrained, Sampling, Tokens,
    generate,
};
use burn_peft::reparam::Lora;

type Bert = BertForSequenceClassification;
type Llama = LlamaForCausalLM;

/// Adapters that count `.1` times.
struct Weighted<'a, O>(&'a O, f64);

impl<O: Overlay> Overlay for Weighted<'_, O> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        let before = laid.len();
        self.0.at(path, laid);
        for laid in &mut laid[before..] {
            laid.strength = Strength::Scale(self.1);
        }
    }
}

/// As after training, over a model with these sites.
fn trained<T: Method>(sites: &Sites, method: &T) -> Adapters<T::Adapter> {
    let fresh = adapt(sites, method, 0, &device().autodiff()).expect("fits");
    fresh.map(&mut Drawn::new(7, 0.8)).valid()
}

fn sites<M: Pretrained>(model: &M) -> Sites {
    Sites::of(model, Some(M::OUTPUT))
}

/// Four virtual tokens, and a change of the first five of a sequence.
fn dept() -> DePt {
    DePt {
        virtual_tokens: VirtualTokens { num_virtual_tokens: 4, ..VirtualTokens::default() },
        max_length: 5,
        r: 2,
        ..DePt::default()
    }
}

fn prefix(n: usize) -> PrefixTuning {
    PrefixTuning::new(n)
}

/// The same ids, whose positions begin later.
fn moved(tokens: &Tokens, by: usize) -> Tokens {
    let row = by as i32..(by + tokens.seq) as i32;
    let positions = std::iter::repeat_n(row, tokens.batch).flatten().collect();
    Tokens { positions: Some(positions), ..tokens.clone() }
}

#[track_caller]
fn differ(a: &[f32], b: &[f32]) {
    assert!(a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-3));
}

/// A prompt that nobody sees leaves a model that counts positions from its end.
#[test]
fn hidden_prompts_are_the_base_on_llama() {
    let model: Llama = base("llama");
    let (sites, tokens) = (sites(&model), tokens("llama", false));
    let kept = |all: Vec<f32>| crate::hf::kept(&all, &tokens);
    let forward = |cx: &Scope<'_>| kept(values(model.forward(&tokens, cx)));
    let plain = forward(&Scope::plain());
    let law = |overlay: &dyn Overlay, what: &str| {
        differ(&forward(&Scope::new(&overlay)), &plain);
        near(&forward(&Scope::new(&Weighted(&overlay, 0.0))), &plain, what);
    };
    law(&trained(&sites, &PromptTuning::new(4)), "prompt");
    law(&trained(&sites, &PTuning::new(3)), "P-tuning");
    law(&trained(&sites, &Ptp::new(4, 0.5)), "PTP");
    law(&trained(&sites, &prefix(5)), "prefix");
    law(&trained(&sites, &Apt::new(3)), "APT");
    law(&trained(&sites, &APrompt::new(3, 2, 4)), "APrompt");
    law(&trained(&sites, &Vpt::deep(3)), "VPT");
    law(&trained(&sites, &Vpt::shallow(3)), "VPT, shallow");
    law(&trained(&sites, &PrefixPropagation::new(3)), "prefix propagation");
    law(&trained(&sites, &Lpt::new(3, None)), "LPT");
    let between = (trained(&sites, &Vpt::deep(2)), trained(&sites, &Lpt::new(3, None)));
    law(&between, "VPT and LPT");
    let both = (trained(&sites, &PromptTuning::new(4)), trained(&sites, &prefix(5)));
    law(&both, "prompt and prefix");
}

/// BERT's positions are a table: they have moved by what is hidden in front, and so has the classifier's token.
#[test]
fn hidden_prompts_are_the_base_on_bert() {
    let model: Bert = base("bert");
    let (sites, tokens) = (sites(&model), tokens("bert", true));
    let adapters = trained(&sites, &prefix(5));
    let hidden = values(model.forward(&tokens, &Scope::new(&Weighted(&adapters, 0.0))));
    let expected = values(model.forward(&moved(&tokens, 5), &Scope::plain()));
    near(&hidden, &expected, "prefix");
    differ(&values(model.forward(&tokens, &Scope::new(&adapters))), &expected);
    let adapters = trained(&sites, &APrompt::new(3, 5, 4));
    let hidden = values(model.forward(&tokens, &Scope::new(&Weighted(&adapters, 0.0))));
    near(&hidden, &expected, "APrompt");
    differ(&values(model.forward(&tokens, &Scope::new(&adapters))), &expected);

    // What stands in front of a block moves nobody.
    let plain = values(model.forward(&tokens, &Scope::plain()));
    let between = |overlay: &dyn Overlay, what: &str| {
        differ(&values(model.forward(&tokens, &Scope::new(&overlay))), &plain);
        let hidden = Weighted(&overlay, 0.0);
        near(&values(model.forward(&tokens, &Scope::new(&hidden))), &plain, what);
    };
    between(&trained(&sites, &Vpt::deep(3)), "VPT");
    between(&trained(&sites, &PrefixPropagation::new(3)), "prefix propagation");
    between(&trained(&sites, &Lpt::new(3, Some(GeneratorType::Npg))), "LPT");
    between(&trained(&sites, &Lpt::new(3, Some(GeneratorType::Appg))), "LPT with pooling");
    between(&trained(&sites, &SelectivePromptTuning::new(3, 1)), "selective prompt tuning");

    let adapters = trained(&sites, &PromptTuning::new(4));
    let weighted = Weighted(&adapters, 0.0);
    let cx = Scope::new(&weighted).at("bert");
    let found = model.encoder().forward(&tokens, &cx); // [b, 4 + s, h]
    let [_, all, _] = found.dims();
    assert_eq!(all, 4 + tokens.seq);
    let own = |hidden: Tensor<3>| crate::hf::kept(&values(hidden), &tokens);
    let expected = own(model.encoder().forward(&moved(&tokens, 4), &Scope::plain().at("bert")));
    near(&own(found.narrow(1, 4, tokens.seq)), &expected, "prompt");
    let embedded = values(model.encoder().embed(&tokens, &cx));
    let plain = values(model.encoder().embed(&moved(&tokens, 4), &Scope::plain().at("bert")));
    near(&embedded, &plain, "sentence embeddings leave virtual tokens out");
}

/// A strength is how often a token counts: twice the same prefix is the prefix at strength 2.
#[test]
fn a_strength_is_how_often_it_counts() {
    let model: Llama = base("llama");
    let (sites, tokens) = (sites(&model), tokens("llama", false));
    let one = trained(&sites, &prefix(3));
    // The positions move by the number of keys, and not by how often they count.
    let forward = |overlay: &dyn Overlay| {
        let shifted = values(model.forward(&tokens, &Scope::new(&overlay)));
        crate::hf::kept(&shifted, &tokens)
    };
    let twice = forward(&(one.clone(), Weighted(&one, 1.0)));
    let half = (Weighted(&one, 2.0), Weighted(&one, 0.0));
    near(&forward(&half), &twice, "strength");
    differ(&forward(&one), &twice);
}

/// Each token is read once, and prompts stand in front of the first alone.
#[test]
fn a_cache_changes_nothing() {
    let model: Llama = base("llama");
    let sites = sites(&model);
    let between = (trained(&sites, &Vpt::deep(2)), trained(&sites, &Lpt::new(3, None)));
    let adapters = (trained(&sites, &dept()), trained(&sites, &prefix(3)), between);
    // Columns are the same ones, and some have no query-key prompts.
    let aprompt = trained(&sites, &APrompt { max_length: 7, ..APrompt::new(3, 2, 4) });
    let adapters = (adapters, aprompt);
    let cx = Scope::new(&adapters);
    let ids = [5_u32, 40, 17, 9, 61, 33];
    let whole = values(model.hidden(&Tokens::row(&ids), &cx, None));
    let (mut cache, mut parts) = (KvCache::default(), Vec::new());
    for part in [&ids[..3], &ids[3..4], &ids[4..]] {
        parts.extend(values(model.hidden(&Tokens::row(part), &cx, Some(&mut cache))));
    }
    near(&parts, &whole, "cached");
    assert_eq!(cache.len(), 4 + ids.len());
}

/// Documents of one row each see the prompt, and not each other.
#[test]
fn packed_documents_each_have_the_prompt() {
    let model: Llama = base("llama");
    let sites = sites(&model);
    let between = (trained(&sites, &Vpt::deep(2)), trained(&sites, &Lpt::new(3, None)));
    let adapters = (trained(&sites, &dept()), trained(&sites, &prefix(3)), between);
    let cx = Scope::new(&adapters);
    let (one, two) = ([5_u32, 40, 17, 9], [61_u32, 33, 8]);
    let alone = [&one[..], &two[..]].map(|ids| values(model.forward(&Tokens::row(ids), &cx)));
    let mut packed = Tokens::row(&[&one[..], &two[..]].concat());
    packed.segments = Some(vec![0, 0, 0, 0, 1, 1, 1]);
    packed.positions = Some(vec![0, 1, 2, 3, 0, 1, 2]);
    near(&values(model.forward(&packed, &cx)), &alone.concat(), "packed");
}

#[test]
fn prompts_prefixes_and_lora_lie_together() {
    let model: Bert = base("bert");
    let (sites, tokens) = (sites(&model), tokens("bert", true));
    let lora = trained(&sites, &Lora::new(2, 4.0, Targets::list(["query", "value"])));
    let (prompt, prefix) = (trained(&sites, &PromptTuning::new(2)), trained(&sites, &prefix(3)));
    let forward = |cx: &Scope<'_>| values(model.forward(&tokens, cx));
    let all = (prompt, (prefix, lora));
    let found = forward(&Scope::new(&all));
    differ(&found, &forward(&Scope::new(&(&all.0, &all.1.0))));
    differ(&found, &forward(&Scope::new(&all.1)));
    // LoRA acts on virtual tokens as on others: merged it is the same.
    let merged = burn_peft::core::merge(&model, &[(&all.1.1, 1.0)]).expect("is finite");
    let beside = (&all.0, &all.1.0);
    near(&values(merged.forward(&tokens, &Scope::new(&beside))), &found, "merged below");
}

/// Greedy texts behind each of HF PEFT's adapters.
#[test]
fn generation_is_hf_pefts() {
    let model: Llama = base("llama");
    let sites = sites(&model);
    let mut count = 0;
    for entry in std::fs::read_dir(fixtures().join("methods")).expect("is committed").flatten() {
        let mut golden = open(entry.path().join("golden.safetensors"));
        if !golden.has("generated") {
            continue;
        }
        let ids = |golden: &mut burn_peft::core::TensorFile, name: &str| -> Vec<u32> {
            let (_, ids) = golden.take_ints(name).expect("is in the file");
            ids.into_iter().map(|id| id as u32).collect()
        };
        let (prompt, expected) = (ids(&mut golden, "prompt"), ids(&mut golden, "generated"));
        let adapters =
            burn_peft::registry::load_any(&entry.path(), &sites, &device()).expect("is whole");
        let sampling = Sampling { max_new_tokens: expected.len(), ..Sampling::default() };
        let found = generate(&model, &Scope::new(&adapters), &prompt, &sampling, |_| true);
        assert_eq!(found.expect("is a good prompt"), expected, "{}", entry.path().display());
        count += 1;
    }
    assert_eq!(count, 10);
}

/// A text begins as the same words as in HF PEFT: repeated, or cut.
#[test]
fn a_text_begins_as_its_words() {
    let model: Llama = base("llama");
    let folder = fixtures().join("methods/prompt_tuning-text-llama");
    let expected = floats(&mut open(folder.join("golden.safetensors")), "begins");
    let config = AdapterConfig::<PromptTuning>::load(&folder).expect("is whole");
    let tokenizer = burn_peft::train::data::TextTokenizer::load(&fixtures().join("models/llama"))
        .expect("is whole");
    let (text, _) = config.method.text().expect("begins with a text");
    let ids = tokenizer.encode_whole(&[text], true).expect("is text").concat();
    let untold = adapt(&sites(&model), &config.method, 0, &device()).expect_err("knows no tokens");
    assert!(untold.to_string().contains("prompt_tuning_init_text"), "{untold}");
    let method = config.method.tokenized(&ids, "models/llama");
    let adapters = adapt(&sites(&model), &method, 0, &device()).expect("fits");
    let (_, prompt) = adapters.iter().next().expect("is one");
    assert_eq!(values(prompt.prompt_embeddings.val()), expected);
    let wrong = method.tokenized(&[4000], "models/llama");
    let wrong = adapt(&sites(&model), &wrong, 0, &device()).expect_err("is no word of the model");
    assert!(wrong.to_string().contains("4000"), "{wrong}");
}

/// Words of the model, drawn at random.
#[test]
fn a_vocabulary_prompt_begins_as_words() {
    let model: Llama = base("llama");
    let sites = sites(&model);
    let method =
        PromptTuning { prompt_tuning_init: PromptInit::SampleVocab, ..PromptTuning::new(6) };
    let adapters = adapt(&sites, &method, 3, &device()).expect("fits");
    let (_, prompt) = adapters.iter().next().expect("is one");
    let table = sites.get(Llama::EMBEDDING).and_then(|site| site.matrix()).expect("has words");
    let (found, words) = (values(prompt.prompt_embeddings.val()), values(table));
    let known = |row: &[f32]| words.chunks(row.len()).any(|word| word == row);
    assert!(found.chunks(32).all(known));
    differ(&found[..32], &found[32..64]);
}

/// A file for another model, or one that contradicts itself, is refused with the name of what does not fit.
#[test]
fn what_does_not_fit_is_named() {
    let (bert, llama): (Bert, Llama) = (base("bert"), base("llama"));
    let sites = [sites(&bert), sites(&llama)];
    let folder = tempfile::tempdir().expect("makes a folder");
    let config = AdapterConfig::new(prefix(3));
    save(folder.path(), &config, &sites[0], &trained(&sites[0], &prefix(3))).expect("is written");
    let said = load::<PrefixTuning>(folder.path(), &sites[1], &device()).expect_err("does not fit");
    assert!(said.to_string().contains("prompt_embeddings"), "{said}");
    let stated = |virtual_tokens| PrefixTuning { virtual_tokens, ..prefix(3) };
    for (method, name) in [
        (stated(VirtualTokens { token_dim: Some(8), ..VirtualTokens::default() }), "token_dim"),
        (stated(VirtualTokens { num_layers: Some(3), ..VirtualTokens::default() }), "num_layers"),
        (
            stated(VirtualTokens {
                num_transformer_submodules: Some(2),
                ..VirtualTokens::default()
            }),
            "num_transformer_submodules",
        ),
        (
            stated(VirtualTokens { num_virtual_tokens: 0, ..VirtualTokens::default() }),
            "num_virtual_tokens",
        ),
        (PrefixTuning { init_weights: Some("one".into()), ..prefix(3) }, "init_weights"),
    ] {
        let said = adapt(&sites[0], &method, 0, &device()).expect_err("does not fit").to_string();
        assert!(said.contains(name), "{said}");
    }
    let none = Sites::of(&burn::nn::LinearConfig::new(2, 2).init(&device()), None);
    assert!(
        adapt(&none, &prefix(3), 0, &device()).is_err_and(|e| e.to_string().contains("attentions"))
    );
    let prompt = PromptTuning::new(3);
    assert!(
        adapt(&none, &prompt, 0, &device()).is_err_and(|e| e.to_string().contains("embedding"))
    );
}

/// A prompt that is made of all words is none for a model that is to predict them.
#[test]
fn prompts_made_of_words_are_refused_where_these_are_predicted() {
    let model: Llama = base("llama");
    let sites = sites(&model);
    fn refused<T: Method>(sites: &Sites, method: &T) {
        let said = adapt(sites, method, 0, &device()).expect_err("would tell").to_string();
        assert!(said.contains("lm_head") && said.contains("predict"), "{said}");
    }
    refused(&sites, &Idpg::new(3, 4));
    refused(&sites, &Smop::new(3, 2));
    refused(&sites, &Lpt::new(3, Some(GeneratorType::Npg)));
    refused(&sites, &SelectivePromptTuning::new(3, 1));
    let above = Lpt { add_prompt_layer: Some(2), ..Lpt::new(3, None) };
    let said = adapt(&sites, &above, 0, &device()).expect_err("has 2 blocks").to_string();
    assert!(said.contains("add_prompt_layer") && said.contains("less than 2"), "{said}");
}

/// Sequences share their positions with what stands in front.
#[test]
fn too_long_a_sequence_is_refused() {
    let model: Bert = base("bert");
    let (sites, tokens) = (sites(&model), Tokens::row(&[5; 30]));
    assert!(model.check(&tokens, &Scope::plain()).is_ok());
    for n in [10, 11] {
        let adapters = (trained(&sites, &PromptTuning::new(n - 4)), trained(&sites, &prefix(4)));
        let checked = model.check(&tokens, &Scope::new(&adapters));
        match n {
            10 => assert!(checked.is_ok()),
            _ => assert!(checked.is_err_and(|e| e.to_string().contains("at most 29"))),
        }
    }
}

/// `δ ~ N(0, σ²)` on words in training, and none after it.
#[test]
fn ptp_shakes_words_in_training_alone() {
    let sites = sites::<Bert>(&base("bert"));
    let fresh = adapt(&sites, &Ptp::new(2, 0.3), 0, &device().autodiff()).expect("fits");
    let layer = burn::nn::EmbeddingConfig::new(4, 100).init(&device());
    let ids = Tensor::<2, Int>::zeros([10, 10], &device());
    let y = Tensor::<3>::ones([10, 10, 100], &device());
    let noise = |adapters: &Adapters<ShakenPrompt>| {
        let (_, adapter) = adapters.iter().next().expect("is one");
        adapter.embedding(&layer, &ids, &y).map(values)
    };
    assert!(noise(&fresh.valid()).is_none());
    let [found, again] = [1, 2].map(|_| noise(&fresh).expect("is in training"));
    differ(&found, &again);
    // Of 10⁴ numbers the mean is off by σ/100 and the variance by σ²·√2/100, of which six times are allowed.
    let mean = found.iter().sum::<f32>() / 1e4;
    let variance = found.iter().map(|x| x * x).sum::<f32>() / 1e4;
    assert!(mean.abs() < 6.0 * 0.003, "{mean}");
    assert!((variance - 0.09).abs() < 6.0 * 0.09 * 2.0_f32.sqrt() / 100.0, "{variance}");
}

/// `P_q·P_kᵀ` by hand: the queries of the last columns, and nothing for columns from `max_length` on.
#[test]
fn aprompts_queries_and_keys_meet_by_their_columns() {
    let model: Bert = base("bert");
    let method = APrompt { max_length: 4, ..APrompt::new(3, 2, 5) };
    let adapters = trained(&sites(&model), &method);
    let adapter = adapters.get("bert.encoder.layer.1.attention.self").expect("is an attention");
    let [query, key] = [&adapter.query, &adapter.key]
        .map(|prompts| values(prompts.as_ref().expect("has prompts").val())); // [4, 5]
    for (rows, total) in [(3, 3), (2, 6), (1, 9), (5, 5)] {
        let found = values(adapter.products(rows, total).expect("adds something"));
        let pairs = (total - rows..total).flat_map(|i| (0..total).map(move |j| (i, j)));
        let pair = |(i, j): (usize, usize)| match i.max(j) {
            0..4 => (0..5).map(|at| query[i * 5 + at] * key[j * 5 + at]).sum::<f32>(),
            _ => 0.0,
        };
        near(&found, &pairs.map(pair).collect::<Vec<f32>>(), "products");
    }
}

/// `E(x) + A·B` by hand: row `i` of the product for token `i`, and none from `max_length` on.
#[test]
fn dept_changes_words_by_their_positions() {
    let model: Bert = base("bert");
    let sites = sites(&model);
    let adapters = trained(&sites, &dept());
    let (_, adapter) = adapters.iter().next().expect("is one");
    let product = values(adapter.dept_a.val().matmul(adapter.dept_b.val())); // [5, 32]
    let positions = Tensor::<2, Int>::from_data([[0, 1, 4, 5], [2, 9, 3, 0]], &device());
    let found = values(adapter.positional(&positions).expect("changes words"));
    let expected: Vec<f32> = [0, 1, 4, 5, 2, 9, 3, 0]
        .iter()
        .flat_map(|&at| match at {
            0..5 => product[at * 32..(at + 1) * 32].to_vec(),
            _ => vec![0.0; 32],
        })
        .collect();
    near(&found, &expected, "positional");
    let tokens = tokens("bert", true);
    let forward = |overlay: &dyn Overlay| values(model.forward(&tokens, &Scope::new(&overlay)));
    let (_, prompt) = trained(&sites, &PromptTuning::new(4))
        .iter()
        .next()
        .map(|(p, a)| (p.to_owned(), a.clone()))
        .expect("is one");
    let mut prompt = prompt;
    prompt.prompt_embeddings = adapter.prompt_embeddings.clone();
    let alone = Adapters::new([("bert.embeddings.word_embeddings".to_owned(), prompt)], []);
    differ(&forward(&adapters), &forward(&alone));
}

/// The faces say how many they are.
#[test]
fn places_are_found() {
    let (bert, llama): (Bert, Llama) = (base("bert"), base("llama"));
    let paths = |sites: &Sites| -> Vec<String> {
        sites.between.iter().map(|site| site.path.clone()).collect()
    };
    assert_eq!(
        paths(&sites(&bert)),
        [
            "bert.encoder.layer",
            "bert.encoder.layer.0.attention.self",
            "bert.encoder.layer.1.attention.self"
        ]
    );
    assert_eq!(
        paths(&sites(&llama)),
        ["model.layers", "model.layers.0.self_attn", "model.layers.1.self_attn"]
    );
    let adapters = trained(&sites(&llama), &prefix(3));
    assert!(adapters.iter().all(|(_, adapter)| adapter.virtual_tokens() == 3));
}
