"""A run of `cargo xtask compare` in Python: the same model, data and settings, the same numbers told.

python interop/compare.py --job job.json --output measured.json

A row's `reference` is a configuration class of HF PEFT or a function of references.py. As in burn-peft, the frozen model
drops nothing in training and a run goes by optimizer steps. It begins where burn-peft's begins (`start`: its adapter after
a step at a rate of 0) and takes the same batches, so that both sides tell the same losses as long as rounding allows.
"""

import math
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

import order
import references
from job import answer


def rows(path):
    first, *lines = Path(path).read_text(encoding="utf-8").split("\n")
    names = first.split("\t")
    return [dict(zip(names, line.split("\t"))) for line in lines if line]


def classifier(folder):
    """The model, which drops nothing in training."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def reader(folder, max_length, names):
    """What makes token ids of the texts of rows, and numbers of their labels."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)

    def read(data):
        texts = [encoding.ids for encoding in tokenizer.encode_batch([one["text"] for one in data])]
        return texts, [names.index(one["label"]) if "label" in one else None for one in data]

    return read


def pad(rows):
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def schedule(training):
    """The factor of the learning rate at a step: get_linear_schedule_with_warmup's."""
    total = training["max_steps"]
    warmup = math.ceil(training["warmup_ratio"] * total)
    assert training["lr_scheduler_type"] == "linear", training["lr_scheduler_type"]

    def factor(step):
        if step < warmup:
            return step / warmup
        return max(0, total - step) / max(1, total - warmup)

    return factor


def embeddings(encoder, texts):
    """Means over a text's tokens, with length 1."""
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            batch = pad(texts[start : start + 32])
            hidden = encoder(**batch, output_hidden_states=True).hidden_states[-1]
            hidden = hidden[:, -batch["input_ids"].shape[1]:]  # without those of virtual tokens
            kept = batch["attention_mask"].unsqueeze(2).float()
            mean = (hidden * kept).sum(1) / kept.sum(1)
            found.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(found)


def accuracy(model, texts, labels, size):
    shortest_first = sorted(range(len(texts)), key=lambda item: len(texts[item]))
    right = 0
    with torch.no_grad():
        for start in range(0, len(texts), size):
            picked = shortest_first[start : start + size]
            logits = model(**pad([texts[item] for item in picked])).logits
            right += (logits.argmax(1) == torch.tensor([labels[item] for item in picked])).sum().item()
    return right / len(texts)


def peak_memory():
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def with_peft(model, row, training, start):
    """The model with the adapter of HF PEFT's that the row names."""
    options, kind = dict(row["options"]), getattr(peft, row["reference"])
    if "total_step" in kind.__dataclass_fields__:
        options["total_step"] = training["max_steps"]
    if row["target_modules"]:
        options["target_modules"] = row["target_modules"]
    model = peft.get_peft_model(model, kind(task_type="SEQ_CLS", **options))
    encoder = getattr(model, "prompt_encoder", torch.nn.Module())
    if any(not name.endswith("embedding.weight") for name, _ in encoder.named_parameters()):
        # The file holds the prompt that a network makes, and not the network: that begins as HF PEFT draws it.
        head = model.get_submodule("base_model.classifier.modules_to_save.default")
        head.load_state_dict({part: start[f"base_model.classifier.{part}"] for part in ["weight", "bias"]})
    else:
        unknown = peft.set_peft_model_state_dict(model, start).unexpected_keys
        if unknown := [name for name in unknown if name != "prompt_embeddings"]:
            raise SystemExit(f"HF PEFT does not know {', '.join(unknown)} of burn-peft's adapter")
    return model


def with_reference(model, row, start, data):
    """Adds what the row names; the masks over the gradients of the model's own parameters that are trained."""
    def begin(names):
        for name in names:
            model.get_parameter(name).data.copy_(start[f"base_model.model.{name}"])

    head, own = ["classifier.weight", "classifier.bias"], {name for name, _ in model.named_parameters()}
    begin(head)
    names = ",".join(row["target_modules"])
    targets = names if re.search(r"[*+?()\[\]|^$\\]", names) else row["target_modules"]
    masks = getattr(references, row["reference"])(model, targets, row["options"], data)
    added = [name for name, _ in model.named_parameters() if name not in own]
    begin(added)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head or name in added or name in masks)
    return masks


def groups(trained, decay):
    """Of named parameters, those whose weights decay and those whose do not: biases and norms."""
    return [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]


def main(job):
    training, row, seed = job["training"], job["row"], job["seed"]
    known = {"max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "max_length", "weight_decay",
             "warmup_ratio", "max_grad_norm", "lr_scheduler_type", "learning_rate", "loraplus_lr_ratio", "init_batches"}
    if unknown := sorted(set(training) - known):
        raise SystemExit(f"options that this script does not have: {', '.join(unknown)}")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(seed)
    model = classifier(job["model"])
    data = rows(job["train_file"])
    read = reader(job["model"], training["max_length"], sorted({one["label"] for one in data}))
    texts, labels = read(data)
    neutral, _ = read(rows(job["neutral_file"]))
    before = embeddings(model.eval(), neutral)

    size, count = training["per_device_train_batch_size"], training["max_steps"]
    lengths = [len(text) for text in texts]

    def batch(picked):
        return pad([texts[item] for item in picked]) | {"labels": torch.tensor([labels[item] for item in picked])}

    start = load_file(Path(job["start"]) / "adapter_model.safetensors")
    if hasattr(peft, row["reference"]):
        model, masks = with_peft(model, row, training, start), {}
    else:
        seen = order.length_grouped(lengths, size, seed, 0)[: training.get("init_batches", 32)]
        data = SimpleNamespace(method=row["method"], batches=[batch(picked) for picked in seen],
                               examples=[batch([item]) for picked in seen for item in picked])
        masks = with_reference(model, row, start, data)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, decay = training["learning_rate"], training["weight_decay"]
    if "loraplus_lr_ratio" in training:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_weight_decay=decay,
                                              loraplus_lr_ratio=training["loraplus_lr_ratio"])
    else:
        optimizer = torch.optim.AdamW(groups(trained, decay), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(training))

    model.train()
    window = []
    began = time.perf_counter()
    for index, picked in enumerate(order.steps(lengths, size, seed, count)):
        optimizer.zero_grad()  # before: a mask may have left gradients
        loss = model(**batch(picked)).loss
        window.append(loss.item())
        if not math.isfinite(window[-1]):
            raise SystemExit(f"the loss is {window[-1]} at step {index + 1}")
        loss.backward()
        for name, mask in masks.items():
            trained[name].grad *= mask.view_as(trained[name])
        torch.nn.utils.clip_grad_norm_(trained.values(), training["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(index + 1)
        if len(window) == 10 or index + 1 == count:
            print(f"step {index + 1}: loss {sum(window) / len(window):.4f}", file=sys.stderr)
            window.clear()
    seconds = time.perf_counter() - began
    memory = peak_memory()

    model.eval()
    held_out, expected = read(rows(job["held_out_file"]))
    after = embeddings(model, neutral)
    numbers = sum(masks[name].sum().item() if name in masks else p.numel() for name, p in trained.items())
    adapter = 4 * numbers
    if isinstance(model, peft.PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            adapter = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "accuracy": accuracy(model, held_out, expected, training["per_device_eval_batch_size"]),
        "trainable_parameters": numbers,
        "adapter_bytes": adapter,
        "step_seconds": seconds / count,
        "peak_memory_bytes": memory,
        "forgetting": 1.0 - (before * after).sum(1).mean().item(),
    }


if __name__ == "__main__":
    answer(main, __doc__)
