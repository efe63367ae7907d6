"""What `read_adapter` takes, and everything that it refuses, each with a reason that names it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapters.peft import read_adapter
from jlora.errors import AdapterError, AdapterNotFound
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
    assert (adapter.rank, adapter.pages, adapter.modules) == (4, 1, ["q_proj", "v_proj"])
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
    assert (adapter.rank, adapter.pages) == (rank, -(-rank // 16))
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


# ---- refused: the config --------------------------------------------------------------------

REFUSED_CONFIGS: dict[str, tuple[Any, str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "bias all": ({"bias": "all"}, "biases"),
    "bias lora_only": ({"bias": "lora_only"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "trainable tokens"),
    "target_parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "MoE"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
    "pissa niter": ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "changes the base"),
    "corda": ({"init_lora_weights": "corda"}, "changes the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base"),
    "unknown init": ({"init_lora_weights": "zen"}, "'zen' is not known"),
    "init a list": ({"init_lora_weights": ["pissa"]}, "not known"),
    "ia3": ({"peft_type": "IA3"}, "IA3"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "adalora": ({"peft_type": "ADALORA"}, "ADALORA"),
    "peft_type null": ('{"peft_type": null}', "peft_type"),
    "a switch of the future": ({"use_new_thing": True}, "use_new_thing"),
    "a method of the future": ({"new_thing_config": {"a": 1}}, "new_thing_config"),
    "r 0": ({"r": 0}, "r must be a rank"),
    "r negative": ({"r": -4}, "r must be a rank"),
    "r 1e9": ({"r": 10**9}, "r must be a rank"),
    "r text": ({"r": "4"}, "r must be a rank"),
    "r true": ({"r": True}, "r must be a rank"),
    "r fractional": ({"r": 4.5}, "r must be a rank"),
    "r of another size": ({"r": 5}, "rank 4 in its tensors, adapter_config.json says 5"),
    "alpha text": ({"lora_alpha": "x"}, "lora_alpha must be a finite number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha must be a finite number"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
    "alpha overflows": ({"lora_alpha": 1e30, "alpha_pattern": {"q_proj": 1e39}}, "finite number"),
    "alpha nan": ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "NaN"),
    "alpha inf": ('{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}', "lora_alpha"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "rank_pattern list": ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
    "rank_pattern rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "rank_pattern differs": ({"rank_pattern": {"q_proj": 8}}, "says 8"),
    "rank_pattern lookahead": ({"rank_pattern": {"(?!q)": 4}}, "not supported"),
    "alpha_pattern text": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
    "targets a number": ({"target_modules": 7}, "target_modules"),
    "targets of numbers": ({"target_modules": [7]}, "target_modules"),
    "target without tensors": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj in layer 0"),
    "target all-linear": ({"target_modules": "all-linear"}, "has no tensors"),
    "target lm_head": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "'lm_head', which has no"),
    "target unknown": ({"target_modules": ["q_proj", "v_proj", "w1"]}, "'w1', which has no tensors"),
    "tensors not targeted": ({"target_modules": ["q_proj"]}, "v_proj in layer 0 has tensors"),
    "layers too few": ({"layers_to_transform": [0]}, "layer 1 has tensors"),
    "layers beyond": ({"layers_to_transform": [0, 1, 99]}, "names layer 99"),
    "layers text": ({"layers_to_transform": "all"}, "layers_to_transform"),
    "layers negative": ({"layers_to_transform": [-1]}, "layers_to_transform"),
    "a list": ("[1]", "expected an object"),
    "not json": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "deep": ("[" * 100000, "not valid JSON"),
    "duplicate key": ('{"peft_type": "LORA", "r": 4, "r": 8}', "'r' appears twice"),
    "huge": ('{"x": "' + "x" * (1 << 20) + '"}', "limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED_CONFIGS))
def test_a_config_that_we_do_not_compute_is_refused_by_name(tmp_path: Path, case: str) -> None:
    facts, reason = REFUSED_CONFIGS[case]
    folder = write(tmp_path, facts if isinstance(facts, str) else config(**facts), tensors())
    _refused(folder, reason)


def _refused(folder: Path, reason: str) -> None:
    with pytest.raises(AdapterError) as error:
        read(folder)
    message = str(error.value)
    assert reason in message
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 700


# ---- refused: the tensors -------------------------------------------------------------------

Edit = Callable[[dict[str, np.ndarray]], Any]
ONES = np.ones((4, 64), np.float32)


def put(key: str, value: np.ndarray = ONES) -> Edit:
    return lambda arrays: arrays.update({key: value})


def drop(*parts: str) -> Edit:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        for key in [key for key in arrays if all(part in key for part in parts)]:
            del arrays[key]

    return edit


def recast(dtype: Any) -> Edit:
    return lambda arrays: arrays.update({key: a.astype(dtype) for key, a in arrays.items()})


def poison(value: float) -> Edit:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays[f"{KEY}.lora_B.weight"][5, 2] = value

    return edit


REFUSED_TENSORS: dict[str, tuple[Edit, str]] = {
    "no tensors": (lambda arrays: arrays.clear(), "holds no tensors"),
    "dora": (put(f"{KEY}.lora_magnitude_vector", np.ones(64, np.float32)), "DoRA"),
    "dora, old": (put(f"{KEY}.lora_magnitude_vector.weight", np.ones(64, np.float32)), "DoRA"),
    "lora_bias": (put(f"{KEY}.lora_B.bias", np.ones(64, np.float32)), "lora_bias"),
    "bias": (put(f"{KEY}.base_layer.bias", np.ones(64, np.float32)), "trained bias"),
    "untargeted bias": (put("base_model.model.model.norm.bias"), "trained bias"),
    "modules_to_save": (put("base_model.model.model.norm.weight"), "full weight"),
    "modules_to_save, raw": (put("base_model.model.score.modules_to_save.weight"), "modules_to_save"),
    "embedding": (put("base_model.model.model.embed_tokens.lora_embedding_A"), "embeddings"),
    "embedding copy": (put("base_model.model.model.embed_tokens.base_layer.weight"), "embedding"),
    "lm_head": (put("base_model.model.lm_head.lora_A.weight"), "output head"),
    "token delta": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "trainable tokens",
    ),
    "moe": (put("base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"), "MoE"),
    "kasa": (put(f"{KEY}.lora_diag", np.ones(4, np.float32)), "KaSA"),
    "unknown tensor": (put("surprise", ONES), "unknown tensor"),
    "unknown half": (put(f"{KEY}.lora_C.weight"), "unknown tensor"),
    "unknown module": (put("base_model.model.model.layers.0.mlp.fc1.lora_A.weight"), "none of the"),
    "fused qkv of phi": (put("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"), "none of the"),
    "wrong block": (put("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight"), "none of the"),
    "vision tower": (
        put("base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"),
        "none of the",
    ),
    "kohya": (put("lora_unet_down_blocks_0.lora_down.weight"), "unknown tensor"),
    "layer out of range": (
        put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
        "has layers 0 to 1",
    ),
    "negative layer": (put("base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight"), "none of the"),
    "no layer": (put("base_model.model.model.layers.self_attn.q_proj.lora_A.weight"), "none of the"),
    "A without B": (drop("layers.0", "q_proj.lora_B"), "lora_A but no lora_B"),
    "B without A": (drop("layers.1", "v_proj.lora_A"), "lora_B but no lora_A"),
    "a layer is missing": (drop("layers.1"), "which has no tensors"),
    "two adapters": (lambda arrays: arrays.update(tensors(["o_proj"], middle=".b")), "several adapters"),
    "the same tensor twice": (put("model.layers.0.self_attn.q_proj.lora_A.weight"), "same tensor"),
    "zero-padded layer": (put("model.layers.00.self_attn.q_proj.lora_A.weight"), "same tensor"),
    "int8": (recast(np.int8), "holds I8"),
    "int32": (recast(np.int32), "holds I32"),
    "bool": (recast(bool), "holds BOOL"),
    "nan": (poison(np.nan), "NaN or infinite"),
    "inf": (poison(np.inf), "NaN or infinite"),
    "overflow when scaled": (poison(3e38), "overflows"),
    "a vector": (put(f"{KEY}.lora_A.weight", np.ones(64, np.float32)), "matrices"),
    "conv": (put(f"{KEY}.lora_A.weight", np.ones((4, 64, 1, 1), np.float32)), "matrices"),
    "A of another model": (put(f"{KEY}.lora_A.weight", np.ones((4, 80), np.float32)), "tiny/llama"),
    "B of another model": (put(f"{KEY}.lora_B.weight", np.ones((80, 4), np.float32)), "another base model"),
    "A transposed": (put(f"{KEY}.lora_A.weight", np.ones((64, 4), np.float32)), "expected [r, 64]"),
    "rank of A and B": (put(f"{KEY}.lora_B.weight", np.ones((64, 5), np.float32)), "rank 5 in lora_B"),
    "rank 0": (
        lambda arrays: arrays.update(
            {f"{KEY}.lora_A.weight": ONES[:0], f"{KEY}.lora_B.weight": np.ones((64, 0), np.float32)}
        ),
        "rank 0",
    ),
    "one module of another rank": (
        lambda arrays: arrays.update(
            {f"{KEY}.lora_A.weight": ONES[:2], f"{KEY}.lora_B.weight": np.ones((64, 2), np.float32)}
        ),
        "adapter_config.json says 4",
    ),
    "a key of a megabyte": (put("x" * (1 << 20)), "unknown tensor"),
    "a key of dots": (put("." * 10000 + ".lora_A.weight"), "none of the"),
    "a key with a line": (put(f"{KEY}\n.lora_A.weight"), "unknown tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED_TENSORS))
def test_tensors_that_we_cannot_use_are_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, reason = REFUSED_TENSORS[case]
    arrays = tensors()
    edit(arrays)
    _refused(write(tmp_path, config(), arrays), reason)


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


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, config(), None)
    (tmp_path / name).write_bytes(b"\x80\x04")
    _refused(tmp_path, f"{name}, a pickle")


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    _refused(write(tmp_path, config(), None), "has no adapter_model.safetensors")


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    path = good(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _refused(tmp_path, "truncated")


def test_an_adapter_over_the_byte_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="more than the limit of 100"):
        read_adapter(good(tmp_path), CFG, max_bytes=100)


@pytest.mark.parametrize(
    ("name", "content"),
    [("chat_template.jinja", b"\xff\xfe"), ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]"),
     ("tokenizer_config.json", b'{"chat_template": 3}'), ("chat_template.jinja", b"x" * (2 << 20))],
)  # fmt: skip
def test_a_broken_chat_template_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    good(tmp_path)
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path, name)


def test_a_claimed_terabyte_is_refused_without_allocating_it(tmp_path: Path) -> None:
    write(tmp_path, config(r=1 << 16), None)
    entry = {"dtype": "F32", "shape": [1 << 16, 64], "data_offsets": [0, (1 << 16) * 256]}
    header = json.dumps({f"{KEY}.lora_A.weight": entry}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    _refused(tmp_path, "truncated")


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
