"""The small kernels of a step on the card: equal to the plain path, in place, and taken by default."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.add_norm import add_norm
from kernels_pallas.rope_write import rope_write, xla
from tests.kernels_pallas.test_add_norm import distance, exact, inputs
from tests.kernels_pallas.test_rope_write import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
LLAMA = functools.partial(Step, heads=32, kv_heads=8, width=128, turned=128)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 256), (32, 4096), (300, 768), (7, 14336)])
def test_sums_are_exact_and_norms_equal_float64(rows, width, plus_one):
    args, options = inputs(rows, width, jnp.bfloat16), {"eps": 1e-5, "plus_one": plus_one}
    f = jax.jit(functools.partial(add_norm, **options, implementation="hopper"))
    total, normed = f(*args)
    want_total, want = exact(*args, **options)
    np.testing.assert_array_equal(total, want_total)
    assert distance(normed, want) < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@pytest.mark.parametrize(
    ("step", "plus_one"),
    [
        (LLAMA(tokens=32, pages=6), None),
        (LLAMA(tokens=2304, pages=300), None),
        (LLAMA(tokens=300, pages=60), False),
        (LLAMA(tokens=9, dtype=jnp.float16), True),
        (Step(heads=8, kv_heads=8), False),
        (Step(heads=32, kv_heads=32, width=128, turned=128), None),
        (Step(heads=16, kv_heads=4, width=128, turned=128), False),
        (Step(heads=14, kv_heads=2), None),
        (Step(heads=12, kv_heads=2, width=128, turned=128), False),
        (Step(heads=4, kv_heads=1, width=128, turned=128), None),
        (Step(kv_heads=4, width=256, turned=256), True),
        (Step(heads=4, kv_heads=1, width=256, turned=256), True),
    ],
)
def test_q_and_pages_equal_the_plain_path_and_pools_stay_where_they_are(step, plus_one):
    args, norms = step.args(odd=True), step.norms(plus_one)
    want = xla.rope_write(*args, norms=norms)
    f = jax.jit(functools.partial(rope_write, implementation="hopper"), donate_argnums=(5, 6))
    before = [pool.unsafe_buffer_pointer() for pool in args[-2:]]
    got = f(*args, norms=norms)
    assert [pool.unsafe_buffer_pointer() for pool in got[1:]] == before
    for ours, theirs, first in zip(got, want, (0, 1, 1), strict=True):
        ours, theirs = (np.asarray(x.astype(jnp.float32))[first:] for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1 / 128, atol=1e-3)
        assert np.isfinite(ours).all()


def test_pools_are_not_copied_between_layers_that_share_a_step():
    qkv, cos, sin, pages, offsets, keys, values = LLAMA(tokens=32, pages=6).args()

    @functools.partial(jax.jit, donate_argnums=1)
    def step(qkv, pools):
        out = []
        for keys, values in pools:
            q, keys, values = rope_write(qkv, cos, sin, pages, offsets, keys, values)
            qkv = qkv + q.mean()
            out.append((keys, values))
        return qkv, out

    pools = [(keys + i, values + i) for i in range(3)]
    text = str(step.lower(qkv, pools).compile().as_text())
    assert text.count("mosaic_gpu") >= 3
    assert " copy(" not in text


def test_the_default_takes_the_kernels_and_falls_back_aloud(caplog):
    args = LLAMA().args()
    assert "mosaic_gpu" in jax.jit(rope_write).lower(*args).as_text()
    normed = functools.partial(add_norm, eps=1e-5)
    assert "mosaic_gpu" in jax.jit(normed).lower(*inputs(2, 512, jnp.bfloat16)).as_text()
    with caplog.at_level(logging.WARNING):
        jax.jit(rope_write).lower(*Step(heads=6, kv_heads=3).args())
        jax.jit(normed).lower(*inputs(2, 96, jnp.bfloat16))
    assert "3 kv heads of 64" in caplog.text
    assert "rows of 96" in caplog.text
