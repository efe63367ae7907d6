"""The body of the Hopper decode kernel: one query token a row, K/V split over all blocks evenly.

A worker (one warpgroup, alone in its block) walks a stretch of the step's line of tiles (see
hopper_plan.py). Positions are the 64 rows that wgmma wants, a row's G queries of a kv head (and
neighbours that fill up eights) its few columns: S^T = K q^T, O^T = V^T P^T. So a thread has four
scores and not 32. Pieces of a split row go to a scratch array, and whoever finishes a row's last
piece sums them.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load
from kernels_pallas.paged_attention.hopper_math import LOG2E, capped, multiply, row_layout
from kernels_pallas.paged_attention.hopper_plan import TILE, Layout
from kernels_pallas.paged_attention.hopper_registers import (
    SWIZZLED,
    meet,
    store_columns,
    store_weights,
    take_ticket,
)
from kernels_pallas.paged_attention.hopper_ring import BarrierRing, OwnRing, Tile

READ = 48
"""Registers of a thread for pieces of a split row that are read at once."""

WGMMA = plgpu.Layout.WGMMA

Cursor = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Row, kv head, tile of the row's line, position of the row's query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Arrays in global memory and scratch in shared memory."""

    q: Any
    keys: Any
    values: Any
    tables: Any
    positions: Any
    work: Any
    rows: Any
    tickets: Any
    out: Any
    pieces: Any
    sizes: Any
    qs: Any
    ks: Any
    vs: Any
    ps: Any
    flag: Any
    full_k: Any
    full_v: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Static facts of one launch, and its body."""

    rows: int
    heads: int
    width: int
    layout: Layout
    scale: float
    softcap: float | None
    dtype: Any
    own: bool = True
    """Barriers of our own: one thread arrives once for a tile's K, not all of them once a page."""
    interpret: bool = False

    @property
    def kv_heads(self) -> int:
        """K of the Semantics."""
        return self.layout.kv_heads

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def top(self) -> int:
        """Columns of scores: whole eights of q that hold a row's queries of one kv head."""
        return top_rows(self.group)

    def call(self, *args: jax.Array) -> jax.Array:
        """Launch; args: q [T·N, H], keys, values, tables, positions, and the plan's arrays."""
        out = jax.ShapeDtypeStruct((self.rows, self.heads, self.width), self.dtype)
        pieces = jax.ShapeDtypeStruct((self.layout.workers, 2, self.width, self.top), jnp.float32)
        sizes = jax.ShapeDtypeStruct((self.layout.workers, 2, self.top), jnp.float32)
        if not self.interpret:
            return self._launch("all", (out, pieces, sizes), args)[0]
        # The interpreter has no atomics: split rows are summed by a launch of their own.
        whole, *parts = self._launch("tiles", (out, pieces, sizes), args)
        (summed,) = self._launch("sum", (out,), (*args, *parts))
        return jnp.where(self._is_split(*args[4:7])[:, :, None], summed, whole)

    def _launch(self, phase: str, out_type: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        stages, loads = self.layout.stages, self.layout.span.loads(self.layout.page)
        scratch = [
            plgpu.SMEM((stages, self.top, self.width), self.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, TILE, self.width), self.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, TILE, self.width), self.dtype, transforms=SWIZZLED),
            plgpu.SMEM((self.top, TILE), self.dtype, transforms=SWIZZLED),
            plgpu.SMEM((1,), jnp.int32),
            *(OwnRing if self.own else BarrierRing).barriers(stages, loads),
        ]
        kernel = plgpu.kernel(
            partial(self.body, phase),
            kernel_name="attend_decode",
            out_type=out_type,
            grid=(self.layout.workers,),
            grid_names=("worker",),
            num_threads=1,
            thread_name="wg",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(*args)

    def _is_split(self, positions: jax.Array, work: jax.Array, rows: jax.Array) -> jax.Array:
        """Which heads of which rows several workers share."""
        n = jnp.maximum(self.layout.span.tiles(positions[: self.rows]), 1)[:, None]
        start = self.kv_heads * rows[0][:, None] + n * jnp.arange(self.kv_heads)
        first, last = self.layout.sharers(start, n, work[0, 1])
        return jnp.repeat(first != last, self.group, axis=1)

    def body(self, phase: str, *refs: Any) -> None:
        """What every worker runs. `phase`: "all", or one of two launches."""
        first, outs, scratch = refs[:8], refs[8:-7], refs[-7:]
        outs = (outs[2], *outs[:2]) if phase == "sum" else outs
        names = [field.name for field in dataclasses.fields(Refs)]
        r = Refs(**dict(zip(names, (*first, *outs, *scratch), strict=True)))
        worker = lax.axis_index("worker")
        if phase != "sum":
            self.walk(r, worker)
            return

        def unit(i: jax.Array, carry: jax.Array) -> jax.Array:
            index = worker + i * self.layout.workers
            row, head = index // self.kv_heads, lax.rem(index, jnp.int32(self.kv_heads))

            @pl.when(index < self.rows * self.kv_heads)
            def _() -> None:
                pl.when(r.positions[row] >= 0)(partial(self.sum_pieces, r, row, head))

            return carry

        lax.fori_loop(0, -(-self.rows * self.kv_heads // self.layout.workers), unit, jnp.int32(0))

    # The line of tiles

    def advance(self, r: Refs, c: Cursor) -> Cursor:
        """The next tile of the line."""
        row, head, tile, at = c
        ends = tile + 1 == self.layout.span.after(at)
        head = head + ends.astype(jnp.int32)
        over = head == self.kv_heads

        def next_row() -> tuple[jax.Array, jax.Array]:
            following = r.rows[1, row]
            return following, r.positions[following]

        row, at = lax.cond(over, next_row, lambda: (row, at))
        return row, jnp.where(over, 0, head), jnp.where(ends, 0, tile + 1), at

    def page_ids(self, r: Refs, c: Cursor) -> tuple[jax.Array, ...]:
        """The pages that hold a tile."""
        row, _, tile, at = c
        return tuple(r.tables[row, index] for index in self.layout.pages(tile, at))

    def tile(self, c: Cursor, ids: tuple[jax.Array, ...]) -> Tile:
        """Where a tile's q, K and V lie."""
        row, head, tile, at = c
        offset: Any = 0
        if self.layout.page > TILE:
            each = jnp.int32(self.layout.page // TILE)
            offset = lax.rem(self.layout.span.first(at) + tile, each) * TILE
        first = (row * self.heads + head * self.group) // 8 * 8
        return Tile(first, head, offset, ids)

    def walk(self, r: Refs, worker: jax.Array) -> None:
        """A worker's stretch of the line."""
        layout, count = self.layout, r.work[worker, 0]
        first = [r.work[worker, 2 + i] for i in range((layout.stages + 1) * layout.entry)]
        entries = [first[i * layout.entry :] for i in range(layout.stages + 1)]
        queue: list[Any] = [tuple(entry[:4]) for entry in entries]
        ring = (OwnRing if self.own else BarrierRing)(r, layout.stages, min(layout.page, TILE))
        for i in range(layout.stages):
            ids = tuple(entries[i][4 : layout.entry])
            pl.when(i < count)(partial(ring.start, self.tile(queue[i], ids), i))
        self.clear_padding(r, worker)

        def step(i: jax.Array, carry: Any) -> Any:
            queue, slot, turn, peak, total, acc = carry
            (_, _, tile, at), following = queue[0], queue[-1]
            ids = self.page_ids(r, following)  # asked for early, used at the end
            ring.wait_k(slot, turn)
            s = multiply((TILE, self.top), r.ks.at[slot], r.qs.at[slot].transpose((1, 0)))
            # The first of a row or of this worker has nothing to go on from: the carry fades.
            before = peak + jnp.where((tile == 0) | (i == 0), -jnp.inf, 0.0)
            peak, fade, p = self.weigh(s, before, at - (layout.span.first(at) + tile) * TILE)
            store_weights(p.astype(self.dtype), r.ps, interpret=self.interpret)
            total = total * lax.broadcast_in_dim(fade, total.shape, [1]) + p
            ring.wait_v(slot, turn)
            o = multiply(acc.shape, r.vs.at[slot].transpose((1, 0)), r.ps.transpose((1, 0)))
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [1]) + o
            meet(interpret=self.interpret)  # nobody reads the slot any more
            more = i + layout.stages < count
            pl.when(more)(partial(ring.start, self.tile(following, ids), slot))
            ends = tile + 1 == layout.span.after(at)
            over = partial(self.finish, r, worker, queue[0], ends & (tile <= i), tile <= i)
            pl.when(ends | (i == count - 1))(partial(over, peak, total, acc))
            wraps = slot == layout.stages - 1
            slot, turn = jnp.where(wraps, 0, slot + 1), jnp.where(wraps, 1 - turn, turn)
            return (*queue[1:], self.advance(r, following)), slot, turn, peak, total, acc

        zero = jnp.int32(0)
        zeros = (
            plgpu.layout_cast(jnp.zeros(self.top, jnp.float32), WGMMA.reduce(0)),
            plgpu.layout_cast(jnp.zeros((TILE, self.top), jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.zeros((self.width, self.top), jnp.float32), WGMMA),
        )
        lax.fori_loop(0, count, step, (tuple(queue), zero, zero, *zeros))

    def weigh(
        self, s: jax.Array, before: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a tile's products [positions, queries], of which those up to `last` are seen: the
        queries' peaks, what makes of sums below the peaks `before` such below these, and the
        tile's weights."""
        s, factor = capped(s, self.scale, self.softcap)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=WGMMA)
        s = jnp.where(self.layout.span.seen(key, last), s, -jnp.inf)
        peak = jnp.maximum(before, s.max(axis=0) * factor)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(peak, s.shape, [1]))
        return peak, jnp.exp2(before - peak), p

    def finish(
        self,
        r: Refs,
        worker: jax.Array,
        c: Cursor,
        whole: jax.Array,
        begun: jax.Array,
        peak: jax.Array,
        total: jax.Array,
        acc: jax.Array,
    ) -> None:
        """A row's result, or a piece of it: unless `whole`, others have tiles of this row and kv
        head. `begun`: the row's line begins with this worker."""
        row, head = c[:2]
        sums = total.sum(axis=0)
        o = acc / lax.broadcast_in_dim(sums, acc.shape, [1])

        @pl.when(whole)
        def _() -> None:
            self.store(r, row, head, o)

        @pl.when(~whole)
        def _() -> None:
            mine = (worker, begun.astype(jnp.int32))
            r.pieces.at[mine][...] = o
            r.sizes.at[mine][...] = peak + jnp.log(sums) * LOG2E
            if not self.interpret:
                first, last = self.sharers(r, row, head)
                ticket = take_ticket(r.tickets.at[row, pl.ds(head, 1)], r.flag, last - first)
                pl.when(ticket == last - first)(partial(self.sum_pieces, r, row, head))

    def store(self, r: Refs, row: jax.Array, head: jax.Array, o: jax.Array) -> None:
        """What o [H, queries] says of a row's queries of one kv head, into out."""
        mine = r.out.at[row, pl.ds(head * self.group, self.group)]
        above = self.above(row, head)
        store_columns(o.astype(self.dtype), mine, above, interpret=self.interpret)

    def above(self, row: jax.Array, head: jax.Array) -> jax.Array:
        """Rows of other queries above those of this row and kv head."""
        return lax.rem(row * self.heads + head * self.group, jnp.int32(8))

    def clear_padding(self, r: Refs, worker: jax.Array) -> None:
        """Zeros for rows that are padding."""

        def row(i: jax.Array, carry: jax.Array) -> jax.Array:
            index = worker + i * self.layout.workers

            @pl.when(index < self.rows)
            def _() -> None:
                @pl.when(r.positions[index] < 0)
                def _() -> None:
                    zeros = jnp.zeros((self.heads, self.width), self.dtype)
                    layout = row_layout(self.heads, self.width)
                    r.out.at[index][...] = plgpu.layout_cast(zeros, layout)

            return carry

        lax.fori_loop(0, -(-self.rows // self.layout.workers), row, jnp.int32(0))

    # Rows that several workers share

    def sharers(self, r: Refs, row: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and the last worker that has tiles of this row's kv head."""
        n = self.layout.span.tiles(r.positions[row])
        return self.layout.sharers(self.kv_heads * r.rows[0, row] + head * n, n, r.work[0, 1])

    def sum_pieces(self, r: Refs, row: jax.Array, head: jax.Array) -> None:
        """The sum of a split row's pieces, into out."""
        first, last = self.sharers(r, row, head)
        shape, columns = (self.width, self.top), WGMMA.reduce(0)
        at_once = max(1, READ * 128 // (self.width * self.top))

        def piece(worker: jax.Array) -> tuple[jax.Array, jax.Array]:
            at = jnp.minimum(worker, last)
            mine = (at, (at == first).astype(jnp.int32))  # its last row, else its first
            size = load(r.sizes, mine, columns) + jnp.where(worker <= last, 0.0, -jnp.inf)
            return load(r.pieces, mine, WGMMA), size

        def some(i: jax.Array, carry: Any) -> Any:
            before, total, acc = carry
            pieces = [piece(first + i * at_once + j) for j in range(at_once)]
            peak = before
            for _, size in pieces:
                peak = jnp.maximum(peak, size)
            fade = jnp.exp2(before - peak)
            total, acc = total * fade, acc * lax.broadcast_in_dim(fade, shape, [1])
            for o, size in pieces:
                weight = jnp.exp2(size - peak)
                total, acc = total + weight, acc + o * lax.broadcast_in_dim(weight, shape, [1])
            return peak, total, acc

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
        lowest, none = (
            plgpu.layout_cast(jnp.full(self.top, x, jnp.float32), columns) for x in (-1e30, 0.0)
        )
        rounds = (last - first) // at_once + 1
        _, total, acc = lax.fori_loop(0, rounds, some, (lowest, none, zeros))
        self.store(r, row, head, acc / lax.broadcast_in_dim(total, shape, [1]))


def top_rows(group: int) -> int:
    """Rows of whole eights that hold any `group` queries in a row."""
    return -(-(group + 8 - math.gcd(group, 8)) // 8) * 8
