"""What a step without adapters is made of on the card: the base product of few rows, the gate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.act_mul import ACTIVATIONS, act_mul
from kernels_pallas.add_norm import add_norm
from kernels_pallas.lora_matmul import lora_matmul
from kernels_pallas.lora_matmul.shapes import LLAMA_8B
from tests.gpu.test_lora_matmul import inputs
from tests.kernels_pallas.test_act_mul import both, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("rows", [9, 13, 32, 64])
@pytest.mark.parametrize("group", list(LLAMA_8B))
def test_the_base_product_of_few_rows_is_a_kernel_and_equals_float64(group, rows):
    x, w, _, _, parts = inputs(group, testing.pattern("base", rows), 9, 8)
    f = jax.jit(functools.partial(lora_matmul, part_sizes=parts, summed=False))
    assert "mosaic_gpu" in f.lower(x, w).as_text()
    out = np.asarray(f(x, w).astype(jnp.float32).sum(0), np.float64)
    want = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(w.astype(jnp.float32))
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < 4e-3


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "width"), [(1, 256), (32, 14336), (300, 768)])
def test_the_gate_is_a_kernel_and_equals_float64(rows, width, activation):
    x = both(rows, width, jnp.bfloat16)
    f = jax.jit(functools.partial(act_mul, activation=activation))
    assert "mosaic_gpu" in f.lower(x).as_text()
    want = exact(x, activation)
    error = np.linalg.norm(np.asarray(f(x).astype(jnp.float32)) - want) / np.linalg.norm(want)
    assert error < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_product_are_summed_by_the_norm_that_reads_them(parts):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (32, 4096)).astype(jnp.bfloat16)
    y = jax.random.normal(keys[1], (parts, 32, 4096))
    f = jax.jit(functools.partial(add_norm, eps=1e-5, implementation="hopper"))
    total, _ = f(x, y, jnp.ones(4096, jnp.bfloat16))
    exact = np.asarray(x.astype(jnp.float32), np.float64) + np.asarray(y, np.float64).sum(0)
    # Half a step of bfloat16, and what the order of a sum in float32 may move across its middle.
    error = np.abs(np.asarray(total.astype(jnp.float32), np.float64) - exact)
    assert (error <= 2**-8 * np.abs(exact) * (1 + 1e-3) + 1e-6).all()
