"""The shrink of the Hopper kernel for many rows: slices of u = x A^T, and their sums."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_shrink import ACC
from kernels_pallas.lora_matmul.hopper_sync import load
from kernels_pallas.lora_matmul.hopper_wide_plan import Plan, Refs
from kernels_pallas.lora_matmul.hopper_wide_tuning import BM, CHUNK, WGS
from kernels_pallas.lora_matmul.types import PAGE

LOT = 8
"""Slices that are read at once."""


def slices(
    plan: Plan, r: Refs, first: Any, count: jax.Array, n: jax.Array,
    release: Callable[[jax.Array], None],
) -> jax.Array:  # fmt: skip
    """`count` of this block's units, from ring step n on: slices of u, or u itself where K is not cut.
    `first`: what `unit` said of the first."""
    wg, t, units = lax.axis_index("wg"), plan.t, r.totals[0]
    lanes, steps, whole = pl.ds(wg * 64, 64), plan.unit_steps(units), plan.slices(units) == 1

    def one(i: jax.Array, carry: Any) -> Any:
        n, number, m, g, q, used, *owns = carry

        def accumulate(acc: Any) -> tuple[jax.Array, jax.Array]:
            def step(j: jax.Array, n: jax.Array) -> jax.Array:
                slot = lax.rem(n, jnp.int32(t.stages))
                plgpu.barrier_wait(r.full_shrink.at[slot])
                a = r.sa.at[slot, pl.ds(0, plan.a_rows)]
                plgpu.wgmma(acc, r.xs.at[slot, lanes], a.transpose((1, 0)))
                plgpu.wgmma_wait(1)
                pl.when(j > 0)(partial(release, n + t.stages - 1))
                return n + 1

            after = lax.fori_loop(0, steps, step, n)
            plgpu.wgmma_wait(0)
            release(after + t.stages - 1)
            return acc[...], after

        u, n = pl.run_scoped(accumulate, ACC((64, plan.a_rows), jnp.float32))
        there = plan.has_unit(units, i)
        for column in range(plan.group * plan.parts):
            page, part = divmod(column, plan.parts)
            value = u[:, column * PAGE : (column + 1) * PAGE]
            value = value * lax.broadcast_in_dim(owns[page], value.shape, [0])

            @pl.when(there & jnp.logical_not(whole))
            def _(column: int = column, value: jax.Array = value) -> None:
                r.p.at[number, wg, column][...] = value

            unused = (q == 0) & (g * plan.group + page >= used)  # zeros; nobody sums them

            @pl.when(there & (whole | unused))
            def _(page: int = page, part: int = part, value: jax.Array = value) -> None:
                place_u(plan, r, m, g * plan.group + page, part, wg)[...] = value.astype(plan.dtype)

        lots = CHUNK // plan.group
        fills = there & (whole | (q == 0)) & ((g + 1) * plan.group >= used)
        for more in range(1, lots):  # up to a whole expand step

            @pl.when(fills & (lax.rem(g, jnp.int32(lots)) + more < lots))
            def _(more: int = more) -> None:
                zeros = plgpu.layout_cast(jnp.zeros((64, PAGE), plan.dtype), plgpu.Layout.WGMMA)
                for page in range(plan.group):
                    for part in range(plan.parts):
                        at = (g + more) * plan.group + page
                        place_u(plan, r, m, at, part, wg)[...] = zeros

        return n, *unit(plan, r, i + 1)

    n, *_ = lax.fori_loop(0, count, one, (n, *first))
    return n


def unit(plan: Plan, r: Refs, i: jax.Array | int) -> tuple[jax.Array, ...]:
    """What slices have to know of a block's unit: asked for early, because these reads depend on one
    another."""
    number, m, g, q = plan.unit(r, i)
    lines = pl.ds(pl.multiple_of(m * BM + lax.axis_index("wg") * 64, 64), 64)
    owns = [
        load(r.mask, (r.places[m, g * plan.group + page], lines), plgpu.Layout.WGMMA.reduce(1))
        for page in range(plan.group)
    ]
    return number, m, g, q, r.counts[m], *owns


def sums(plan: Plan, r: Refs, index: Any, meet: Callable[[], None]) -> None:
    """A warpgroup's share of the sums over slices; `index`: its number among those that sum. It calls
    `meet` to wait for the slices."""
    count, each = plan.slices(r.totals[0]), WGS * plan.parts
    total, stride = plan.sums(r.totals), plan.spread_sums(r.totals) * plan.summing

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
