"""Tensors of a torch.save file (`adapter_model.bin`) without torch and without running its pickle.

Format: a zip of uncompressed storages and a pickle that says which tensor is where
(pytorch.org/docs/stable/notes/serialization.html). The pickle is walked opcode by opcode on a
stack of our own, which knows tensors, dictionaries and nothing else: nothing is ever called.
"""

import math
import os
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jlora.adapters.tensors import FLOATS, OTHERS, TensorInfo
from jlora.errors import AdapterError

MAX_PICKLE = 4 << 20
"""Bytes. An adapter of 80 layers needs about 0.3 MB."""
MAX_STEPS = 400_000
"""Opcodes; such an adapter needs about 50,000."""

_TYPES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_REBUILD = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICTIONARY = "collections OrderedDict"


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """Where a tuple, list or dictionary on the stack begins."""


def read_bin_header(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    """All tensors of the file's dictionary, as `read_header` gives those of safetensors.

    Raises AdapterError for a file that is no such zip, a pickle that names anything but tensors,
    and tensors that are compressed, out of bounds or not contiguous.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (pickle,) = (name for name in entries if name.endswith("/data.pkl"))
            root = pickle.removesuffix("data.pkl")
            order = entries.get(f"{root}byteorder")
            if order is not None and (
                order.compress_type or order.file_size > 16 or archive.read(order) != b"little"
            ):
                raise AdapterError(f"{path} is not little-endian")
            if entries[pickle].file_size > MAX_PICKLE or entries[pickle].compress_type:
                raise AdapterError(f"{path}: its pickle is compressed or above {MAX_PICKLE} bytes")
            data = archive.read(pickle)
    except AdapterError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds of errors for broken files
        raise AdapterError(
            f"{path} is not a torch.save file of version 1.6 or later ({type(error).__name__}: "
            f"{str(error)[:100]}); convert it to adapter_model.safetensors"
        ) from None
    table = _walk(data, path)
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise AdapterError(f"{path} holds {type(table).__name__}, expected a dictionary of tensors")
    size = os.fstat(file.fileno()).st_size
    header = {}
    for name, tensor in table.items():
        if not isinstance(tensor, _Tensor):
            raise AdapterError(f"{path}: {name[:120]!r} is no tensor")
        entry = entries.get(f"{root}data/{tensor.storage.key}")
        if entry is None or entry.compress_type:
            raise AdapterError(f"{path}: the data of {name[:120]!r} is missing or compressed")
        header[name] = _info(file, path, name, tensor, entry, size)
    return header


def _info(
    file: BinaryIO, path: Path, name: str, tensor: _Tensor, entry: zipfile.ZipInfo, size: int
) -> TensorInfo:
    dtype, shown = tensor.storage.dtype, f"{path}: tensor {name[:120]!r}"
    width = FLOATS[dtype].itemsize if dtype in FLOATS else OTHERS[dtype]
    count = math.prod(tensor.shape)
    steps = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    wide = [axis for axis, length in enumerate(tensor.shape) if length > 1]
    if len(tensor.shape) != len(tensor.stride) or any(
        tensor.stride[axis] != steps[axis] for axis in wide
    ):
        raise AdapterError(f"{shown} is not contiguous; convert it to adapter_model.safetensors")
    if (tensor.offset + count) * width > min(entry.file_size, tensor.storage.count * width):
        raise AdapterError(f"{shown} reaches beyond its storage of {entry.file_size} bytes")
    file.seek(entry.header_offset)
    local = file.read(30)  # the entry's own header: its names may differ in length from the index
    start = entry.header_offset + 30
    start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start += tensor.offset * width
    if len(local) < 30 or start + count * width > size:
        raise AdapterError(f"{path} is truncated: the data of {name[:120]!r} is not there")
    return TensorInfo(name=name, dtype=dtype, shape=tensor.shape, start=start, nbytes=count * width)


def _walk(data: bytes, path: Path) -> Any:
    """What the pickle builds."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_STEPS:
                raise AdapterError(f"{path}: its pickle has more than {MAX_STEPS} steps")
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo, path)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{path}: its pickle is malformed ({type(error).__name__})") from None
    raise AdapterError(f"{path}: its pickle ends too early")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any], path: Path) -> None:
    """One opcode. Whatever is not needed for a dictionary of tensors is refused."""
    if name in ("PROTO", "FRAME"):
        return
    if name == "MARK":
        stack.append(_Mark())
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _VALUES:
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(_Name(argument))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_Name(f"{module} {attribute}"))
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[int(argument)] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[int(argument)])
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "TUPLE":
        items = _since_mark(stack)
        stack.append(tuple(items))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _put(stack[-1], [key, value])
    elif name == "SETITEMS":
        items = _since_mark(stack)
        _put(stack[-1], items)
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_rebuilt(function, arguments, path))
    elif name == "BUILD":  # attributes of the dictionary: version numbers of modules
        stack.pop()
        if not isinstance(stack[-1], dict):
            raise AdapterError(f"{path}: its pickle sets attributes, which no tensor needs")
    else:
        raise AdapterError(f"{path}: its pickle uses {name}, which no dictionary of tensors needs")


_CONSTANTS: dict[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_VALUES = frozenset(["BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"])


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _put(table: Any, items: list[Any]) -> None:
    if not isinstance(table, dict) or len(items) % 2:
        raise ValueError("no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key in table:
            raise ValueError("a key appears twice")
        table[key] = value


def _storage(persistent: Any) -> _Storage:
    kind, storage, key, _, count = persistent
    module, _, name = storage.text.partition(" ")
    if kind != "storage" or module != "torch" or not isinstance(key, str):
        raise ValueError("no storage")
    return _Storage(key, _TYPES[name], _natural(count))


def _rebuilt(function: Any, arguments: Any, path: Path) -> Any:
    """What the three functions of a dictionary of tensors give; any other is refused by name."""
    text = function.text if isinstance(function, _Name) else type(function).__name__
    if text == _DICTIONARY and arguments == ():
        return {}
    if text == _PARAMETER and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if text == _REBUILD and isinstance(arguments[0], _Storage):
        storage, offset, shape, stride = arguments[:4]
        return _Tensor(
            storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, stride))
        )
    raise AdapterError(
        f"{path}: its pickle calls {text.replace(' ', '.')[:120]!r}; only tensors are read, and "
        "nothing of it is ever run"
    )


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("no size")
    return value
