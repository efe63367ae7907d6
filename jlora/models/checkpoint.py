"""A Hugging Face folder of safetensors, single or sharded: what is in it, and blocks of its rows.

Only headers are read at `open`. Files are mapped while a parameter is being read and unmapped
after it, so that what was read does not stay in the process's memory. No jax here.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.cast import narrowed
from jlora.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")

_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Tensors of old checkpoints that carry nothing: recomputed from the config."""

_TEXT_PART = re.compile(
    r"^(?:(?:language_model\.model|model\.language_model)\.|language_model\.(?=lm_head\.))"
)
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
"""Tensors of a model that also sees: what is not the text part's."""

Read = Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]
"""read(tensor, rows, columns or None) -> [rows, columns]; index -1 gives zeros."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor is and what it looks like."""

    file: Path
    name: str
    """The tensor's name in the file; its key among `Checkpoint.tensors` is the decoder's."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a folder by name: the text part's names are those it would have alone."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Reads the headers of every file. Raises ModelError for a broken folder."""
        folder = Path(folder)
        promised = None
        if (folder / SINGLE).is_file():
            files = [SINGLE]
        elif (folder / INDEX).is_file():
            promised = _weight_map(folder / INDEX)
            files = sorted(set(promised.values()))
        else:
            torch_only = any(folder.glob("pytorch_model*.bin"))
            raise ModelError(
                f"{folder} has neither {SINGLE} nor {INDEX}"
                + ("; .bin files are not read, convert them to safetensors" if torch_only else "")
            )
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _headers(folder / file):
                if name in tensors:
                    raise ModelError(f"{folder}: {name} is in {tensors[name].file.name} and {file}")
                tensors[name] = stored
        if promised is not None:
            wrong = [
                f"{name} ({file})"
                for name, file in promised.items()
                if (own := tensors.get(_alone(name))) is None or own.file.name != file
            ]
            if wrong:
                raise ModelError(
                    f"{folder / INDEX} names tensors that are not there: {_some(wrong)}"
                )
        return cls(folder=folder, tensors=tensors)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, tied: bool, multimodal: bool = False
    ) -> None:
        """Raises one ModelError that lists missing, extra, mis-shaped and non-float tensors.

        `multimodal`: the parts beside the text's may be there; they are not read.
        """
        found = self.tensors
        missing = [name for name in expected if name not in found]
        extra = [
            name
            for name in found
            if name not in expected
            and not _HARMLESS.fullmatch(name)
            and not (tied and name == "lm_head.weight")
            and not (multimodal and _OTHER_PARTS.fullmatch(name))
        ]
        shapes = [
            f"{name} is {list(found[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        types = [
            f"{name} is {found[name].dtype}"
            for name in expected
            if name in found and found[name].dtype not in FLOATS
        ]
        problems = {
            "missing": missing,
            "not expected": extra,
            "of another shape than config.json says": shapes,
            f"of a type that is not one of {', '.join(FLOATS)}": types,
        }
        texts = [f"{len(v)} {kind}: {_some(v)}" for kind, v in problems.items() if v]
        if texts:
            raise ModelError(f"{self.folder}: the tensors do not fit: " + "; ".join(texts))

    @contextmanager
    def reader(self, dtype: np.dtype) -> Iterator[Read]:
        """A function that reads blocks of tensors as `dtype`; its files close with the context."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}

            def read(name: str, rows: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
                stored = self.tensors[name]
                if stored.file not in handles:
                    handles[stored.file] = stack.enter_context(safe_open(stored.file, "numpy"))
                tensor = handles[stored.file].get_slice(stored.name)
                block = _gather(tensor, stored.shape, rows, columns)
                if dtype != np.float16:  # the others hold what is there
                    return block.astype(dtype, copy=False)
                return narrowed(block, dtype, f"{self.folder}: {name}", ModelError)

            yield read


def _gather(
    tensor: Any, shape: tuple[int, ...], rows: np.ndarray, columns: np.ndarray | None
) -> np.ndarray:
    """tensor[rows][:, columns] with zeros at -1, reading only the range that holds them."""
    picks = (
        [rows] if len(shape) == 1 else [rows, np.arange(shape[1]) if columns is None else columns]
    )
    ranges, local = [], []
    for pick in picks:
        real = pick[pick >= 0]
        start, stop = (int(real.min()), int(real.max()) + 1) if len(real) else (0, 0)
        ranges.append(slice(start, stop))
        contiguous = len(real) == len(pick) == stop - start and bool((np.diff(pick) == 1).all())
        local.append(None if contiguous else np.where(pick < 0, -1, pick - start))
    if any(span.start == span.stop for span in ranges):
        return np.zeros([len(pick) for pick in picks], np.float32)
    block = tensor[tuple(ranges)]
    for axis, pick in enumerate(local):
        if pick is not None:
            block = np.take(block, np.maximum(pick, 0), axis=axis)
            block[(slice(None),) * axis + (pick < 0,)] = 0
    return block


def _alone(name: str) -> str:
    """A tensor's name in a checkpoint of the text part alone."""
    return _TEXT_PART.sub(lambda match: "" if match[0] == "language_model." else "model.", name, 1)


def _headers(file: Path) -> list[tuple[str, Stored]]:
    try:
        with safe_open(file, "numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return [
                (
                    _alone(name),
                    Stored(file=file, name=name, shape=tuple(s.get_shape()), dtype=s.get_dtype()),
                )
                for name, s in slices.items()
            ]
    except FileNotFoundError:
        raise ModelError(f"{file} is missing, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """tensor -> file of an index; a file must be a plain name, so that it cannot leave the folder."""
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not readable JSON: {error}") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII)
        if not plain:
            raise ModelError(
                f"{index}: weight_map sends {name} to {file!r}, expected the plain name of a "
                ".safetensors file in the same folder"
            )
    return weight_map


def _some(items: list[str]) -> str:
    """The first ten of a list."""
    more = f", ... and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + more
