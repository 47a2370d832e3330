"""Selective methods as a plain torch loop: full parameters, and a mask over their gradients. Written by fixtures.py, and
the reference of compare.py.

    python -W ignore selective.py        (writes ../fixtures/selective alone)

For each case: the configuration as burn-peft has it, the mask (which numbers of which parameter, counted row by row),
and the losses of five steps of AdamW under it.
"""

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
STEPS, RATE = 5, 1e-2
ENCODER = r"bert\.(embeddings|encoder)\..*"
DENSE = r"bert\.encoder\.layer\.1\.(intermediate\.dense|attention\.self\.value)"
BIASES = r"bert\.encoder\..*"
TUNED = dict(full_learning_rate=3e-3, full_epochs=3)

CASES = {
    "bitfit": dict(peft_type="BITFIT", target_modules=BIASES),
    "bitfit-small": dict(peft_type="BITFIT", target_modules=["query", "intermediate.dense"]),
    "fishmask": dict(peft_type="FISHMASK", target_modules=ENCODER, keep_ratio=0.05),
    "fishdip": dict(peft_type="FISHDIP", target_modules=ENCODER, keep_ratio=0.05, top_examples=5),
    "childtuning-d": dict(peft_type="CHILDTUNING", target_modules=DENSE, keep_ratio=0.3, mode="ChildTuning-D"),
    "pafi": dict(peft_type="PAFI", target_modules=ENCODER, keep_ratio=0.05),
    "pafi-bare": dict(peft_type="PAFI", target_modules=ENCODER, keep_ratio=0.02, norms=False),
    "sam": dict(peft_type="SAM", target_modules=ENCODER, keep_ratio=0.05),
    "sam-fisher": dict(peft_type="SAM", target_modules=DENSE, keep_ratio=0.05, hessian="fisher"),
    "ltsft": dict(peft_type="LTSFT", target_modules=DENSE, keep_ratio=0.1, **TUNED),
    "far": dict(peft_type="FAR", target_modules=DENSE, keep_ratio=0.3, **TUNED),
    "u-bitfit": dict(peft_type="USBITFIT", target_modules=BIASES, keep_ratio=0.5, **TUNED),
    "s-bitfit": dict(peft_type="USBITFIT", target_modules=BIASES, keep_ratio=0.5, structure="structured", **TUNED),
}


