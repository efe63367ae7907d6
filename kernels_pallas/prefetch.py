"""What a small launch asks the L2 cache to load while it runs: what the next matmul reads first.

In a decode step the matmuls wait for memory, and between two of them memory waits: a launch that adds,
normalises or attends takes microseconds in which nearly nothing is read. `Prefetch` names what those
microseconds are for. It is a hint: no result depends on it, and on anything but a Hopper it is ignored.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

HELPERS = 96
"""Blocks of threads that a launch has for this beside its own: with 32 rows' about one for each SM."""

ROWS, COLUMNS = 64, 256
"""Rows and columns of w that one request of the copy engine takes: 32 KiB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefetch:
    """The beginning of each part of w's rows that the matmul reads side by side, and all of A of the
    active rank pages. `lora_matmul.first_reads` makes one."""

    w: Float[Array, "K N"]
    a: Float[Array, "P R K"] | None = None
    pages: Int[Array, " Pa"] | None = None
    """Active pages of `a`, the first `count` of them."""
    count: Int[Array, " 1"] | None = None
    splits: int = dataclasses.field(default=1, metadata={"static": True})
    """Parts of K."""
    depth: int = dataclasses.field(default=ROWS, metadata={"static": True})
    """Rows of each part: a multiple of ROWS."""

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What a launch takes beside its own arguments."""
        pages = (self.a, self.pages, self.count)
        return (self.w, *(array for array in pages if array is not None))

    @property
    def facts(self) -> "Fetch":
        """What its kernel is compiled for."""
        columns = next(n for n in (COLUMNS, 128, 64) if self.w.shape[1] % n == 0)
        return Fetch(
            width=self.w.shape[0], total=self.w.shape[1], columns=columns, splits=self.splits,
            depth=self.depth, a_rows=0 if self.a is None else self.a.shape[1],
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Static facts of a Prefetch, and the requests themselves."""

    width: int
    total: int
    columns: int
    splits: int
    depth: int
    a_rows: int

    @property
    def count(self) -> int:
        """Arrays that a launch takes for it."""
        return 4 if self.a_rows else 1

    def issue(self, refs: Any, who: jax.Array, of: int) -> None:
        """The share of helper `who` of `of`. A comes first: a whole matmul waits for its shrink."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        w, *lora = refs

        def each(total: Any, ask: Any) -> None:
            def turn(i: jax.Array, carry: None) -> None:
                ask(who + i * of)

            lax.fori_loop(0, lax.max((total - who + of - 1) // of, jnp.int32(0)), turn, None)

        if lora:
            a, pages, count = lora
            across = self.width // 128

            def ask_a(i: jax.Array) -> None:
                depth = pl.ds(lax.rem(i, jnp.int32(across)) * 128, 128)
                plgpu.async_prefetch(a.at[pages[i // across], :, depth])

            each(count[0] * across, ask_a)
        across, down = self.total // self.columns, self.depth // ROWS

        def ask_w(i: jax.Array) -> None:
            c, rest = lax.rem(i, jnp.int32(across)), i // across
            s, r = lax.rem(rest, jnp.int32(self.splits)), rest // self.splits
            rows = pl.ds(s * (self.width // self.splits) + r * ROWS, ROWS)
            plgpu.async_prefetch(w.at[rows, pl.ds(c * self.columns, self.columns)])

        each(jnp.int32(across * self.splits * down), ask_w)
