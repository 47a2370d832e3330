"""Writes those of ../fixtures/hidden that no other library has: the papers' formulas in hooks, over `transformers`' models.

python interop/hidden_formulas.py        (with interop/requirements.txt installed; after hidden.py, which empties the folder)
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, linear, relu
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
KINDS = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
BOTTLENECK = dict(reduction_factor=4.0, non_linearity="relu", is_parallel=False, original_ln_before=False, ln_before=False,
                  scaling=1.0, init_weights="bert", dropout=0.0, stochastic_depth=0.0)
HIDDEN, EPSILON = 32, 1e-5


def base(model):
    return KINDS[model].from_pretrained(ROOT / "models" / model, dtype=torch.float32).eval()


def inputs(model):
    return tiny.inputs(types=True) if model == "bert" else tiny.inputs(left=True)


def seen(model):
    """Who sees whom, [batch, seq, seq]."""
    kept = inputs(model)["attention_mask"].bool()
    pairs = kept[:, None, :].expand(-1, kept.shape[1], -1)
    return pairs if model == "bert" else pairs.tril()


class Place:
    """A place, with the stream `x` that the sublayer reads and the norm over the sum, where there is one."""

    def __init__(self, net, model, layer, kind):
        self.norm = lambda h: h
        if model == "bert":
            block = net.bert.encoder.layer[layer]
            module = block.attention.output if kind == "attention" else block.output
            self.path = f"bert.encoder.layer.{layer}." + ("attention.output" if kind == "attention" else "output")
            module.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[1]))
            self.norm, self.module = module.LayerNorm, module.dense
        else:
            block = net.model.layers[layer]
            before = block.input_layernorm if kind == "attention" else block.post_attention_layernorm
            before.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0]))
            name = "self_attn" if kind == "attention" else "mlp"
            self.path, self.module = f"model.layers.{layer}.{name}", getattr(block, name)

    def add(self, difference):
        def hook(_module, _inputs, output):
            if isinstance(output, tuple):
                return (output[0] + difference(self.x, output[0]), *output[1:])
            return output + difference(self.x, output)

        self.module.register_forward_hook(hook)


def places(net, model, kinds, layers=(0, 1)):
    return [Place(net, model, layer, kind) for layer in layers for kind in kinds]


class Draw:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(9)

    def __call__(self, *shape):
        return 0.3 * torch.randn(shape, generator=self.generator)


def tiny_attention(net, model, draw):
    heads, d, sees = 2, 3, seen(model)
    tensors = {}
    for place in places(net, model, ["attention"]):
        qkv, bias, out, last = draw(3 * heads * d, HIDDEN), draw(heads * d), draw(HIDDEN, heads * d), draw(HIDDEN)
        scale, shift = draw(HIDDEN), draw(HIDDEN)

        def difference(x, y, place=place, qkv=qkv, bias=bias, out=out, last=last, scale=scale, shift=shift):
            n = layer_norm(place.norm(x + y), [HIDDEN], scale, shift, EPSILON)
            total = last.clone()
            for m in range(heads):
                own = slice(m * d, (m + 1) * d)
                q, k, v = (linear(n, part[own]) for part in qkv.chunk(3))
                scores = (q + bias[own]) @ k.transpose(1, 2) / d**0.5
                weights = scores.masked_fill(~sees, -1e9).softmax(-1)
                total = total + linear(weights @ v, out[:, own]) / heads
            return total

        place.add(difference)
        tensors |= {f"{place.path}.{name}": tensor for name, tensor in [
            ("tiny_qkv.weight", qkv), ("tiny_q.bias", bias), ("tiny_out.weight", out), ("tiny_out.bias", last),
            ("tiny_norm.weight", scale), ("tiny_norm.bias", shift)]}
    config = dict(peft_type="TINY_ATTENTION", heads=heads, head_dim=d, original_ln_before=True)
    return config, tensors, ["attention.output"] if model == "bert" else ["self_attn"]


def convpass(net, model, draw):
    r, s, sees = 3, 0.5, seen(model)
    tensors = {}
    for place in places(net, model, ["attention", "mlp"]):
        down, d, up, u, conv, b = draw(r, HIDDEN), draw(r), draw(HIDDEN, r), draw(HIDDEN), draw(3, r, r), draw(r)

        def difference(x, _y, down=down, d=d, up=up, u=u, conv=conv, b=b):
            z = gelu(linear(x, down, d))
            mixed = z + b
            for i in range(x.shape[1]):
                for tap, j in enumerate([i - 1, i, i + 1]):
                    if 0 <= j < x.shape[1]:
                        there = 1.0 if i == j else sees[:, i, j, None].float()
                        mixed[:, i] = mixed[:, i] + there * (z[:, j] @ conv[tap])
            return s * linear(gelu(mixed), up, u)

        place.add(difference)
        tensors |= {f"{place.path}.{name}": tensor for name, tensor in [
            ("adapter_down.weight", down), ("adapter_down.bias", d), ("adapter_up.weight", up), ("adapter_up.bias", u),
            ("adapter_conv.weight", conv), ("adapter_conv.bias", b)]}
    config = dict(peft_type="CONVPASS", r=r, non_linearity="gelu", scaling=s, image=False)
    return config, tensors, ["attention.output", "output"] if model == "bert" else ["self_attn", "mlp"]


def sparse_adapter(net, model, draw):
    r, kept = 8, 64
    tensors = {}
    for place in places(net, model, ["mlp"]):
        matrices, parts = {}, {"adapter_down.bias": draw(r), "adapter_up.bias": draw(HIDDEN)}
        for name, shape in [("adapter_down", (r, HIDDEN)), ("adapter_up", (HIDDEN, r))]:
            at = torch.randperm(r * HIDDEN, generator=draw.generator)[:kept].sort().values
            values = draw(kept)
            matrices[name] = torch.zeros(r * HIDDEN).index_put((at,), values).reshape(shape)
            parts |= {f"{name}.values": values, f"{name}.indices": at.int()}

        def difference(x, y, place=place, matrices=matrices, parts=parts):
            h = relu(linear(place.norm(x + y), matrices["adapter_down"], parts["adapter_down.bias"]))
            return linear(h, matrices["adapter_up"], parts["adapter_up.bias"])

        place.add(difference)
        tensors |= {f"{place.path}.{name}": tensor for name, tensor in parts.items()}
    config = BOTTLENECK | dict(peft_type="SPARSE_ADAPTER", sparsity=0.75, pruning="random", pruning_seed=0, original_ln_before=True)
    return config, tensors, r".*layer\.\d+\.output" if model == "bert" else ["mlp"]


def adapter_drop(net, model, draw):
    tensors = {}
    for place in places(net, model, ["attention", "mlp"], layers=[1]):
        down, d, up, u = draw(8, HIDDEN), draw(8), draw(HIDDEN, 8), draw(HIDDEN)

        def difference(x, _y, down=down, d=d, up=up, u=u):
            return linear(relu(linear(x, down, d)), up, u)

        place.add(difference)
        tensors |= {f"{place.path}.{name}": tensor for name, tensor in [
            ("adapter_down.weight", down), ("adapter_down.bias", d), ("adapter_up.weight", up), ("adapter_up.bias", u)]}
    config = BOTTLENECK | dict(peft_type="ADAPTER_DROP", is_parallel=True, drop_layers=1, robust=False, drop_seed=0)
    return config, tensors, ["attention.output", "output"] if model == "bert" else ["self_attn", "mlp"]


def multi_head_adapter(net, model, draw):
    heads, own, s = 4, 2, 0.5
    d = HIDDEN // heads
    tensors = {}
    for layer in (0, 1):
        if model == "bert":
            block = net.bert.encoder.layer[layer].attention
            path, query, out = f"bert.encoder.layer.{layer}.attention.self", block.self.query, block.output.dense
        else:
            block = net.model.layers[layer].self_attn
            path, query, out = f"model.layers.{layer}.self_attn", block.q_proj, block.o_proj
        down, up = [draw(own, HIDDEN) for _ in range(heads)], [draw(d, own) for _ in range(heads)]
        before, after = [draw(own) for _ in range(heads)], [draw(d) for _ in range(heads)]
        read = {}
        query.register_forward_pre_hook(lambda _, args, read=read: read.update(x=args[0]))

        def mixed(_module, args, read=read, down=down, up=up, before=before, after=after):
            heads = zip(args[0].split(d, -1), down, before, up, after)
            return torch.cat([y + s * linear(relu(linear(read["x"], D, b)), U, u) for y, D, b, U, u in heads], -1)

        out.register_forward_pre_hook(mixed)
        tensors |= {f"{path}.{name}": torch.cat(parts) for name, parts in [
            ("adapter_down.weight", down), ("adapter_down.bias", before), ("adapter_up.weight", up), ("adapter_up.bias", after)]}
    return dict(peft_type="MULTI_HEAD_ADAPTER", r=heads * own, num_heads=heads, non_linearity="relu", scaling=s), tensors, None


def invertible(net, model, draw):
    half, r = HIDDEN // 2, 8
    path = "bert.embeddings" if model == "bert" else "model.embed_tokens"
    parts = {f"{name}.{part}": draw(*shape) for name in "FG" for part, shape in [
        ("0.weight", (r, half)), ("0.bias", (r,)), ("2.weight", (half, r)), ("2.bias", (half,))]}

    def network(name, x):
        h = relu(linear(x, parts[f"{name}.0.weight"], parts[f"{name}.0.bias"]))
        return linear(h, parts[f"{name}.2.weight"], parts[f"{name}.2.bias"])

    def hook(_module, _inputs, e):
        first, second = e.split(half, -1)
        first = first + network("F", second)
        return torch.cat([first, second + network("G", first)], -1)

    net.get_submodule(path).register_forward_hook(hook)
    config = dict(peft_type="INVERTIBLE", reduction_factor=2.0, non_linearity="relu")
    return config, {f"{path}.{name}": tensor for name, tensor in parts.items()}, [path.split(".")[-1]]


@torch.no_grad()
def case(method, model):
    net = base(model)
    config, tensors, targets = method(net, model, Draw())
    logits = net(**inputs(model)).logits
    folder = ROOT / "hidden" / f"{method.__name__.replace('_', '-')}-{model}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = config | ({"target_modules": targets} if targets else {}) | {"task_type": None, "inference_mode": True,
                       "base_model_name_or_path": f"../../models/{model}"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({"logits": logits.contiguous()}, folder / "golden.safetensors")


if __name__ == "__main__":
    for method in [tiny_attention, convpass, sparse_adapter, adapter_drop, multi_head_adapter, invertible]:
        for model in KINDS:
            case(method, model)
