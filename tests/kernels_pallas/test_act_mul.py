"""The gate of an MLP against torch's, the Hopper kernel in Mosaic's interpreter, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.act_mul import ACTIVATIONS, act_mul, hopper

RNG = np.random.default_rng(6)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 (run .venv312)"
)


def both(rows: int, width: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(3 * RNG.normal(size=(rows, 2 * width)), dtype)


def exact(x: jax.Array, activation: str) -> np.ndarray:
    """In float64."""
    gate, up = np.split(np.asarray(x.astype(jnp.float32), np.float64), 2, axis=1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + np.tanh(inner)) / 2 * up


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_plain_path_equals_torch(activation):
    torch = pytest.importorskip("torch")
    x = both(5, 96, jnp.float32)
    gate, up = torch.tensor(np.asarray(x)).chunk(2, dim=1)
    theirs = torch.nn.functional
    gated = theirs.silu(gate) if activation == "silu" else theirs.gelu(gate, approximate="tanh")
    got = act_mul(x, activation=activation, implementation="xla")
    np.testing.assert_allclose(got, gated * up, rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("width", [256, 768, 4096])
def test_the_kernel_equals_float64(width, activation):
    x = both(3, width, jnp.bfloat16)
    got = hopper.act_mul(x, activation=activation, interpret=True)
    want = exact(x, activation)
    error = np.linalg.norm(np.asarray(got.astype(jnp.float32)) - want) / np.linalg.norm(want)
    assert got.shape == (3, width)
    assert error < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@pytest.mark.parametrize(
    ("width", "dtype", "said"),
    [(256, jnp.float32, "bfloat16 and float16"), (200, jnp.bfloat16, "200 columns")],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(width, dtype, said):
    with pytest.raises(NotImplementedError, match=said):
        act_mul(both(2, width, dtype), activation="silu", implementation="hopper")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(NotImplementedError, match="'triton'"):
        act_mul(both(2, 256, jnp.bfloat16), activation="silu", implementation="triton")
