"""T5, an encoder with a decoder: logits, loss and texts, and adapters over it."""

import shutil

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.t5.modeling_t5 import T5Attention

import tiny

MODELS = {"t5": tiny.t5, "t5-gated": tiny.t5_gated}
ADAPTERS = {
    "lora-t5": ("t5", dict(r=4, lora_alpha=6, target_modules=["q", "v"])),
    "lora-t5-gated": ("t5-gated", dict(r=3, lora_alpha=6, target_modules="all-linear")),
    "lora-cross-t5-gated": ("t5-gated", dict(r=4, target_modules=r"decoder.*EncDecAttention\.(k|o)",
                                             modules_to_save=["lm_head"])),
}


def inputs(name):
    """Padded on the right or on the left, as T5 takes both; answers end in what is not learnt."""
    found = tiny.inputs(left=name != "t5")
    labels = torch.randint(2, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(10))
    labels[1, 5:], labels[2, 3:] = -100, -100
    return found | {"labels": labels}


def models(root, golden):
    for name, make in MODELS.items():
        folder, model = root / "models" / name, make()
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        read = inputs(name)
        with torch.no_grad():
            output = model(**read)
        prompt = read["input_ids"][:1]
        grown = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                               decoder_start_token_id=0)
        tensors = read | {"logits": output.logits, "loss": output.loss[None], "generated": grown[:, 1:],
                          "decoder_input_ids": model._shift_right(read["labels"])}
        if name == "t5":
            offsets = torch.arange(-200, 201)
            for both_ways in [True, False]:
                rows = T5Attention._relative_position_bucket(offsets, bidirectional=both_ways)
                tensors[f"buckets.{'both_ways' if both_ways else 'backwards'}"] = rows
        golden(folder, tensors)
        tiny.tokenizer(folder)


def adapters(root, write_adapter):
    for name, (base, options) in ADAPTERS.items():
        model = get_peft_model(MODELS[base](), LoraConfig(task_type="SEQ_2_SEQ_LM", **options))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        with torch.no_grad():
            logits = model(**inputs(base)).logits
        write_adapter(name, model, {"logits": logits}, f"../../models/{base}", "seq2seq")


def write(root, golden, write_adapter):
    shutil.rmtree(root / "seq2seq", ignore_errors=True)
    models(root, golden)
    adapters(root, write_adapter)
