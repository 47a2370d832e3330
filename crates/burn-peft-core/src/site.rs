//! Places of a model: found by one visitor, named as the Hugging Face checkpoint names them.

use crate::widened::is_half;
use crate::{HiddenPlace, MaskPlace, widened};
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor};
use std::any::Any;
use std::collections::BTreeMap;

/// What stands at a place. The kinds are closed; methods and models are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `y = xW + b`, weight `[in, out]`.
    Linear,
    /// Rows of a table, weight `[vocabulary, dim]`.
    Embedding,
    /// Weight `[out, in / groups, kernel]`.
    Conv1d,
    /// Weight `[out, in / groups, height, width]`.
    Conv2d,
    /// A scale and a shift over the last axis, weight `[dim]`.
    Norm,
    /// What a sublayer or a block gives on, `[batch, seq, hidden]`: no layer, and no weight but zeros
    /// `[hidden]` that say how wide it is.
    Hidden,
    /// Queries that read keys and values; it has no parameters beside those of its layers. The weight is
    /// its key layer's: `[hidden, width of keys and values]`.
    Attention,
    /// The blocks of a model, one after the other: a list of modules whose states are places. No layer, and no weight but
    /// zeros `[blocks, hidden]` that say how many there are, and how wide.
    Blocks,
}

/// A parameter of any rank; a handle, so that cloning it copies nothing.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum Value {
    D1(Tensor<1>),
    D2(Tensor<2>),
    D3(Tensor<3>),
    D4(Tensor<4>),
}

impl Value {
    /// Wraps a tensor of rank 1 to 4.
    pub fn new<const D: usize>(tensor: Tensor<D>) -> Option<Self> {
        // By its type: `reshape` copies what lies transposed, as the weights of linear layers do.
        let any: &dyn Any = &tensor;
        let one = any.downcast_ref().cloned().map(Self::D1);
        let two = || any.downcast_ref().cloned().map(Self::D2);
        let three = || any.downcast_ref().cloned().map(Self::D3);
        let four = || any.downcast_ref().cloned().map(Self::D4);
        one.or_else(two).or_else(three).or_else(four)
    }

    /// The sizes of all axes.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::D1(t) => t.dims().to_vec(),
            Self::D2(t) => t.dims().to_vec(),
            Self::D3(t) => t.dims().to_vec(),
            Self::D4(t) => t.dims().to_vec(),
        }
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        match self {
            Self::D1(t) => t.device(),
            Self::D2(t) => t.device(),
            Self::D3(t) => t.device(),
            Self::D4(t) => t.device(),
        }
    }
}

/// Reads a weight of any rank as the matrix `[fan_in, fan_out]` that folding works on.
///
/// Linear and embedding weights are that already; a convolution `[out, in, ..kernel]` is
/// flattened to `[out, in · kernel]` and transposed, so that a low-rank pair reads the same everywhere.
pub fn as_matrix<const D: usize>(weight: Tensor<D>) -> Tensor<2> {
    let dims = weight.dims();
    if D == 2 {
        return weight.reshape([dims[0], dims[1]]);
    }
    let out = dims[0];
    weight.reshape([out, dims[1..].iter().product()]).transpose()
}

/// The inverse of [`as_matrix`]: back to the shape that the parameter has.
pub fn from_matrix<const D: usize>(matrix: Tensor<2>, shape: [usize; D]) -> Tensor<D> {
    if D == 2 { matrix.reshape(shape) } else { matrix.transpose().reshape(shape) }
}

/// One place of a model that an adapter can be laid over.
#[derive(Debug, Clone)]
pub struct Site {
    /// Dotted path as in the Hugging Face checkpoint, such as `encoder.layer.0.attention.self.query`.
    pub path: String,
    /// What stands here.
    pub kind: Kind,
    /// The weight, a handle on the base model's own; a vector in half precision is [`widened`].
    pub weight: Value,
    /// The bias, where there is one, likewise.
    pub bias: Option<Tensor<1>>,
    /// Of a table of words, what the model says of its `[MASK]`.
    pub mask: Option<MaskPlace>,
}

impl Site {
    /// Number of inputs: rows of the weight read as a matrix.
    pub fn fan_in(&self) -> usize {
        match self.weight.shape().as_slice() {
            [dim] => *dim,
            [fan_in, _] => *fan_in,
            [_, rest @ ..] => rest.iter().product(),
            [] => 0,
        }
    }

