//! The arithmetic that a step cannot do without: floating-point operations of its matrix products, a product
//! of `[m, k]` and `[k, n]` being `2·m·k·n`.
//!
//! Counted are real tokens, no padding, and of causal attention the pairs that see each other. A backward pass
//! counts where a gradient must go: to the inputs of a frozen layer if anything trained lies below it, and to
//! weights that are trained. Where the first token of a row is all that is read behind the blocks, the last one has keys and
//! values of all tokens and the rest of it for that token. Everything that goes element by element is free.

use super::run::Measure;
use crate::failure::Failure;
use serde_json::Value;

/// A linear layer of a block.
#[derive(Debug, Clone, PartialEq)]
struct Linear {
    name: &'static str,
    /// When it comes in the block: 0 before the attention, then one after the other.
    stage: usize,
    fan_in: f64,
    fan_out: f64,
}

/// The products of a model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    layers: usize,
    linears: Vec<Linear>,
    /// Width of queries, all heads together.
    width: f64,
    causal: bool,
    /// `fan_in · fan_out` of what stands behind the blocks, summed.
    head: f64,
    /// Where a row's first token alone is read there, by a layer "dense" of this width.
    pooler: Option<f64>,
    pub(super) vocab: usize,
}

/// How often the products are made.
struct Work {
    tokens: f64,
    /// Pairs of tokens that see each other.
    pairs: f64,
    /// Positions that the head reads.
    heads: f64,
}

impl Shape {
    /// Of the model with this `config.json`.
    pub(super) fn of(config: &Value) -> Result<Self, Failure> {
        let size = |name: &str| {
            let found = config[name].as_u64().map(|size| size as usize);
            found.ok_or_else(|| Failure::new(format!("config.json: has no size `{name}`")))
        };
        let (h, wide) = (size("hidden_size")? as f64, size("intermediate_size")? as f64);
        let (layers, vocab) = (size("num_hidden_layers")?, size("vocab_size")?);
        let linear = |name, stage, fan_in, fan_out| Linear { name, stage, fan_in, fan_out };
        match config["model_type"].as_str() {
            Some("bert") => Ok(Self {
                layers,
                linears: vec![
                    linear("query", 0, h, h),
                    linear("key", 0, h, h),
                    linear("value", 0, h, h),
                    linear("dense", 1, h, h),
                    linear("dense", 2, h, wide),
                    linear("dense", 3, wide, h),
                ],
                width: h,
                causal: false,
                head: h * h + h * config["num_labels"].as_u64().unwrap_or(2) as f64,
                pooler: Some(h),
                vocab,
            }),
            Some("llama") => {
                let heads = size("num_attention_heads")? as f64;
                let groups = config["num_key_value_heads"].as_f64().unwrap_or(heads);
                let d = config["head_dim"].as_f64().unwrap_or(h / heads);
                Ok(Self {
                    layers,
                    linears: vec![
                        linear("q_proj", 0, h, heads * d),
                        linear("k_proj", 0, h, groups * d),
                        linear("v_proj", 0, h, groups * d),
                        linear("o_proj", 1, heads * d, h),
                        linear("gate_proj", 2, h, wide),
                        linear("up_proj", 2, h, wide),
                        linear("down_proj", 3, wide, h),
                    ],
                    width: heads * d,
                    causal: true,
                    head: h * vocab as f64,
                    pooler: None,
                    vocab,
                })
            }
            other => {
                let found = other.unwrap_or("none");
                Err(Failure::new(format!("model_type: expected bert or llama, found {found}")))
            }
        }
    }

    /// Operations of one step of a measure over rows of these lengths, with LoRA of rank `r` on `targets`.
    /// `new_tokens` follow the first row where a text is continued.
    pub(super) fn step(
        &self,
        measure: Measure,
        lengths: &[usize],
        targets: &[String],
        r: usize,
        new_tokens: usize,
    ) -> f64 {
        let work = self.work(measure, lengths, new_tokens);
        let (lora, r) = (|l: &Linear| targets.iter().any(|name| name == l.name), r as f64);
        let forward = self.forward(&work);
        let pooler = self.pooler.filter(|_| targets.iter().any(|name| name == "dense"));
        let pooled = pooler.map_or(0.0, |h| 2.0 * work.heads * r * 2.0 * h);
        let adapted = |layer| {
            let factors =
                |l: &Linear| 2.0 * self.tokens(layer, l, &work) * r * (l.fan_in + l.fan_out);
            self.linears.iter().filter(|l| lora(l)).map(factors).sum::<f64>()
        };
        let laid = forward + (0..self.layers).map(adapted).sum::<f64>() + pooled;
        let lora_step = || laid + self.backward(&work, lora, r) + 2.0 * pooled;
        match measure {
            Measure::Full => 3.0 * forward,
            Measure::Lora | Measure::LoraBf16 => lora_step(),
            // Blocks go forward twice, and what stands behind them once.
            Measure::LoraCheckpointed => lora_step() + laid - pooled - 2.0 * work.heads * self.head,
            _ => laid,
        }
    }

