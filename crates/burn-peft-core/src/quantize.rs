//! A quantized base: most of a model's numbers in a few bits, and adapters over it as over any other.

use crate::Kind;
use crate::site::kind_of;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use burn::tensor::quantization::QuantScheme;

/// `model` with the weight `[in, out]` of every linear layer rounded to `scheme`, each range from its least to
/// its greatest number; all else stays as it is.
///
/// What QLoRA does (arXiv 2305.14314), with Burn's schemes: the base is held in few bits, what lies over it is
/// trained in floats. An adapter over it is what it is over the numbers that are left, and
/// [`merge`](crate::merge) gives floats. What a forward pass costs depends on the backend's product
/// over packed numbers; nothing of it was measured. Methods whose difference
/// is as large as the weight ([`weight_only`](crate::Method::weight_only)) hold that one in floats.
pub fn quantize<M: Module>(model: M, scheme: &QuantScheme) -> M {
    model.map(&mut Linears { scheme, owners: Vec::new() })
}

struct Linears<'a> {
    scheme: &'a QuantScheme,
    owners: Vec<String>,
}

impl ModuleMapper for Linears<'_> {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.owners.push(container_type.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.owners.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.owners.last().and_then(|owner| kind_of(owner, D)) {
            Some(Kind::Linear) => param.map(|weight| weight.quantize_dynamic(self.scheme)),
            _ => param,
        }
    }
}
