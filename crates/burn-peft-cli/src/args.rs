//! What can be said on the command line, and in a TOML file that holds the same.

use clap::{Args, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Fine-tune pretrained models with small adapters, in HF PEFT's format.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Examples:
  burn-peft train --model minilm --train-file train.tsv --output-dir out --target-modules query,value
  burn-peft predict --model minilm --adapter out --text \"a film to remember\"
  burn-peft merge --model minilm --adapter out --output-dir merged
  burn-peft inspect out

Each verb has its own --help."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// A number that is neither infinite nor NaN, which JSON could not hold.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub(crate) struct Finite(f64);

impl From<Finite> for f64 {
    fn from(number: Finite) -> Self {
        number.0
    }
}

impl TryFrom<f64> for Finite {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        number
            .is_finite()
            .then_some(Self(number))
            .ok_or_else(|| format!("expected a finite number, found {number}"))
    }
}

impl std::str::FromStr for Finite {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.parse::<f64>().map_err(|e| e.to_string())?)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Fine-tune a model and write the adapter
    Train(Box<TrainArgs>),
    /// Loss and accuracy (and calibration error, or perplexity) of a model with adapters on a file
    Eval(EvalArgs),
    /// Label texts or images
    Predict(PredictArgs),
    /// Fit how sure an adapter is of its answers, for --laplace of eval and predict
    Laplace(LaplaceArgs),
    /// Embeddings of texts, for search and similarity
    Embed(EmbedArgs),
    /// Continue a text
    Generate(GenerateArgs),
    /// Logits of token ids or pixels in a safetensors file, for other programs
    Forward(ForwardArgs),
    /// Fold adapters into the model and write it as a Hugging Face folder
    Merge(MergeArgs),
    /// Make any adapter that is a difference of weights a plain LoRA
    Convert(crate::convert::ConvertArgs),
    /// Make several LoRAs one: weighted sums, TIES, DARE
    Combine(crate::combine::CombineArgs),
    /// Say what is in an adapter or a model
    Inspect(InspectArgs),
}

/// A model with adapters over it.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Folder of the model: config.json, model.safetensors (or shards), and tokenizer.json or
    /// preprocessor_config.json
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of an adapter, or of several that were trained together; several are added up
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Vec<PathBuf>,
    /// text-classification, image-classification or causal-lm; default: what the model is
    #[arg(long)]
    pub(crate) task: Option<String>,
    /// flex, ndarray, wgpu, vulkan or cuda, if the build has it
    #[arg(long, default_value = "flex")]
    pub(crate) device: String,
    /// In which type the model's matrices are held: float32, bfloat16 or float16; all else is float32
    #[arg(long, default_value = "float32")]
    pub(crate) dtype: String,
}

/// Options of `train`. Every one can also stand in the file of `--config`, with `_` for `-`.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[command(after_help = "Examples:
  burn-peft train --model minilm --train-file train.tsv --validation-file dev.tsv \\
      --output-dir out --target-modules query,value --r 8 --lora-alpha 16 --learning-rate 1e-3
  burn-peft train --model llama --task causal-lm --train-file novel.txt --packing \\
      --output-dir out --target-modules all-linear --max-length 256
  burn-peft train --model minilm --train-file train.tsv --output-dir out --target-modules query,value \\
      --also '{\"peft_type\": \"PREFIX_TUNING\", \"num_virtual_tokens\": 8}'
  burn-peft train --model vit --train-file pictures --validation-split 0.1 --output-dir out \\
      --target-modules query,value
  burn-peft train --config run.toml --seed 7
  burn-peft train --config run.toml --resume")]
