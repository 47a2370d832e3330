"""One run of `cargo xtask bench --epoch` in Python: LoRA over an epoch of the data, as one writes it with HF PEFT.

python interop/epoch.py --job job.json --output measured.json

`sdpa` attention and fused AdamW; texts become token ids before the steps; a batch is padded to its longest row when it is
made, and no step waits for its loss to be told. The batches are burn-peft's (`same`), or rows in a random order (`shuffled`).
It begins where burn-peft's training begins (`start`: its adapter after a step at a rate of 0).
"""

import time
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

import order
from compare import accuracy, classifier, groups, pad, peak_memory, reader, rows, schedule, with_peft
from job import answer


def shuffled(count, size, seed):
    picked = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [picked[i : i + size] for i in range(0, count, size)]


def main(job):
    training, row, seed = job["training"], job["row"], job["seed"]
    known = {"num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "max_length",
             "weight_decay", "warmup_ratio", "max_grad_norm", "lr_scheduler_type", "learning_rate"}
    if unknown := sorted(set(training) - known):
        raise SystemExit(f"options that this script does not have: {', '.join(unknown)}")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(seed)
    data = rows(job["train_file"])
    read = reader(job["model"], training["max_length"], sorted({one["label"] for one in data}))
    texts, labels = read(data)
    model = classifier(job["model"])
    model = with_peft(model, row, training, load_file(Path(job["start"]) / "adapter_model.safetensors"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups(trained, training["weight_decay"]), lr=training["learning_rate"], fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(training))

    # The order is made off the clock: burn-peft's generator takes its time in Python.
    aside = time.perf_counter()
    size, lengths = training["per_device_train_batch_size"], [len(text) for text in texts]
    batches = {"same": lambda: order.length_grouped(lengths, size, seed, 0),
               "shuffled": lambda: shuffled(len(texts), size, seed)}[job["batches"]]()
    if len(batches) != training["max_steps"]:
        raise SystemExit(f"steps of an epoch: expected {training['max_steps']}, found {len(batches)}")
    aside = time.perf_counter() - aside

    model.train()
    losses, norms = [], []
    began = time.perf_counter()
    for picked in batches:
        batch = pad([texts[item] for item in picked])
        loss = model(**batch, labels=torch.tensor([labels[item] for item in picked])).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), training["max_grad_norm"]))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    train_seconds = time.perf_counter() - began
    model.save_pretrained(job["adapter"])
    total_seconds = time.time() - job["began"] - aside
    memory = peak_memory()

    model.eval()
    held_out, expected = read(rows(job["held_out_file"]))
    losses = torch.stack(losses).tolist()
    tokens = sum(lengths)
    padded = sum(len(picked) * max(lengths[item] for item in picked) for picked in batches)
    return {
        "train_seconds": train_seconds,
        "total_seconds": total_seconds,
        "tokens": tokens,
        "padding": 1.0 - tokens / padded,
        "loss": sum(loss * len(picked) for loss, picked in zip(losses, batches)) / len(texts),
        "first_loss": losses[0],
        "first_norm": norms[0].item(),
        "accuracy": accuracy(model, held_out, expected, training["per_device_eval_batch_size"]),
        "trainable_parameters": sum(p.numel() for p in trained.values()),
        "peak_memory_bytes": memory,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


if __name__ == "__main__":
    answer(main, __doc__)
