"""Folders and files that are refused, and any config at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError, AdapterNotFound
from tests.adapters.folders import CFG, config, good, refused, write

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def read(folder: Path):
    return read_adapter(folder, CFG)


# ---- refused: the folder --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["absent", "a/b/c", "x" * 5000, "nul\0"])
def test_a_missing_folder_is_not_found(tmp_path: Path, path: str) -> None:
    with pytest.raises(AdapterNotFound, match="No adapter found for"):
        read(tmp_path / path)


def test_a_file_in_place_of_the_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterNotFound, match="is a file"):
        read(tmp_path / "file")


def test_a_folder_of_adapters_names_them(tmp_path: Path) -> None:
    good(tmp_path / "outer" / "mine")
    with pytest.raises(AdapterNotFound, match="in its folders mine"):
        read(tmp_path / "outer")


def test_a_full_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterNotFound, match="full model"):
        read(tmp_path)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path, config(), None), "has no adapter_model.safetensors")


def test_a_truncated_weights_file_isrefused(tmp_path: Path) -> None:
    path = good(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, "truncated")


def test_an_adapter_over_the_byte_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="more than the limit of 100"):
        read_adapter(good(tmp_path), CFG, max_bytes=100)


@pytest.mark.parametrize(
    ("name", "content"),
    [("chat_template.jinja", b"\xff\xfe"), ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]"),
     ("tokenizer_config.json", b'{"chat_template": 3}'), ("chat_template.jinja", b"x" * (2 << 20))],
)  # fmt: skip
def test_a_broken_chat_template_isrefused(tmp_path: Path, name: str, content: bytes) -> None:
    good(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name)


def test_a_claimed_terabyte_is_refused_without_allocating_it(tmp_path: Path) -> None:
    write(tmp_path, config(r=1 << 16), None)
    entry = {"dtype": "F32", "shape": [1 << 16, 64], "data_offsets": [0, (1 << 16) * 256]}
    header = json.dumps({f"{KEY}.lora_A.weight": entry}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(tmp_path, "truncated")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted(
    {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform",
     "bias", "use_rslora", "exclude_modules", "init_lora_weights", "peft_type", "use_dora"}
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_config_is_an_adapter_or_an_adapter_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-config"
    if not folder.exists():
        good(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config() | changes))
    try:
        adapter = read(folder)
    except AdapterError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(np.isfinite(pair.scaling) for pair in adapter.weights.values())


def test_reading_imports_no_jax() -> None:
    code = (
        "import sys; import jlora.adapters.peft, jlora.adapters.store;"
        "assert not {'jax', 'torch', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