    /// A step's floor is no more than this many products one after the other, for rounding.
    pub(super) fn depth(&self) -> f64 {
        const BLOCK: usize = 6; // projections, scores, mixture, output, and two of the feed-forward part
        (self.layers * BLOCK + 2) as f64
    }

    /// The longest sum of a product, over rows of at most `longest` tokens.
    pub(super) fn longest_sum(&self, longest: usize) -> f64 {
        let inner = self.linears.iter().map(|l| l.fan_in);
        inner.fold(longest as f64, f64::max)
    }

    /// Sizes `[m, k, n]` of the largest products over that many tokens.
    pub(super) fn products(&self, tokens: usize) -> Vec<[usize; 3]> {
        let large = self.linears.iter().filter(|l| l.stage >= 2);
        let large = large.map(|l| [tokens, l.fan_in as usize, l.fan_out as usize]);
        let mut products: Vec<_> = large.chain([[1024; 3]]).collect();
        products.dedup();
        products
    }

    fn work(&self, measure: Measure, lengths: &[usize], new_tokens: usize) -> Work {
        let generates = measure == Measure::Generate;
        // The last token that is written is never read.
        let read = |length: usize| if generates { length + new_tokens - 1 } else { length } as f64;
        let lengths: Vec<f64> = lengths.iter().map(|length| read(*length)).collect();
        let pairs = |n: &f64| if self.causal { n * (n + 1.0) / 2.0 } else { n * n };
        let tokens = lengths.iter().sum::<f64>();
        let rows = lengths.len() as f64;
        let heads = match (generates, self.causal) {
            (true, _) => new_tokens as f64,
            (false, true) => tokens - rows, // the first token of a row is nobody's target
            (false, false) => rows,
        };
        Work { tokens, pairs: lengths.iter().map(pairs).sum(), heads }
    }

    /// Whether of this block the first token of each row is all that is read.
    fn reads_first(&self, layer: usize) -> bool {
        self.pooler.is_some() && layer + 1 == self.layers
    }

    /// Tokens that go through a layer of a block.
    fn tokens(&self, layer: usize, linear: &Linear, work: &Work) -> f64 {
        let of_all = linear.stage == 0 && linear.name != "query";
        if self.reads_first(layer) && !of_all { work.heads } else { work.tokens }
    }

    fn pairs(&self, layer: usize, work: &Work) -> f64 {
        if self.reads_first(layer) { work.tokens } else { work.pairs }
    }

    fn forward(&self, work: &Work) -> f64 {
        let block = |layer| {
            let product = |l: &Linear| 2.0 * self.tokens(layer, l, work) * l.fan_in * l.fan_out;
            let linears = self.linears.iter().map(product).sum::<f64>();
            linears + 4.0 * self.pairs(layer, work) * self.width // scores and mixture
        };
        (0..self.layers).map(block).sum::<f64>() + 2.0 * work.heads * self.head
    }

