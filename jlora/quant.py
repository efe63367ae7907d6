"""Weight types. A weight knows how to multiply itself, so the decoder never asks how it is stored."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul import ActivePages, RankPool, Segments, lora_matmul


class Dense(nnx.Module):
    """An unquantised weight, stored [in, out] (measured faster on XLA:CPU than [out, in])."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str, str], dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    def matmul(
        self,
        x: Float[Array, "T in"],
        adapters: RankPool | ActivePages | None = None,
        segments: Segments | None = None,
        part_sizes: tuple[int, ...] | None = None,
        out_dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        summed: bool = True,
    ) -> Float[Array, "*sums T out"]:
        """x @ W plus each row's own delta, accumulated in float32; `summed` as in `lora_matmul`."""
        kernel = self.kernel[...]
        return lora_matmul(
            x,
            kernel,
            adapters,
            segments,
            part_sizes=part_sizes or kernel.shape[1:],
            out_dtype=out_dtype,
            summed=summed,
        )


def matmul(x: Float[Array, "M K"], y: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x @ y in float32. Float32 operands mean float32 products, also where a GPU would use tf32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot(x, y, precision=exact, preferred_element_type=jnp.float32)
