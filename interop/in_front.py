"""Writes ../fixtures/prompts: what stands in front of a sequence by the papers' formulas, over `transformers`' models.

python interop/in_front.py        (with interop/requirements.txt installed)
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import adaptive_avg_pool1d, linear, relu
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
KINDS = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM,
         "vit": AutoModelForImageClassification, "dinov2": AutoModelForImageClassification}
BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers", "vit": "vit.encoder.layer",
          "dinov2": "dinov2.encoder.layer"}
WORDS = "bert.embeddings.word_embeddings"
HIDDEN, LAYERS, HIDES = 32, 2, -1e9


def base(model):
    net = KINDS[model].from_pretrained(ROOT / "models" / model, dtype=torch.float32, attn_implementation="eager")
    return net.eval()


def inputs(model):
    return tiny.inputs(types=True) if model == "bert" else tiny.inputs(left=True)


class Draw:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, *shape):
        return 0.5 * torch.randn(shape, generator=self.generator)


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def carried(net, model, before):
    """Logits with `before(block, h, held, kept)` in front of what each block reads."""
    if model in ("vit", "dinov2"):
        body = getattr(net, model)
        h = body.embeddings(tiny.images())
        kept = torch.ones(h.shape[:2])
    else:
        batch = inputs(model)
        kept = batch["attention_mask"]
        body = net.bert if model == "bert" else net.model
        if model == "bert":
            h = body.embeddings(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
        else:
            h = body.embed_tokens(batch["input_ids"])
    layers = net.get_submodule(BLOCKS[model]) if model in ("bert", "llama") else list_of(body)
    held = None
    for index, layer in enumerate(layers):
        front = before(index, h, held, kept)
        n = 0 if front is None else front.shape[1]
        x = h if front is None else torch.cat([front.expand(h.shape[0], -1, -1), h], 1)
        sees = torch.cat([torch.ones(h.shape[0], n), kept], 1).bool()[:, None, None, :]
        if model == "llama":
            sees = sees & torch.ones(x.shape[1], x.shape[1]).tril().bool()
            at = torch.arange(-n, h.shape[1])[None]
            y = layer(x, attention_mask=torch.where(sees, 0.0, HIDES), position_embeddings=body.rotary_emb(x, at))
        elif model == "bert":
            y = layer(x, torch.where(sees, 0.0, HIDES))
        else:
            y = layer(x)
        y = first_of(y)
        held, h = (y[:, :n] if n else None), y[:, n:]
    if model == "bert":
        return net.classifier(body.pooler(h))
    if model == "llama":
        return net.lm_head(body.norm(h))
    h = body.layernorm(h)
    return net.classifier(h[:, 0] if model == "vit" else torch.cat([h[:, 0], h[:, 1:].mean(1)], -1))


def list_of(body):
    """The blocks of a vision transformer, wherever this `transformers` has them."""
    return next(m for m in body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)


def behind(net, prompt):
    """BERT's logits with virtual tokens in front of the words."""
    batch = inputs("bert")
    rows, n, _ = prompt.shape
    words = torch.cat([prompt, net.bert.embeddings.word_embeddings(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones(rows, n, dtype=torch.long), batch["attention_mask"]], 1)
    types = torch.cat([torch.zeros(rows, n, dtype=torch.long), batch["token_type_ids"]], 1)
    return net(inputs_embeds=words, attention_mask=mask, token_type_ids=types).logits


def mean_of_words(net):
    batch = inputs("bert")
    kept = batch["attention_mask"][..., None].float()
    return (net.bert.embeddings.word_embeddings(batch["input_ids"]) * kept).sum(1) / kept.sum(1)


def generator(draw, n, m):
    return {"generator_down": draw(HIDDEN, m), "generator_down_bias": draw(m), "generator_up": draw(m, n * HIDDEN),
            "generator_up_bias": draw(n * HIDDEN)}


def generated(parts, x, f):
    h = f(x @ parts["generator_down"] + parts["generator_down_bias"])
    return (h @ parts["generator_up"] + parts["generator_up_bias"]).reshape(x.shape[0], -1, HIDDEN)


def idpg(net, model, draw):
    parts = generator(draw, 3, 4)
    config = dict(peft_type="IDPG", num_virtual_tokens=3, bottleneck=4, non_linearity="tanh")
    return config, WORDS, parts, behind(net, generated(parts, mean_of_words(net), torch.tanh))


def smop(net, model, draw):
    prompts, router = draw(3, 2, HIDDEN), 4 * draw(HIDDEN, 3)
    p = (mean_of_words(net) @ router).softmax(-1)
    value, which = p.max(-1)
    assert len(set(which.tolist())) > 1
    config = dict(peft_type="SMOP", num_prompts=3, num_virtual_tokens=2, perturb_router=True)
    logits = behind(net, value[:, None, None] * prompts[which])
    return config, WORDS, {"prompts": prompts, "router": router}, logits


def apt(net, model, draw):
    n = 3
    batch, tensors = inputs(model), {}
    kept = batch["attention_mask"]
    rows = torch.arange(kept.shape[0])
    for index, layer in enumerate(net.get_submodule(BLOCKS[model])):
        own = layer.attention.self if model == "bert" else layer.self_attn
        key = own.key if model == "bert" else own.k_proj
        width = key.out_features
        parts = {"prefix": draw(n, 2 * width), "token_gate": draw(HIDDEN, n), "layer_gate": draw(1)}
        path = f"{BLOCKS[model]}.{index}." + ("attention.self" if model == "bert" else "self_attn")
        tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}

        def forward(hidden_states, *_args, own=own, parts=parts, width=width, position_embeddings=None, **_kwargs):
            names = ["query", "key", "value"] if model == "bert" else ["q_proj", "k_proj", "v_proj"]
            d = HIDDEN // 4
            q, k, v = (getattr(own, name)(hidden_states).unflatten(-1, (-1, d)).transpose(1, 2) for name in names)
            if model == "llama":
                q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            alpha = torch.sigmoid(hidden_states[rows, kept.argmax(1)] @ parts["token_gate"])
            both = parts["layer_gate"] * alpha[..., None] * parts["prefix"]
            front = [part.unflatten(-1, (-1, d)).transpose(1, 2) for part in both.split(width, -1)]
            k, v = torch.cat([front[0], k], 2), torch.cat([front[1], v], 2)
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
            sees = kept.bool()[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            if model == "llama":
                sees = sees & torch.ones(q.shape[2], q.shape[2]).tril().bool()
            sees = torch.cat([torch.ones(*sees.shape[:3], n).bool(), sees], -1)
            weights = (q @ k.transpose(2, 3) / math.sqrt(d) + torch.where(sees, 0.0, HIDES)).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).flatten(2)
            return (mixed if model == "bert" else own.o_proj(mixed)), None

        own.forward = forward
    at = torch.arange(n, n + kept.shape[1])[None].expand(kept.shape[0], -1)
    return dict(peft_type="APT", num_virtual_tokens=n), None, tensors, net(**batch, position_ids=at).logits


