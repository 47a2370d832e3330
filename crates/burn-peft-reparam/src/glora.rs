//! GLoRA: `W' = W + W ⊙ A + B`, `b' = b + b ⊙ D + E + C·W`, each of the five of a form of its own
//! (arXiv 2306.07967).

use crate::common::{Bias, positive};
use crate::lycoris::indexable;
use crate::source::{Draw, Drawn, Factor, Read, Source};
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft_core::{
    Adapter, Biases, Error, Fold, Kind, Method, PlaceTensors, Site, Targets, composed,
};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// GLoRA (arXiv 2306.07967): `Δ(W) = W ⊙ A + B`, `Δ(b) = b ⊙ D + E + C·W`.
///
/// `A` and `B` are `[fan_in, r]·[r, fan_out]` ("lora"), a value for each output ("vector"), one value
/// ("constant") or nothing ("none"); `C [1, fan_in]` is `[1, r]·[r, fan_in]`, a vector or nothing; `D` and
/// `E` are vectors `[fan_out]`, constants or nothing. A layer without a bias has neither `C`, `D` nor
/// `E`. Of "lora" the first factor is `U(±1/√n)` (`n = fan_in`, for `C` 1) and the second zero; all else
/// is zero. Parameters with the default words: `2r·(fan_in + fan_out)`, `r·(fan_in + 1)` for `C` and 2
/// for `D` and `E`. Folds. Names and defaults are HF PEFT's.
///
/// A Hadamard product of `W` with a thin one has no cheaper way than the weight: with `config_A_B` "lora"
/// the layer is composed on each call. With the other words nothing dense is formed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(non_snake_case)]
pub struct Glora {
    /// Rank of those that are "lora"; default 8.
    pub r: usize,
    /// `A` and `B`: lora (default), vector, constant or none.
    pub config_A_B: GloraForm,
    /// `C`: lora (default), vector or none.
    pub config_C: GloraForm,
    /// `D` and `E`: vector, constant (default) or none.
    pub config_D_E: GloraForm,
    /// Which biases of the model are trained beside it: none (default), all or glora_only. HF PEFT
    /// multiplies `D` with the trained bias, here it is the base's; so they go with `config_D_E` none only.
    pub bias: Bias,
    /// `true` (default): an identity at the start. `false`: everything is drawn.
    pub init_weights: bool,
    /// Where it goes.
    #[serde(flatten)]
    pub targets: Targets,
}

/// What one of GLoRA's five is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GloraForm {
    /// Two thin factors.
    Lora,
    /// A value for each output (for `C`: for each input).
    Vector,
    /// One value.
    Constant,
    /// Nothing.
    None,
}

