"""Products on the tensor cores and scores, as both Hopper attention kernels need them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
LOG2E = 1.4426950408889634


def multiply(shape: tuple[int, int], a: Any, b: Any) -> jax.Array:
    """a @ b on the tensor cores."""

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, ACC(shape, jnp.float32))


def multiply_add(acc: jax.Array, a: jax.Array, b: Any, interpret: bool) -> jax.Array:
    """acc + a @ b on the tensor cores, a in registers."""
    if interpret:  # has accumulators that begin at zero, and a in shared memory only
        return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    added: Any = pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(ACC.init(acc))
    return added


def capped(s: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, float]:
    """Scores, and the factor that makes powers of 2 of them: it joins the subtraction of the peak."""
    if softcap is None:
        return s, scale * LOG2E
    # tanh(x) = 1 - 2 / (e^2x + 1): the GPU's own tanh has 11 bits only
    turned = jnp.exp2(s * (2 * scale / softcap * LOG2E))
    return 1 - 2 / (turned + 1), softcap * LOG2E


def row_layout(heads: int, width: int) -> Any:
    """A token's heads over the threads of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((heads, width), vec_size=math.gcd(heads * width // 128, 4))
