"""The obviously right LoRA matmul: one page and one part at a time, in float32. For tests."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.types import RankPool, Segments


def lora_delta(
    x: Float[Array, "T K"], pool: RankPool, segments: Segments, *, part_sizes: tuple[int, ...]
) -> Float[Array, "T N"]:
    """The LoRA part of the output, in float32."""
    x32 = x.astype(jnp.float32)
    delta = jnp.zeros((x.shape[0], sum(part_sizes)), jnp.float32)
    for i in range(segments.pages.shape[0]):
        a = pool.a[segments.pages[i]].astype(jnp.float32)  # [parts*page, K]
        b = pool.b[segments.pages[i]].astype(jnp.float32)  # [page, N]
        mine = (segments.adapter == segments.owner[i]) & (segments.adapter >= 0)  # [T]
        start, page = 0, b.shape[0]
        for j, size in enumerate(part_sizes):
            u = jnp.dot(x32, a[page * j : page * (j + 1)].T, precision=lax.Precision.HIGHEST)
            part = jnp.dot(u, b[:, start : start + size], precision=lax.Precision.HIGHEST)
            part = jnp.where(mine[:, None], part, 0.0)
            delta = delta.at[:, start : start + size].add(part)
            start += size
    return delta


def base_matmul(
    x: Float[Array, "T K"], w: Float[Array, "K N"], out_dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "T N"]:
    """`x @ w`, computed in float32."""
    wide = (x.astype(jnp.float32), w.astype(jnp.float32))
    return jnp.dot(*wide, precision=lax.Precision.HIGHEST).astype(out_dtype)


def matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    pool: RankPool,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
) -> Float[Array, "T N"]:
    """`x @ w` plus the delta, in float32."""
    return base_matmul(x, w) + lora_delta(x, pool, segments, part_sizes=part_sizes)
