//! `burn-peft forward`, `generate` and `merge`.

use crate::args::{ForwardArgs, GenerateArgs, MergeArgs, ModelArgs};
use crate::failure::{Failure, print};
use crate::files::claim;
use crate::images::read_pixels;
use crate::model::{Bert, Dinov2, Ready, Task, Vision, Vit, causal, classifier};
use burn::tensor::TensorData;
use burn_peft::core::{Folds, Scope, TensorFile, merge as fold, write_tensors};
use burn_peft::models::{Classifier, LlamaForCausalLM, Pretrained, Sampling, Tokens, save_model};
use burn_peft::train::data::{Message, TextTokenizer};
use serde_json::json;
use std::path::Path;

/// The ids of a safetensors file, as a batch.
fn read_tokens(path: &Path) -> Result<Tokens, Failure> {
    let mut file = TensorFile::open(path)?;
    let narrow = |name: &str, values: Vec<i64>| -> Result<Vec<i32>, Failure> {
        values
            .into_iter()
            .map(|v| {
                i32::try_from(v).map_err(|_| {
                    Failure::new(format!(
                        "{}: `{name}` holds {v}, which is no token",
                        path.display()
                    ))
                })
            })
            .collect()
    };
    let (shape, ids) = file.take_ints("input_ids")?;
    let [batch, seq] = shape[..] else {
        let said = format!(
            "{}: `input_ids`: expected shape [batch, seq], found {shape:?}",
            path.display()
        );
        return Err(Failure::new(said));
    };
    let mut tokens = Tokens { ids: narrow("input_ids", ids)?, batch, seq, ..Tokens::default() };
    let mut other = |name: &str| -> Result<Option<Vec<i32>>, Failure> {
        if !file.has(name) {
            return Ok(None);
        }
        let (found, values) = file.take_ints(name)?;
        if found != shape {
            let said =
                format!("{}: `{name}`: expected shape {shape:?}, found {found:?}", path.display());
            return Err(Failure::new(said));
        }
        Ok(Some(narrow(name, values)?))
    };
    tokens.mask = other("attention_mask")?.unwrap_or_else(|| vec![1; batch * seq]);
    tokens.type_ids = other("token_type_ids")?;
    Ok(tokens)
}

/// Logits of one batch.
fn logits<M: Classifier>(args: &ForwardArgs, input: &M::Input) -> Result<TensorData, Failure> {
    let (ready, ..) = classifier::<M>(&args.model)?;
    ready.refuse_fresh(&args.model.model)?;
    let (model, overlay) = (&ready.model, ready.overlay());
    Classifier::check(model, input, &Scope::new(&overlay))?;
    Ok(Classifier::forward(model, input, &Scope::new(&overlay)).into_data())
}

pub(crate) fn forward(args: &ForwardArgs) -> Result<(), Failure> {
    let logits = match Task::of(&args.model.model, args.model.task.as_deref())? {
        Task::Classification => logits::<Bert>(args, &read_tokens(&args.inputs)?)?,
        Task::Images(Vision::Vit) => logits::<Vit>(args, &read_pixels(&args.inputs)?)?,
        Task::Images(Vision::Dinov2) => logits::<Dinov2>(args, &read_pixels(&args.inputs)?)?,
        Task::CausalLm => {
            let tokens = read_tokens(&args.inputs)?;
            let ready = causal(&args.model)?;
            ready.model.check(&tokens, &Scope::new(&ready.overlay()))?;
            ready.model.forward(&tokens, &Scope::new(&ready.overlay())).into_data()
        }
    };
    Ok(write_tensors(&args.output, [("logits".to_owned(), &logits.convert::<f32>())])?)
}

/// Tokens that end a text: the tokenizer's, and those of `generation_config.json`, one or several.
fn end_tokens(folder: &Path, own: Option<u32>) -> Result<Vec<u32>, Failure> {
    let mut ends: Vec<u32> = own.into_iter().collect();
    let path = folder.join("generation_config.json");
    if path.is_file() {
        let said = |e: String| Failure::new(format!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|e| said(e.to_string()))?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| said(format!("is not JSON: {e}")))?;
        let named = json.get("eos_token_id");
        let several = named.and_then(|named| named.as_array());
        let several = several.map_or(named.into_iter().collect(), |list| list.iter().collect());
        let several: Vec<&serde_json::Value> = several;
        ends.extend(several.into_iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    }
    Ok(ends)
}

