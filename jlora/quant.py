"""Weight types. A weight knows how to multiply itself, so the decoder never asks how it is stored."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Dense(nnx.Module):
    """An unquantised weight, stored [in, out] (measured faster on XLA:CPU than [out, in])."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str, str], dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    def matmul(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """x @ W, accumulated and returned in float32."""
        return jax.lax.dot(x, self.kernel[...], preferred_element_type=jnp.float32)
