"""The fused Hopper kernel against float64 at real shapes. Run on the device machine: -m gpu."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.lora_matmul import RankPool, Segments, lora_matmul
from kernels_pallas.lora_matmul.shapes import LLAMA_8B

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


def inputs(
    group: str, rows: testing.Rows, pool_pages: int, bucket: int
) -> tuple[jax.Array, jax.Array, RankPool, Segments, tuple[int, ...]]:
    width, parts = LLAMA_8B[group]
    rng = np.random.default_rng(len(rows.adapter))
    x, w = testing.random_inputs(
        rng, rows=len(rows.adapter), width=width, total=sum(parts), dtype=jnp.bfloat16
    )
    pool = testing.random_pool(
        rng, pages=pool_pages, width=width, part_sizes=parts, dtype=jnp.bfloat16
    )
    return x, w, pool, testing.segments(rows, pool_pages=pool_pages, bucket=bucket), parts


@pytest.mark.parametrize(
    ("group", "name", "count", "rank"),
    [
        ("qkv", "zipf", 32, None),
        ("o", "identical", 1, 16),
        ("o", "uniform", 13, None),
        ("gate_up", "distinct", 32, 16),
        ("gate_up", "uniform", 100, None),  # hopper_wide from 65 rows on
        ("down", "uniform", 200, 16),
        ("qkv", "distinct", 64, 16),
        ("qkv", "zipf", 256, 16),
        ("gate_up", "uniform", 256, 16),  # neighbours in a cluster with different pages
        ("o", "uniform", 1000, None),
        ("down", "zipf", 2048, 16),
        ("o", "identical", 4500, 16),  # row blocks that come late in a round
    ],
)
def test_delta_is_exact_while_unused_pages_hold_nan(
    group: str, name: str, count: int, rank: int | None
) -> None:
    rows = testing.pattern(name, count, rank=rank)
    if count > 8:
        rows.adapter[::9] = -1  # base rows in between
    x, w, pool, segs, parts = inputs(group, rows, rows.pages + 9, rows.pages + 5)
    base, delta = testing.exact(x, w, pool, segs, parts)
    unused = np.setdiff1d(np.arange(1, pool.a.shape[0]), np.asarray(segs.pages))
    pool = RankPool(a=pool.a.at[unused].set(jnp.nan), b=pool.b.at[unused].set(jnp.nan))
    f = jax.jit(lambda *a: lora_matmul(*a, part_sizes=parts, implementation="hopper"))
    out = f(x, w, pool, segs)
    assert testing.delta_error(np.asarray(out.astype(jnp.float32)), base, delta) < 1.5e-2


@pytest.mark.parametrize("group", list(LLAMA_8B))
@pytest.mark.parametrize("count", [1, 8, 32, 64])
def test_delta_of_a_single_page_is_exact_and_bitwise_the_same_again(group: str, count: int) -> None:
    rows = testing.pattern("identical", count)
    if count > 8:
        rows.adapter[::9] = -1  # base rows in between
    x, w, pool, segs, parts = inputs(group, rows, 9, 1)
    base, delta = testing.exact(x, w, pool, segs, parts)
    unused = np.setdiff1d(np.arange(1, 9), np.asarray(segs.pages))
    pool = RankPool(a=pool.a.at[unused].set(jnp.nan), b=pool.b.at[unused].set(jnp.nan))
    f = jax.jit(lambda *a: lora_matmul(*a, part_sizes=parts, implementation="hopper"))
    outs = [np.asarray(f(x, w, pool, segs).astype(jnp.float32)) for _ in range(5)]
    assert testing.delta_error(outs[0], base, delta) < 1.5e-2
    assert all(np.array_equal(outs[0], other) for other in outs)


@pytest.mark.parametrize("count", [32, 256, 2048])
def test_repeated_and_chained_calls_leave_the_counters_clean_and_agree_bitwise(count: int) -> None:
    rows = testing.pattern("uniform", count)
    x, w, pool, segs, parts = inputs("o", rows, 40, 40)

    @jax.jit
    def chain(x: jax.Array) -> list[jax.Array]:
        out = []
        for _ in range(12):
            y = lora_matmul(x, w, pool, segs, part_sizes=parts, implementation="hopper")
            out.append(y)
            x = jax.lax.optimization_barrier(x + 0 * y)
        return out

    outs = [np.asarray(y.astype(jnp.float32)) for _ in range(5) for y in chain(x)]
    assert all(np.array_equal(outs[0], other) for other in outs)


def test_a_base_row_of_a_prefill_does_not_depend_on_the_adapters_beside_it() -> None:
    rows = testing.pattern("uniform", 2048, resident=8)
    rows.adapter[1::2] = -1
    x, w, pool, segs, parts = inputs("qkv", rows, 40, 8)
    none = testing.segments(testing.pattern("base", 2048), pool_pages=40, bucket=8)
    f = jax.jit(lambda *a: lora_matmul(*a, part_sizes=parts, implementation="hopper"))
    some, alone = (np.asarray(f(x, w, pool, s).astype(jnp.float32)) for s in (segs, none))
    assert np.array_equal(some[1::2], alone[1::2])


def test_no_active_page_gives_the_base_matmul() -> None:
    rows = testing.pattern("base", 32)
    x, w, pool, segs, parts = inputs("o", rows, 9, 8)
    f = jax.jit(lambda *a: lora_matmul(*a, part_sizes=parts, implementation="hopper"))
    out = np.asarray(f(x, w, pool, segs).astype(jnp.float32), np.float64)
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(w.astype(jnp.float32))
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 4e-3


def test_one_compiled_program_serves_any_number_of_adapters() -> None:
    x, w, pool, _, parts = inputs("o", testing.pattern("base", 32), 40, 32)
    traced = []

    @jax.jit
    def f(*args: Any) -> jax.Array:
        traced.append(1)
        return lora_matmul(*args, part_sizes=parts, implementation="hopper")

    for name in ("base", "identical", "zipf", "distinct"):
        segs = testing.segments(testing.pattern(name, 32), pool_pages=40, bucket=32)
        jax.block_until_ready(f(x, w, pool, segs))
    assert len(traced) == 1
