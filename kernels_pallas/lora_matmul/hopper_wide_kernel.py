"""The body of the Hopper kernel for many rows (see hopper_wide.py for the idea)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul import hopper_wide_shrink
from kernels_pallas.lora_matmul.hopper_shrink import ACC
from kernels_pallas.lora_matmul.hopper_sync import interpreter, meet, signal
from kernels_pallas.lora_matmul.hopper_wide_plan import SLICES_THERE, U_THERE, Plan, Refs, Work
from kernels_pallas.lora_matmul.hopper_wide_produce import produce
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, WGS
from kernels_pallas.lora_matmul.types import PAGE

INPUTS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(Plan):
    """The launch and its body. n counts ring steps since the block began."""

    def out_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """y; u = x A^T, masked: rank pages of a row block's own list; its slices."""
        y = (self.t.split, self.rows, sum(self.part_sizes))
        u = (self.row_blocks, self.parts, BM, self.depth * PAGE)
        p = (self.blocks, WGS, self.group * self.parts, 64, PAGE)
        return (
            jax.ShapeDtypeStruct(y, self.out_dtype),
            jax.ShapeDtypeStruct(u, self.dtype),
            jax.ShapeDtypeStruct(p, jnp.float32),
        )

    def call(
        self, phase: str, out: tuple[Any, ...], args: tuple[jax.Array, ...], interpret: bool = False
    ) -> tuple[jax.Array, ...]:
        """Launch "all", or "shrink", "sum" or "multiply" alone."""
        t = self.t
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        bytes_ = t.out_columns * self.out_dtype.itemsize
        out_swizzled = (
            plgpu.TilingTransform((8, t.out_columns)), plgpu.SwizzleTransform(bytes_),
        )  # fmt: skip
        full = partial(plgpu.Barrier, num_barriers=t.stages)
        empty = full(num_arrivals=WGS)
        if t.cluster > 1:
            empty = plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=WGS, num_barriers=t.stages
            )
        # A slot holds a tile of w (or of B), or, as wide as that, a tile of A.
        tiles = [
            plgpu.SMEM((t.stages, BK, t.bn), self.dtype, transforms=swizzled),
            plgpu.SMEM((t.stages, t.bn, BK), self.dtype, transforms=swizzled),
        ]
        scratch = [
            plgpu.SMEM((t.stages, BM, BK), self.dtype, transforms=swizzled),
            *(tiles if interpret else [plgpu.RefUnion(*tiles)]),
            plgpu.SMEM(
                (WGS * t.out_buffers * 64, t.out_columns), self.out_dtype, transforms=out_swizzled
            ),
            full(num_arrivals=2),
            full(num_arrivals=1 + self.group),
            full(num_arrivals=1 + CHUNK),
            empty,
            plgpu.Barrier(num_arrivals=WGS),
        ]
        extra: dict[str, Any] = {"interpret": interpreter()} if interpret else {}
        if t.cluster > 1:
            extra |= {"cluster": (t.cluster,), "cluster_names": ("pair",)}
        kernel = plgpu.kernel(
            partial(self.body, phase),
            kernel_name=f"lora_matmul_wide_{self.width}x{sum(self.part_sizes)}",
            out_type=out,
            grid=(self.workers,),
            grid_names=("worker",),
            num_threads=WGS + len(self.registers) - 1,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            **extra,
        )
        return kernel(*args)

    def body(self, phase: str, *refs: Any) -> None:
        """What every warpgroup of every block runs."""
        inputs, rest = refs[:INPUTS], refs[INPUTS:]
        outputs = {"all": 3, "shrink": 2, "sum": 2, "multiply": 2}[phase]
        rest, scratch = rest[:outputs], rest[outputs:]
        tiles = scratch[1:-6]
        ws, sa = tiles if len(tiles) == 2 else tiles[0]
        scratch = (scratch[0], ws, sa, *scratch[-6:])
        y, u, p = {
            "all": lambda: rest,
            "shrink": lambda: (None, *rest),
            "sum": lambda: (None, rest[1], rest[0]),
            "multiply": lambda: (rest[1], rest[0], None),
        }[phase]()
        names = [field.name for field in dataclasses.fields(Refs)]
        r = Refs(**dict(zip(names, (*inputs, y, u, p, *scratch), strict=True)))
        wg, work = lax.axis_index("wg"), self.work(r.totals)

        @pl.when(wg == WGS)
        def _() -> None:
            plgpu.set_max_registers(self.registers[1], action="decrease")
            if phase != "sum":
                produce(self, phase, r, work)

        if self.summing == 1:

            @pl.when(wg == WGS + 1)
            def _() -> None:
                plgpu.set_max_registers(self.registers[2], action="decrease")
                if phase == "all":  # fences are not for those who multiply

                    @pl.when(self.has_unit(work, 0))
                    def _() -> None:
                        plgpu.barrier_wait(r.sliced)
                        self.announce(r, work)

                if phase in ("all", "sum"):
                    self.sum(phase, r, work, self.rank())

        @pl.when(wg < WGS)
        def _() -> None:
            plgpu.set_max_registers(self.registers[0], action="increase")
            if phase != "sum":
                self.multiply(phase, r, work)
            elif self.summing > 1:
                self.sum(phase, r, work, self.rank() * WGS + wg)

    # The warpgroups that multiply: 64 rows each.

    def multiply(self, phase: str, r: Refs, work: Work) -> None:
        """Consume the ring: tiles, and beside a block's first tile its units of the shrink."""
        t, wg = self.t, lax.axis_index("wg")
        lanes = pl.ds(wg * 64, 64)
        first = () if phase == "multiply" else hopper_wide_shrink.unit(self, r, work, 0)

        def release(n: jax.Array) -> None:
            plgpu.barrier_arrive(r.empty.at[lax.rem(n, jnp.int32(t.stages))])

        def w_tile(slot: jax.Array) -> Any:
            return r.ws.at[slot]

        def consume(
            acc: Any, full: Any, steps: Any, n: jax.Array, tile: Callable[..., Any] = w_tile
        ) -> jax.Array:
            """acc += x tile @ w tile (or A's); a slot is free one step later."""

            def step(j: jax.Array, n: jax.Array) -> jax.Array:
                slot = lax.rem(n, jnp.int32(t.stages))
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, r.xs.at[slot, lanes], tile(slot))
                plgpu.wgmma_wait(1)
                pl.when(j > 0)(partial(release, n + t.stages - 1))
                return n + 1

            n = lax.fori_loop(0, steps, step, n)
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(partial(release, n + t.stages - 1))
            return n

        def begin(acc: Any, before: Any, n: jax.Array) -> jax.Array:
            """The first steps, and beside them the stores of the tile before."""
            for j in range(t.bn // t.out_columns):
                slot = lax.rem(n + j, jnp.int32(t.stages))
                plgpu.barrier_wait(r.full.at[slot])
                plgpu.wgmma(acc, r.xs.at[slot, lanes], r.ws.at[slot])
                self.store_y(r, before, j)
                plgpu.wgmma_wait(1)
                if j:
                    release(n + j - 1)
            plgpu.wgmma_wait(0)
            release(n + t.bn // t.out_columns - 1)
            return n + t.bn // t.out_columns

        def flush(before: Any) -> None:
            for j in range(t.bn // t.out_columns):
                self.store_y(r, before, j)

        def shrink(now: jax.Array, n: jax.Array) -> jax.Array:
            count = jnp.where(now, self.units_of_worker(work), 0)
            n = hopper_wide_shrink.slices(self, r, work, first, count, n, consume)
            mine = now & self.has_unit(work, 0)
            if phase == "all" and self.summing > 1:
                pl.when(mine)(partial(self.announce, r, work))
            elif phase == "all":
                pl.when(mine)(lambda: plgpu.barrier_arrive(r.sliced))
            return n

        def one_tile(i: jax.Array, carry: Any) -> Any:
            n, *last = carry
            k = self.tile(r.counts, i)

            def accumulate(acc: Any) -> Any:
                at, done = n, jnp.int32(0)
                if phase == "all":
                    done = jnp.where(i == 0, k.alone, 0)
                    at = consume(acc, r.full, done, at)
                    if self.summing == 1:
                        at = shrink(i == 0, at)
                    else:  # the slices of others are there by now
                        index = self.rank() * WGS + wg
                        pl.when(i == 0)(partial(self.sum, phase, r, work, index))
                if t.overlap:
                    again = (i > 0).astype(jnp.int32)
                    at = lax.fori_loop(0, again, lambda _, at: begin(acc, last, at), at)
                    done = done + again * (t.bn // t.out_columns)
                at = consume(acc, r.full, k.before - done, at)
                at = consume(acc, r.full_expand, k.expands, at)
                at = consume(acc, r.full, k.after, at)
                return acc[...], at

            acc, n = pl.run_scoped(accumulate, ACC((64, t.bn), jnp.float32))
            y = (k.s, k.m, k.c, acc.astype(self.out_dtype))
            if t.overlap:
                return n, *y
            pl.when(k.there)(partial(flush, y))
            return (n,)

        tiles, zero = self.tiles_of_worker(), jnp.int32(0)
        n = zero
        if phase == "shrink" or (phase == "all" and self.summing > 1):
            n = shrink(jnp.bool_(True), n)
        if phase == "shrink":
            return
        carry: Any = (n,)
        if t.overlap:
            nothing = jnp.zeros((64, t.bn), self.out_dtype)
            carry = (n, zero, zero, zero, plgpu.layout_cast(nothing, plgpu.Layout.WGMMA))
        least = 1 if phase == "all" else 0  # a block without a tile may have units
        _, *last = lax.fori_loop(0, lax.max(tiles, jnp.int32(least)), one_tile, carry)
        if last:
            pl.when(tiles > 0)(partial(flush, last))
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def announce(self, r: Refs, work: Work) -> None:
        """Slices are there, or a part of u."""
        writers, summers = work.writers, work.summers

        @pl.when(summers > 0)
        def _() -> None:
            signal(r.sync.at[SLICES_THERE], writers + summers - 1)

        @pl.when(summers == 0)
        def _() -> None:
            signal(r.sync.at[U_THERE], writers + self.readers - 1)

    def sum(self, phase: str, r: Refs, work: Work, index: jax.Array) -> None:
        """What the warpgroup of that number among those that sum has to sum."""
        writers, summers = work.writers, work.summers

        def wait() -> None:
            if phase == "all":
                meet(r.sync.at[SLICES_THERE], writers, writers + summers - 1)

        @pl.when(index < summers)
        def _() -> None:
            hopper_wide_shrink.sums(self, r, work, index, wait)
            if phase == "all":
                signal(r.sync.at[U_THERE], summers + self.readers - 1)

    def store_y(self, r: Refs, y: Any, j: int) -> None:
        """Some columns of a tile, through shared memory."""
        t, wg, width = self.t, lax.axis_index("wg"), self.t.out_columns
        s, m, c, values = y
        plgpu.wait_smem_to_gmem(t.out_buffers - 1, wait_read_only=True)
        first = (wg * t.out_buffers + j % t.out_buffers) * 64
        buffer = r.ys.at[pl.ds(first, 64)]
        buffer[...] = values[:, width * j : width * (j + 1)]
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(m * BM + wg * 64, 64), 64)
        there = r.y.at[s, rows, pl.ds(c * t.bn + width * j, width)]
        plgpu.copy_smem_to_gmem(buffer, there)
