"""Slots of shared memory into which a worker's tiles are loaded: q, K and V of 64 positions each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.paged_attention.hopper_registers import SWIZZLED


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile lies in global memory."""

    first: jax.Array
    """The first row of q, a whole eight."""
    head: jax.Array
    offset: jax.Array | int
    """Of the tile in its page, where a page is longer."""
    pages: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class BarrierRing:
    """As Pallas has it: every thread arrives once for every page. The interpreter knows no other."""

    refs: Any
    """q, keys, values; qs, ks, vs [stages, ...]; full_k, full_v."""
    stages: int
    size: int
    """Positions of a load."""

    @staticmethod
    def barriers(stages: int, loads: int) -> list[Any]:
        """Scratch for full_k and full_v."""
        arrivals = (1 + loads, loads)
        return [plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in arrivals]

    def start(self, tile: Tile, slot: jax.Array | int) -> None:
        """Start the loads of a tile into a slot."""
        r = self.refs
        q = r.q.at[pl.ds(tile.first, r.qs.shape[1])]
        plgpu.copy_gmem_to_smem(q, r.qs.at[slot], r.full_k.at[slot])
        for there, here, full in ((r.keys, r.ks, r.full_k), (r.values, r.vs, r.full_v)):
            for j, page in enumerate(tile.pages):
                part = there.at[page, tile.head, pl.ds(tile.offset, self.size)]
                place = here.at[slot, pl.ds(j * self.size, self.size)]
                plgpu.copy_gmem_to_smem(part, place, full.at[slot])

    def wait_k(self, slot: jax.Array, turn: jax.Array) -> None:
        """Until a slot's q and K are there. `turn`: 0 and 1 by turns of the ring."""
        del turn
        plgpu.barrier_wait(self.refs.full_k.at[slot])

    def wait_v(self, slot: jax.Array, turn: jax.Array) -> None:
        """Until a slot's V is there."""
        del turn
        plgpu.barrier_wait(self.refs.full_v.at[slot])


@dataclasses.dataclass(frozen=True)
class OwnRing:
    """The same with barriers at which one thread arrives once a tile. Pallas lets all 128 arrive
    for each page, nine times a tile of four pages."""

    refs: Any
    stages: int
    size: int

    @staticmethod
    def barriers(stages: int, loads: int) -> list[Any]:
        """Scratch for full_k and full_v, 64 bits a barrier."""
        del loads
        return [plgpu.SMEM((2 * stages,), jnp.int32) for _ in range(2)]

    def __post_init__(self) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
        def begin(_: Any, *barriers: Any) -> None:
            chosen = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
            for ref in barriers:
                for i in range(self.stages):
                    ptx = "mbarrier.init.shared::cta.b64 [$0], 1;"
                    pointer = barrier(ref, i).get_ptr()
                    mgpu.inline_ptx(ptx, pointer, predicate=chosen, has_side_effects=True)  # pyright: ignore[reportAttributeAccessIssue]
            # Threads wrote what the copy engine is to see.
            ptx = "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;"
            mgpu.inline_ptx(ptx, has_side_effects=True)  # pyright: ignore[reportAttributeAccessIssue]
            mgpu.warpgroup_barrier()

        begin(self.refs.full_k, self.refs.full_v)  # pyright: ignore[reportCallIssue]

    def start(self, tile: Tile, slot: jax.Array | int) -> None:
        """See `BarrierRing`."""
        r = self.refs
        scalars = [jnp.int32(x) for x in (slot, tile.first, tile.head, tile.offset, *tile.pages)]
        refs = (r.q, r.keys, r.values, r.full_k, r.full_v, r.qs, r.ks, r.vs)
        kinds = (*[plgpu.RefType()] * 5, *[plgpu.RefType(SWIZZLED)] * 3)
        size, rows, width = self.size, r.qs.shape[1], r.qs.shape[2]

        @plgpu.inline_mgpu(arg_types=(*kinds, *[plgpu.Layout.WG_SPLAT(())] * len(scalars)))
        def start(ctx: Any, *args: Any) -> None:
            q, keys, values, full_k, full_v, qs, ks, vs = args[:8]
            slot, first, head, offset, *pages = (as_index(x) for x in args[8:])
            with mgpu.when(mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)):
                k, v = barrier(full_k, slot), barrier(full_v, slot)
                k.arrive_expect_tx((rows + len(pages) * size) * width * 2)
                v.arrive_expect_tx(len(pages) * size * width * 2)
                copy(ctx, q, (mgpu.ds(first, rows),), mgpu.memref_slice(qs, slot), k)
                for there, here, full in ((keys, ks, k), (values, vs, v)):
                    for j, page in enumerate(pages):
                        eights = slice(j * size // 8, (j + 1) * size // 8)
                        place = mgpu.memref_slice(here, (slot, eights))
                        copy(ctx, there, (page, head, mgpu.ds(offset, size)), place, full)

        start(*refs, *scalars)  # pyright: ignore[reportCallIssue]

    def wait_k(self, slot: jax.Array, turn: jax.Array) -> None:
        """See `BarrierRing`."""
        wait(self.refs.full_k, slot, turn)

    def wait_v(self, slot: jax.Array, turn: jax.Array) -> None:
        """See `BarrierRing`."""
        wait(self.refs.full_v, slot, turn)


def wait(barriers: Any, slot: jax.Array, turn: jax.Array) -> None:
    """Until all has come that was announced at a barrier, for the time that `turn` says."""
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import arith

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar))
    def wait(_: Any, ref: Any, slot: Any, turn: Any) -> None:
        odd = arith.trunci(ir.IntegerType.get_signless(1), turn.registers.item())
        barrier(ref, as_index(slot)).wait_parity(odd)

    wait(barriers, slot, turn)  # pyright: ignore[reportCallIssue]


def barrier(ref: Any, slot: Any) -> Any:
    """The compiler's view of a barrier that lies in an array of integers."""
    from jax._src.lib.mlir.dialects import arith

    offset = mgpu.c(slot, i32()) if isinstance(slot, int) else arith.index_cast(i32(), slot)
    unused: Any = None  # whoever waits keeps count of the turns
    return mgpu.BarrierRef(mgpu.memref_ptr(ref), offset, phases=unused, num_barriers=1)


def copy(ctx: Any, there: Any, part: tuple[Any, ...], here: Any, full: Any) -> None:
    """The copy engine's order, given by one thread that has announced the bytes."""
    tiles = launch_context.TileTransform((8, 64))
    ctx.async_copy(
        src_ref=there, dst_ref=here, gmem_slice=part, gmem_transform=tiles, swizzle=128,
        barrier=full, arrive=False, predicate=None,
    )  # fmt: skip


def as_index(scalar: Any) -> Any:
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import arith

    return arith.index_cast(ir.IndexType.get(), scalar.registers.item())


def i32() -> Any:
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

    return ir.IntegerType.get_signless(32)
