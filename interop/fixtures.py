"""Writes ../fixtures: what transformers and HF PEFT compute, for the tests to compare with.

python interop/fixtures.py        (with interop/requirements.txt installed)
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

import arrow
import combine
import data_inits
import in_front
import methods
import routed
import selective
import seq2seq
import tiny
import vision

ROOT = Path(__file__).resolve().parent.parent / "fixtures"


def golden(folder, tensors):
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "golden.safetensors")


def write_model(name, model, inputs, dtype=None, **options):
    folder = ROOT / "models" / name
    if dtype:
        model = model.to(dtype)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Read again: casting a model casts its rotary frequencies too.
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    tensors = dict(inputs) | {"logits": output.logits}
    if hasattr(model, "bert"):
        hidden, mask = output.hidden_states[-1], inputs["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        tensors["embedding"] = nn.functional.normalize(mean, dim=-1)
    else:
        prompt = torch.tensor([[1, 17, 33, 5]])
        grown = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        tensors |= {"prompt": prompt, "generated": grown[:, prompt.shape[1]:]}
    golden(folder, tensors)
    return model


def models():
    write_model("bert", tiny.bert(), tiny.inputs(types=True))
    write_model("bert-mlm", tiny.bert_mlm(), tiny.inputs(types=True))
    write_model("llama", tiny.llama(), tiny.inputs(left=True))
    llama3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    write_model("llama-tied-llama3-bf16", tiny.llama(tie_word_embeddings=True, rope_parameters=llama3),
                tiny.inputs(), torch.bfloat16)
    for name in ["bert", "bert-mlm"]:
        tiny.tokenizer(ROOT / "models" / name, mask=True)
    tiny.tokenizer(ROOT / "models" / "llama")
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    write_model("llama-linear-sharded-f16", tiny.llama(num_key_value_heads=4, rope_parameters=linear,
                attention_bias=True, mlp_bias=True), tiny.inputs(), torch.float16, max_shard_size="20KB")


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.conv2 = nn.Conv1d(6, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = torch.relu(self.conv1(x))
        h = torch.relu(self.conv2(h.flatten(2)))
        return self.head(h.mean(2))



ADAPTERS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.1),
    "rslora-regex": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=r".*attention\.self\.(query|key)"),
    "bias-all": dict(r=2, target_modules=["query"], bias="all"),
    "bias-lora-only": dict(r=2, target_modules=["query", "dense"], bias="lora_only"),
    "lora-bias": dict(r=2, target_modules=["query"], lora_bias=True),
    "all-linear-patterns": dict(r=3, target_modules="all-linear", exclude_modules=["pooler.dense"],
                                rank_pattern={"query": 2, r"layer\.1\..*\.value": 5}, alpha_pattern={"key": 9}),
    "embedding-blocks": dict(r=3, target_modules=["word_embeddings", "query"], modules_to_save=["pooler.dense"]),
    "one-block": dict(r=4, target_modules=["value", "intermediate.dense"], layers_to_transform=[1],
                      layers_pattern="layer"),
    "dora": dict(r=4, lora_alpha=6, use_dora=True, target_modules=["query", "intermediate.dense"]),
    "dora-words": dict(r=3, lora_alpha=6, use_dora=True, target_modules=["word_embeddings", "output.dense"], use_rslora=True,
                       bias="lora_only"),
}
TRAINED = ["lora_", "modules_to_save", ".bias"]


def adapters():
    inputs = tiny.inputs(types=True)
    for name, options in ADAPTERS.items():
        model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", **options))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        write_adapter(name, model, {"logits": model(**inputs).logits}, "../../models/bert")
    llama = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    tiny.randomize(llama, ["lora_"])
    inputs = tiny.inputs(left=True)
    write_adapter("llama-all-linear", llama, {"logits": llama(**inputs).logits}, "../../models/llama")


def convolutions():
    for name, config in methods.convolutions():
        torch.manual_seed(2)
        base = Cnn().eval()
        x = torch.randn(2, 3, 8, 8)
        weights = {f"base.{n}": p.clone() for n, p in base.named_parameters()}
        before = base(x)
        model = get_peft_model(base, config).eval()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        # Merged: HF PEFT's OFT adds up overlapping patches of the input before it is, and is no identity then
        # even when fresh; all others give the same numbers both ways.
        merged = copy.deepcopy(model).merge_and_unload()
        write_adapter(name, model, weights | {"x": x, "before": before, "logits": merged(x)}, None, "convolutions")


def other_methods():
    for name, config, base, std in methods.configurations():
        torch.manual_seed(4)
        model = get_peft_model({"bert": tiny.bert, "llama": tiny.llama}[base](), config)
        trained = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        tiny.randomize(model, trained, std)
        inputs = tiny.inputs(types=True) if base == "bert" else tiny.inputs(left=True)
        write_adapter(name, model, {"logits": model(**inputs).logits}, f"../../models/{base}", "methods")


def prompts():
    """What stands in front of a sequence: its logits, its texts, and the networks that HF PEFT leaves out of its files."""
    for name, config, base in methods.prompts(ROOT / "models"):
        torch.manual_seed(4)
        model = get_peft_model({"bert": tiny.bert, "llama": tiny.llama}[base](), config)
        drawn = {}
        if "-text" in name:
            drawn["begins"] = model.prompt_encoder["default"].embedding.weight.clone()
        trained = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        tiny.randomize(model, trained, 0.5)
        inputs = tiny.inputs(types=True) if base == "bert" else tiny.inputs(left=True)
        logits = model(**inputs).logits
        if base == "llama":
            logits = logits[:, -inputs["input_ids"].shape[1]:]  # those of virtual tokens stand before
            start = torch.tensor([[1, 17, 33, 5]])
            grown = model.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=12,
                                   do_sample=False, eos_token_id=None, pad_token_id=0)
            drawn |= {"prompt": start, "generated": grown[:, start.shape[1]:]}
        encoders = getattr(model, "prompt_encoder", {})
        for part, tensor in (encoders["default"].state_dict() if "default" in encoders else {}).items():
            drawn[f"encoder.{part}"] = tensor
        if getattr(config, "tokenizer_name_or_path", None):
            config.tokenizer_name_or_path = f"../../models/{base}"
        write_adapter(name, model, drawn | {"logits": logits}, f"../../models/{base}", "methods")


def add_psofts_factors(model, path):
    """HF PEFT leaves out PSOFT's frozen factors, whose signs are the SVD library's; ours are in the file."""
    factors = {}
    for name, module in model.named_modules():
        if len(getattr(module, "_psoft_A_cache", {})):
            factors[f"{name}.psoft_A"] = module._psoft_A_cache["default"].contiguous()
            factors[f"{name}.psoft_B"] = module._psoft_B_cache["default"].contiguous()
    if factors:
        save_file(load_file(path) | factors, path, metadata={"format": "pt"})


def write_adapter(name, model, tensors, base, kind="adapters"):
    folder = ROOT / kind / name
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    add_psofts_factors(model, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for names in [config.get("target_modules"), config.get("feedforward_modules")]:
        if isinstance(names, list):
            names.sort()  # written out of a set
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    golden(folder, tensors)


def targets():
    """HF PEFT's own answers to which paths a configuration reaches."""
    paths = [n for n, m in tiny.bert().named_modules() if isinstance(m, nn.Linear)]
    paths += [n for n, m in tiny.llama().named_modules() if isinstance(m, nn.Linear)]
    cases = [
        dict(target_modules=["query"]), dict(target_modules=["query", "v_proj"]),
        dict(target_modules=["uery"]), dict(target_modules=["attention.self.query"]),
        dict(target_modules=["bert.encoder.layer.1.output.dense"]), dict(target_modules=["dense"]),
        dict(target_modules=r".*\.(query|value)"), dict(target_modules=r"query"),
        dict(target_modules=r".*layers\.1.*proj"), dict(target_modules=r".*(?<!output)\.dense"),
        dict(target_modules=["dense"], exclude_modules=["pooler.dense"]),
        dict(target_modules=["dense"], exclude_modules=r".*layer\.0.*"),
        dict(target_modules=["q_proj"], layers_to_transform=1),
        dict(target_modules=["q_proj", "query"], layers_to_transform=[0]),
        dict(target_modules=["q_proj", "query"], layers_to_transform=[1], layers_pattern="layers"),
        dict(target_modules=["q_proj", "query"], layers_to_transform=[1], layers_pattern=["layer", "layers"]),
        dict(target_modules=["q_proj", "query"], layers_to_transform=[7]),
    ]
    found = []
    for case in cases:
        config = LoraConfig(**case)
        found.append({"config": case, "paths": [p for p in paths if check_target_module_exists(config, p)]})
    (ROOT / "targets.json").write_text(json.dumps({"paths": paths, "cases": found}, indent=1) + "\n")


