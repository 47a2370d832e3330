"""Configurations of HF PEFT's other methods: what the golden files and the interop check go through.

For each method: HF's configuration class, and options by a short name; `targets` is a name in TARGETS,
`models` the models if not both, `std` the size of the random values that stand for training. Widths are 32 and 48 (BERT), 16, 32 and 48 (Llama).
"""

import peft
from peft.tuners.lora import layer, variants

TARGETS = {
    "bert": {
        "two": ["query", "value"],
        "wide": ["query", "intermediate.dense"],
        "thin": ["query", "output.dense"],
        "words": ["word_embeddings", "query"],
        "all": "all-linear",
        "tokens": ["word_embeddings"],
        "norms": ["LayerNorm"],
        "norm": ["output.LayerNorm"],
        "mlp": ["key", "value", "intermediate.dense"],
    },
    "llama": {
        "two": ["q_proj", "k_proj"],
        "wide": ["v_proj", "up_proj"],
        "thin": ["o_proj", "down_proj"],
        "words": ["embed_tokens", "k_proj"],
        "all": "all-linear",
        "tokens": ["embed_tokens"],
        "norms": ["input_layernorm", "post_attention_layernorm", "norm"],
        "norm": ["post_attention_layernorm"],
        "mlp": ["k_proj", "v_proj", "down_proj"],
    },
}

