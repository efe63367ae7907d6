"""Facts about a base model, read from its `config.json`: `ModelConfig` and the projection table.

Reads what transformers 4 and 5 write. Features come from the file's own fields, never from a
model's name; what the decoder cannot compute exactly is refused by name. No jax here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.errors import ModelError
from jlora.models.rope import ROPE_KINDS, RopeConfig
from jlora.models.rope import rope_frequencies as rope_frequencies

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections that share an input, in the order in which their outputs are fused."""

VOCAB_GROUPS: dict[str, tuple[str, ...]] = {"embed": ("embed_tokens",), "head": ("lm_head",)}
"""What adapters may change beside the layers: a linear map from tokens, and one to tokens."""

ALL_GROUPS = GROUPS | VOCAB_GROUPS

PROJECTIONS: tuple[str, ...] = tuple(part for parts in GROUPS.values() for part in parts)
"""The seven projections of a layer, by their checkpoint names."""

DTYPES = ("float32", "bfloat16", "float16")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
"""Architectures we serve, each with the values that transformers takes for absent keys."""

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def group_of(projection: str) -> str:
    """The group that a projection belongs to: `group_of("k_proj") == "qkv"`."""
    for group, parts in GROUPS.items():
        if projection in parts:
            return group
    raise KeyError(projection)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All facts of one base model. Hashable: it can be a static argument of a jitted function."""

    name: str
    """Folder name (of a hub cache: the repository), else `_name_or_path`; used in messages."""
    architecture: str
    """transformers' class name, such as "LlamaForCausalLM"."""
    vocab: int
    """Rows of the embedding."""
    embed: int
    """Width of the residual stream."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; divides `heads`."""
    head_dim: int
    """Width of a head; heads · head_dim need not be `embed`."""
    mlp: int
    """Hidden width of the gated MLP."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope: RopeConfig
    """Rotary embedding parameters."""
    max_positions: int
    """Longest context in tokens."""
    tied: bool
    """The output head is the embedding."""
    qkv_bias: bool
    """q, k and v have biases."""
    o_bias: bool
    """o has a bias."""
    mlp_bias: bool
    """gate, up and down have biases."""
    qk_norm: bool
    """q and k are RMS-normalised per head before rope."""
    windows: tuple[int | None, ...]
    """Per layer: a token sees this many last tokens, itself included; None: all."""
    dtype: str
    """Data type that the config names, one of `DTYPES`; float32 if it names none."""
    bos_id: int | None
    """First token of a text, if the model has one."""
    eos_ids: tuple[int, ...]
    """Tokens that end a generation; generation_config.json's list wins."""
    activation: str = "silu"
    """Activation of the gate."""

    def shape(self, projection: str) -> tuple[int, int]:
        """(input, output) width of a projection."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.embed, heads),
            "k_proj": (self.embed, kv),
            "v_proj": (self.embed, kv),
            "o_proj": (heads, self.embed),
            "gate_proj": (self.embed, self.mlp),
            "up_proj": (self.embed, self.mlp),
            "down_proj": (self.mlp, self.embed),
            "embed_tokens": (self.vocab, self.embed),
            "lm_head": (self.embed, self.vocab),
        }[projection]

    def bias(self, group: str) -> bool:
        """Whether the projections of a group have biases."""
        return {"qkv": self.qkv_bias, "o": self.o_bias}.get(group, self.mlp_bias)

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Reads `config.json` and, where there is one, `generation_config.json`."""
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder; --model takes a Hugging Face model folder")
        data = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else None
        return cls.from_dict(data | {"_name_or_path": _folder_name(folder)}, generation)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """From the contents of `config.json` (and of `generation_config.json`)."""
        name = str(data.get("_name_or_path") or "model")
        architecture = _architecture(data, name)
        defaults = _DEFAULTS[architecture]
        get = _Reader(name, data, defaults)
        heads = get.size("num_attention_heads")
        kv_heads = (
            heads
            if _is_null(data, defaults, "num_key_value_heads")
            else get.size("num_key_value_heads")
        )
        embed, layers = get.size("hidden_size"), get.size("num_hidden_layers")
        no_head_dim = _is_null(data, defaults, "head_dim")
        head_dim = embed // heads if no_head_dim else get.size("head_dim")
        if heads % kv_heads:
            get.refuse(f"num_attention_heads {heads} is not a multiple of kv heads {kv_heads}")
        if head_dim % 2 or head_dim == 0:
            get.refuse(f"head_dim is {head_dim}, rope needs an even number")
        if (activation := data.get("hidden_act", "silu")) not in ("silu", "swish"):
            get.refuse(f"hidden_act is {activation!r}, only 'silu' is supported")
        max_positions = get.size("max_position_embeddings")
        attention_bias = get.flag("attention_bias")
        qwen2, qwen3 = (architecture == f"Qwen{n}ForCausalLM" for n in (2, 3))
        llama_or_qwen3 = qwen3 or architecture == "LlamaForCausalLM"
        return cls(
            name=name,
            architecture=architecture,
            vocab=get.size("vocab_size"),
            embed=embed,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=get.size("intermediate_size"),
            norm_eps=get.number("rms_norm_eps", 1e-6),
            rope=_rope(get, max_positions),
            max_positions=max_positions,
            tied=get.flag("tie_word_embeddings"),
            qkv_bias=qwen2 or (llama_or_qwen3 and attention_bias),
            o_bias=llama_or_qwen3 and attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and get.flag("mlp_bias"),
            qk_norm=qwen3,
            windows=_windows(get, architecture, layers),
            dtype=_dtype(get),
            bos_id=get.token("bos_token_id", generation),
            eos_ids=get.tokens("eos_token_id", generation),
        )


