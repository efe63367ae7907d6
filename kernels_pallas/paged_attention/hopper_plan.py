"""How a step's decode rows are dealt to the workers of the Hopper decode kernel.

All tiles of all rows and kv heads lie in one line, rows one after another, within a row the kv
heads, within a kv head its tiles of 64 positions. Each worker takes an equally long stretch of the
line, give or take the few tiles that would make a piece too small of a row's kv head, so work is
balanced by true lengths and at most two of a worker's rows are shared with others.
The plan depends on positions only: layers share it, XLA computes it once a step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

TILE = 64
"""K/V positions of a tile."""

LEAST = 3
"""Tiles of a piece of a row's kv head at least: summing pieces costs about as much."""


def quotient(x: jax.Array, by: int) -> jax.Array:
    """x // by, as a shift where that does: kernels have no time for divisions."""
    return x >> (by.bit_length() - 1) if by.bit_count() == 1 else x // by


@dataclasses.dataclass(frozen=True)
class Span:
    """Which K/V positions a query sees. Works on scalars in the kernel and on arrays outside."""

    window: int | None
    tile: int = TILE

    def lowest(self, at: jax.Array) -> jax.Array:
        """The first position seen from `at`."""
        if self.window is None:
            return jnp.zeros_like(at)
        return jnp.maximum(at - (self.window - 1), 0)

    def first(self, at: jax.Array) -> jax.Array:
        """The first tile seen."""
        return quotient(self.lowest(at), self.tile)

    def tiles(self, at: jax.Array) -> jax.Array:
        """How many tiles are seen; none from padding (-1)."""
        return jnp.where(at < 0, 0, self.after(at))

    def after(self, at: jax.Array) -> jax.Array:
        """How many tiles are seen from a position that is no padding."""
        return quotient(at, self.tile) - self.first(at) + 1

    def seen(self, key: jax.Array, at: jax.Array) -> jax.Array:
        """Whether position `key` of a tile that is seen in part is seen itself."""
        seen = key <= at
        return seen if self.window is None else seen & (key > at - self.window)

    def loads(self, page: int) -> int:
        """Pages of a tile."""
        return max(1, self.tile // page)

    def pages(self, number: jax.Array, page: int, least: jax.Array, most: jax.Array) -> list[Any]:
        """Entries of a page table that hold tile `number` (counted from position 0), where
        positions `least` to `most` are seen. A page that is not seen may be anybody's, so its
        nearest one that is comes again, from L2."""
        if page >= self.tile:
            return [quotient(number, page // self.tile)]
        loads = self.loads(page)
        places = [jnp.minimum(number * loads + j, quotient(most, page)) for j in range(loads)]
        if self.window is None:
            return places
        return [jnp.maximum(place, quotient(least, page)) for place in places]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Static facts of a plan."""

    span: Span
    kv_heads: int
    page: int
    workers: int
    stages: int

    @property
    def entry(self) -> int:
        """Numbers that say where a tile is: row, kv head, tile, the query's position, page ids."""
        return 4 + self.span.loads(self.page)

    def per(self, n: jax.Array) -> jax.Array:
        """Tiles of an even stretch, when rows have n tiles of a kv head: no fewer than a piece, nor
        than the longest row has if that is too short for two pieces and so one worker's."""
        longest = n.max()
        least = jnp.where(longest < 2 * LEAST, longest, LEAST)
        return jnp.maximum(-(-self.kv_heads * n.sum() // self.workers), jnp.maximum(least, 1))

    def begin(self, offset: jax.Array, n: jax.Array) -> jax.Array:
        """Where the stretch begins that evenly would begin with tile `offset` of a kv head's n:
        there, or, if that left less than a piece on a side, with its first tile or the next one's."""
        late = jnp.where(n - offset < LEAST, n, offset)
        return jnp.where(offset < LEAST, 0, late)

    def sharers(
        self, start: jax.Array, n: jax.Array, per: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The first and the last worker that has some of the n tiles from tile `start` of the line
        on, a row's of one kv head: see `begin`."""
        first = (start + jnp.minimum(n, LEAST) - 1) // per
        return first, jnp.maximum(first, (start + n - LEAST) // per)

    def pages(self, tile: jax.Array, at: jax.Array) -> list[jax.Array]:
        """Entries of a row's page table that hold tile number `tile` of those that `at` sees."""
        number = self.span.first(at) + tile
        return self.span.pages(number, self.page, self.span.lowest(at), at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel reads of it."""

    work: Int[Array, "workers entries"]
    """How many tiles each worker takes, how many an even stretch has, and an entry (see
    `Layout.entry`) for each of its first tiles, so that loads can start without looking further."""
    rows: Int[Array, "2 B"]
    """Tiles (of one kv head) of all rows before, and the next row that is no padding."""
    tickets: Int[Array, "B K"]
    """Zeros before and after: how many pieces of a split row are done."""


def plan(positions: Int[Array, "B"], tables: Int[Array, "B W"], layout: Layout) -> Plan:
    """The plan of rows whose queries are at `positions` (-1: padding)."""
    kv_heads, workers = layout.kv_heads, layout.workers
    n = layout.span.tiles(positions)
    index = jnp.arange(positions.shape[0])
    before = jnp.where(index[:, None] > index, n, 0).sum(1)
    follows = (index[:, None] < index) & (n > 0)
    following = jnp.where(follows, index, positions.shape[0] - 1).min(1)
    per = layout.per(n)
    last, total = positions.shape[0] - 1, kv_heads * n.sum()

    def place(tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, kv head and tile of a tile of the line."""
        # Rows that end before a tile come before the tile's row.
        row = (kv_heads * (before + n) <= tile[..., None]).sum(-1)
        row = jnp.minimum(row, last)
        offset, length = tile - kv_heads * before[row], jnp.maximum(n, 1)[row]
        return row, jnp.minimum(offset // length, kv_heads - 1), offset % length

    even = jnp.arange(workers + 1) * per
    row, _, offset = place(even)
    start = jnp.minimum(even - offset + layout.begin(offset, jnp.maximum(n, 1)[row]), total)
    count = start[1:] - start[:-1]
    line = start[:-1, None] + jnp.arange(layout.stages + 1)
    row, head, tile = place(line)
    at = positions[row]
    pages = [tables[row, jnp.maximum(i, 0)] for i in layout.pages(tile, at)]
    entries = jnp.stack([row, head, tile, at, *pages], 2).reshape(workers, -1)
    work = jnp.concatenate([count[:, None], jnp.full((workers, 1), per), entries], 1)
    # Zeros that XLA cannot fold into a constant: the kernel writes them (and puts them back).
    tickets = jnp.broadcast_to(jnp.minimum(n, 0)[:, None], (positions.shape[0], kv_heads))
    return Plan(
        work=work.astype(jnp.int32),
        rows=jnp.stack([before, following]).astype(jnp.int32),
        tickets=tickets.astype(jnp.int32),
    )
