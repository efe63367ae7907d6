"""The shrink of the Hopper kernel for many rows: slices of u = x A^T, and their sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_shrink import ACC
from kernels_pallas.lora_matmul.hopper_sync import load
from kernels_pallas.lora_matmul.hopper_wide_plan import Plan, Refs, Work
from kernels_pallas.lora_matmul.hopper_wide_tuning import BM, CHUNK, WGS
from kernels_pallas.lora_matmul.types import PAGE

LOT = 8
"""Slices that are read at once."""


def slices(
    plan: Plan, r: Refs, work: Work, first: Any, count: jax.Array, n: jax.Array,
    consume: Callable[..., jax.Array],
) -> jax.Array:  # fmt: skip
    """`count` of this block's units, from ring step n on: slices of u, or u itself where K is not cut.
    `first`: what `unit` said of the first. `consume`: how a warpgroup multiplies what is in the ring."""
    wg, whole = lax.axis_index("wg"), work.slices == 1

    def a_tile(slot: jax.Array) -> Any:
        return r.sa.at[slot, pl.ds(0, plan.a_rows)].transpose((1, 0))

    def one(i: jax.Array, carry: Any) -> Any:
        n, number, m, g, q, used, *owns = carry

        def accumulate(acc: Any) -> tuple[jax.Array, jax.Array]:
            after = consume(acc, r.full_shrink, work.steps, n, a_tile)
            return acc[...], after

        u, n = pl.run_scoped(accumulate, ACC((64, plan.a_rows), jnp.float32))
        there, values = plan.has_unit(work, i), []
        for column in range(plan.group * plan.parts):
            value = u[:, column * PAGE : (column + 1) * PAGE]
            own = lax.broadcast_in_dim(owns[column // plan.parts], value.shape, [0])
            values.append(value * own)

        @pl.when(there & jnp.logical_not(whole))
        def _() -> None:
            for column, value in enumerate(values):
                r.p.at[number, wg, column][...] = value

        @pl.when(there & whole)
        def _() -> None:
            for column, value in enumerate(values):
                page, part = divmod(column, plan.parts)
                u = place_u(plan, r, m, g * plan.group + page, part, wg)
                u[...] = value.astype(plan.dtype)

        def zero(place: jax.Array, carry: None) -> None:
            zeros = plgpu.layout_cast(jnp.zeros((64, PAGE), plan.dtype), plgpu.Layout.WGMMA)
            for part in range(plan.parts):
                place_u(plan, r, m, place, part, wg)[...] = zeros

        @pl.when(there & (whole | (q == 0)) & ((g + 1) * plan.group >= used))
        def _() -> None:  # the rest of the last expand step: nobody sums it
            end = (g * plan.group // CHUNK + 1) * CHUNK
            lax.fori_loop(used, end, zero, None)

        return n, *unit(plan, r, work, i + 1)

    n, *_ = lax.fori_loop(0, count, one, (n, *first))
    return n


def unit(plan: Plan, r: Refs, work: Work, i: jax.Array | int) -> tuple[jax.Array, ...]:
    """What slices have to know of a block's unit: asked for early, because these reads depend on one
    another."""
    number, m, g, q = plan.unit(r, work, i)
    lines = pl.ds(pl.multiple_of(m * BM + lax.axis_index("wg") * 64, 64), 64)
    owns = [
        load(r.mask, (r.places[m, g * plan.group + page], lines), plgpu.Layout.WGMMA.reduce(1))
        for page in range(plan.group)
    ]
    return number, m, g, q, r.counts[m], *owns


def sums(plan: Plan, r: Refs, work: Work, index: Any, meet: Callable[[], None]) -> None:
    """A warpgroup's share of the sums over slices; `index`: its number among those that sum. It calls
    `meet` to wait for the slices."""
    count, each = work.slices, WGS * plan.parts
    total, stride = work.sums, work.sum_stride

    def which(i: jax.Array | int) -> tuple[jax.Array, ...]:
        at = lax.max(lax.min(index + i * stride, total - 1), 0)
        number = at // each
        half = (at - number * each) // plan.parts
        part = at - number * each - half * plan.parts
        return r.sums[0, number], r.sums[1, number], r.sums[2, number], half, part

    def one(i: jax.Array, carry: Any) -> Any:
        m, place, number, half, part = carry
        column = lax.rem(place, jnp.int32(plan.group)) * plan.parts + part

        def lot(j: jax.Array, value: jax.Array) -> jax.Array:
            read = []
            for q in range(LOT):  # all loads in flight at once
                at = lax.min(j * LOT + q, count - 1)
                slice_ = load(r.p, (number * count + at, half, column), plgpu.Layout.WGMMA)
                read.append(slice_ * (j * LOT + q < count).astype(jnp.float32))
            for slice_ in read:
                value = value + slice_
            return value

        zeros = plgpu.layout_cast(jnp.zeros((64, PAGE), jnp.float32), plgpu.Layout.WGMMA)
        value = lax.fori_loop(0, (count + LOT - 1) // LOT, lot, zeros)
        place_u(plan, r, m, place, part, half)[...] = value.astype(plan.dtype)
        return which(i + 1)

    first = which(0)
    meet()
    lax.fori_loop(0, lax.max((total - index + stride - 1) // stride, 0), one, first)


def place_u(plan: Plan, r: Refs, m: jax.Array, place: Any, part: Any, half: Any) -> Any:
    """Where one page's u of a row block's 64 rows lies."""
    return r.u.at[m, part, pl.ds(half * 64, 64), pl.ds(place * PAGE, PAGE)]
