"""The body of the Hopper kernel for many rows (see hopper_wide.py for the idea)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, WGS, Tuning
from kernels_pallas.lora_matmul.types import PAGE

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Arrays in global memory, then scratch in shared memory."""

    x: Any
    w: Any
    a: Any
    b: Any
    ids: Any
    places: Any
    counts: Any
    mask: Any
    sync: Any
    y: Any
    u: Any
    xs: Any
    ws: Any
    ys: Any
    sa: Any
    full: Any
    full_expand: Any
    empty: Any
    full_a: Any
    empty_a: Any
    sa_free: Any
    sa_done: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of y, and its share of the shrink."""

    m: jax.Array
    """Row block."""
    c: jax.Array
    """Column tile."""
    s: jax.Array
    """Part of K."""
    row: jax.Array
    """First row of this block of threads."""
    count: jax.Array
    """Pages that the row block uses."""
    slices: jax.Array
    """Parts of this K range whose shrinks stay apart: 1, 2 or 4."""
    start: jax.Array
    """First K step; the others follow and wrap."""
    first: jax.Array
    """This tile's first page in the row block's list."""
    stride: jax.Array
    """Distance to its next."""
    q: jax.Array
    """Which slice it shrinks."""
    steps: jax.Array
    """K steps that it shrinks: its first ones. 0: none."""
    passes: jax.Array
    """How often it goes over them: each time takes `group` pages."""
    expands: jax.Array
    """Expand steps."""
    signals: jax.Array
    """How often the row block is signalled before its u is whole."""
    last: jax.Array
    """Where the row block's counter wraps to zero."""
    shrinks: jax.Array
    """Whether this tile signals."""
    before: jax.Array
    """K steps before the expand steps."""
    pages: jax.Array
    """Its pages."""
    places: jax.Array
    """Its pages and its share of what fills them up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide:
    """Static facts of one launch, and its body. n counts ring steps since the block began, na
    those of them that carry a tile of A."""

    rows: int
    width: int
    part_sizes: tuple[int, ...]
    pages: int
    t: Tuning
    sms: int
    dtype: Any

    @property
    def parts(self) -> int:
        return len(self.part_sizes)

    @property
    def block(self) -> int:
        """Rows that share a list of pages: those of a cluster."""
        return BM * self.t.cluster

    @property
    def row_blocks(self) -> int:
        return self.rows // self.block

    @property
    def columns(self) -> int:
        return sum(self.part_sizes) // self.t.bn

    @property
    def workers(self) -> int:
        return self.sms // self.t.cluster

    @property
    def steps(self) -> int:
        """K steps of one tile."""
        return self.width // BK // self.t.split

    @property
    def depth(self) -> int:
        """Most rank pages' worth of u that a row has."""
        most = max(4 * self.t.quarters, 2 * self.t.halves, self.pages + CHUNK) * self.t.split
        return -(-most // CHUNK) * CHUNK

    @property
    def a_rows(self) -> int:
        """Rows of A in one step."""
        return self.t.group * self.parts * PAGE

    @property
    def shared(self) -> bool:
        """Whether tiles of A lie where tiles of y wait to be stored."""
        rows = WGS * self.t.out_buffers * 64
        fits = self.t.a_stages * self.a_rows <= rows and self.t.out_columns == BK
        return fits and self.t.split == 1

    @property
    def out_dtype(self) -> Any:
        return self.dtype if self.t.split == 1 else jnp.dtype(jnp.float32)

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
            self.produce(phase, r)

        @pl.when(wg < WGS)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            self.multiply(phase, r)

    # Which tile is whose, and what of the shrink it does.

    def tiles_of_worker(self) -> jax.Array:
        total = self.columns * self.t.split * self.row_blocks
        return (total - lax.axis_index("worker") + self.workers - 1) // self.workers

    def tile(self, r: Refs, i: jax.Array) -> Tile:
        """Row blocks go in groups whose x stays in L2 while the columns pass by. The tiles of a
        row block that come in the round in which it first occurs share its shrink."""
        t, number = self.t, jnp.int32
        index = lax.axis_index("worker") + i * self.workers
        each = t.span * self.columns * t.split
        group = index // each
        height = lax.min(number(t.span), self.row_blocks - group * t.span)
        index = index - group * each
        s = index // (height * self.columns)
        base = group * each + s * height * self.columns
        index = index - s * height * self.columns
        c = index // height
        local = index - c * height
        m = group * t.span + local
        begin = base + local
        end = (begin // self.workers + 1) * self.workers
        near = lax.min(number(self.columns), (end - begin + height - 1) // height)
        quarters = self.steps % 4 == 0
        fours = (near >= 4) if quarters else (near < 0)
        near = jnp.where(fours, near // 4 * 4, near)
        mine, c4 = c < near, lax.rem(c, number(4))
        count = r.counts[m]
        slices = jnp.where(count <= t.quarters, 4, jnp.where(count <= t.halves, 2, 1))
        slices = jnp.where(fours, slices, 1)
        start = jnp.where(fours & mine, c4 * (self.steps // 4), 0)
        first = jnp.where(
            slices == 4, c // 4, jnp.where(slices == 2, c // 4 * 2 + lax.rem(c, number(2)), c)
        )
        q = jnp.where(slices == 4, c4, jnp.where(slices == 2, c4 // 2, 0))
        whole = lax.max(CHUNK // (slices * t.split), number(1))
        padded = (count + whole - 1) // whole * whole
        stride = near // slices

        def share(places: jax.Array) -> jax.Array:
            return jnp.where(mine, lax.max((places - first + stride - 1) // stride, 0), 0)

        passes = (share(count) + t.group - 1) // t.group
        steps = jnp.where(passes > 0, self.steps // slices, 0)
        chunks = padded * slices * t.split // CHUNK
        signals = near * t.split * WGS * t.cluster
        row = m * self.block
        if t.cluster > 1:
            row = row + lax.axis_index("pair") * BM
        return Tile(
            m=m, c=c, s=s, row=row, count=count, slices=slices, start=start, first=first,
            stride=stride, q=q, passes=passes, steps=steps,
            expands=lax.max((chunks - s + t.split - 1) // t.split, 0),
            signals=signals, last=signals + self.columns * t.split * t.cluster - 1,
            shrinks=mine & (count > 0), before=lax.max(number(self.steps - t.tail), steps),
            pages=share(count), places=share(padded),
        )  # fmt: skip

    # The warpgroup that loads.

    def produce(self, phase: str, r: Refs) -> None:
        """Stream tiles of x and w, of A beside them, and of u and B, into the ring."""
        t = self.t
        ends = [sum(self.part_sizes[: j + 1]) // t.bn for j in range(self.parts)]
        multicast: dict[str, Any] = {"collective_axes": "pair"} if t.cluster > 1 else {}

        def acquire(n: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(t.stages))
            pl.when(n >= t.stages)(lambda: plgpu.barrier_wait(r.empty.at[slot]))
            return slot

        def one_tile(i: jax.Array, carry: Any) -> Any:
            k = self.tile(r, i)
            rows, columns = pl.ds(k.row, BM), pl.ds(k.c * t.bn, t.bn)

            def depth(j: jax.Array) -> Any:
                j = k.start + j
                j = jnp.where(j >= self.steps, j - self.steps, j)
                return pl.ds((k.s * self.steps + j) * BK, BK)

            def load_x(j: jax.Array, slot: jax.Array) -> None:
                plgpu.copy_gmem_to_smem(r.x.at[rows, depth(j)], r.xs.at[slot], r.full.at[slot])

            def load_w(j: jax.Array, slot: jax.Array) -> None:
                there = r.w.at[depth(j), columns]
                plgpu.copy_gmem_to_smem(there, r.ws.at[slot], r.full.at[slot], **multicast)

            def load_a(ids: list[jax.Array], j: jax.Array, na: jax.Array) -> None:
                slot, height = lax.rem(na, jnp.int32(t.a_stages)), self.parts * PAGE
                pl.when(na >= t.a_stages)(lambda: plgpu.barrier_wait(r.empty_a.at[slot]))
                for g, page in enumerate(ids):
                    there = r.sa.at[pl.ds(slot * self.a_rows + g * height, height)]
                    plgpu.copy_gmem_to_smem(r.a.at[page, :, depth(j)], there, r.full_a.at[slot])

            def base(j: jax.Array, n: jax.Array) -> jax.Array:
                slot = acquire(n)
                load_w(j, slot)
                load_x(j, slot)
                return n + 1

            def shrink(p: Any, carry: Any) -> Any:
                last = jnp.int32(self.pages + CHUNK - 1)
                ids = [r.ids[k.m, lax.min(self.page(k, p, g), last)] for g in range(t.group)]

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
                there = r.u.at[k.m, part, pl.ds(k.row - k.m * self.block, BM)]
                there = there.at[:, pl.ds(chunk * CHUNK * PAGE, CHUNK * PAGE)]
                plgpu.copy_gmem_to_smem(there, r.xs.at[slot], full.at[slot])
                return n + 1

            n, na = carry
            if phase != "multiply":
                if self.shared:
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
                    pl.when(k.count > 0)(partial(meet, r.sync, k))
                n = lax.fori_loop(early, k.before, base, n)
                n = lax.fori_loop(0, k.expands, expand, n)
                n = lax.fori_loop(k.before, self.steps, base, n)
            return n, na

        zero = jnp.int32(0)
        n, na = lax.fori_loop(0, self.tiles_of_worker(), one_tile, (zero, zero))

        def drain(n: jax.Array, carry: jax.Array) -> jax.Array:
            acquire(n)
            return carry

        def drain_a(na: jax.Array, carry: jax.Array) -> jax.Array:
            slot = lax.rem(na, jnp.int32(t.a_stages))
            pl.when(na >= t.a_stages)(lambda: plgpu.barrier_wait(r.empty_a.at[slot]))
            return carry

        lax.fori_loop(n, n + t.stages, drain, zero)
        lax.fori_loop(na, na + t.a_stages, drain_a, zero)

    def page(self, k: Tile, p: Any, g: int) -> jax.Array:
        """The place in its row block's list of page g of the tile's pass p."""
        return k.first + (p * self.t.group + g) * k.stride

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
                    slot, a_slot = (
                        lax.rem(n, jnp.int32(t.stages)),
                        lax.rem(na, jnp.int32(t.a_stages)),
                    )
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
            k = self.tile(r, i)

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
                        pl.when(k.shrinks)(partial(signal, r.sync, k))
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


def signal(sync: Any, k: Tile) -> None:
    """This warpgroup's slices of the row block's u are written."""
    _count(sync, k, "release")


def meet(sync: Any, k: Tile) -> None:
    """Wait until the row block's u is whole; the last to pass clears the counter."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_: Any, ref: Any, target: Any) -> None:
        counter = mgpu.SemaphoreRef(mgpu.memref_ptr(ref))
        counter.wait(target.registers.flat[0], decrement=False, memory_scope="gpu")
        # Threads wrote u, the copy engine reads it.
        mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
            "fence.proxy.async;", has_side_effects=True
        )

    wait(sync.at[k.m], k.signals)  # pyright: ignore[reportCallIssue]
    _count(sync, k, "relaxed")


def _count(sync: Any, k: Tile, order: str) -> None:
    """One more; from `last` on to zero."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def count(_: Any, ref: Any, last: Any) -> None:
        if order == "release":
            mgpu.warpgroup_barrier()
        mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
            f"red.{order}.gpu.global.inc.u32 [$0], $1;",
            mgpu.memref_ptr(ref),
            last.registers.flat[0],
            predicate=mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )

    count(sync.at[k.m], k.last)  # pyright: ignore[reportCallIssue]
