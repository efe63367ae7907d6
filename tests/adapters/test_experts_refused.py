"""Adapters on routers and experts that are broken: refused in one line that says where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError
from jlora.models.config import ModelConfig
from tests import tiny
from tests.adapters.folders import write
from tests.adapters.test_fuzz import one_line

MIXTRAL, QWEN3 = (
    ModelConfig.from_dict(tiny.model_config(name)) for name in ("mixtral", "qwen3_moe")
)
PREFIX = "base_model.model.model.layers."
Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def pair(module: str, rank_in: tuple[int, int], out_rank: tuple[int, int]) -> Tensors:
    shapes = {"A": rank_in, "B": out_rank}
    return {
        f"{PREFIX}{module}.lora_{half}.weight": RNG.standard_normal(shape, dtype=np.float32)
        for half, shape in shapes.items()
    }


def each(block: str = "block_sparse_moe") -> Tensors:
    """w1 of all experts, rank 4."""
    made: Tensors = {}
    for layer in range(2):
        for expert in range(5):
            made |= pair(f"{layer}.{block}.experts.{expert}.w1", (4, 64), (96, 4))
    return made


def stacked(layers: int = 2) -> Tensors:
    """gate_up_proj and down_proj of 5 experts of rank 4."""
    made: Tensors = {}
    for layer in range(layers):
        made |= pair(f"{layer}.mlp.experts.base_layer", (20, 64), (192, 20))
        made |= pair(f"{layer}.mlp.experts", (20, 96), (64, 20))
    return made


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(**changes: Any) -> dict[str, Any]:
    plain = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": 4, "lora_alpha": 8}
    return plain | {key: value for key, value in changes.items() if value is not None}


def put(key: str, shape: tuple[int, ...] = (4, 64)) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({PREFIX + key: np.ones(shape, np.float32)})


def drop(text: str) -> Callable[[Tensors], Any]:
    def edit(tensors: Tensors) -> None:
        for key in [key for key in tensors if text in key]:
            del tensors[key]

    return edit


def refused(folder: Path, reason: str, cfg: ModelConfig = MIXTRAL) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, cfg)
    text = str(caught.value)
    assert "\n" not in text
    assert reason in text, text


EACH: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "expert beyond": (put("0.block_sparse_moe.experts.5.w1.lora_A.weight"), "for expert 5, "),
    "expert far beyond": (
        put("0.block_sparse_moe.experts.99999999.w1.lora_A.weight"),
        "for none of the modules",
    ),
    "expert negative": (
        put("0.block_sparse_moe.experts.-1.w1.lora_A.weight"),
        "for none of the modules",
    ),
    "another family's part": (
        put("0.block_sparse_moe.experts.0.gate_proj.lora_A.weight"),
        "'gate_proj', an expert of 'model' has w1, w3, w2",
    ),
    "layer beyond": (put("2.mlp.experts.0.w1.lora_A.weight"), "for layer 2, 'model' has layers 0 to 1"),
    "half missing": (drop("0.block_sparse_moe.experts.3.w1.lora_B"), "experts.3.w1 in layer 0 has lora_A but no lora_B"),
    "an expert missing": (drop("1.block_sparse_moe.experts.3."), "target_modules names block_sparse_moe.experts.3.w1 in layer 1, which has no tensors (1 modules"),
    "wrong shape": (put("0.block_sparse_moe.experts.3.w1.lora_A.weight", (4, 96)), "expected [r, 64] and [96, r]"),
    "two names": (put("0.mlp.experts.3.w1.lora_A.weight"), "are the same tensor"),
    "not targeted": (
        lambda tensors: tensors.update(pair("0.mlp.experts.3.w3", (4, 64), (96, 4))),
        "experts.3.w3 in layer 0 has tensors but target_modules",
    ),
    "DoRA": (
        put("0.block_sparse_moe.experts.3.w1.lora_magnitude_vector", (96,)),
        "routers and experts take lora_A and lora_B only",
    ),
    "a router's weight": (
        put("0.block_sparse_moe.gate.weight", (5, 64)),
        "routers and experts take lora_A and lora_B only",
    ),
    "a stack among pairs": (
        lambda tensors: tensors.update(pair("0.mlp.experts", (20, 96), (64, 20))),
        "target_parameters names none of the experts in layer 0, the file holds 1 stacks for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(EACH))
def test_a_pair_for_each_expert_that_is_broken_is_refused(tmp_path: Path, case: str) -> None:
    edit, reason = EACH[case]
    tensors = each()
    read_adapter(write(tmp_path / "good", config(target_modules=["w1"]), tensors), MIXTRAL)
    edit(tensors)
    refused(write(tmp_path / "bad", config(target_modules=["w1"]), tensors), reason)


def test_experts_of_a_layer_that_is_dense_are_refused(tmp_path: Path) -> None:
    tensors = pair("1.mlp.experts.0.up_proj", (4, 64), (41, 4))
    folder = write(tmp_path, config(target_modules=["up_proj"]), tensors)
    refused(folder, "is for layer 1, whose MLP has no experts", QWEN3)


STACKED: dict[str, tuple[dict[str, Any], Callable[[Tensors], Any], str]] = {
    "rank differs": ({"r": 5}, lambda _: None, "gate_up_proj of the experts in layer 0 has lora_A [20, 64] and lora_B [192, 20], expected [25, 64] and [192, 25] for 5 experts of rank 5 (peft before 0.19.1: [25, 192] and [64, 25])"),
    "no stack of these experts": ({}, put("0.mlp.experts.lora_A.weight", (21, 96)), "expected [20, 96] and [64, 20] for 5 experts"),
    "not a matrix": ({}, put("0.mlp.experts.lora_A.weight", (5, 4, 96)), "expected [20, 96]"),
    "two orders": ({}, lambda t: t.update(pair("1.mlp.experts", (20, 64), (96, 20))), "some stacks of experts are as peft writes them, others as it did before 0.19.1"),
    "half missing": ({}, drop("1.mlp.experts.lora_A"), "has lora_B but no lora_A"),
    "one missing": ({}, drop("1.mlp.experts.lora_"), "gate_up_proj, down_proj of the experts in layer 1, the file holds 1 stacks"),
    "both missing": ({}, drop("1.mlp."), "in layer 1, the file holds 0 stacks"),
    "inner alone": ({"target_parameters": BOTH[:1]}, drop("mlp.experts.lora_"), "holds 1 stacks for it (experts.base_layer without experts)"),
    "one named": ({"target_parameters": BOTH[:1]}, lambda _: None, "target_parameters names gate_up_proj of the experts in layer 0, the file holds 2 stacks"),
    "none named": ({"target_parameters": None}, lambda _: None, "target_parameters names none of the experts"),
    "unknown": ({"target_parameters": [*BOTH, "experts.bias"]}, lambda _: None, "target_parameters lists 'experts.bias', of which 'model' has none"),
    "router missing": ({"target_parameters": [*BOTH, "gate.weight"]}, lambda _: None, "target_parameters names block_sparse_moe.gate in layer 0, which has no tensors"),
    "no list": ({"target_parameters": "mlp.experts.down_proj"}, lambda _: None, "target_parameters must be a list"),
    "DoRA": ({"use_dora": True}, lambda _: None, "DoRA, lora_bias, PiSSA and OLoRA with target_parameters on experts"),
    "PiSSA": ({"init_lora_weights": "pissa"}, lambda _: None, "with target_parameters on experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(STACKED))
def test_a_stack_of_experts_that_is_broken_is_refused(tmp_path: Path, case: str) -> None:
    changes, edit, reason = STACKED[case]
    tensors, good = stacked(), {"target_modules": [], "target_parameters": BOTH}
    read_adapter(write(tmp_path / "good", config(**good), tensors), MIXTRAL)
    edit(tensors)
    refused(write(tmp_path / "bad", config(**(good | changes)), tensors), reason)


SQUARE = ModelConfig.from_dict(tiny.model_config("mixtral", intermediate_size=64))


@pytest.mark.parametrize(
    ("version", "turned"),
    [
        ("0.17.1", True), ("0.18.1", True), ("0.19.0", True), ("0.19.1", False), ("0.21.2", False),
        ("0.19.0.dev0@abc", True), ("0.20.0.dev0@UNKNOWN", False), ("1.0.0", False),
        ("0.19.1.dev0@abc", None), (None, None), ("new", None),
    ],
)  # fmt: skip
def test_where_shapes_do_not_tell_the_order_pefts_version_must(
    tmp_path: Path, version: str | None, turned: bool | None
) -> None:
    a = RNG.standard_normal((20, 64), dtype=np.float32)
    b = RNG.standard_normal((64, 20), dtype=np.float32)
    tensors = {}
    for layer in range(2):
        tensors[f"{PREFIX}{layer}.mlp.experts.lora_A.weight"] = a
        tensors[f"{PREFIX}{layer}.mlp.experts.lora_B.weight"] = b
    facts = config(target_modules=[], target_parameters=BOTH[1:], peft_version=version)
    folder = write(tmp_path, facts, tensors)
    if turned is None:
        refused(folder, "peft_version in adapter_config.json is", SQUARE)
        return
    adapter = read_adapter(folder, SQUARE)
    for expert in range(5):
        own = adapter.weights[1, f"block_sparse_moe.experts.{expert}.w2"]
        delta = b.reshape(64, 4, 5)[:, :, expert] @ a.reshape(5, 4, 64)[expert]
        want = delta.T if turned else delta
        np.testing.assert_allclose(own.b @ own.a, want, rtol=0, atol=1e-5)
        assert own.scaling == 2


def test_where_the_other_stack_tells_the_order_no_version_is_needed(tmp_path: Path) -> None:
    cfg = ModelConfig.from_dict(tiny.model_config("mixtral", intermediate_size=32))
    tensors: Tensors = {}
    for layer in range(2):  # gate_up_proj is square, down_proj as before 0.19.1
        tensors |= pair(f"{layer}.mlp.experts.base_layer", (20, 64), (64, 20))
        tensors |= pair(f"{layer}.mlp.experts", (20, 64), (32, 20))
    facts = config(target_modules=[], target_parameters=BOTH)
    adapter = read_adapter(write(tmp_path, facts, tensors), cfg)
    key = f"{PREFIX}0.mlp.experts.base_layer.lora_"
    a, b = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
    want = (b.reshape(64, 4, 5)[:, :, 2] @ a.reshape(5, 4, 64)[2]).T
    parts = [adapter.weights[0, f"block_sparse_moe.experts.2.{name}"] for name in ("w1", "w3")]
    got = np.concatenate([own.b for own in parts]) @ parts[0].a
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_file_in_each_way_without_the_config_that_peft_adds_is_read(tmp_path: Path) -> None:
    """The names of transformers 5 for a pair each, and of Mixtral's checkpoints for stacks."""
    adapter = read_adapter(
        write(tmp_path / "a", config(target_modules=["w1"]), each("mlp")), MIXTRAL
    )
    assert (0, "block_sparse_moe.experts.4.w1") in adapter.weights
    tensors = {key.replace(".mlp.", ".block_sparse_moe."): own for key, own in stacked().items()}
    facts = config(target_parameters=["gate_up_proj", "down_proj"])
    adapter = read_adapter(write(tmp_path / "b", facts, tensors), MIXTRAL)
    assert json.dumps(sorted({module for _, module in adapter.touched})).count("w2") == 5


