"""Residual add and RMSNorm against torch's, the Hopper kernel in Mosaic's interpreter, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import testing
from kernels_pallas.add_norm import add_norm, hopper

RNG = np.random.default_rng(5)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11 (run .venv312)"
)


def inputs(rows: int, width: int, dtype: jnp.dtype) -> list[jax.Array]:
    """x, y and a weight that moves the result."""
    shapes = ((rows, width), (rows, width), (width,))
    return [jnp.asarray(RNG.normal(size=shape), dtype) for shape in shapes]


def exact(x, y, weight, *, eps, plus_one):
    """The sum in x's type, its norm in float64."""
    total = x + y
    wide, own = (np.asarray(v.astype(jnp.float32), np.float64) for v in (total, weight))
    scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    return total, wide * scale * (own + plus_one)


def distance(got: jax.Array, want: np.ndarray) -> float:
    out = np.asarray(got.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(out - want) / np.linalg.norm(want))


def test_the_plain_path_equals_torch():
    torch = pytest.importorskip("torch")
    x, y, weight = inputs(5, 96, jnp.float32)
    total, normed = add_norm(x, y, weight, eps=1e-3)
    both = torch.tensor(np.asarray(x)) + torch.tensor(np.asarray(y))
    want = torch.nn.functional.rms_norm(both, (96,), torch.tensor(np.asarray(weight)), 1e-3)
    np.testing.assert_array_equal(total, both)
    np.testing.assert_allclose(normed, want, rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("width", [256, 768, 2048])
def test_the_kernel_adds_exactly_and_normalises_as_float64(width, plus_one):
    args = inputs(3, width, jnp.bfloat16)
    options = {"eps": 1e-3, "plus_one": plus_one}
    total, normed = hopper.add_norm(*args, **options, interpret=True)
    want_total, want = exact(*args, **options)
    np.testing.assert_array_equal(total, want_total)
    assert distance(normed, want) < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@interpreted
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_sum_are_added_before_anything_is_rounded(parts):
    x, _, weight = inputs(3, 256, jnp.bfloat16)
    y = jnp.asarray(RNG.normal(size=(parts, 3, 256)), jnp.float32)
    want = (x.astype(jnp.float32) + y.sum(0)).astype(jnp.bfloat16)
    _, normed_want = exact(want, jnp.zeros_like(want), weight, eps=1e-3, plus_one=False)
    for total, normed in (
        hopper.add_norm(x, y, weight, eps=1e-3, plus_one=False, interpret=True),
        add_norm(x, y, weight, eps=1e-3, implementation="xla"),
    ):
        np.testing.assert_array_equal(total, want)
        assert distance(normed, normed_want) < testing.tolerance(jnp.dtype(jnp.bfloat16)) / 2


@pytest.mark.parametrize(
    ("width", "dtype", "rows", "said"),
    [
        (256, jnp.float32, None, "must be bfloat16 or float16"),
        (200, jnp.bfloat16, None, "rows of 200"),
        (32768, jnp.bfloat16, None, "rows of 32768"),
        (256, jnp.bfloat16, 2, "a weight for each row"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(width, dtype, rows, said):
    x, y, weight = inputs(2, width, dtype)
    if rows:
        weight = jnp.broadcast_to(weight, (rows, width))
    with pytest.raises(NotImplementedError, match=said):
        add_norm(x, y, weight, eps=1e-5, implementation="hopper")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(NotImplementedError, match="'triton'"):
        add_norm(*inputs(2, 256, jnp.bfloat16), eps=1e-5, implementation="triton")