METHODS = {
    "BeftConfig": {
        "beft": dict(targets="two"),
        "beft-random": dict(targets="wide", init_weights=False),
    },
    "IA3Config": {
        "ia3": dict(targets="two", feedforward_modules=[]),
        "ia3-mlp": dict(models=["bert"], targets="mlp", feedforward_modules=["intermediate.dense"], std=0.6),
        "ia3-gated-mlp": dict(models=["llama"], targets="mlp", feedforward_modules=["down_proj"], std=0.6),
        "ia3-regex": dict(targets="all", feedforward_modules=r".*layers?\.1\..*", init_ia3_weights=False, std=0.6),
    },
    "LNTuningConfig": {
        "ln-tuning": dict(targets="norms", std=0.6),
        "ln-tuning-one": dict(targets="norm"),
    },
    "TrainableTokensConfig": {
        "tokens": dict(targets="tokens", token_indices=[45, 5, 77, 2]),
        "tokens-random": dict(targets="tokens", token_indices=[5], init_weights=False),
    },
    "AdaLoraConfig": {
        "adalora": dict(targets="two", total_step=10, init_r=6, target_r=4, lora_alpha=8, lora_dropout=0.1),
        "adalora-wide": dict(targets="wide", total_step=10, init_r=3, target_r=2),
    },
    "BOFTConfig": {
        "boft": dict(targets="thin"),
        "boft-num": dict(targets="thin", boft_block_size=0, boft_block_num=4, bias="boft_only", boft_dropout=0.1),
    },
    "C3AConfig": {
        "c3a": dict(targets="wide", block_size=16),
        "c3a-pattern": dict(targets="all", block_size=8, block_size_pattern={"query": 32, "q_proj": 32}, init_weights=True,
                            bias="c3a_only"),
        "c3a-gaussian": dict(targets="thin", block_size=2, init_weights="gaussian", bias="all"),
    },
    "DeloraConfig": {
        "delora": dict(targets="two", r=4),
        "delora-patterns": dict(targets="thin", r=4, delora_lambda=6, module_dropout=0.1, bias="all",
                                rank_pattern={"query": 2}, lambda_pattern={"query": 3}),
        "delora-random": dict(targets="thin", r=4, init_weights=False, bias="delora_only"),
    },
    "FourierFTConfig": {
        "fourierft": dict(targets="two", n_frequency=40),
        "fourierft-thin": dict(targets="wide", n_frequency=6, scaling=80.0, random_loc_seed=-3, bias="all"),
        "fourierft-pattern": dict(targets="all", n_frequency=100, n_frequency_pattern={"query": 1024, "q_proj": 7},
                                  random_loc_seed=2**33 + 1, init_weights=True, bias="fourier_only"),
    },
    "GloraConfig": {
        "glora": dict(targets="two", r=4),
        "glora-vector": dict(targets="two", r=3, config_A_B="vector", config_C="vector", config_D_E="vector"),
        "glora-constant": dict(targets="wide", r=3, config_A_B="constant", config_C="none", config_D_E="constant",
                               init_weights=False),
        # Layers without a bias have nothing to train then.
        "glora-none": dict(models=["bert"], targets="thin", r=3, config_A_B="none", config_C="lora", config_D_E="vector"),
        "glora-alone": dict(targets="thin", r=3, config_C="none", config_D_E="none", bias="glora_only"),
    },
    "GraloraConfig": {
        "gralora": dict(targets="two", r=4, alpha=8, gralora_dropout=0.1),
        "gralora-hybrid": dict(targets="all", r=8, hybrid_r=3, alpha=8, gralora_k=4, bias="gralora_only"),
        "gralora-random": dict(targets="wide", r=6, gralora_k=2, init_weights=False, bias="all"),
    },
    "HiraConfig": {
        "hira": dict(targets="two", r=4, hira_dropout=0.1),
        "hira-words": dict(targets="words", r=3, init_weights="gaussian", rank_pattern={"query": 2}),
        "hira-random": dict(targets="all", r=3, init_weights=False),
    },
    "HRAConfig": {
        "hra": dict(targets="two", r=4),
        "hra-odd": dict(targets="wide", r=5, bias="all"),
        "hra-gs": dict(targets="thin", r=4, apply_GS=True, bias="hra_only"),
        "hra-random": dict(targets="two", r=6, init_weights=False),
    },
    "LoHaConfig": {
        "loha": dict(targets="two", r=4, alpha=8, rank_dropout=0.1, module_dropout=0.1),
        "loha-factored": dict(targets="all", r=2, alpha=3, rank_pattern={"key": 3}, alpha_pattern={"value": 5}),
        "loha-random": dict(targets="wide", r=3, init_weights=False),
    },
    "LoKrConfig": {
        "lokr": dict(targets="two", r=8, alpha=4),
        "lokr-thin": dict(targets="all", r=2, alpha=4, rank_dropout=0.1, rank_dropout_scale=True, module_dropout=0.1),
        "lokr-both": dict(targets="thin", r=1, alpha=2, decompose_both=True, init_weights="lycoris"),
        "lokr-factor": dict(targets="wide", r=2, alpha=2, decompose_factor=5, decompose_both=True, init_weights=False,
                            rank_pattern={"query": 3}, alpha_pattern={"query": 5}),
    },
    # Its variants; `fixtures.ADAPTERS` has LoRA itself and DoRA.
    "LoraConfig": {
        "kasa": dict(targets="two", r=4, lora_alpha=6, lora_dropout=0.1, kasa_config=dict(beta=0.01, gamma=0.0)),
        "kasa-bias": dict(models=["bert"], targets="all", r=2, use_rslora=True, lora_bias=True, kasa_config={},
                          exclude_modules=["pooler.dense"], rank_pattern={"query": 5}),
        "bdlora": dict(targets="two", r=4, lora_alpha=6, lora_dropout=0.1, use_bdlora=dict(
            target_modules_bd_a=["query", "q_proj"], target_modules_bd_b=["value", "k_proj"], nblocks=2)),
        "bdlora-some": dict(targets="wide", r=6, lora_alpha=3, init_lora_weights=False, use_bdlora=dict(
            target_modules_bd_b=["intermediate", "up_proj"], nblocks=3, match_strict=False)),
        "qalora": dict(targets="two", r=4, lora_alpha=1, use_qalora=True),
        "qalora-group": dict(targets="thin", r=3, lora_alpha=1, use_rslora=True, lora_dropout=0.1, use_qalora=True,
                             qalora_group_size=4),
        # HF PEFT looks for the invocation in causal models. The token stands in two rows of `tiny.inputs`, the pair in one.
        "alora": dict(models=["llama"], targets="two", r=4, lora_alpha=6, lora_dropout=0.1, alora_invocation_tokens=[45]),
        "alora-pair": dict(models=["llama"], targets="all", r=2, lora_bias=True, alora_invocation_tokens=[74, 79]),
        "monteclora": dict(targets="two", r=4, lora_alpha=6, lora_dropout=0.1, monteclora_config=dict(
            num_samples=4, use_entropy=True, dirichlet_prior=0.3, sample_scaler=0.01, kl_loss_weight=0.001, buffer_size=5)),
        "monteclora-bias": dict(models=["bert"], targets="wide", r=3, lora_bias=True, monteclora_config=dict(buffer_size=2)),
        "velora": dict(targets="two", r=4, lora_alpha=6, lora_dropout=0.1, velora_config=dict(num_groups=8)),
        "velora-random": dict(targets="thin", r=3, velora_config=dict(num_groups=5, scale=0.5, init_type="random")),
    },
    "MissConfig": {
        "miss": dict(targets="two", r=4, miss_dropout=0.1, bias="MiSS_only"),
        "miss-remainder": dict(targets="thin", r=5, init_weights=False, bias="all"),
        "miss-mini": dict(targets="wide", r=6, mini_r=8, init_weights="mini"),
        "miss-bat": dict(targets="wide", r=8, init_weights="bat"),
    },
    "OFTConfig": {
        # Five terms of a Neumann series of a large block turn noise into large numbers.
        "oft": dict(std=0.05, targets="two"),
        "oft-adjusted": dict(targets="thin", oft_block_size=32, bias="oft_only"),
        "oft-exact": dict(targets="thin", oft_block_size=8, use_cayley_neumann=False, bias="all"),
        "oft-r": dict(targets="thin", r=4, oft_block_size=0, module_dropout=0.1),
        "oft-share": dict(targets="thin", oft_block_size=8, block_share=True, num_cayley_neumann_terms=7),
        "oft-coft": dict(targets="two", oft_block_size=8, coft=True, eps=0.4),
        "oft-words": dict(targets="words", oft_block_size=8, num_cayley_neumann_terms=3),
    },
    "PsoftConfig": {
        "psoft": dict(targets="two", r=4),
        "psoft-all": dict(targets="thin", r=6, psoft_alpha=8, psoft_dropout=0.1, ab_svd_init="pissa_init"),
        "psoft-free": dict(targets="two", r=4, psoft_orth=False, psoft_mag_b=False),
        "psoft-neumann": dict(targets="two", r=4, use_cayley_neumann=True, num_cayley_neumann_terms=6,
                              cayley_neumann_eps=0.3, psoft_mag_a=False),
    },
    "PveraConfig": {
        "pvera": dict(targets="wide", r=8, bias="pvera_only"),
        "pvera-key": dict(targets="thin", r=5, save_projection=False, projection_prng_key=7, d_initial=0.3,
                          pvera_dropout=0.1, generator_seed=3),
    },
    "RandLoraConfig": {
        "randlora": dict(targets="wide", r=5, randlora_alpha=10, bias="randlora_only"),
        "randlora-key": dict(targets="wide", r=4, randlora_alpha=8, save_projection=False, projection_prng_key=3,
                             randlora_dropout=0.1),
        "randlora-sparse": dict(targets="thin", r=4, randlora_alpha=8, sparse=True, save_projection=False),
        "randlora-very": dict(targets="thin", r=4, randlora_alpha=8, very_sparse=True, save_projection=False),
    },
    "RoadConfig": {
        "road-1": dict(targets="wide", group_size=8),
        "road-2": dict(targets="wide", variant="road_2", group_size=16),
        "road-4": dict(targets="wide", variant="road_4", group_size=4, init_weights=False),
    },
    "ShiraConfig": {
        "shira": dict(targets="two", r=2),
        "shira-seed": dict(targets="thin", r=5, random_seed=42, init_weights=False),
    },
    "TinyLoraConfig": {
        "tinylora": dict(targets="words", r=2, u=13),
        "tinylora-tied": dict(targets="thin", r=3, u=7, weight_tying=0.6, init_weights="uniform", init_v_bound=0.1,
                              bias="tinylora_only"),
        "tinylora-key": dict(targets="words", r=2, u=2, weight_tying=1.0, save_projection=False, projection_seed=5,
                             tinylora_dropout=0.1),
    },
    "VBLoRAConfig": {
        "vblora": dict(targets="wide", r=3, num_vectors=10, vector_length=16, topk=2, vblora_dropout=0.1),
        "vblora-bias": dict(targets="thin", r=2, num_vectors=300, vector_length=8, topk=3, bias="vblora_only",
                            init_vector_bank_bound=0.5, init_logits_std=0.3),
        "vblora-topk": dict(targets="two", r=2, num_vectors=12, vector_length=8, topk=3, save_only_topk_weights=True),
    },
    "VeraConfig": {
        "vera": dict(targets="wide", r=8, bias="vera_only"),
        "vera-key": dict(targets="thin", r=5, save_projection=False, projection_prng_key=7, d_initial=0.3,
                         vera_dropout=0.1),
    },
    "WaveFTConfig": {
        "waveft": dict(targets="wide", n_frequency=60),
        "waveft-sym4": dict(targets="thin", n_frequency=90, scaling=10.0, wavelet_family="sym4", random_loc_seed=5,
                            bias="waveft_only"),
        "waveft-direct": dict(targets="wide", n_frequency=70, use_idwt=False, init_weights=False, bias="all"),
        "waveft-proportional": dict(targets="all", n_frequency=55, wavelet_family="coif2", proportional_parameters=True),
    },
}

