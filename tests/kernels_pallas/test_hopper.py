"""The fused Hopper kernel in Mosaic GPU's interpreter, and the tile sizes it picks.

The interpreter has no grid-wide counters: it runs the kernel's three phases as three launches.
tests/gpu runs the one launch. jax 0.10, where the kernel is refused, cannot interpret it either.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.lora_matmul import RankPool, Segments, hopper, lora_matmul
from kernels_pallas.lora_matmul.hopper_tuning import (
    SHARED_BYTES,
    Tuning,
    _shared_bytes,
    for_pages,
    single_page,
    tuning,
)
from kernels_pallas.lora_matmul.shapes import LLAMA_8B, TINY

BLOCKS = 2  # the interpreter runs every warpgroup of every block as a thread
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 (run .venv312)"
)
SMALL = Tuning(
    bn=64, bk=64, split=1, stages=2, slices=2, group=2, shrink_stages=2, tail=1
)  # fmt: skip


SINGLE = single_page(dataclasses.replace(SMALL, split=2, slices=4))


def case(
    group: str, rows: testing.Rows, bucket: int | None = None
) -> tuple[jax.Array, jax.Array, RankPool, Segments, tuple[int, ...]]:
    width, parts = TINY[group]
    rng, kind = np.random.default_rng(3), jnp.dtype("bfloat16")
    x, w = testing.random_inputs(
        rng, rows=len(rows.adapter), width=width, total=sum(parts), dtype=kind
    )
    pages = rows.pages + 4
    pool = testing.random_pool(rng, pages=pages, width=width, part_sizes=parts, dtype=kind)
    segs = testing.segments(rows, pool_pages=pages, bucket=bucket or rows.pages + 1)
    unused = np.setdiff1d(np.arange(1, pages), np.asarray(segs.pages))
    pool = RankPool(a=pool.a.at[unused].set(jnp.nan), b=pool.b.at[unused].set(jnp.nan))
    return x, w, pool, segs, parts


@interpreted
@pytest.mark.parametrize(
    ("group", "count", "name", "config"),
    [
        ("qkv", 13, "uniform", SMALL),
        ("down", 16, "zipf", Tuning(bn=64, bk=128, split=2, stages=2, slices=4, group=4,
                                    shrink_stages=2, tail=1)),
        ("gate_up", 64, "uniform", SMALL),
    ],
)  # fmt: skip
def test_interpreted_kernel_matches_float64(
    group: str, count: int, name: str, config: Tuning
) -> None:
    rows = testing.pattern(name, count, rank=None, resident=4)
    rows.adapter[::5] = -1
    x, w, pool, segs, parts = case(group, rows)
    out = hopper.matmul(
        x, w, pool, segs, part_sizes=parts, config=config, sms=BLOCKS, interpret=True
    )
    base, delta = testing.exact(x, w, pool, segs, parts)
    got = np.asarray(out.astype(jnp.float32).sum(0))
    assert testing.delta_error(got, base, delta) < testing.tolerance(jnp.dtype("bfloat16"))


@interpreted
@pytest.mark.parametrize("group", ["qkv", "down"])
def test_interpreted_kernel_for_a_single_page_matches_float64(group: str) -> None:
    rows = testing.pattern("uniform", 13, rank=16, resident=1)
    rows.adapter[::5] = -1
    x, w, pool, segs, parts = case(group, rows, bucket=1)
    own = {"part_sizes": parts, "config": SINGLE, "sms": BLOCKS, "interpret": True}
    out = hopper.matmul(x, w, pool, segs, **own)
    base, delta = testing.exact(x, w, pool, segs, parts)
    got = np.asarray(out.astype(jnp.float32).sum(0))
    assert testing.delta_error(got, base, delta) < testing.tolerance(jnp.dtype("bfloat16"))


@interpreted
def test_interpreted_kernel_for_a_single_page_without_any_is_the_product() -> None:
    x, w, pool, segs, parts = case("qkv", testing.pattern("base", 9), bucket=1)
    own = {"part_sizes": parts, "config": SINGLE, "sms": BLOCKS, "interpret": True}
    got = np.asarray(hopper.matmul(x, w, pool, segs, **own).astype(jnp.float32).sum(0))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert np.linalg.norm(got - exact) < 4e-3 * np.linalg.norm(exact)


def test_a_single_page_is_not_summed_only_where_its_slices_fill_expand_steps() -> None:
    assert SINGLE.single
    assert not single_page(SMALL).single
    x, w, pool, several, parts = case("o", testing.pattern("uniform", 8, rank=16, resident=2))
    own = {"part_sizes": parts, "config": SINGLE, "sms": BLOCKS, "interpret": True}
    with pytest.raises(ValueError, match="one rank page, 3 may be active"):
        hopper.matmul(x, w, pool, several, **own)
    wrong = dataclasses.replace(SMALL, single=True, group=1)
    x, w, pool, segs, parts = case("o", testing.pattern("base", 8), bucket=1)
    own = {"part_sizes": parts, "config": wrong, "sms": BLOCKS, "interpret": True}
    with pytest.raises(ValueError, match="2 slices"):
        jax.eval_shape(lambda *args: hopper.matmul(*args, **own), x, w, pool, segs)


@interpreted
@pytest.mark.parametrize("split", [1, 2])
def test_interpreted_base_product_matches_float64(split: int) -> None:
    x, w, _, _, parts = case("gate_up", testing.pattern("base", 13))
    config = dataclasses.replace(SMALL, split=split)
    out = hopper.base_matmul(x, w, part_sizes=parts, config=config, sms=BLOCKS, interpret=True)
    assert out.shape == (split, 13, sum(parts))
    assert out.dtype == (jnp.bfloat16 if split == 1 else jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    got = np.asarray(out.astype(jnp.float32).sum(0))
    assert np.linalg.norm(got - exact) < 4e-3 * np.linalg.norm(exact)


def test_gradients_of_the_base_product_are_those_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _, _, parts = case("o", testing.pattern("base", 8))

    def fused(x: jax.Array, w: jax.Array) -> jax.Array:
        own = {"part_sizes": parts, "config": SMALL, "sms": BLOCKS, "interpret": True}
        return hopper.base_matmul(x, w, **own).sum(0)

    monkeypatch.setattr(
        hopper, "_launch", lambda x, w, **_: jnp.zeros((1, len(x), w.shape[1]), x.dtype)
    )
    dy = jnp.ones((8, sum(parts)), jnp.bfloat16)
    for got, want in zip(
        jax.vjp(fused, x, w)[1](dy), jax.vjp(lambda x, w: x @ w, x, w)[1](dy), strict=True
    ):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_a_launch_for_few_rows_refuses_more() -> None:
    x, w, pool, segs, parts = case("o", testing.pattern("uniform", 65, rank=16, resident=3))
    own = {"part_sizes": parts, "config": SMALL, "sms": BLOCKS, "interpret": True}
    with pytest.raises(NotImplementedError, match="65 rows: up to 64"):
        hopper.matmul(x, w, pool, segs, **own)
    with pytest.raises(NotImplementedError, match="65 rows: up to 64"):
        hopper.base_matmul(x, w, **own)


def test_gradients_of_the_fused_matmul_are_those_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = testing.pattern("uniform", 8, rank=16, resident=2)
    x, w, pool, segs, parts = case("o", rows)
    pool = jax.tree.map(jnp.nan_to_num, pool)

    def plain(x: jax.Array, w: jax.Array, pool: RankPool) -> jax.Array:
        return lora_matmul(x, w, pool, segs, part_sizes=parts, implementation="xla")

    def fused(x: jax.Array, w: jax.Array, pool: RankPool) -> jax.Array:
        return hopper.matmul(
            x, w, pool, segs, part_sizes=parts, config=SMALL, sms=BLOCKS, interpret=True
        ).sum(0)

    # Only the backward pass is under test: the forward pass has tests of its own.
    monkeypatch.setattr(
        hopper, "_launch", lambda x, w, *_, **__: jnp.zeros((1, x.shape[0], w.shape[1]), x.dtype)
    )
    ones = jnp.ones((8, sum(parts)), jnp.bfloat16)
    ours = jax.vjp(fused, x, w, pool)[1](ones)
    wanted = jax.vjp(plain, x, w, pool)[1](ones)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)
        assert np.linalg.norm(want) > 0.1


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_tiles_fit_shared_memory_and_divide_the_shape(rows: int, group: str) -> None:
    width, parts = LLAMA_8B[group]
    t = tuning(rows, width, parts, 132)
    for own in (t, single_page(t)):
        assert _shared_bytes(own, rows, len(parts)) <= SHARED_BYTES
    assert all(size % t.bn == 0 for size in parts)
    assert width % (t.bk * t.split) == 0
    assert width % (64 * t.slices) == 0
    assert 0 < t.tail < width // t.bk // t.split


@pytest.mark.parametrize("pages", [8, 32, 64, 128, 1000])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_a_block_has_one_unit_of_the_shrink_when_half_of_the_room_is_taken(
    pages: int, group: str
) -> None:
    width, parts = LLAMA_8B[group]
    t = tuning(32, width, parts, 132)
    own = for_pages(t, pages, 132)
    groups = -(-pages // 2 // own.group)
    assert own.slices == 1 or groups * own.slices <= 132
    assert own.slices == t.slices or groups * 2 * own.slices > 132, "fewer than that needs"
    assert t.slices % own.slices == 0
    assert dataclasses.replace(own, slices=t.slices) == t


def test_a_part_that_no_tile_divides_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="multiple of 64"):
        tuning(8, 4096, (4096, 96, 96), 132)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.10 only")
def test_the_kernel_is_refused_before_jax_0_11() -> None:
    x, w, pool, segs, parts = case("o", testing.pattern("zipf", 8))
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.11"):
        lora_matmul(x, w, pool, segs, part_sizes=parts, implementation="hopper")
