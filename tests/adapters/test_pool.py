"""Rank pages: what lies on the device reproduces each projection's `s · B · A`, on any mesh."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jlora.adapters.adapter import Adapter
from jlora.adapters.groups import page_bytes
from jlora.adapters.mix import mixed
from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import RankPages
from jlora.errors import AdapterError
from jlora.models.config import GROUPS, PROJECTIONS, ModelConfig
from jlora.sharding import Layout, make_mesh
from tests import tiny
from tests.adapters.folders import config, tensors, write

CFG = ModelConfig.from_dict(tiny.model_config("llama"))
ODD = ModelConfig.from_dict(tiny.model_config("llama_odd"))
MESHES = [1, 2, 4]


def adapter(folder: Path, cfg: ModelConfig, targets: Any = PROJECTIONS, **options: Any) -> Adapter:
    rank, alpha = options.pop("r", 8), options.pop("alpha", 12)
    facts = config(r=rank, lora_alpha=alpha, target_modules=list(targets))
    if "layers" in options:
        facts["layers_to_transform"] = list(options["layers"])
    return read_adapter(write(folder, facts, tensors(targets, rank, cfg=cfg, **options)), cfg)


@cache
def pages_for(cfg: ModelConfig, tp: int, num_pages: int = 4, dtype: Any = np.float32) -> RankPages:
    """Shared between tests: each writes all that it looks at."""
    pages = RankPages(cfg, Layout(cfg, tp), make_mesh(tp), num_pages, dtype)
    pages.warm_up()
    return pages


def device_delta(pages: RankPages, ids: list[int], layer: int, group: str) -> dict[str, np.ndarray]:
    """[out, in] of every part in checkpoint order, read back through the layout, in float64.
    A checkpoint row that the layout repeats must be the same in every copy."""
    layout, cfg = pages.layout, pages.cfg
    pool = pages.pools[layer][group]
    a = np.asarray(pool.a)[ids].astype(np.float64)  # [n, parts*16, K]
    b = np.asarray(pool.b)[ids].astype(np.float64)  # [n, 16, N]
    columns = layout.input_index(group)
    deltas, at = {}, 0
    for part in GROUPS[group]:
        width, out = cfg.shape(part)
        deltas[part] = np.full((out, width), np.nan)
    for part, rows in layout.output_index(group):
        width, _ = cfg.shape(part)
        j = GROUPS[group].index(part)
        raw = np.einsum("pri,pro->oi", a[:, 16 * j : 16 * j + 16], b[:, :, at : at + len(rows)])
        full = np.zeros((len(rows), width))
        source = np.arange(width) if columns is None else columns
        assert not raw[:, source < 0].any()
        full[:, source[source >= 0]] = raw[:, source >= 0]
        assert not full[rows < 0].any()
        for row, values in zip(rows, full, strict=True):
            if row >= 0:
                seen = deltas[part][row]
                assert np.isnan(seen).all() or np.array_equal(seen, values)
                deltas[part][row] = values
        at += len(rows)
    return deltas


def check_delta(pages: RankPages, ids: list[int], adapter: Adapter, rtol: float = 1e-5) -> None:
    for layer in range(pages.cfg.layers):
        for group in GROUPS:
            for part, got in device_delta(pages, ids, layer, group).items():
                assert not np.isnan(got).any()
                pair = adapter.weights.get((layer, part))
                if pair is None:
                    assert not got.any()
                    continue
                want = pair.scaling * pair.b.astype(np.float64) @ pair.a.astype(np.float64)
                assert np.abs(want).max() > 1
                np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("tp", MESHES)
@pytest.mark.parametrize("cfg", [CFG, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_written_pages_hold_every_projections_delta(
    tmp_path: Path, cfg: ModelConfig, tp: int, rank: int
) -> None:
    pages = pages_for(cfg, tp)
    one = adapter(tmp_path, cfg, r=rank)
    ids = [3, 1, 4][: -(-one.rank // 16)]
    pages.write(pages.stage(one), ids)
    check_delta(pages, ids, one)


@pytest.mark.parametrize("tp", [1, 2])
def test_pages_that_were_uploaded_before_are_written_as_staged_ones_are(
    tmp_path: Path, tp: int
) -> None:
    pages = pages_for(ODD, tp)
    one, two = adapter(tmp_path / "1", ODD, r=24), adapter(tmp_path / "2", ODD, r=16, seed=1)
    first, second = pages.upload(pages.stage(one)), pages.upload(pages.stage(two))
    pages.write(second, [2])
    pages.write(first, [1, 4])
    check_delta(pages, [1, 4], one)
    check_delta(pages, [2], two)


@pytest.mark.parametrize("tp", MESHES)
@pytest.mark.parametrize(
    "targets", [["k_proj"], ["v_proj", "up_proj"], ["o_proj"], ["down_proj", "q_proj"]]
)
def test_untouched_parts_and_layers_are_zero(tmp_path: Path, tp: int, targets: list[str]) -> None:
    pages = pages_for(ODD, tp)
    full = adapter(tmp_path / "full", ODD, r=16)
    pages.write(pages.stage(full), [2])
    part = adapter(tmp_path / "part", ODD, targets, layers=[1])
    pages.write(pages.stage(part), [2])  # nothing of the page's last owner stays
    check_delta(pages, [2], part)


def test_patterns_of_rank_leave_zero_rows_where_a_projection_has_fewer(tmp_path: Path) -> None:
    arrays = tensors(["q_proj"], 20) | tensors(["up_proj"], 3)
    facts = config(r=20, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3},
                   alpha_pattern={"up_proj": 0.5})  # fmt: skip
    mixed = read_adapter(write(tmp_path, facts, arrays), CFG)
    pages = pages_for(CFG, 2)
    pages.write(pages.stage(mixed), [4, 2])
    check_delta(pages, [4, 2], mixed)


def test_adapters_do_not_touch_each_others_pages(tmp_path: Path) -> None:
    pages = pages_for(CFG, 2)
    one, two = adapter(tmp_path / "1", CFG, r=20), adapter(tmp_path / "2", CFG, r=30, seed=1)
    pages.write(pages.stage(one), [1, 4])
    pages.write(pages.stage(two), [3, 2])
    check_delta(pages, [1, 4], one)
    check_delta(pages, [3, 2], two)
    for groups in pages.pools:
        for pool in groups.values():
            assert not np.asarray(pool.a)[0].any()
            assert not np.asarray(pool.b)[0].any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_scaling_is_folded_in_float32_before_the_cast(
    tmp_path: Path, dtype: Any, stored: str
) -> None:
    pages = pages_for(CFG, 1, dtype=dtype)
    one = adapter(tmp_path, CFG, r=3, alpha=10, dtype=stored)  # 10/3 is inexact in 16 bits
    pages.write(pages.stage(one), [1])
    pair = one.weights[1, "o_proj"]
    want = (pair.b.astype(np.float32) * np.float32(10 / 3)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(pages.pools[1]["o"].b)[1, :3].T, want)
    check_delta(pages, [1], one, rtol=2e-2)


def test_an_overflow_of_the_devices_dtype_is_refused(tmp_path: Path) -> None:
    huge = adapter(tmp_path, CFG, alpha=1e7)
    with pytest.raises(AdapterError, match="do not fit float16; use --dtype bfloat16"):
        RankPages(CFG, Layout(CFG, 1), make_mesh(1), 1, np.float16).stage(huge)


def test_a_mix_that_overflows_float32_is_refused(tmp_path: Path) -> None:
    """Each of its adapters was read without an overflow; their weights come later."""
    large = adapter(tmp_path, CFG, alpha=1e30)
    pages = RankPages(CFG, Layout(CFG, 1), make_mesh(1), 1, np.float32)
    assert pages.stage(large).rank == large.rank
    with pytest.raises(AdapterError, match="do not fit float32"):
        pages.stage(mixed("large*1e10", [large], [1e10]))


COMPILED: list[str] = []


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.mark.parametrize("tp", [1, 4])
def test_writing_adapters_of_any_rank_compiles_nothing(tmp_path: Path, tp: int) -> None:
    COMPILED.clear()
    pages = pages_for(ODD, tp, num_pages=3)
    assert COMPILED
    COMPILED.clear()
    for rank, targets in ((1, ["q_proj"]), (40, PROJECTIONS), (17, ["down_proj", "k_proj"])):
        one = adapter(tmp_path / str(rank), ODD, targets, r=rank)
        pages.write(pages.stage(one), list(range(1, -(-one.rank // 16) + 1)))
    jax.block_until_ready(pages.pools)
    assert COMPILED == []


@pytest.mark.parametrize("tp", MESHES)
def test_writes_keep_shardings_and_donate_the_old_pools(tmp_path: Path, tp: int) -> None:
    pages = RankPages(ODD, Layout(ODD, tp), make_mesh(tp), 4, np.float32)
    before = list(pages.pools)
    pages.write(pages.stage(adapter(tmp_path, ODD, r=32)), [1, 2])
    last = P(None, None, "model")
    for old, new in zip(before, pages.pools, strict=True):
        for group, pool in new.items():
            assert old[group].a.is_deleted()
            assert old[group].b.is_deleted()
            column = group in ("qkv", "gate_up")
            for array, want in (
                (pool.a, P() if column else last),
                (pool.b, last if column else P()),
            ):
                sharded = jax.sharding.NamedSharding(make_mesh(tp), want)
                assert array.sharding.is_equivalent_to(sharded, array.ndim)


@pytest.mark.parametrize("tp", MESHES)
def test_bytes_per_page_are_the_bytes_on_one_device(tp: int) -> None:
    pages = RankPages(ODD, Layout(ODD, tp), make_mesh(tp), 3, ml_dtypes.bfloat16)
    device = jax.devices()[tp - 1]
    arrays = jax.tree.leaves(pages.pools)
    held = sum(
        shard.data.nbytes for array in arrays for shard in array.addressable_shards
        if shard.device == device
    )  # fmt: skip
    assert pages.nbytes == held == 4 * pages.bytes_per_page
    assert pages.bytes_per_page == page_bytes(Layout(ODD, tp), ml_dtypes.bfloat16)


def test_groups_that_are_not_touched_cost_no_host_memory(tmp_path: Path) -> None:
    pages = pages_for(CFG, 1)
    everything = pages.stage(adapter(tmp_path / "all", CFG)).nbytes
    little = pages.stage(adapter(tmp_path / "o", CFG, ["o_proj"])).nbytes
    assert everything == pages.bytes_per_page
    assert little == CFG.layers * 16 * (64 + 64) * 4


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [0, 1], [1, 5], [-1, 2], [1, 2, 3]])
def test_page_ids_that_cannot_be_right_are_refused(tmp_path: Path, ids: list[int]) -> None:
    pages = pages_for(CFG, 1)
    staged = pages.stage(adapter(tmp_path, CFG, r=20))
    with pytest.raises(ValueError, match="page"):
        pages.write(staged, ids)


def test_writing_nothing_is_allowed() -> None:
    pages = RankPages(CFG, Layout(CFG, 1), make_mesh(1), 1, jnp.float32)
    before = list(pages.pools)
    pages.write(None, ())
    assert pages.pools == before


def test_an_adapter_staged_twice_gives_equal_bytes_and_shares_nothing(tmp_path: Path) -> None:
    pages = pages_for(CFG, 2)
    one = adapter(tmp_path, CFG)
    first, second = pages.stage(one), pages.stage(dataclasses.replace(one, path="elsewhere"))
    for group in GROUPS:
        np.testing.assert_array_equal(first.host_pages[0][group].b, second.host_pages[0][group].b)
        assert not np.shares_memory(first.host_pages[0][group].a, second.host_pages[0][group].a)
