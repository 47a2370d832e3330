"""Tokens routed among LoRAs by HF PEFT's `create_arrow_model`, for the tests to compare with."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors.torch import save_file

import combine
import tiny

PARTS = ["task0", "task1", "task2", "general0", "general1"]
CASES = {
    "two": dict(top_k=2, router_temperature=0.3),
    "one": dict(top_k=1),
    "known": dict(top_k=2, use_gks=True),
}


def write(root):
    folder = root / "arrow"
    configs = {part: LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=4 + i, target_modules=["q_proj", "down_proj"])
               for i, part in enumerate(PARTS)}
    first, *others = configs
    model = get_peft_model(tiny.llama(), configs[first], adapter_name=first)
    for other in others:
        model.add_adapter(other, configs[other])
    for i, part in enumerate(configs):
        tiny.randomize(model, [f".{part}."], 0.3, seed=40 + i)
    combine.save(model, folder, configs)
    paths = [str(folder / part) for part in PARTS]
    golden = {}
    for name, options in CASES.items():
        general = paths[3:] if options.get("use_gks") else None
        routed = create_arrow_model(tiny.llama(), paths[:3], ArrowConfig(rng_seed=7, **options), general)
        with torch.no_grad():
            golden[name] = routed.eval()(**tiny.inputs(left=True)).logits
    save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent.parent / "fixtures")
