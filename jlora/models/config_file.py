"""Reads `config.json`: typed access to its keys, and the parts that take more than one key.

Reads what transformers 4 and 5 write. What the decoder cannot compute exactly is refused by name.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jlora.errors import ModelError
from jlora.models.families import FAMILIES, MULTIMODAL, Family
from jlora.models.rope import ROPE_KINDS, RopeConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Reader:
    """Typed access to a config's keys; a value of a wrong type is a ModelError that names it."""

    name: str
    data: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def refuse(self, reason: str) -> NoReturn:
        raise ModelError(f"{self.name}: config.json: {reason}")

    def value(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key, self.defaults.get(key))
        return default if value is None else value

    def size(self, key: str, most: int = 2**31 - 1) -> int:
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.refuse(f"{key} must be a positive integer, got {value!r}")
        if value > most:
            self.refuse(f"{key} must be at most {most}, got {str(value)[:20]}")
        return value

    def count(self, key: str, default: int) -> int:
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(f"{key} must be an integer of at least 0, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not 0 < value <= sys.float_info.max:
            self.refuse(f"{key} must be a positive number, got {repr(value)[:80]}")
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

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.value(key)
        if not isinstance(values, list) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, list) else repr(values)
            self.refuse(f"{key} must be a list of {count} numbers, got {got}")
        each = [Reader(self.name, {key: value}, {}) for value in values]
        return tuple(one.number(key, 0.0) for one in each)

    def token(self, key: str, generation: Mapping[str, Any] | None) -> int | None:
        return next(iter(self.tokens(key, generation)), None)


def is_null(data: Mapping[str, Any], defaults: Mapping[str, Any], key: str) -> bool:
    """A key that is null counts as null even where its absence would have a default."""
    return data.get(key, defaults.get(key)) is None


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; is {path.parent} a Hugging Face model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def folder_name(folder: Path) -> str:
    """The folder's name; for a hub cache (models--org--name/snapshots/hash) org/name."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parts[-3].startswith("models--"):
        return folder.parts[-3].removeprefix("models--").replace("--", "/")
    return folder.name or folder.resolve().name


def text_part(data: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text part alone, where a config is of a model that also sees.

    transformers runs such a checkpoint on text without its other parts; so do we.
    """
    names = data.get("architectures")
    inner = data.get("text_config")
    name = str(names[0]) if isinstance(names, list) and len(names) == 1 else ""
    if name not in MULTIMODAL or not isinstance(inner, dict):
        return dict(data)
    outer = {key: data[key] for key in _OUTER if data.get(key) is not None}
    return dict(inner) | outer | {"architectures": [MULTIMODAL[name]]}


_OUTER = (
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "dtype",
)
"""Keys beside `text_config` that hold for the text part."""


def read_architecture(data: Mapping[str, Any], name: str) -> str:
    """The architecture's name, after refusing what would need code or types that we lack."""
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    names = data.get("architectures") or [by_type.get(str(data.get("model_type")))]
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    if data.get("auto_map") and not _is_transformers_own(data["auto_map"], architecture):
        raise ModelError(
            f"{name}: config.json has auto_map: the model ({architecture!r}) needs code of its own "
            "to be run, and remote code is never imported"
        )
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        got = repr(architecture) if architecture else f"model_type {data.get('model_type')!r}"
        supported = ", ".join((*FAMILIES, *MULTIMODAL))
        raise ModelError(f"{name}: architecture {got} is not supported; supported are {supported}")
    if quantization := data.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{name}: the checkpoint is quantised (quant_method {method!r}), which is not "
            "supported; use the float32, bfloat16 or float16 checkpoint"
        )
    return architecture


