"""Plain XLA: on a GPU a kernel for the rope of q and k and two scatters."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.add_norm.xla import rms_norm
from kernels_pallas.paged_attention.xla import write_kv
from kernels_pallas.rope_write.types import Norms


def rope(
    x: Float[Array, "T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T N H"]:
    """Rotary embedding in the half-split form of Hugging Face's Llama (Su et al. 2021).

    Dimensions from 2 · half on pass as they are.
    """
    half, wide = cos.shape[-1], x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    parts = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
    return turned.astype(x.dtype)


def rope_write(
    qkv: Float[Array, "T heads H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    *,
    norms: Norms | None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.rope_write`."""
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if norms is not None:
        q = rms_norm(q, norms.q, norms.eps, norms.plus_one)
        k = rms_norm(k, norms.k, norms.eps, norms.plus_one)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    v = jnp.where(jnp.isfinite(v), v, 0)
    return q, write_kv(keys, k, pages, offsets), write_kv(values, v, pages, offsets)