pub(crate) struct TrainArgs {
    /// TOML file with any of these options; flags win over it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// text-classification, image-classification or causal-lm; default: what the model is
    #[arg(long)]
    pub(crate) task: Option<String>,
    /// Training data: .tsv, .csv, .jsonl; for causal-lm also plain text; images: a folder of a folder for
    /// each class, or idx files (train-images-idx3-ubyte, with train-labels-idx1-ubyte beside it)
    #[arg(long, value_name = "FILE")]
    pub(crate) train_file: Option<PathBuf>,
    /// Data that decides which checkpoint is best
    #[arg(long, value_name = "FILE")]
    pub(crate) validation_file: Option<PathBuf>,
    /// Share of the training data held out in place of a validation file
    #[arg(long, value_name = "SHARE")]
    pub(crate) validation_split: Option<Finite>,
    /// Data evaluated before and after
    #[arg(long, value_name = "FILE")]
    pub(crate) test_file: Option<PathBuf>,
    /// Where adapter, metrics and picture go
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,
    /// Replace the adapter that the output folder holds
    #[arg(long)]
    #[serde(skip)]
    pub(crate) overwrite: bool,
    /// Go on from the checkpoint in the output folder
    #[arg(long)]
    #[serde(skip)]
    pub(crate) resume: bool,
    /// flex, ndarray, wgpu, vulkan or cuda, if the build has it [default: flex]
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// In which type the model's matrices are held: float32, bfloat16 or float16; adapters and all else are
    /// float32 [default: float32]
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// Name of the text's column or field [default: text]
    #[arg(long)]
    pub(crate) text_column: Option<String>,
    /// Name of a second text's column, for tasks over pairs
    #[arg(long)]
    pub(crate) text_pair_column: Option<String>,
    /// Name of the label's column or field [default: label]
    #[arg(long)]
    pub(crate) label_column: Option<String>,
    /// Most tokens of a text [default: 128; causal-lm: 512]
    #[arg(long)]
    pub(crate) max_length: Option<usize>,
    /// causal-lm: put several texts in one row, which do not see each other
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) packing: Option<bool>,
    /// causal-lm, plain text: a document is a line, a paragraph or the file [default: paragraph]
    #[arg(long)]
    pub(crate) text_unit: Option<String>,

    #[arg(long, help_heading = "Method", help = methods())]
    pub(crate) method: Option<String>,
    /// Any option of the method by its name in adapter_config.json, its value as JSON
    #[arg(long, value_name = "NAME=JSON", help_heading = "Method")]
    pub(crate) method_option: Vec<String>,
    /// A further method, trained together with it and laid beside it, in the words of adapter_config.json:
    /// '{"peft_type": "BOTTLENECK", "target_modules": ["output"]}'; may be given several times
    #[arg(long, value_name = "JSON", value_parser = object, help_heading = "Method")]
    pub(crate) also: Vec<Map<String, Value>>,
    /// Layers to adapt: names (query,value), "all-linear", or a regular expression
    #[arg(long, help_heading = "Method")]
    pub(crate) target_modules: Option<String>,
    /// Layers to leave out, likewise
    #[arg(long, help_heading = "Method")]
    pub(crate) exclude_modules: Option<String>,
    /// Layers trained whole, by name; the classification head is always one
    #[arg(long, value_delimiter = ',', help_heading = "Method")]
    pub(crate) modules_to_save: Option<Vec<String>>,
    /// Only blocks with these numbers
    #[arg(long, value_delimiter = ',', help_heading = "Method")]
    pub(crate) layers_to_transform: Option<Vec<usize>>,
    /// Rank
    #[arg(long, help_heading = "Method")]
    pub(crate) r: Option<usize>,
    /// Scale, divided by the rank
    #[arg(long, help_heading = "Method")]
    pub(crate) lora_alpha: Option<Finite>,
    /// Dropout on the adapter's input
    #[arg(long, help_heading = "Method")]
    pub(crate) lora_dropout: Option<Finite>,
    /// none, all or lora_only
    #[arg(long, help_heading = "Method")]
    pub(crate) bias: Option<String>,
    /// Scale by the square root of the rank
    #[arg(long, num_args = 0..=1, default_missing_value = "true", help_heading = "Method")]
    pub(crate) use_rslora: Option<bool>,
    /// true, false, gaussian, orthogonal, pissa, pissa_niter_N, olora, mica; eva, corda or lora_ga, which
    /// look at training data first
    #[arg(long, help_heading = "Method")]
    pub(crate) init_lora_weights: Option<String>,
    /// Batches of training data that such an init looks at; at most an epoch [default: 32]
    #[arg(long, help_heading = "Method")]
    pub(crate) init_batches: Option<usize>,

    /// Peak learning rate [default: 2e-4]
    #[arg(long, help_heading = "Training")]
    pub(crate) learning_rate: Option<Finite>,
    /// Passes over the data [default: 3]
    #[arg(long, help_heading = "Training")]
    pub(crate) num_train_epochs: Option<usize>,
    /// Optimizer steps, whatever the epochs
    #[arg(long, help_heading = "Training")]
    pub(crate) max_steps: Option<usize>,
    /// Examples a forward pass [default: 8]
    #[arg(long, help_heading = "Training")]
    pub(crate) per_device_train_batch_size: Option<usize>,
    /// Examples a forward pass in evaluation [default: 32]
    #[arg(long, help_heading = "Training")]
    pub(crate) per_device_eval_batch_size: Option<usize>,
    /// Forward passes an optimizer step [default: 1]
    #[arg(long, help_heading = "Training")]
    pub(crate) gradient_accumulation_steps: Option<usize>,
    /// Keep one hidden state of each block and compute the rest again for gradients: less memory, more time
    #[arg(long, num_args = 0..=1, default_missing_value = "true", help_heading = "Training")]
    pub(crate) gradient_checkpointing: Option<bool>,
    /// Largest norm of all gradients; 0 for no clipping [default: 1]
    #[arg(long, help_heading = "Training")]
    pub(crate) max_grad_norm: Option<Finite>,
    /// AdamW's weight decay [default: 0]
    #[arg(long, help_heading = "Training")]
    pub(crate) weight_decay: Option<Finite>,
    /// Share of the steps in which the rate rises [default: 0]
    #[arg(long, help_heading = "Training")]
    pub(crate) warmup_ratio: Option<Finite>,
    /// The same as a number of steps
    #[arg(long, help_heading = "Training")]
    pub(crate) warmup_steps: Option<usize>,
    /// linear, cosine or constant [default: linear]
    #[arg(long, help_heading = "Training")]
    pub(crate) lr_scheduler_type: Option<String>,
    /// LoRA+: how many times faster the zero-initialised factor learns
    #[arg(long, help_heading = "Training")]
    pub(crate) loraplus_lr_ratio: Option<Finite>,
    /// Riemannian LoRA: each factor's gradient preconditioned by the other, with this ridge (1e-6)
    #[arg(long, help_heading = "Training")]
    pub(crate) riemannian_reg: Option<Finite>,
    /// Batches of similar length [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", help_heading = "Training")]
    pub(crate) group_by_length: Option<bool>,
    /// Evaluate every so many steps [default: each epoch]
    #[arg(long, help_heading = "Training")]
    pub(crate) eval_steps: Option<usize>,
    /// Stop after so many evaluations without a better one
    #[arg(long, help_heading = "Training")]
    pub(crate) early_stopping_patience: Option<usize>,
    /// loss or accuracy [default: loss]
    #[arg(long, help_heading = "Training")]
    pub(crate) metric_for_best_model: Option<String>,
    /// Metrics every so many steps [default: 10]
    #[arg(long, help_heading = "Training")]
    pub(crate) logging_steps: Option<usize>,
    /// Checkpoint every so many steps [default: each epoch]
    #[arg(long, help_heading = "Training")]
    pub(crate) save_steps: Option<usize>,
    /// Seed of everything random [default: 42]
    #[arg(long, help_heading = "Training")]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  burn-peft eval --model minilm --adapter out --test-file test.tsv")]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Data with labels, in any training format
    #[arg(long, value_name = "FILE")]
    pub(crate) test_file: PathBuf,
    /// Answers of the posterior that `laplace` fitted
    #[arg(long)]
    pub(crate) laplace: bool,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Examples a forward pass
    #[arg(long, default_value_t = 32)]
    pub(crate) per_device_eval_batch_size: usize,
    /// causal-lm, plain text: a document is a line, a paragraph or the file [default: paragraph]
    #[arg(long)]
    pub(crate) text_unit: Option<String>,
    /// Most tokens of a text [default: 128; causal-lm: 512]
    #[arg(long)]
    pub(crate) max_length: Option<usize>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Laplace-LoRA (arXiv 2308.13111), for a LoRA adapter of a classifier: writes laplace.json and
