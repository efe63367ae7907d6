"""The fused LoRA matmul for Hopper with many rows: one launch, `[x | u] @ [w ; B]` (Mosaic GPU).

Persistent blocks of threads: one warpgroup streams tiles into a ring, two multiply 64 rows each. Beside
their first tile of w they make slices of u = x A^T, each some pages of a row block and a part of K, with
the ring's slots for tiles of A. When all are there they are summed, by a warpgroup of its own where the
registers allow one. Expand steps come near the end of each tile, and wait for the sums. Only pages that
occur in a row block are multiplied.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.lora_matmul.hopper_shrink import cdiv
from kernels_pallas.lora_matmul.hopper_sync import counters
from kernels_pallas.lora_matmul.hopper_wide_kernel import Wide
from kernels_pallas.lora_matmul.hopper_wide_tuning import BM, CHUNK, Tuning
from kernels_pallas.lora_matmul.types import PAGE, RankPool, Segments


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
    rows, stack = x.shape[0], BM * config.cluster
    padded = -(-rows // stack) * stack
    lists = page_lists(segments, padded)
    work = shrink_work(lists[2], len(segments.pages), config.group(len(part_sizes)))
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    y = _launch(
        x, w, pool.a, pool.b, *lists, *work, counters(lists[2][0]),
        part_sizes=part_sizes, t=config, sms=sms, interpret=interpret,
    )  # fmt: skip
    return y[:, :rows]


def page_lists(
    segments: Segments, rows: int, block: int = BM
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """ids and places of the pages that each row block uses, their counts, the mask. The same for all
    layers: XLA computes it once a step."""
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
    return ids, index, counts, jnp.pad(mask, ((0, 1), (0, 0))).astype(jnp.float32)


def shrink_work(
    counts: Int[Array, " blocks"], pages: int, group: int
) -> tuple[Int[Array, "2 units"], Int[Array, "3 sums"], Int[Array, "2"]]:
    """What is to be shrunk: row blocks and groups of up to `group` of their pages. What is to be
    summed: row blocks, their pages and those pages' units. How much of both."""
    m, g, units = _listed(cdiv(counts, group), -(-pages // group))
    of, place, sums = _listed(counts, pages)
    before = jnp.arange(len(counts)) < of[:, None]
    unit = jnp.sum(jnp.where(before, cdiv(counts, group), 0), axis=1) + place // group
    return jnp.stack([m, g]), jnp.stack([of, place, unit]), jnp.stack([units, sums])


def _listed(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """counts[m] numbers from zero for each m, one after another: m, number; how many."""
    ends = jnp.cumsum(counts)
    index = jnp.arange(max(1, len(counts) * most), dtype=jnp.int32)
    before = index[:, None] >= ends
    m = jnp.minimum(jnp.sum(before, axis=1, dtype=jnp.int32), len(counts) - 1)
    number = index - jnp.sum(jnp.where(before, counts, 0), axis=1, dtype=jnp.int32)
    return m, number, ends[-1]


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
    units: Int[Array, "2 units"],
    sums: Int[Array, "3 sums"],
    totals: Int[Array, "2"],
    sync: Int[Array, " words"],
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
    y, u, p = k.out_types()
    args: tuple[Any, ...] = (x, w, a, b, ids, index, counts, mask, units, sums, totals, sync)
    if not interpret:
        return k.call("all", (y, u, p), args)[0]
    # The interpreter has no counters that blocks can wait on: one launch a phase.
    whole, slices = k.call("shrink", (u, p), args, interpret)
    (summed,) = k.call("sum", (u,), (*args, slices), interpret)
    used = jnp.arange(u.shape[-1]) // PAGE < counts[:, None, None, None]
    u = jnp.where(used & (k.work(totals).slices > 1), summed, whole)
    return k.call("multiply", (y,), (*args, u), interpret)[0]
