"""Vision transformers: logits, adapters over them, and what a preprocessor makes of images."""

import json
import re
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, gelu, linear
from transformers import BitImageProcessorPil, ViTImageProcessorPil

import tiny

MODELS = {"vit": tiny.vit, "dinov2": tiny.dinov2}
# transformers 5 names modules anew and checkpoints as before; HF PEFT under it takes the modules' names for its
# files, under every version before it those of checkpoints, which are ours.
NAMES = [(r"vit\.layers", "vit.encoder.layer"), (r"attention\.q_proj", "attention.attention.query"),
         (r"attention\.k_proj", "attention.attention.key"), (r"attention\.v_proj", "attention.attention.value"),
         (r"attention\.o_proj", "attention.output.dense"), (r"(vit\..*)mlp\.fc1", r"\1intermediate.dense"),
         (r"(vit\..*)mlp\.fc2", r"\1output.dense")]


def checkpoint_name(name):
    for new, old in NAMES:
        name = re.sub(new, old, name)
    return name


def models(root, golden):
    for name, make in MODELS.items():
        folder, model = root / "models" / name, make()
        model.save_pretrained(folder)
        interpolated = {"interpolate_pos_encoding": True} if name == "vit" else {}
        images, others = tiny.images(), tiny.images(20, 16)
        with torch.no_grad():
            golden(folder, {"pixel_values": images, "logits": model(images).logits, "other_pixel_values": others,
                            "other_logits": model(others, **interpolated).logits})
    tiny.preprocessor(root / "models" / "vit", resample=2, size={"height": 12, "width": 12})
    tiny.preprocessor(root / "models" / "dinov2", resample=3, size={"shortest_edge": 16}, do_center_crop=True,
                      crop_size={"height": 12, "width": 12}, do_convert_rgb=True)


def adapters(root, write_adapter):
    for name, make in MODELS.items():
        places = ["q_proj", "v_proj", "fc1", "projection"]
        config = LoraConfig(r=4, lora_alpha=6, target_modules=places, modules_to_save=["classifier"])
        model = get_peft_model(make(), config)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        tiny.randomize(model, trained)
        with torch.no_grad():
            logits = model(tiny.images()).logits
        wide = "intermediate.dense" if name == "vit" else "fc1"
        model.peft_config["default"].target_modules = ["query", "value", wide, "projection"]
        write_adapter(f"lora-{name}", model, {"logits": logits}, f"../../models/{name}", "vision")
        path = root / "vision" / f"lora-{name}" / "adapter_model.safetensors"
        renamed = {checkpoint_name(key): tensor for key, tensor in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})


def convpass(root, golden):
    """Convpass over the patches of images that are no squares: the paper's formula in hooks, by PyTorch's convolution."""
    hidden, r, scaling = 32, 3, 0.5
    images, count = tiny.images(20, 16), 5 * 4
    for name, make in MODELS.items():
        generator = torch.Generator().manual_seed(9)
        draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)
        model, tensors = make(), {}
        for at, block in enumerate(model.vit.layers if name == "vit" else model.dinov2.encoder.layer):
            before, after = (block.layernorm_before, block.layernorm_after) if name == "vit" else (block.norm1, block.norm2)
            given = (block.attention.o_proj, block.mlp.fc2) if name == "vit" else (block.layer_scale1, block.layer_scale2)
            names = ("attention.output", "output") if name == "vit" else ("layer_scale1", "layer_scale2")
            for norm, module, place in zip((before, after), given, names):
                down, d, up, u, conv, b = draw(r, hidden), draw(r), draw(hidden, r), draw(hidden), draw(r, r, 3, 3), draw(r)
                whole = conv.clone()
                whole[:, :, 1, 1] += torch.eye(r)
                read = {}
                norm.register_forward_pre_hook(lambda _, args, read=read: read.update(x=args[0]))

                def hook(_module, _args, y, read=read, down=down, d=d, up=up, u=u, whole=whole, b=b):
                    z = gelu(linear(read["x"], down, d)).transpose(1, 2)
                    picture = conv2d(z[..., 1:].unflatten(2, (5, 4)), whole, b, padding=1).flatten(2)
                    alone = conv2d(z[..., :1, None], whole, b, padding=1).flatten(2)
                    mixed = torch.cat([alone, picture], 2).transpose(1, 2)
                    assert mixed.shape[1] == 1 + count
                    return y + scaling * linear(gelu(mixed), up, u)

                module.register_forward_hook(hook)
                path = f"base_model.model.{name}.encoder.layer.{at}.{place}"
                taps = conv.permute(2, 3, 1, 0).reshape(9, r, r).contiguous()
                tensors |= {f"{path}.{key}": tensor for key, tensor in [
                    ("adapter_down.weight", down), ("adapter_down.bias", d), ("adapter_up.weight", up), ("adapter_up.bias", u),
                    ("adapter_conv.weight", taps), ("adapter_conv.bias", b)]}
        with torch.no_grad():
            logits = model(images, **({"interpolate_pos_encoding": True} if name == "vit" else {})).logits
        folder = root / "vision" / f"convpass-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = ["attention.output", "output"] if name == "vit" else ["layer_scale1", "layer_scale2"]
        config = dict(peft_type="CONVPASS", r=r, non_linearity="gelu", scaling=scaling, image=True, target_modules=targets,
                      task_type=None, inference_mode=True, base_model_name_or_path=f"../../models/{name}")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        golden(folder, {"logits": logits})


def preprocessing(root, golden):
    """Resizing and all that follows, of images wider and higher, larger and smaller than what is asked; of sizes at
    which Pillow 13 begins with the width, as those before it always do."""
    for name, kind in [("vit", ViTImageProcessorPil), ("dinov2", BitImageProcessorPil)]:
        processor, tensors = kind.from_pretrained(root / "models" / name), {}
        for height, width in [(28, 28), (9, 31), (24, 18), (12, 12)]:
            generator = torch.Generator().manual_seed(height)
            image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
            made = processor(image.numpy(), return_tensors="pt", input_data_format="channels_last")
            tensors |= {f"image.{height}x{width}": image, f"pixel_values.{height}x{width}": made["pixel_values"][0]}
        folder = root / "vision" / f"preprocessing-{name}"
        folder.mkdir(parents=True)
        golden(folder, tensors)


def write(root, golden, write_adapter):
    shutil.rmtree(root / "vision", ignore_errors=True)
    models(root, golden)
    adapters(root, write_adapter)
    convpass(root, golden)
    preprocessing(root, golden)
