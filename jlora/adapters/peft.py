"""Reads a PEFT LoRA folder for a given base model: `read_adapter`.

Everything is checked before a tensor is allocated, and every tensor is either used or the reason
for the refusal. Ranks come from shapes and are checked against the config.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora.adapters.adapter import Adapter, LoraWeights, content_hash
from jlora.adapters.lora_config import CONFIG_FILE, LoraConfig, read_config
from jlora.adapters.tensors import (
    FLOATS,
    TensorInfo,
    open_regular,
    read_header,
    read_small,
    read_tensor,
)
from jlora.errors import AdapterError, AdapterNotFound
from jlora.models.config import PROJECTIONS, ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
READ_FILES = (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, TOKENIZER_FILE)
"""All files of a folder that are ever opened."""
PICKLES = ("adapter_model.bin", "adapter_model.pt")
MAX_TEMPLATE = 1 << 20
MAX_TOKENIZER_CONFIG = 16 << 20

# What a module's path may start with: wrappers of trainers and multi-modal models around the
# decoder. Words such as vision_tower are not here, so that their layers are never taken for ours.
WRAPPERS = frozenset({"base_model", "model", "language_model", "module", "_orig_mod"})
BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
          for name in PROJECTIONS}  # fmt: skip

# Fixed patterns of ours, without nested repeats: linear on any name.
_LORA_KEY = re.compile(r"([^\n]+)\.lora_([AB])(?:\.([A-Za-z0-9_-]+))?\.weight")
_MODULE = re.compile(r"layers\.([0-9]{1,6})\.(self_attn|mlp)\.([a-z_]+)")
_FEATURES: tuple[tuple[str, str], ...] = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "LoRA on embeddings"),
    ("trainable_tokens", "trainable tokens"),
    ("token_adapter", "trainable tokens"),
    ("lora_diag", "KaSA"),
    ("lora_velora", "VeLoRA's state"),
    ("modules_to_save", "modules_to_save (fully trained modules)"),
    ("experts", "LoRA on MoE experts"),
    ("embed_tokens", "LoRA on or replacement of the embedding"),
    ("lm_head", "LoRA on or replacement of the output head"),
    (".lora_B.bias", "lora_bias (a bias on lora_B)"),
)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two header entries of one projection in one layer."""

    name: str
    """The module's name as peft saw it in training: what patterns are matched against."""
    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def read_adapter(path: str | Path, cfg: ModelConfig, *, max_bytes: int = 8 << 30) -> Adapter:
    """Reads the adapter in the folder `path` for the base model `cfg`.

    Raises AdapterNotFound where there is no adapter, AdapterError with the reason where it is
    malformed, too big, made for another model, or needs what we do not compute.
    """
    folder = Path(path)
    _check_folder(folder)
    config = read_config(folder)
    weights_path = folder / WEIGHTS_FILE
    with open_regular(weights_path) as file:
        header = read_header(file, weights_path)
        total = sum(info.nbytes for info in header.values())
        if total > max_bytes:
            raise AdapterError(f"{folder} holds {total} bytes, more than the limit of {max_bytes}")
        pairs = _pair_up(header, cfg, folder)
        _check_shapes(pairs, config, cfg, folder)
        _check_targets(pairs, config, cfg, folder)
        template = _chat_template(folder)
        weights = {}
        for (layer, projection), pair in sorted(pairs.items()):
            scaling = config.scaling_of(pair.name, pair.rank)
            a = read_tensor(file, weights_path, pair.a)
            b = read_tensor(file, weights_path, pair.b)
            largest = float(np.max(np.abs(b))) * abs(scaling)
            if not largest <= float(np.finfo(np.float32).max):
                raise AdapterError(f"{folder}: scaling {scaling} overflows {pair.b.name!r}")
            weights[layer, projection] = LoraWeights(a=a, b=b, rank=pair.rank, scaling=scaling)
    return Adapter(
        uid=content_hash(weights),
        path=str(path),
        base_model=config.base_model,
        rank=max(pair.rank for pair in weights.values()),
        weights=weights,
        chat_template=template,
    )


