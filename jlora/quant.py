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
        return matmul(x, self.kernel[...])


def matmul(x: Float[Array, "M K"], y: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x @ y in float32. Float32 operands mean float32 products, also where a GPU would use tf32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot(x, y, precision=exact, preferred_element_type=jnp.float32)
