//! HF PEFT's variants of LoRA: what a place computes beside `s·A·B`. A place has one of them at most.

use crate::alora::{Invocation, check_tokens};
use crate::bdlora::{BdLoraConfig, Blocks, Cut};
use crate::common::positive;
use crate::dora::Dora;
use crate::init::{Init, Pair, Place};
use crate::kasa::{Kasa, KasaConfig};
use crate::lora::{Lora, LoraAdapter};
use crate::monteclora::{Monteclora, MontecloraConfig};
use crate::qalora::{Pooled, groups};
use crate::velora::{Velora, VeloraConfig, VeloraInit};
use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft_core::{Error, Kind, PlaceTensors, Site, Sites};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Which variant is asked for, DoRA (`use_dora`) aside: one at most, and none with DoRA. On linear layers
/// only, as in HF PEFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraVariants {
    /// KaSA: the smallest singular directions of the weight make room for what is learnt.
    pub kasa_config: Option<KasaConfig>,
    /// BD-LoRA: one of the factors is block-diagonal.
    pub use_bdlora: Option<BdLoraConfig>,
    /// aLoRA: the tokens of the invocation from which on a row is adapted.
    pub alora_invocation_tokens: Option<Vec<u32>>,
    /// MonteCLoRA: training draws `A` from a distribution around it.
    pub monteclora_config: Option<MontecloraConfig>,
    /// VeLoRA: the backward pass keeps projections of the inputs.
    pub velora_config: Option<VeloraConfig>,
    /// QA-LoRA: inputs are pooled in groups.
    pub use_qalora: bool,
    /// Inputs in a group of QA-LoRA; default 16.
    pub qalora_group_size: usize,
}

impl Default for LoraVariants {
    fn default() -> Self {
        Self {
            kasa_config: None,
            use_bdlora: None,
            alora_invocation_tokens: None,
            monteclora_config: None,
            velora_config: None,
            use_qalora: false,
            qalora_group_size: 16,
        }
    }
}

/// What a place has beside LoRA's factors.
#[derive(Module, Debug)]
pub enum LoraVariant {
    /// DoRA.
    Dora(Dora),
    /// KaSA.
    Kasa(Kasa),
    /// BD-LoRA.
    BdLora(Blocks),
    /// aLoRA.
    ALora(Invocation),
    /// MonteCLoRA.
    Monteclora(Monteclora),
    /// VeLoRA.
    Velora(Velora),
    /// QA-LoRA.
    QaLora(Pooled),
}

impl LoraVariant {
    /// The field that asks for it, by which errors call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Dora(_) => "use_dora",
            Self::Kasa(_) => "kasa_config",
            Self::BdLora(_) => "use_bdlora",
            Self::ALora(_) => "alora_invocation_tokens",
            Self::Monteclora(_) => "monteclora_config",
            Self::Velora(_) => "velora_config",
            Self::QaLora(_) => "use_qalora",
        }
    }

    /// Whether the difference is `s·A·B` and nothing more, with `A` and `B` as they act.
    pub(crate) fn is_product(&self) -> bool {
        !matches!(self, Self::Dora(_) | Self::Kasa(_) | Self::ALora(_))
    }

    /// `A` and `B` as they act: `s·A·B` is the difference, or the part of it that is a product.
    pub(crate) fn factors(&self, (a, b): Pair) -> Pair {
        match self {
            Self::Kasa(kasa) => (kasa.scaled(a), b),
            Self::BdLora(blocks) => blocks.whole((a, b)),
            Self::QaLora(pooled) => pooled.whole((a, b)),
            Self::Dora(_) | Self::ALora(_) | Self::Monteclora(_) | Self::Velora(_) => (a, b),
        }
    }
}