def _check_folder(folder: Path) -> None:
    try:
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise AdapterNotFound(f"No adapter found for {folder}: it {what}")
        names = {entry.name for entry in folder.iterdir()}
        if CONFIG_FILE not in names:
            # peft saves an adapter that is not called "default" in a folder of its own.
            inner = sorted(name for name in names if (folder / name / CONFIG_FILE).is_file())
            hint = f"; there are adapters in its folders {', '.join(inner[:10])}" if inner else ""
            if "config.json" in names:
                hint = "; it looks like a full model (config.json)"
            raise AdapterNotFound(f"No adapter found for {folder}: no {CONFIG_FILE}{hint}")
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterNotFound):
            raise
        raise AdapterNotFound(f"No adapter found for {str(folder)!r}: {error}") from None
    if WEIGHTS_FILE not in names:
        if pickles := [name for name in PICKLES if name in names]:
            raise AdapterError(
                f"{folder} has {pickles[0]}, a pickle, which is never loaded; convert it to "
                f"{WEIGHTS_FILE}"
            )
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}")


def _pair_up(
    header: Mapping[str, TensorInfo], cfg: ModelConfig, folder: Path
) -> dict[tuple[int, str], _Pair]:
    """Gives every tensor its place; one that has none is an error."""
    halves: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    names: dict[tuple[int, str], str] = {}
    adapters: set[str] = set()
    for key, info in header.items():
        if info.dtype not in FLOATS:
            raise AdapterError(
                f"{folder}: tensor {key[:160]!r} holds {info.dtype}, expected floats"
            )
        module, half, adapter = _split_key(key, folder)
        place = _place(module, key, cfg, folder)
        if half in halves.setdefault(place, {}):
            other = halves[place][half].name
            raise AdapterError(f"{folder}: {key[:160]!r} and {other[:160]!r} are the same tensor")
        halves[place][half] = info
        names[place] = module
        adapters.add(adapter)
    if not halves:
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} holds no tensors")
    if len(adapters) > 1:
        shown = ", ".join(sorted(name or "(none)" for name in adapters))
        raise AdapterError(f"{folder} mixes tensors of several adapters: {shown[:160]}")
    for (layer, projection), found in halves.items():
        if len(found) != 2:
            (half,) = found
            other = "B" if half == "A" else "A"
            raise AdapterError(
                f"{folder}: {projection} in layer {layer} has lora_{half} but no lora_{other}"
            )
    return {
        place: _Pair(name=names[place], a=found["A"], b=found["B"])
        for place, found in halves.items()
    }


def _split_key(key: str, folder: Path) -> tuple[str, str, str]:
    """("model.layers.0.self_attn.q_proj", "A" or "B", adapter name or "")."""
    for mark, feature in _FEATURES:
        if mark in key:
            raise AdapterError(f"{folder}: {feature} is not supported (tensor {key[:160]!r})")
    match = _LORA_KEY.fullmatch(key)
    if match is None:
        feature = "an unknown tensor"
        if key.endswith(".bias"):
            feature = "a trained bias, which is not supported"
        elif key.endswith(".weight") and ".lora_" not in key:
            feature = "a full weight (modules_to_save?), which is not supported"
        raise AdapterError(f"{folder}: {key[:160]!r} is {feature}")
    module, half, adapter = match.groups()
    return module.removeprefix("base_model.model."), half, adapter or ""


def _place(module: str, key: str, cfg: ModelConfig, folder: Path) -> tuple[int, str]:
    """(layer, projection) of a module's name, whatever wraps the decoder."""
    words = module.split(".")
    start = next((i for i, word in enumerate(words) if word not in WRAPPERS), len(words))
    match = _MODULE.fullmatch(".".join(words[start:])) if start <= 8 else None
    if match is None or BLOCKS.get(match[3]) != match[2]:
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for none of the projections that LoRA is "
            f"supported on ({', '.join(PROJECTIONS)} of a decoder layer)"
        )
    layer = int(match[1])
    if layer >= cfg.layers:
        raise AdapterError(
            f"{folder}: tensor {key[:160]!r} is for layer {layer}, {cfg.name!r} has layers 0 to "
            f"{cfg.layers - 1}; was this adapter trained on another base model?"
        )
    return layer, match[3]


