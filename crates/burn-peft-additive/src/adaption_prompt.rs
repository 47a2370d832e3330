//! LLaMA-Adapter: prompts that an attention reads through a gate, which is shut at first (arXiv 2303.16199).

use crate::numbers::STANDARD;
use crate::prompt::{attentions, between, only_saved};
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Error, Kind, Method, Names, OneOrMany, PlaceTensors, Scope, Site, Sites, Strictness,
    Targets,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// LLaMA-Adapter (arXiv 2303.16199): in the upper blocks, `o = softmax(q·kᵀ/√d)·v + g·softmax(q·k'ᵀ/√d)·v'`
/// before the output layer, with `k' = P·W_k` and `v' = P·W_v` by the block's own frozen layers.
///
/// `P [adapter_len, hidden] ~ N(0, 1)` and the gate `g`, zero at first, are trained at each block, so that a fresh
/// adapter changes nothing. Parameters: `adapter_len·hidden + 1` a block. `k'` has no position. HF PEFT has it for
/// decoders such as Llama alone, and adds the output layer's bias once more, where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaptionPrompt {
    /// Tokens of `P`; default 10, where HF PEFT has none and asks.
    pub adapter_len: usize,
    /// How many blocks, counted from the top; default all.
    pub adapter_layers: Option<usize>,
    /// End of the attentions' paths, such as "self_attn"; default: every attention. And layers trained whole.
    #[serde(flatten, with = "named")]
    pub targets: Targets,
}

impl Default for AdaptionPrompt {
    fn default() -> Self {
        Self { adapter_len: 10, adapter_layers: None, targets: Targets::default() }
    }
}

/// The fields that HF PEFT has, and layers trained whole where there are any.
mod named {
    use super::{Deserialize, Names, Serialize, Targets};
    use serde::{Deserializer, Serializer};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Named {
        target_modules: Option<Names>,
        #[serde(skip_serializing_if = "Option::is_none")]
        modules_to_save: Option<Vec<String>>,
    }

    pub(super) fn serialize<S: Serializer>(targets: &Targets, to: S) -> Result<S::Ok, S::Error> {
        let Targets { target_modules, modules_to_save, .. } = targets.clone();
        Named { target_modules, modules_to_save }.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Targets, D::Error> {
        let Named { target_modules, modules_to_save } = Named::deserialize(from)?;
        Ok(Targets { target_modules, modules_to_save, ..Targets::default() })
    }
}

/// The prompt of one block and its gate.
#[derive(Module, Debug)]
pub struct GatedPrompt {
    /// `P [adapter_len, hidden]`.
    pub adaption_prompt: Param<Tensor<2>>,
    /// `g [1]`.
    pub adaption_gate: Param<Tensor<1>>,
}

impl Adapter for GatedPrompt {
    fn attention(
        &self,
        _x: &Tensor<3>,
        q: &Tensor<4>,
        key: &Linear,
        value: &Linear,
    ) -> Option<Tensor<3>> {
        let [batch, heads, seq, d] = q.dims();
        let prompt = self.adaption_prompt.val();
        let [n, _] = prompt.dims();
        // [1, groups, n, d]: heads that share keys share these as well.
        let split = |layer: &Linear| {
            let own = Scope::plain().linear(layer, prompt.clone()); // [n, groups · d]
            let groups = own.dims()[1] / d;
            own.reshape([1, n, groups, d]).swap_dims(1, 2)
        };
        let (k, v) = (split(key), split(value));
        let groups = k.dims()[1];
        let q =
            (q.clone() * (d as f64).powf(-0.5)).reshape([batch, groups, heads / groups * seq, d]);
        let weights =
            softmax(q.matmul(k.swap_dims(2, 3)), 3) * self.adaption_gate.val().unsqueeze();
        let mixed = weights.matmul(v).reshape([batch, heads, seq, d]);
        Some(mixed.swap_dims(1, 2).reshape([batch, seq, heads * d]))
    }
}

impl AdaptionPrompt {
    fn adapter(prompt: Tensor<2>, gate: Tensor<1>) -> GatedPrompt {
        GatedPrompt {
            adaption_prompt: Param::from_tensor(prompt),
            adaption_gate: Param::from_tensor(gate),
        }
    }
}

impl Method for AdaptionPrompt {
    type Adapter = GatedPrompt;
    type Shared = ();
    const NAME: &'static str = "ADAPTION_PROMPT";
    const KINDS: &'static [Kind] = &[Kind::Attention];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const FASTER: &'static [&'static str] = &["adaption_gate"];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    /// As HF PEFT: attentions whose paths end with the name, the upper ones of them.
    fn places<'s>(&self, sites: &'s Sites, _: Strictness) -> Result<Vec<&'s Site>, Error> {
        let all = attentions(sites)?;
        let names = match &self.targets.target_modules {
            None => None,
            Some(Names::Pattern(name)) => Some(OneOrMany::One(name.clone())),
            Some(Names::List(names)) => Some(OneOrMany::Many(names.clone())),
        };
        let wanted = |path: &str, name: &str| {
            path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
        };
        let found: Vec<&Site> = match &names {
            None => all,
            Some(names) => {
                let named = |name: &String| all.iter().any(|site| wanted(&site.path, name));
                if let Some(unknown) = names.as_slice().iter().find(|name| !named(name)) {
                    let paths = all.iter().map(|site| site.path.as_str());
                    return Err(Error::no_match("target_modules", unknown, "attention", paths));
                }
                let asked = |site: &&Site| names.as_slice().iter().any(|n| wanted(&site.path, n));
                all.into_iter().filter(asked).collect()
            }
        };
        match self.adapter_layers {
            None => Ok(found),
            Some(layers) if layers <= found.len() => Ok(found[found.len() - layers..].to_vec()),
            Some(layers) => {
                let reason =
                    format!("expected at most {}, the model's, found {layers}", found.len());
                Err(Error::config("adapter_layers", reason))
            }
        }
    }

    fn check(&self) -> Result<(), Error> {
        between("adapter_len", self.adapter_len, 1, 1 << 16)?;
        self.adapter_layers.map_or(Ok(()), |layers| between("adapter_layers", layers, 1, 1 << 12))
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<GatedPrompt, Error> {
        let prompt = STANDARD.tensor([self.adapter_len, site.fan_in()], rng, device);
        Ok(Self::adapter(prompt, Tensor::zeros([1], device)))
    }

    /// HF PEFT asks for the number of blocks, which is known by now.
    fn finished(mut self, adapters: &burn_peft_core::Adapters<GatedPrompt>) -> Self {
        self.adapter_layers = Some(adapters.iter().count());
        self
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self { adapter_len: 3, targets: only_saved(targets), ..Self::default() };
        vec![Self { adapter_layers: Some(1), ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.adapter_len * site.fan_in() + 1
    }

    fn tensors(&self, _site: &Site, adapter: &GatedPrompt) -> Vec<(&'static str, TensorData)> {
        vec![
            ("adaption_prompt", adapter.adaption_prompt.val().unsqueeze::<3>().into_data()),
            ("adaption_gate", adapter.adaption_gate.val().into_data()),
        ]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<GatedPrompt, Error> {
        let shape = [1, self.adapter_len, site.fan_in()];
        let prompt = file.take("adaption_prompt", shape, device)?.squeeze_dim(0);
        Ok(Self::adapter(prompt, file.take("adaption_gate", [1], device)?))
    }
}
