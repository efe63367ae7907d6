"""Which block of threads does what in the Hopper kernel for many rows: tiles of y, and the shrink."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.lora_matmul.hopper_wide_tuning import BK, BM, CHUNK, WGS, Tuning
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
class Plan:
    """Static facts of one launch, and the tiles of each worker: a block of threads, or a cluster."""

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

    def tiles_of_worker(self) -> jax.Array:
        total = self.columns * self.t.split * self.row_blocks
        return (total - lax.axis_index("worker") + self.workers - 1) // self.workers

    def tile(self, counts: Any, i: jax.Array) -> Tile:
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
        count = counts[m]
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

    def page(self, k: Tile, p: Any, g: int) -> jax.Array:
        """The place in its row block's list of page g of the tile's pass p."""
        return k.first + (p * self.t.group + g) * k.stride
