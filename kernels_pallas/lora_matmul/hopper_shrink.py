"""The shrink of a fused launch: u = x A^T of the active rank pages, in two passes over the grid.

A warpgroup of every block that is left over takes units of work, dealt from the last block on. First
slices of K (`slice`); when all are there, their sums (`sum`). The slices of a single page are not
summed: they are ranks of their own, [u0 | u1 ..] @ [B ; B ..], and nobody waits a second time.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.hopper_sync import load
from kernels_pallas.lora_matmul.types import PAGE

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
    """Static facts of a shrink. Letters: q slice of K, g group of pages."""

    rows: int
    """Of x: a multiple of 8, up to 64."""
    width: int
    parts: int
    """Projections that share x."""
    pages: int
    """Most active rank pages."""
    slices: int
    """Parts of K."""
    group: int
    """Rank pages that share a read of x."""
    stages: int
    """64-column steps in flight."""
    chunk: int
    """Rank pages of one expand step: u is zero up to a whole chunk."""
    sms: int
    dtype: Any
    single: bool
    """At most one page is active, whatever room `pages` has."""

    def __post_init__(self) -> None:
        if self.single and (self.group > 1 or self.slices % self.chunk):
            raise ValueError(
                f"{self.slices} slices, groups of {self.group}: a single page has groups of 1 and "
                f"slices that fill expand steps of {self.chunk}"
            )

    def out_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """u = x A^T, masked; and its slices, if they are summed."""
        width = (self.slices if self.single else self.pages) * PAGE
        u = jax.ShapeDtypeStruct((self.parts, self.rows, width), self.dtype)
        if self.single:
            return (u,)
        slices = (self.slices, self.pages * self.parts, 64, PAGE)
        return u, jax.ShapeDtypeStruct(slices, jnp.float32)

    def staging(self) -> tuple[int, ...]:
        """Shape of the shared memory that u goes through: all parts as wgmma gives them, or a sum."""
        return (self.parts, 64, PAGE) if self.single else (self.rows, PAGE)

    def expands(self, active: jax.Array) -> jax.Array:
        """Expand steps of a product."""
        return cdiv(active * self.slices if self.single else active, self.chunk)

    def page_ids(self, pages: Any, step: jax.Array | int) -> list[jax.Array]:
        """Pages of an expand step, or of the last one there could be."""
        if self.single:
            return [pages[0]] * self.chunk
        first = lax.min(step * self.chunk, jnp.int32(self.pages - self.chunk))
        return [pages[first + j] for j in range(self.chunk)]

    def slice(
        self, x: Any, a: Any, p: Any, u: Any, pages: Any, mask: Any, active: jax.Array, sx: Any,
        sa: Any, us: Any, full: Any,
    ) -> None:  # fmt: skip
        """p[q, page and part, row] = x[row, slice q] A[page, part, slice q]^T, masked; of a single
        page u[part, row, q and rank]."""
        rows, parts = self.rows, self.parts
        steps = self.width // 64 // self.slices

        def place(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
            """Group of pages and slice of K."""
            index = self._last_first() + i * self.sms
            return index // self.slices, lax.rem(index, jnp.int32(self.slices))

        def page_ids(i: jax.Array | int) -> list[jax.Array]:
            """Asked for before it is known whether there is such a unit: nothing waits for both."""
            first = lax.min(place(i)[0] * self.group, jnp.int32(self.pages - self.group))
            return [pages[first + j] for j in range(self.group)]

        def unit(i: jax.Array, carry: Any) -> Any:
            n, *ids = carry
            g, q = place(i)

            def issue(k: jax.Array | int) -> None:
                slot = lax.rem(n + k, jnp.int32(self.stages))
                depth = pl.ds((q * steps + k) * 64, 64)
                for j, page in enumerate(ids):
                    a_rows = sa.at[slot, pl.ds(j * parts * PAGE, parts * PAGE)]
                    plgpu.copy_gmem_to_smem(a.at[page, :, depth], a_rows, full.at[slot])
                x_tile = sx.at[pl.ds(slot * rows, rows)]
                plgpu.copy_gmem_to_smem(x.at[:, depth], x_tile, full.at[slot])

            for k in range(min(self.stages, steps)):
                issue(k)

            columns = self.group * parts

            def accumulate(acc: Any) -> jax.Array:
                def step(k: jax.Array, carry: jax.Array) -> jax.Array:
                    slot = lax.rem(n + k, jnp.int32(self.stages))
                    plgpu.barrier_wait(full.at[slot])
                    x_tile = sx.at[pl.ds(slot * rows, 64)]
                    a_tile = sa.at[slot, pl.ds(0, columns * PAGE)]
                    plgpu.wgmma(acc, x_tile, a_tile.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # all four warps are through with the slot
                    if steps > self.stages:
                        following = k + self.stages
                        pl.when(following < steps)(partial(issue, following))
                    return carry

                lax.fori_loop(0, steps, step, jnp.int32(0))
                return acc[...]

            layout = plgpu.Layout.WGMMA.reduce(1)
            owns = [load(mask, (g * self.group + j,), layout) for j in range(self.group)]
            acc = pl.run_scoped(accumulate, ACC((64, columns * PAGE), jnp.float32))
            if self.single:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for column in range(columns):
                values = acc[:, column * PAGE : (column + 1) * PAGE]
                own = lax.broadcast_in_dim(owns[column // parts], values.shape, [0])
                if self.single:
                    us[column] = (values * own).astype(self.dtype)
                else:
                    p.at[q, g * columns + column][...] = values * own
            if self.single:
                plgpu.commit_smem()
                for part in range(parts):
                    there = u.at[part, :, pl.ds(q * PAGE, PAGE)]
                    plgpu.copy_smem_to_gmem(us.at[part, pl.ds(0, rows)], there)
            return n + steps, *page_ids(i + 1)

        first = page_ids(0)
        total = cdiv(active, self.group) * self.slices
        lax.fori_loop(0, self._units_of_block(total), unit, (jnp.int32(0), *first))
        if self.single:
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def sum(self, p: Any, u: Any, us: Any, active: jax.Array) -> None:
        """u[part, row, rank] = the sum of p over slices; zeros up to a whole chunk of pages."""
        rows = self.rows
        layout = plgpu.Layout.WG_STRIDED((rows, PAGE), vec_size=rows * PAGE // 128)

        def unit(i: jax.Array, carry: jax.Array) -> jax.Array:
            column = self._last_first() + i * self.sms
            page, part = column // self.parts, lax.rem(column, jnp.int32(self.parts))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(page < active)
            def _() -> None:
                total = None
                for q in range(self.slices):  # unrolled: all loads in flight at once
                    part_sum = load(p, (q, column, pl.ds(0, rows)), layout)
                    total = part_sum if total is None else total + part_sum
                assert total is not None
                us[...] = total.astype(self.dtype)

            @pl.when(page >= active)
            def _() -> None:
                us[...] = plgpu.layout_cast(jnp.zeros((rows, PAGE), self.dtype), layout)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(us, u.at[part, :, pl.ds(page * PAGE, PAGE)])
            return carry

        total = cdiv(active, self.chunk) * self.chunk * self.parts
        lax.fori_loop(0, self._units_of_block(total), unit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def _units_of_block(self, total: jax.Array) -> jax.Array:
        """Dealt from the last block on."""
        return lax.max((total - self._last_first() + self.sms - 1) // self.sms, 0)

    def _last_first(self) -> jax.Array:
        return self.sms - 1 - lax.axis_index("sm")


def cdiv(a: jax.Array | int, b: int) -> jax.Array:
    """a / b, rounded up."""
    return (jnp.asarray(a, jnp.int32) + b - 1) // b
