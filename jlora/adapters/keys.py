"""Names of tensors in a PEFT file: which module of the base a tensor is for, and what it is to it.

Every name has exactly one meaning, or is refused with the reason. Names come with or without
peft's prefix, with or without the adapter's name, and with the wrappers that trainers leave.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora.adapters.adapter import NO_LAYER
from jlora.adapters.tensors import FLOATS, TensorInfo
from jlora.errors import AdapterError
from jlora.models.config import MODULES, VOCAB_GROUPS, ModelConfig

Kind = Literal[
    "A", "B", "B.bias", "magnitude", "bias", "weight", "twin", "copy", "original", "tokens"
]
"""A, B: the pair. B.bias: lora_bias. magnitude: DoRA. bias: the base's bias, replaced. weight: the
base's weight, replaced (modules_to_save); twin: the same once more. copy: the embedding or head
that peft writes beside a LoRA on it, and whenever the vocabulary was resized. original: what a
replaced one was before training. tokens: rows of the embedding, replaced (trainable tokens)."""

Place = tuple[int, str]
"""(layer, projection or norm); NO_LAYER for embed_tokens, lm_head and the last norm."""

# What a module's path may start with: wrappers of trainers and multi-modal models around the
# decoder. Words such as vision_tower are not here, so that their layers are never taken for ours.
WRAPPERS = frozenset({"base_model", "model", "language_model", "module", "_orig_mod"})
BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
          else "self_attn" for name in MODULES}  # fmt: skip
VOCABULARY = tuple(part for parts in VOCAB_GROUPS.values() for part in parts)

# Fixed patterns of ours, without nested repeats: linear on any name. The group is the adapter's name.
_NAME = r"(?:\.(?!weight$)([A-Za-z0-9_-]+))?"
_SUFFIXES: tuple[tuple[Kind, str], ...] = (
    ("A", rf"\.lora_A{_NAME}\.weight"),
    ("B", rf"\.lora_B{_NAME}\.weight"),
    ("B.bias", rf"\.lora_B{_NAME}\.bias"),
    ("A", rf"\.lora_embedding_A{_NAME}"),
    ("B", rf"\.lora_embedding_B{_NAME}"),
    ("magnitude", rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?"),
    ("tokens", rf"\.token_adapter\.trainable_tokens_delta{_NAME}"),
    ("bias", r"\.base_layer\.bias"),
    ("bias", rf"\.modules_to_save{_NAME}\.bias"),
    ("bias", r"\.bias"),
    ("copy", r"\.token_adapter\.base_layer\.weight"),
    ("copy", r"\.base_layer\.weight"),
    ("original", r"\.original_module\.weight"),
    ("weight", rf"\.modules_to_save{_NAME}\.weight"),
    ("weight", r"\.weight"),
)
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"([^\n]+){suffix}")) for kind, suffix in _SUFFIXES
)
_MODULE = re.compile(r"layers\.([0-9]{1,6})\.(?:(self_attn|mlp)\.)?([a-z_]+)")
_SPARSE = re.compile(
    r"layers\.([0-9]{1,6})\.(?:mlp|block_sparse_moe)\."
    r"(gate|experts|experts\.base_layer|experts\.([0-9]{1,6})\.([a-z0-9_]+))"
)
STACKS = ("experts", "experts.base_layer")
"""Modules whose pairs are of all experts together: `stacked.py`."""
_FEATURES: tuple[tuple[str, str], ...] = (
    ("lora_diag", "KaSA"),
    ("lora_velora", "VeLoRA's state"),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file holds for one module."""

    name: str
    """The module's name as peft saw it in training: what patterns are matched against."""
    tensors: dict[Kind, TensorInfo] = field(default_factory=dict)


def sort_tensors(
    header: Mapping[str, TensorInfo], cfg: ModelConfig, folder: Path
) -> dict[Place, Found]:
    """Gives every tensor its place; one that has none is an AdapterError, and so is half a pair."""
    modules: dict[Place, Found] = {}
    adapters: set[str] = set()
    for key, info in header.items():
        if info.dtype not in FLOATS:
            raise AdapterError(
                f"{folder}: tensor {key[:160]!r} holds {info.dtype}, expected floats"
            )
        module, kind, adapter = _split(key, folder)
        place = _place(module, key, cfg, folder)
        found = modules.setdefault(place, Found(name=module))
        if kind == "weight" and kind in found.tensors and place[1] in VOCABULARY:
            both = (key, found.tensors["weight"].name)
            if sum(".modules_to_save" in name for name in both) == 1:
                kind = "twin"  # peft writes it twice where the vocabulary was resized
        if kind in found.tensors:
            other = found.tensors[kind].name
            raise AdapterError(f"{folder}: {key[:160]!r} and {other[:160]!r} are the same tensor")
        found.tensors[kind] = info
        if adapter is not None:
            adapters.add(adapter)
    if not modules:
        raise AdapterError(f"{folder}: its file holds no tensors")
    if len(adapters) > 1:
        shown = ", ".join(sorted(name or "(none)" for name in adapters))
        raise AdapterError(f"{folder} mixes tensors of several adapters: {shown[:160]}")
    for (layer, projection), found in modules.items():
        halves = found.tensors.keys() & {"A", "B"}
        if len(halves) == 1:
            (half,) = halves
            raise AdapterError(
                f"{folder}: {shown_place(layer, projection)} has lora_{half} but no "
                f"lora_{'B' if half == 'A' else 'A'}"
            )
    return modules


