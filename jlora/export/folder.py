"""A folder that is there in whole or not at all, and a safetensors file written tensor by tensor.

Nothing is ever overwritten: work goes on aside and is renamed at the end. Files get the mode that
the umask gives (0644), so that a server under another user can read them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.console import size, undisturbed
from jlora.errors import ModelError, ParameterError

DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}
"""numpy's type and the safetensors name of each type that is written."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A key of DTYPES."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype][0].itemsize


def check_output(output: Path) -> None:
    """ParameterError if something is there."""
    if os.path.lexists(output):
        raise ParameterError(
            f"{output} exists: nothing is overwritten, name a new folder", "output"
        )


@contextmanager
def written_aside(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, or is gone, whatever happens.

    One-line errors: the output exists, cannot be made, or `nbytes` do not fit on the disk.
    """
    check_output(output)
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < nbytes:
            raise ModelError(
                f"{output} cannot be written: it takes {size(nbytes)}, the disk has {size(free)} free"
            )
        folder.mkdir()
        yield folder
        check_output(output)  # rename would take the place of an empty folder
        folder.rename(output)
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        with undisturbed():  # a second Ctrl-C must not leave half of it
            shutil.rmtree(folder, ignore_errors=True)


def write_tensors(
    path: Path, entries: Sequence[Entry], data: Iterable[Iterable[np.ndarray]]
) -> None:
    """A safetensors file: for each entry, `data` gives its rows in blocks, which are cast and written.

    The library's own writer takes all tensors at once and makes files of mode 0600.
    """
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry, blocks in zip(entries, data, strict=True):
            for block in blocks:
                cast = np.ascontiguousarray(block, DTYPES[entry.dtype][0])
                file.write(cast.reshape(-1).view(np.uint8).data)


def _header(entries: Sequence[Entry]) -> bytes:
    """The start of the file (format: huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype][1],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Indented, as transformers and peft write it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
