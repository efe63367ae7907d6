"""The safetensors reader: `safetensors` writes and is the oracle; everything garbled is refused."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jlora.adapters.tensors import open_regular, read_header, read_small, read_tensor
from jlora.errors import AdapterError
from tests.adapters import folders


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_regular(path) as file:
        return {
            name: read_tensor(file, path, info) for name, info in read_header(file, path).items()
        }


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)})


@pytest.mark.parametrize("dtype", sorted(folders.DTYPES))
def test_every_float_dtype_reads_back_to_the_same_values(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(folders.DTYPES[dtype])
    values = np.linspace(-3, 3, 24).reshape(4, 6).astype(kind)
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float64": "F64"}
    code = names.get(kind.name, {"float32": "F32", "float16": "F16"}.get(kind.name, "BF16"))
    entry = {"dtype": code, "shape": [4, 6], "data_offsets": [0, values.nbytes]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"t": entry}, values.tobytes()))
    got = read_all(path)["t"]
    assert got.dtype.name in ("float32", "float16", "bfloat16")
    np.testing.assert_array_equal(got.astype(np.float64), values.astype(np.float32))


def test_all_bytes_of_a_good_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    got = read_all(path)
    with safe_open(path, "np") as oracle:
        for name in oracle.keys():  # noqa: SIM118
            np.testing.assert_array_equal(got[name], oracle.get_tensor(name))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD: dict[str, bytes] = {
    "empty": b"",
    "short": b"\0" * 9,
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}" * 8,
    "header beyond the file": (100).to_bytes(8, "little") + b"{}      ",
    "not json": file_of(b"{" * 20),
    "deep json": file_of(b'{"a":' + b"[" * 100000),
    "not utf-8": file_of(b"\xff\xfe\xff\xfe"),
    "a list": file_of([1, 2]),
    "duplicate name": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 8),
    "duplicate field": file_of(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "truncated data": GOOD[:-1],
    "trailing data": GOOD + b"\0",
    "unknown dtype": file_of({"a": F32 | {"dtype": "F33"}}, b"\0" * 8),
    "dtype no text": file_of({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 8),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "entry no object": file_of({"a": 3}),
    "negative shape": file_of({"a": F32 | {"shape": [-2]}}, b"\0" * 8),
    "fractional shape": file_of({"a": F32 | {"shape": [2.0]}}, b"\0" * 8),
    "boolean shape": file_of({"a": F32 | {"shape": [True, 2]}}, b"\0" * 8),
    "overflowing shape": file_of({"a": F32 | {"shape": [1 << 40, 1 << 40]}}, b"\0" * 8),
    "many dimensions": file_of({"a": F32 | {"shape": [1] * 99 + [2]}}, b"\0" * 8),
    "offsets do not fit": file_of({"a": F32 | {"data_offsets": [0, 4]}}, b"\0" * 8),
    "offsets backwards": file_of({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8),
    "three offsets": file_of({"a": F32 | {"data_offsets": [0, 4, 8]}}, b"\0" * 8),
    "overlap": file_of({"a": F32, "b": F32}, b"\0" * 16),
    "hole": file_of({"a": F32, "b": F32 | {"data_offsets": [16, 24]}}, b"\0" * 24),
    "beyond the end": file_of({"a": F32 | {"data_offsets": [1 << 40, (1 << 40) + 8]}}, b"\0" * 8),
    "rank 1e9": file_of(
        {"a": F32 | {"shape": [10**9, 64], "data_offsets": [0, 256 * 10**9]}}, b"\0" * 8
    ),
    "nan": file_of({"a": F32}, np.array([1, np.nan], np.float32).tobytes()),
    "inf": file_of({"a": F32}, np.array([1, -np.inf], np.float32).tobytes()),
    "f64 over float32": file_of({"a": F32 | {"dtype": "F64", "shape": [1]}}, np.array([1e300]).tobytes()),
    "integers": file_of({"a": F32 | {"dtype": "I32"}}, b"\0" * 8),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_garbled_files_are_one_line_errors(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(AdapterError) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_reads_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(content))
    try:
        got = read_all(path)
    except AdapterError:
        return
    # safetensors may be stricter than we are in metadata, which we do not use.
    with contextlib.suppress(SafetensorError), safe_open(path, "np") as oracle:
        assert set(oracle.keys()) == set(got)
        for name, values in got.items():
            np.testing.assert_array_equal(values, oracle.get_tensor(name))


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_header_is_an_adapter_error_or_a_table(
    tmp_path_factory: pytest.TempPathFactory, header: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz2.safetensors"
    path.write_bytes(file_of(header, b"\0" * 8))
    with contextlib.suppress(AdapterError):
        read_all(path)


def test_a_pipe_or_a_folder_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent"):
        with pytest.raises(AdapterError):
            read_small(tmp_path / name, 100)


def test_a_small_file_over_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 101)
    with pytest.raises(AdapterError, match="101 bytes"):
        read_small(tmp_path / "x", 100)
