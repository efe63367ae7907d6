"""The warpgroup of the Hopper kernel for many rows that loads, for the two that multiply."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import meet
from kernels_pallas.lora_matmul.hopper_wide_plan import U_THERE, Plan, Refs, Work
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK
from kernels_pallas.lora_matmul.types import PAGE


def produce(plan: Plan, phase: str, r: Refs, work: Work) -> None:
    """Stream tiles of x and w, of x and A between them, and of u and B, into the ring."""
    t = plan.t
    ends = [sum(plan.part_sizes[: j + 1]) // t.bn for j in range(plan.parts)]
    multicast: dict[str, Any] = {"collective_axes": "pair"} if t.cluster > 1 else {}

    def acquire(n: jax.Array) -> jax.Array:
        slot = lax.rem(n, jnp.int32(t.stages))
        pl.when(n >= t.stages)(lambda: plgpu.barrier_wait(r.empty.at[slot]))
        return slot

    def unit(i: jax.Array, n: jax.Array) -> jax.Array:
        _, m, g, q = plan.unit(r, work, i)
        height = plan.parts * PAGE
        ids = [r.ids[m, g * plan.group + j] for j in range(plan.group)]

        def step(j: jax.Array, n: jax.Array) -> jax.Array:
            slot, depth = acquire(n), pl.ds((q * work.steps + j) * BK, BK)
            full = r.full_shrink.at[slot]
            plgpu.copy_gmem_to_smem(r.x.at[pl.ds(m * BM, BM), depth], r.xs.at[slot], full)
            for g, page in enumerate(ids):
                there = r.sa.at[slot, pl.ds(g * height, height)]
                plgpu.copy_gmem_to_smem(r.a.at[page, :, depth], there, full)
            return n + 1

        return lax.fori_loop(0, work.steps, step, n)

    def one_tile(i: jax.Array, n: jax.Array) -> jax.Array:
        k = plan.tile(r.counts, i)
        rows, columns = pl.ds(k.m * BM, BM), pl.ds(k.c * t.bn, t.bn)
        part = jnp.int32(0)
        for end in ends[:-1]:
            part = part + (k.c >= end).astype(jnp.int32)

        def base(j: jax.Array, n: jax.Array) -> jax.Array:
            slot, depth = acquire(n), pl.ds((k.s * plan.steps + j) * BK, BK)
            full = r.full.at[slot]
            plgpu.copy_gmem_to_smem(r.w.at[depth, columns], r.ws.at[slot], full, **multicast)
            plgpu.copy_gmem_to_smem(r.x.at[rows, depth], r.xs.at[slot], full)
            return n + 1

        def expand(e: jax.Array, n: jax.Array) -> jax.Array:
            slot, chunk = acquire(n), k.s + e * t.split
            full = r.full_expand.at[slot]
            first = chunk * CHUNK
            if t.cluster > 1:  # its neighbour may have more chunks; places beyond hold page 0
                first = jnp.where(chunk < k.chunks, first, plan.pages)
            for g in range(CHUNK):
                page = r.ids[k.m, first + g]
                there = r.ws.at[slot, pl.ds(PAGE * g, PAGE)]
                plgpu.copy_gmem_to_smem(r.b.at[page, :, columns], there, full)

            def load_u() -> None:
                u = r.u.at[k.m, part, :, pl.ds(chunk * CHUNK * PAGE, CHUNK * PAGE)]
                plgpu.copy_gmem_to_smem(u, r.xs.at[slot], full)

            def load_any() -> None:
                """Zeros are multiplied with it."""
                plgpu.copy_gmem_to_smem(r.x.at[rows, pl.ds(0, BK)], r.xs.at[slot], full)

            if t.cluster == 1:
                load_u()
            else:
                pl.when(chunk < k.chunks)(load_u)
                pl.when(chunk >= k.chunks)(load_any)
            return n + 1

        n = lax.fori_loop(0, k.alone, base, n)
        if phase == "all" and plan.summing == 1:
            n = lax.fori_loop(0, jnp.where(i == 0, plan.units_of_worker(work), 0), unit, n)
        n = lax.fori_loop(k.alone, k.early, base, n)
        if phase == "all":

            @pl.when((i == 0) & (work.units > 0) & k.there)
            def _() -> None:
                signals = jnp.where(work.summers > 0, work.summers, work.writers)
                meet(r.sync.at[U_THERE], signals, signals + plan.readers - 1)

        n = lax.fori_loop(k.early, k.before, base, n)
        n = lax.fori_loop(0, k.expands, expand, n)
        return lax.fori_loop(k.before, k.before + k.after, base, n)

    n = jnp.int32(0)
    if phase == "shrink" or (phase == "all" and plan.summing > 1):
        n = lax.fori_loop(0, plan.units_of_worker(work), unit, n)
    if phase != "shrink":
        least = 1 if phase == "all" else 0  # a block without a tile may have units
        tiles = lax.max(plan.tiles_of_worker(), jnp.int32(least))
        n = lax.fori_loop(0, tiles, one_tile, n)

    def drain(n: jax.Array, carry: jax.Array) -> jax.Array:
        acquire(n)
        return carry

    lax.fori_loop(n, n + t.stages, drain, jnp.int32(0))
