"""Which block of threads does what in the Hopper kernel for many rows: units of the shrink, tiles of y."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.lora_matmul.hopper_shrink import cdiv
from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, MOST_SLICES, WGS, Tuning
from kernels_pallas.lora_matmul.types import PAGE


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
    total: Any
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Some pages of one row block, and a part of K."""

    there: jax.Array
    """Blocks of a cluster take equally many; one of them may have none left."""
    number: jax.Array
    """Its place among all slices."""
    m: jax.Array
    """Row block."""
    g: jax.Array
    """Group of pages."""
    q: jax.Array
    """Part of K."""
    slices: jax.Array
    """Parts of K."""
    steps: jax.Array
    """K steps."""


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

    # The shrink: units are dealt from the last block on, which has the fewest tiles.

    def slices(self, total: jax.Array) -> jax.Array:
        """Parts of K, such that all blocks have work and none has two units; 1: u needs no sum."""
        steps, slices, more = self.width // BK, jnp.int32(1), 2
        while more <= MOST_SLICES and steps % more == 0:
            slices = jnp.where(total * more <= self.blocks, jnp.int32(more), slices)
            more *= 2
        return slices

    def rank(self) -> jax.Array:
        """This block of threads, counted from the last."""
        last = jnp.int32(self.workers - 1) - lax.axis_index("worker")
        if self.t.cluster == 1:
            return last
        return last * self.t.cluster + lax.axis_index("pair")

    def units_of_worker(self, total: jax.Array) -> jax.Array:
        first = (self.workers - 1 - lax.axis_index("worker")) * self.t.cluster
        return lax.max((total * self.slices(total) - first + self.blocks - 1) // self.blocks, 0)

    def unit(self, units: Any, total: jax.Array, i: jax.Array) -> Unit:
        slices = self.slices(total)
        number = self.rank() + i * self.blocks
        index = lax.min(number, total * slices - 1)
        unit = index // slices
        return Unit(
            there=number < total * slices, number=index, m=units[0, unit], g=units[1, unit],
            q=index - unit * slices, slices=slices, steps=self.width // BK // slices,
        )  # fmt: skip

    def writers(self, total: jax.Array) -> jax.Array:
        """Warpgroups that make slices."""
        return lax.min(total * self.slices(total), jnp.int32(self.blocks)) * WGS

    def pieces(self, total: jax.Array) -> jax.Array:
        """Sums of slices, each a page's rows of one warpgroup for one part."""
        pieces = total * (WGS * self.group * self.parts)
        return jnp.where(self.slices(total) > 1, pieces, 0)

    def summers(self, total: jax.Array) -> jax.Array:
        """Warpgroups that sum."""
        return lax.min(self.pieces(total), jnp.int32(self.blocks * WGS))

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
        return Tile(
            there=there, m=m, c=c, s=s, chunks=own, expands=jnp.where(there, expands, 0),
            before=jnp.where(there, self.steps - t.tail, 0), after=jnp.where(there, t.tail, 0),
        )  # fmt: skip
