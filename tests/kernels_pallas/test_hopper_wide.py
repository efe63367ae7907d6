"""The Hopper kernel for many rows in Mosaic GPU's interpreter, its lists of pages and its tiles.

The interpreter has no counters between blocks: it runs the shrink and the product as two launches,
and knows no clusters. tests/gpu runs the one launch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.lora_matmul import Segments, hopper
from kernels_pallas.lora_matmul.hopper_wide import page_lists, shrink_work
from kernels_pallas.lora_matmul.hopper_wide_tuning import (
    BK,
    CHUNK,
    SHARED_BYTES,
    Tuning,
    shared_bytes,
    tuning,
)
from kernels_pallas.lora_matmul.shapes import LLAMA_8B
from tests.kernels_pallas.test_hopper import case, interpreted

SMALL = Tuning(bn=64, stages=2, tail=1, early=1)
SPLIT = dataclasses.replace(SMALL, split=2, out_columns=32)


@interpreted
@pytest.mark.parametrize(
    ("group", "count", "name", "rank", "config", "blocks"),
    [
        ("qkv", 130, "uniform", 16, SMALL, 2),
        ("gate_up", 128, "zipf", None, dataclasses.replace(SMALL, bn=128), 40),
        ("down", 128, "uniform", 16, SPLIT, 2),
        ("down", 128, "uniform", 16, dataclasses.replace(SMALL, tail=9), 4),
        ("qkv", 300, "identical", 16, dataclasses.replace(SMALL, overlap=True, span=2), 3),
    ],
    ids=[
        "K whole",
        "whole chunks",
        "split K",
        "blocks without a tile shrink",
        "stores beside the next tile",
    ],
)
def test_interpreted_kernel_matches_float64(
    group: str, count: int, name: str, rank: int | None, config: Tuning, blocks: int
) -> None:
    rows = testing.pattern(name, count, rank=rank, resident=4)
    rows.adapter[::5] = -1
    x, w, pool, segs, parts = case(group, rows)
    out = hopper.matmul(
        x, w, pool, segs, part_sizes=parts, config=config, sms=blocks, interpret=True
    )
    base, delta = testing.exact(x, w, pool, segs, parts)
    got = np.asarray(out.astype(jnp.float32).sum(0))
    assert testing.delta_error(got, base, delta) < testing.tolerance(jnp.dtype("bfloat16"))


@interpreted
def test_a_base_row_does_not_depend_on_the_adapters_beside_it() -> None:
    rows = testing.pattern("uniform", 128, resident=3)
    rows.adapter[1::2] = -1
    x, w, pool, segs, parts = case("o", rows)
    pool = jax.tree.map(jnp.nan_to_num, pool)
    none = dataclasses.replace(
        segs, owner=jnp.full_like(segs.owner, -1), adapter=jnp.full_like(segs.adapter, -1)
    )

    def run(segs: Segments) -> np.ndarray:
        out = hopper.matmul(x, w, pool, segs, part_sizes=parts, config=SMALL, sms=2, interpret=True)
        return np.asarray(out.astype(jnp.float32).sum(0))

    assert np.array_equal(run(segs)[1::2], run(none)[1::2])


def test_page_lists_hold_the_pages_that_occur_in_a_row_block() -> None:
    segs = Segments(
        pages=jnp.asarray([7, 8, 3, 0]),
        owner=jnp.asarray([0, 0, 1, -1]),
        adapter=jnp.asarray([-1] * 4 + [0] * 4 + [1] * 6),
    )
    ids, places, counts, mask = (np.asarray(v) for v in page_lists(segs, 16, 4))
    assert counts.tolist() == [0, 2, 1, 1]
    assert [row[:3].tolist() for row in ids] == [[0, 0, 0], [7, 8, 0], [3, 0, 0], [3, 0, 0]]
    assert ids.shape == (4, 4 + CHUNK)
    used = [mask[place] for place in places[1]]
    assert [np.flatnonzero(rows).tolist() for rows in used[:3]] == [[4, 5, 6, 7]] * 2 + [[]]
    assert mask[places[3, 0]].tolist() == [0.0] * 8 + [1.0] * 6 + [0.0] * 2


@pytest.mark.parametrize("rows", [136, 256, 512, 2048, 2304, 8192])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_tiles_fit_shared_memory_and_divide_the_shape(rows: int, group: str) -> None:
    width, parts = LLAMA_8B[group]
    t = tuning(rows, width, parts, 132)
    assert shared_bytes(t) <= SHARED_BYTES
    assert all(size % t.bn == 0 for size in parts)
    assert width % (BK * t.split) == 0
    assert t.tail + t.bn // t.out_columns <= width // BK // t.split
    assert t.group(len(parts)) * len(parts) * 16 <= t.bn


def test_every_group_of_pages_of_a_row_block_is_a_unit_and_every_page_a_sum():
    counts = jnp.asarray([3, 0, 1, 4])
    units, sums, totals = shrink_work(counts, pages=5, group=2)
    assert totals.tolist() == [5, 8]
    assert units.T[:5].tolist() == [[0, 0], [0, 1], [2, 0], [3, 0], [3, 1]]
    first = [[0, 0, 0], [0, 1, 0], [0, 2, 1], [2, 0, 2]]
    assert sums.T[:8].tolist() == [*first, [3, 0, 3], [3, 1, 3], [3, 2, 4], [3, 3, 4]]
    assert units.shape == (2, 4 * 3)
    assert sums.shape == (3, 4 * 5)


def test_a_part_that_no_tile_divides_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        tuning(2048, 4096, (4096, 96, 96), 132)