impl LoraVariants {
    /// Every option at least once.
    pub(crate) fn samples(plain: &Lora) -> Vec<Lora> {
        let of = |variants, more: Lora| Lora { variants, ..more };
        let none = Self::default;
        let kasa = |config| Self { kasa_config: Some(config), ..none() };
        let bd = |config| Self { use_bdlora: Some(config), ..none() };
        let words = |words: &[&str]| Some(words.iter().map(|&word| word.into()).collect());
        let both = BdLoraConfig {
            target_modules_bd_a: words(&["query", "key"]),
            target_modules_bd_b: words(&["value"]),
            nblocks: 2,
            match_strict: false,
        };
        let cut_a = BdLoraConfig {
            target_modules_bd_a: words(&[""]), // is in every path
            nblocks: 4,
            ..BdLoraConfig::default()
        };
        let invoked =
            |tokens: &[u32]| Self { alora_invocation_tokens: Some(tokens.to_vec()), ..none() };
        let monte = |config| Self { monteclora_config: Some(config), ..none() };
        let sampled = MontecloraConfig {
            num_samples: 3,
            use_entropy: true,
            dirichlet_prior: 1.0,
            sample_scaler: 0.01,
            kl_loss_weight: 1e-3,
            buffer_size: 10,
        };
        let velora = |config| Self { velora_config: Some(config), ..none() };
        let fixed = VeloraConfig { num_groups: 3, scale: 2.0, init_type: VeloraInit::Random };
        let qa = Self { use_qalora: true, qalora_group_size: 4, ..none() };
        let random = Lora { init_lora_weights: Init::Random, ..plain.clone() };
        let dropping = Lora { lora_dropout: 0.1, ..plain.clone() };
        vec![
            of(kasa(KasaConfig { beta: 0.01, gamma: 0.0 }), dropping.clone()),
            of(bd(both), plain.clone()),
            of(bd(cut_a), random.clone()),
            of(invoked(&[3, 0]), Lora { lora_bias: true, ..plain.clone() }),
            of(invoked(&[7]), dropping.clone()),
            of(monte(MontecloraConfig::default()), dropping.clone()),
            of(monte(sampled), Lora { lora_bias: true, ..random.clone() }),
            of(velora(VeloraConfig { num_groups: 4, ..VeloraConfig::default() }), dropping.clone()),
            of(velora(fixed), random),
            of(qa, dropping),
        ]
    }

