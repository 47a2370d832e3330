//! A plain LoRA put together out of factors, place by place: what conversions and combinations end in.

use crate::common::{Bias, fifteen_digits};
use crate::init::Pair;
use crate::lora::{Lora, LoraAdapter};
use crate::source::laid_out;
use burn::module::Param;
use burn::tensor::Tensor;
use burn_peft_core::{
    Adapters, Error, Method, Names, Part, Site, Sites, Strictness, Targets, TrainedCopy,
};
use std::collections::{BTreeMap, BTreeSet};

/// What lies at one place.
pub(crate) struct Piece<'s> {
    pub(crate) site: &'s Site,
    /// `A [fan_in, r]` and `B [r, fan_out]`.
    pub(crate) pair: Pair,
    /// A bias of its own, `[fan_out]`.
    pub(crate) bias: Option<Tensor<1>>,
}

/// All of it, in the model's order.
pub(crate) struct Plain<'s> {
    pub(crate) pieces: Vec<Piece<'s>>,
    pub(crate) copies: BTreeMap<String, TrainedCopy>,
    /// `s` at every place: `Δ(W) = s·A·B`.
    pub(crate) scaling: f64,
    pub(crate) use_rslora: bool,
}

impl<'s> Plain<'s> {
    /// Nothing yet, with `s = 1`.
    pub(crate) fn new() -> Self {
        Self { pieces: Vec::new(), copies: BTreeMap::new(), scaling: 1.0, use_rslora: false }
    }

    /// The configuration that names exactly these places and ranks, and the adapters that belong to it.
    pub(crate) fn lora(mut self, sites: &'s Sites) -> Result<(Lora, Adapters<LoraAdapter>), Error> {
        let places: Vec<&str> = self.pieces.iter().map(|piece| piece.site.path.as_str()).collect();
        if places.is_empty() {
            let reason = "no weight of a linear, embedding or convolution layer changes; expected at \
                          least one, for LoRA to lie over";
            return Err(Error::config("target_modules", reason));
        }
        let bias = filled(sites, &places, &mut self.copies);
        let saved = self.copies.iter().filter(|(_, copy)| is_whole(copy));
        let saved: Vec<String> = saved.map(|(path, _)| path.clone()).collect();
        let ranks: Vec<usize> = self.pieces.iter().map(|piece| piece.pair.0.dims()[1]).collect();
        let r = ranks.iter().copied().max().unwrap_or(1);
        let mut lora = Lora {
            r,
            lora_alpha: self.alpha(r),
            use_rslora: self.use_rslora,
            bias,
            lora_bias: self.pieces.iter().any(|piece| piece.bias.is_some()),
            targets: targets(sites, &places, saved)?,
            ..Lora::default()
        };
        let mut smaller: Vec<(&str, usize)> = places.iter().copied().zip(ranks).collect();
        smaller.retain(|(_, rank)| *rank != r);
        // A key serves every path that ends in it: the longer ones come first.
        smaller.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        lora.rank_pattern = smaller.iter().map(|(path, rank)| (escaped(path), *rank)).collect();
        lora.alpha_pattern =
            smaller.iter().map(|(path, rank)| (escaped(path), self.alpha(*rank))).collect();
        lora.check()?;
        let mut layers = Vec::with_capacity(self.pieces.len());
        for Piece { site, pair: (a, b), bias } in self.pieces {
            let device = site.device();
            let zeros = || Tensor::zeros([site.fan_out()], &device);
            let own = lora.has_bias(site)?.then(|| bias.unwrap_or_else(zeros));
            let pair = (laid_out(a, &device), laid_out(b, &device));
            layers.push((site.path.clone(), lora.adapter(site, pair, None, own)?));
        }
        Ok((lora, Adapters::new(layers, self.copies)))
    }

    /// The alpha that makes the scale what it is at this rank.
    fn alpha(&self, r: usize) -> f64 {
        let r = r as f64;
        fifteen_digits(self.scaling * if self.use_rslora { r.sqrt() } else { r })
    }
}

/// Whether it stands for the whole layer and not for its bias alone.
pub(crate) fn is_whole(copy: &TrainedCopy) -> bool {
    copy.weight.is_some() || copy.scale.is_some()
}

/// The copy with its values on the plain device.
pub(crate) fn plain_copy(copy: &TrainedCopy) -> TrainedCopy {
    fn here<const D: usize>(param: &Option<Param<Tensor<D>>>) -> Option<Param<Tensor<D>>> {
        let value = param.as_ref()?.val().without_autodiff();
        Some(Param::from_tensor(value))
    }
    TrainedCopy { weight: here(&copy.weight), scale: here(&copy.scale), bias: here(&copy.bias) }
}

/// A copy of the bias alone.
pub(crate) fn bias_copy(bias: Tensor<1>) -> TrainedCopy {
    TrainedCopy { weight: None, scale: None, bias: Some(Param::from_tensor(bias)) }
}

/// The word under which the file holds the trained biases. It holds those of all adapted layers or of
/// all layers: the untrained ones among them are copied as they are.
fn filled(sites: &Sites, places: &[&str], copies: &mut BTreeMap<String, TrainedCopy>) -> Bias {
    let trained: Vec<&str> =
        copies.iter().filter(|(_, copy)| !is_whole(copy)).map(|(path, _)| path.as_str()).collect();
    let bias = match trained.iter().all(|path| places.contains(path)) {
        true if trained.is_empty() => return Bias::None,
        true => Bias::Only("lora_only".into()),
        false => Bias::All,
    };
    let wanted = |site: &&Site| bias == Bias::All || places.contains(&site.path.as_str());
    for site in sites.all.iter().filter(wanted) {
        if !copies.contains_key(&site.path)
            && let Some(copy) = TrainedCopy::of(site, Part::Bias, &site.device())
        {
            copies.insert(site.path.clone(), copy);
        }
    }
    bias
}

/// A path as a pattern that means nothing else.
fn escaped(path: &str) -> String {
    path.replace('.', r"\.")
}

/// Names of layers if they reach exactly `places`, else their paths, else a pattern.
fn targets(sites: &Sites, places: &[&str], saved: Vec<String>) -> Result<Targets, Error> {
    let last = |path: &&str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let names: BTreeSet<String> = places.iter().map(last).collect();
    let paths: Vec<String> = places.iter().map(|path| escaped(path)).collect();
    let saved = (!saved.is_empty()).then_some(saved);
    for target in [
        names.into_iter().collect::<Names>(),
        places.iter().copied().collect(),
        Names::Pattern(format!("({})", paths.join("|"))),
    ] {
        let target_modules = Some(target);
        let targets =
            Targets { target_modules, modules_to_save: saved.clone(), ..Targets::default() };
        let chosen = targets.select(sites, Lora::KINDS, Strictness::Any)?;
        let whole = targets.saved(sites, Strictness::Any)?.len();
        if chosen.iter().map(|site| site.path.as_str()).eq(places.iter().copied())
            && whole == saved.as_ref().map_or(0, Vec::len)
        {
            return Ok(targets);
        }
    }
    let reason = "the names of layers that are trained whole reach others, too; expected layers that can \
                  be told apart by the ends of their paths";
    Err(Error::config("modules_to_save", reason))
}
