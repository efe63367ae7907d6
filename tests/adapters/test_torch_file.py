"""adapter_model.bin: read as torch wrote it, without torch, and never run."""

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlora.adapters.peft import read_adapter
from jlora.adapters.tensors import open_regular, read_tensor
from jlora.adapters.torch_file import read_bin_header
from jlora.errors import AdapterError
from tests.adapters.folders import CFG, config, tensors, write

torch = pytest.importorskip("torch")


def save(path: Path, table: Any, **options: Any) -> Path:
    torch.save(table, path, **options)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    with open_regular(path) as file:
        header = read_bin_header(file, path)
        return {name: read_tensor(file, path, info) for name, info in header.items()}


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_with_a_torch_file_is_the_same_adapter_as_with_safetensors(
    tmp_path: Path, name: str, dtype: Any
) -> None:
    kind = str(dtype).removeprefix("torch.")
    arrays = tensors(dtype=kind)
    good = read_adapter(write(tmp_path / "good", config(), arrays), CFG)
    folder = write(tmp_path / "bin", config(), None)
    table = {key: torch.from_numpy(a.astype(np.float32)).to(dtype) for key, a in arrays.items()}
    save(folder / name, table)
    assert read_adapter(folder, CFG).uid == good.uid


def test_what_torch_can_put_in_a_state_dict_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 5)
    shared = torch.arange(12.0)
    table = module.state_dict()  # an OrderedDict with attributes
    table["parameter"] = torch.nn.Parameter(torch.ones(2, 2))
    table["part"] = shared[4:8].reshape(2, 2)
    table["same storage"] = shared
    table["scalar"] = torch.tensor(2.5)
    table["a row of ones"] = torch.ones(1, 4).T.contiguous().T
    got = read(save(tmp_path / "x.bin", table))
    assert set(got) == set(table)
    for name, tensor in table.items():
        np.testing.assert_array_equal(got[name], tensor.detach().numpy())


def repack(path: Path, bad: Path, change: Callable[[bytes], bytes]) -> Path:
    """The file with another pickle, its checksums right."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bad, "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, change(data) if entry.endswith("data.pkl") else data)
    return bad


class Bomb:
    """Runs a command when a pickle that holds it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([torch.ones(2)], "no dictionary of tensors needs"),
    "a tensor": (torch.ones(2), "expected a dictionary"),
    "text": ({"a": "b"}, "'a' is no tensor"),
    "numbers": ({1: torch.ones(2)}, "expected a dictionary"),
    "a transposed tensor": ({"a": torch.ones(2, 3).T}, "not contiguous"),
    "an expanded tensor": ({"a": torch.ones(1).expand(4)}, "not contiguous"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "nothing of it is ever run"),
    "a complex tensor": ({"a": torch.ones(2, dtype=torch.complex64)}, "malformed"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_what_is_no_dictionary_of_plain_tensors_is_refused(tmp_path: Path, case: str) -> None:
    table, reason = BAD[case]
    with pytest.raises(AdapterError, match=reason):
        read(save(tmp_path / "x.bin", table))


def test_a_pickle_with_code_is_refused_by_the_name_of_what_it_calls_and_not_run(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(2), "b": Bomb(tmp_path / "ran")})
    with pytest.raises(AdapterError, match=r"calls '(posix|nt)\.mkdir'.*nothing of it is ever run"):
        read(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "a bomb that would not go off proves nothing"


def test_files_of_before_torch_1_6_and_plain_pickles_are_refused(tmp_path: Path) -> None:
    old = save(tmp_path / "old.bin", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": 1}))
    for path in (old, tmp_path / "plain.bin"):
        with pytest.raises(AdapterError, match=r"of version 1\.6 or later"):
            read(path)


def test_a_compressed_archive_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.zeros(1000)})
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(AdapterError, match=r"compressed|little"):
        read(tmp_path / "y.bin")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(7)})

    def longer(data: bytes) -> bytes:
        assert data.count(b"K\x07\x85") == 1  # the shape, (7,)
        return data.replace(b"K\x07\x85", b"K\x47\x85")

    with pytest.raises(AdapterError, match="beyond its storage"):
        read(repack(path, tmp_path / "y.bin", longer))


def test_pickles_that_ask_for_much_are_refused_at_once(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(7)})
    bombs = {
        "opcodes": b"\x80\x02" + b"}" * 1_000_000 + b".",
        "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "memo": b"\x80\x02}j\xff\xff\xff\xff.",
        "long": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
        "pop of nothing": b"\x80\x02" + b"\x85" * 9 + b".",
    }
    for name, data in bombs.items():
        with pytest.raises(AdapterError):
            read(repack(path, tmp_path / f"{name}.bin", lambda _, data=data: data))


CHECKS = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large)


@settings(max_examples=200, deadline=None, suppress_health_check=CHECKS)
@given(st.data())
def test_a_garbled_file_is_read_as_finite_tensors_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    def garbled(raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed[: data.draw(st.integers(0, len(raw)))] if cut else changed)

    folder = tmp_path_factory.mktemp("fuzz")
    path = save(folder / "x.bin", {"a": torch.ones(3, 2), "b": torch.zeros(4)})
    cut = data.draw(st.booleans())
    if data.draw(st.booleans()):
        path = repack(path, folder / "y.bin", garbled)
    else:
        path.write_bytes(garbled(path.read_bytes()))
    try:
        found = read(path)
    except AdapterError as error:
        found = {}
        message = str(error)
        assert "\n" not in message, message
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in found.values())
    shutil.rmtree(folder)