def _check_shapes(
    pairs: Mapping[tuple[int, str], _Pair], config: LoraConfig, cfg: ModelConfig, folder: Path
) -> None:
    for (layer, projection), pair in pairs.items():
        where = f"{folder}: {projection} in layer {layer}"
        if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
            raise AdapterError(
                f"{where}: lora_A {list(pair.a.shape)} and lora_B {list(pair.b.shape)} must be "
                "matrices"
            )
        width, out = cfg.shape(projection)
        (rank, got_width), (got_out, rank_b) = pair.a.shape, pair.b.shape
        if (got_width, got_out) != (width, out):
            raise AdapterError(
                f"{where} has lora_A {list(pair.a.shape)} and lora_B {list(pair.b.shape)}, "
                f"expected [r, {width}] and [{out}, r]; was this adapter trained on another base "
                f"model? {CONFIG_FILE} says {config.base_model!r}, this server runs {cfg.name!r}"
            )
        if rank != rank_b or rank == 0:
            raise AdapterError(f"{where} has rank {rank} in lora_A and rank {rank_b} in lora_B")
        if rank != (said := config.rank_of(pair.name)):
            raise AdapterError(f"{where} has rank {rank} in its tensors, {CONFIG_FILE} says {said}")
        if not math.isfinite(config.scaling_of(pair.name, rank)):
            raise AdapterError(f"{where}: lora_alpha / r is not finite")


def _check_targets(
    pairs: Mapping[tuple[int, str], _Pair], config: LoraConfig, cfg: ModelConfig, folder: Path
) -> None:
    """target_modules and layers_to_transform, where they are lists, must agree with the tensors."""
    if config.layers is not None and (high := max(config.layers)) >= cfg.layers:
        raise AdapterError(
            f"{folder}: layers_to_transform names layer {high}, {cfg.name!r} has layers 0 to "
            f"{cfg.layers - 1}"
        )
    if config.targets is None:
        return
    expected: set[tuple[int, str]] = set()
    for target in config.targets:
        places = _targeted(target, config.layers, cfg)
        if not places:
            raise AdapterError(
                f"{folder}: target_modules lists {target[:120]!r}, which has no tensors"
            )
        expected |= places
    if extra := sorted(pairs.keys() - expected):
        layer, projection = extra[0]
        raise AdapterError(
            f"{folder}: {projection} in layer {layer} has tensors but target_modules and "
            f"layers_to_transform do not name it ({len(extra)} such modules)"
        )
    missing = sorted(expected - pairs.keys())
    if config.excluded is None:  # a regex: what it takes away is not known
        seen = {projection for _, projection in pairs}
        missing = [place for place in missing if place[1] not in seen]
    else:
        away = set().union(*(_targeted(name, None, cfg) for name in config.excluded))
        missing = [place for place in missing if place not in away]
    if missing:
        layer, projection = missing[0]
        raise AdapterError(
            f"{folder}: target_modules names {projection} in layer {layer}, which has no tensors "
            f"({len(missing)} modules lack theirs); is {WEIGHTS_FILE} complete?"
        )


def _targeted(target: str, layers: frozenset[int] | None, cfg: ModelConfig) -> set[tuple[int, str]]:
    """Projections that an entry of target_modules names: a name, or a path that ends in one."""
    words = target.split(".")
    if words[-1] not in BLOCKS or (len(words) > 1 and words[-2] != BLOCKS[words[-1]]):
        return set()
    if len(words) <= 2:
        return {(layer, words[-1]) for layer in layers or range(cfg.layers)}
    layer = words[-3]
    if not (layer.isascii() and layer.isdigit()) or int(layer[:7]) >= cfg.layers:
        return set()
    return {(int(layer), words[-1])}  # peft: a full name counts in spite of layers_to_transform


def _chat_template(folder: Path) -> str | None:
    """The template that a trainer saved with the adapter, if any."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            return read_small(path, MAX_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterError(f"{path} is not UTF-8 text: {error}") from None
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(read_small(path, MAX_TOKENIZER_CONFIG))
        template = data.get("chat_template")
        if isinstance(template, list):  # named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not (
            isinstance(template, str) and len(template) <= MAX_TEMPLATE
        ):
            raise TypeError("chat_template is not a text of a sensible size")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} is not readable: {error}") from None
    return template