impl Default for Glora {
    fn default() -> Self {
        Self {
            r: 8,
            config_A_B: GloraForm::Lora,
            config_C: GloraForm::Lora,
            config_D_E: GloraForm::Constant,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// What GLoRA trains at one place, each as HF PEFT stores it: a column for each input (for `C` one), a row
/// for each output (for `C`: input). One column counts for all inputs, one value for all outputs too.
#[derive(Module, Debug)]
pub struct GloraAdapter {
    /// `Aᵀ`: `[fan_out, fan_in]`, `[fan_out, 1]` or `[1, 1]`.
    pub a: Option<Factor>,
    /// `Bᵀ`, likewise.
    pub b: Option<Factor>,
    /// `Cᵀ [fan_in, 1]`.
    pub c: Option<Factor>,
    /// `Dᵀ`: `[fan_out, 1]` or `[1, 1]`.
    pub d: Option<Factor>,
    /// `Eᵀ`, likewise.
    pub e: Option<Factor>,
    /// The frozen weight where `C` asks for it: a handle on the base's own.
    pub w: Option<Tensor<2>>,
}

/// `M`, of what is stored as `Mᵀ`.
fn matrix(factor: &Option<Factor>) -> Option<Tensor<2>> {
    Some(factor.as_ref()?.matrix().transpose())
}

fn add<const D: usize>(parts: [Option<Tensor<D>>; 3]) -> Option<Tensor<D>> {
    parts.into_iter().flatten().reduce(|sum, part| sum + part)
}

impl Adapter for GloraAdapter {
    fn linear(&self, layer: &Linear, x: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
        if let Some(whole) = self.linear_whole(layer, x) {
            return Some(whole - y.clone());
        }
        let bias = layer.bias.as_ref().map(|b| b.val());
        // A scales outputs: x·(W ⊙ A) = (y - b) ⊙ A.
        let scaled = matrix(&self.a).map(|a| {
            let y = y.clone().cast(a.dtype());
            let b = bias.clone().map(|b| b.cast(a.dtype()).unsqueeze());
            b.map_or_else(|| y.clone(), |b| y.clone() - b) * a.unsqueeze()
        });
        // B is the same for all inputs: x·B = Σx · B.
        let shifted = matrix(&self.b).map(|b| x.clone().cast(b.dtype()).sum_dim(2) * b.unsqueeze());
        let moved = bias.and_then(|b| Fold::bias(self, &b)).map(|delta| delta.unsqueeze());
        Some(add([scaled, shifted, moved])?.expand(y.dims()).cast(y.dtype()))
    }

    fn linear_whole(&self, layer: &Linear, x: &Tensor<3>) -> Option<Tensor<3>> {
        self.a.as_ref()?.b.as_ref()?; // of one column and row there are cheaper ways
        composed::linear(self, layer, x)
    }

    fn by_token(&self) -> bool {
        true
    }
}

impl Fold for GloraAdapter {
    fn weight(&self, w: &Tensor<2>) -> Option<Tensor<2>> {
        let scaled = matrix(&self.a).map(|a| w.clone().cast(a.dtype()) * a);
        let shifted = matrix(&self.b).map(|b| b.expand(w.dims()));
        add([scaled, shifted, None])
    }

    fn bias(&self, b: &Tensor<1>) -> Option<Tensor<1>> {
        let b: Tensor<2> = b.clone().unsqueeze();
        let scaled = matrix(&self.d).map(|d| b.clone().cast(d.dtype()) * d);
        let shifted = matrix(&self.e).map(|e| e.expand(b.dims()));
        let moved = matrix(&self.c).zip(self.w.clone()).map(|(c, w)| {
            let dtype = c.dtype();
            c.cast(w.dtype()).matmul(w).cast(dtype)
        });
        Some(add([scaled, shifted, moved])?.squeeze_dim(0))
    }
}

/// Names of the five and of what HF PEFT stores of each: the outer factor, the inner one, a value, and
/// the zeros that stand for nothing.
const NAMES: [[&str; 4]; 5] = [
    ["glora_A.Xd", "glora_A.Xu", "glora_A.X", "glora_A.zeros"],
    ["glora_B.Xd", "glora_B.Xu", "glora_B.X", "glora_B.zeros"],
    ["glora_C.Xd", "glora_C.Xu", "glora_C.X", "glora_C.zeros"],
    ["glora_D.Xd", "glora_D.Xu", "glora_D.X", "glora_D.zeros"],
    ["glora_E.Xd", "glora_E.Xu", "glora_E.X", "glora_E.zeros"],
];

/// One of the five at a place: its form, and the shape `(rows, columns)` or `(rows,)` of HF PEFT's.
type Part = (GloraForm, Vec<usize>);

impl Glora {
    /// With this rank and targets, and HF PEFT's defaults for the rest.
    pub fn new(r: usize, targets: Targets) -> Self {
        Self { r, targets, ..Self::default() }
    }

    fn parts(&self, site: &Site) -> [Part; 5] {
        let (fan_in, out) = (site.fan_in(), site.fan_out());
        let beside = |form| if site.bias.is_some() { form } else { GloraForm::None };
        let (ab, c, de) = (self.config_A_B, beside(self.config_C), beside(self.config_D_E));
        let (matrix, column, vector) = (vec![out, fan_in], vec![fan_in, 1], vec![out]);
        [(ab, matrix.clone()), (ab, matrix), (c, column), (de, vector.clone()), (de, vector)]
    }

    fn adapter(&self, site: &Site, from: &mut impl Source) -> Result<GloraAdapter, Error> {
        let r = self.r;
        indexable(r, r.checked_mul(site.fan_in() + site.fan_out()), site)?;
        let mut factors = Vec::new();
        for ([xd, xu, x, _], (form, shape)) in NAMES.into_iter().zip(self.parts(site)) {
            factors.push(match (form, shape.as_slice()) {
                (GloraForm::Lora, [rows, columns]) => {
                    Some(Factor::thin(from.take(xd, [*rows, r])?, from.take(xu, [r, *columns])?))
                }
                (GloraForm::Vector, [rows, _]) => Some(Factor::whole(from.take(x, [*rows, 1])?)),
                (GloraForm::Vector, [n]) => {
                    Some(Factor::whole(from.take(x, [*n])?.unsqueeze_dim(1)))
                }
                (GloraForm::Constant, _) => Some(Factor::whole(from.take(x, [1])?.unsqueeze())),
                _ => None,
            });
        }
        if factors.iter().all(Option::is_none) {
            let reason =
                "config_A_B is none and the layer has no bias, which leaves nothing to train";
            return Err(Error::place(&site.path, reason));
        }
        let mut factors = factors.into_iter();
        let mut next = || factors.next().flatten();
        let (a, b, c, d, e) = (next(), next(), next(), next(), next());
        let w = c.as_ref().and_then(|_| site.matrix());
        Ok(GloraAdapter { a, b, c, d, e, w })
    }
}

impl Method for Glora {
    type Adapter = GloraAdapter;
    type Shared = ();
    const NAME: &'static str = "GLORA";
    const KINDS: &'static [Kind] = &[Kind::Linear];
    const ABSENT: &'static [(&'static str, &'static [&'static str])] = &[];

