"""A strict reader of safetensors files that come from strangers.

The header is checked in full (sizes, types, duplicate names, offsets without holes or overlaps)
before anything of the size that it claims is allocated. All reads go through one open file.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jlora.cast import largest
from jlora.errors import AdapterError

MAX_HEADER = 16 << 20
"""Bytes. 80 layers with all seven projections need about 0.2 MB."""

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
# What is kept in memory: f64 has no place on the device, and every f8 value is exact in bfloat16.
_KEPT = {
    "F64": np.dtype("f4"),
    "F8_E4M3": np.dtype(ml_dtypes.bfloat16),
    "F8_E5M2": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One entry of the header, checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    nbytes: int


def parse_json(text: bytes, what: str) -> Any:
    """JSON without duplicate keys and without NaN or Infinity. Raises AdapterError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {double[:80]!r} appears twice")
        return table

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else error
        raise AdapterError(f"{what} is not valid JSON: {reason}") from None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; a directory, device or pipe is an AdapterError, not a hang."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path} is not a regular file")
    with open(descriptor, "rb", buffering=0) as file:
        yield file  # type: ignore[misc]


def read_small(path: Path, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise AdapterError(f"{path} has {size} bytes, more than the limit of {limit}")
        return _read(file, path, 0, size).tobytes()


def _read(file: BinaryIO, path: Path, start: int, size: int) -> np.ndarray:
    """`size` bytes at `start`, as uint8."""
    data = np.empty(size, np.uint8)
    view, done = memoryview(data.data), 0
    file.seek(start)
    while done < size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise AdapterError(f"{path} is truncated: {start + size} bytes expected")
        done += count
    return data


def read_header(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file. Allocates no more than the header's own bytes."""
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise AdapterError(f"{path} has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(_read(file, path, 0, 8).tobytes(), "little")
    if length > min(MAX_HEADER, size - 8):
        raise AdapterError(
            f"{path} is not a safetensors file or is truncated: it claims a header of {length} "
            f"bytes, the file has {size} bytes and the limit is {MAX_HEADER}"
        )
    header = parse_json(_read(file, path, 8, length).tobytes(), f"the header of {path}")
    if not isinstance(header, dict):
        raise AdapterError(f"the header of {path} is {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    tensors = [_info(path, name, entry, 8 + length) for name, entry in header.items()]
    at = 8 + length
    for info in sorted(tensors, key=lambda info: (info.start, info.nbytes)):
        if info.start != at:
            raise AdapterError(f"{path}: the data of {info.name!r} overlaps or leaves a hole")
        at += info.nbytes
    if at != size:
        raise AdapterError(f"{path} is truncated or padded: {at} bytes expected, it has {size}")
    return {info.name: info for info in tensors}


def _info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def natural(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    shown = f"{path}: tensor {name[:120]!r}"
    if not isinstance(dtype, str) or (dtype not in FLOATS and dtype not in OTHERS):
        raise AdapterError(f"{shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(natural, shape)):
        raise AdapterError(f"{shown} has the malformed shape {str(shape)[:80]}")
    if not isinstance(span, list) or len(span) != 2 or not all(map(natural, span)):
        raise AdapterError(f"{shown} has malformed data_offsets {str(span)[:80]}")
    width = FLOATS[dtype].itemsize if dtype in FLOATS else OTHERS[dtype]
    nbytes = math.prod(shape) * width
    if span[1] - span[0] != nbytes:
        raise AdapterError(
            f"{shown}: {dtype} {shape} needs {nbytes} bytes, its data_offsets give "
            f"{span[1] - span[0]}"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), start=base + span[0], nbytes=nbytes
    )


def read_tensor(file: BinaryIO, path: Path, info: TensorInfo) -> np.ndarray:
    """One tensor's values: float32, float16 or bfloat16. NaN and Inf are refused."""
    if info.dtype not in FLOATS:
        raise AdapterError(f"{path}: tensor {info.name!r} holds {info.dtype}, expected floats")
    values = _read(file, path, info.start, info.nbytes).view(FLOATS[info.dtype])
    values = values.reshape(info.shape)
    if info.dtype in _KEPT:
        with np.errstate(over="ignore"):
            values = values.astype(_KEPT[info.dtype])
    if not math.isfinite(largest(values)):
        raise AdapterError(f"{path}: tensor {info.name!r} holds NaN or infinite values")
    return values
