//! `burn-peft forward`, `generate` and `merge`.

use crate::args::{ForwardArgs, GenerateArgs, MergeArgs, ModelArgs};
use crate::failure::{Failure, print};
use crate::files::claim;
use crate::model::{Ready, Task, causal, classifier};
use burn_peft::core::{Folds, Scope, TensorFile, merge as fold, write_tensors};
use burn_peft::models::{Pretrained, Sampling, Tokens, save_model};
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

pub(crate) fn forward(args: &ForwardArgs) -> Result<(), Failure> {
    let tokens = read_tokens(&args.inputs)?;
    let logits = match Task::of(&args.model.model, args.model.task.as_deref())? {
        Task::Classification => {
            let (ready, _) = classifier(&args.model)?;
            ready.refuse_fresh(&args.model.model)?;
            ready.model.check(&tokens)?;
            ready.model.forward(&tokens, &Scope::new(&ready.overlay())).into_data()
        }
        Task::CausalLm => {
            let ready = causal(&args.model)?;
            ready.model.check(&tokens)?;
            ready.model.forward(&tokens, &Scope::new(&ready.overlay())).into_data()
        }
    };
    Ok(write_tensors(&args.output, [("logits".to_owned(), &logits.convert::<f32>())])?)
}

pub(crate) fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    if Task::of(&args.model.model, args.model.task.as_deref())? != Task::CausalLm {
        return Err(Failure::new(
            "generate continues texts; for a classifier use burn-peft predict",
        ));
    }
    let tokenizer = TextTokenizer::load(&args.model.model)?;
    let (text, special) = match (&tokenizer.template, args.chat) {
        (_, false) => (args.prompt.clone(), true),
        (Some(template), true) => {
            let turn = Message { role: "user".into(), content: args.prompt.clone() };
            (template.render(&[turn], true).map_err(Failure::new)?, false)
        }
        (None, true) => {
            let folder = args.model.model.display();
            return Err(Failure::new(format!("{folder}: has no chat template; leave --chat out")));
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
        eos: tokenizer.eos.into_iter().collect(),
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
    let mut folds: Vec<Box<dyn Folds + '_>> = Vec::new();
    for adapters in &ready.adapters {
        let name = adapters.name();
        folds.push(adapters.folds().ok_or_else(|| {
            Failure::new(format!("{name} adapters act on activations and cannot be merged"))
        })?);
    }
    let parts: Vec<(&dyn Folds, f64)> = folds.iter().map(|part| (part.as_ref(), 1.0)).collect();
    let merged = fold(&ready.model, &parts)?;
    save_model(&merged, &args.model.model, &args.output_dir, fields)?;
    print(&format!("merged model in {}\n", args.output_dir.display()))
}

pub(crate) fn merge(args: &MergeArgs) -> Result<(), Failure> {
    let ModelArgs { model, adapter, task, .. } = &args.model;
    if adapter.is_empty() {
        return Err(Failure::new("nothing to merge: give --adapter"));
    }
    claim(&args.output_dir, &["config.json", "model.safetensors"], args.overwrite)?;
    match Task::of(model, task.as_deref())? {
        Task::Classification => {
            let (ready, labels) = classifier(&args.model)?;
            ready.refuse_fresh(model)?;
            let numbered = || labels.iter().enumerate();
            let names: serde_json::Map<_, _> =
                numbered().map(|(id, name)| (id.to_string(), json!(name))).collect();
            let ids: serde_json::Map<_, _> =
                numbered().map(|(id, name)| (name.clone(), json!(id))).collect();
            let fields = [
                ("architectures", json!(["BertForSequenceClassification"])),
                ("id2label", json!(names)),
                ("label2id", json!(ids)),
            ];
            write_merged(args, &ready, &fields)
        }
        Task::CausalLm => {
            let fields = [("architectures", json!(["LlamaForCausalLM"]))];
            write_merged(args, &causal(&args.model)?, &fields)
        }
    }
}