laplace.safetensors into the adapter's folder.

Example:
  burn-peft laplace --model minilm --adapter out --train-file train.tsv
  burn-peft eval --model minilm --adapter out --test-file test.tsv --laplace"
)]
pub(crate) struct LaplaceArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The data that the adapter was trained on
    #[arg(long, value_name = "FILE")]
    pub(crate) train_file: PathBuf,
    /// Rank of the factors over sides of the weights wider than that [default: exact]
    #[arg(long)]
    pub(crate) n_kfac: Option<usize>,
    /// Precision of the prior [default: where the evidence of the training data is largest]
    #[arg(long)]
    pub(crate) prior_precision: Option<Finite>,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Examples a forward pass
    #[arg(long, default_value_t = 32)]
    pub(crate) per_device_eval_batch_size: usize,
    /// Most tokens of a text
    #[arg(long, default_value_t = 128)]
    pub(crate) max_length: usize,
}

#[derive(Debug, Args)]
pub(crate) struct ColumnArgs {
    /// Name of the text's column or field
    #[arg(long, default_value = "text")]
    pub(crate) text_column: String,
    /// Name of a second text's column
    #[arg(long)]
    pub(crate) text_pair_column: Option<String>,
    /// Name of the label's column or field
    #[arg(long, default_value = "label")]
    pub(crate) label_column: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  burn-peft predict --model minilm --adapter out --text \"a film to remember\"
  burn-peft predict --model minilm --adapter out --test-file new.tsv > labels.jsonl
  burn-peft predict --model vit --adapter out --image shoe.png")]
pub(crate) struct PredictArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Answers of the posterior that `laplace` fitted
    #[arg(long)]
    pub(crate) laplace: bool,
    /// A PNG or JPEG image, for a model of images; may be given several times
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) texts: TextArgs,
}

