"""Writes ../fixtures/hidden: adapters over hidden states, with the numbers of AdapterHub's `adapters`.

python interop/hidden.py        (with interop/requirements-hidden.txt installed, in an environment of its own)

The adapters are built and run by `adapters`; their tensors are written in this library's layout. PASTA, which `adapters`
does not have, is its formula in hooks.
"""

import json
import shutil
from pathlib import Path

import adapters
import torch
from adapters import AdapterPlusConfig, CompacterConfig, CompacterPlusPlusConfig, DiReftConfig, DoubleSeqBnConfig
from adapters import LoReftConfig, NoReftConfig, ParBnConfig, SeqBnConfig
from adapters.methods.modeling import Adapter, PHMLayer
from adapters.methods.reft import ReftModule
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
KINDS = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
PLACES = {
    "bert": {
        "sublayers": ["attention.output", "output"],
        "mlps": r".*layer\.\d+\.output",
        "blocks": r".*layer\.\d+",
        "streams": r".*(embeddings|layer\.0)",
    },
    "llama": {
        "sublayers": ["mlp", "self_attn"],
        "mlps": ["mlp"],
        "blocks": r".*layers\.\d+",
        "streams": r".*layers\.0",
    },
}
BOTTLENECK = dict(peft_type="BOTTLENECK", reduction_factor=16.0, non_linearity="relu", is_parallel=False, original_ln_before=False,
                  ln_before=False, scaling=1.0, init_weights="bert", dropout=0.0, stochastic_depth=0.0)
COMPACTER = dict(peft_type="COMPACTER", reduction_factor=32.0, non_linearity="gelu", original_ln_before=False, phm_dim=4, phm_rank=1,
                 shared_phm_rule=True, factorized_phm_W=True, phm_init_range=1e-4)
REFT = dict(peft_type="REFT", r=1, prefix_positions=3, suffix_positions=0, orthogonality=True, subtract_projection=True,
            tied_weights=False, non_linearity=None, dropout=0.05)

# name: (configuration of `adapters`, our defaults, places, models)
CASES = {
    "houlsby": (DoubleSeqBnConfig(reduction_factor=4.0), BOTTLENECK, "sublayers", KINDS),
    "pfeiffer": (SeqBnConfig(reduction_factor=2.5, scaling="learned"), BOTTLENECK, "mlps", KINDS),
    "parallel": (ParBnConfig(reduction_factor=3.0), BOTTLENECK, "mlps", KINDS),
    "own-norm": (DoubleSeqBnConfig(reduction_factor=0.5, ln_before=True, scaling="channel", non_linearity="gelu_new"),
                 BOTTLENECK, "sublayers", KINDS),
    "adapter-plus": (AdapterPlusConfig(reduction_factor=6.0, stochastic_depth=0.0), BOTTLENECK, "mlps", ["llama"]),
    "compacter": (CompacterConfig(reduction_factor=4.0), COMPACTER, "sublayers", KINDS),
    "compacter-plus": (CompacterPlusPlusConfig(reduction_factor=4.0, phm_dim=2, phm_rank=3), COMPACTER, "mlps", KINDS),
    "phm": (CompacterConfig(reduction_factor=8.0, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False), COMPACTER, "sublayers",
            KINDS),
    "loreft": (LoReftConfig(r=3, prefix_positions=2, suffix_positions=1), REFT, "blocks", KINDS),
    "noreft": (NoReftConfig(r=2, suffix_positions=2, tied_weights=True, non_linearity="tanh"), REFT, "blocks", KINDS),
    "direft": (DiReftConfig(r=2, prefix_positions=4), REFT, "blocks", KINDS),
}


def base(model):
    return KINDS[model].from_pretrained(ROOT / "models" / model, dtype=torch.float32).eval()


def inputs(model):
    return tiny.inputs(types=True) if model == "bert" else tiny.inputs(left=True)


def place(name):
    """The path of the state that the module `name` of `adapters` changes."""
    for theirs, ours in [(".attention_adapters", ".self_attn"), (".output_adapters", ".mlp"), (".reft_layer", "")]:
        name = name.replace(theirs, ours)
    return name.split(".adapters.")[0].split(".refts.")[0]


