"""The checker itself: it must see every way in which a delta can be wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.lora_matmul import reference


@pytest.fixture
def parts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 32)), 0.5 * rng.normal(size=(8, 32))


def test_a_right_output_passes(parts: tuple[np.ndarray, np.ndarray]) -> None:
    base, delta = parts
    assert testing.delta_error(base + delta, base, delta) < 1e-12


def test_a_dropped_delta_fails(parts: tuple[np.ndarray, np.ndarray]) -> None:
    base, delta = parts
    assert testing.delta_error(base, base, delta) > 0.9


def test_a_delta_dropped_in_one_row_fails(parts: tuple[np.ndarray, np.ndarray]) -> None:
    base, delta = parts
    out = base + delta
    out[3] = base[3]
    assert testing.delta_error(out, base, delta) > 10 * testing.tolerance(jnp.dtype("bfloat16"))


def test_an_unwritten_output_is_infinitely_wrong(parts: tuple[np.ndarray, np.ndarray]) -> None:
    base, delta = parts
    out = base + delta
    out[0, 0] = np.nan
    assert testing.delta_error(out, base, delta) == float("inf")


def test_a_delta_too_small_to_tell_is_refused(parts: tuple[np.ndarray, np.ndarray]) -> None:
    base, delta = parts
    with pytest.raises(ValueError, match="at least"):
        testing.delta_error(base + 0.01 * delta, base, 0.01 * delta)


def test_random_inputs_make_a_large_delta_and_float64_agrees_with_the_reference() -> None:
    rng = np.random.default_rng(1)
    rows = testing.pattern("uniform", 16, rank=None)
    f32 = jnp.dtype("float32")
    x, w = testing.random_inputs(rng, rows=16, width=128, total=96, dtype=f32)
    pool = testing.random_pool(rng, pages=60, width=128, part_sizes=(64, 32), dtype=f32)
    segs = testing.segments(rows, pool_pages=60)
    base, delta = testing.exact(x, w, pool, segs, (64, 32))
    assert np.linalg.norm(delta) > 0.5 * np.linalg.norm(base)
    ours = reference.lora_delta(x, pool, segs, part_sizes=(64, 32))
    assert testing.delta_error(base + np.asarray(ours), base, delta) < testing.tolerance(f32)


def test_patterns_have_the_adapters_that_their_names_say() -> None:
    count = {name: len(testing.pattern(name, 32).ranks) for name in testing.PATTERNS}
    assert count["base"] == 0
    assert count["identical"] == 1
    assert 5 < count["zipf"] < 15 < count["uniform"] < 32 == count["distinct"]
    mixed = testing.pattern("distinct", 32, rank=None)
    assert set(mixed.ranks) == set(testing.MIXED)
    assert mixed.pages == sum(-(-rank // 16) for rank in mixed.ranks)


def test_segments_point_padding_at_page_0_and_never_use_it_otherwise() -> None:
    rows = testing.pattern("uniform", 16, rank=None)
    segs = testing.segments(rows, pool_pages=90, bucket=80)
    owned = np.asarray(segs.owner) >= 0
    assert (np.asarray(segs.pages)[~owned] == 0).all()
    pages = np.asarray(segs.pages)[owned]
    assert (pages > 0).all()
    assert len(set(pages.tolist())) == rows.pages == len(pages)