# What stands in front of a sequence has no layers to choose.
PROMPTS = {
    "AdaptionPromptConfig": {
        "adaption_prompt": dict(models=["llama"], adapter_len=4, adapter_layers=2),
        "adaption_prompt-top": dict(models=["llama"], adapter_len=3, adapter_layers=1),
    },
    "PrefixTuningConfig": {
        "prefix_tuning": dict(num_virtual_tokens=4),
        "prefix_tuning-projection": dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12),
        "prefix_tuning-zero": dict(num_virtual_tokens=2, init_weights="zero"),
    },
    "PromptEncoderConfig": {
        "p_tuning": dict(num_virtual_tokens=4),
        "p_tuning-lstm": dict(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=12,
                              encoder_dropout=0.1),
    },
    "PromptTuningConfig": {
        "prompt_tuning": dict(num_virtual_tokens=4),
        "prompt_tuning-vocab": dict(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
        "prompt_tuning-text": dict(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="w3 w17 w5"),
    },
}

# On a convolution over an image (3 to 6 channels, 3 x 3) and one over time (6 to 8, 2).
IMAGE, BOTH = ["conv1"], ["conv1", "conv2"]
CONVOLUTIONS = {
    "AdaLoraConfig": {"adalora": dict(target_modules=IMAGE, total_step=10, init_r=4, target_r=2)},
    "BOFTConfig": {"boft": dict(target_modules=IMAGE, boft_block_size=3, boft_n_butterfly_factor=1)},
    "HiraConfig": {"hira": dict(target_modules=BOTH, r=3)},
    "IA3Config": {
        "ia3": dict(target_modules=IMAGE, feedforward_modules=[]),
        "ia3-inputs": dict(target_modules=IMAGE, feedforward_modules=IMAGE),
    },
    "HRAConfig": {"hra": dict(target_modules=IMAGE, r=4), "hra-gs": dict(target_modules=IMAGE, r=4, apply_GS=True)},
    "LoHaConfig": {
        "loha": dict(target_modules=BOTH, r=3, alpha=6),
        "loha-effective": dict(target_modules=BOTH, r=3, alpha=6, use_effective_conv2d=True),
    },
    "LoKrConfig": {
        "lokr": dict(target_modules=BOTH, r=2, alpha=4),
        "lokr-effective": dict(target_modules=BOTH, r=2, alpha=4, use_effective_conv2d=True, decompose_both=True),
    },
    "LoraConfig": {
        "lora": dict(target_modules=BOTH, r=2, lora_alpha=3),
        "dora": dict(target_modules=BOTH, r=2, lora_alpha=3, use_dora=True),
    },
    "OFTConfig": {"oft": dict(target_modules=IMAGE, oft_block_size=9, bias="oft_only")},
}


