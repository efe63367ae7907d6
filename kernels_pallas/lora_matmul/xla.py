"""The LoRA delta as plain XLA dots over the active pages: for CPUs and for GPUs without a kernel.

All active pages are one matrix: shrink every row by every page in one dot, zero what is not the
row's own, expand in one dot a part. Work grows with rows x active pages, which is right while
the active pages are few beside the width of the weight.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.types import PAGE, RankPool, Segments


def lora_delta(
    x: Float[Array, "T K"], pool: RankPool, segments: Segments, *, part_sizes: tuple[int, ...]
) -> Float[Array, "T N"]:
    """The LoRA part of the output, in float32."""
    rows, width = x.shape
    parts = len(part_sizes)
    a = pool.a[segments.pages].reshape(-1, parts, PAGE, width)  # [Pa, parts, 16, K]
    b = pool.b[segments.pages]  # [Pa, 16, N]
    own = (segments.adapter[:, None] == segments.owner) & (
        segments.adapter[:, None] >= 0
    )  # [T, Pa]
    start, out = 0, []
    u = _dot(x, a.reshape(-1, width), (1, 1)).reshape(rows, -1, parts, PAGE)
    u = jnp.where(own[:, :, None, None], u, 0.0).astype(b.dtype)
    for j, size in enumerate(part_sizes):
        part = b[:, :, start : start + size].reshape(-1, size)
        out.append(_dot(u[:, :, j].reshape(rows, -1), part, (1, 0)))
        start += size
    return jnp.concatenate(out, axis=1) if parts > 1 else out[0]


def base_matmul(x: Float[Array, "T K"], w: Float[Array, "K N"]) -> Float[Array, "T N"]:
    """`x @ w` with float32 accumulation and output."""
    return _dot(x, w, (1, 0))


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    # float32 operands mean float32 arithmetic, also where a GPU would default to tf32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
