"""A run of `cargo xtask compare` with HF PEFT: the same model, data and settings, the same numbers told.

python interop/compare.py --job job.json --output measured.json

As in burn-peft, the frozen model drops nothing in training, batches hold texts of similar length, and a run
goes by optimizer steps.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification


def rows(path):
    first, *lines = Path(path).read_text(encoding="utf-8").split("\n")
    names = first.split("\t")
    return [dict(zip(names, line.split("\t"))) for line in lines if line]


def pad(rows):
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def length_grouped(lengths, size, generator):
    """As transformers groups them: pools of 50 batches, each sorted, then the batches shuffled."""
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches = []
    for start in range(0, len(order), 50 * size):
        pool = sorted(order[start : start + 50 * size], key=lambda item: -lengths[item])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    generator.shuffle(batches)
    return batches


def steps(lengths, size, seed, count):
    """The batches of `count` optimizer steps, epoch after epoch."""
    made = 0
    for epoch in range(count):
        for batch in length_grouped(lengths, size, random.Random(f"{seed} {epoch}")):
            if made == count:
                return
            made += 1
            yield batch


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
    order = sorted(range(len(texts)), key=lambda item: len(texts[item]))
    right = 0
    with torch.no_grad():
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            logits = model(**pad([texts[item] for item in picked])).logits
            right += (logits.argmax(1) == torch.tensor([labels[item] for item in picked])).sum().item()
    return right / len(texts)


def peak_memory():
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def main(job):
    training, row, seed = job["training"], job["row"], job["seed"]
    known = {"max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "max_length", "weight_decay",
             "warmup_ratio", "max_grad_norm", "lr_scheduler_type", "learning_rate", "loraplus_lr_ratio"}
    if unknown := sorted(set(training) - known):
        raise SystemExit(f"options that this script does not have: {', '.join(unknown)}")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=2, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokenizer = Tokenizer.from_file(str(Path(job["model"]) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(training["max_length"])
    data = rows(job["train_file"])
    names = sorted({one["label"] for one in data})

    def read(data):
        texts = [encoding.ids for encoding in tokenizer.encode_batch([one["text"] for one in data])]
        return texts, [names.index(one["label"]) if "label" in one else None for one in data]

    texts, labels = read(data)
    neutral, _ = read(rows(job["neutral_file"]))
    before = embeddings(model.eval(), neutral)

    options = dict(row["options"])
    kind = getattr(peft, row["peft"])
    if "total_step" in kind.__dataclass_fields__:
        options["total_step"] = training["max_steps"]
    if row["target_modules"]:
        options["target_modules"] = row["target_modules"]
    config = kind(task_type="SEQ_CLS", **options)
    model = peft.get_peft_model(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, decay = training["learning_rate"], training["weight_decay"]
    if "loraplus_lr_ratio" in training:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_weight_decay=decay,
                                              loraplus_lr_ratio=training["loraplus_lr_ratio"])
    else:
        optimizer = torch.optim.AdamW([
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ], lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(training))

    model.train()
    size, count = training["per_device_train_batch_size"], training["max_steps"]
    began = time.perf_counter()
    for index, picked in enumerate(steps([len(text) for text in texts], size, seed, count)):
        batch = pad([texts[item] for item in picked])
        loss = model(**batch, labels=torch.tensor([labels[item] for item in picked])).loss
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} at step {index + 1}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), training["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(index + 1)
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    memory = peak_memory()

    model.eval()
    held_out, expected = read(rows(job["held_out_file"]))
    after = embeddings(model, neutral)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "accuracy": accuracy(model, held_out, expected, training["per_device_eval_batch_size"]),
        "trainable_parameters": sum(p.numel() for p in trained.values()),
        "adapter_bytes": adapter,
        "step_seconds": seconds / count,
        "peak_memory_bytes": memory,
        "forgetting": 1.0 - (before * after).sum(1).mean().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    measured = main(json.loads(Path(arguments.job).read_text()))
    Path(arguments.output).write_text(json.dumps(measured))
