"""The shrink of a fused launch: u = x A^T of the active rank pages, in two passes over the grid.

A warpgroup of every block that is left over takes units of work, dealt from the last block on. First
slices of K (`slice`); when all are there, their sums (`sum`).
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
class RowBlocks:
    """How rows of x are cut."""

    rows: int

    @property
    def block(self) -> int:
        """Rows of x in one tile."""
        return min(self.rows, 128)

    @property
    def row_blocks(self) -> int:
        return self.rows // self.block

    @property
    def wgs(self) -> int:
        """Multiplying warpgroups: 64 rows each."""
        return -(-self.block // 64)

    @property
    def store_rows(self) -> int:
        return min(self.block, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(RowBlocks):
    """Static facts of a shrink. Letters: q slice of K, g group of pages, m row block."""

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

    def out_types(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """u = x A^T, masked; and its slices."""
        padded = self.row_blocks * self.wgs * 64
        slices = (self.slices, self.pages * self.parts, padded, PAGE)
        return (
            jax.ShapeDtypeStruct((self.parts, self.rows, self.pages * PAGE), self.dtype),
            jax.ShapeDtypeStruct(slices, jnp.float32),
        )

    def slice(
        self, x: Any, a: Any, p: Any, pages: Any, mask: Any, active: jax.Array, sx: Any, sa: Any,
        full: Any,
    ) -> None:  # fmt: skip
        """p[q, page and part, row] = x[row, slice q] A[page, part, slice q]^T, masked."""
        rows, parts = self.block, self.parts
        steps = self.width // 64 // self.slices

        def place(i: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
            index = self._last_first() + i * self.sms
            rest = index // self.slices
            m, g = lax.rem(rest, jnp.int32(self.row_blocks)), rest // self.row_blocks
            return lax.rem(index, jnp.int32(self.slices)), m, g

        def page_ids(i: jax.Array | int) -> list[jax.Array]:
            """Asked for before it is known whether there is such a unit: nothing waits for both."""
            first = lax.min(place(i)[2] * self.group, jnp.int32(self.pages - self.group))
            return [pages[first + j] for j in range(self.group)]

        def unit(i: jax.Array, carry: Any) -> Any:
            n, *ids = carry
            q, m, g = place(i)

            def issue(k: jax.Array | int) -> None:
                slot = lax.rem(n + k, jnp.int32(self.stages))
                depth = pl.ds((q * steps + k) * 64, 64)
                for j, page in enumerate(ids):
                    a_rows = sa.at[slot, pl.ds(j * parts * PAGE, parts * PAGE)]
                    plgpu.copy_gmem_to_smem(a.at[page, :, depth], a_rows, full.at[slot])
                x_tile = sx.at[pl.ds(slot * rows, rows)]
                plgpu.copy_gmem_to_smem(x.at[pl.ds(m * rows, rows), depth], x_tile, full.at[slot])

            for k in range(min(self.stages, steps)):
                issue(k)

            def accumulate(*accs: Any) -> list[jax.Array]:
                def step(k: jax.Array, carry: jax.Array) -> jax.Array:
                    slot = lax.rem(n + k, jnp.int32(self.stages))
                    plgpu.barrier_wait(full.at[slot])
                    for j, acc in enumerate(accs):
                        x_tile = sx.at[pl.ds(slot * rows + j * 64, 64)]
                        plgpu.wgmma(acc, x_tile, sa.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    if steps > self.stages:
                        following = k + self.stages
                        pl.when(following < steps)(partial(issue, following))
                    return carry

                lax.fori_loop(0, steps, step, jnp.int32(0))
                return [acc[...] for acc in accs]

            owns = [[self._mask(mask, m, j, g * self.group + i) for i in range(self.group)]
                    for j in range(self.wgs)]  # fmt: skip
            shape = (64, self.group * parts * PAGE)
            accs = pl.run_scoped(accumulate, *[ACC(shape, jnp.float32)] * self.wgs)
            for j, acc in enumerate(accs):
                at = pl.ds((m * self.wgs + j) * 64, 64)
                for column in range(self.group * parts):
                    values = acc[:, column * PAGE : (column + 1) * PAGE]
                    own = lax.broadcast_in_dim(owns[j][column // parts], values.shape, [0])
                    p.at[q, g * self.group * parts + column, at][...] = values * own
            return n + steps, *page_ids(i + 1)

        first = page_ids(0)
        total = cdiv(active, self.group) * self.slices * self.row_blocks
        lax.fori_loop(0, self._units_of_block(total), unit, (jnp.int32(0), *first))

    def _mask(self, mask: Any, m: jax.Array, j: int, page: jax.Array) -> jax.Array:
        at = pl.ds((m * self.wgs + j) * 64, 64)
        return load(mask, (page, at), plgpu.Layout.WGMMA.reduce(1))

    def sum(self, p: Any, u: Any, us: Any, active: jax.Array) -> None:
        """u[part, row, rank] = the sum of p over slices; zeros up to a whole chunk of pages."""
        rows, blocks = self.store_rows, self.row_blocks * self.wgs
        layout = plgpu.Layout.WG_STRIDED((rows, PAGE), vec_size=rows * PAGE // 128)

        def unit(i: jax.Array, carry: jax.Array) -> jax.Array:
            index = self._last_first() + i * self.sms
            m, column = lax.rem(index, jnp.int32(blocks)), index // blocks
            page, part = column // self.parts, lax.rem(column, jnp.int32(self.parts))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(page < active)
            def _() -> None:
                total = None
                for q in range(self.slices):  # unrolled: all loads in flight at once
                    part_sum = load(p, (q, column, pl.ds(m * 64, rows)), layout)
                    total = part_sum if total is None else total + part_sum
                assert total is not None
                us[...] = total.astype(self.dtype)

            @pl.when(page >= active)
            def _() -> None:
                us[...] = plgpu.layout_cast(jnp.zeros((rows, PAGE), self.dtype), layout)

            plgpu.commit_smem()
            at = u.at[part, pl.ds(m * 64, rows), pl.ds(page * PAGE, PAGE)]
            plgpu.copy_smem_to_gmem(us, at)
            return carry

        total = cdiv(active, self.chunk) * self.chunk * self.parts * blocks
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