def pooled_over_floats():
    """HF PEFT has QA-LoRA over GPTQ layers alone. Its code asks nothing of them, and is shown layers of floats here."""
    resolve = layer.Linear.resolve_lora_variant

    def resolved(self, *, config, **more):
        return variants.QALoraLinearVariant() if config.use_qalora else resolve(self, config=config, **more)

    layer.Linear.resolve_lora_variant = resolved


pooled_over_floats()


def convolutions():
    """(name, HF's configuration)."""
    for kind, options in CONVOLUTIONS.items():
        for name, own in options.items():
            yield name, getattr(peft, kind)(modules_to_save=["head"], **own)


def asked():
    """(name, method, model, targets, options): what the program is asked for to make the same adapters."""
    for kind, options in METHODS.items():
        if kind == "PsoftConfig":
            continue  # its function depends on the signs of the reader's SVD, unless the reader takes ours
        for name, own in options.items():
            own = {key: value for key, value in own.items() if key not in ["std", "models"]}
            targets = own.pop("targets")
            if kind == "HiraConfig":
                own.pop("rank_pattern", None)  # HF PEFT has the field and does nothing with it
            method = str(getattr(peft, kind)(**own).peft_type.value)
            # HF PEFT trains no classifier beside trainable tokens.
            fitting = ["llama"] if kind == "TrainableTokensConfig" else ["bert", "llama"]
            for model in options[name].get("models", fitting):
                places = TARGETS[model][targets]
                yield name, method, model, places if isinstance(places, str) else ",".join(places), own
    for kind, options in PROMPTS.items():
        for name, own in options.items():
            own = {key: value for key, value in own.items() if key != "models"}
            method = PROMPT_TYPES[kind]
            for model in options[name].get("models", ["bert", "llama"]):
                yield name, method, model, None, own


PROMPT_TYPES = {"AdaptionPromptConfig": "ADAPTION_PROMPT", "PrefixTuningConfig": "PREFIX_TUNING",
                "PromptEncoderConfig": "P_TUNING", "PromptTuningConfig": "PROMPT_TUNING"}


def prompts(tokenizers):
    """(name, HF's configuration, model); `tokenizers` is the folder with one in a folder for each model."""
    for kind, options in PROMPTS.items():
        for name, own in options.items():
            own = dict(own)
            for model in own.pop("models", ["bert", "llama"]):
                task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[model]
                text = own.get("prompt_tuning_init") == "TEXT"
                more = {"tokenizer_name_or_path": str(tokenizers / model)} if text else {}
                yield f"{name}-{model}", getattr(peft, kind)(task_type=task, **own, **more), model


def configurations():
    """(name, HF's configuration, model, size of the random values)."""
    for kind, options in METHODS.items():
        for name, own in options.items():
            own = dict(own)
            targets, std = own.pop("targets"), own.pop("std", 0.2)
            for model in own.pop("models", ["bert", "llama"]):
                task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[model]
                places = TARGETS[model][targets]
                yield f"{name}-{model}", getattr(peft, kind)(task_type=task, target_modules=places, **own), model, std
