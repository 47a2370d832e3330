//! The networks out of which P-tuning's virtual tokens come while they are trained.

use crate::numbers::Draw;
use crate::prompt::dense;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Linear};
use burn::tensor::activation::{relu, sigmoid};
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor};
use rand::rngs::ChaCha8Rng;

/// Layers of a bidirectional LSTM, if any, and then linear layers with `relu` between them.
#[derive(Module, Debug)]
pub struct PromptEncoder {
    /// Each reads the one before, both ways.
    pub lstm: Vec<BiLstm>,
    /// The head.
    pub head: Vec<Linear>,
    /// Between the layers of the LSTM, in training.
    pub dropout: Dropout,
}

/// One layer: two LSTMs over the sequence, forwards and backwards, side by side.
#[derive(Module, Debug)]
pub struct BiLstm {
    /// Reads from the first token on.
    pub forwards: Lstm,
    /// Reads from the last token back.
    pub backwards: Lstm,
}

/// `i, f, g, o = x·W + b + h·U + c`; `c' = σ(f)·c + σ(i)·tanh(g)`; `h' = σ(o)·tanh(c')`.
#[derive(Module, Debug)]
pub struct Lstm {
    /// `W [in, 4·h]`, the four gates side by side, as PyTorch has them.
    pub input: Linear,
    /// `U [h, 4·h]`.
    pub hidden: Linear,
}

impl Lstm {
    /// As PyTorch draws it: `U(±1/√h)`.
    fn new(width: usize, h: usize, rng: &mut ChaCha8Rng, device: &Device) -> Self {
        let bound = (1.0 / h as f32).sqrt();
        let mut layer = |fan_in| Linear {
            weight: Param::from_tensor(Draw::Uniform(bound).tensor([fan_in, 4 * h], rng, device)),
            bias: Some(Param::from_tensor(Draw::Uniform(bound).tensor([4 * h], rng, device))),
        };
        Self { input: layer(width), hidden: layer(h) }
    }

    /// `[n, in] → [n, h]`.
    fn forward(&self, x: Tensor<2>, backwards: bool) -> Tensor<2> {
        let [n, _] = x.dims();
        let h = self.hidden.weight.dims()[0];
        let gates = self.input.forward(x); // [n, 4·h]
        let device = gates.device();
        let (mut state, mut cell) =
            (Tensor::zeros([1, h], &device), Tensor::zeros([1, h], &device));
        let mut out: Vec<Tensor<2>> = Vec::with_capacity(n);
        for step in 0..n {
            let at = if backwards { n - 1 - step } else { step };
            let sum = gates.clone().narrow(0, at, 1) + self.hidden.forward(state);
            let gate = |index: usize| sum.clone().narrow(1, index * h, h);
            cell = sigmoid(gate(1)) * cell + sigmoid(gate(0)) * gate(2).tanh();
            state = sigmoid(gate(3)) * cell.clone().tanh();
            out.push(state.clone());
        }
        if backwards {
            out.reverse();
        }
        Tensor::cat(out, 0)
    }
}

impl PromptEncoder {
    /// `width → h → h → width`.
    pub(crate) fn mlp(width: usize, h: usize, rng: &mut ChaCha8Rng, device: &Device) -> Self {
        let mut layer = |fan_in, fan_out| dense(fan_in, fan_out, rng, device);
        let head = vec![layer(width, h), layer(h, h), layer(h, width)];
        Self { lstm: Vec::new(), head, dropout: DropoutConfig::new(0.0).init() }
    }

