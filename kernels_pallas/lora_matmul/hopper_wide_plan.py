"""Which block of threads does what in the Hopper kernel for many rows: units of the shrink, tiles of y."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.lora_matmul.hopper_shrink import cdiv
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, MOST_SLICES, WGS, Tuning
from kernels_pallas.lora_matmul.types import PAGE

SLICES_THERE, U_THERE = pl.ds(0, 8), pl.ds(8, 8)
"""Counters in Refs.sync."""


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
    units: Any
    sums: Any
    totals: Any
    sync: Any
    y: Any
    u: Any
    p: Any
    xs: Any
    ws: Any
    sa: Any
    ys: Any
    full: Any
    full_shrink: Any
    full_expand: Any
    empty: Any
    sliced: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How the shrink is cut and dealt: the same in all blocks."""

    units: jax.Array
    """Groups of pages of row blocks."""
    slices: jax.Array
    """Parts of K, each a unit of work; 1: u needs no sum."""
    steps: jax.Array
    """K steps of a unit."""
    spread: jax.Array
    """Blocks that units are dealt to."""
    sums: jax.Array
    """Sums of slices, each of a page's u for 64 rows and one part."""
    sum_stride: jax.Array
    """Warpgroups that sums are dealt to."""
    writers: jax.Array
    """Warpgroups that tell that slices (or u itself) are there."""
    summers: jax.Array
    """Warpgroups that sum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of y."""

    there: jax.Array
    """A worker without any has one that takes no steps."""
    m: jax.Array
    """Row block."""
    c: jax.Array
    """Column tile."""
    s: jax.Array
    """Part of K."""
    chunks: jax.Array
    """Expand steps that its row block has, over all parts of K."""
    expands: jax.Array
    """Expand steps that it takes: in a cluster as many as its neighbour."""
    alone: jax.Array
    """K steps of a block's first tile before its units of the shrink, or its sums."""
    early: jax.Array
    """K steps before whoever loads waits for u."""
    before: jax.Array
    """K steps before the expand steps."""
    after: jax.Array
    """K steps after them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Static facts of one launch, and the work of each worker: a block of threads, or a cluster."""

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
    def row_blocks(self) -> int:
        return self.rows // BM

    @property
    def columns(self) -> int:
        return sum(self.part_sizes) // self.t.bn

    @property
    def workers(self) -> int:
        return self.sms // self.t.cluster

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return self.workers * self.t.cluster

    @property
    def steps(self) -> int:
        """K steps of one tile."""
        return self.width // BK // self.t.split

    @property
    def tiles(self) -> int:
        """Of all workers: a cluster's tiles lie one above the other."""
        return self.columns * self.t.split * self.row_blocks // self.t.cluster

    @property
    def depth(self) -> int:
        """Most rank pages' worth of u that a row has."""
        return -(-self.pages // CHUNK) * CHUNK

    @property
    def group(self) -> int:
        """Pages that share a read of x."""
        return self.t.group(self.parts)

    @property
    def a_rows(self) -> int:
        """Rows of A in one step of a unit."""
        return self.group * self.parts * PAGE

    @property
    def out_dtype(self) -> Any:
        return self.dtype if self.t.split == 1 else jnp.dtype(jnp.float32)

    @property
    def registers(self) -> tuple[int, ...]:
        """Of the warpgroups that multiply, load and (if there is one) sum: they share 64 K of them, and
        four start with 128 each, which is not enough for 64 x 256 accumulators."""
        return (240, 24) if self.t.bn > 128 else (184, 40, 96)

    @property
    def summing(self) -> int:
        """Warpgroups of a block that sum: one of its own, or those that multiply. These have no room for
        a unit's accumulators beside a tile's, and make units first, and sums beside the first tile."""
        return WGS if len(self.registers) == 2 else 1

    # The shrink: units and sums are dealt from the last block on, which has the fewest tiles.

    @property
    def light(self) -> int:
        """Blocks with a tile less than others."""
        return -self.tiles % self.workers * self.t.cluster

    def work(self, totals: Any) -> Work:
        """How the shrink is cut and dealt, from how many units and pages there are."""
        units, pages = totals[0], totals[1]
        # Blocks with fewer tiles do it all if they are through before others' first tiles need u.
        few = self._slices(units, self.light)
        by_few = (units <= self.light) & (self.width // BK // few <= int(0.6 * self.steps))
        slices = jnp.where(by_few, few, self._slices(units, self.blocks))
        spread = jnp.where(by_few, jnp.int32(max(self.light, 1)), self.blocks)
        sums = jnp.where(slices > 1, pages * (WGS * self.parts), 0)
        # Sums stop a tile where they have no warpgroup of their own.
        sum_spread = jnp.int32(self.blocks) if self.summing == 1 else spread
        return Work(
            units=units, slices=slices, steps=self.width // BK // slices, spread=spread,
            sums=sums, sum_stride=sum_spread * self.summing,
            writers=lax.min(units * slices, spread) * self.summing,
            summers=lax.min(sums, sum_spread * self.summing),
        )  # fmt: skip

    def _slices(self, units: jax.Array, blocks: int) -> jax.Array:
        """Parts of K, such that none of so many blocks has two units; 1 if there are more units."""
        steps, slices, more = self.width // BK, jnp.int32(1), 2
        while more <= MOST_SLICES and steps % more == 0 and steps // more >= 4:
            slices = jnp.where(units * more <= blocks, jnp.int32(more), slices)
            more *= 2
        return slices

    def rank(self) -> jax.Array:
        """This block of threads, counted from the last."""
        last = jnp.int32(self.workers - 1) - lax.axis_index("worker")
        if self.t.cluster == 1:
            return last
        return last * self.t.cluster + lax.axis_index("pair")

    def units_of_worker(self, work: Work) -> jax.Array:
        """Blocks of a cluster take equally many; one of them may have none left for the last."""
        first = (self.workers - 1 - lax.axis_index("worker")) * self.t.cluster
        count = (work.units * work.slices - first + work.spread - 1) // work.spread
        return jnp.where(first < work.spread, lax.max(count, 0), 0)

    def has_unit(self, work: Work, i: jax.Array | int) -> jax.Array:
        number = self.rank() + i * work.spread
        return (number < work.units * work.slices) & (self.rank() < work.spread)

    def unit(self, r: Refs, work: Work, i: jax.Array | int) -> tuple[jax.Array, ...]:
        """Its number among all slices, row block, group of pages, part of K."""
        number = self.rank() + i * work.spread
        number = lax.min(number, lax.max(work.units * work.slices, jnp.int32(1)) - 1)
        index = number // work.slices
        return number, r.units[0, index], r.units[1, index], number - index * work.slices

    @property
    def readers(self) -> int:
        """Warpgroups that load u."""
        return min(self.tiles, self.workers) * self.t.cluster

    # Tiles of y.

    def tiles_of_worker(self) -> jax.Array:
        return (self.tiles - lax.axis_index("worker") + self.workers - 1) // self.workers

    def tile(self, counts: Any, i: jax.Array) -> Tile:
        """Row blocks go in groups whose x stays in L2 while the columns pass by."""
        t, number = self.t, jnp.int32
        index = lax.axis_index("worker") + i * self.workers
        there = index < self.tiles
        index = lax.min(index, number(self.tiles - 1))
        stacks = self.row_blocks // t.cluster
        each = t.span * self.columns * t.split
        group = index // each
        height = lax.min(number(t.span), stacks - group * t.span)
        index = index - group * each
        s = index // (height * self.columns)
        index = index - s * height * self.columns
        c = index // height
        stack = group * t.span + index - c * height
        chunks = [cdiv(counts[stack * t.cluster + j], CHUNK) for j in range(t.cluster)]
        own, most = chunks[0], chunks[0]
        m = stack
        if t.cluster > 1:
            m = stack * t.cluster + lax.axis_index("pair")
            own, most = cdiv(counts[m], CHUNK), lax.max(*chunks)
        expands = lax.max(cdiv(most - s, t.split), 0)
        before = max(self.steps - t.tail, 0)
        early = max(before - t.early, 0)

        def if_there(steps: Any) -> jax.Array:
            return jnp.where(there, steps, 0)

        return Tile(
            there=there, m=m, c=c, s=s, chunks=own, expands=if_there(expands),
            alone=if_there(min(t.alone, early)), early=if_there(early), before=if_there(before),
            after=if_there(self.steps - before),
        )  # fmt: skip
