"""The Hopper attention kernels in Mosaic GPU's interpreter, how work is dealt, and what is refused.

The interpreter has no atomics: it sums split rows in a second launch. tests/gpu runs the one launch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.paged_attention import cases, hopper, hopper_plan, paged_attention

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11 (run .venv312)"
)
Heads = functools.partial(cases.Heads, width=64)


def error(out: jax.Array, step: cases.Step, **options) -> float:
    """|out - exact| / |exact| of the tokens that are no padding; infinity if anything is NaN."""
    real = np.asarray(step.positions) >= 0
    want = cases.exact(step, **options)[real]
    got = np.asarray(out.astype(jnp.float32), np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got[real] - want) / np.linalg.norm(want))


@interpreted
@pytest.mark.parametrize(
    ("heads", "page", "window", "softcap"),
    [
        (Heads(heads=4, kv_heads=2), 16, None, None),
        (Heads(heads=7, kv_heads=1), 32, 100, 5.0),
        (Heads(heads=2, kv_heads=2), 128, 70, None),
    ],
)
def test_decode_rows_of_any_length_equal_float64_while_unseen_pages_hold_nan(
    heads, page, window, softcap
):
    step = cases.step([100, 0, 5, 900, 64], shape=heads, page=page, poison=True)
    options = {"scale": 0.125, "window": window, "softcap": softcap}
    # The long row comes in two or three pieces, unless its window is short.
    out = hopper.decode_rows(*step.arrays, **options, workers=5, blocks=4, interpret=True)
    assert error(out, step, **options) < testing.tolerance(jnp.dtype(jnp.bfloat16))
    assert not np.asarray(out[1].astype(jnp.float32)).any()  # padding


@interpreted
def test_pieces_of_very_low_scores_are_no_less_than_none():
    step = cases.step([900, 3], shape=Heads(heads=4, kv_heads=2))
    step = dataclasses.replace(step, q=jnp.full_like(step.q, 8), keys=step.keys - 6)
    out = hopper.decode_rows(
        *step.arrays, scale=0.125, window=None, softcap=None, workers=5, blocks=4, interpret=True
    )
    assert error(out, step, scale=0.125) < testing.tolerance(jnp.dtype(jnp.bfloat16))


@interpreted
@pytest.mark.parametrize(
    ("heads", "prompts", "page", "block", "window", "softcap"),
    [
        (Heads(heads=2, kv_heads=1), [(200, 94), (0, 0)], 16, 64, None, None),
        (Heads(heads=3, kv_heads=1), [(0, 64), (250, 70)], 32, 64, 100, 5.0),
        (Heads(heads=1, kv_heads=1), [(300, 128)], 256, 128, 70, None),
    ],
)
def test_prefill_blocks_after_any_context_equal_float64_while_unseen_pages_hold_nan(
    heads, prompts, page, block, window, softcap
):
    step = cases.step([70] * 8, prompts, shape=heads, page=page, block=block, poison=True)
    options = {"scale": 0.125, "window": window, "softcap": softcap}
    decoded = step.q[:8] + 1
    args: Any = (*step.arrays, decoded)
    out = hopper.prefill_blocks(*args, decode=8, block=block, **options, interpret=True)
    assert (out[:8] == decoded).all()
    alone = cases.Step(
        q=step.q[8:], keys=step.keys, values=step.values, tables=step.tables[8:],
        positions=step.positions[8:], decode=0, block=block,
    )  # fmt: skip
    assert error(out[8:], alone, **options) < testing.tolerance(jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("page", [16, 128])
def test_every_tile_is_dealt_to_one_worker_in_even_shares_and_no_tiny_pieces(window, page):
    rng = np.random.default_rng(7)
    for _ in range(5):
        rows = int(rng.integers(1, 12))
        lengths = rng.integers(0, 2000, rows) * (rng.random(rows) < 0.7)
        positions = jnp.asarray(lengths - 1, jnp.int32)
        table = 2048 // page
        tables = jnp.arange(rows * table, dtype=jnp.int32).reshape(rows, table)
        span = hopper_plan.Span(window)
        layout = hopper_plan.Layout(span=span, kv_heads=2, page=page, workers=9, stages=2)
        plan = hopper_plan.plan(positions, tables, layout)
        work = np.asarray(plan.work)
        want = [
            (row, head, tile)
            for row, at in enumerate(np.asarray(positions))
            for head in range(2)
            for tile in range(int(span.tiles(jnp.int32(at))))
        ]
        starts = np.cumsum(work[:, 0]) - work[:, 0]
        assert work[:, 0].sum() == len(want)
        least, per = hopper_plan.LEAST, work[0, 1]
        assert work[:, 0].max() <= per + 2 * (least - 1)
        for start, (count, _, *entries) in zip(starts, work, strict=True):
            for i in range(min(count, 2)):
                row, head, tile, at, *pages = entries[i * layout.entry : (i + 1) * layout.entry]
                assert (row, head, tile, at) == (*want[start + i], positions[row])
                first = int(span.first(jnp.int32(at))) + tile
                assert row * table <= min(pages)
                assert max(pages) <= row * table + at // page
                assert first * 64 // page in [page - row * table for page in pages] or window
        sharers: dict[tuple[int, int], list[int]] = {}
        for worker, (begin, tiles) in enumerate(zip(starts, work[:, 0], strict=True)):
            for row, head, _ in want[begin : begin + tiles]:
                sharers.setdefault((row, head), []).append(worker)
        for (row, head), workers in sharers.items():
            start = jnp.int32(want.index((row, head, 0)))
            first, last = layout.sharers(start, jnp.int32(len(workers)), per)
            assert (first, last) == (workers[0], workers[-1])
            pieces = np.unique(workers, return_counts=True)[1]
            assert len(pieces) == 1 or pieces.min() >= least
        before, following = np.asarray(plan.rows)
        tiles = np.asarray(span.tiles(positions))
        assert (before == np.cumsum(tiles) - tiles).all()
        for row in range(rows):
            later = [r for r in range(row + 1, rows) if tiles[r]]
            assert following[row] == (later[0] if later else rows - 1)


@pytest.mark.parametrize(("rows", "length"), [(8, 160), (16, 160), (32, 160), (8, 300), (4, 1)])
def test_short_rows_have_a_worker_each_for_a_kv_head_and_the_first_workers_take_them(rows, length):
    layout = hopper_plan.Layout(
        span=hopper_plan.Span(None), kv_heads=8, page=16, workers=264, stages=3
    )
    positions = jnp.full(rows, length - 1, jnp.int32)
    plan = hopper_plan.plan(positions, jnp.zeros((rows, 20), jnp.int32), layout)
    counts = np.asarray(plan.work)[:, 0]
    assert (counts[: 8 * rows] == -(-length // 64)).all()
    assert not counts[8 * rows :].any()


@interpreted
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16 or float16"),
        ({"shape": cases.Heads(heads=2, kv_heads=1, width=96)}, "heads of 96"),
        ({"page": 48}, "pages of 48"),
    ],
)
def test_what_no_kernel_can_do_is_refused_with_the_reason(change, reason):
    step = cases.step([5], **{"shape": Heads(heads=2, kv_heads=1), **change})
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention(*step.arrays, decode=1, block=64, scale=1.0, implementation="hopper")


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.10 only")
def test_the_kernels_are_refused_before_jax_0_11():
    step = cases.step([5], shape=Heads(heads=2, kv_heads=1))
    with pytest.raises(NotImplementedError, match=r"need jax 0\.11"):
        paged_attention(*step.arrays, decode=1, block=64, scale=1.0, implementation="hopper")