/// Texts without labels.
#[derive(Debug, Args)]
pub(crate) struct TextArgs {
    /// A text; may be given several times
    #[arg(long)]
    pub(crate) text: Vec<String>,
    /// A file of texts (.tsv, .csv, .jsonl); for a model of images their folder, or idx images
    #[arg(long, value_name = "FILE")]
    pub(crate) test_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Texts a forward pass
    #[arg(long, default_value_t = 32)]
    pub(crate) per_device_eval_batch_size: usize,
    /// Most tokens of a text
    #[arg(long, default_value_t = 128)]
    pub(crate) max_length: usize,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Writes f32 `embeddings` [texts, hidden]: the mean of the last hidden states over a text's tokens,
with length 1, so that a product of two is their cosine. Those of --test-file come first.

Example:
  burn-peft embed --model minilm --text \"a film to remember\" --text \"a movie one keeps\" --output e.safetensors"
)]
pub(crate) struct EmbedArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) texts: TextArgs,
    /// Where the embeddings go
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  burn-peft generate --model llama --prompt \"It was\" --max-new-tokens 40
  burn-peft generate --model llama --adapter out --chat --prompt \"Who are you?\" --do-sample --top-p 0.9")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The text to continue
    #[arg(long)]
    pub(crate) prompt: String,
    /// The prompt is a user's turn of a chat, by the model's template
    #[arg(long)]
    pub(crate) chat: bool,
    /// Most tokens to add
    #[arg(long, default_value_t = 64)]
    pub(crate) max_new_tokens: usize,
    /// Draw from the distribution in place of taking the likeliest
    #[arg(long)]
    pub(crate) do_sample: bool,
    /// Divides the logits before drawing
    #[arg(long, default_value_t = 1.0)]
    pub(crate) temperature: f64,
    /// Draw among the k likeliest; 0 for all
    #[arg(long, default_value_t = 50)]
    pub(crate) top_k: usize,
    /// Draw among the likeliest that make up this probability
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Seed of the draw
    #[arg(long, default_value_t = 42)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Reads int64 `input_ids` and `attention_mask` [batch, seq] (and `token_type_ids`, if there);
for a model of images f32 `pixel_values` [batch, channels, height, width], as its preprocessor leaves them. Writes
f32 `logits`: [batch, labels], or [batch, seq, vocab] for causal-lm.

Example:
  burn-peft forward --model minilm --adapter out --inputs in.safetensors --output out.safetensors"
)]
pub(crate) struct ForwardArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Token ids or pixels
    #[arg(long, value_name = "FILE")]
    pub(crate) inputs: PathBuf,
    /// Where the logits go
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  burn-peft merge --model minilm --adapter out --output-dir merged")]
pub(crate) struct MergeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Where the merged model goes
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: PathBuf,
    /// Replace the model that the output folder holds
    #[arg(long)]
    pub(crate) overwrite: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  burn-peft inspect out
  burn-peft inspect minilm")]
pub(crate) struct InspectArgs {
    /// Folder of an adapter or of a model
    pub(crate) path: PathBuf,
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("expected a JSON object: {e}"))
}

fn methods() -> String {
    format!("Method [default: lora]: {}", burn_peft::registry::NAMES.join(", ").to_lowercase())
}