def _is_transformers_own(auto_map: Any, architecture: Any) -> bool:
    """The code that comes along is a copy of a class that transformers has, and prefers itself."""
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return architecture in FAMILIES and str(named).split(".")[-1] == architecture


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_activation(get: Reader, family: Family) -> str:
    """Our name of the gate's activation."""
    key = "hidden_activation" if family.gemma else "hidden_act"
    name = get.value(key, "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        get.refuse(f"{key} is {name!r}, supported are {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def read_ropes(
    get: Reader, family: Family, head_dim: int, max_positions: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """Rotary parameters, and those of layers with a window where they have their own.

    transformers 4 has rope_theta beside rope_scaling, transformers 5 all in rope_parameters.
    """
    params = get.data.get("rope_scaling") or get.data.get("rope_parameters") or {}
    if not isinstance(params, dict):
        get.refuse(f"rope_scaling must be an object or null, got {params!r}")
    theta = get.number("rope_theta", 10000.0)
    by_type = params and all(isinstance(value, dict | None) for value in params.values())
    if by_type and not family.local_rope:
        get.refuse(f"rope parameters per layer type {list(params)} are not supported")
    if not family.local_rope:
        return _read_rope(get, family, params, theta, head_dim, max_positions), None
    full, local = (params.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    if not isinstance(full, dict) or not isinstance(local, dict):
        get.refuse(f"rope parameters of a layer type must be objects, got {params!r}")
    local_theta = get.number("rope_local_base_freq", 10000.0)
    return (
        _read_rope(get, family, full if by_type else params, theta, head_dim, max_positions),
        _read_rope(get, family, local, local_theta, head_dim, max_positions),
    )


def _read_rope(
    get: Reader,
    family: Family,
    params: Mapping[str, Any],
    theta: float,
    head_dim: int,
    max_positions: int,
) -> RopeConfig:
    kind = params.get("rope_type", params.get("type", "default")) or "default"
    kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        get.refuse(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    rope = Reader(get.name, {key: v for key, v in params.items() if v is not None}, {})
    partial = rope.number("partial_rotary_factor", get.number("partial_rotary_factor", 1.0))
    turning = int(head_dim * partial)
    if partial != 1.0 and not (family.partial_rotary and 0 < turning <= head_dim):
        get.refuse(f"partial_rotary_factor {partial} is not supported")
    if turning % 2:
        get.refuse(f"partial_rotary_factor {partial} turns {turning} dimensions, an odd number")
    theta = rope.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta, partial=partial)
    needed = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
        "longrope": ["short_factor", "long_factor"],
    }
    if missing := [key for key in needed.get(kind, []) if key not in rope.data]:
        get.refuse(f"rope type {kind!r} needs {', '.join(missing)}")
    if kind == "linear":
        factor = rope.number("factor", 1.0)
        return RopeConfig(kind=kind, theta=theta, factor=factor, partial=partial)
    key = "original_max_position_embeddings"
    # Where a family has the key beside the rope parameters, that one wins.
    holder = rope if rope.value(key) and key not in get.defaults else get
    original = holder.size(key) if holder.value(key) else max_positions
    optional: dict[str, Any] = {
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
        partial=partial,
        short_factors=rope.numbers("short_factor", turning // 2) if kind == "longrope" else (),
        long_factors=rope.numbers("long_factor", turning // 2) if kind == "longrope" else (),
        **optional,
    )
    if kind == "llama3" and config.high_freq_factor <= config.low_freq_factor:
        get.refuse(
            f"rope high_freq_factor {config.high_freq_factor} must be above low_freq_factor "
            f"{config.low_freq_factor}"
        )
    return config


ROUTER = "gate"
EXPERT_PARTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
"""Our names of an expert's linears, whatever the checkpoint calls them."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The sparse MLPs of a model."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token uses."""
    mlp: int
    """Hidden width of an expert."""
    normalised: bool
    """The weights of a token's experts are made to sum to one."""
    layers: tuple[bool, ...]
    """Per layer: its MLP is sparse."""
    module: str
    """Name of router and experts in the checkpoint."""
    parts: tuple[str, str, str]
    """Names of an expert's gate, up and down in the checkpoint."""

    def name_of(self, part: str, expert: int | None = None) -> str:
        """The checkpoint's module, in a layer, of a part of `EXPERT_GROUPS`."""
        if expert is None:
            return f"{self.module}.{part}"
        return f"{self.module}.experts.{expert}.{self.parts[EXPERT_PARTS.index(part)]}"

    def part_of(self, module: str) -> tuple[int | None, str]:
        """The inverse: ("block_sparse_moe.experts.3.w2") -> (3, "experts.down_proj")."""
        words = module.removeprefix(f"{self.module}.").split(".")
        if len(words) == 1:
            return None, words[0]
        return int(words[1]), EXPERT_PARTS[self.parts.index(words[2])]

    @property
    def router(self) -> str:
        """The router's module in a layer."""
        return self.name_of(ROUTER)

    def modules(self) -> Iterator[str]:
        """All modules of a sparse MLP: the router, and the linears of each expert."""
        yield self.router
        for expert in range(self.count):
            yield from (self.name_of(part, expert) for part in EXPERT_PARTS)


def read_experts(get: Reader, family: Family, layers: int) -> ExpertsConfig | None:
    """The experts; None where all layers are dense."""
    if family.experts is None:
        return None
    module, parts = family.experts
    key = "num_experts" if "num_experts" in get.data else "num_local_experts"
    dense, step = get.value("mlp_only_layers", []), 1
    if get.value("decoder_sparse_step") is not None:
        step = get.size("decoder_sparse_step")
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        get.refuse(f"mlp_only_layers must be a list of layer numbers, got {dense!r}")
    experts = ExpertsConfig(
        count=get.size(key),
        per_token=get.size("num_experts_per_tok"),
        mlp=get.size(
            "moe_intermediate_size"
            if "moe_intermediate_size" in get.defaults
            else "intermediate_size"
        ),
        normalised=get.flag("norm_topk_prob"),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        module=module,
        parts=parts,
    )
    if experts.per_token > experts.count:
        get.refuse(f"num_experts_per_tok {experts.per_token} is more than {experts.count} experts")
    return experts if any(experts.layers) else None


def read_windows(get: Reader, family: Family, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, as the architecture's own code would apply it."""
    kind = family.windows
    off = kind == "never" or (
        kind in ("switched", "upper_layers") and not get.flag("use_sliding_window")
    )
    no_window = off or is_null(get.data, get.defaults, "sliding_window")
    window = None if no_window and kind != "pattern" else get.size("sliding_window")
    types = get.data.get("layer_types")
    if types is None:
        first = get.count("max_window_layers", 28) if kind == "upper_layers" else 0
        every = get.size("sliding_window_pattern") if kind == "pattern" else layers + 1
        slides = [layer >= first and (layer + 1) % every > 0 for layer in range(layers)]
        return tuple(window if slide else None for slide in slides)
    known = {"full_attention", "attention", "sliding_attention"}
    listed = isinstance(types, list) and all(isinstance(name, str) for name in types)
    if not listed or len(types) != layers or not known.issuperset(types):
        get.refuse(f"layer_types must name one of {sorted(known)} for each of {layers} layers")
    sliding = [kind == "sliding_attention" for kind in types]
    mixes = kind in ("upper_layers", "pattern")
    if not mixes and sliding != [window is not None] * layers:
        get.refuse(f"layer_types mixes windows, which {family.model_type} models do not compute")
    return tuple(window if slides else None for slides in sliding)


def read_dtype(get: Reader) -> str:
    dtype = str(get.value("dtype") or get.value("torch_dtype") or "float32")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        get.refuse(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype
