"""The body of the Hopper prefill kernel: blocks of query tokens, each over its row's pages.

A block of threads takes 64 tokens of two query heads that share a kv head: a warpgroup each for the
heads, and a third that gathers pages into a ring of K and V tiles. While one head's softmax runs, the
other has the tensor cores: the product of a tile's weights with V waits for the next tile's scores.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load
from kernels_pallas.paged_attention.hopper_math import (
    ACC,
    capped,
    multiply,
    multiply_add,
    row_layout,
)
from kernels_pallas.paged_attention.hopper_plan import Span

ROWS = 64
"""Query tokens of a warpgroup."""

LOWEST = -1e30
"""The peak before any score: finite, so that a row of nothing but masked scores gives no NaN."""

Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Peak and sum of a row's weights, the weights of the last tile, and the output so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Arrays in global memory and scratch in shared memory."""

    q: Any
    keys: Any
    values: Any
    tables: Any
    ends: Any
    decoded: Any
    out: Any
    qs: Any
    ks: Any
    vs: Any
    full_q: Any
    full_k: Any
    full_v: Any
    free_k: Any
    free_v: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What one block of threads computes."""

    token: jax.Array
    """Its first token, decode rows included."""
    row: jax.Array
    kv_head: jax.Array
    pair: jax.Array
    first: jax.Array
    """Position of its first token; -1: padding only."""
    last: jax.Array
    """Position of its last token that is no padding."""
    begin: jax.Array
    """Its first tile of K."""
    end: jax.Array
    """The tile after its last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Static facts of one launch, and its body."""

    decode: int
    block: int
    copied: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    page: int
    span: Span
    stages: int
    scale: float
    softcap: float | None
    dtype: Any
    interpret: bool = False

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def wgs(self) -> int:
        """Warpgroups that multiply: a query head each."""
        return min(2, self.group)

    @property
    def pairs(self) -> int:
        """Blocks of threads for the query heads of a kv head."""
        return -(-self.group // self.wgs)

    @property
    def tiles(self) -> int:
        """Tiles of query tokens."""
        return (self.tokens - self.decode) // ROWS

    @property
    def units(self) -> int:
        """Blocks of threads that attend."""
        return self.tiles * self.kv_heads * self.pairs

    def call(self, *args: jax.Array) -> jax.Array:
        """Launch; args: q [T, N, H], keys, values, tables, the tiles' first and last positions,
        and the decode rows' result, which is copied into its place in the whole (or anything)."""
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

        def tiles(count: int, rows: int) -> Any:
            return plgpu.SMEM((count, rows, self.width), self.dtype, transforms=swizzled)

        loads = self.span.loads(self.page)
        kernel = plgpu.kernel(
            self.body,
            kernel_name="attend_prefill",
            out_type=jax.ShapeDtypeStruct((self.tokens, self.heads, self.width), self.dtype),
            grid=(self.units + self.copied,),
            grid_names=("unit",),
            num_threads=self.wgs + 1,
            thread_name="wg",
            scratch_types=[
                tiles(self.wgs, ROWS),
                tiles(self.stages, self.span.tile),
                tiles(self.stages, self.span.tile),
                plgpu.Barrier(num_arrivals=1, num_barriers=self.wgs),
                plgpu.Barrier(num_arrivals=loads, num_barriers=self.stages),
                plgpu.Barrier(num_arrivals=loads, num_barriers=self.stages),
                plgpu.Barrier(num_arrivals=self.wgs, num_barriers=self.stages),
                plgpu.Barrier(num_arrivals=self.wgs, num_barriers=self.stages),
            ],
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(*args)

    def body(self, *refs: Any) -> None:
        """What every warpgroup of every block of threads runs."""
        names = [field.name for field in dataclasses.fields(Refs)]
        r = Refs(**dict(zip(names, refs, strict=True)))
        index = lax.axis_index("unit")
        pl.when(index < self.units)(partial(self.work, r, index))

        @pl.when((index >= self.units) & (lax.axis_index("wg") == 0))
        def _() -> None:
            row = index - self.units
            there = r.out.at[self.decode - self.copied + row]
            there[...] = load(r.decoded, (row,), row_layout(self.heads, self.width))

    def work(self, r: Refs, index: jax.Array) -> None:
        """Attention of 64 tokens."""
        wg, unit = lax.axis_index("wg"), self.unit(r, index)

        @pl.when(wg == self.wgs)
        def _() -> None:
            if self.wgs == 2:
                plgpu.set_max_registers(40, action="decrease")
            self.produce(r, unit)

        @pl.when(wg < self.wgs)
        def _() -> None:
            if self.wgs == 2:
                plgpu.set_max_registers(232, action="increase")
            head = lax.min(unit.pair * self.wgs + wg, jnp.int32(self.group - 1))
            head = unit.kv_head * self.group + head
            pl.when(unit.end > unit.begin)(partial(self.attend, r, unit, wg, head))

            @pl.when(unit.end <= unit.begin)
            def _() -> None:
                zeros = jnp.zeros((ROWS, self.width), self.dtype)
                self.store(r, unit, wg, head, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    def unit(self, r: Refs, index: jax.Array) -> Unit:
        """The last tokens come first: they see the most, and short work fills the end."""
        pair, index = lax.rem(index, jnp.int32(self.pairs)), index // self.pairs
        kv_head, index = lax.rem(index, jnp.int32(self.kv_heads)), index // self.kv_heads
        tile = self.tiles - 1 - index
        first, last = r.ends[0, tile], r.ends[1, tile]
        begin = self.span.first(first)
        return Unit(
            token=self.decode + tile * ROWS, row=self.decode + tile * ROWS // self.block,
            kv_head=kv_head, pair=pair, first=first, last=last, begin=begin,
            end=jnp.where(last < 0, begin, last // self.span.tile + 1),
        )  # fmt: skip

    def produce(self, r: Refs, u: Unit) -> None:
        """Gather the pages of each tile into the ring."""
        size, each = min(self.page, self.span.tile), max(1, self.page // self.span.tile)

        def load(pool: Any, ring: Any, full: Any, ids: list[Any], offset: Any, slot: Any) -> None:
            for j, page in enumerate(ids):
                there = pool.at[page, u.kv_head, pl.ds(offset, size)]
                plgpu.copy_gmem_to_smem(there, ring.at[slot, pl.ds(j * size, size)], full.at[slot])

        def step(t: jax.Array, carry: jax.Array) -> jax.Array:
            n = t - u.begin
            slot = lax.rem(n, jnp.int32(self.stages))
            places = self.span.pages(t, self.page, self.span.lowest(u.first), u.last)
            ids = [r.tables[u.row, place] for place in places]
            offset = lax.rem(t, jnp.int32(each)) * size if each > 1 else 0
            used = n >= self.stages
            pl.when(used)(lambda: plgpu.barrier_wait(r.free_k.at[slot]))
            load(r.keys, r.ks, r.full_k, ids, offset, slot)
            pl.when(used)(lambda: plgpu.barrier_wait(r.free_v.at[slot]))
            load(r.values, r.vs, r.full_v, ids, offset, slot)
            return carry

        def drain(n: jax.Array, carry: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(self.stages))

            @pl.when(n >= self.stages)
            def _() -> None:
                plgpu.barrier_wait(r.free_k.at[slot])
                plgpu.barrier_wait(r.free_v.at[slot])

            return carry

        lax.fori_loop(u.begin, u.end, step, jnp.int32(0))
        count = lax.max(u.end - u.begin, jnp.int32(0))
        lax.fori_loop(count, count + self.stages, drain, jnp.int32(0))

    def attend(self, r: Refs, u: Unit, wg: jax.Array, head: jax.Array) -> None:
        """64 tokens of one query head over all tiles that they see."""
        tile, window = self.span.tile, self.span.window
        plgpu.copy_gmem_to_smem(r.q.at[pl.ds(u.token, ROWS), head], r.qs.at[wg], r.full_q.at[wg])
        plgpu.barrier_wait(r.full_q.at[wg])
        carry = self.first_tile(r, u, wg)
        # Tiles that all tokens see whole need no mask: those up to the first token, and within
        # the window of the last.
        free_from, free_to = u.begin, lax.max((u.first + 1) // tile, u.begin + 1)
        step = partial(self.step, r, u, wg)
        start = u.begin + 1
        if window is not None:
            free_from = lax.clamp(start, (u.first + ROWS - window + tile - 1) // tile, u.end)
            free_to = lax.max(free_to, free_from)
            carry = lax.fori_loop(start, free_from, partial(step, True), carry)
            start = free_from
        free_to = lax.min(free_to, u.end)
        carry = lax.fori_loop(start, free_to, partial(step, False), carry)
        _, total, p, acc = lax.fori_loop(free_to, u.end, partial(step, True), carry)
        slot = lax.rem(u.end - 1 - u.begin, jnp.int32(self.stages))
        plgpu.barrier_wait(r.full_v.at[slot])
        acc = multiply_add(acc, p, r.vs.at[slot], self.interpret)
        plgpu.barrier_arrive(r.free_v.at[slot])
        acc = acc / lax.broadcast_in_dim(jnp.maximum(total, 1e-30), acc.shape, [0])
        self.store(r, u, wg, head, acc.astype(self.dtype))

    def first_tile(self, r: Refs, u: Unit, wg: jax.Array) -> Carry:
        """The first tile: no other's weights wait to be multiplied."""
        rows = plgpu.Layout.WGMMA.reduce(1)
        zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows)
        lowest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), rows)
        acc = jnp.zeros((ROWS, self.width), jnp.float32)
        acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA)
        plgpu.barrier_wait(r.full_k.at[0])
        s = multiply((ROWS, self.span.tile), r.qs.at[wg], r.ks.at[0].transpose((1, 0)))
        plgpu.barrier_arrive(r.free_k.at[0])
        peak, total, p, _ = self.weigh(s, u, u.begin, lowest, zeros, masked=True)
        return peak, total, p, acc

    def step(
        self, r: Refs, u: Unit, wg: jax.Array, masked: bool, t: jax.Array, carry: Carry
    ) -> Carry:
        """Scores of tile t, beside them the product of the tile before with V."""
        peak, total, p, acc = carry
        stages = jnp.int32(self.stages)
        slot, before = lax.rem(t - u.begin, stages), lax.rem(t - u.begin - 1, stages)
        shape, kt = (ROWS, self.span.tile), r.ks.at[slot].transpose((1, 0))
        plgpu.barrier_wait(r.full_k.at[slot])
        plgpu.barrier_wait(r.full_v.at[before])
        if self.interpret:
            s = multiply(shape, r.qs.at[wg], kt)
            plgpu.barrier_arrive(r.free_k.at[slot])
            acc = multiply_add(acc, p, r.vs.at[before], True)
            plgpu.barrier_arrive(r.free_v.at[before])
            peak, total, p, fade = self.weigh(s, u, t, peak, total, masked=masked)
            return peak, total, p, acc * lax.broadcast_in_dim(fade, acc.shape, [0])

        def overlap(s: Any, out: Any) -> Carry:
            out[...] = acc
            # V first: wgmma wants its register operands ready before a batch begins.
            plgpu.wgmma(out, p, r.vs.at[before])
            plgpu.wgmma(s, r.qs.at[wg], kt)
            scores, done = s[...], out[...]
            plgpu.barrier_arrive(r.free_k.at[slot])
            plgpu.barrier_arrive(r.free_v.at[before])
            following = self.weigh(scores, u, t, peak, total, masked=masked)
            return *following[:3], done * lax.broadcast_in_dim(following[3], done.shape, [0])

        out = ACC((ROWS, self.width), jnp.float32)
        return pl.run_scoped(overlap, ACC(shape, jnp.float32), out)

    def weigh(
        self,
        s: jax.Array,
        u: Unit,
        t: jax.Array,
        peak: jax.Array,
        total: jax.Array,
        *,
        masked: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The new peak and sum, the weights of a tile, and how much older ones fade."""
        s, factor = capped(s, self.scale, self.softcap)
        if masked:
            layout = plgpu.Layout.WGMMA
            key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout) + t * self.span.tile
            at = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=layout) + u.first
            # Padding sees what the last token sees: K beyond may be NaN.
            s = jnp.where(self.span.seen(key, at) & (key <= u.last), s, -jnp.inf)
        before, peak = peak, jnp.maximum(peak, s.max(axis=1) * factor)
        fade = jnp.exp2(before - peak)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(peak, s.shape, [0]))
        return peak, total * fade + p.sum(axis=1), p.astype(self.dtype), fade

    def store(self, r: Refs, u: Unit, wg: jax.Array, head: jax.Array, out: jax.Array) -> None:
        """Through the shared memory that held q."""
        r.qs[wg] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.qs.at[wg], r.out.at[pl.ds(u.token, ROWS), head])
        plgpu.wait_smem_to_gmem(0)