    fn weight_only(&self) -> bool {
        self.config_A_B == GloraForm::Lora
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn targets_mut(&mut self) -> &mut Targets {
        &mut self.targets
    }

    fn biases(&self) -> Biases {
        self.bias.biases()
    }

    fn check(&self) -> Result<(), Error> {
        positive("r", self.r)?;
        self.bias.check("glora_only")?;
        let reason = match (self.config_A_B, self.config_C, self.config_D_E) {
            (_, GloraForm::Constant, _) => {
                ("config_C", "expected lora, vector or none, found constant")
            }
            (_, _, GloraForm::Lora) => {
                ("config_D_E", "expected vector, constant or none, found lora")
            }
            (GloraForm::None, GloraForm::None, GloraForm::None) => {
                ("config_A_B", "is none, as all the others, which leaves nothing to train")
            }
            (_, _, GloraForm::Vector | GloraForm::Constant) if self.bias != Bias::None => {
                ("bias", "expected none, for config_D_E scales the bias; or set config_D_E to none")
            }
            _ => return Ok(()),
        };
        Err(Error::config(reason.0, reason.1))
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
    ) -> Result<GloraAdapter, Error> {
        let draw = |name: &str, shape: &[usize]| match shape {
            _ if name.ends_with(".Xu") => Draw::kaiming(shape),
            _ if self.init_weights => Draw::Zeros,
            [1] => Draw::Normal(0.02),
            [n] => Draw::kaiming(&[1, *n]),
            _ => Draw::kaiming(shape),
        };
        self.adapter(site, &mut Drawn { rng, device, draw })
    }

    fn fold(adapter: &GloraAdapter) -> Option<&dyn Fold> {
        Some(adapter)
    }

    fn samples(targets: &Targets) -> Vec<Self> {
        let plain = Self::new(3, targets.clone());
        let of = |ab, c, de| Self { config_A_B: ab, config_C: c, config_D_E: de, ..plain.clone() };
        vec![
            of(GloraForm::Vector, GloraForm::Lora, GloraForm::Vector),
            of(GloraForm::None, GloraForm::Lora, GloraForm::Vector),
            Self {
                init_weights: false,
                ..of(GloraForm::Constant, GloraForm::Vector, GloraForm::Vector)
            },
            Self {
                init_weights: false,
                ..of(GloraForm::Vector, GloraForm::None, GloraForm::Constant)
            },
            Self {
                bias: Bias::Only("glora_only".into()),
                ..of(GloraForm::Lora, GloraForm::Vector, GloraForm::None)
            },
            Self { bias: Bias::All, ..of(GloraForm::Vector, GloraForm::Lora, GloraForm::None) },
            plain,
        ]
    }

    fn parameters(&self, site: &Site) -> usize {
        let of = |(form, shape): Part| match form {
            GloraForm::Lora => self.r * shape.iter().sum::<usize>(),
            GloraForm::Vector => shape[0],
            GloraForm::Constant => 1,
            GloraForm::None => 0,
        };
        self.parts(site).into_iter().map(of).sum()
    }

    fn tensors(&self, site: &Site, adapter: &GloraAdapter) -> Vec<(&'static str, TensorData)> {
        let GloraAdapter { a, b, c, d, e, .. } = adapter;
        let mut tensors = Vec::new();
        let parts = NAMES.into_iter().zip(self.parts(site)).zip([a, b, c, d, e]);
        for (([xd, xu, x, zeros], (form, shape)), factor) in parts {
            match factor {
                None => tensors.push((zeros, TensorData::zeros::<f32, _>(shape))),
                Some(Factor { a: d, b: Some(u) }) => {
                    tensors.extend([(xd, d.val().into_data()), (xu, u.val().into_data())]);
                }
                Some(Factor { a, b: None }) => {
                    let flat = form == GloraForm::Constant || shape.len() == 1;
                    let value = a.val();
                    let data =
                        if flat { value.flatten::<1>(0, 1).into_data() } else { value.into_data() };
                    tensors.push((x, data));
                }
            }
        }
        tensors
    }

    fn restore(
        &self,
        site: &Site,
        _shared: &(),
        file: &mut PlaceTensors<'_>,
        device: &Device,
    ) -> Result<GloraAdapter, Error> {
        for ([.., zeros], (form, shape)) in NAMES.into_iter().zip(self.parts(site)) {
            match shape.as_slice() {
                _ if form != GloraForm::None || !file.has(zeros) => {}
                [rows, columns] => drop(file.take(zeros, [*rows, *columns], device)?),
                _ => drop(file.take(zeros, [shape[0]], device)?),
            }
        }
        self.adapter(site, &mut Read { file, device })
    }
}
