"""The functions that the decoder is made of. Pure; local shapes under tensor parallelism."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.batch import Batch
from jlora.sharding import AXIS
from kernels_pallas.act_mul import ACTIVATIONS as ACTIVATIONS
from kernels_pallas.act_mul import Activation as Activation
from kernels_pallas.act_mul import act_mul as act_mul
from kernels_pallas.add_norm import add as add
from kernels_pallas.add_norm import add_norm as add_norm
from kernels_pallas.add_norm import rms_norm as rms_norm
from kernels_pallas.lora_matmul import (
    ActivePages,
    RankPool,
    Segments,
    lora_embedding,
    lora_epilogue,
)
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.rope_write import Norms as Norms
from kernels_pallas.rope_write import rope_write

KV = tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]
"""One layer's keys and values."""


def softcap(x: Array, cap: float | None) -> Array:
    """x squeezed into -cap..cap by tanh; None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def all_reduce(x: Array, tp: int) -> Array:
    """Sum over the devices of the mesh; nothing to do on one device."""
    return jax.lax.psum(x, AXIS) if tp > 1 else x


def on_gpu() -> bool:
    """Whether a launch or a byte more costs: then work is cut to the kernels that are there."""
    return jax.default_backend() == "gpu"


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What a matmul gives that nothing is added to: on a GPU what its reader wants, half the bytes;
    else float32, which is what the fast matmuls of a CPU give."""
    return dtype if on_gpu() else jnp.dtype(jnp.float32)


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
    qkv: Float[Array, "T qkv"],
    turn: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    kv: KV,
    batch: Batch,
    *,
    norms: Norms | None,
    decode: int,
    block: int,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "T N H"], KV]:
    """Rotates q and k by `turn` (cos and sin), stores the step's K/V in their pages, then attends over
    each row's whole context.

    `scale`: factor on the scores, None: H ** -0.5; `cap`: their softcap.
    """
    page_size, width = kv[0].shape[2:]
    pages, offsets = kv_place(batch, page_size, decode, block)
    heads = qkv.reshape(qkv.shape[0], -1, width)
    q, keys, values = rope_write(heads, *turn, pages, offsets, *kv, norms=norms)
    out = paged_attention(
        q,
        keys,
        values,
        batch.tables,
        batch.positions,
        decode=decode,
        block=block,
        scale=width**-0.5 if scale is None else scale,
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
