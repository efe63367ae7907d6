"""The gated MLP's one launch against float64 at the size of Llama-3.1-8B. Run on the device machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.gated_mlp import gated_mlp
from tests.kernels_pallas.test_gated_mlp import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
WIDTH, HIDDEN = 4096, 14336


@jax.jit
def launch(x, gate_up, down, pools, segments, rows):
    return gated_mlp(x, gate_up, down, pools, segments, activation="silu", rows=rows)


@pytest.mark.parametrize(
    ("name", "count", "rank", "bucket"),
    [
        ("uniform", 32, None, None),
        ("distinct", 64, 16, None),
        ("identical", 8, 16, None),
        ("zipf", 50, None, None),
        ("identical", 1, 16, 1),  # a single page
        ("identical", 32, 16, 1),
        ("identical", 64, 16, 1),
    ],
)
def test_delta_is_exact_while_unused_pages_hold_nan_and_bitwise_the_same_again(
    name, count, rank, bucket
):
    rows = testing.pattern(name, count, rank=rank)
    if count > 8:
        rows.adapter[::9] = -1  # base rows in between
    case = Case.random(rows, WIDTH, HIDDEN, bucket=bucket)
    args = (case.x, case.gate_up, case.down, case.pools, case.segments, None)
    outs = [np.asarray(launch(*args)) for _ in range(8)]
    base, delta = case.exact("silu", lora=True)
    assert testing.delta_error(outs[0].sum(0), base, delta) < 1.5e-2
    assert all(np.array_equal(out, outs[0]) for out in outs)


def test_the_launch_without_adapters_equals_float64_and_leaves_the_counters_clean():
    case = Case.random(testing.pattern("base", 32), WIDTH, HIDDEN)
    want, _ = case.exact("silu", lora=False)

    @jax.jit
    def chain(x, gate_up, down, rows):
        outs = []
        for _ in range(12):
            y = gated_mlp(x, gate_up, down, activation="silu", rows=rows)
            assert y is not None
            outs.append(y)
            x = jax.lax.optimization_barrier(x + 0 * y[0].astype(x.dtype))
        return outs

    args = (case.x, case.gate_up, case.down, jnp.arange(32))
    outs = [np.asarray(out).sum(0) for _ in range(3) for out in chain(*args)]
    assert np.linalg.norm(outs[0] - want) < 4e-3 * np.linalg.norm(want)
    assert all(np.array_equal(out, outs[0]) for out in outs)


def test_no_active_page_gives_the_same_as_a_program_without_adapters():
    case = Case.random(testing.pattern("base", 32), WIDTH, HIDDEN)
    args = (case.x, case.gate_up, case.down)
    some = np.asarray(launch(*args, case.pools, case.segments, None)).sum(0)
    none = np.asarray(launch(*args, None, None, jnp.arange(32))).sum(0)
    np.testing.assert_allclose(some, none, rtol=1e-3, atol=1e-5 * np.abs(none).max())
