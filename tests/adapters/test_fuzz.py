"""Whatever a stranger's adapter folder or config.json holds: it loads, or is refused in one line."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jlora.adapters.mix import parse_mix
from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError, JloraError, ModelError
from jlora.models.base import BaseWeights
from jlora.models.config import ModelConfig
from tests import tiny
from tests.adapters.folders import CFG, config, tensors, write

CHECKS = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=CHECKS)

FIELDS = [
    "alora_invocation_tokens", "alpha_pattern", "base_model_name_or_path", "bias",
    "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layer_replication",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save",
    "peft_type", "r", "rank_pattern", "target_modules", "target_parameters",
    "trainable_token_indices", "use_dora", "use_rslora", "a_field_of_the_future",
]  # fmt: skip
WORDS = st.sampled_from(
    ["q_proj", "v_proj", "lm_head", "embed_tokens", "LORA", "IA3", "all", "pissa", "(", "(a+)+$", "",
     "model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", ".*", "\n", "\x00", "norm"]
)  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 70)
    | st.floats(allow_nan=False)
    | WORDS
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=6,
)


def one_line(error: JloraError) -> None:
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 2000


def loads_or_is_refused(folder: Path, base: Any = None) -> None:
    start = time.monotonic()
    try:
        adapter = read_adapter(folder, CFG, base)
    except AdapterError as error:
        one_line(error)
    else:
        for pair in adapter.weights.values():
            assert np.isfinite(pair.b.astype(np.float32)).all()
            assert np.isfinite(pair.scaling)
    assert time.monotonic() - start < 5, "it must not hang"


@pytest.fixture(scope="module")
def base(tiny_model: Any) -> BaseWeights:
    folder = tiny_model("llama")
    return BaseWeights(folder, ModelConfig.from_folder(folder))


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), st.booleans())
def test_any_config_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, base: Any, changes: dict[str, Any], given_base: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, json.dumps(config() | changes), tensors())
    loads_or_is_refused(folder, base if given_base else None)
    shutil.rmtree(folder)


SUFFIXES = [
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.bias", "lora_embedding_A",
    "lora_embedding_B", "lora_magnitude_vector", "lora_magnitude_vector.weight", "bias", "weight",
    "base_layer.bias", "base_layer.weight", "modules_to_save.weight", "modules_to_save.a.weight",
    "token_adapter.trainable_tokens_delta", "lora_diag", "", "x",
]  # fmt: skip
MODULES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens",
    "lm_head", "model.norm", "model.layers.9.self_attn.q_proj", "score", "",
]  # fmt: skip
NAMES = st.builds(
    lambda prefix, module, suffix: f"{prefix}{module}.{suffix}",
    st.sampled_from(["base_model.model.", "", "module."]),
    st.sampled_from(MODULES),
    st.sampled_from(SUFFIXES),
)
ARRAYS = st.builds(
    lambda shape, kind: np.ones(shape, kind),
    st.lists(st.sampled_from([0, 1, 4, 64, 96, 320]), max_size=2),
    st.sampled_from([np.float32, np.float16, np.int8]),
)


@FUZZ
@given(
    st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=4),
    st.dictionaries(
        st.sampled_from(["use_dora", "lora_bias", "bias", "modules_to_save", "target_modules",
                         "trainable_token_indices"]),
        st.sampled_from([True, "all", ["lm_head"], ["q_proj", "embed_tokens"], [1, 2], None]),
        max_size=3,
    ),
    st.booleans(),
)  # fmt: skip
def test_any_tensors_beside_any_config_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
    base: Any,
    more: dict[str, np.ndarray],
    changes: dict[str, Any],
    alone: bool,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, json.dumps(config() | changes), more if alone else tensors() | more)
    loads_or_is_refused(folder, base)
    shutil.rmtree(folder)


@FUZZ
@given(st.data())
def test_a_garbled_safetensors_file_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("fuzz"), config(), tensors(r=1, layers=[0]))
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    loads_or_is_refused(folder)
    shutil.rmtree(folder)


@FUZZ
@given(
    st.sampled_from(sorted(tiny.FAMILIES)),
    st.lists(st.tuples(st.integers(0, 40), JSON), min_size=1, max_size=3),
    st.sampled_from([4, 5]),
)
@example("llama31", [(13, {"q_proj": None, "\n": None})], 4)
def test_any_config_json_of_a_base_is_read_or_refused(
    family: str, changes: list[tuple[int, Any]], dialect: int
) -> None:
    facts = tiny.model_config(family, dialect=dialect)
    keys = sorted(facts)
    try:
        ModelConfig.from_dict(facts | {keys[i % len(keys)]: value for i, value in changes})
    except ModelError as error:
        one_line(error)


@FUZZ
@given(st.text(alphabet="ab*+-.0123456789e \n\x00", max_size=40))
def test_any_model_name_is_a_mix_or_none(text: str) -> None:
    try:
        terms = parse_mix(text, {"a", "b"})
    except AdapterError as error:
        one_line(error)
    else:
        assert terms is None or all(name in ("a", "b") for name, _ in terms)
