"""config.json of tiny models, by family: what each family's real configs have, in both dialects."""

from typing import Any

VOCAB = 320
"""256 bytes, 4 special tokens, 60 merges."""

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "use_cache": True,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

_QWEN3_MOE: dict[str, Any] = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 41,
    "norm_topk_prob": False,
    "head_dim": 32,
    "use_sliding_window": False,
}

_PHI3: dict[str, Any] = {
    "pad_token_id": 0,
    "original_max_position_embeddings": 96,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.9, 2.3],
    "long_factor": [1.2, 1.9, 2.5, 4.0, 9.0, 16.0],
}

_GEMMA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama31": ("Llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama_linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama_yarn": ("Llama", {"rope_scaling": _YARN}),
    # as SmolLM2: neither heads nor mlp nor vocab divide by 2
    "llama_odd": (
        "Llama",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 99,
            "vocab_size": 323,
            "tie_word_embeddings": True,
        },
    ),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "use_sliding_window": False}),
    "phi3": ("Phi3", _PHI3 | {"sliding_window": 16}),
    # as Phi-4-mini: 12 of 16 dimensions turn
    "phi4_mini": (
        "Phi3",
        _PHI3
        | {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "rope_scaling": _LONGROPE},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    # a dense layer between sparse ones, by its number; experts of odd width
    "qwen3_moe": ("Qwen3Moe", _QWEN3_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    # and by its step
    "qwen3_moe_step": ("Qwen3Moe", _QWEN3_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    # soft caps small enough to bend scores and logits
    "gemma2": (
        "Gemma2",
        _GEMMA
        | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 12.0, "num_hidden_layers": 2},
    ),
    "gemma3": (
        "Gemma3",
        _GEMMA
        | {
            "sliding_window_pattern": 3,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}
"""family -> (transformers' class stem, what it changes in the config)."""

_ODDEST = {(family, tp) for family in ("llama_odd", "qwen3_moe", "gemma3") for tp in (2, 4)}

ON_ONE = sorted({(family, 1) for family in FAMILIES} | _ODDEST)
"""Each family on one device, the oddest on larger meshes, too: the base model's steps."""

ON_SEVERAL = sorted({(family, (2, 4)[i % 2]) for i, family in enumerate(FAMILIES)} | _ODDEST)
"""Each family on a larger mesh: base rows and adapters in one batch. All families with adapters on one
device as well, and their base on all meshes, cost a minute of CI for nothing that these do not show."""

MODEL_TYPES = {"Gemma3": "gemma3_text", "Qwen3Moe": "qwen3_moe"}
"""Where it is not the class stem in lower case."""


def model_config(
    family: str, *, dialect: int = 4, dtype: str = "float32", **overrides: Any
) -> dict:
    """config.json of a family, as transformers 4 or 5 (`dialect`) writes it."""
    stem, changes = FAMILIES[family]
    config = {
        "architectures": [f"{stem}ForCausalLM"],
        "model_type": MODEL_TYPES.get(stem, stem.lower()),
        **_BASE,
        **changes,
        **overrides,
    }
    if dialect == 4:
        return config | {"torch_dtype": dtype, "transformers_version": "4.46.0"}
    rope = dict(config.pop("rope_scaling", None) or {"rope_type": "default"})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    if (local := config.pop("rope_local_base_freq", None)) is not None:
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    if (every := config.pop("sliding_window_pattern", None)) is not None:
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
    return config | {"dtype": dtype, "transformers_version": "5.0.0"}
