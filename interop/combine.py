"""Combinations of LoRAs by HF PEFT's `add_weighted_adapter`, for the tests to compare with.

Each group is some adapters over one model and cases of rules over them. A golden file holds, by case and
layer, the factors `A` and `B` of the result and its scale; `torch.bernoulli` draws from a generator that is
seeded anew for each case.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import tiny

SEED = 11
# The options of a case by the words of its name.
RULES = [
    ("linear", {}), ("cat", {}), ("svd", {}), ("svd", {"svd_rank": 2}),
    ("ties", {"density": 0.5}), ("ties", {"density": 0.3, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.5, "svd_rank": 3}),
    ("ties_svd", {"density": 0.3, "majority_sign_method": "frequency", "svd_rank": 3}),
    ("dare_linear", {"density": 0.6}), ("dare_linear_svd", {"density": 0.6, "svd_rank": 2}),
    ("dare_ties", {"density": 0.6}), ("dare_ties_svd", {"density": 0.6, "svd_rank": 3}),
    ("magnitude_prune", {"density": 0.4}), ("magnitude_prune_svd", {"density": 0.4}),
]
FEW = [("cat", {}), ("svd", {}), ("ties_svd", {"density": 0.5})]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        return self.point(self.image(x))


BERT = dict(modules=tiny.bert, weights=[0.7, -0.4])
GROUPS = {
    # Equal ranks, for the rules over factors; places that only one has; a table of words.
    "equal": BERT | dict(rules=RULES, adapters=[
        dict(r=4, lora_alpha=8, target_modules=["query", "word_embeddings"]),
        dict(r=4, lora_alpha=6, target_modules=["query", "value", "word_embeddings"]),
    ]),
    "three": BERT | dict(rules=RULES, weights=[0.5, 1.5, -0.8], adapters=[
        dict(r=3, lora_alpha=8, target_modules=["query"]),
        dict(r=3, lora_alpha=2, target_modules=["query"]),
        dict(r=3, lora_alpha=5, target_modules=["query"], use_rslora=True),
    ]),
    # The result is an rsLoRA because the first one is.
    "rslora": BERT | dict(rules=RULES, adapters=[
        dict(r=4, lora_alpha=8, target_modules=["query"], use_rslora=True),
        dict(r=4, lora_alpha=6, target_modules=["query", "value"]),
    ]),
    "uneven": BERT | dict(rules=FEW, adapters=[
        dict(r=2, lora_alpha=8, target_modules=["query", "key"], rank_pattern={"query": 5}),
        dict(r=3, lora_alpha=6, target_modules=["query", "value"], alpha_pattern={"query": 9}),
    ]),
    "alone": BERT | dict(rules=[("ties", {"density": 0.5}), ("svd", {})], weights=[-0.6], adapters=[
        dict(r=3, lora_alpha=8, target_modules=["query"]),
    ]),
    "convolutions": dict(modules=Convolutions, weights=[0.7, 0.6], adapters=[
        dict(r=2, lora_alpha=8, target_modules=["image", "point"]),
        dict(r=2, lora_alpha=6, target_modules=["image"]),
    ], rules=RULES),
}


def factors(model, case):
    """What the result holds at each layer."""
    found = {}
    for name, module in model.named_modules():
        for kind in ["lora", "lora_embedding"]:
            suffix = "" if kind == "lora_embedding" else ".weight"
            held = dict(getattr(module, f"{kind}_A", {}).items()) if hasattr(module, "scaling") else {}
            if "made" in held:
                path = name.removeprefix("base_model.model.")
                get = lambda side: getattr(module, f"{kind}_{side}")["made"]
                a, b = (get(side) if not suffix else get(side).weight for side in "AB")
                found[f"{case}/{path}/A"] = a.data.clone().contiguous()
                found[f"{case}/{path}/B"] = b.data.clone().contiguous()
                found[f"{case}/{path}/scaling"] = torch.tensor([float(module.scaling["made"])])
    return found


def case_name(rule, options):
    words = [rule, *(f"{key}={value}" for key, value in options.items())]
    return " ".join(words)


def well_cut(svd, name, case, rank):
    """`svd`, refusing a cut between two singular values that are nearly equal: what lies on either side of it
    is decided by rounding then, and the golden numbers would be one library's noise. An error of `ε` in the
    matrix is `ε·σ / gap` in the result, which at this bound leaves the tests' 1e-5."""
    def checked(matrix, **options):
        found = svd(matrix, **options)
        values = found[1].detach()
        if rank < len(values) and values[rank - 1] > 1e-5 * values[0]:
            gap = 1 - float(values[rank] / values[rank - 1])
            assert gap > 0.03, f"{name} {case}: the gap at rank {rank} is {gap:.1e} of the value; take another rank"
        return found
    return checked


def write(root):
    draw, svd = torch.bernoulli, torch.linalg.svd
    for name, group in GROUPS.items():
        torch.manual_seed(6)
        configs = {f"part{i}": LoraConfig(**options) for i, options in enumerate(group["adapters"])}
        first, *others = configs
        model = get_peft_model(group["modules"](), configs[first], adapter_name=first)
        for other in others:
            model.add_adapter(other, configs[other])
        for i, part in enumerate(configs):
            tiny.randomize(model, [f".{part}."], seed=20 + i)
            tiny.randomize(model, [f".lora_embedding_A.{part}", f".lora_embedding_B.{part}"], seed=30 + i)
        folder = root / "combine" / name
        save(model, folder, configs)
        golden = {}
        for rule, options in group["rules"]:
            generator = torch.Generator().manual_seed(SEED)
            torch.bernoulli = lambda p: draw(p, generator=generator)
            rank = options.get("svd_rank") or max(max(c.r, *c.rank_pattern.values(), 0) for c in configs.values())
            torch.linalg.svd = well_cut(svd, name, case_name(rule, options), rank)
            model.add_weighted_adapter(list(configs), group["weights"], "made", combination_type=rule, **options)
            torch.bernoulli, torch.linalg.svd = draw, svd
            golden |= factors(model, case_name(rule, options))
            model.delete_adapter("made")
        golden["weights"] = torch.tensor(group["weights"], dtype=torch.float64)
        save_file(golden, folder / "golden.safetensors")


def save(model, folder, configs):
    for config in configs.values():
        config.base_model_name_or_path = None
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    for part in configs:
        path = folder / part / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"].sort()  # written out of a set
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


if __name__ == "__main__":
    write(Path(__file__).resolve().parent.parent / "fixtures")
