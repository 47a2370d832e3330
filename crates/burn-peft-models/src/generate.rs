//! Text generation.

use crate::{KvCache, LlamaForCausalLM, T5ForConditionalGeneration, Tokens};
use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft_core::{Error, Scope, Sites};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// How the next token is chosen, in `transformers`' words.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Most tokens to add; default 64.
    pub max_new_tokens: usize,
    /// Draw from the distribution; otherwise the likeliest is taken. Default false.
    pub do_sample: bool,
    /// Divides the logits before drawing; default 1.
    pub temperature: f64,
    /// Draw among the k likeliest only; 0 for all. Default 50.
    pub top_k: usize,
    /// Draw among the likeliest whose probabilities add up to p; default 1.
    pub top_p: f64,
    /// Seed of the draw; default 42.
    pub seed: u64,
    /// Tokens that end the text; the end token itself is not returned.
    pub eos: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_new_tokens: 64,
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            seed: 42,
            eos: Vec::new(),
        }
    }
}

impl Sampling {
    fn check(&self) -> Result<(), Error> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            let found = format!("expected a number above 0, found {}", self.temperature);
            return Err(Error::config("temperature", found));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let found = format!("expected a share in (0, 1], found {}", self.top_p);
            return Err(Error::config("top_p", found));
        }
        Ok(())
    }

    /// The next token out of the logits of the whole vocabulary.
    fn choose(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> Option<u32> {
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
        // Ties go to the smaller id, as argmax does.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.do_sample {
            if self.top_k > 0 {
                order.truncate(self.top_k);
            }
            let top = f64::from(logits[*order.first()?]);
            let weight = |&i: &usize| ((f64::from(logits[i]) - top) / self.temperature).exp();
            let weights: Vec<f64> = order.iter().map(weight).collect();
            let all: f64 = weights.iter().sum();
            let mut sum = 0.0;
            let kept = weights.iter().take_while(|&&w| {
                let before = sum;
                sum += w / all;
                before < self.top_p
            });
            let kept: Vec<f64> = kept.copied().collect();
            let mut left = rng.random::<f64>() * kept.iter().sum::<f64>();
            for (i, w) in kept.iter().enumerate() {
                left -= w;
                if left < 0.0 {
                    return u32::try_from(order[i]).ok();
                }
            }
            return u32::try_from(order[kept.len().saturating_sub(1)]).ok();
        }
        u32::try_from(*order.first()?).ok()
    }
}

/// Continues `prompt`, with a cache unless something over the model [reads whole
/// sequences](burn_peft_core::Adapter::whole_sequence), until an end token, `max_new_tokens`, or the model's last position. Each
/// token goes to `each` as it comes; returning false stops. Returns the new tokens.
///
/// # Errors
/// An empty prompt, tokens outside the vocabulary, a prompt longer than the model's positions, or
/// options that cannot work.
pub fn generate(
    model: &LlamaForCausalLM,
    cx: &Scope<'_>,
    prompt: &[u32],
    sampling: &Sampling,
    each: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>, Error> {
    sampling.check()?;
    model.check(&Tokens::row(prompt), cx)?;
    let mut cache = cache(model, cx);
    let room = model.max_positions() - prompt.len() - model.virtual_tokens(cx);
    let logits = |new: &[u32]| {
        let tokens = next_tokens(prompt, new, cache.is_some());
        model.logits(last(model.hidden(&tokens, cx, cache.as_mut())), cx)
    };
    extend(sampling, room, logits, each)
}

/// Writes an answer to `input`, as [`generate`] continues a prompt; T5 has no last position.
///
/// # Errors
/// As [`generate`].
pub fn generate_seq2seq(
    model: &T5ForConditionalGeneration,
    cx: &Scope<'_>,
    input: &[u32],
    sampling: &Sampling,
    each: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>, Error> {
    sampling.check()?;
    let input = Tokens::row(input);
    model.check(&input, cx)?;
    let encoded = model.encode(&input, cx);
    let mut cache = cache(model, cx);
    let start = [model.start()];
    let logits = |new: &[u32]| {
        let tokens = next_tokens(&start, new, cache.is_some());
        model.logits(last(model.hidden(&tokens, &encoded, cx, cache.as_mut())), cx)
    };
    extend(sampling, usize::MAX, logits, each)
}

/// A cache, unless something over the model reads whole sequences.
fn cache<M: Module>(model: &M, cx: &Scope<'_>) -> Option<KvCache> {
    let sites = Sites::of(model, None);
    let whole = sites.places().any(|site| cx.at(&site.path).whole_sequence());
    (!whole).then(KvCache::default)
}

/// What the model is to read: all so far, or with a cache what it has not read.
fn next_tokens(begin: &[u32], new: &[u32], cached: bool) -> Tokens {
    match new {
        [.., newest] if cached => Tokens::row(&[*newest]),
        _ => Tokens::row(&[begin, new].concat()),
    }
}

/// States of the last token, `[1, 1, h]`.
fn last(hidden: Tensor<3>) -> Tensor<3> {
    let [_, seq, _] = hidden.dims();
    hidden.narrow(1, seq - 1, 1)
}

/// New tokens, at most `room`, each chosen by what `logits` makes of those before.
fn extend(
    sampling: &Sampling,
    room: usize,
    mut logits: impl FnMut(&[u32]) -> Tensor<3>,
    mut each: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>, Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut new = Vec::new();
    while new.len() < sampling.max_new_tokens.min(room) {
        let logits = logits(&new).into_data().convert::<f32>();
        let logits = logits.as_slice::<f32>().unwrap_or_default();
        let Some(next) = sampling.choose(logits, &mut rng) else {
            let reason =
                "the model's output is not a number; its weights or the adapter are broken";
            return Err(Error::place("lm_head", reason));
        };
        if sampling.eos.contains(&next) {
            break;
        }
        new.push(next);
        if !each(next) {
            break;
        }
    }
    Ok(new)
}
