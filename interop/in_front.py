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
from transformers import (AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM,
                          AutoModelForSequenceClassification, AutoTokenizer)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
KINDS = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM,
         "vit": AutoModelForImageClassification, "dinov2": AutoModelForImageClassification}
BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers", "vit": "vit.encoder.layer",
          "dinov2": "dinov2.encoder.layer"}
WORDS = "bert.embeddings.word_embeddings"
HIDDEN, LAYERS, HIDES = 32, 2, -1e9
PROMPT = "prompt"


def base(model):
    kind = AutoModelForMaskedLM if model == "bert-mlm" else KINDS[model]
    net = kind.from_pretrained(ROOT / "models" / model, dtype=torch.float32, attn_implementation="eager")
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


def carried(net, model, before, first=0):
    """Logits with `before(block, h, held, kept)` in front of what each block reads; the sequence begins at `first`."""
    if model in ("vit", "dinov2"):
        body = getattr(net, model)
        h = body.embeddings(tiny.images())
        kept = torch.ones(h.shape[:2])
    else:
        batch = inputs(model)
        kept = batch["attention_mask"]
        body = net.bert if model == "bert" else net.model
        if model == "bert":
            at = torch.arange(first, first + kept.shape[1])[None]
            h = body.embeddings(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"], position_ids=at)
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
            at = torch.cat([torch.arange(-n, 0), torch.arange(first, first + h.shape[1])])[None]
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


def fed(net, prompt):
    """What BERT reads with virtual tokens in front of the words."""
    batch = inputs("bert")
    rows, n, _ = prompt.shape
    words = torch.cat([prompt, net.bert.embeddings.word_embeddings(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones(rows, n, dtype=torch.long), batch["attention_mask"]], 1)
    types = torch.cat([torch.zeros(rows, n, dtype=torch.long), batch["token_type_ids"]], 1)
    return dict(inputs_embeds=words, attention_mask=mask, token_type_ids=types)


def behind(net, prompt):
    return net(**fed(net, prompt)).logits


def mean_of_words(net):
    batch = inputs("bert")
    kept = batch["attention_mask"][..., None].float()
    return (net.bert.embeddings.word_embeddings(batch["input_ids"]) * kept).sum(1) / kept.sum(1)


def ptp(net, model, draw):
    prompt = draw(3, HIDDEN)
    logits = behind(net, prompt.expand(inputs("bert")["input_ids"].shape[0], -1, -1))
    config = dict(peft_type="PTP", num_virtual_tokens=3, sigma=0.5, adversarial_weight=0.7, adversarial_steps=3,
                  adversarial_radius=0.5, adversarial_rate=0.25)
    return config, PROMPT, {"prompt_embeddings": prompt}, logits


def infoprompt(net, model, draw):
    """What is trained beside the prompt (`beside.py`) is no part of it."""
    prompt = draw(4, HIDDEN)
    logits = behind(net, prompt.expand(inputs("bert")["input_ids"].shape[0], -1, -1))
    config = dict(peft_type="INFOPROMPT", num_virtual_tokens=4, beta=0.1, gamma=0.05, score_dim=8, num_negatives=5)
    return config, PROMPT, {"prompt_embeddings": prompt}, logits


def warp(net, model, draw):
    """The class whose vector is nearest to the state of a mask behind the prompts, through the transform where there is
    the head of a masked language model."""
    prompts, theta = draw(3, HIDDEN), draw(3, HIDDEN)
    word = AutoTokenizer.from_pretrained(ROOT / "models" / model).mask_token_id
    mask = net.bert.embeddings.word_embeddings.weight[word]
    front = torch.cat([prompts, mask[None]]).expand(inputs("bert")["input_ids"].shape[0], -1, -1)
    state = net.bert(**fed(net, front)).last_hidden_state[:, 3]
    transform = model == "bert-mlm"
    if transform:
        state = net.cls.predictions.transform(state)
    config = dict(peft_type="WARP", num_prompts=3, prompt_init="MASK", class_tokens=None, transform=transform)
    tensors = {"prompt_embeddings": prompts, "base_model.classifier.weight": theta}
    return config, PROMPT, tensors, state @ theta.T


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


def attentions(net, model):
    """Each attention with its path, its layer of keys, and how it is made to mix `q` with `k` and `v` behind what
    `front(hidden_states)` gives, a product of queries and keys more where `added(rows)` says so."""
    names = ["query", "key", "value"] if model == "bert" else ["q_proj", "k_proj", "v_proj"]
    for index, layer in enumerate(net.get_submodule(BLOCKS[model])):
        own = layer.attention.self if model == "bert" else layer.self_attn
        path = f"{BLOCKS[model]}.{index}." + ("attention.self" if model == "bert" else "self_attn")

        def mixing(front, added=lambda _rows: 0, own=own):
            def forward(hidden_states, attention_mask=None, *_args, position_embeddings=None, **_kwargs):
                d = HIDDEN // 4
                q, k, v = (getattr(own, name)(hidden_states).unflatten(-1, (-1, d)).transpose(1, 2) for name in names)
                if model == "llama":
                    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
                before = [part.unflatten(-1, (-1, d)).transpose(1, 2) for part in front(hidden_states)]
                n, rows = before[0].shape[2], q.shape[2]
                k, v = (torch.cat([part.expand(k.shape[0], -1, -1, -1), of], 2) for part, of in zip(before, (k, v)))
                k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
                mask = attention_mask.expand(-1, 1, rows, -1)
                mask = torch.cat([torch.zeros(*mask.shape[:3], n), mask], -1)
                products = q @ k.transpose(2, 3)
                products[..., n:] += added(rows)
                mixed = ((products / math.sqrt(d) + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
                return (mixed if model == "bert" else own.o_proj(mixed)), None

            own.forward = forward

        yield path, getattr(own, names[1]), mixing


def apt(net, model, draw):
    n = 3
    batch, tensors = inputs(model), {}
    kept = batch["attention_mask"]
    rows = torch.arange(kept.shape[0])
    for path, key, mixing in attentions(net, model):
        width = key.out_features
        parts = {"prefix": draw(n, 2 * width), "token_gate": draw(HIDDEN, n), "layer_gate": draw(1)}
        tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}

        def front(hidden_states, parts=parts, width=width):
            alpha = torch.sigmoid(hidden_states[rows, kept.argmax(1)] @ parts["token_gate"])
            return (parts["layer_gate"] * alpha[..., None] * parts["prefix"]).split(width, -1)

        mixing(front)
    at = torch.arange(n, n + kept.shape[1])[None].expand(kept.shape[0], -1)
    return dict(peft_type="APT", num_virtual_tokens=n), None, tensors, net(**batch, position_ids=at).logits


def aprompt(net, model, draw):
    m, r, length = 2, 4, 6
    prompts = draw(LAYERS, 3, HIDDEN)
    tensors = {f"{BLOCKS[model]}.input_prompts": prompts}
    for path, key, mixing in attentions(net, model):
        width = key.out_features
        parts = {"key_value_prompts": draw(m, 2 * width), "query_prompts": 4 * draw(length, r),
                 "key_prompts": 4 * draw(length, r)}
        tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}

        def added(rows, parts=parts):
            assert rows > length
            rest = torch.zeros(rows - length, r)
            q, k = (torch.cat([parts[name], rest]) for name in ("query_prompts", "key_prompts"))
            return q @ k.T

        mixing(lambda _, parts=parts, width=width: parts["key_value_prompts"][None].split(width, -1), added)
    config = dict(peft_type="APROMPT", num_virtual_tokens=3, key_value_length=m, query_key_length=r, max_length=length)
    return config, None, tensors, carried(net, model, lambda block, *_: prompts[block][None], first=m)


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


def pooled(down, down_bias, up, up_bias, h, kept):
    """Means of three stretches of each row's own tokens."""
    h = h @ down + down_bias
    rows = [adaptive_avg_pool1d(row[: int(own.sum())].T[None], 3)[0].T for row, own in zip(h, kept)]
    return relu(torch.stack(rows)) @ up + up_bias


def lpt_pooling(net, model, draw):
    parts = {"pooling_down": draw(HIDDEN, 4), "pooling_down_bias": draw(4), "pooling_up": draw(4, HIDDEN),
             "pooling_up_bias": draw(HIDDEN)}

    logits = carried(net, model, late(lambda h, kept: pooled(*parts.values(), h, kept)))
    return lpt("APPG"), BLOCKS[model], parts, logits


def selective(prompt_layers):
    return dict(peft_type="SELECTIVE_PROMPT_TUNING", num_virtual_tokens=3, proj_down_size=4, tau=0.5,
                selection_every=2, second_seed=0, num_prompt_layers=1, prompt_layers=prompt_layers)


def generators(draw, count):
    return {"generators_down": draw(count, HIDDEN, 4), "generators_down_bias": draw(count, 4),
            "generators_up": draw(count, 4, HIDDEN), "generators_up_bias": draw(count, HIDDEN)}


def selective_search(net, model, draw):
    parts, gates = generators(draw, LAYERS), draw(LAYERS)

    def before(block, h, held, kept):
        share = 0.5 * torch.sigmoid(gates[block])
        propagated = 0 if held is None else held
        return (1 - share) * propagated + share * pooled(*(part[block] for part in parts.values()), h, kept)

    return selective(None), BLOCKS[model], parts | {"prompt_gates": gates}, carried(net, model, before)


def selective_chosen(net, model, draw):
    parts = generators(draw, 1)

    def before(block, h, held, kept):
        return 0.5 * pooled(*(part[0] for part in parts.values()), h, kept) if block == 1 else held

    return selective([1]), BLOCKS[model], parts, carried(net, model, before)


@torch.no_grad()
def case(method, model):
    config, path, tensors, logits = method(base(model), model, Draw())
    folder = ROOT / "prompts" / f"{method.__name__.replace('_', '-')}-{model}"
    folder.mkdir(parents=True)
    # HF PEFT's name of a prompt at the input is no place's.
    before = "" if path == PROMPT else "base_model.model." + (f"{path}." if path else "")
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
    for method in [idpg, infoprompt, ptp, smop, lpt_naive, lpt_pooling, selective_search, selective_chosen]:
        case(method, "bert")
    for model in ["bert", "bert-mlm"]:
        case(warp, model)
    for method in [apt, aprompt, lpt_plain, prefix_propagation, vpt]:
        for model in ["bert", "llama"]:
            case(method, model)
    for method in [lpt_naive, prefix_propagation, selective_search, vpt, vpt_shallow]:
        for model in ["vit", "dinov2"]:
            case(method, model)


if __name__ == "__main__":
    write()
