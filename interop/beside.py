"""Writes ../fixtures/beside: what methods add to the loss of a batch, by the papers' formulas, over `transformers`' BERT:
the terms and their gradients.

python interop/beside.py        (with interop/requirements.txt installed)
"""

import math

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from in_front import HIDDEN, ROOT, Draw, base, inputs

LABELS = torch.tensor([2, 0, 1])


def read(net, prompt, delta=0):
    """Logits, and what the classifier reads, with `delta` on the words behind a prompt."""
    batch = inputs("bert")
    rows = len(LABELS)
    words = net.bert.embeddings.word_embeddings(batch["input_ids"]) + delta
    n = prompt.shape[0]
    found = net.bert(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), words], 1),
        attention_mask=torch.cat([torch.ones(rows, n, dtype=torch.long), batch["attention_mask"]], 1),
        token_type_ids=torch.cat([torch.zeros(rows, n, dtype=torch.long), batch["token_type_ids"]], 1))
    return net.classifier(found.pooler_output), found.pooler_output


def leaves(net, **parts):
    """Of these and the head, gradients are asked."""
    net.requires_grad_(False)
    net.classifier.requires_grad_(True)
    return {name: part.requires_grad_(True) for name, part in parts.items()}


def write(name, net, term, parts, **more):
    term.backward()
    grads = {f"grad_{part}": tensor.grad for part, tensor in parts.items()}
    grads["grad_classifier"] = net.classifier.weight.grad
    tensors = {part: tensor.detach() for part, tensor in parts.items()} | grads
    tensors |= {part: tensor.detach() for part, tensor in more.items()} | {"term": term.detach()[None]}
    tensors = {part: tensor.clone().contiguous() for part, tensor in tensors.items() if tensor is not None}
    save_file(tensors, ROOT / "beside" / f"{name}.safetensors")


def length(x):
    return x.flatten(1).norm(dim=1)[:, None, None]


def ptp():
    """`λ·L(E(x) + δ*)` with λ = 0.7 after J = 3 steps of η = 0.25 in a ball of ε = 0.5."""
    net, draw = base("bert"), Draw()
    parts = leaves(net, prompt=draw(3, HIDDEN))
    kept = inputs("bert")["attention_mask"][..., None].float()
    delta = torch.zeros(*kept.shape[:2], HIDDEN)
    for _ in range(3):
        delta.requires_grad_(True)
        loss = cross_entropy(read(net, parts["prompt"].detach(), delta)[0], LABELS)
        (up,) = torch.autograd.grad(loss, delta)
        assert torch.equal(up, up * kept)
        delta = delta.detach() + 0.25 * up / length(up)
        delta = delta * (0.5 / length(delta)).clamp(max=1)
    term = 0.7 * cross_entropy(read(net, parts["prompt"], delta)[0], LABELS)
    assert term > 0.7 * cross_entropy(read(net, parts["prompt"])[0], LABELS)
    write("ptp", net, term, parts, delta=delta)


def bound(prompts, v, left, right):
    scores = (v @ right) @ (prompts @ left).T / math.sqrt(left.shape[1])
    return cross_entropy(scores, torch.zeros(v.shape[0], dtype=torch.long))


def infoprompt():
    """`β·L_head + γ·L_state` with β = 0.3, γ = 0.2, scores of width 6, and 5 negatives."""
    net, draw = base("bert"), Draw()
    parts = leaves(net, prompt=draw(3, HIDDEN), head_words=draw(HIDDEN, 6), state_words=draw(HIDDEN, 6),
                   head_head=draw(HIDDEN, 6), state_head=draw(HIDDEN, 6))
    negatives = 2 * draw(5, 3, HIDDEN).mean(1)
    prompts = torch.cat([parts["prompt"].mean(0)[None], negatives])
    _, states = read(net, parts["prompt"])
    head = bound(prompts, net.classifier.weight, parts["head_words"], parts["head_head"])
    state = bound(prompts, states, parts["state_words"], parts["state_head"])
    write("infoprompt", net, 0.3 * head + 0.2 * state, parts, negatives=negatives, head=head[None], state=state[None])


if __name__ == "__main__":
    (ROOT / "beside").mkdir(exist_ok=True)
    ptp()
    infoprompt()