@dataclass(frozen=True)
class _Reader:
    """Typed access to a config's keys; a value of a wrong type is a ModelError that names it."""

    name: str
    data: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def refuse(self, reason: str) -> None:
        raise ModelError(f"{self.name}: config.json: {reason}")

    def value(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key, self.defaults.get(key))
        return default if value is None else value

    def size(self, key: str) -> int:
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.refuse(f"{key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not math.isfinite(value) or value <= 0:
            self.refuse(f"{key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key, False)
        if not isinstance(value, bool):
            self.refuse(f"{key} must be true or false, got {value!r}")
        return value

    def tokens(self, key: str, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
        value = (generation or {}).get(key)
        value = self.value(key, []) if value is None else value
        value = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            self.refuse(f"{key} must be a token id or a list of them, got {value!r}")
        return tuple(dict.fromkeys(token for token in value if token >= 0))

    def token(self, key: str, generation: Mapping[str, Any] | None) -> int | None:
        return next(iter(self.tokens(key, generation)), None)


def _is_null(data: Mapping[str, Any], defaults: Mapping[str, Any], key: str) -> bool:
    """A key that is null counts as null even where its absence would have a default."""
    return data.get(key, defaults.get(key)) is None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; is {path.parent} a Hugging Face model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _folder_name(folder: Path) -> str:
    """The folder's name; for a hub cache (models--org--name/snapshots/hash) org/name."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parts[-3].startswith("models--"):
        return folder.parts[-3].removeprefix("models--").replace("--", "/")
    return folder.name or folder.resolve().name


def _architecture(data: Mapping[str, Any], name: str) -> str:
    """The architecture's name, after refusing what would need code or types that we lack."""
    names = data.get("architectures") or [_MODEL_TYPES.get(str(data.get("model_type")))]
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    if data.get("auto_map"):
        raise ModelError(
            f"{name}: config.json has auto_map: the model ({architecture}) needs code of its own "
            "to be run, and remote code is never imported"
        )
    if not isinstance(architecture, str) or architecture not in _DEFAULTS:
        got = architecture or f"model_type {data.get('model_type')!r}"
        raise ModelError(
            f"{name}: architecture {got} is not supported; supported are {', '.join(_DEFAULTS)}"
        )
    if quantization := data.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{name}: the checkpoint is quantised (quant_method {method!r}), which is not "
            "supported; use the float32, bfloat16 or float16 checkpoint"
        )
    return architecture


def _rope(get: _Reader, max_positions: int) -> RopeConfig:
    """transformers 4 has rope_theta beside rope_scaling, transformers 5 all in rope_parameters."""
    params = get.data.get("rope_scaling") or get.data.get("rope_parameters") or {}
    if not isinstance(params, dict):
        get.refuse(f"rope_scaling must be an object or null, got {params!r}")
    if params and all(isinstance(value, dict) for value in params.values()):
        get.refuse(f"rope parameters per layer type ({', '.join(params)}) are not supported")
    kind = params.get("rope_type", params.get("type", "default")) or "default"
    if kind not in ROPE_KINDS:
        get.refuse(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    rope = _Reader(get.name, {key: v for key, v in params.items() if v is not None}, get.data)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        get.refuse(f"partial_rotary_factor {rope.value('partial_rotary_factor')} is not supported")
    theta = rope.number("rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    if missing := [key for key in needed.get(kind, []) if key not in rope.data]:
        get.refuse(f"rope type {kind!r} needs {', '.join(missing)}")
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=rope.number("factor", 1.0))
    key = "original_max_position_embeddings"
    original = rope.size(key) if rope.value(key) else max_positions
    optional = {
        key: rope.number(key, 1.0) if rope.value(key) else None
        for key in ("attention_factor", "mscale", "mscale_all_dim")
    }
    config = RopeConfig(
        kind=kind,
        theta=theta,
        factor=rope.number("factor", max_positions / original),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=bool(rope.data.get("truncate", True)),
        **optional,
    )
    if kind == "llama3" and config.high_freq_factor <= config.low_freq_factor:
        get.refuse(
            f"rope high_freq_factor {config.high_freq_factor} must be above low_freq_factor "
            f"{config.low_freq_factor}"
        )
    return config


def _windows(get: _Reader, architecture: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, as the architecture's own code would apply it."""
    qwen = architecture.startswith("Qwen")
    has_window = architecture == "MistralForCausalLM" or (qwen and get.flag("use_sliding_window"))
    disabled = not has_window or _is_null(get.data, get.defaults, "sliding_window")
    window = None if disabled else get.size("sliding_window")
    types = get.data.get("layer_types")
    if types is None:
        first = int(get.value("max_window_layers", 28)) if qwen else 0
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"full_attention", "attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not known.issuperset(types):
        get.refuse(f"layer_types must name one of {sorted(known)} for each of {layers} layers")
    sliding = [kind == "sliding_attention" for kind in types]
    if not qwen and sliding != [window is not None] * layers:
        get.refuse(f"layer_types mixes windows, which {architecture} does not compute")
    return tuple(window if slides else None for slides in sliding)


def _dtype(get: _Reader) -> str:
    dtype = str(get.value("dtype") or get.value("torch_dtype") or "float32")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        get.refuse(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype
