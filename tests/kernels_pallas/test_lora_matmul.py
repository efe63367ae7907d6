"""The LoRA matmul on a CPU: every implementation against float64 numpy, and the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import testing
from kernels_pallas.lora_matmul import (
    RankPool,
    Segments,
    active_pages,
    lora_delta,
    lora_matmul,
)
from kernels_pallas.lora_matmul.shapes import SMOLLM2_135M, TINY

Case = tuple[jax.Array, jax.Array, RankPool, Segments, tuple[int, ...]]


def case(
    group: str,
    rows: testing.Rows,
    *,
    dtype: str = "float32",
    shapes: dict[str, tuple[int, tuple[int, ...]]] = TINY,
    poison: bool = True,
) -> Case:
    """Inputs with a delta as large as the base; unused pages hold NaN."""
    width, parts = shapes[group]
    rng = np.random.default_rng(len(rows.adapter))
    count, kind = len(rows.adapter), jnp.dtype(dtype)
    x, w = testing.random_inputs(rng, rows=count, width=width, total=sum(parts), dtype=kind)
    pages = rows.pages + 4
    pool = testing.random_pool(rng, pages=pages, width=width, part_sizes=parts, dtype=kind)
    segs = testing.segments(rows, pool_pages=pages, bucket=rows.pages + 3)
    if poison:
        unused = np.setdiff1d(np.arange(1, pages), np.asarray(segs.pages))
        pool = RankPool(a=pool.a.at[unused].set(jnp.nan), b=pool.b.at[unused].set(jnp.nan))
    return x, w, pool, segs, parts


def with_base_rows(rows: testing.Rows) -> testing.Rows:
    rows.adapter[::3] = -1
    return rows


def error(out: jax.Array, inputs: Case) -> float:
    x, w, pool, segs, parts = inputs
    base, delta = testing.exact(x, w, pool, segs, parts)
    return testing.delta_error(np.asarray(out.astype(jnp.float32)), base, delta)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["identical", "zipf", "uniform", "distinct"])
@pytest.mark.parametrize("group", ["qkv", "o", "gate_up", "down"])
def test_matches_float64_for_every_group_and_pattern(
    implementation: str, name: str, group: str
) -> None:
    inputs = case(group, with_base_rows(testing.pattern(name, 13, rank=None, resident=13)))
    out = lora_matmul(*inputs[:4], part_sizes=inputs[4], implementation=implementation)
    assert error(out, inputs) < testing.tolerance(jnp.dtype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_implementation_runs_at_a_real_models_shapes(dtype: str) -> None:
    rows = testing.pattern("uniform", 32, rank=None, resident=4)
    for group in SMOLLM2_135M:
        inputs = case(group, rows, dtype=dtype, shapes=SMOLLM2_135M)
        out = lora_matmul(*inputs[:4], part_sizes=inputs[4])
        assert out.dtype == jnp.dtype(dtype)
        assert error(out, inputs) < testing.tolerance(jnp.dtype(dtype))


def test_base_rows_are_bitwise_the_base_matmul() -> None:
    inputs = case("qkv", with_base_rows(testing.pattern("zipf", 16)))
    out = lora_matmul(*inputs[:4], part_sizes=inputs[4])
    base = lora_matmul(*inputs[:2], part_sizes=inputs[4])
    plain = np.asarray(inputs[3].adapter) < 0
    assert np.array_equal(np.asarray(out)[plain], np.asarray(base)[plain])
    assert not np.allclose(np.asarray(out)[~plain], np.asarray(base)[~plain])


def test_order_of_rows_and_pages_does_not_matter() -> None:
    x, w, pool, segs, parts = case("gate_up", testing.pattern("uniform", 24, rank=None))
    rng = np.random.default_rng(0)
    active = int((np.asarray(segs.owner) >= 0).sum())  # padding stays last
    rows = rng.permutation(24)
    pages = np.concatenate([rng.permutation(active), np.arange(active, len(segs.pages))])
    mixed = Segments(pages=segs.pages[pages], owner=segs.owner[pages], adapter=segs.adapter[rows])
    straight = lora_matmul(x, w, pool, segs, part_sizes=parts)
    shuffled = lora_matmul(x[rows], w, pool, mixed, part_sizes=parts)
    np.testing.assert_allclose(shuffled, straight[rows], rtol=1e-5, atol=1e-5)


def test_bias_is_added_once() -> None:
    x, w, pool, segs, parts = case("qkv", testing.pattern("zipf", 8))
    bias = jnp.arange(sum(parts), dtype=jnp.float32)
    with_bias = lora_matmul(x, w, pool, segs, part_sizes=parts, bias=bias)
    without = lora_matmul(x, w, pool, segs, part_sizes=parts)
    np.testing.assert_allclose(with_bias - bias, without, atol=1e-4)


def test_copied_out_pages_give_the_same_delta() -> None:
    x, _, pool, segs, parts = case("qkv", testing.pattern("uniform", 16, rank=None))
    copied = jax.jit(lambda pool, pages: active_pages(pool, pages, part_sizes=parts))
    direct = lora_delta(x, pool, segs, part_sizes=parts)
    through = lora_delta(x, copied(pool, segs.pages), segs, part_sizes=parts)
    np.testing.assert_allclose(through, direct, rtol=1e-6, atol=1e-6)


def test_more_rows_than_a_16_bit_index_reaches() -> None:
    rows = testing.Rows(adapter=np.sort(np.arange(70_000) % 3 - 1).astype(np.int32), ranks=(16, 16))
    inputs = case("down", rows, shapes={"down": (64, (16,))})
    out = lora_matmul(*inputs[:4], part_sizes=inputs[4])
    assert error(out, inputs) < testing.tolerance(jnp.dtype("float32"))


@pytest.mark.parametrize("group", ["qkv", "down"])
def test_gradients_of_x_w_a_and_b_match_the_reference(group: str) -> None:
    x, w, pool, segs, parts = case(group, testing.pattern("uniform", 12), poison=False)

    def loss(implementation: str, x: jax.Array, w: jax.Array, pool: RankPool) -> jax.Array:
        y = lora_matmul(x, w, pool, segs, part_sizes=parts, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    ours = jax.grad(loss, argnums=(1, 2, 3))("xla", x, w, pool)
    reference = jax.grad(loss, argnums=(1, 2, 3))("reference", x, w, pool)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(want) > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("split", ["columns", "rows"])
def test_inside_shard_map_columns_and_partial_sums_make_up_the_whole(split: str) -> None:
    group = "gate_up" if split == "columns" else "down"
    x, w, pool, segs, parts = case(group, testing.pattern("zipf", 8), poison=False)
    whole = lora_matmul(x, w, pool, segs, part_sizes=parts)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    if split == "columns":
        # Device order: each device's half of the first part, then its half of the second.
        half = parts[0] // 2
        order = np.concatenate([np.arange(half) + j * parts[0] + d * half
                                for d in range(2) for j in range(2)])  # fmt: skip
        w, whole = w[:, order], whole[:, order]
        pool = RankPool(a=pool.a, b=pool.b[:, :, order])
        specs = (P(), P(None, "tp"), RankPool(a=P(), b=P(None, None, "tp")), P())  # type: ignore[arg-type]
        local, out = (half, half), P(None, "tp")
    else:
        specs = (P(None, "tp"), P("tp"), RankPool(a=P(None, None, "tp"), b=P()), P())  # type: ignore[arg-type]
        local, out = parts, P()

    def body(x: jax.Array, w: jax.Array, pool: RankPool, segs: Segments) -> jax.Array:
        y = lora_matmul(x, w, pool, segs, part_sizes=local)
        return y if split == "columns" else jax.lax.psum(y, "tp")

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
    np.testing.assert_allclose(f(x, w, pool, segs), whole, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_refused_with_both_sides_named() -> None:
    x, w, pool, segs, parts = case("o", testing.pattern("zipf", 8))
    with pytest.raises(ValueError, match=r"w has shape \(256, 120\), expected"):
        lora_matmul(x, w[:, :120], pool, segs, part_sizes=parts)
    with pytest.raises(ValueError, match=r"pool pages have shapes .* expected"):
        lora_matmul(x, w, RankPool(a=pool.a[:, :8], b=pool.b), segs, part_sizes=parts)
    with pytest.raises(ValueError, match="segments have adapter"):
        lora_matmul(x[:4], w, pool, segs, part_sizes=parts)


def test_a_named_implementation_never_falls_back() -> None:
    x, w, pool, segs, parts = case("o", testing.pattern("zipf", 8))
    with pytest.raises(NotImplementedError, match=r"bfloat16|jax 0\.11"):
        lora_matmul(x, w, pool, segs, part_sizes=parts, implementation="hopper")
    with pytest.raises(NotImplementedError, match="there are"):
        lora_matmul(x, w, pool, segs, part_sizes=parts, implementation="cuda")
    with pytest.raises(NotImplementedError, match="one fused launch"):
        lora_delta(x, pool, segs, part_sizes=parts, implementation="hopper")
