"""The body of the fused Hopper kernel (see hopper.py for the idea and the entry point)."""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_shrink import ACC, Shrink, cdiv
from kernels_pallas.lora_matmul.hopper_sync import Counters, Ring, interpreter
from kernels_pallas.lora_matmul.hopper_tuning import Tuning
from kernels_pallas.lora_matmul.types import PAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Static facts of one launch, and its body. Letters: s K split, c column tile, n step since the
    block began."""

    rows: int
    """Of x: a multiple of 8, up to 64."""
    width: int
    part_sizes: tuple[int, ...]
    pages: int
    """Most active rank pages; 0: the product alone."""
    t: Tuning
    sms: int
    dtype: Any

    @property
    def parts(self) -> int:
        return len(self.part_sizes)

    @property
    def tiles(self) -> int:
        return sum(self.part_sizes) // self.t.bn

    @property
    def chunk(self) -> int:
        """Rank pages of one expand step."""
        return self.t.bk // PAGE

    @property
    def out_dtype(self) -> Any:
        return self.dtype if self.t.split == 1 else jnp.dtype(jnp.float32)

    @cached_property
    def shrink(self) -> Shrink:
        """What happens beside the product."""
        t = self.t
        return Shrink(
            rows=self.rows, width=self.width, parts=self.parts, pages=self.pages, slices=t.slices,
            group=t.group, stages=t.shrink_stages, chunk=self.chunk, sms=self.sms, dtype=self.dtype,
            single=t.single,
        )  # fmt: skip

    def out_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """y; u = x A^T, masked; and its slices, if they are summed."""
        y = (self.t.split, self.rows, sum(self.part_sizes))
        return jax.ShapeDtypeStruct(y, self.out_dtype), *self.shrink.out_types()

    def call(
        self, phase: str, out: tuple[Any, ...], args: tuple[jax.Array, ...], interpret: bool = False
    ) -> tuple[jax.Array, ...]:
        """Launch one phase, or "all"."""
        t, over = self.t, 64 - self.rows
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        out_cols = 128 // self.out_dtype.itemsize
        out_swizzled = (plgpu.TilingTransform((8, out_cols)), plgpu.SwizzleTransform(128))
        tile = partial(plgpu.SMEM, dtype=self.dtype, transforms=swizzled)
        full = partial(plgpu.Barrier, num_barriers=t.stages)
        scratch = [
            # x tiles lie one after another and are read 64 rows at a time: rows beyond the
            # tile's own are another tile's, and their results are never stored.
            tile((t.stages * self.rows + over, t.bk)),
            tile((t.stages, t.bk, t.bn)),
            plgpu.SMEM((min(2, t.bn // 64), 64, 64), self.out_dtype, transforms=out_swizzled),
            full(num_arrivals=2),
            full(num_arrivals=1),
        ]
        if self.pages:
            scratch += [
                full(num_arrivals=1 + self.chunk),
                tile((t.shrink_stages * self.rows + over, 64)),
                tile((t.shrink_stages, t.group * self.parts * PAGE, 64)),
                plgpu.SMEM(self.shrink.staging(), self.dtype),
                plgpu.Barrier(num_arrivals=1 + t.group, num_barriers=t.shrink_stages),
                plgpu.Barrier(num_arrivals=1),
            ]
        extra: dict[str, Any] = {"interpret": interpreter()} if interpret else {}
        kernel = plgpu.kernel(
            partial(self.body, phase),
            kernel_name=f"lora_matmul_{self.width}x{sum(self.part_sizes)}",
            out_type=out,
            grid=(self.sms,),
            grid_names=("sm",),
            num_threads=3 if self.pages else 2,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            **extra,
        )
        return kernel(*args)

    def body(self, phase: str, *refs: Any) -> None:
        """What every warpgroup of every block runs: 0 multiplies, 1 streams, 2 shrinks. `phase`: "all",
        or one of three launches. Without rank pages: "multiply" alone."""
        wg = lax.axis_index("wg")
        if not self.pages:
            x, w, y, xs, ws, ys, full, empty = refs
            ring = Ring(self.t.stages, self.rows, xs, ws, full, full, empty)

            @pl.when(wg == 1)
            def _() -> None:
                self.produce(ring, x, w, None, None, None, jnp.int32(0), None)

            pl.when(wg == 0)(partial(self.multiply, ring, y, ys, jnp.int32(0)))
            return
        x, w, a, b, pages, count, mask, sync = refs[:8]
        rest, scratch, single = refs[8:-11], refs[-11:], self.t.single
        y, u, p = {
            "all": lambda: (*rest, None)[:3],
            "slices": lambda: (None, rest[0], None) if single else (None, None, rest[0]),
            "sum": lambda: (None, rest[1], rest[0]),
            "multiply": lambda: (rest[1], rest[0], None),
        }[phase]()
        xs, ws, ys, full, empty, full_expand, sx, sa, us, full_shrink, u_there = scratch
        counters = Counters(sync, self.sms) if phase == "all" else None
        active = count[0]
        ring = Ring(self.t.stages, self.rows, xs, ws, full, full_expand, empty)

        @pl.when(wg == 1)
        def _() -> None:
            if phase in ("all", "multiply"):
                ready = u_there if counters else None
                self.produce(ring, x, w, b, u, pages, active, ready)

        @pl.when(wg == 2)
        def _() -> None:
            if phase in ("all", "slices"):
                self.shrink.slice(x, a, p, u, pages, mask, active, sx, sa, us, full_shrink)
            if counters:  # the one who waits for the others has nothing else to do
                pl.when(active > 0)(partial(counters.meet, 0))
            if phase in ("all", "sum") and not single:
                self.shrink.sum(p, u, us, active)
                if counters:
                    pl.when(active > 0)(partial(counters.meet, 1))
            if counters:
                pl.when(active > 0)(lambda: plgpu.barrier_arrive(u_there))

        @pl.when(wg == 0)
        def _() -> None:
            if phase in ("all", "multiply"):
                self.multiply(ring, y, ys, active)

    # Which block does what: tiles of w are dealt from the first block on, what is to be shrunk from the
    # last, so that blocks without a tile take that first.

    def _tiles_of_block(self) -> jax.Array:
        total = self.tiles * self.t.split
        return (total - lax.axis_index("sm") + self.sms - 1) // self.sms

    def _tile(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Column tile and K split."""
        unit = lax.axis_index("sm") + i * self.sms
        return lax.rem(unit, jnp.int32(self.tiles)), unit // self.tiles

    def _expands(self, active: jax.Array, s: jax.Array) -> jax.Array:
        """Expand steps of a tile: K splits take chunks of pages in turn."""
        return lax.max(cdiv(self.shrink.expands(active) - s, self.t.split), 0)

    @property
    def _steps(self) -> int:
        return self.width // self.t.bk // self.t.split

    def produce(
        self, ring: Any, x: Any, w: Any, b: Any, u: Any, pages: Any, active: Any, ready: Any
    ) -> None:
        """Stream tiles of x and w, and in between of u and B, into the ring. Whatever this warpgroup
        waits for, the stream of w waits for too: page numbers are read a step ahead, and u is waited
        for at a barrier in shared memory."""
        t = self.t
        ends = [sum(self.part_sizes[: j + 1]) // t.bn for j in range(self.parts)]

        def page_ids(s: jax.Array, e: jax.Array | int) -> list[jax.Array]:
            return self.shrink.page_ids(pages, s + e * t.split)

        def tile(i: jax.Array, carry: Any) -> Any:
            n, waited = carry
            c, s = self._tile(i)
            columns = pl.ds(c * t.bn, t.bn)
            ids = page_ids(s, 0) if self.pages else []
            part = jnp.int32(0)
            for end in ends[:-1]:
                part = part + (c >= end).astype(jnp.int32)

            def load_base(k: jax.Array, n: jax.Array) -> jax.Array:
                x_tile, w_tile, slot = ring.acquire(n)
                depth = pl.ds((s * self._steps + k) * t.bk, t.bk)
                plgpu.copy_gmem_to_smem(w.at[depth, columns], w_tile, ring.full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[:, depth], x_tile, ring.full.at[slot])
                return n + 1

            def load_expand(e: jax.Array, carry: Any) -> Any:
                n, *ids = carry
                x_tile, w_tile, slot = ring.acquire(n)
                barrier = ring.full_expand.at[slot]
                for j, page in enumerate(ids):
                    there = b.at[page, :, columns]
                    plgpu.copy_gmem_to_smem(there, w_tile.at[pl.ds(PAGE * j, PAGE)], barrier)
                if ready is not None:
                    pl.when((e == 0) & (waited == 0))(lambda: plgpu.barrier_wait(ready))
                ranks = pl.ds((s + e * t.split) * self.chunk * PAGE, t.bk)
                plgpu.copy_gmem_to_smem(u.at[part, :, ranks], x_tile, barrier)
                return n + 1, *page_ids(s, e + 1)

            n = lax.fori_loop(0, self._steps - t.tail, load_base, n)
            if self.pages:
                expands = self._expands(active, s)
                n, *_ = lax.fori_loop(0, expands, load_expand, (n, *ids))
                waited = waited | (expands > 0).astype(jnp.int32)
            return lax.fori_loop(self._steps - t.tail, self._steps, load_base, n), waited

        zero = jnp.int32(0)
        n, _ = lax.fori_loop(0, self._tiles_of_block(), tile, (zero, zero))
        ring.drain(n)

    def multiply(self, ring: Any, y: Any, ys: Any, active: jax.Array) -> None:
        """Consume the ring, and store y."""
        t = self.t

        def tile(i: jax.Array, n: jax.Array) -> jax.Array:
            c, s = self._tile(i)

            def accumulate(acc: Any) -> tuple[jax.Array, jax.Array]:
                k = ring.consume(acc, ring.full, self._steps - t.tail, n)
                if self.pages:
                    k = ring.consume(acc, ring.full_expand, self._expands(active, s), k)
                k = ring.consume(acc, ring.full, t.tail, k)
                return acc[...], k

            acc, n = pl.run_scoped(accumulate, ACC((64, t.bn), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j in range(t.bn // 64):
                if j > 1:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                ys[j % 2] = acc[:, 64 * j : 64 * j + 64].astype(self.out_dtype)
                plgpu.commit_smem()
                there = y.at[s, :, pl.ds(c * t.bn + 64 * j, 64)]
                plgpu.copy_smem_to_gmem(ys.at[j % 2, pl.ds(0, self.rows)], there)
            return n

        lax.fori_loop(0, self._tiles_of_block(), tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)
