"""Adapters that are refused, each with a reason that names it: configs and tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters.folders import config, refused, tensors, write

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


# ---- refused: the config --------------------------------------------------------------------

REFUSED_CONFIGS: dict[str, tuple[Any, str]] = {
    "dora without magnitudes": ({"use_dora": True}, "has no DoRA tensor"),
    "bias of another kind": ({"bias": "some"}, "bias must be none, all or lora_only"),
    "lora_bias without biases": ({"lora_bias": True}, "has no lora_bias tensor"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "names embed_tokens, without tensors"),
    "tokens of a layer": ({"trainable_token_indices": {"q_proj": [1]}}, "expected embed_tokens or"),
    "tokens twice": ({"trainable_token_indices": [1, 1]}, "different token ids"),
    "tokens below 0": ({"trainable_token_indices": [-1]}, "different token ids"),
    "modules_to_save text": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
    "target_parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "of which 'model' has none"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "pissa without the base": ({"init_lora_weights": "pissa"}, "relative to the base's own weights"),
    "pissa niter": ({"init_lora_weights": "pissa_niter_16"}, "cannot be computed again"),
    "olora without the base": ({"init_lora_weights": "olora"}, "relative to the base's own weights"),
    "corda": ({"init_lora_weights": "corda"}, "cannot be computed again"),
    "loftq": ({"init_lora_weights": "loftq"}, "cannot be computed again"),
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
    "target lm_head": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "names lm_head, which has no tensors"),
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
    refused(folder, reason)


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
    "dora": (put(f"{KEY}.lora_magnitude_vector", np.ones(64, np.float32)), "does not say use_dora"),
    "dora, old": (put(f"{KEY}.lora_magnitude_vector.weight", np.ones(64, np.float32)), "does not say use_dora"),
    "lora_bias": (put(f"{KEY}.lora_B.bias", np.ones(64, np.float32)), "lora_bias"),
    "bias": (put(f"{KEY}.base_layer.bias", np.ones(64, np.float32)), "trained bias"),
    "bias of a norm": (put("base_model.model.model.norm.bias"), "a norm can only be saved whole"),
    "bias of another module": (put("model.layers.0.mlp.up_proj.bias"), "trained bias"),
    "norm that nobody saved": (put("base_model.model.model.norm.weight"), "modules_to_save does not name"),
    "head of another size": (put("base_model.model.lm_head.weight"), "is [4, 64], expected [320, 64]"),
    "classifier": (put("base_model.model.score.modules_to_save.weight"), "none of the modules"),
    "weight of a layer": (put(f"{KEY}.base_layer.weight"), "weight of the base itself"),
    "embedding": (put("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens has lora_A but no lora_B"),
    "embedding copy": (put("base_model.model.model.embed_tokens.base_layer.weight"), "is [4, 64], expected [320, 64]"),
    "lm_head": (put("base_model.model.lm_head.lora_A.weight"), "lm_head has lora_A but no lora_B"),
    "token delta": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "trainable_token_indices and the tensors disagree",
    ),
    "moe": (
        put("base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"),
        "for none of the modules",
    ),
    "kasa": (put(f"{KEY}.lora_diag", np.ones(4, np.float32)), "KaSA"),
    "unknown tensor": (put("surprise", ONES), "unknown tensor"),
    "unknown half": (put(f"{KEY}.lora_C.weight"), "none of the"),
    "unknown module": (put("base_model.model.model.layers.0.mlp.fc1.lora_A.weight"), "none of the"),
    "fused qkv of phi": (put("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"), "none of the"),
    "wrong block": (put("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight"), "none of the"),
    "vision tower": (
        put("base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"),
        "none of the",
    ),
    "kohya": (put("lora_unet_down_blocks_0.lora_down.weight"), "none of the"),
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
    refused(write(tmp_path, config(), arrays), reason)
