"""What `read_adapter` takes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.adapters.peft import read_adapter
from tests.adapters.folders import CFG, PROJECTIONS, config, good, module, tensors, write

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def read(folder: Path):
    return read_adapter(folder, CFG)


# ---- accepted -------------------------------------------------------------------------------


def test_a_plain_folder_gives_every_tensor_its_place(tmp_path: Path) -> None:
    adapter = read(good(tmp_path))
    arrays = tensors()
    assert set(adapter.weights) == {(i, p) for i in range(CFG.layers) for p in ("q_proj", "v_proj")}
    for (layer, projection), pair in adapter.weights.items():
        key = f"base_model.model.model.{module(layer, projection)}"
        np.testing.assert_array_equal(pair.a, arrays[f"{key}.lora_A.weight"])
        np.testing.assert_array_equal(pair.b, arrays[f"{key}.lora_B.weight"])
        assert (pair.rank, pair.scaling) == (4, 1.5)
    assert (adapter.rank, adapter.modules) == (4, ["q_proj", "v_proj"])
    assert adapter.nbytes == sum(array.nbytes for array in arrays.values())
    assert adapter.base_model == "tiny/llama"


@pytest.mark.parametrize(
    ("prefix", "middle"),
    [
        ("base_model.model.model.", ""),
        ("base_model.model.model.", ".default"),
        ("base_model.model.model.", ".my-adapter_1"),
        ("base_model.model.", ""),
        ("model.", ""),
        ("", ""),
        ("base_model.model.model.language_model.", ""),
        ("base_model.model.language_model.model.", ""),
        ("model.language_model.", ".default"),
        ("base_model.model._orig_mod.model.", ""),
        ("module.base_model.model.model.", ""),
    ],
)
def test_key_prefixes_in_the_wild_are_understood(tmp_path: Path, prefix: str, middle: str) -> None:
    wild = read(write(tmp_path / "w", config(), tensors(prefix=prefix, middle=middle)))
    assert wild.uid == read(good(tmp_path / "p")).uid


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_any_float_storage_dtype_is_kept_to_its_precision(tmp_path: Path, dtype: str) -> None:
    arrays = tensors(dtype=dtype)
    adapter = read(write(tmp_path, config(), arrays))
    pair = adapter.weights[1, "v_proj"]
    stored = arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    assert pair.a.dtype.name == ("float32" if dtype == "float64" else dtype)
    np.testing.assert_array_equal(pair.a.astype(np.float32), stored.astype(np.float32))


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 200])
def test_ranks_of_any_size_load(tmp_path: Path, rank: int) -> None:
    adapter = read(write(tmp_path, config(r=rank, lora_alpha=0.5), tensors(r=rank)))
    assert adapter.rank == rank
    assert adapter.weights[0, "q_proj"].scaling == 0.5 / rank


def test_an_old_config_without_newer_fields_means_the_defaults(tmp_path: Path) -> None:
    adapter = read(write(tmp_path, {"peft_type": "LORA"}, tensors(r=8)))
    assert adapter.weights[0, "q_proj"].scaling == 1.0
    assert adapter.base_model is None


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_any_one_projection_is_enough(tmp_path: Path, projection: str) -> None:
    facts = config(target_modules=[projection])
    assert read(write(tmp_path, facts, tensors([projection]))).modules == [projection]


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform_may_be_a_number_or_a_list(tmp_path: Path, layers: Any) -> None:
    adapter = read(write(tmp_path, config(layers_to_transform=layers), tensors(layers=[1])))
    assert {layer for layer, _ in adapter.weights} == {1}


@pytest.mark.parametrize(
    "targets",
    [
        None,
        "all-linear",
        r".*\.(q|v)_proj",
        r"(a+)+$" * 50,
        ["self_attn.q_proj", "v_proj"],
        [
            f"model.layers.{i}.self_attn.{p}"
            for i in range(CFG.layers)
            for p in ("q_proj", "v_proj")
        ],
    ],
)
def test_target_modules_are_compared_and_never_run(tmp_path: Path, targets: Any) -> None:
    have = PROJECTIONS if targets == "all-linear" else ("q_proj", "v_proj")
    adapter = read(write(tmp_path, config(target_modules=targets), tensors(have)))
    assert len(adapter.weights) == len(have) * CFG.layers


def test_excluded_modules_need_no_tensors(tmp_path: Path) -> None:
    facts = config(exclude_modules=["layers.0.self_attn.v_proj"])
    arrays = tensors()
    for half in "AB":
        del arrays[f"base_model.model.model.layers.0.self_attn.v_proj.lora_{half}.weight"]
    assert len(read(write(tmp_path, facts, arrays)).weights) == 2 * CFG.layers - 1


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": init} for init in (True, False, "gaussian", "eva", "orthogonal")]
    + [
        {"use_dora": False, "modules_to_save": [], "loftq_config": {}, "qalora_group_size": 16},
        {"eva_config": {"rho": 2.0}, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        {"peft_version": "0.99", "use_new_thing": False, "new_thing_size": 7, "new_thing": "x"},
        {"bias": "none", "use_rslora": None, "rank_pattern": None, "runtime_config": {"a": 1}},
    ],
)
def test_fields_without_effect_at_inference_are_taken(tmp_path: Path, changes: dict) -> None:
    assert read(good(tmp_path / "x", **changes)).uid == read(good(tmp_path / "y")).uid


def test_the_uid_follows_content_and_neither_path_nor_config_wording(tmp_path: Path) -> None:
    first = read(good(tmp_path / "a")).uid
    assert read(good(tmp_path / "b", lora_dropout=0.3, target_modules=None)).uid == first
    assert read(good(tmp_path / "c", lora_alpha=7)).uid != first
    assert read(write(tmp_path / "d", config(), tensors(seed=1))).uid != first
    swapped = tensors()
    a, b = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 1))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert read(write(tmp_path / "e", config(), swapped)).uid != first


@pytest.mark.parametrize(
    "saved",
    [
        {"chat_template.jinja": "T"},
        {"tokenizer_config.json": json.dumps({"chat_template": "T"})},
        {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "tool", "template": "U"}, {"name": "default", "template": "T"}]}
            )
        },
        {"chat_template.jinja": "T", "tokenizer_config.json": "ignored"},
    ],
)  # fmt: skip
def test_a_chat_template_in_the_folder_is_found(tmp_path: Path, saved: dict[str, str]) -> None:
    good(tmp_path)
    for name, text in saved.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path).chat_template == "T"


def test_trainer_state_beside_the_adapter_is_ignored(tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"pickle")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read(tmp_path).chat_template is None