    /// The field that asks for a variant.
    pub(crate) fn asked(&self, use_dora: bool) -> Result<Option<&'static str>, Error> {
        let fields = [
            (use_dora, "use_dora"),
            (self.kasa_config.is_some(), "kasa_config"),
            (self.use_bdlora.is_some(), "use_bdlora"),
            (self.alora_invocation_tokens.is_some(), "alora_invocation_tokens"),
            (self.monteclora_config.is_some(), "monteclora_config"),
            (self.velora_config.is_some(), "velora_config"),
            (self.use_qalora, "use_qalora"),
        ];
        let mut asked = fields.into_iter().filter_map(|(asked, field)| asked.then_some(field));
        match (asked.next(), asked.next()) {
            (Some(first), Some(second)) => {
                let reason = format!("does not work with {first}; expected one of them");
                Err(Error::config(second, reason))
            }
            (first, _) => Ok(first),
        }
    }

    /// Refuses what cannot work on any model.
    pub(crate) fn check(&self, lora: &Lora) -> Result<(), Error> {
        let Some(field) = self.asked(lora.use_dora)? else {
            return Ok(());
        };
        let init = &lora.init_lora_weights;
        let draws_anew = self.use_qalora || self.use_bdlora.is_some();
        let expected = match init {
            _ if lora.use_dora && !init.freezes_b() => None,
            Init::Default | Init::Random | Init::Gaussian => None,
            Init::Orthogonal | Init::Eva if !draws_anew => None,
            _ if lora.use_dora => Some("any but \"mica\""),
            _ if draws_anew => Some("true, false or \"gaussian\""),
            _ => Some("true, false, \"gaussian\", \"orthogonal\" or \"eva\""),
        };
        if let Some(expected) = expected {
            let reason = format!("does not work with every init_lora_weights; expected {expected}");
            return Err(Error::config(field, reason));
        }
        if lora.lora_bias && self.use_bdlora.is_some() {
            return Err(Error::config(
                "lora_bias",
                "has no place beside blocks; expected no use_bdlora",
            ));
        }
        self.kasa_config.as_ref().map_or(Ok(()), KasaConfig::check)?;
        self.use_bdlora.as_ref().map_or(Ok(()), BdLoraConfig::check)?;
        self.monteclora_config.as_ref().map_or(Ok(()), MontecloraConfig::check)?;
        self.velora_config.as_ref().map_or(Ok(()), VeloraConfig::check)?;
        if self.alora_invocation_tokens.as_ref().is_some_and(Vec::is_empty) {
            let reason = "expected the tokens of the invocation, found none";
            return Err(Error::config("alora_invocation_tokens", reason));
        }
        positive("qalora_group_size", self.qalora_group_size)
    }

    /// Refuses what cannot work on the model with these places.
    pub(crate) fn check_places(&self, sites: &Sites, chosen: &[&Site]) -> Result<(), Error> {
        let Some(tokens) = &self.alora_invocation_tokens else {
            return Ok(());
        };
        check_tokens(tokens, sites)?;
        match chosen.iter().find(|site| Some(&site.path) == sites.output.as_ref()) {
            Some(output) => {
                let reason = "alora_invocation_tokens: the output layer is shown states without their \
                              tokens; expected layers below it";
                Err(Error::place(&output.path, reason))
            }
            None => Ok(()),
        }
    }

    /// The shapes of `A` and `B` as they are held, of rank `r`.
    pub(crate) fn shapes(&self, site: &Site, r: usize) -> Result<[[usize; 2]; 2], Error> {
        let (mut a, mut b) = ([site.fan_in(), r], [r, site.fan_out()]);
        if let Some(config) = &self.use_bdlora {
            match config.cut(site, r)? {
                Some(Cut::A) => a[0] /= config.nblocks,
                Some(Cut::B) => b[0] /= config.nblocks,
                None => {}
            }
        }
        if self.use_qalora {
            a[0] = groups(self.qalora_group_size, site)?;
        }
        Ok([a, b])
    }

    /// The factors as they begin, where they are not LoRA's own `pair`.
    pub(crate) fn drawn(
        &self,
        place: &Place<'_>,
        pair: Pair,
        rng: &mut ChaCha8Rng,
    ) -> Result<Pair, Error> {
        self.linear(place.site)?;
        if let Some(config) = &self.use_bdlora
            && let Some(cut) = config.cut(place.site, place.r)?
        {
            return Ok(Blocks::drawn(cut, config.nblocks, place, pair, rng));
        }
        match self.use_qalora {
            true => {
                let groups = groups(self.qalora_group_size, place.site)?;
                Ok(Pooled::drawn(groups, place, pair, rng))
            }
            false => Ok(pair),
        }
    }

    /// Parameters of its own at a place of rank `r`.
    pub(crate) fn parameters(&self, r: usize) -> usize {
        let diagonal = if self.kasa_config.is_some() { r } else { 0 };
        diagonal + self.monteclora_config.as_ref().map_or(0, |config| r + config.num_samples)
    }

    /// Whether it adds a term to the loss.
    pub(crate) fn has_penalty(&self) -> bool {
        let sampled = self.monteclora_config.as_ref();
        self.kasa_config.is_some() || sampled.is_some_and(MontecloraConfig::has_penalty)
    }

    /// That term.
    pub(crate) fn penalty<'a>(
        &self,
        adapters: impl IntoIterator<Item = &'a LoraAdapter>,
    ) -> Option<Tensor<1>> {
        match (&self.kasa_config, &self.monteclora_config) {
            (Some(config), _) => config.penalty(adapters),
            (None, config) => config.as_ref()?.penalty(adapters),
        }
    }

    fn linear(&self, site: &Site) -> Result<(), Error> {
        match self.asked(false)? {
            Some(field) if site.kind != Kind::Linear => {
                let reason = format!("{field}: works on linear layers only, as in HF PEFT");
                Err(Error::place(&site.path, reason))
            }
            _ => Ok(()),
        }
    }

    /// What is there beside the factors, as it begins at a place.
    pub(crate) fn begin(
        &self,
        place: &Place<'_>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Option<LoraVariant>, Error> {
        Ok(match self {
            Self { kasa_config: Some(_), .. } => Some(LoraVariant::Kasa(Kasa::new(place, rng)?)),
            Self { monteclora_config: Some(config), .. } => {
                Some(LoraVariant::Monteclora(Monteclora::new(config, place, rng)))
            }
            Self { velora_config: Some(config), .. } => {
                Some(LoraVariant::Velora(Velora::new(config, place, rng)))
            }
            _ => self.constant(place)?,
        })
    }

    /// As it stands in a file.
    pub(crate) fn restore(
        &self,
        place: &Place<'_>,
        file: &mut PlaceTensors<'_>,
    ) -> Result<Option<LoraVariant>, Error> {
        self.linear(place.site)?;
        Ok(match self {
            Self { kasa_config: Some(_), .. } => {
                Some(LoraVariant::Kasa(Kasa::restored(place, file)?))
            }
            Self { monteclora_config: Some(config), .. } => {
                Some(LoraVariant::Monteclora(Monteclora::restored(config, place, file)?))
            }
            Self { velora_config: Some(config), .. } => {
                Some(LoraVariant::Velora(Velora::restored(config, place, file)?))
            }
            _ => self.constant(place)?,
        })
    }

    /// Of variants that have nothing of their own to train.
    fn constant(&self, place: &Place<'_>) -> Result<Option<LoraVariant>, Error> {
        if let Some(config) = &self.use_bdlora {
            let cut = config.cut(place.site, place.r)?;
            let blocks = |cut| LoraVariant::BdLora(Blocks::new(cut, config.nblocks, place));
            return Ok(cut.map(blocks));
        }
        if let Some(tokens) = &self.alora_invocation_tokens {
            return Ok(Some(LoraVariant::ALora(Invocation { tokens: tokens.clone() })));
        }
        let pooled = || LoraVariant::QaLora(Pooled { group_size: self.qalora_group_size });
        Ok(self.use_qalora.then(pooled))
    }
}
