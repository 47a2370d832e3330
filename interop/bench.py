"""One measurement of `cargo xtask bench --against peft` with HF PEFT, as benches/examples/measure makes it on our side.

python interop/bench.py --job job.json --output measured.json

A step is forward, backward, clipping and AdamW (fused, as transformers' trainer has it); the frozen model drops nothing.
"""

import time
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from job import answer

# Times an adapter is loaded, and another is switched to.
LOADS = 5
SWITCHES = 20


def peak_memory():
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def took(work):
    start = time.perf_counter()
    came = work()
    return came, time.perf_counter() - start


def timed(job, step):
    """Makes the steps and takes their times. Returns what each step came to, too."""
    measured, all_of_them = {"step_seconds": []}, []
    for index in range(job["warmup"] + job["steps"]):
        came, seconds = took(step)
        all_of_them.append(came)
        if index == 0:
            measured["start_seconds"] = time.time() - job["began"]
        if index >= job["warmup"]:
            measured["step_seconds"].append(seconds)
    measured["peak_memory_bytes"] = peak_memory()
    return measured, all_of_them


def load(job):
    """The model, and whether it continues texts."""
    causal = AutoConfig.from_pretrained(job["model"]).model_type == "llama"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    still = {} if causal else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind.from_pretrained(job["model"], dtype=torch.float32, **still), causal


def batch(job, causal):
    longest = max(len(row) for row in job["rows"])
    ids = torch.zeros(len(job["rows"]), longest, dtype=torch.long)
    mask = torch.zeros(len(job["rows"]), longest, dtype=torch.long)
    for place, row in enumerate(job["rows"]):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    labels = ids.masked_fill(mask == 0, -100) if causal else torch.tensor(job["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(job, model, count=1, trainable=False):
    """The model with adapters "0", "1" and so on, the first of them active."""
    model = peft.PeftModel.from_pretrained(model, job["adapters"][0], adapter_name="0", is_trainable=trainable)
    for number in range(1, count):
        model.load_adapter(job["adapters"][number], adapter_name=str(number))
    model.set_adapter("0")
    return model


def rate(job):
    """The largest rate of all products, each made several times."""
    best = 0.0
    for m, k, n in job["products"]:
        x, w = torch.rand(m, k), torch.rand(k, n)
        _, seconds = timed(job, lambda: took(lambda: x @ w)[1])
        best = max(best, 2 * m * k * n / min(seconds))
    return {"rate": best}


def forward(job):
    model, causal = load(job)
    model, data = adapted(job, model).eval(), batch(job, causal)

    @torch.inference_mode()
    def step():
        return model(**data).loss.item()

    measured, losses = timed(job, step)
    return measured | {"losses": losses}


def steps(job, model, data):
    """Training steps of all parameters that are to be trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    model.train()

    def step():
        loss = model(**data).loss
        told = loss.item()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, job["max_grad_norm"]).item()
        optimizer.step()
        optimizer.zero_grad()
        return told, norm

    measured, came = timed(job, step)
    return measured | {
        "losses": [loss for loss, _ in came],
        "grad_norm": came[0][1],
        "trained_parameters": sum(p.numel() for p in trained),
    }


def lora(job, checkpointed=False):
    model, causal = load(job)
    model, data = adapted(job, model, trainable=True), batch(job, causal)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measured = steps(job, model, data)

    folder = Path(job["folder"])
    model.save_pretrained(folder, selected_adapters=["0"])
    measured["adapter_bytes"] = next(folder.rglob("adapter_model.safetensors")).stat().st_size
    measured["load_seconds"] = []
    for number in range(LOADS):
        if number > 0:
            model.delete_adapter("1")
        _, seconds = took(lambda: model.load_adapter(job["adapters"][1], adapter_name="1"))
        measured["load_seconds"].append(seconds)
    model.eval()
    measured["switch_seconds"] = []
    for number in range(SWITCHES):
        _, seconds = took(lambda: model.set_adapter("01"[number % 2]))
        measured["switch_seconds"].append(seconds)
    with torch.inference_mode():
        measured["switched_loss"] = model(**data).loss.item()
    return measured


def lora_checkpointed(job):
    return lora(job, checkpointed=True)


def full(job):
    model, causal = load(job)
    return steps(job, model, batch(job, causal))


def generate(job):
    model, _ = load(job)
    model.generation_config.eos_token_id = None  # nothing ends the text
    model = adapted(job, model).eval()
    prompt = torch.tensor(job["rows"][:1])
    count = job["new_tokens"]

    @torch.inference_mode()
    def step():
        said = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=count, pad_token_id=0)
        return said[0, prompt.shape[1]:].tolist()

    measured, texts = timed(job, step)
    return measured | {"new_tokens": texts[0]}


def mixed(job):
    model, causal = load(job)
    count = len(job["adapters"])
    model, data = adapted(job, model, count).eval(), batch(job, causal)
    names = [str(row % count) for row in range(len(job["rows"]))]

    @torch.inference_mode()
    def own():
        return model(**data, adapter_names=names).loss.item()

    @torch.inference_mode()
    def one():
        return model(**data).loss.item()

    measured, losses = timed(job, own)
    alone, _ = timed(job, one)
    return measured | {"losses": losses, "one_seconds": alone["step_seconds"]}


MEASURES = {one.__name__: one for one in (rate, forward, lora, lora_checkpointed, full, generate, mixed)}


def main(job):
    if job["measure"] not in MEASURES:
        raise SystemExit(f"measure: expected one of {', '.join(MEASURES)}, found {job['measure']}")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return MEASURES[job["measure"]](job) | {"versions": versions}


if __name__ == "__main__":
    answer(main, __doc__)
