"""Adapters go to HF PEFT and come from it, with the same logits.

python interop/check.py --binary target/debug/burn-peft [--model DIR --adapter DIR]

Small models with random weights go both ways, through the program as a user runs it. With --model
and --adapter, an adapter that the program trained on a real model is checked too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fixtures
import methods
import tiny

BOUND = 1e-4
checked = []


def run(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"burn-peft {' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return done.stdout


def near(name, found, expected, mask=None):
    if found.shape != expected.shape:
        sys.exit(f"{name}: logits {tuple(found.shape)}, expected {tuple(expected.shape)}")
    difference = (found - expected).abs()
    if mask is not None:
        difference = difference[mask.bool()]
    far = difference.max().item()
    print(f"{name:<44} differs by {far:.1e}")
    if not far <= BOUND:
        sys.exit(f"{name}: more than {BOUND}")
    checked.append(name)


class Here:
    """The program's side of a model: its logits for the same ids."""

    def __init__(self, binary, folder):
        self.binary, self.folder = binary, Path(folder)

    def logits(self, model, inputs, *adapters):
        save_file(inputs, self.folder / "in.safetensors")
        options = [option for adapter in adapters for option in ("--adapter", adapter)]
        out = self.folder / "out.safetensors"
        run(self.binary, "forward", "--model", model, *options,
            "--inputs", self.folder / "in.safetensors", "--output", out)
        return load_file(out)["logits"]


def there(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def theirs(here, folder):
    """HF PEFT saves, we load."""
    bert, llama = folder / "bert", folder / "llama"
    tiny.bert().save_pretrained(bert)
    tiny.llama().save_pretrained(llama)
    inputs, rows = tiny.inputs(types=True), tiny.inputs(left=True)
    near("bert", here.logits(bert, inputs), there(tiny.bert(), inputs))
    near("llama", here.logits(llama, rows), there(tiny.llama(), rows), rows["attention_mask"])
    for name, options in fixtures.ADAPTERS.items():
        model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", **options))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        model.save_pretrained(folder / name)
        near(f"from HF PEFT: {name}", here.logits(bert, inputs, folder / name), there(model, inputs))
    for name, options in {
        "llama-all-linear": dict(r=4, target_modules="all-linear"),
        "llama-embedding": dict(r=2, target_modules=["embed_tokens", "q_proj"]),
        "llama-head": dict(r=2, target_modules=["down_proj"], modules_to_save=["lm_head"]),
    }.items():
        model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", **options))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        model.save_pretrained(folder / name)
        found = here.logits(llama, rows, folder / name)
        near(f"from HF PEFT: {name}", found, there(model, rows), rows["attention_mask"])


def ours(here, folder):
    """We train and merge, HF PEFT and transformers load."""
    bert, llama = folder / "bert-of-two", folder / "llama"
    tiny.bert(labels=2).save_pretrained(bert)
    tiny.tokenizer(bert)
    tiny.tokenizer(llama)
    lines = [f"w{i % 40} w{(i * 7) % 40} w{3 if i % 2 else 5}\t{'odd' if i % 2 else 'even'}" for i in range(64)]
    table = folder / "train.tsv"
    table.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    text = folder / "train.txt"
    text.write_text("\n\n".join(" ".join(f"w{(i * j) % 80}" for j in range(20)) for i in range(24)))
    inputs, rows = tiny.inputs(types=True), tiny.inputs(left=True)
    common = ["--learning-rate", "1e-2", "--max-steps", "6", "--seed", "3"]

    for name, options in {
        "plain": ["--target-modules", "query,value"],
        "rslora": ["--target-modules", r".*attention\.self\.(query|key)", "--use-rslora"],
        "bias-all": ["--target-modules", "all-linear", "--bias", "all"],
        "bias-lora-only": ["--target-modules", "dense", "--bias", "lora_only"],
        "lora-bias": ["--target-modules", "query", "--method-option", "lora_bias=true"],
        "patterns": ["--target-modules", "query,key", "--method-option", 'rank_pattern={"key": 2}',
                     "--layers-to-transform", "1"],
        "embedding": ["--target-modules", "word_embeddings,query"],
        "dora": ["--target-modules", "query,dense", "--method-option", "use_dora=true"],
        "pissa": ["--target-modules", "query,value", "--init-lora-weights", "pissa", "--r", "4"],
        "olora": ["--target-modules", "query,value", "--init-lora-weights", "olora", "--r", "4"],
        "orthogonal": ["--target-modules", "query,value", "--init-lora-weights", "orthogonal", "--r", "4"],
        "mica": ["--target-modules", "query,value", "--init-lora-weights", "mica", "--r", "4"],
        "eva": ["--target-modules", "query,value,output.dense", "--init-lora-weights", "eva", "--r", "4"],
        "corda": ["--target-modules", "query,value", "--init-lora-weights", "corda", "--r", "4"],
        "lora_ga": ["--target-modules", "query,value", "--init-lora-weights", "lora_ga", "--r", "4", "--use-rslora"],
    }.items():
        out = folder / f"ours-{name}"
        run(here.binary, "train", "--model", bert, "--train-file", table, "--output-dir", out,
            "--per-device-train-batch-size", "8", *common, *options)
        base = AutoModelForSequenceClassification.from_pretrained(bert)
        model = PeftModel.from_pretrained(base, out)
        found = here.logits(bert, inputs, out)
        near(f"to HF PEFT: {name}", found, there(model, inputs))
        run(here.binary, "merge", "--model", bert, "--adapter", out, "--output-dir", folder / f"merged-{name}")
        merged = AutoModelForSequenceClassification.from_pretrained(folder / f"merged-{name}")
        near(f"merged, to transformers: {name}", there(merged, inputs), found)
        assert merged.config.label2id == {"even": 0, "odd": 1}, merged.config.label2id

    for name, options in {
        "llama": ["--target-modules", "all-linear", "--packing"],
        "llama-embedding": ["--target-modules", "embed_tokens,q_proj", "--init-lora-weights", "gaussian"],
    }.items():
        out = folder / f"ours-{name}"
        run(here.binary, "train", "--model", llama, "--train-file", text, "--output-dir", out,
            "--max-length", "40", *common, *options)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out)
        found = here.logits(llama, rows, out)
        near(f"to HF PEFT: {name}", found, there(model, rows), rows["attention_mask"])
        run(here.binary, "merge", "--model", llama, "--adapter", out, "--output-dir", folder / f"merged-{name}")
        merged = AutoModelForCausalLM.from_pretrained(folder / f"merged-{name}")
        near(f"merged, to transformers: {name}", there(merged, rows), found, rows["attention_mask"])


