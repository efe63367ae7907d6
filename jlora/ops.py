"""The functions that the decoder is made of. Pure; local shapes under tensor parallelism."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.batch import Batch
from jlora.sharding import AXIS
from kernels_pallas.lora_matmul import (
    ActivePages,
    RankPool,
    Segments,
    lora_embedding,
    lora_epilogue,
)
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.paged_attention.xla import write_kv

KV = tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]
"""One layer's keys and values."""


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "... D"], eps: float, plus_one: bool = False
) -> Array:
    """x / rms(x) · weight over the last axis, computed in float32; a weight for all rows, or each.

    `plus_one`: times 1 + weight, also in float32 (Gemma; others round to x's type before).
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if plus_one:
        return (wide * scale * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return (wide * scale).astype(x.dtype) * weight


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


Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""The gate's activation by its name in `ModelConfig`."""


def softcap(x: Array, cap: float | None) -> Array:
    """x squeezed into -cap..cap by tanh; None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def all_reduce(x: Array, tp: int) -> Array:
    """Sum over the devices of the mesh; nothing to do on one device."""
    return jax.lax.psum(x, AXIS) if tp > 1 else x


def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "T"],
    tp: int,
    pool: RankPool | ActivePages | None = None,
    segments: Segments | None = None,
) -> Float[Array, "T D"]:
    """Rows of a table that is sharded over the vocabulary, and what adapters change in them."""
    mine = None
    if tp > 1:
        local = tokens - jax.lax.axis_index(AXIS) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        tokens = jnp.where(mine, local, 0)
    x = table[tokens]
    if pool is not None and segments is not None:
        x = x.astype(jnp.float32) + lora_embedding(tokens, pool, segments)
    if mine is not None:
        x = all_reduce(jnp.where(mine[:, None], x, 0), tp)
    if pool is not None and segments is not None:
        x = lora_epilogue(x, pool, segments)
    return x.astype(table.dtype)


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv: KV,
    batch: Batch,
    *,
    decode: int,
    block: int,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "T N H"], KV]:
    """Stores the step's K/V in its pages, then attends over each row's whole context.

    `scale`: factor on the scores, None: H ** -0.5; `cap`: their softcap.
    """
    pages, offsets = kv_place(batch, kv[0].shape[2], decode, block)
    # A masked position weighs 0, and 0 · NaN is NaN: what an adapter that overflows leaves in a page
    # must not reach the page's next owner. (Masked keys are harmless: their score is replaced.)
    v = jnp.where(jnp.isfinite(v), v, 0)
    keys, values = write_kv(kv[0], k, pages, offsets), write_kv(kv[1], v, pages, offsets)
    out = paged_attention(
        q,
        keys,
        values,
        batch.tables,
        batch.positions,
        decode=decode,
        block=block,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        softcap=cap,
    )
    return out, (keys, values)


def kv_place(
    batch: Batch, page_size: int, decode: int, block: int
) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """(page, offset) of each token's K/V; padding goes to the trash page 0."""
    token = jnp.arange(batch.positions.shape[0])
    row = jnp.where(token < decode, token, decode + (token - decode) // block)
    at = jnp.maximum(batch.positions, 0)
    pages = batch.tables[row, at // page_size]
    return jnp.where(batch.positions < 0, 0, pages), at % page_size
