"""What is loaded ahead changes no result: launches with and without it agree bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.act_mul import ACTIVATIONS, act_mul
from kernels_pallas.add_norm import add_norm
from kernels_pallas.lora_matmul import first_reads, lora_matmul
from kernels_pallas.lora_matmul.shapes import LLAMA_8B
from kernels_pallas.paged_attention import cases
from tests.gpu.test_lora_matmul import inputs
from tests.gpu.test_paged_attention import attend
from tests.kernels_pallas.test_act_mul import both, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
ROWS = 32


def ahead(group: str, lora: bool):
    _, w, pool, segs, parts = inputs(group, testing.pattern("zipf", ROWS, rank=None), 90, 90)
    own = (pool, segs) if lora else (None, None)
    made = first_reads(ROWS, w, *own, part_sizes=parts, budget=12 << 20)
    assert made is not None
    return made


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_small_launches_give_the_same_with_something_loaded_ahead(group, lora):
    next_ = ahead(group, lora)
    x = jax.random.normal(jax.random.key(1), (ROWS, 4096)).astype(jnp.bfloat16)
    y = jax.random.normal(jax.random.key(2), (2, ROWS, 4096))
    weight = jnp.ones(4096, jnp.bfloat16)
    for f in (
        functools.partial(add_norm, x, y, weight, eps=1e-5, implementation="hopper"),
        functools.partial(act_mul, x, activation="silu", implementation="hopper"),
    ):
        with_, without = jax.jit(lambda p, f=f: f(prefetch=p))(next_), jax.jit(f)()
        for got, want in zip(jax.tree.leaves(with_), jax.tree.leaves(without), strict=True):
            np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "width"), [(1, 256), (32, 14336), (300, 768)])
def test_the_gate_equals_float64(rows, width, activation):
    x = both(rows, width, jnp.bfloat16)
    f = jax.jit(functools.partial(act_mul, activation=activation, implementation="hopper"))
    want = exact(x, activation)
    error = np.linalg.norm(np.asarray(f(x).astype(jnp.float32)) - want) / np.linalg.norm(want)
    assert error < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@pytest.mark.parametrize("rows", [1, 13, 32, 64])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_the_base_product_of_few_rows_is_a_kernel_and_equals_float64(group, rows):
    x, w, _, _, parts = inputs(group, testing.pattern("base", rows), 9, 8)
    f = jax.jit(functools.partial(lora_matmul, part_sizes=parts, summed=False))
    assert "mosaic_gpu" in f.lower(x, w).as_text()
    out = np.asarray(f(x, w).astype(jnp.float32).sum(0), np.float64)
    want = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(w.astype(jnp.float32))
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < 4e-3


@pytest.mark.parametrize("lengths", [[160] * ROWS, [5000, 1, 70, 0], [700] * ROWS])
def test_attention_gives_the_same_with_something_loaded_ahead(lengths):
    step = cases.step(lengths, shape=cases.Heads(), poison=True)
    f = attend(step, scale=128**-0.5, implementation="hopper")
    with_ = f(*step.arrays, prefetch=ahead("o", True))
    np.testing.assert_array_equal(with_.astype(jnp.float32), f(*step.arrays).astype(jnp.float32))
