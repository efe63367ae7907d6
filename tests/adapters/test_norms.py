"""Trained norms: what is refused, what an engine must be started for, and what mixes make of them."""

from pathlib import Path

import numpy as np
import pytest

from jlora.adapters.adapter import LEVELS, NO_LAYER, level_of
from jlora.adapters.groups import page_bytes
from jlora.adapters.mix import mixed
from jlora.adapters.peft import read_adapter, required_support
from jlora.adapters.pool import RankPages
from jlora.errors import AdapterError
from jlora.models.base import BaseWeights
from jlora.models.config import ModelConfig
from jlora.sharding import Layout, make_mesh
from tests.adapters.folders import CFG, PREFIX, config, refused, tensors, write

ATTENTION, LAST = f"{PREFIX}layers.1.input_layernorm.weight", f"{PREFIX}norm.weight"
QUERY = f"{PREFIX}layers.0.self_attn.q_norm.weight"
RIGHT = np.full(64, 2, np.float32)
NAN = np.where(np.arange(64) == 5, np.nan, RIGHT)

REFUSED: dict[str, tuple[list[str] | None, dict[str, np.ndarray], str]] = {
    "too long": (["norm"], {LAST: np.ones(72, np.float32)}, "is [72], expected [64]"),
    "a matrix": (["norm"], {LAST: np.ones((1, 64), np.float32)}, "is [1, 64], expected [64]"),
    "nan": (["norm"], {LAST: NAN}, "NaN or infinite"),
    "a norm of heads that the base lacks": (["q_norm"], {QUERY: RIGHT[:16]}, "none of the modules"),
    "a norm that no base has": (
        ["ln_1"],
        {f"{PREFIX}layers.0.ln_1.weight": RIGHT},
        "none of the modules that adapters may change (q_proj",
    ),
    "a norm in another block": (
        ["input_layernorm"],
        {f"{PREFIX}layers.0.mlp.input_layernorm.weight": RIGHT},
        "none of the modules",
    ),
    "a layer that is not there": (
        ["input_layernorm"],
        {f"{PREFIX}layers.7.input_layernorm.weight": RIGHT},
        "has layers 0 to 1",
    ),
    "not named": (["norm", "lm_head"], {LAST: RIGHT}, "modules_to_save names 'lm_head'"),
    "named, not there": (["input_layernorm"], {}, "'input_layernorm', which has no tensors"),
    "named by nobody": (None, {ATTENTION: RIGHT}, "modules_to_save does not name"),
    "a pair": (
        ["norm"],
        {f"{PREFIX}norm.lora_A.weight": np.ones((4, 64)), f"{PREFIX}norm.lora_B.weight": np.ones((64, 4))},
        "a norm can only be saved whole",
    ),
    "without the base": (["norm"], {LAST: RIGHT}, "relative to the base's own weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_norm_that_fits_nothing_is_refused_by_name(tmp_path: Path, case: str) -> None:
    saved, arrays, reason = REFUSED[case]
    refused(write(tmp_path, config(modules_to_save=saved), tensors() | arrays), reason)


@pytest.fixture(scope="module")
def base(tiny_model) -> tuple[ModelConfig, BaseWeights]:
    folder = tiny_model("llama")
    cfg = ModelConfig.from_folder(folder)
    return cfg, BaseWeights(folder, cfg)


def norms_folder(folder: Path) -> Path:
    saved = ["input_layernorm", "norm"]
    return write(folder, config(modules_to_save=saved), tensors() | {ATTENTION: RIGHT, LAST: RIGHT})


def test_a_norm_is_what_it_adds_to_the_base_and_mixes_add_up(base, tmp_path: Path) -> None:
    cfg, weights = base
    adapter = read_adapter(norms_folder(tmp_path / "a"), cfg, weights)
    assert adapter.support == {"norms"}
    place = (NO_LAYER, "norm")
    offset = adapter.vectors[place].offset
    assert offset is not None
    np.testing.assert_array_equal(weights.norm(*place) + offset, RIGHT)
    mix = mixed("mix", [adapter, adapter], [0.5, -2.0]).vectors[place].offset
    assert mix is not None
    np.testing.assert_allclose(mix, -1.5 * offset, rtol=1e-6)


def test_only_an_engine_that_was_started_for_norms_has_room_for_them(base, tmp_path: Path) -> None:
    cfg, weights = base
    folder = norms_folder(tmp_path / "a")
    adapter = read_adapter(folder, cfg, weights)
    needed = required_support(folder, cfg)
    assert (needed.support, needed.added_tokens) == (adapter.support, 0)
    assert level_of(adapter.support) == "norms"
    layout, mesh = Layout(cfg, 1), make_mesh(1)
    for level in ("plain", "vectors"):
        pages = RankPages(cfg, layout, mesh, 4, np.float32, support=LEVELS[level])
        assert all(set(groups) == {"qkv", "o", "gate_up", "down"} for groups in pages.pools)
        with pytest.raises(AdapterError, match=r"changes norms, .* with --lora-support norms"):
            pages.stage(adapter)
    pages = RankPages(cfg, layout, mesh, 4, np.float32, support=adapter.support)
    staged = pages.stage(adapter)
    assert staged.bound == 2 * cfg.layers + 2  # q_proj and v_proj, two norms
    held = sum(array.nbytes for level in pages.pools for pool in level.values() for array in
               (pool.a, pool.b, pool.scale, pool.offset) if array is not None)  # fmt: skip
    assert held == pages.nbytes
    extra = (2 * cfg.layers + 1) * cfg.embed * 4
    assert pages.bytes_per_page == page_bytes(layout, np.float32) + extra


def test_cfg_of_this_file_is_the_base(base) -> None:
    assert (base[0].layers, base[0].embed) == (CFG.layers, CFG.embed)
