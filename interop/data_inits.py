"""Inits of LoRA that look at data, as HF PEFT computes them: written by fixtures.py."""

import json

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.loftq_utils import _low_rank_decomposition

import tiny

PLACES = ["q_proj", "v_proj", "down_proj"]


def data():
    """Six texts of different lengths, padded on the left; nothing is learnt in their first words."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, tiny.VOCAB, (6, 14), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, padding in enumerate([0, 2, 5, 0, 1, 3]):
        ids[row, :padding], mask[row, :padding] = 0, 0
        labels[row, : padding + 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def factors(model):
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            path, factor = name.removeprefix("base_model.model.").split(".lora_")
            found[f"{path}.lora_{factor[0]}"] = parameter
    return found


def eva(options):
    model = get_peft_model(tiny.llama(), LoraConfig(init_lora_weights="eva", **options))
    # HF masks the position of a learnt token, this library the one that predicts it.
    inputs = data()
    learnt = torch.full_like(inputs["labels"], -100)
    learnt[:, :-1] = inputs["labels"][:, 1:]
    initialize_lora_eva_weights(model, [inputs | {"labels": learnt}], show_progress_bar=False)
    config = model.peft_config["default"]
    decided = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    return model, decided


def corda(options):
    base, config = tiny.llama(), LoraConfig(init_lora_weights="corda", **options)
    inputs = data()

    @torch.no_grad()
    def run():
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
            base(ids[mask.bool()][None])

    preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config), {}


def lora_ga(options):
    base, config = tiny.llama(), LoraConfig(init_lora_weights="lora_ga", **options)
    inputs = data()

    def step():
        for half in [slice(0, 3), slice(3, 6)]:
            base(**{name: tensor[half] for name, tensor in inputs.items()}).loss.backward()

    preprocess_loraga(base, config, step)
    return get_peft_model(base, config), {}


CASES = {
    # Twice the directions that are asked for are all there are: what HF's random projection sees is then exact.
    "eva": (eva, dict(r=8, lora_alpha=6, eva_config=EvaConfig(rho=2.0))),
    # No two of these places share their inputs: HF divides twice where they do.
    "eva-plain": (eva, dict(r=16, target_modules=["q_proj", "o_proj", "down_proj"],
                            eva_config=EvaConfig(rho=1.0, use_label_mask=False, whiten=True))),
    "corda-ipm": (corda, dict(r=4, lora_alpha=6, corda_config=CordaConfig(corda_method="ipm"))),
    "corda-kpm": (corda, dict(r=4, rank_pattern={"down_proj": 2}, corda_config=CordaConfig(corda_method="kpm"))),
    # Four times as many, here.
    "lora_ga": (lora_ga, dict(r=8, lora_alpha=12, lora_ga_config=LoraGAConfig())),
    "lora_ga-svd": (lora_ga, dict(r=8, lora_ga_config=LoraGAConfig(direction="ArBr", scale="weight_svd"))),
    "lora_ga-gd": (lora_ga, dict(r=8, lora_alpha=12, use_rslora=True,
                                 lora_ga_config=LoraGAConfig(direction="A2rBr", scale="gd_scale"))),
}


def loftq(bits=3, r=4, rounds=4):
    """HF PEFT's loop of LoftQ (it wants bitsandbytes and CUDA) with its own decomposition, and integers with one
    scale for each output in place of NF4."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(12))
    left = weight
    for _ in range(rounds):
        scale = left.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        quantized = (left / scale).round() * scale
        found = _low_rank_decomposition(weight - quantized, reduced_rank=r)
        left = weight - found["L"] @ found["R"]
    return {"weight": weight, "quantized": quantized, "product": found["L"] @ found["R"]}


def plain(value):
    return vars(value) if hasattr(value, "__dataclass_fields__") else value


def write(root, golden):
    """`golden(folder, tensors)` writes tensors."""
    for name, (make, options) in CASES.items():
        torch.manual_seed(6)
        folder = root / "inits" / name
        folder.mkdir(parents=True)
        options = {"target_modules": PLACES} | options
        model, decided = make(dict(options, task_type="CAUSAL_LM"))
        asked = {key: plain(value) for key, value in options.items()}
        asked |= {"init_lora_weights": make.__name__}
        said = {"asked": asked, "decided": decided}
        (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        golden(folder, factors(model))
    folder = root / "inits" / "data"
    folder.mkdir()
    golden(folder, data())
    folder = root / "inits" / "loftq"
    folder.mkdir()
    golden(folder, loftq())
