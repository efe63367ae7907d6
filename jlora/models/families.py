"""What each architecture's own code decides where `config.json` is silent: one table, pure data.

This is the only place that knows architectures by name; the decoder sees a `ModelConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one architecture that no key of config.json tells."""

    model_type: str
    """`model_type` of its config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The values that transformers takes for absent keys."""
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    """Projection group -> True: it always has biases; a string: the key of config.json that
    decides. Other groups have none."""
    qk_norm: bool = False
    """q and k are RMS-normalised per head before rope."""
    windows: Literal["never", "always", "switched", "upper_layers", "pattern"] = "never"
    """Where sliding_window holds: in all layers; in all if use_sliding_window; in those from
    max_window_layers on if use_sliding_window; in all but each sliding_window_pattern-th."""
    gemma: bool = False
    """Gemma's block: norms multiply by 1 + weight, follow attention and MLP too, the embedding is
    scaled by the root of its width, and the keys have Gemma's names."""
    local_rope: bool = False
    """Layers with a window have a rope base of their own, rope_local_base_freq."""
    partial_rotary: bool = False
    """partial_rotary_factor holds."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Rope types that this architecture takes for another one."""
    experts: tuple[str, tuple[str, str, str]] | None = None
    """Where layers are sparse: the module of router and experts, and an expert's gate, up and down."""
    fused: bool = False
    """q, k and v are one tensor in the checkpoint, and gate and up are."""


_LLAMA_EOS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_ATTENTION_BIAS = {"qkv": "attention_bias", "o": "attention_bias"}
_GEMMA: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults={"max_position_embeddings": 2048, **_LLAMA_EOS},
        biases=_ATTENTION_BIAS | {"gate_up": "mlp_bias", "down": "mlp_bias"},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            **_LLAMA_EOS,
        },
        windows="always",
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2", defaults=_QWEN, biases={"qkv": True}, windows="upper_layers"
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults=_QWEN | {"head_dim": 128},
        biases=_ATTENTION_BIAS,
        qk_norm=True,
        windows="upper_layers",
    ),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            **_LLAMA_EOS,
        },
        windows="always",
        experts=("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        biases=_ATTENTION_BIAS,
        qk_norm=True,
        windows="switched",
        experts=("mlp", ("gate_proj", "up_proj", "down_proj")),
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        windows="always",
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        fused=True,
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        biases=_ATTENTION_BIAS,
        windows="pattern",
        gemma=True,
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        defaults=_GEMMA
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        biases=_ATTENTION_BIAS,
        qk_norm=True,
        windows="pattern",
        gemma=True,
        local_rope=True,
    ),
}
"""Architectures that are served, by transformers' class name."""

MULTIMODAL: dict[str, str] = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architectures of which the text part is served: the class that the part alone would have."""