    /// To inputs and factors. In the first block nothing trained lies below the first adapted layers.
    fn backward(&self, work: &Work, lora: impl Fn(&Linear) -> bool, r: f64) -> f64 {
        let Some(first) = self.linears.iter().filter(|l| lora(l)).map(|l| l.stage).min() else {
            return 0.0;
        };
        let mut sum = 2.0 * work.heads * self.head;
        for layer in 0..self.layers {
            for linear in &self.linears {
                let Linear { fan_in, fan_out, .. } = linear;
                let tokens = self.tokens(layer, linear, work);
                let below = layer > 0 || linear.stage > first;
                if below {
                    sum += 2.0 * tokens * fan_in * fan_out;
                }
                if lora(linear) {
                    // To B, through B, to A, and through A where something lies below.
                    let inputs = if below { 2.0 } else { 1.0 };
                    sum += 2.0 * tokens * r * (2.0 * fan_out + inputs * fan_in);
                }
            }
            let trained = |name: &[&str]| {
                layer > 0 || self.linears.iter().any(|l| name.contains(&l.name) && lora(l))
            };
            let [q, k, v] = [["query", "q_proj"], ["key", "k_proj"], ["value", "v_proj"]]
                .map(|names| trained(&names));
            // Of the four products of attention's backward, those that lead to something trained.
            let products = [v, q || k, q, k].into_iter().filter(|needed| *needed).count();
            sum += 2.0 * products as f64 * self.pairs(layer, work) * self.width;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bert() -> Shape {
        let config = json!({
            "model_type": "bert", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 10,
        });
        Shape::of(&config).expect("is a model")
    }

    fn llama() -> Shape {
        let config = json!({
            "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        });
        Shape::of(&config).expect("is a model")
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_forward_pass_is_its_products() {
        // 5 tokens in rows of 3 and 2; a block: 4 products of 4 by 4, two of 4 by 8; 9 + 4 pairs.
        let block = 2.0 * 5.0 * (4.0 * 16.0 + 2.0 * 32.0) + 4.0 * 13.0 * 4.0;
        // The last: keys and values of 5 tokens, the rest for 2, which see 3 + 2.
        let last = 2.0 * 5.0 * 32.0 + 2.0 * 2.0 * (2.0 * 16.0 + 2.0 * 32.0) + 4.0 * 5.0 * 4.0;
        let head = 2.0 * 2.0 * (16.0 + 8.0); // the pooler and two classes, for each row
        let forward = bert().step(Measure::Forward, &[3, 2], &[], 1, 0);
        assert_eq!(forward, block + last + head);
        assert_eq!(bert().step(Measure::Full, &[3, 2], &[], 1, 0), 3.0 * forward);
        // Rank 2 on the queries of both blocks.
        let laid = bert().step(Measure::Forward, &[3, 2], &names(&["query"]), 2, 0);
        assert_eq!(laid - forward, 2.0 * (5.0 + 2.0) * 2.0 * (4.0 + 4.0));
    }

    #[test]
    fn a_lora_step_ends_where_nothing_trained_lies_below() {
        let targets = names(&["value"]);
        let forward = bert().step(Measure::Forward, &[3, 2], &targets, 2, 0);
        let step = bert().step(Measure::Lora, &[3, 2], &targets, 2, 0);
        let head = 2.0 * 2.0 * (16.0 + 8.0);
        // The second block: all its layers, attention's four products, both factors' four products.
        let second = 2.0 * 5.0 * 32.0
            + 2.0 * 2.0 * 96.0
            + 2.0 * 4.0 * 5.0 * 4.0
            + 2.0 * 5.0 * 2.0 * (8.0 + 8.0);
        // The first: what lies over the values, one product of attention, and no way through A.
        let first = 2.0 * 5.0 * (16.0 + 64.0) + 2.0 * 13.0 * 4.0 + 2.0 * 5.0 * 2.0 * (8.0 + 4.0);
        assert_eq!(step - forward, head + second + first);
        // With every layer adapted, the pooler's is among them.
        let all = names(&["dense"]);
        let with = bert().step(Measure::Forward, &[3, 2], &all, 1, 0);
        let plain = bert().step(Measure::Forward, &[3, 2], &[], 1, 0);
        let factors = 2.0 * (5.0 + 2.0) * (8.0 + 12.0 + 12.0) + 2.0 * 2.0 * 8.0;
        assert_eq!(with - plain, factors);
    }

    #[test]
    fn causal_attention_sees_half_and_the_head_reads_targets() {
        // q 4 by 4, k and v 4 by 2, o 4 by 4, gate, up and down 4 by 6.
        let weights = 16.0 + 8.0 + 8.0 + 16.0 + 3.0 * 24.0;
        let block = 2.0 * 3.0 * weights + 4.0 * 6.0 * 4.0;
        assert_eq!(llama().step(Measure::Forward, &[3], &[], 1, 0), block + 2.0 * 2.0 * 40.0);
        // A prompt of 3, 2 more: 4 tokens are read, 2 are written.
        let block = 2.0 * 4.0 * weights + 4.0 * 10.0 * 4.0;
        assert_eq!(llama().step(Measure::Generate, &[3], &[], 1, 2), block + 2.0 * 2.0 * 40.0);
    }

    #[test]
    fn a_model_without_its_sizes_is_refused() {
        let error = Shape::of(&json!({"model_type": "bert"})).expect_err("has no sizes");
        assert!(error.to_string().contains("hidden_size"), "{error}");
        let other = json!({"model_type": "gpt2", "hidden_size": 1, "intermediate_size": 1,
            "num_hidden_layers": 1, "vocab_size": 1});
        assert!(Shape::of(&other).is_err_and(|e| e.to_string().contains("gpt2")));
    }
}