    /// Number of outputs: columns of the weight read as a matrix.
    pub fn fan_out(&self) -> usize {
        match self.weight.shape().as_slice() {
            [dim] => *dim,
            [_, fan_out] => *fan_out,
            [out, ..] => *out,
            [] => 0,
        }
    }

    /// The weight as a matrix `[fan_in, fan_out]`, [`widened`], which is a copy of one that is quantized or in half
    /// precision; `None` where it is a vector.
    pub fn matrix(&self) -> Option<Tensor<2>> {
        match &self.weight {
            Value::D1(_) => None,
            Value::D2(t) => Some(widened(t.clone())),
            Value::D3(t) => Some(as_matrix(widened(t.clone()))),
            Value::D4(t) => Some(as_matrix(widened(t.clone()))),
        }
    }

    /// These rows of the weight as a matrix, [`widened`], of which no more is copied where it is in half precision; `None`
    /// where it is a vector.
    pub fn rows(&self, rows: Tensor<1, Int>) -> Option<Tensor<2>> {
        match &self.weight {
            Value::D2(t) if is_half(t.dtype()) => Some(widened(t.clone().select(0, rows))),
            _ => Some(self.matrix()?.select(0, rows)),
        }
    }

    /// The device on which the base lives.
    pub fn device(&self) -> Device {
        self.weight.device()
    }
}

/// The name that a module component has in a Hugging Face checkpoint.
///
/// A trailing underscore stands for a Rust keyword (`self_` for `self`); a norm's `gamma` and
/// `beta` are `weight` and `bias` there.
pub fn hf_component(component: &str) -> &str {
    match component {
        "gamma" => "weight",
        "beta" => "bias",
        other => other.strip_suffix('_').unwrap_or(other),
    }
}

/// A whole path of Burn's components in the checkpoint's words.
pub fn hf_path<S: AsRef<str>>(components: &[S]) -> String {
    let mut path = String::new();
    for component in components {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(hf_component(component.as_ref()));
    }
    path
}

/// All places of a model, in the order in which it declares them.
#[derive(Debug, Clone, Default)]
pub struct Sites {
    /// The places with parameters of their own.
    pub all: Vec<Site>,
    /// The places without: attentions and lists of blocks.
    pub between: Vec<Site>,
    /// Path of the layer that makes the model's output; "all-linear" leaves it out, as HF PEFT does.
    pub output: Option<String>,
    /// Parameters of the whole model, trained or not.
    pub parameters: usize,
}

impl Sites {
    /// Finds every place of `model` and marks the output layer, if the model names one.
    pub fn of<M: Module>(model: &M, output: Option<&str>) -> Self {
        let mut finder = Finder::default();
        model.visit(&mut finder);
        let weights = finder.found.values().find_map(|found| found.weight.as_ref());
        let device = weights.map(Value::device);
        let mut sites = Self {
            all: Vec::new(),
            between: Vec::new(),
            output: output.map(str::to_owned),
            parameters: model.num_params(),
        };
        for path in finder.order {
            let Some(found) = finder.found.remove(&path) else {
                continue;
            };
            if let (Some(width), Some(device)) = (found.hidden, &device) {
                let weight = Value::D1(Tensor::zeros([width], device));
                sites.all.push(Site { path, kind: Kind::Hidden, weight, bias: None, mask: None });
                continue;
            }
            let (Some(kind), Some(weight)) = (found.kind, found.weight) else {
                continue;
            };
            sites.all.push(Site { path, kind, weight, bias: found.bias, mask: None });
        }
        for (parent, names) in finder.masks {
            let beside = |site: &&mut Site| {
                let (above, _) = site.path.rsplit_once('.').unwrap_or(("", &site.path));
                site.kind == Kind::Embedding && above == parent
            };
            if let Some(words) = sites.all.iter_mut().find(beside) {
                words.mask = Some(MaskPlace::of(names));
            }
        }
        for (path, [count, width]) in finder.blocks {
            if let Some(device) = &device {
                let weight = Value::D2(Tensor::zeros([count, width], device));
                sites.between.push(Site {
                    path,
                    kind: Kind::Blocks,
                    weight,
                    bias: None,
                    mask: None,
                });
            }
        }
        for path in finder.attentions {
            // By the name of the layer that makes the keys, in the checkpoints of today's models.
            let key = KEYS.iter().find_map(|name| sites.get(&format!("{path}.{name}")));
            if let Some(weight) = key.map(|key| key.weight.clone()) {
                sites.between.push(Site {
                    path,
                    kind: Kind::Attention,
                    weight,
                    bias: None,
                    mask: None,
                });
            }
        }
        sites
    }

