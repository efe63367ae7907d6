"""The body of the Hopper decode kernel: one query token a row, K/V split over all blocks evenly.

A worker (one warpgroup, alone in its block) walks a stretch of the step's line of tiles (see
hopper_plan.py). A row's G queries that share a kv head sit on top of each K tile in shared memory,
so that they and rows of K are the 64 rows wgmma wants; what the rows of K give is never used.
Pieces of a split row go to a scratch array, and whoever finishes a row's last piece sums them.
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
from kernels_pallas.paged_attention.hopper_math import (
    LOG2E,
    capped,
    multiply,
    multiply_add,
    row_layout,
)
from kernels_pallas.paged_attention.hopper_plan import TILE, Layout
from kernels_pallas.paged_attention.hopper_registers import store_rows, take_ticket

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
    ks: Any
    vs: Any
    out_s: Any
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
        """Rows above a K tile: whole eights of q that hold a row's queries of one kv head."""
        return top_rows(self.group)

    def call(self, *args: jax.Array) -> jax.Array:
        """Launch; args: q [T·N, H], keys, values, tables, positions, and the plan's arrays."""
        out = jax.ShapeDtypeStruct((self.rows, self.heads, self.width), self.dtype)
        pieces = jax.ShapeDtypeStruct(
            (self.layout.workers, 2, 2, self.top, self.width), jnp.float32
        )
        if not self.interpret:
            return self._launch("all", (out, pieces), args)[0]
        # The interpreter has no atomics: split rows are summed by a launch of their own.
        whole, parts = self._launch("tiles", (out, pieces), args)
        (summed,) = self._launch("sum", (out,), (*args, parts))
        return jnp.where(self._is_split(*args[4:7])[:, :, None], summed, whole)

    def _launch(self, phase: str, out_type: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        loads = self.layout.span.loads(self.layout.page)
        scratch = [
            plgpu.SMEM(
                (self.layout.stages * (self.top + TILE), self.width),
                self.dtype,
                transforms=swizzled,
            ),
            plgpu.SMEM((self.layout.stages, TILE, self.width), self.dtype, transforms=swizzled),
            plgpu.SMEM((self.top, self.width), self.dtype),
            plgpu.SMEM((1,), jnp.int32),
            plgpu.Barrier(num_arrivals=1 + loads, num_barriers=self.layout.stages),
            plgpu.Barrier(num_arrivals=loads, num_barriers=self.layout.stages),
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
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(*args)

    def _is_split(self, positions: jax.Array, work: jax.Array, rows: jax.Array) -> jax.Array:
        """Which heads of which rows several workers share."""
        n = jnp.maximum(self.layout.span.tiles(positions[: self.rows]), 1)[:, None]
        first = self.kv_heads * rows[0][:, None] + n * jnp.arange(self.kv_heads)
        return jnp.repeat(first // work[0, 1] != (first + n - 1) // work[0, 1], self.group, axis=1)

    def body(self, phase: str, *refs: Any) -> None:
        """What every worker runs. `phase`: "all", or one of two launches."""
        first, outs, scratch = refs[:8], refs[8:-6], refs[-6:]
        out, pieces = (outs[1], outs[0]) if phase == "sum" else outs
        names = [field.name for field in dataclasses.fields(Refs)]
        r = Refs(**dict(zip(names, (*first, out, pieces, *scratch), strict=True)))
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

    def issue(self, r: Refs, c: Cursor, ids: tuple[jax.Array, ...], slot: jax.Array | int) -> None:
        """Start the loads of a tile into a slot."""
        row, head, tile, at = c
        base = slot * (self.top + TILE)
        size, offset = min(self.layout.page, TILE), 0
        if self.layout.page > TILE:
            each = jnp.int32(self.layout.page // TILE)
            offset = lax.rem(self.layout.span.first(at) + tile, each) * TILE
        mine = (row * self.heads + head * self.group) // 8 * 8
        plgpu.copy_gmem_to_smem(
            r.q.at[pl.ds(mine, self.top)], r.ks.at[pl.ds(base, self.top)], r.full_k.at[slot]
        )
        for j, page in enumerate(ids):
            there = r.keys.at[page, head, pl.ds(offset, size)]
            here = r.ks.at[pl.ds(base + self.top + j * size, size)]
            plgpu.copy_gmem_to_smem(there, here, r.full_k.at[slot])
        for j, page in enumerate(ids):
            there = r.values.at[page, head, pl.ds(offset, size)]
            here = r.vs.at[slot, pl.ds(j * size, size)]
            plgpu.copy_gmem_to_smem(there, here, r.full_v.at[slot])

    def walk(self, r: Refs, worker: jax.Array) -> None:
        """A worker's stretch of the line."""
        layout, count = self.layout, r.work[worker, 0]
        first = [r.work[worker, 2 + i] for i in range((layout.stages + 1) * layout.entry)]
        entries = [first[i * layout.entry :] for i in range(layout.stages + 1)]
        queue: list[Any] = [tuple(entry[:4]) for entry in entries]
        for i in range(layout.stages):
            ids = tuple(entries[i][4 : layout.entry])
            pl.when(i < count)(partial(self.issue, r, queue[i], ids, i))
        self.clear_padding(r, worker)

        def step(i: jax.Array, carry: Any) -> Any:
            queue, slot, peak, total, acc = carry
            (row, head, tile, at), following = queue[0], queue[-1]
            ids = self.page_ids(r, following)  # asked for early, used at the end
            base = slot * (self.top + TILE)
            k_tile = r.ks.at[pl.ds(base + self.top, TILE)]
            plgpu.barrier_wait(r.full_k.at[slot])
            s = multiply((64, TILE), r.ks.at[pl.ds(base, 64)], k_tile.transpose((1, 0)))
            s, factor = capped(s, self.scale, self.softcap)
            column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            last = at - (layout.span.first(at) + tile) * TILE
            s = jnp.where(layout.span.seen(column, last), s, -jnp.inf)
            before = peak + jnp.where(tile == 0, -jnp.inf, 0.0)  # a row begins: the carry fades
            peak = jnp.maximum(before, s.max(axis=1) * factor)
            fade = jnp.exp2(before - peak)
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(peak, s.shape, [0]))
            total = total * fade + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
            plgpu.barrier_wait(r.full_v.at[slot])

            acc = multiply_add(acc, p.astype(self.dtype), r.vs.at[slot], self.interpret)
            pl.when(i + self.layout.stages < count)(partial(self.issue, r, following, ids, slot))
            ends, begun = tile + 1 == layout.span.after(at), tile <= i
            whole = ends & begun  # of the row's line, this worker had the first and the last tile

            @pl.when(whole)
            def _() -> None:
                mine = r.out.at[row, pl.ds(head * self.group, self.group)]
                o = acc / lax.broadcast_in_dim(total, acc.shape, [0])
                above = self.above(row, head)
                store_rows(o.astype(self.dtype), mine, above, interpret=self.interpret)

            @pl.when((ends | (i == count - 1)) & ~whole)
            def _() -> None:
                o = acc / lax.broadcast_in_dim(total, acc.shape, [0])
                size = lax.broadcast_in_dim(peak + jnp.log(total) * LOG2E, acc.shape, [0])
                mine = r.pieces.at[worker, begun.astype(jnp.int32)]
                store_rows(o, mine.at[0], jnp.int32(0), interpret=self.interpret)
                store_rows(size, mine.at[1], jnp.int32(0), interpret=self.interpret)
                if not self.interpret:
                    first, last = self.sharers(r, row, head)
                    ticket = take_ticket(r.tickets.at[row, pl.ds(head, 1)], r.flag, last - first)
                    pl.when(ticket == last - first)(partial(self.sum_pieces, r, row, head))

            slot = jnp.where(slot == layout.stages - 1, 0, slot + 1)
            return (*queue[1:], self.advance(r, following)), slot, peak, total, acc

        zeros = jnp.zeros((64,), jnp.float32)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
        acc = jnp.zeros((64, self.width), jnp.float32)
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA)
        lax.fori_loop(0, count, step, (tuple(queue), jnp.int32(0), zeros, zeros, acc))

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
        n, per = self.layout.span.tiles(r.positions[row]), r.work[0, 1]
        start = self.kv_heads * r.rows[0, row] + head * n
        return start // per, (start + n - 1) // per

    def sum_pieces(self, r: Refs, row: jax.Array, head: jax.Array) -> None:
        """The sum of a split row's pieces, into out."""
        first, last = self.sharers(r, row, head)
        shape = (self.top, self.width)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=4)

        def piece(worker: jax.Array, carry: Any) -> Any:
            peak, total, acc = carry
            begun = (worker == first).astype(jnp.int32)  # its last row, else its first
            o = load(r.pieces, (worker, begun, 0), layout)
            size = load(r.pieces, (worker, begun, 1), layout)
            new = jnp.maximum(peak, size)
            fade, weight = jnp.exp2(peak - new), jnp.exp2(size - new)
            return new, total * fade + weight, acc * fade + o * weight

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        lowest = plgpu.layout_cast(jnp.full(shape, -1e30, jnp.float32), layout)
        _, total, acc = lax.fori_loop(first, last + 1, piece, (lowest, zeros, zeros))
        r.out_s[...] = (acc / total).astype(self.dtype)
        plgpu.commit_smem()
        mine = r.out.at[row, pl.ds(head * self.group, self.group)]
        above = self.above(row, head)
        plgpu.copy_smem_to_gmem(r.out_s.at[pl.ds(above, self.group)], mine)
        plgpu.wait_smem_to_gmem(0)


def top_rows(group: int) -> int:
    """Rows of whole eights that hold any `group` queries in a row."""
    return -(-(group + 8 - math.gcd(group, 8)) // 8) * 8