def shown_place(layer: int, projection: str) -> str:
    """ "q_proj in layer 3", for messages."""
    return projection if layer == NO_LAYER else f"{projection} in layer {layer}"


def _split(key: str, folder: Path) -> tuple[str, Kind, str | None]:
    """("model.layers.0.self_attn.q_proj", "A", adapter name, or None where names never hold it)."""
    for mark, feature in _FEATURES:
        if mark in key:
            raise AdapterError(f"{folder}: {feature} is not supported (tensor {key[:160]!r})")
    for kind, pattern in _KINDS:
        match = pattern.fullmatch(key)
        if match is not None:
            module = match[1].removeprefix("base_model.model.")
            named = pattern.groups == 2
            return module, kind, (match[2] or "") if named else None
    raise AdapterError(f"{folder}: {key[:160]!r} is an unknown tensor")


def _is_norm(block: str | None, name: str, cfg: ModelConfig) -> bool:
    """Those of heads are in self_attn, others in no block."""
    return name in cfg.norms and block == ("self_attn" if name in ("q_norm", "k_norm") else None)


def _place(module: str, key: str, cfg: ModelConfig, folder: Path) -> Place:
    """(layer, projection) of a module's name, whatever wraps the decoder."""
    words = module.split(".")
    start = next((i for i, word in enumerate(words) if word not in WRAPPERS), len(words))
    rest = ".".join(words[start:])
    if start <= 8 and rest in (*VOCABULARY, "norm"):
        return NO_LAYER, rest
    if start <= 8 and cfg.experts is not None and (match := _SPARSE.fullmatch(rest)):
        return _sparse_place(match, key, cfg, folder)
    match = _MODULE.fullmatch(rest) if start <= 8 else None
    norm = match is not None and _is_norm(match[2], match[3], cfg)
    linear = match is not None and BLOCKS.get(match[3], "") == match[2] and match[3] in cfg.modules
    if match is None or not (norm or linear):
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for none of the modules that adapters may change "
            f"({', '.join((*_supported(cfg), *cfg.norms))} of a decoder layer, "
            f"{', '.join(VOCABULARY)}, norm)"
        )
    layer = _layer(match[1], key, cfg, folder)
    if linear and match[3] not in cfg.modules_of(layer):
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for layer {layer}, whose MLP is made of experts"
        )
    return layer, match[3]


def _sparse_place(match: re.Match[str], key: str, cfg: ModelConfig, folder: Path) -> Place:
    """Of a router, an expert's linear or a stack; by the checkpoint's names."""
    layer, facts, what = _layer(match[1], key, cfg, folder), cfg.experts, match[2]
    assert facts is not None
    if not cfg.is_sparse(layer):
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for layer {layer}, whose MLP has no experts"
        )
    if match[3] is not None:
        if int(match[3]) >= facts.count:
            raise AdapterError(
                f"{folder}: tensor {key[:160]!r} is for expert {match[3]}, {cfg.name!r} has experts 0 "
                f"to {facts.count - 1}; was this adapter trained on another base model?"
            )
        if match[4] not in facts.parts:
            raise AdapterError(
                f"{folder}: tensor {key[:160]!r} is for {match[4]!r}, an expert of {cfg.name!r} has "
                f"{', '.join(facts.parts)}"
            )
        what = f"experts.{int(match[3])}.{match[4]}"
    return layer, f"{facts.module}.{what}"


def _layer(text: str, key: str, cfg: ModelConfig, folder: Path) -> int:
    layer = int(text)
    if layer >= cfg.layers:
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for layer {layer}, {cfg.name!r} has layers 0 to "
            f"{cfg.layers - 1}; was this adapter trained on another base model?"
        )
    return layer


def _supported(cfg: ModelConfig) -> list[str]:
    """The modules of a layer, for messages."""
    if cfg.experts is None:
        return list(cfg.modules)
    parts = ", ".join(cfg.experts.parts)
    return [*cfg.modules, f"{cfg.experts.router} and {cfg.experts.module}.experts.N.({parts})"]