    /// The place at `path`.
    pub fn get(&self, path: &str) -> Option<&Site> {
        self.places().find(|site| site.path == path)
    }

    /// Every place, those with parameters first.
    pub fn places(&self) -> impl Iterator<Item = &Site> {
        self.all.iter().chain(&self.between)
    }
}

#[derive(Default)]
struct Found {
    /// Width of the states, where it is a place for them.
    hidden: Option<usize>,
    kind: Option<Kind>,
    weight: Option<Value>,
    bias: Option<Tensor<1>>,
}

/// Names of an attention's layer for keys.
const KEYS: &[&str] = &["key", "k_proj", "k"];

#[derive(Default)]
struct Finder {
    stack: Vec<(String, String)>,
    order: Vec<String>,
    attentions: Vec<String>,
    /// Of each list of blocks how many there are and how wide their states.
    blocks: BTreeMap<String, [usize; 2]>,
    /// The names of each mark of a `[MASK]`, by the module that holds it.
    masks: BTreeMap<String, Vec<String>>,
    found: BTreeMap<String, Found>,
}

/// What a parameter of that rank is the weight of, by the type of the module that holds it.
pub(crate) fn kind_of(owner: &str, rank: usize) -> Option<Kind> {
    match (owner.strip_prefix("Struct:").unwrap_or(owner), rank) {
        ("Linear", 2) => Some(Kind::Linear),
        ("Embedding", 2) => Some(Kind::Embedding),
        ("Conv1d", 3) => Some(Kind::Conv1d),
        ("Conv2d", 4) => Some(Kind::Conv2d),
        (name, 1) if name.ends_with("Norm") => Some(Kind::Norm),
        _ => None,
    }
}

impl ModuleVisitor for Finder {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == HiddenPlace::MARK {
            // The mark stands in a field of the module whose states it is about.
            let parents = self.stack.split_last().map_or(&[][..], |(_, parents)| parents);
            let names: Vec<&str> = parents.iter().map(|(name, _)| name.as_str()).collect();
            let path = hf_path(&names);
            self.found.entry(path.clone()).or_default().hidden = name.parse().ok();
            self.order.push(path);
            if let ([.., (_, list)], [list_names @ .., _]) = (parents, names.as_slice())
                && list == "Vec"
                && let Ok(width) = name.parse()
            {
                self.blocks.entry(hf_path(list_names)).or_insert([0, width])[0] += 1;
            }
        }
        if container_type == MaskPlace::MARK {
            let parents = self.stack.split_last().map_or(&[][..], |(_, parents)| parents);
            let names: Vec<&str> = parents.iter().map(|(name, _)| name.as_str()).collect();
            self.masks.entry(hf_path(&names)).or_default().push(name.to_owned());
        }
        if container_type.ends_with("Attention") {
            let names: Vec<&str> = self.stack.iter().map(|(name, _)| name.as_str()).collect();
            let path = hf_path(&names);
            if !self.attentions.contains(&path) {
                self.attentions.push(path);
            }
        }
        self.stack.push((name.to_owned(), container_type.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(((name, owner), parents)) = self.stack.split_last() else {
            return;
        };
        let names: Vec<&str> = parents.iter().map(|(name, _)| name.as_str()).collect();
        let path = hf_path(&names);
        let entry = self.found.entry(path.clone()).or_insert_with(|| {
            self.order.push(path);
            Found::default()
        });
        match hf_component(name) {
            "weight" => {
                entry.kind = kind_of(owner, D);
                let weight = param.base();
                entry.weight = Value::new(if D == 1 { widened(weight) } else { weight });
            }
            "bias" if D == 1 => {
                if let Some(Value::D1(bias)) = Value::new(widened(param.base())) {
                    entry.bias = Some(bias);
                }
            }
            _ => {}
        }
    }
}