def others(here, folder):
    """Adapters of the other methods, trained here on what `ours` has laid out, in HF PEFT."""
    inputs = {"bert": tiny.inputs(types=False), "llama": tiny.inputs(left=True)}
    kinds = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
    for name, method, model, targets, options in methods.asked():
        out = folder / f"{name}-{model}"
        base = folder / {"bert": "bert-of-two", "llama": "llama"}[model]
        fields = [option for key, value in options.items() for option in ("--method-option", f"{key}={json.dumps(value)}")]
        if targets:
            fields += ["--target-modules", targets]
        file = {"bert": "train.tsv", "llama": "train.txt"}[model]
        run(here.binary, "train", "--model", base, "--train-file", folder / file, "--output-dir", out, "--method", method,
            "--max-steps", "6", "--learning-rate", "5e-3", "--seed", "3",
            "--per-device-train-batch-size", "8", *(["--max-length", "40"] if model == "llama" else []), *fields)
        loaded = PeftModel.from_pretrained(kinds[model].from_pretrained(base), out)
        expected = there(loaded, inputs[model])
        if model == "llama":
            expected = expected[:, -inputs[model]["input_ids"].shape[1]:]  # without those of virtual tokens
        near(f"to HF PEFT: {name}, {model}", here.logits(base, inputs[model], out), expected,
             inputs[model]["attention_mask"] if model == "llama" else None)


def real(here, model, adapter):
    """An adapter that was trained on a real model, on its own tokenizer's ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(64)
    texts = ["a film to remember", "two hours that felt like four", "so good , so very good , and then that end .",
             "no ."]
    encoded = tokenizer.encode_batch(texts)
    inputs = {"input_ids": torch.tensor([e.ids for e in encoded]),
              "attention_mask": torch.tensor([e.attention_mask for e in encoded])}
    labels = json.loads((Path(adapter) / "labels.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels))
    near("to HF PEFT: trained on a real model", here.logits(model, inputs, adapter),
         there(PeftModel.from_pretrained(base, adapter), inputs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        here = Here(arguments.binary, folder)
        theirs(here, Path(folder))
        ours(here, Path(folder))
        others(here, Path(folder))
        if arguments.model and arguments.adapter:
            real(here, arguments.model, arguments.adapter)
    print(f"{len(checked)} comparisons, all within {BOUND}")
