"""The fused LoRA matmul for Hopper with many rows: one launch, `[x | u] @ [w ; B]` (Mosaic GPU).

Persistent blocks of threads: one warpgroup streams tiles into a ring, two multiply 64 rows each. u = x A^T
costs little beside: in the round in which a row block first occurs, each of its tiles multiplies a
part of K of a few pages of A too, with the x that it has in shared memory. Parts of K are not
summed: they are ranks of their own to the expand steps, which come at the end of each tile and wait
for the row block's counter. Only pages that occur in a row block are multiplied.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.lora_matmul.hopper_wide_kernel import Wide
from kernels_pallas.lora_matmul.hopper_wide_tuning import BM, CHUNK, Tuning
from kernels_pallas.lora_matmul.types import RankPool, Segments

Lists = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""ids and places of the pages that each row block uses, their counts, the mask, zeroed counters."""


def matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    pool: RankPool,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
    config: Tuning,
    sms: int,
    interpret: bool = False,
) -> Float[Array, "parts T N"]:
    """See hopper.matmul."""
    rows, block = x.shape[0], BM * config.cluster
    padded = -(-rows // block) * block
    tiles = padded // BM * sum(part_sizes) // config.bn * config.split
    if config.split > 1 and tiles > sms:
        raise NotImplementedError(f"{tiles} tiles for {sms} SMs: parts of K wait for one another")
    lists = page_lists(segments, padded, block)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    y = _launch(
        x, w, pool.a, pool.b, *lists, part_sizes=part_sizes, t=config, sms=sms, interpret=interpret
    )
    return y[:, :rows]


def page_lists(segments: Segments, rows: int, block: int) -> Lists:
    """What each row block uses. The same for all layers: XLA computes it once a step."""
    pages, owner = segments.pages, segments.owner
    adapter = jnp.pad(segments.adapter, (0, rows - len(segments.adapter)), constant_values=-1)
    mask = (owner[:, None] == adapter) & (adapter >= 0) & (owner[:, None] >= 0)
    used = mask.reshape(len(pages), -1, block).any(axis=2).T  # [row blocks, Pa]
    # Place j of a list holds the j-th used page; places beyond hold page 0 and a mask of zeros.
    order = jnp.cumsum(used, axis=1)
    places = jnp.arange(1, len(pages) + CHUNK + 1)
    here = used[:, None, :] & (order[:, None, :] == places[:, None])  # [row blocks, places, Pa]
    ids = jnp.sum(jnp.where(here, pages, 0), axis=2, dtype=jnp.int32)
    index = jnp.sum(jnp.where(here, jnp.arange(len(pages)), 0), axis=2, dtype=jnp.int32)
    counts = order[:, -1].astype(jnp.int32)
    index = jnp.where(places - 1 < counts[:, None], index, len(pages))
    mask = jnp.pad(mask, ((0, 1), (0, 0))).astype(jnp.float32)
    # Zeros that XLA cannot fold into a constant: the kernel writes them (and puts them back).
    sync = jnp.minimum(jnp.broadcast_to(counts[:, None], (len(counts), 8)), 0)
    return ids, index, counts, mask, sync


@partial(jax.jit, static_argnames=("part_sizes", "t", "sms", "interpret"))
def _launch(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    a: Float[Array, "P R K"],
    b: Float[Array, "P 16 N"],
    ids: Int[Array, "blocks places"],
    index: Int[Array, "blocks places"],
    counts: Int[Array, " blocks"],
    mask: Float[Array, "Pa+1 T"],
    sync: Int[Array, "blocks 8"],
    *,
    part_sizes: tuple[int, ...],
    t: Tuning,
    sms: int,
    interpret: bool,
) -> Float[Array, "split T N"]:
    k = Wide(
        rows=x.shape[0], width=x.shape[1], part_sizes=part_sizes, pages=mask.shape[0] - 1,
        t=t, sms=sms, dtype=jnp.dtype(x.dtype),
    )  # fmt: skip
    y, u = k.out_types()
    args: tuple[Any, ...] = (x, w, a, b, ids, index, counts, mask, sync)
    if not interpret:
        return k.call("all", (y, u), args)[0]
    # The interpreter has no counters that blocks can wait on: one launch a phase.
    (u,) = k.call("shrink", (u,), args, interpret)
    return k.call("multiply", (y,), (*args, u), interpret)[0]
