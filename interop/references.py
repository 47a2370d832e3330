"""What `compare.py` trains where HF PEFT has no such method: its formula in plain torch, over `transformers`' BERT.

Each function takes the model, the places' names, the method's options, and what must be known of the data. It gives back the
masks over the gradients of the model's own parameters, by name; parameters that it adds are trained whole.
"""

import torch
from torch.nn.functional import gelu, relu, silu

import selective as masks
from hidden_formulas import BOTTLENECK, Place, places


def selective(model, targets, options, data):
    """BitFit, FishMask, LT-SFT and their kin: the model's own numbers, of which a mask lets some be trained."""
    case = options | {"peft_type": data.method.upper(), "target_modules": targets}
    return masks.mask(model, case, data.examples, data.batches, saved=["classifier"])


def bottleneck(model, targets, options, _data):
    """`y' = y + s·(f(h·D + d)·U + u)` at sublayers: `y` before the residual `x` is added, `h` one of y, x, LN(x + y)."""
    options = BOTTLENECK | options
    unknown = {"ln_before", "dropout", "stochastic_depth"} & {name for name, value in options.items() if value}
    if unknown or not isinstance(options["scaling"], (int, float)):
        raise SystemExit(f"the plain bottleneck adapter has none of {sorted(unknown) or ['trained scaling']}")
    f = {"relu": relu, "swish": silu, "gelu": gelu}[options["non_linearity"]]
    width, s = model.config.hidden_size, options["scaling"]
    found = 0
    for place in places(model, "bert", ["attention", "mlp"], range(model.config.num_hidden_layers)):
        if not masks.matches(place.path, targets):
            continue
        found += 1
        module, r = model.get_submodule(place.path), round(width / options["reduction_factor"])
        module.adapter_down, module.adapter_up = torch.nn.Linear(width, r), torch.nn.Linear(r, width)

        def difference(x, y, place=place, module=module):
            h = x if options["is_parallel"] else place.norm(x + y) if options["original_ln_before"] else y
            return s * module.adapter_up(f(module.adapter_down(h)))

        place.add(difference)
    if not found:
        raise SystemExit(f"no sublayer is called {targets}")
    return {}