def vpt(net, model, draw):
    prompts = draw(LAYERS, 3, HIDDEN)
    config = dict(peft_type="VPT", num_virtual_tokens=3, deep=True, prompt_dropout=0.0)
    logits = carried(net, model, lambda block, *_: prompts[block][None])
    return config, BLOCKS[model], {"prompt_embeddings": prompts}, logits


def vpt_shallow(net, model, draw):
    prompts = draw(1, 3, HIDDEN)
    config = dict(peft_type="VPT", num_virtual_tokens=3, deep=False, prompt_dropout=0.0)
    logits = carried(net, model, lambda _block, _h, held, _kept: prompts if held is None else held)
    return config, BLOCKS[model], {"prompt_embeddings": prompts}, logits


def prefix_propagation(net, model, draw):
    prefix = draw(LAYERS, 3, HIDDEN)
    logits = carried(net, model, lambda block, _h, held, _kept: prefix[block][None] + (0 if held is None else held))
    return dict(peft_type="PREFIX_PROPAGATION", num_virtual_tokens=3), BLOCKS[model], {"prefix": prefix}, logits


def lpt(generator_type):
    return dict(peft_type="LPT", num_virtual_tokens=3, add_prompt_layer=1, generator_type=generator_type,
                proj_down_size=4)


def late(make):
    return lambda block, h, held, kept: make(h, kept) if block == 1 else held


def lpt_plain(net, model, draw):
    prompt = draw(3, HIDDEN)
    logits = carried(net, model, late(lambda _h, _kept: prompt[None]))
    return lpt(None), BLOCKS[model], {"prompt_embeddings": prompt}, logits


def lpt_naive(net, model, draw):
    parts = generator(draw, 3, 4)
    logits = carried(net, model, late(lambda h, _kept: generated(parts, h[:, 0], relu)))
    return lpt("NPG"), BLOCKS[model], parts, logits


def lpt_pooling(net, model, draw):
    parts = {"pooling_down": draw(HIDDEN, 4), "pooling_down_bias": draw(4), "pooling_up": draw(4, HIDDEN),
             "pooling_up_bias": draw(HIDDEN)}

    def make(h, kept):
        down = h @ parts["pooling_down"] + parts["pooling_down_bias"]
        rows = [adaptive_avg_pool1d(row[: int(own.sum())].T[None], 3)[0].T for row, own in zip(down, kept)]
        return relu(torch.stack(rows)) @ parts["pooling_up"] + parts["pooling_up_bias"]

    return lpt("APPG"), BLOCKS[model], parts, carried(net, model, late(make))


@torch.no_grad()
def case(method, model):
    config, path, tensors, logits = method(base(model), model, Draw())
    folder = ROOT / "prompts" / f"{method.__name__.replace('_', '-')}-{model}"
    folder.mkdir(parents=True)
    before = "base_model.model." + (f"{path}." if path else "")
    own = {before + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"task_type": None, "inference_mode": True, "base_model_name_or_path": f"../../models/{model}"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({"logits": logits.contiguous()}, folder / "golden.safetensors")


@torch.no_grad()
def nothing_in_front_is_the_model():
    for model in KINDS:
        net = base(model)
        if model in ("vit", "dinov2"):
            expected = net(pixel_values=tiny.images()).logits
        else:
            expected = net(**inputs(model)).logits
        found = carried(net, model, lambda *_: None)
        if model == "llama":
            rows = inputs(model)["attention_mask"].bool()
            # Padded rows count positions otherwise; a shift is none to rotary positions.
            found, expected = found[rows], expected[rows]
        assert torch.allclose(found, expected, atol=1e-4), (model, (found - expected).abs().max())


def write():
    nothing_in_front_is_the_model()
    shutil.rmtree(ROOT / "prompts", ignore_errors=True)
    for method in [idpg, smop, lpt_naive, lpt_pooling]:
        case(method, "bert")
    for method in [apt, lpt_plain, prefix_propagation, vpt]:
        for model in ["bert", "llama"]:
            case(method, model)
    for method in [lpt_naive, prefix_propagation, vpt, vpt_shallow]:
        for model in ["vit", "dinov2"]:
            case(method, model)


if __name__ == "__main__":
    write()