pub(crate) fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    if Task::of(&args.model.model, args.model.task.as_deref())? != Task::CausalLm {
        return Err(Failure::new(
            "generate continues texts; for a classifier use burn-peft predict",
        ));
    }
    let tokenizer = TextTokenizer::load(&args.model.model)?;
    let (text, special) = match args.chat {
        false => (args.prompt.clone(), true),
        true => {
            let template = tokenizer.template();
            let template = template.map_err(|e| Failure::new(format!("{e}; leave --chat out")))?;
            let turn = Message { role: "user".into(), content: args.prompt.clone() };
            (template.render(&[turn], true).map_err(Failure::new)?, false)
        }
    };
    let prompt = tokenizer.encode_whole(&[&text], special)?.concat();
    let ready = causal(&args.model)?;
    let sampling = Sampling {
        max_new_tokens: args.max_new_tokens,
        do_sample: args.do_sample,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        eos: end_tokens(&args.model.model, tokenizer.eos)?,
    };
    // Tokens are no letters: what is printed is what the text has grown by.
    let mut so_far: Vec<u32> = Vec::new();
    let mut shown = 0;
    let mut failed = None;
    let each = |token: u32| {
        so_far.push(token);
        let written = tokenizer.decode(&so_far).map_err(Failure::from).and_then(|text| {
            // A token may end in the middle of a character.
            if text.ends_with('\u{fffd}') || !text.is_char_boundary(shown) {
                return Ok(());
            }
            print(&text[shown..])?;
            shown = text.len();
            Ok(())
        });
        failed = written.err();
        failed.is_none()
    };
    burn_peft::models::generate(
        &ready.model,
        &Scope::new(&ready.overlay()),
        &prompt,
        &sampling,
        each,
    )?;
    match failed {
        Some(failure) => Err(failure),
        None => print("\n"),
    }
}

fn write_merged<M: Pretrained>(
    args: &MergeArgs,
    ready: &Ready<M>,
    fields: &[(&str, serde_json::Value)],
) -> Result<(), Failure> {
    let mut fields = fields.to_vec();
    // It is written as it was held to be merged, whatever was read.
    fields.extend(["torch_dtype", "dtype"].map(|name| (name, json!(args.model.dtype))));
    let mut folds: Vec<Box<dyn Folds + '_>> = Vec::new();
    for adapters in &ready.adapters {
        let name = adapters.name();
        folds.push(adapters.folds().ok_or_else(|| {
            Failure::new(format!("{name} adapters act on activations and cannot be merged"))
        })?);
    }
    let parts: Vec<(&dyn Folds, f64)> = folds.iter().map(|part| (part.as_ref(), 1.0)).collect();
    let merged = fold(&ready.model, &parts)?;
    save_model(&merged, &args.model.model, &args.output_dir, &fields)?;
    print(&format!("merged model in {}\n", args.output_dir.display()))
}

fn merge_classifier<M: Classifier>(args: &MergeArgs) -> Result<(), Failure> {
    let (ready, labels, _) = classifier::<M>(&args.model)?;
    ready.refuse_fresh(&args.model.model)?;
    let numbered = || labels.iter().enumerate();
    let names: serde_json::Map<_, _> =
        numbered().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let ids: serde_json::Map<_, _> =
        numbered().map(|(id, name)| (name.clone(), json!(id))).collect();
    let fields = [
        ("architectures", json!([M::ARCHITECTURE])),
        ("id2label", json!(names)),
        ("label2id", json!(ids)),
    ];
    write_merged(args, &ready, &fields)
}

pub(crate) fn merge(args: &MergeArgs) -> Result<(), Failure> {
    let ModelArgs { model, adapter, task, .. } = &args.model;
    if adapter.is_empty() {
        return Err(Failure::new("nothing to merge: give --adapter"));
    }
    claim(&args.output_dir, &["config.json", "model.safetensors"], args.overwrite)?;
    match Task::of(model, task.as_deref())? {
        Task::Classification => merge_classifier::<Bert>(args),
        Task::Images(Vision::Vit) => merge_classifier::<Vit>(args),
        Task::Images(Vision::Dinov2) => merge_classifier::<Dinov2>(args),
        Task::CausalLm => {
            let mut ready = causal(&args.model)?;
            let mut fields = vec![("architectures", json!(["LlamaForCausalLM"]))];
            // An adapted embedding is adapted as one; as output it stays what it was.
            let mut laid = Vec::new();
            ready.overlay().at(LlamaForCausalLM::EMBEDDING, &mut laid);
            if !laid.is_empty() {
                drop(laid);
                ready.model = ready.model.untied();
                fields.push(("tie_word_embeddings", json!(false)));
            }
            write_merged(args, &ready, &fields)
        }
    }
}
