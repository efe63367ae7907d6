"""The body of the Hopper kernel for many rows (see hopper_wide.py for the idea)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load, signal
from kernels_pallas.lora_matmul.hopper_wide_plan import Plan, Refs, Tile
from kernels_pallas.lora_matmul.hopper_wide_produce import produce
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, WGS
from kernels_pallas.lora_matmul.types import PAGE

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(Plan):
    """The launch and its body. n counts ring steps since the block began, na those of them that
    carry a tile of A."""

    def out_types(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """y, and u = x A^T, masked: rank pages of a row block's own list."""
        y = (self.t.split, self.rows, sum(self.part_sizes))
        u = (self.row_blocks, self.parts, self.block, self.depth * PAGE)
        return (jax.ShapeDtypeStruct(y, self.out_dtype), jax.ShapeDtypeStruct(u, self.dtype))

    def call(
        self, phase: str, out: tuple[Any, ...], args: tuple[jax.Array, ...], interpret: bool = False
    ) -> tuple[jax.Array, ...]:
        """Launch "all", or "shrink" or "multiply" alone."""
        t = self.t
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        bytes_ = t.out_columns * self.out_dtype.itemsize
        out_swizzled = (
            plgpu.TilingTransform((8, t.out_columns)), plgpu.SwizzleTransform(bytes_),
        )  # fmt: skip
        out_rows, a_rows = WGS * t.out_buffers * 64, t.a_stages * self.a_rows
        empty = partial(plgpu.Barrier, num_arrivals=WGS, num_barriers=t.stages)
        if t.cluster > 1:
            empty = partial(
                plgpu.ClusterBarrier, collective_axes=("pair",), num_arrivals=WGS,
                num_barriers=t.stages,
            )  # fmt: skip
        scratch = [
            plgpu.SMEM((t.stages, BM, BK), self.dtype, transforms=swizzled),
            plgpu.SMEM((t.stages, BK, t.bn), self.dtype, transforms=swizzled),
            plgpu.SMEM((out_rows, t.out_columns), self.out_dtype, transforms=out_swizzled),
            *([] if self.shared else [plgpu.SMEM((a_rows, BK), self.dtype, transforms=swizzled)]),
            plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
            plgpu.Barrier(num_arrivals=1 + CHUNK, num_barriers=t.stages),
            empty(),
            plgpu.Barrier(num_arrivals=t.group, num_barriers=t.a_stages),
            plgpu.Barrier(num_arrivals=WGS, num_barriers=t.a_stages),
            plgpu.Barrier(num_arrivals=WGS),
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
            num_threads=WGS + 1,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(),
            **extra,
        )
        return kernel(*args)

    def body(self, phase: str, *refs: Any) -> None:
        """What every warpgroup of every block runs."""
        count = 10 if self.shared else 11
        inputs, rest, scratch = refs[:9], refs[9:-count], list(refs[-count:])
        if self.shared:
            scratch.insert(3, scratch[2])
        y, u = {
            "all": lambda: rest,
            "shrink": lambda: (None, rest[0]),
            "multiply": lambda: (rest[1], rest[0]),
        }[phase]()
        names = [field.name for field in dataclasses.fields(Refs)]
        r = Refs(**dict(zip(names, (*inputs, y, u, *scratch), strict=True)))
        wg = lax.axis_index("wg")

        @pl.when(wg == WGS)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            produce(self, phase, r)

        @pl.when(wg < WGS)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            self.multiply(phase, r)

    # The warpgroups that multiply: 64 rows each.

    def multiply(self, phase: str, r: Refs) -> None:
        """Consume the ring."""
        t, wg = self.t, lax.axis_index("wg")
        lanes = pl.ds(wg * 64, 64)

        def release(n: jax.Array) -> None:
            plgpu.barrier_arrive(r.empty.at[lax.rem(n, jnp.int32(t.stages))])

        def release_a(na: jax.Array) -> None:
            plgpu.barrier_arrive(r.empty_a.at[lax.rem(na, jnp.int32(t.a_stages))])

        def consume(acc: Any, full: Any, steps: Any, n: jax.Array) -> jax.Array:
            """acc += x tile @ w tile; a slot is free one step later."""

            def step(j: jax.Array, n: jax.Array) -> jax.Array:
                slot = lax.rem(n, jnp.int32(t.stages))
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, r.xs.at[slot, lanes], r.ws.at[slot])
                plgpu.wgmma_wait(1)
                pl.when(j > 0)(partial(release, n + t.stages - 1))
                return n + 1

            n = lax.fori_loop(0, steps, step, n)
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(partial(release, n + t.stages - 1))
            return n

        def shrink(k: Tile, p: Any, acc: Any, carry: Any) -> Any:
            """One pass: its slice of u, beside the base product in the first."""

            def accumulate(acc_u: Any) -> Any:
                def step(j: jax.Array, carry: Any) -> Any:
                    n, na = carry
                    slot = lax.rem(n, jnp.int32(t.stages))
                    a_slot = lax.rem(na, jnp.int32(t.a_stages))
                    plgpu.barrier_wait(r.full.at[slot])
                    if acc is not None:
                        plgpu.wgmma(acc, r.xs.at[slot, lanes], r.ws.at[slot])
                    plgpu.barrier_wait(r.full_a.at[a_slot])
                    a = r.sa.at[pl.ds(a_slot * self.a_rows, self.a_rows)]
                    plgpu.wgmma(acc_u, r.xs.at[slot, lanes], a.transpose((1, 0)))
                    plgpu.wgmma_wait(1 if acc is None else 2)

                    @pl.when(j > 0)
                    def _() -> None:
                        release(n + t.stages - 1)
                        release_a(na + t.a_stages - 1)

                    return n + 1, na + 1

                n, na = lax.fori_loop(0, k.steps, step, carry)
                plgpu.wgmma_wait(0)

                @pl.when(k.steps > 0)
                def _() -> None:
                    release(n + t.stages - 1)
                    release_a(na + t.a_stages - 1)

                return acc_u[...], n, na

            places = [self.page(k, p, g) for g in range(t.group)]
            owns = [self.own(r, k, at) for at in places]
            u, n, na = pl.run_scoped(accumulate, ACC((64, self.a_rows), jnp.float32))
            for g, (at, own) in enumerate(zip(places, owns, strict=True)):
                there = (k.steps > 0) & (at < k.count)
                pl.when(there)(partial(self.store_u, r, k, u, g, at, own))
            return n, na

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

        def one_tile(i: jax.Array, carry: Any) -> Any:
            n, na, *last = carry
            k = self.tile(r.counts, i)

            def accumulate(acc: Any) -> Any:
                at, na_ = n, na
                done = jnp.int32(0)
                if t.overlap and phase != "shrink":
                    pl.when((i > 0) & (k.steps > 0))(partial(flush, last))
                if phase != "multiply":
                    if self.shared:

                        @pl.when(k.steps > 0)
                        def _() -> None:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            plgpu.barrier_arrive(r.sa_free)

                    at, na_ = shrink(k, 0, acc, (at, na_))
                    done = k.steps
                    at, na_ = lax.fori_loop(
                        1, k.passes, lambda p, carry: shrink(k, p, None, carry), (at, na_)
                    )
                    lax.fori_loop(k.pages, k.places, partial(self.fill_u, r, k), None)
                    if phase == "all":
                        pl.when(k.shrinks)(partial(signal, r.sync.at[k.m], k.last))
                    if self.shared:
                        pl.when(k.steps > 0)(lambda: plgpu.barrier_arrive(r.sa_done))
                if phase != "shrink":
                    if t.overlap:
                        waiting = ((i > 0) & (k.steps == 0)).astype(jnp.int32)
                        at = lax.fori_loop(0, waiting, lambda _, at: begin(acc, last, at), at)
                        done = done + waiting * (t.bn // t.out_columns)
                    at = consume(acc, r.full, k.before - done, at)
                    at = consume(acc, r.full_expand, k.expands, at)
                    at = consume(acc, r.full, self.steps - k.before, at)
                return acc[...], at, na_

            acc, n, na = pl.run_scoped(accumulate, ACC((64, t.bn), jnp.float32))
            if phase != "multiply" and self.shared:
                pl.when(k.steps > 0)(lambda: plgpu.barrier_wait(r.sa_done))
            y = (k.s, k.row, k.c, acc.astype(self.out_dtype))
            if t.overlap and phase != "shrink":
                return n, na, *y
            if phase != "shrink":
                flush(y)
            return n, na

        zero = jnp.int32(0)
        carry: Any = (zero, zero)
        if t.overlap and phase != "shrink":
            nothing = jnp.zeros((64, t.bn), self.out_dtype)
            carry += (zero, zero, zero, plgpu.layout_cast(nothing, plgpu.Layout.WGMMA))
        tiles = self.tiles_of_worker()
        _, _, *last = lax.fori_loop(0, tiles, one_tile, carry)
        if last:
            pl.when(tiles > 0)(partial(flush, last))
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def own(self, r: Refs, k: Tile, at: jax.Array) -> jax.Array:
        """Which rows of this warpgroup use a page of the row block's list."""
        at = lax.min(at, jnp.int32(self.pages + CHUNK - 1))
        lines = pl.ds(k.row + lax.axis_index("wg") * 64, 64)
        return load(r.mask, (r.places[k.m, at], lines), plgpu.Layout.WGMMA.reduce(1))

    def store_u(
        self, r: Refs, k: Tile, u: jax.Array, g: int, at: jax.Array, own: jax.Array
    ) -> None:
        """One page's slice of u, zero where a row has another adapter."""
        for part in range(self.parts):
            column = (g * self.parts + part) * PAGE
            values = u[:, column : column + PAGE]
            values = values * lax.broadcast_in_dim(own, values.shape, [0])
            self.place_u(r, k, at, part)[...] = values.astype(self.dtype)

    def fill_u(self, r: Refs, k: Tile, i: jax.Array, carry: None) -> None:
        """Zeros: the rest of the last expand step."""
        for part in range(self.parts):
            zeros = plgpu.layout_cast(jnp.zeros((64, PAGE), self.dtype), plgpu.Layout.WGMMA)
            self.place_u(r, k, k.first + i * k.stride, part)[...] = zeros

    def place_u(self, r: Refs, k: Tile, at: jax.Array, part: int) -> Any:
        """Where this warpgroup's rows of one slice of u lie."""
        rows = pl.ds(k.row - k.m * self.block + lax.axis_index("wg") * 64, 64)
        place = ((at * k.slices + k.q) * self.t.split + k.s) * PAGE
        return r.u.at[k.m, part, rows, pl.ds(place, PAGE)]

    def store_y(self, r: Refs, y: Any, j: int) -> None:
        """Some columns of a tile, through shared memory."""
        t, wg, width = self.t, lax.axis_index("wg"), self.t.out_columns
        s, row, c, values = y
        plgpu.wait_smem_to_gmem(t.out_buffers - 1, wait_read_only=True)
        first = (wg * t.out_buffers + j % t.out_buffers) * 64
        buffer = r.ys.at[pl.ds(first, 64)]
        buffer[...] = values[:, width * j : width * (j + 1)]
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(row + wg * 64, 64), 64)
        there = r.y.at[s, rows, pl.ds(c * t.bn + width * j, width)]
        plgpu.copy_smem_to_gmem(buffer, there)
