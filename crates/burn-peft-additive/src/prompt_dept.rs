//! DePT: a short prompt, and a low-rank change of the words' embeddings by their positions (arXiv 2309.05173).

use crate::numbers::{Draw, STANDARD};
use crate::prompt::{
    EMBEDDINGS, PREFIXES, UNREAD, VirtualTokens, between, in_front, only_saved, saved_only, words,
};
use burn::module::{Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Kind, Method, PlaceTensors, SeenTokens, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// DePT (arXiv 2309.05173): the model reads `[P; E(x) + A·B]`, where row `i` of `A·B` belongs to the `i`-th token
/// of a sequence.
///
/// `P [n, hidden]`, `A [max_length, r] ~ U(±1/√r)` and `B [r, hidden]`, zero at first, are trained; tokens from
/// `max_length` on are left as they are. Parameters: `n·hidden + r·(max_length + hidden)`. The paper gives `P` a much
/// larger learning rate than the pair: `--loraplus-lr-ratio`. HF PEFT does not have it: the same file with tensors
/// of their own names. All else is as in [`PromptTuning`](crate::PromptTuning).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DePt {
    /// How many virtual tokens.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// Rank of the change; default 8.
    pub r: usize,
    /// Tokens that are changed; default 256, as in the paper.
    pub max_length: usize,
    /// Layers trained whole.
    #[serde(flatten, with = "saved_only")]
    pub targets: Targets,
}

impl Default for DePt {
    fn default() -> Self {
        Self {
            virtual_tokens: VirtualTokens::default(),
            r: 8,
            max_length: 256,
            targets: Targets::default(),
        }
    }
}

/// The virtual tokens and the change.
#[derive(Module, Debug)]
pub struct DecomposedPrompt {
    /// `P [n, hidden]`.
    pub prompt_embeddings: Param<Tensor<2>>,
    /// `A [max_length, r]`.
    pub dept_a: Param<Tensor<2>>,
    /// `B [r, hidden]`.
    pub dept_b: Param<Tensor<2>>,
}

impl Adapter for DecomposedPrompt {
    fn positional(&self, positions: &Tensor<2, Int>) -> Option<Tensor<3>> {
        let [batch, seq] = positions.dims();
        let a = self.dept_a.val();
        let [most, r] = a.dims();
        let last = most as i64 - 1;
        let at = positions.clone().clamp(0, last).reshape([batch * seq]);
        let rows = a.select(0, at).reshape([batch, seq, r]);
        let within = positions.clone().lower_equal_elem(last).float().unsqueeze_dim::<3>(2);
        Some(linear(rows, self.dept_b.val(), None) * within)
    }

    fn prompt(&self, _x: &Tensor<3>, _: Option<&SeenTokens>) -> Option<Tensor<3>> {
        Some(self.prompt_embeddings.val().unsqueeze())
    }

    fn virtual_tokens(&self) -> usize {
        self.prompt_embeddings.dims()[0]
    }
}

/// Names of the three tensors in the file.
const NAMES: [&str; 3] = [EMBEDDINGS, "dept_A", "dept_B"];

impl DePt {
    /// Shapes of the three tensors.
    fn shapes(&self, site: &Site) -> [[usize; 2]; 3] {
        let width = site.fan_out();
        [
            [self.virtual_tokens.num_virtual_tokens, width],
            [self.max_length, self.r],
            [self.r, width],
        ]
    }

    fn adapter([prompt, a, b]: [Tensor<2>; 3]) -> DecomposedPrompt {
        DecomposedPrompt {
            prompt_embeddings: Param::from_tensor(prompt),
            dept_a: Param::from_tensor(a),
            dept_b: Param::from_tensor(b),
        }
    }
}

impl Method for DePt {
    type Adapter = DecomposedPrompt;
    type Shared = Option<DecomposedPrompt>;
    const NAME: &'static str = "DEPT";
    const HF_FORMAT: bool = false;
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];
    const PREFIXES: [&'static str; 2] = PREFIXES;
    const FASTER: &'static [&'static str] = &["prompt_embeddings"];

    in_front!(words);

    fn check(&self) -> Result<(), Error> {
        self.virtual_tokens.check()?;
        between("r", self.r, 1, 1 << 16)?;
        between("max_length", self.max_length, 1, 1 << 20)
    }

    fn init(
        &self,
        site: &Site,
        _shared: &Self::Shared,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<DecomposedPrompt, Error> {
        self.virtual_tokens.fits(site, site.fan_out())?;
        let [prompt, a, b] = self.shapes(site);
        let prompt = STANDARD.tensor(prompt, rng, device);
        let a = Draw::Uniform((1.0 / self.r as f32).sqrt()).tensor(a, rng, device);
        Ok(Self::adapter([prompt, a, Tensor::zeros(b, device)]))
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let virtual_tokens = VirtualTokens::of(2);
        let plain = Self { virtual_tokens, r: 3, max_length: 5, targets: only_saved(targets) };
        // Some tokens are beyond it.
        vec![Self { max_length: 3, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shapes(site).iter().map(|[rows, columns]| rows * columns).sum()
    }

    fn tensors(
        &self,
        _site: &Site,
        _adapter: &DecomposedPrompt,
    ) -> Vec<(&'static str, TensorData)> {
        Vec::new()
    }

    fn restore(
        &self,
        site: &Site,
        shared: &Self::Shared,
        _file: &mut PlaceTensors<'_>,
        _device: &Device,
    ) -> Result<DecomposedPrompt, Error> {
        shared.clone().ok_or_else(|| Error::place(&site.path, UNREAD))
    }

    fn shared_tensors(&self, adapters: &[&DecomposedPrompt]) -> Vec<(String, TensorData)> {
        let tensors = |adapter: &&DecomposedPrompt| {
            let parts = [&adapter.prompt_embeddings, &adapter.dept_a, &adapter.dept_b];
            let data = parts.map(|part| part.val().into_data());
            NAMES.map(str::to_owned).into_iter().zip(data)
        };
        adapters.iter().flat_map(tensors).collect()
    }

    fn restore_shared(
        &self,
        sites: &[&Site],
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<Self::Shared, Error> {
        let Some(site) = sites.first() else { return Ok(None) };
        self.virtual_tokens.fits(site, site.fan_out())?;
        let [prompt, a, b] = self.shapes(site);
        let mut take = |index: usize, shape| file.take(NAMES[index], shape, device);
        Ok(Some(Self::adapter([take(0, prompt)?, take(1, a)?, take(2, b)?])))
    }
}
