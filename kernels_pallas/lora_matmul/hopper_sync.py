"""What the warpgroups and blocks of the Hopper kernels wait for: a ring of tiles, counters."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup fills and another multiplies: a tile of `rows`
    rows of x and a tile of w each (for `consume_pair` two), and barriers for full (of x and w, or of
    u and B) and empty."""

    stages: int
    rows: int
    xs: Any
    ws: Any
    full: Any
    full_expand: Any
    empty: Any

    def _slot(self, n: jax.Array) -> jax.Array:
        return lax.rem(n, jnp.int32(self.stages))

    def acquire(self, n: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Wait until the slot of step n is free; its x tile, its w tile, its number."""
        self._wait_free(n)
        slot = self._slot(n)
        x_tile = self.xs.at[pl.ds(slot * self.rows, self.rows)]
        return x_tile, self.ws.at[slot], slot

    def _wait_free(self, n: jax.Array) -> None:
        @pl.when(n >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[self._slot(n)])

    def drain(self, n: jax.Array) -> None:
        """Wait until every tile has been used."""

        def step(n: jax.Array, carry: jax.Array) -> jax.Array:
            self._wait_free(n)
            return carry

        lax.fori_loop(n, n + self.stages, step, jnp.int32(0))

    def consume(self, acc: Any, full: Any, steps: jax.Array | int, n: jax.Array) -> jax.Array:
        """acc += x tile @ w tile for `steps` steps from n on; a slot is free one step later."""

        def step(k: jax.Array, n: jax.Array) -> jax.Array:
            slot = self._slot(n)
            plgpu.barrier_wait(full.at[slot])
            x_tile = self.xs.at[pl.ds(slot * self.rows, 64)]
            plgpu.wgmma(acc, x_tile, self.ws.at[slot])
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(partial(self._release, n + self.stages - 1))
            return n + 1

        n = lax.fori_loop(0, steps, step, n)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(partial(self._release, n + self.stages - 1))
        return n

    def consume_pair(
        self, accs: tuple[Any, Any], full: Any, steps: jax.Array | int, n: jax.Array, *,
        slots: int = 1, other_x: int = 0,
    ) -> jax.Array:  # fmt: skip
        """The same for two accumulators and slots with two w tiles. One slot a step: each takes one of
        the w tiles, the second the x that lies `other_x` rows further. Two slots: each takes x and the
        first w tile of its own."""

        def release(n: jax.Array) -> None:
            for j in range(slots):
                self._release(n + j)

        def step(k: jax.Array, n: jax.Array) -> jax.Array:
            for j, acc in enumerate(accs):
                slot = self._slot(n + min(j, slots - 1))
                if j < slots:
                    plgpu.barrier_wait(full.at[slot])
                own = j if slots == 1 else 0
                x_tile = self.xs.at[pl.ds(slot * self.rows + own * other_x, 64)]
                plgpu.wgmma(acc, x_tile, self.ws.at[slot, own])
            plgpu.wgmma_wait(2)
            pl.when(k > 0)(partial(release, n + self.stages - slots))
            return n + slots

        n = lax.fori_loop(0, steps, step, n)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(partial(release, n + self.stages - slots))
        return n

    def _release(self, n: jax.Array) -> None:
        plgpu.barrier_arrive(self.empty.at[self._slot(n)])


COUNTERS = 6
"""Grid-wide waits that a launch may need, each a word of its own stretch of eight."""


def counters(count: Int[Array, "..."]) -> Int[Array, " words"]:
    """Counters at zero for the launches of a step, made of any number that is not negative: XLA must
    not fold them into a constant, because the launches write them (and put them back)."""
    return jnp.minimum(jnp.broadcast_to(count, (8 * COUNTERS,)), 0)


class Counters:
    """Grid-wide waits. A counter sees one signal a block, then one pass a block, and then wraps
    to zero by itself: nobody has to clear it between launches."""

    def __init__(self, sync: Any, sms: int):
        self.sync, self.sms = sync, sms

    def signal(self, which: int) -> None:
        """This block's warpgroup has written what others wait for (or has passed its wait)."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def signal(_: Any, ref: Any) -> None:
            mgpu.warpgroup_barrier()
            pointer = mgpu.memref_ptr(ref)
            last = 2 * self.sms - 1
            mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
                f"red.release.gpu.global.inc.u32 [$0], {last};",
                pointer,
                predicate=mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
                has_side_effects=True,
            )

        signal(self.sync.at[pl.ds(8 * which, 8)])  # pyright: ignore[reportCallIssue]

    def wait(self, which: int) -> None:
        """Until every block has signalled."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(_: Any, ref: Any) -> None:
            counter = mgpu.SemaphoreRef(mgpu.memref_ptr(ref))
            counter.wait(self.sms, decrement=False, memory_scope="gpu")

        wait(self.sync.at[pl.ds(8 * which, 8)])  # pyright: ignore[reportCallIssue]

    def meet(self, which: int) -> None:
        """Signal, wait, pass: once a block and counter."""
        self.signal(which)
        self.wait(which)
        self.signal(which)


def signal(counter: Any, last: jax.Array) -> None:
    """One more on a counter (8 integers of which one is used) once this warpgroup's writes are
    seen everywhere; at `last` it wraps to zero."""
    _count(counter, last, "release")


def meet(counter: Any, target: jax.Array, last: jax.Array) -> None:
    """Wait for `target` signals, then count as one more: whoever comes last clears the counter."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_: Any, ref: Any, target: Any) -> None:
        semaphore = mgpu.SemaphoreRef(mgpu.memref_ptr(ref))
        semaphore.wait(target.registers.flat[0], decrement=False, memory_scope="gpu")
        # Threads wrote what the copy engine is to read.
        mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
            "fence.proxy.async;", has_side_effects=True
        )

    wait(counter, target)  # pyright: ignore[reportCallIssue]
    _count(counter, last, "relaxed")


def _count(counter: Any, last: jax.Array, order: str) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def count(_: Any, ref: Any, last: Any) -> None:
        if order == "release":
            mgpu.warpgroup_barrier()
        mgpu.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
            f"red.{order}.gpu.global.inc.u32 [$0], $1;",
            mgpu.memref_ptr(ref),
            last.registers.flat[0],
            predicate=mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )

    count(counter, last)  # pyright: ignore[reportCallIssue]


def load(ref: Any, index: tuple[Any, ...], layout: Any) -> jax.Array:
    """ref[index] from global memory into registers."""
    if jax.__version_info__ >= (0, 11):
        return plgpu.load(  # pyright: ignore[reportCallIssue]
            ref.at[index], layout=layout, optimized=False
        )
    return ref[index]  # before 0.11 only the interpreter runs this, and it knows no layouts


def interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    # Not exported before jax 0.11.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
