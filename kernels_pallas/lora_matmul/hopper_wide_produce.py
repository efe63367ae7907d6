"""The warpgroup of the Hopper kernel for many rows that loads, for the two that multiply."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import meet
from kernels_pallas.lora_matmul.hopper_wide_plan import Plan, Refs
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK
from kernels_pallas.lora_matmul.types import PAGE


def produce(plan: Plan, phase: str, r: Refs) -> None:
    """Stream tiles of x and w, of A beside them, and of u and B, into the ring."""
    t = plan.t
    ends = [sum(plan.part_sizes[: j + 1]) // t.bn for j in range(plan.parts)]
    multicast: dict[str, Any] = {"collective_axes": "pair"} if t.cluster > 1 else {}

    def acquire(n: jax.Array) -> jax.Array:
        slot = lax.rem(n, jnp.int32(t.stages))
        pl.when(n >= t.stages)(lambda: plgpu.barrier_wait(r.empty.at[slot]))
        return slot

    def one_tile(i: jax.Array, carry: Any) -> Any:
        k = plan.tile(r.counts, i)
        rows, columns = pl.ds(k.row, BM), pl.ds(k.c * t.bn, t.bn)

        def depth(j: jax.Array) -> Any:
            j = k.start + j
            j = jnp.where(j >= plan.steps, j - plan.steps, j)
            return pl.ds((k.s * plan.steps + j) * BK, BK)

        def load_x(j: jax.Array, slot: jax.Array) -> None:
            plgpu.copy_gmem_to_smem(r.x.at[rows, depth(j)], r.xs.at[slot], r.full.at[slot])

        def load_w(j: jax.Array, slot: jax.Array) -> None:
            there = r.w.at[depth(j), columns]
            plgpu.copy_gmem_to_smem(there, r.ws.at[slot], r.full.at[slot], **multicast)

        def load_a(ids: list[jax.Array], j: jax.Array, na: jax.Array) -> None:
            slot, height = lax.rem(na, jnp.int32(t.a_stages)), plan.parts * PAGE
            pl.when(na >= t.a_stages)(lambda: plgpu.barrier_wait(r.empty_a.at[slot]))
            for g, page in enumerate(ids):
                there = r.sa.at[pl.ds(slot * plan.a_rows + g * height, height)]
                plgpu.copy_gmem_to_smem(r.a.at[page, :, depth(j)], there, r.full_a.at[slot])

        def base(j: jax.Array, n: jax.Array) -> jax.Array:
            slot = acquire(n)
            load_w(j, slot)
            load_x(j, slot)
            return n + 1

        def shrink(p: Any, carry: Any) -> Any:
            last = jnp.int32(plan.pages + CHUNK - 1)
            ids = [r.ids[k.m, lax.min(plan.page(k, p, g), last)] for g in range(t.group)]

            def step(j: jax.Array, carry: Any) -> Any:
                n, na = carry
                slot = acquire(n)
                if isinstance(p, int):
                    load_w(j, slot)
                else:
                    plgpu.barrier_arrive(r.full.at[slot])
                load_x(j, slot)
                load_a(ids, j, na)
                return n + 1, na + 1

            return lax.fori_loop(0, k.steps, step, carry)

        def expand(e: jax.Array, n: jax.Array) -> jax.Array:
            slot, full = acquire(n), r.full_expand
            chunk = k.s + e * t.split
            part = jnp.int32(0)
            for end in ends[:-1]:
                part = part + (k.c >= end).astype(jnp.int32)
            each = k.slices * t.split
            ids = [r.ids[k.m, (chunk * CHUNK + g) // each] for g in range(CHUNK)]
            for g, page in enumerate(ids):
                plgpu.copy_gmem_to_smem(
                    r.b.at[page, :, columns], r.ws.at[slot, pl.ds(PAGE * g, PAGE)],
                    full.at[slot],
                )  # fmt: skip
            there = r.u.at[k.m, part, pl.ds(k.row - k.m * plan.block, BM)]
            there = there.at[:, pl.ds(chunk * CHUNK * PAGE, CHUNK * PAGE)]
            plgpu.copy_gmem_to_smem(there, r.xs.at[slot], full.at[slot])
            return n + 1

        n, na = carry
        if phase != "multiply":
            if plan.shared:
                pl.when(k.steps > 0)(lambda: plgpu.barrier_wait(r.sa_free))
            n, na = shrink(0, (n, na))
            n, na = lax.fori_loop(1, k.passes, shrink, (n, na))
            done = k.steps
        else:
            done = jnp.int32(0)
        if phase != "shrink":
            early = lax.max(k.before - t.early, done)
            n = lax.fori_loop(done, early, base, n)
            if phase == "all":
                pl.when(k.count > 0)(partial(meet, r.sync.at[k.m], k.signals, k.last))
            n = lax.fori_loop(early, k.before, base, n)
            n = lax.fori_loop(0, k.expands, expand, n)
            n = lax.fori_loop(k.before, plan.steps, base, n)
        return n, na

    zero = jnp.int32(0)
    n, na = lax.fori_loop(0, plan.tiles_of_worker(), one_tile, (zero, zero))

    def drain(n: jax.Array, carry: jax.Array) -> jax.Array:
        acquire(n)
        return carry

    def drain_a(na: jax.Array, carry: jax.Array) -> jax.Array:
        slot = lax.rem(na, jnp.int32(t.a_stages))
        pl.when(na >= t.a_stages)(lambda: plgpu.barrier_wait(r.empty_a.at[slot]))
        return carry

    lax.fori_loop(n, n + t.stages, drain, zero)
    lax.fori_loop(na, na + t.a_stages, drain_a, zero)
