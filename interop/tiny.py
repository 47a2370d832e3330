"""Small models with random weights, the same on every run."""

import json
from pathlib import Path

import torch
from transformers import (BertConfig, BertForMaskedLM, BertForSequenceClassification, Dinov2Config,
                          Dinov2ForImageClassification, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, ViTConfig,
                          ViTForImageClassification)

VOCAB = 96


def bert_config(labels=3):
    return BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, num_labels=labels,
        initializer_range=0.3, pad_token_id=0,
    )


def bert(labels=3):
    torch.manual_seed(0)
    return shaken(BertForSequenceClassification(bert_config(labels)))


def bert_mlm():
    """Without a pooler, as all of its kind."""
    torch.manual_seed(23)
    return shaken(BertForMaskedLM(bert_config()))


def llama(**options):
    torch.manual_seed(1)
    config = LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | options)
    return shaken(LlamaForCausalLM(config))


def t5(**options):
    """Version 1.0: one table of words for encoder, decoder and output."""
    torch.manual_seed(17)
    model = T5ForConditionalGeneration(T5Config(**{
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "initializer_factor": 1.5,
    } | options))
    with torch.no_grad():
        model.shared.weight *= 0.3  # so that a word is not the likeliest to follow itself
    return shaken(model)


def t5_gated():
    """Version 1.1, whose output is a layer of its own; distances beyond 12 are one."""
    model = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=3, num_decoder_layers=2, d_kv=6,
               relative_attention_num_buckets=8, relative_attention_max_distance=12)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32) / 4)
    return model


VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4, num_labels=3,
              initializer_range=0.3)


def vit():
    torch.manual_seed(6)
    return shaken(ViTForImageClassification(ViTConfig(intermediate_size=48, **VISION)))


def dinov2():
    torch.manual_seed(7)
    return shaken(Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, layerscale_value=0.5, **VISION)))


def images(height=12, width=12):
    """As a preprocessor leaves them."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(8))


def preprocessor(folder, **said):
    """As the checkpoints have it; what the model was trained on need not be what these numbers are."""
    said = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]} | said
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def shaken(model):
    """Norms and biases that are not at their ones and zeros, so that forgetting one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def inputs(batch=3, seq=11, left=False, types=False):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 3, 6][:batch]):
        if padding:
            cut = slice(0, padding) if left else slice(seq - padding, seq)
            ids[row, cut], mask[row, cut] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if types:
        found["token_type_ids"] = (torch.arange(seq) >= seq // 2).long().expand(batch, seq).contiguous()
    return found


def tokenizer(folder, mask=False):
    """A tokenizer of whole words, with a chat template; with a mask as its last word, if asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = special + [f"w{i}" for i in range(VOCAB - len(special))]
    if mask:
        words[-1] = "[MASK]"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.save(str(Path(folder) / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "bos_token": "[CLS]",
        "eos_token": "[SEP]", "unk_token": "[UNK]",
        "chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"
                         "{% if add_generation_prompt %}assistant{% endif %}",
    }
    if mask:
        said["mask_token"] = "[MASK]"
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")


def randomize(model, mark, std=0.2, seed=3):
    """Gives every parameter whose name holds one of `mark` random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in mark):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()
