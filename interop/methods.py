"""Configurations of HF PEFT's other methods: what the golden files and the interop check go through.

Each entry: name, configuration class, options for both models, options of the program that ask for the
same. Widths are 32 and 48 (BERT), 16, 32 and 48 (Llama).
"""

import peft

PLACES = {"bert": ["query", "intermediate.dense"], "llama": ["k_proj", "down_proj"]}


def configurations():
    """(name, method, configuration of the model, model)."""
    for name, (kind, options) in METHODS.items():
        for model in ["bert", "llama"]:
            own = options.get(model, {}) if any(key in options for key in PLACES) else options
            own = {"target_modules": PLACES[model]} | own
            task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[model]
            yield f"{name}-{model}", getattr(peft, kind)(task_type=task, **own), model


METHODS = {
}
