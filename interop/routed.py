"""Writes ../fixtures/routed: blocks that run for some tokens alone, by the paper's formula, over `transformers`' models.

python interop/routed.py        (with interop/requirements.txt installed)

Each row goes alone and without padding, so that a padded batch is held to its rows.
"""

import json
import math
import shutil

import torch
from safetensors.torch import save_file
from torch.nn.functional import relu

import tiny
from in_front import BLOCKS, HIDDEN, LAYERS, ROOT, Draw, base, first_of, inputs, list_of


def soft_top_k(s, k, epsilon, iterations):
    """`λ [n]` by coordinate descent on both duals, `ε` falling to its value."""
    if k == len(s):
        return torch.ones_like(s)
    a, now = 0.0, max(4.0, epsilon)
    for step in range(iterations):
        now = now if step == 0 else max(0.7 * now, epsilon)
        b = torch.minimum(-(s + a), torch.zeros_like(s))
        a = now * math.log(k) - now * torch.logsumexp((s + b) / now, 0)
    b = torch.minimum(-(s + a), torch.zeros_like(s))
    return ((s + a + b) / now).exp()


def routed(layer, h, parts, config):
    """A block over the states `h [1, n, hidden]` of one row."""
    n = h.shape[1]
    k = math.ceil(n / config["reduction"])
    s = h[0] @ parts["router"]
    ranked = s.sort(descending=True).values
    assert k == n or ranked[k - 1] - ranked[k] > 1e-3, "a choice that rounding could change"
    chosen = s.topk(k).indices.sort().values
    if config["attention"] == "k_to_k":
        y = first_of(layer(h[:, chosen]))
    else:
        # All but the attention goes token by token, and there each of them reads all.
        y = first_of(layer(h))[:, chosen]
    share = soft_top_k(s, k, config["epsilon"], config["iterations"])[chosen]
    f = {"relu": relu, "tanh": torch.tanh}[config["non_linearity"]]
    out = h + f(h @ parts["adapter_down"] + parts["adapter_down_bias"]) @ parts["adapter_up"] + parts["adapter_up_bias"]
    out[:, chosen] += share[:, None] * (y - h[:, chosen])
    return out, share


def embedded(net, model):
    """States before the first block, of each row alone."""
    if model != "bert":
        return list(getattr(net, model).embeddings(tiny.images())[:, None])
    batch = inputs(model)
    rows = []
    for ids, types, kept in zip(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]):
        n = int(kept.sum())
        rows.append(net.bert.embeddings(input_ids=ids[None, :n], token_type_ids=types[None, :n]))
    return rows


def logits(net, model, h):
    if model == "bert":
        return net.classifier(net.bert.pooler(h))
    h = getattr(net, model).layernorm(h)
    return net.classifier(h[:, 0] if model == "vit" else torch.cat([h[:, 0], h[:, 1:].mean(1)], -1))


def blocks(net, model):
    return net.get_submodule(BLOCKS[model]) if model == "bert" else list_of(getattr(net, model))


def forward(net, model, parts, config):
    found, shares = [], []
    for h in embedded(net, model):
        for index, layer in enumerate(blocks(net, model)):
            h, share = routed(layer, h, {name: part[index] for name, part in parts.items()}, config)
            shares.append(share)
        found.append(logits(net, model, h))
    return torch.cat(found), torch.cat(shares)


def drawn(m):
    draw = Draw()
    return {"router": 0.2 * draw(LAYERS, HIDDEN), "adapter_down": 0.3 * draw(LAYERS, HIDDEN, m),
            "adapter_down_bias": draw(LAYERS, m), "adapter_up": draw(LAYERS, m, HIDDEN),
            "adapter_up_bias": 0.3 * draw(LAYERS, HIDDEN)}


@torch.no_grad()
def case(name, model, **said):
    config = dict(peft_type="CODA", reduction=3, bottleneck=4, non_linearity="relu", attention="k_to_all", epsilon=1.0,
                  iterations=20) | said
    net, parts = base(model), drawn(config["bottleneck"])
    found, shares = forward(net, model, parts, config)
    # Some whole, some in part.
    assert shares.min() < 0.99 and shares.max() > 0.5, shares
    folder = ROOT / "routed" / f"{name}-{model}"
    folder.mkdir(parents=True)
    own = {f"base_model.model.{BLOCKS[model]}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"task_type": None, "inference_mode": True, "base_model_name_or_path": f"../../models/{model}"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({"logits": found.contiguous()}, folder / "golden.safetensors")


@torch.no_grad()
def all_tokens_are_the_model():
    for model in ["bert", "vit", "dinov2"]:
        net = base(model)
        expected = net(**inputs(model)).logits if model == "bert" else net(pixel_values=tiny.images()).logits
        parts = {name: part * (name == "router") for name, part in drawn(4).items()}
        for attention in ["k_to_k", "k_to_all"]:
            config = dict(reduction=1, non_linearity="relu", attention=attention, epsilon=1.0, iterations=20)
            found, _ = forward(net, model, parts, config)
            assert torch.allclose(found, expected, atol=1e-4), (model, (found - expected).abs().max())


def write():
    all_tokens_are_the_model()
    shutil.rmtree(ROOT / "routed", ignore_errors=True)
    for model in ["bert", "vit", "dinov2"]:
        case("coda", model)
        case("coda-k-to-k", model, attention="k_to_k", reduction=2, non_linearity="tanh", epsilon=0.1)


if __name__ == "__main__":
    write()