NAMES = st.builds(
    lambda layer, block, module, suffix: f"{PREFIX}{layer}.{block}.{module}.{suffix}",
    st.sampled_from(["0", "1", "7", "x"]),
    st.sampled_from(["mlp", "block_sparse_moe", "self_attn"]),
    st.sampled_from(
        ["experts", "experts.base_layer", "experts.0.w1", "experts.4.w2", "experts.5.w3", "gate",
         "experts.0.up_proj", "experts.w1", "experts.base_layer.base_layer", "gate_proj", ""]
    ),
    st.sampled_from(
        ["lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.bias", "weight", "bias",
         "base_layer.weight", "lora_magnitude_vector", "modules_to_save.weight", ""]
    ),
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 4, 5, 20, 64, 96, 192]), max_size=3)
VALUES = st.one_of(
    st.sampled_from([None, True, "gate", 0, 5, "all-linear", "pissa", "0.18.1", "\n", 1e40]),
    st.lists(
        st.sampled_from(
            [*BOTH, "gate_up_proj", "down_proj", "gate.weight", "w1", "gate", "experts.0.w1", "",
             "q_proj.weight", ".", "mlp.experts.9.w2", "layers.7.mlp.experts.0.w1", "\n", "(a+)+$"]
        ),
        max_size=3,
    ),
)  # fmt: skip
FIELDS = ("target_modules", "target_parameters", "r", "peft_version", "use_dora", "exclude_modules",
          "modules_to_save", "init_lora_weights", "layers_to_transform")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([each, stacked, dict]),
    st.dictionaries(NAMES, SHAPES, max_size=3),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    st.integers(0, 40),
)
def test_whatever_files_about_experts_hold_they_load_or_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[[], Tensors],
    more: dict[str, list[int]],
    changes: dict[str, Any],
    lost: int,
) -> None:
    tensors = start() | {key: np.ones(shape, np.float32) for key, shape in more.items()}
    for key in list(tensors)[lost : lost + 1]:
        del tensors[key]
    facts = config(target_parameters=BOTH) if start is stacked else config(target_modules=["w1"])
    folder = write(tmp_path_factory.mktemp("fuzz"), facts | changes, tensors)
    try:
        adapter = read_adapter(folder, MIXTRAL)
    except AdapterError as error:
        one_line(error)
    else:
        for (layer, module), own in adapter.weights.items():
            width, out = MIXTRAL.shape(module)
            assert (layer < 2, own.a.shape, own.b.shape) == (
                True,
                (own.rank, width),
                (out, own.rank),
            )
    shutil.rmtree(folder)