def lora_fa():
    """What HF PEFT's LoRA-FA optimizer makes of given gradients, in f32 and with Adam's epsilon at 0."""
    from peft.optimizers import create_lorafa_optimizer, lorafa

    lorafa.is_bf16_available = lambda: False  # it would round the corrected gradient to bf16
    torch.manual_seed(3)
    r, alpha, lr = 3, 6, 0.05
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b, std=0.3)
    found = {"a": a.tolist(), "b": b.tolist(), "scaling": layer.scaling["default"], "lr": lr}
    optimizer = create_lorafa_optimizer(model, r=r, lora_alpha=alpha, lr=lr)
    for group in optimizer.param_groups:
        group["eps"] = 0.0
    steps = []
    for _ in range(5):
        b.grad = torch.randn_like(b)
        gradient = b.grad.tolist()
        optimizer.step()
        steps.append({"gradient": gradient, "b": b.tolist()})
    (ROOT / "lora_fa.json").write_text(json.dumps(found | {"steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    ROOT.mkdir(exist_ok=True)
    for old in ROOT.iterdir():
        if old.name != "hidden":  # hidden.py's
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    models()
    adapters()
    convolutions()
    other_methods()
    prompts()
    in_front.write()
    routed.write()
    data_inits.write(ROOT, golden)
    combine.write(ROOT)
    arrow.write(ROOT)
    selective.write(ROOT)
    vision.write(ROOT, golden, write_adapter)
    seq2seq.write(ROOT, golden, write_adapter)
    targets()
    lora_fa()
