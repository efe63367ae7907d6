"""The shrink of the Hopper kernel for many rows, by the warpgroups that multiply: u = x A^T."""

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
    plan: Plan, r: Refs, total: jax.Array, n: jax.Array, release: Callable[[jax.Array], None]
) -> jax.Array:
    """This block's units, from ring step n on: slices of u, or u itself where K is not cut."""
    wg, t = lax.axis_index("wg"), plan.t
    lanes = pl.ds(wg * 64, 64)

    def unit(i: jax.Array, n: jax.Array) -> jax.Array:
        k = plan.unit(r.units, total, i)

        def accumulate(acc: Any) -> tuple[jax.Array, jax.Array]:
            def step(j: jax.Array, n: jax.Array) -> jax.Array:
                slot = lax.rem(n, jnp.int32(t.stages))
                plgpu.barrier_wait(r.full_shrink.at[slot])
                a = r.sa.at[slot, pl.ds(0, plan.a_rows)]
                plgpu.wgmma(acc, r.xs.at[slot, lanes], a.transpose((1, 0)))
                plgpu.wgmma_wait(1)
                pl.when(j > 0)(partial(release, n + t.stages - 1))
                return n + 1

            after = lax.fori_loop(0, k.steps, step, n)
            plgpu.wgmma_wait(0)
            release(after + t.stages - 1)
            return acc[...], after

        owns = [_own(plan, r, k.m, k.g * plan.group + j) for j in range(plan.group)]
        u, n = pl.run_scoped(accumulate, ACC((64, plan.a_rows), jnp.float32))
        values = []
        for column in range(plan.group * plan.parts):
            value = u[:, column * PAGE : (column + 1) * PAGE]
            own = lax.broadcast_in_dim(owns[column // plan.parts], value.shape, [0])
            values.append(value * own)

        @pl.when(k.there & (k.slices > 1))
        def _() -> None:
            for column, value in enumerate(values):
                r.p.at[k.number, wg, column][...] = value

        @pl.when(k.there & (k.slices == 1))
        def _() -> None:
            for column, value in enumerate(values):
                _store(plan, r, k.m, k.g, column // plan.parts, column % plan.parts, wg, value)

        return n

    return lax.fori_loop(0, plan.units_of_worker(total), unit, n)


def sums(plan: Plan, r: Refs, total: jax.Array) -> None:
    """This warpgroup's share of the sums over slices."""
    count, each = plan.slices(total), WGS * plan.group * plan.parts
    stride = plan.blocks * WGS
    first = plan.rank() * WGS + lax.axis_index("wg")

    def piece(i: jax.Array, carry: None) -> None:
        index = first + i * stride
        unit = index // each
        index = index - unit * each
        m, g = r.units[0, unit], r.units[1, unit]
        half = index // (plan.group * plan.parts)
        column = index - half * (plan.group * plan.parts)

        def lot(j: jax.Array, value: jax.Array) -> jax.Array:
            read = []
            for q in range(LOT):  # all loads in flight at once
                at = lax.min(j * LOT + q, count - 1)
                part = load(r.p, (unit * count + at, half, column), plgpu.Layout.WGMMA)
                read.append(part * (j * LOT + q < count).astype(jnp.float32))
            for part in read:
                value = value + part
            return value

        zeros = plgpu.layout_cast(jnp.zeros((64, PAGE), jnp.float32), plgpu.Layout.WGMMA)
        value = lax.fori_loop(0, (count + LOT - 1) // LOT, lot, zeros)
        page = column // plan.parts
        _store(plan, r, m, g, page, column - page * plan.parts, half, value)

    lax.fori_loop(0, (plan.pieces(total) - first + stride - 1) // stride, piece, None)


def _own(plan: Plan, r: Refs, m: jax.Array, at: jax.Array) -> jax.Array:
    """Which rows of this warpgroup use a page of the row block's list."""
    lines = pl.ds(pl.multiple_of(m * BM + lax.axis_index("wg") * 64, 64), 64)
    return load(r.mask, (r.places[m, at], lines), plgpu.Layout.WGMMA.reduce(1))


def _store(
    plan: Plan, r: Refs, m: jax.Array, g: jax.Array, page: Any, part: Any, half: Any,
    value: jax.Array,
) -> None:  # fmt: skip
    """One page's u of 64 rows. The last group's adds zeros up to a whole expand step."""
    rows = pl.ds(half * 64, 64)

    def place(g: jax.Array) -> Any:
        return r.u.at[m, part, rows, pl.ds((g * plan.group + page) * PAGE, PAGE)]

    place(g)[...] = value.astype(plan.dtype)
    lots = CHUNK // plan.group
    last = (g + 1) * plan.group >= r.counts[m]
    for more in range(1, lots):

        @pl.when(last & (lax.rem(g, jnp.int32(lots)) + more < lots))
        def _(more: int = more) -> None:
            zeros = jnp.zeros((64, PAGE), plan.dtype)
            place(g + more)[...] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
