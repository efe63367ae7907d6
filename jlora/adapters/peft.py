"""Reads a PEFT LoRA folder for a given base model: `read_adapter`.

Everything is checked before a tensor is allocated, and every tensor is either used or the reason
for the refusal. Ranks come from shapes and are checked against the config.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jlora.adapters import against_base
from jlora.adapters.adapter import (
    NO_LAYER,
    Adapter,
    LoraWeights,
    OutputVectors,
    Support,
    Targets,
    content_hash,
    is_norm,
    support_of,
    targets_of,
)
from jlora.adapters.against_base import Base
from jlora.adapters.checks import check_modules, tokens_of, vocabulary
from jlora.adapters.keys import (
    VOCABULARY,
    Found,
    Place,
    shown_place,
    sort_tensors,
)
from jlora.adapters.lora_config import CONFIG_FILE, LoraConfig, read_config
from jlora.adapters.stacked import Stack, resolve
from jlora.adapters.tensors import (
    TensorInfo,
    open_regular,
    read_header,
    read_small,
    read_tensor,
)
from jlora.adapters.torch_file import read_bin_header
from jlora.cast import largest
from jlora.errors import AdapterError, AdapterNotFound
from jlora.models.config import EXPERT_GROUPS, ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
TORCH_FILES = ("adapter_model.bin", "adapter_model.pt")
TOKENIZER, SPECIAL_TOKENS = "tokenizer.json", "special_tokens_map.json"
ADDED_TOKENS, GENERATION_CONFIG = "added_tokens.json", "generation_config.json"
READ_FILES = (
    *(CONFIG_FILE, WEIGHTS_FILE, *TORCH_FILES, TEMPLATE_FILE, TOKENIZER_FILE),
    *(TOKENIZER, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG),
)
"""All files of a folder that are ever opened."""
MAX_TEMPLATE = 1 << 20
MAX_TOKENIZER_CONFIG = 16 << 20

Modules = Mapping[Place, Found]


def read_adapter(
    path: str | Path, cfg: ModelConfig, base: Base | None = None, *, max_bytes: int = 8 << 30
) -> Adapter:
    """Reads the adapter in the folder `path` for the base model `cfg`.

    `base` is asked for the base's weights where the adapter is relative to them (DoRA, replaced
    biases and embeddings, PiSSA, OLoRA). Raises AdapterNotFound where there is no adapter,
    AdapterError with the reason where it is malformed, too big, made for another model, or needs
    what we do not compute.
    """
    folder = Path(path)
    _check_folder(folder)
    config = read_config(folder)
    with open_weights(folder) as (file, weights_path, header):
        total = sum(info.nbytes for info in header.values())
        if total > max_bytes:
            raise AdapterError(f"{folder} holds {total} bytes, more than the limit of {max_bytes}")
        modules = sort_tensors(header, cfg, folder)
        targeted = resolve(modules, config, cfg, folder)
        modules = targeted.modules
        added = check_modules(modules, config, cfg, folder, targeted.places)
        template = _chat_template(folder)
        reader = _Reader(file, weights_path, config, cfg, base, folder)
        if added:
            reader.resize(modules, added)
        for place in sorted(modules):
            reader.add(place, modules)
        for stack in targeted.stacks:
            reader.add_stack(stack)
    weights = {place: against_base.joined(pairs) for place, pairs in reader.pairs.items()}
    vectors = {
        place: OutputVectors(scale=reader.scales.get(place), offset=reader.offsets.get(place))
        for place in sorted(reader.scales.keys() | reader.offsets.keys())
    }
    return Adapter(
        uid=content_hash(weights, vectors),
        path=str(path),
        base_model=config.base_model,
        rank=max((pair.rank for pair in weights.values()), default=0),
        weights=weights,
        vectors=vectors,
        added_tokens=added,
        chat_template=template,
    )


@dataclass(frozen=True, kw_only=True)
class Required:
    """What an engine must be built for to serve an adapter."""

    support: Support
    targets: Targets
    added_tokens: int


def required_support(path: str | Path, cfg: ModelConfig) -> Required:
    """What an engine must support for this adapter, from names and shapes alone. Raises as
    read_adapter."""
    folder = Path(path)
    _check_folder(folder)
    config = read_config(folder)
    with open_weights(folder) as (_, _, header):
        modules = sort_tensors(header, cfg, folder)
    pairs_only: set[str] = {"A", "B", "weight", "twin", "copy", "original", "tokens"}
    more = [name for (_, name), found in modules.items() if found.tensors.keys() - pairs_only]
    return Required(
        support=support_of(modules, more),
        targets=targets_of((name for _, name in modules), cfg),
        added_tokens=vocabulary(modules, config, cfg) - cfg.vocab,
    )


class _Reader:
    """Reads module by module: what each adds up to."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        config: LoraConfig,
        cfg: ModelConfig,
        base: Base | None,
        folder: Path,
    ):
        self.file, self.path, self.config, self.cfg = file, path, config, cfg
        self._base, self._plain, self.folder = base, base, folder
        self.vocab = cfg.vocab
        self.pairs: dict[Place, list[LoraWeights]] = {}
        self.scales: dict[Place, np.ndarray] = {}
        self.offsets: dict[Place, np.ndarray] = {}

    def resize(self, modules: Modules, added: int) -> None:
        """Takes the rows of added tokens for the base's own; those of the file, zeros where tokens that
        are trained one by one will follow."""
        self.vocab = self.cfg.vocab + added
        rows: dict[str, np.ndarray] = {}
        for name in VOCABULARY:
            found = modules.get((NO_LAYER, name))
            whole = found.tensors.get("copy") if found is not None else None
            rows[name] = np.zeros((added, self.cfg.embed), np.float32)
            if whole is not None:
                rows[name] = self._read(whole)[self.cfg.vocab :]
        embed, head = VOCABULARY
        if (NO_LAYER, head) not in modules:  # tied: its rows are the embedding's before training
            tensors = modules[NO_LAYER, embed].tensors
            whole = tensors.get("copy", tensors.get("original"))
            if whole is not None:
                rows[head] = self._read(whole)[self.cfg.vocab :]
                place, index = (NO_LAYER, head), np.arange(self.cfg.vocab, self.vocab)
                self._add_pair(place, against_base.rows_pair(place, index, rows[head], self.vocab))
        self._base = against_base.Resized(self._needed((NO_LAYER, head)), self.cfg.vocab, rows)

    def add(self, place: Place, modules: Modules) -> None:
        """Everything of one module."""
        found, has = modules[place], modules[place].tensors
        if is_norm(place[1]):
            self._add_offset(place, self._read(has["weight"]) - self._needed(place).norm(*place))
            return
        if "A" in has:
            pair = self._pair(found)
            self._add_pair(place, pair)
            if "B.bias" in has:
                self._add_offset(place, self._read(has["B.bias"]) * np.float32(pair.scaling))
            if "magnitude" in has:
                self._add_scale(place, pair, self._read(has["magnitude"]))
            if self.config.init is not None and place[0] != NO_LAYER:
                start = against_base.start_values(
                    self._needed(place), place, self.config.init, pair
                )
                self._add_pair(place, start)
        if "bias" in has:
            # without a bias in the base there is nothing to subtract
            bias = self._needed(place).bias(*place)
            new = self._read(has["bias"])
            self._add_offset(place, new if bias is None else new - bias)
        if "weight" in has:
            self._needed(place)
            assert self._plain is not None
            new = read_tensor(self.file, self.path, has["weight"])
            if "twin" in has and not np.array_equal(
                new, read_tensor(self.file, self.path, has["twin"])
            ):
                raise AdapterError(
                    f"{self.folder}: {has['twin'].name[:160]!r} and {has['weight'].name[:160]!r} are "
                    "two different weights of one module"
                )
            if place[1] in VOCABULARY:
                pair = against_base.replaced_rows(self._plain, place, new)
                self._add_pair(place, pair)
            else:
                self._add_pair(place, against_base.replaced_weight(self._plain, place, new))
        if "copy" in has and self._plain is not None:
            new = read_tensor(self.file, self.path, has["copy"])
            pair = against_base.replaced_rows(self._plain, place, new, rounded=True)
            self._add_pair(place, pair)
        if "tokens" in has:
            self._add_tokens(place, self._read(has["tokens"]), modules)

    def add_stack(self, stack: Stack) -> None:
        """The pairs of all experts of a layer."""
        facts = self.cfg.experts
        assert facts is not None
        a, b = (read_tensor(self.file, self.path, info) for info in (stack.a, stack.b))
        last = (stack.a, a) if stack.turned else (stack.b, b)
        scaling = self._scaling(stack.name, stack.rank, *last)
        parts = EXPERT_GROUPS[stack.group]
        for expert, (own_a, own_b) in enumerate(stack.pairs(a, b, facts.count)):
            rows = np.split(own_b, len(parts))
            for part, own in zip(parts, rows, strict=True):
                pair = LoraWeights(a=own_a, b=own, rank=stack.rank, scaling=scaling)
                self._add_pair((stack.layer, facts.name_of(part, expert)), pair)

    def _read(self, info: TensorInfo) -> np.ndarray:
        return read_tensor(self.file, self.path, info).astype(np.float32)

    def _pair(self, found: Found) -> LoraWeights:
        a, b = (read_tensor(self.file, self.path, found.tensors[half]) for half in ("A", "B"))
        scaling = self._scaling(found.name, len(a), found.tensors["B"], b)
        return LoraWeights(a=a, b=b, rank=len(a), scaling=scaling)

    def _scaling(self, name: str, rank: int, info: TensorInfo, b: np.ndarray) -> float:
        scaling = self.config.scaling_of(name, rank)
        if not largest(b) * abs(scaling) <= float(np.finfo(np.float32).max):
            raise AdapterError(f"{self.folder}: scaling {scaling} overflows {info.name!r}")
        return scaling

    def _needed(self, place: Place) -> Base:
        if self._base is None:
            raise AdapterError(
                f"{self.folder} is relative to the base's own weights ({shown_place(*place)}), which "
                "are not at hand here (--load-format dummy has none)"
            )
        return self._base

    def _add_pair(self, place: Place, pair: LoraWeights | None) -> None:
        if pair is not None:
            self.pairs.setdefault(place, []).append(pair)

    def _add_offset(self, place: Place, offset: np.ndarray) -> None:
        self.offsets[place] = offset + self.offsets.get(place, np.float32(0))

    def _add_scale(self, place: Place, pair: LoraWeights, magnitude: np.ndarray) -> None:
        scale = against_base.dora_scale(self._needed(place), place, pair, magnitude)
        if not np.isfinite(scale).all():
            raise AdapterError(
                f"{self.folder}: DoRA on {shown_place(*place)} divides by a norm of zero (output "
                f"{int(np.argmin(np.isfinite(scale)))})"
            )
        self.scales[place] = scale

    def _add_tokens(self, place: Place, new: np.ndarray, modules: Modules) -> None:
        index, base = tokens_of(place[1], self.config, self.cfg), self._needed(place)
        places, head = [place], (NO_LAYER, VOCABULARY[1])
        own_rows = head in modules and "tokens" in modules[head].tensors
        if self.cfg.tied and place != head and not own_rows:
            places.append(head)  # the head shares the rows
        for own in places:
            pair = against_base.token_rows(base, own, index, new, self.vocab)
            self._add_pair(own, pair)


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
    if names.isdisjoint((WEIGHTS_FILE, *TORCH_FILES)):
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}")


@contextmanager
def open_weights(folder: Path) -> Iterator[tuple[BinaryIO, Path, dict[str, TensorInfo]]]:
    """(open file, its path, its tensors): safetensors, else what torch.save wrote."""
    names = (WEIGHTS_FILE, *TORCH_FILES)
    path = folder / next((name for name in names if os.path.lexists(folder / name)), WEIGHTS_FILE)
    with open_regular(path) as file:
        yield (
            file,
            path,
            (read_header if path.name == WEIGHTS_FILE else read_bin_header)(file, path),
        )


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
