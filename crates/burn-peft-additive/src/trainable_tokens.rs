//! Trainable tokens: some rows of an embedding trained, the others frozen.

use crate::fields::distinct;
use crate::numbers::Draw;
use crate::source::Source;
use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_core::{Adapter, Error, Fold, Kind, Method, PlaceTensors, Site, Targets};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Trainable tokens: the rows `token_indices` of an embedding are replaced by `T [tokens, dim]`, which
/// begins as those rows.
///
/// Parameters: `tokens · dim` a place. Folds: `Δ(W)` is `T - W` in those rows and 0 in all others; the
/// forward forms no table. Names and defaults are HF PEFT's. Where the model's output layer is the embedding
/// once more (tied), HF PEFT changes both and writes both; here the embedding alone changes, and such a file is
/// refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainableTokens {
    /// Ids of the tokens whose embeddings are trained, each once.
    pub token_indices: Vec<usize>,
    /// Begin as the embedding's own rows, the default; otherwise with `N(0, 1)`.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for TrainableTokens {
    fn default() -> Self {
        Self { token_indices: Vec::new(), init_weights: true, targets: Targets::default() }
    }
}

/// What trainable tokens are at one place.
#[derive(Module, Debug)]
pub struct TrainableTokensAdapter {
    /// `T [tokens, dim]`: whole rows and not differences, as in HF PEFT.
    pub trainable_tokens_delta: Param<Tensor<2>>,
    /// Their ids, `[tokens]`.
    pub token_indices: Tensor<1, Int>,
}

impl TrainableTokensAdapter {
    /// `T - W` in those rows, `[tokens, dim]`.
    fn change(&self, w: Tensor<2>) -> Tensor<2> {
        let rows = self.trainable_tokens_delta.val();
        let own = w.select(0, self.token_indices.clone());
        rows.clone() - own.cast(rows.dtype())
    }
}

/// 1 where an id is that token's, `[.., tokens]`.
pub(crate) fn is_token(ids: Tensor<2, Int>, tokens: &Tensor<1, Int>) -> Tensor<3> {
    let ([batch, seq], [count]) = (ids.dims(), tokens.dims());
    let shape = [batch, seq, count];
    let ids = ids.reshape([batch, seq, 1]).expand(shape);
    ids.equal(tokens.clone().reshape([1, 1, count]).expand(shape)).float()
}

/// Ids as a tensor on the plain device.
pub(crate) fn token_tensor(tokens: &[usize], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i64> = tokens.iter().map(|&id| id as i64).collect();
    Tensor::from_data(TensorData::new(ids, [tokens.len()]), &device.clone().inner())
}

impl Adapter for TrainableTokensAdapter {
    fn embedding(
        &self,
        layer: &Embedding,
        ids: &Tensor<2, Int>,
        y: &Tensor<3>,
    ) -> Option<Tensor<3>> {
        let change = self.change(layer.weight.val());
        let which = is_token(ids.clone(), &self.token_indices).cast(change.dtype());
        Some(which.matmul(change.unsqueeze()).cast(y.dtype()))
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for TrainableTokensAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let change = self.change(w.clone());
        let ids = Tensor::<1, Int>::arange(0..w.dims()[0] as i64, &self.token_indices.device());
        let which: Tensor<2> = is_token(ids.unsqueeze(), &self.token_indices).squeeze_dim(0);
        Some(which.cast(change.dtype()).matmul(change))
    }
}

impl TrainableTokens {
    /// Of these tokens.
    pub fn new(token_indices: impl IntoIterator<Item = usize>, targets: Targets) -> Self {
        Self { token_indices: token_indices.into_iter().collect(), targets, ..Self::default() }
    }

    fn adapter(
        &self,
        site: &Site,
        rows: Param<Tensor<2>>,
        device: &Device,
    ) -> Result<TrainableTokensAdapter, Error> {
        if let Some(outside) = self.token_indices.iter().find(|&&id| id >= site.fan_in()) {
            let (path, words) = (&site.path, site.fan_in());
            let reason =
                format!("expected ids below {words}, the words of {path}, found {outside}");
            return Err(Error::config("token_indices", reason));
        }
        let token_indices = token_tensor(&self.token_indices, device);
        Ok(TrainableTokensAdapter { trainable_tokens_delta: rows, token_indices })
    }

    fn shape(&self, site: &Site) -> [usize; 2] {
        [self.token_indices.len(), site.fan_out()]
    }
}

impl Method for TrainableTokens {
    type Adapter = TrainableTokensAdapter;
    type Shared = ();
    const NAME: &'static str = "TRAINABLE_TOKENS";
    const KINDS: &'static [Kind] = &[Kind::Embedding];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn check(&self) -> Result<(), Error> {
        distinct("token_indices", &self.token_indices)
    }

    fn draws(&self) -> bool {
        !self.init_weights
    }

    fn starts_as_identity(&self) -> bool {
        self.init_weights
    }

    fn init(
        &self,
        site: &Site,
        _shared: &(),
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<TrainableTokensAdapter, Error> {
        let drawn = Draw::Normal(0.0, 1.0).tensor(self.shape(site), rng, device);
        let adapter = self.adapter(site, Param::from_tensor(drawn), device)?;
        let own = site.rows(adapter.token_indices.clone());
        match own.filter(|_| self.init_weights) {
            Some(own) => {
                let own = Tensor::from_data(own.into_data().convert::<f32>(), device);
                Ok(TrainableTokensAdapter {
                    trainable_tokens_delta: Param::from_tensor(own),
                    ..adapter
                })
            }
            None => Ok(adapter),
        }
    }

    fn fold(adapter: &TrainableTokensAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new([0, 7, 3], targets.clone());
        vec![Self { init_weights: false, ..plain.clone() }, plain]
    }

    fn parameters(&self, site: &Site) -> usize {
        self.shape(site).iter().product()
    }

    fn tensors(
        &self,
        _site: &Site,
        adapter: &TrainableTokensAdapter,
    ) -> Vec<(&'static str, TensorData)> {
        vec![("trainable_tokens_delta", adapter.trainable_tokens_delta.val().into_data())]
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<TrainableTokensAdapter, Error> {
        let mut from = crate::source::Stored { file, device };
        let rows = from.take("trainable_tokens_delta", self.shape(site), Draw::Constant(0.0))?;
        self.adapter(site, rows, device)
    }
}