def data():
    """Three batches of four texts of different lengths, each text with a class."""
    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(3, tiny.VOCAB, (12, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(12):
        padding = row % 4
        if padding:
            ids[row, -padding:], mask[row, -padding:] = 0, 0
    types = (torch.arange(9) >= 5).long().expand(12, 9).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types,
            "labels": torch.randint(0, 3, (12,), generator=generator)}


def batches(size):
    inputs = data()
    return [{name: tensor[at : at + size] for name, tensor in inputs.items()} for at in range(0, 12, size)]


def matches(place, targets):
    if isinstance(targets, str):
        return re.fullmatch(targets, place)
    return any(place == name or place.endswith(f".{name}") for name in targets)


def targeted(model, targets):
    """Parameters of the target places, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if matches(name.rpartition(".")[0], targets)}


def slopes(model, chosen, examples):
    """Mean gradients and mean squared gradients."""
    mean = {name: torch.zeros_like(p) for name, p in chosen.items()}
    square = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for name, parameter in chosen.items():
            mean[name] += parameter.grad / len(examples)
            square[name] += parameter.grad**2 / len(examples)
    return mean, square


def hardest(model, examples, count):
    """The examples with the highest losses."""
    with torch.no_grad():
        losses = torch.stack([model(**example).loss for example in examples])
    order = losses.sort(descending=True)
    assert order.values[count - 1] - order.values[count] > 1e-4, "the choice hangs on rounding"
    return [examples[at] for at in order.indices[:count]]


def tuned(model, names, saved, examples, full_learning_rate):
    """How far a full fine-tuning takes each number, and the mean gradients on the way; `saved` places learn along."""
    model = copy.deepcopy(model)
    chosen = {name: p for name, p in model.named_parameters() if name in names}
    before = {name: p.detach().clone() for name, p in chosen.items()}
    trained = [*chosen.values(), *targeted(model, saved).values()]
    optimizer = torch.optim.AdamW(trained, lr=full_learning_rate, weight_decay=0.0)
    mean = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for step, example in enumerate(examples):
        optimizer.param_groups[0]["lr"] = full_learning_rate * (1 - step / len(examples))
        optimizer.zero_grad()
        model(**example).loss.backward()
        for name, parameter in chosen.items():
            mean[name] += parameter.grad / len(examples)
        optimizer.step()
    return {name: (p - before[name]).detach() for name, p in chosen.items()}, mean


def highest(scores, count, apart):
    """The numbers with the highest scores of all, which must be this far from the others."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    ordered = flat.sort(descending=True).values
    if count < len(ordered):
        gap = (ordered[count - 1] - ordered[count]) / ordered[count - 1].abs()
        assert gap >= apart, f"the choice hangs on {gap:.1e}"
    return {name: score.flatten() >= ordered[count - 1] for name, score in scores.items()}


def whole(scores, units, count):
    """Units of numbers, the highest sums first, as long as there is room."""
    mask = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    total = lambda unit: sum(scores[name].flatten()[part].sum() for name, part in unit)
    for unit in sorted(units, key=total, reverse=True):
        size = sum(scores[name].flatten()[part].numel() for name, part in unit)
        if size > count:
            break
        count -= size
        for name, part in unit:
            mask[name][part] = True
    return mask


def nodes(scores):
    """Each output of a layer: its row of the weight and its number of the bias."""
    for name, score in scores.items():
        if name.endswith(".weight"):
            rows, width = score.shape
            bias = name.replace(".weight", ".bias")
            for row in range(rows):
                yield [(name, slice(row * width, (row + 1) * width)), (bias, slice(row, row + 1))]


def mask(model, case, examples, batches, saved=(), apart=0.0):
    """Which numbers of which parameter: by examples one at a time, or by a full fine-tuning over batches."""
    kind, ratio = case["peft_type"], case.get("keep_ratio")
    chosen = targeted(model, case["target_modules"])
    biases = kind in ["BITFIT", "USBITFIT"]
    chosen = {name: p for name, p in chosen.items() if not biases or name.endswith(".bias")}
    count = int((ratio or 1) * sum(p.numel() for p in chosen.values()))
    if kind == "BITFIT":
        return {name: torch.ones(p.numel(), dtype=torch.bool) for name, p in chosen.items()}
    if kind == "PAFI":
        found = {}
        for name, p in chosen.items():
            if case.get("norms", True) and "LayerNorm" in name:
                found[name] = torch.ones(p.numel(), dtype=torch.bool)
            elif int(ratio * p.numel()):
                found |= highest({name: -p.detach().abs()}, int(ratio * p.numel()), apart)
        return found
    if kind in ["FISHMASK", "FISHDIP", "CHILDTUNING", "SAM"]:
        if kind == "FISHDIP":
            examples = hardest(model, examples, case["top_examples"])
        mean, square = slopes(model, chosen, examples)
        if kind != "SAM":
            return highest(square, count, apart)
        fisher = case.get("hessian") == "fisher"
        return highest({n: g**2 / square[n] if fisher else g**2 for n, g in mean.items()}, count, apart)
    batches = batches * case.get("full_epochs", 1)
    change, mean = tuned(model, set(chosen), saved, batches, case["full_learning_rate"])
    if kind == "LTSFT":
        return highest({name: c.abs() for name, c in change.items()}, count, apart)
    if kind == "FAR":
        far = {name: c.abs() for name, c in change.items()}
        return whole(far, list(nodes(far)), count)
    lost = {name: (c * mean[name]).abs() for name, c in change.items()}
    if case.get("structure") == "structured":
        return whole(lost, [[(name, slice(None))] for name in lost], count)
    return highest(lost, count, apart)


def losses(model, mask):
    model = copy.deepcopy(model)
    chosen = {name: p for name, p in model.named_parameters() if name in mask}
    optimizer = torch.optim.AdamW(chosen.values(), lr=RATE, weight_decay=0.0)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batches(4)[step % 3]).loss
        found.append(loss.item())
        loss.backward()
        for name, parameter in chosen.items():
            parameter.grad *= mask[name].view_as(parameter)
        optimizer.step()
    return torch.tensor(found)


def write(root):
    folder = root / "selective"
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.bert()
    tensors = dict(data())
    for name, case in CASES.items():
        found = mask(model, case, batches(1), batches(4), apart=5e-6)  # the choice must not hang on rounding
        for parameter, kept in found.items():
            if kept.any():
                tensors[f"{name}/{parameter}"] = kept.nonzero().flatten().int()
        tensors[f"{name}/losses"] = losses(model, found)
    save_file(tensors, folder / "golden.safetensors")
    (folder / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n")


if __name__ == "__main__":
    write(ROOT)