    /// `layers` of a bidirectional LSTM of width `h`, then `2·h → 2·h → width`.
    pub(crate) fn lstm(
        width: usize,
        h: usize,
        layers: usize,
        dropout: f64,
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Self {
        let layer = |index, rng: &mut ChaCha8Rng| {
            let fan_in = if index == 0 { width } else { 2 * h };
            BiLstm {
                forwards: Lstm::new(fan_in, h, rng, device),
                backwards: Lstm::new(fan_in, h, rng, device),
            }
        };
        let lstm = (0..layers).map(|index| layer(index, rng)).collect();
        let head = vec![dense(2 * h, 2 * h, rng, device), dense(2 * h, width, rng, device)];
        Self { lstm, head, dropout: DropoutConfig::new(dropout).init() }
    }

    /// `[n, width] → [n, width]`; `drop` is whether there is dropout, in training.
    pub(crate) fn forward(&self, mut x: Tensor<2>, drop: bool) -> Tensor<2> {
        for (index, layer) in self.lstm.iter().enumerate() {
            if index > 0 && drop {
                x = self.dropout.forward(x);
            }
            let both = [layer.forwards.forward(x.clone(), false), layer.backwards.forward(x, true)];
            x = Tensor::cat(both.into(), 1);
        }
        for (index, layer) in self.head.iter().enumerate() {
            if index > 0 {
                x = relu(x);
            }
            x = linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val));
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;
    use burn_peft_core::TensorFile;
    use rand::SeedableRng;
    use std::path::Path;

    /// What PyTorch's network of HF PEFT makes of its own numbers (`interop/fixtures.py`).
    struct Golden(TensorFile, Device);

    impl Golden {
        fn of(name: &str, file: &str) -> Self {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/methods");
            let file = TensorFile::open(folder.join(name).join(file)).expect("is committed");
            Self(file, Device::flex())
        }

        fn data(&mut self, name: &str) -> TensorData {
            self.0.take_data(name).expect("is in the file")
        }

        /// `weight` and `bias` of a linear layer.
        fn layer(&mut self, weight: &str, bias: &str) -> Linear {
            let weight = Tensor::<2>::from_data(self.data(&format!("encoder.{weight}")), &self.1);
            let bias = Tensor::from_data(self.data(&format!("encoder.{bias}")), &self.1);
            Linear {
                weight: Param::from_tensor(weight.transpose()),
                bias: Some(Param::from_tensor(bias)),
            }
        }

        fn head(&mut self, layers: &[usize]) -> Vec<Linear> {
            let names = layers
                .iter()
                .map(|i| [format!("mlp_head.{i}.weight"), format!("mlp_head.{i}.bias")]);
            names.map(|[weight, bias]| self.layer(&weight, &bias)).collect()
        }
    }

    fn agrees(name: &str, make: impl FnOnce(&mut Golden) -> PromptEncoder) {
        let mut golden = Golden::of(name, "golden.safetensors");
        let encoder = make(&mut golden);
        let table = golden.data("encoder.embedding.weight");
        let found = encoder.forward(Tensor::from_data(table, &golden.1), true);
        let expected = Golden::of(name, "adapter_model.safetensors").data("prompt_embeddings");
        let far = (found - Tensor::from_data(expected, &golden.1)).abs().max().into_scalar::<f32>();
        assert!(far < 1e-5, "{name} differs by {far}");
    }

    #[test]
    fn an_mlp_is_pytorchs() {
        for name in ["p_tuning-bert", "p_tuning-llama"] {
            agrees(name, |golden| PromptEncoder {
                lstm: Vec::new(),
                head: golden.head(&[0, 2, 4]),
                dropout: DropoutConfig::new(0.0).init(),
            });
        }
    }

    #[test]
    fn an_lstm_is_pytorchs() {
        for name in ["p_tuning-lstm-bert", "p_tuning-lstm-llama"] {
            agrees(name, |golden| {
                let mut lstm = |layer: usize, way: &str| {
                    let mut part = |kind: &str| {
                        let of = |what: &str| format!("lstm_head.{what}_{kind}_l{layer}{way}");
                        golden.layer(&of("weight"), &of("bias"))
                    };
                    Lstm { input: part("ih"), hidden: part("hh") }
                };
                let mut layer = |index| BiLstm {
                    forwards: lstm(index, ""),
                    backwards: lstm(index, "_reverse"),
                };
                let lstm = vec![layer(0), layer(1)];
                let dropout = DropoutConfig::new(0.1).init();
                PromptEncoder { lstm, head: golden.head(&[0, 2]), dropout }
            });
        }
    }

    #[test]
    fn dropout_acts_in_training_and_never_in_what_is_written() {
        let device = Device::flex().autodiff();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let encoder = PromptEncoder::lstm(4, 6, 2, 0.5, &mut rng, &device);
        let x = Tensor::<2>::ones([3, 4], &device);
        let values = |drop| -> Vec<f32> {
            encoder.forward(x.clone(), drop).into_data().try_to_vec().expect("is f32")
        };
        assert_ne!(values(true), values(true));
        assert_eq!(values(false), values(false));
    }
}