def linear(name, layer):
    if isinstance(layer, PHMLayer):
        parts = ["W_left", "W_right", "b"] if layer.factorized_phm_W else ["W", "b"]
        parts += [] if layer.shared_phm_rule else ["phm_rule"]
        return {f"{name}.{part}": getattr(layer, part) for part in parts}
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def tensors_of(module):
    if isinstance(module, Adapter):
        norm = {}
        if module.add_layer_norm_before:
            norm = linear("adapter_norm_before", module.adapter_norm_before)
        scaling = {"scaling": module.scaling} if isinstance(module.scaling, torch.nn.Parameter) else {}
        return linear("adapter_down", module.adapter_down[-2]) | linear("adapter_up", module.adapter_up) | norm | scaling
    used = [module.prefix_positions > 0 or module.tied_weights, module.suffix_positions > 0]
    return {
        f"units.{i}.{name}": tensor
        for i, (unit, there) in enumerate(zip(module.units, used)) if there
        for name, tensor in [("projection.weight", unit.projection.weight), ("learned_source.weight", unit.learned_source.weight),
                             ("learned_source.bias", unit.learned_source.bias)]
    }


def write(name, model, config, tensors, logits):
    folder = ROOT / "hidden" / f"{name}-{model}"
    folder.mkdir(parents=True)
    own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = config | {"base_model_name_or_path": f"../../models/{model}", "inference_mode": True, "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({"logits": logits.contiguous()}, folder / "golden.safetensors")


@torch.no_grad()
def case(name, theirs, defaults, places, model):
    net = base(model)
    adapters.init(net)
    torch.manual_seed(6)
    net.add_adapter("own", config=theirs)
    net.set_active_adapters("own")
    net.eval()
    generator = torch.Generator().manual_seed(7)
    fresh = base(model).state_dict()
    trained = [(n, p) for n, p in sorted(net.named_parameters()) if n not in fresh and "parametrizations" not in n]
    for _, parameter in trained:
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    config = {key: getattr(theirs, key, value) for key, value in defaults.items()} | {"target_modules": PLACES[model][places]}
    tensors = {
        f"base_model.model.{place(path)}.{part}": tensor
        for path, module in net.named_modules() if isinstance(module, (Adapter, ReftModule))
        for part, tensor in tensors_of(module).items()
    }
    if config.get("shared_phm_rule"):
        tensors["base_model.phm_rule"] = net.base_model.shared_parameters["own"]["phm_rule"]
    write(name, model, config, tensors, net(**inputs(model)).logits)
    if defaults is not REFT and not config.get("ln_before") and theirs.original_ln_after:
        folder = ROOT / "hidden" / f"{name}-{model}" / "adapterhub"
        net.save_adapter(str(folder), "own", with_head=False, use_safetensors=True)
        path = folder / "adapter_config.json"
        said = json.loads(path.read_text()) | {"model_name": f"../../../models/{model}"}
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def pasta(model):
    net, given = base(model), inputs(model)
    net_tokens = given["input_ids"]
    ids = sorted({int(net_tokens[0, 1]), int(net_tokens[1, 4]), 0})
    generator = torch.Generator().manual_seed(8)
    where = {"bert": ["bert.embeddings", "bert.encoder.layer.0"], "llama": ["model.layers.0"]}[model]
    tensors = {}
    for path in where:
        vectors = torch.randn((len(ids), 32), generator=generator)
        tensors[f"base_model.model.{path}.pasta_vectors"] = vectors

        def add(_module, _inputs, output, vectors=vectors):
            state = output[0] if isinstance(output, tuple) else output
            for vector, token in zip(vectors, ids):
                state[net_tokens == token] += vector
            return output

        net.get_submodule(path).register_forward_hook(add)
    config = dict(peft_type="PASTA", special_tokens=ids, target_modules=PLACES[model]["streams"])
    write("pasta", model, config, tensors, net(**given).logits)


if __name__ == "__main__":
    shutil.rmtree(ROOT / "hidden", ignore_errors=True)
    for name, (theirs, defaults, places, models) in CASES.items():
        for model in models:
            case(name, theirs, defaults, places, model)
    for model in KINDS:
        pasta(model)
