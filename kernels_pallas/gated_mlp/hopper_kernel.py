"""The body of the gated MLP for Hopper (see hopper.py for the idea and the entry point)."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.act_mul.xla import ACTIVATIONS
from kernels_pallas.gated_mlp.hopper_tuning import (
    DEPTH,
    HALF,
    WIDE,
    ShrinkTuning,
    Tuning,
    expand_slots,
    slot_rows,
)
from kernels_pallas.lora_matmul.hopper_shrink import ACC, Shrink, cdiv
from kernels_pallas.lora_matmul.hopper_sync import Counters, Ring, interpreter
from kernels_pallas.lora_matmul.types import PAGE

CHUNK = DEPTH // PAGE
"""Rank pages of one expand step."""

STAGES = ("gate_up slices", "gate_up sum", "gate_up", "down slices", "down sum", "down")
"""What one launch does, in this order; the interpreter, a launch each."""

RESULTS = ("y", "h", "u1", "p1", "u2", "p2")
"""What one launch may write; the interpreter's write one each."""

GATE_UP, DOWN, HIDDEN = (0, 1), (2, 3), (4, 5)
"""Grid-wide counters: of the two shrinks, and of the hidden state, all but the last round and all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """Static facts of one launch, and its body. Letters: i tile of the block, n slot since the
    block began, c column tile, s K split, k step of a tile, e its expand step."""

    rows: int
    width: int
    hidden: int
    activation: str
    pages: int
    """Most active rank pages; 0: no LoRA."""
    t: Tuning
    sms: int
    dtype: Any

    @cached_property
    def gate_up(self) -> Shrink:
        """The shrink of the first product."""
        return self._shrink_of(self.width, 2, self.t.gate_up)

    @cached_property
    def down(self) -> Shrink:
        """The shrink of the second."""
        return self._shrink_of(self.hidden, 1, self.t.down)

    def _shrink_of(self, width: int, parts: int, t: ShrinkTuning) -> Shrink:
        return Shrink(
            rows=self.rows, width=width, parts=parts, pages=self.pages, slices=t.slices,
            group=t.group, stages=self.t.shrink_stages, chunk=CHUNK, sms=self.sms, dtype=self.dtype,
            single=self.t.single,
        )  # fmt: skip

    @property
    def expand_slots(self) -> int:
        return expand_slots(self.rows)

    @property
    def slot_rows(self) -> int:
        return slot_rows(self.rows, self.pages > 0)

    @property
    def over(self) -> int:
        """Rows that wgmma reads beyond a tile of x."""
        return 64 - self.rows

    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All results by name: y in parts; the hidden state; u and its slices of either shrink."""
        split = self.t.split
        types = {
            "y": jax.ShapeDtypeStruct((split, self.rows, self.width), jnp.float32),
            "h": jax.ShapeDtypeStruct((self.rows, self.hidden), self.dtype),
        }
        if self.pages:
            names = ("u1", "p1", "u2", "p2")[:: 2 if self.t.single else 1]
            own = (*self.gate_up.out_types(), *self.down.out_types())
            types |= dict(zip(names, own, strict=True))
        return types

    def call(
        self, stages: tuple[str, ...], out: tuple[str, ...], args: dict[str, jax.Array],
        interpret: bool = False,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """Launch some stages, all or one; what they write."""
        types = self.out_types()
        extra: dict[str, Any] = {"interpret": interpreter()} if interpret else {}
        scratch = self._scratch()

        def body(*refs: Any) -> None:
            names = (*args, *out, *scratch)
            self.body(stages, dict(zip(names, refs, strict=True)))

        kernel = plgpu.kernel(
            body,
            kernel_name=f"gated_mlp_{self.width}x{self.hidden}",
            out_type=tuple(types[name] for name in out),
            grid=(self.sms,),
            grid_names=("sm",),
            num_threads=3 if self.pages else 2,
            thread_name="wg",
            scratch_types=list(scratch.values()),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            **extra,
        )
        return dict(zip(out, kernel(*args.values()), strict=True))

    def _scratch(self) -> dict[str, Any]:
        """Shared memory by name."""
        t = self.t
        swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
        tile = partial(plgpu.SMEM, dtype=self.dtype, transforms=swizzled)
        full = partial(plgpu.Barrier, num_barriers=t.slots)
        scratch = {
            # x tiles lie one after another and are read 64 rows at a time: rows beyond the
            # tile's own are another tile's, and their results are never stored.
            "xs": tile((t.slots * self.slot_rows + self.over, DEPTH)),
            "ws": tile((t.slots, 2, DEPTH, HALF)),
            "hs": tile((64, HALF)),
            "ys": plgpu.SMEM((2, 64, 32), jnp.float32, transforms=wide),
            "full": full(num_arrivals=3),
            "empty": full(num_arrivals=1),
        }
        if not self.pages:
            return scratch
        g, d, stages = t.gate_up, t.down, t.shrink_stages
        shrink = partial(plgpu.Barrier, num_barriers=stages)
        return scratch | {
            "full_expand": full(num_arrivals=(1 + CHUNK) * 2 // self.expand_slots),
            "sx": tile((stages * self.rows + self.over, 64)),
            "sa": tile((stages, 2 * g.group * PAGE, 64)),
            "us": plgpu.SMEM(self.gate_up.staging(), self.dtype),
            "full_shrink1": shrink(num_arrivals=1 + g.group),
            "full_shrink2": shrink(num_arrivals=1 + d.group),
            "u1_there": plgpu.Barrier(num_arrivals=1),
            "u2_there": plgpu.Barrier(num_arrivals=1),
            "h_there": plgpu.Barrier(num_arrivals=1, num_barriers=2),
        }

    def body(self, stages: tuple[str, ...], refs: dict[str, Any]) -> None:
        """What every warpgroup of every block runs: one multiplies, one streams, one shrinks."""
        wg = lax.axis_index("wg")
        # None for results that a launch of one stage neither writes nor reads.
        r = SimpleNamespace(**(dict.fromkeys(RESULTS) | refs))
        active = r.count[0] if self.pages else jnp.int32(0)
        counters = Counters(r.sync, self.sms) if len(stages) > 1 else None
        full_expand = r.full_expand if self.pages else None
        ring = Ring(self.t.slots, self.slot_rows, r.xs, r.ws, r.full, full_expand, r.empty)
        pl.when(wg == 0)(lambda: self._multiply(stages, ring, r, active, counters))
        pl.when(wg == 1)(lambda: self._produce(stages, ring, r, active, counters))
        if self.pages:
            pl.when(wg == 2)(lambda: self._shrink(stages, r, active, counters))

    # The warpgroup that multiplies

    def _multiply(
        self, stages: tuple[str, ...], ring: Ring, r: Any, active: jax.Array, counters: Any
    ) -> None:
        n = jnp.int32(0)
        if "gate_up" in stages:
            early, every = self.t.rounds - 1, self.t.rounds
            for first, last, counter in ((0, early, HIDDEN[0]), (early, every, HIDDEN[1])):
                tiles = self._tiles_of_block()
                lo, hi = (lax.min(tiles, jnp.int32(end)) for end in (first, last))
                n = lax.fori_loop(lo, hi, self._gate_up_tile(ring, r, active), n)
                plgpu.wait_smem_to_gmem(0, wait_read_only=False)
                if counters:
                    counters.signal(counter)
        if "down" in stages:
            lax.fori_loop(0, self._units_of_block(), self._down_unit(ring, r, active), n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def _gate_up_tile(self, ring: Ring, r: Any, active: jax.Array) -> Callable[..., jax.Array]:
        """h = activation(x @ gate) * (x @ up) in HALF columns."""

        def tile(i: jax.Array, n: jax.Array) -> jax.Array:
            expands, tail = self.gate_up.expands(active), self.t.tail
            (gate, up), n = self._product(ring, self.width // DEPTH, tail, expands, n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.hs[...] = (ACTIVATIONS[self.activation](gate) * up).astype(self.dtype)
            plgpu.commit_smem()
            columns = pl.ds(self._tile(i) * HALF, HALF)
            plgpu.copy_smem_to_gmem(r.hs.at[pl.ds(0, self.rows)], r.h.at[:, columns])
            return n

        return tile

    def _down_unit(self, ring: Ring, r: Any, active: jax.Array) -> Callable[..., jax.Array]:
        """One part of y in WIDE columns."""

        def unit(i: jax.Array, n: jax.Array) -> jax.Array:
            c, s = self._unit(i)
            expands, tail = self._down_expands(active, s), self.t.tail
            halves, n = self._product(ring, self._down_steps, tail, expands, n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j in range(WIDE // 32):
                if j > 1:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                r.ys[j % 2] = halves[j // 2][:, 32 * (j % 2) : 32 * (j % 2) + 32]
                plgpu.commit_smem()
                there = r.y.at[s, :, pl.ds(c * WIDE + 32 * j, 32)]
                plgpu.copy_smem_to_gmem(r.ys.at[j % 2, pl.ds(0, self.rows)], there)
            return n

        return unit

    def _product(
        self, ring: Ring, steps: int, tail: int, expands: jax.Array, n: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """The two [64, HALF] of a tile of either product, its LoRA with them."""

        def accumulate(*accs: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            k = ring.consume_pair(accs, ring.full, steps - tail, n)
            if self.pages:
                own = {"slots": self.expand_slots, "other_x": self.rows}
                k = ring.consume_pair(accs, ring.full_expand, expands, k, **own)
            k = ring.consume_pair(accs, ring.full, tail, k)
            return accs[0][...], accs[1][...], k

        acc = ACC((64, HALF), jnp.float32)
        *halves, n = pl.run_scoped(accumulate, acc, acc)
        return (halves[0], halves[1]), n

    # Which block does what. What is to be shrunk is dealt from the last block on (see Shrink).

    @property
    def _round(self) -> int:
        """Tiles of a round: blocks from this number on have none."""
        return self.hidden // HALF // self.t.rounds

    def _tiles_of_block(self) -> jax.Array:
        mine = (lax.axis_index("sm") < self._round).astype(jnp.int32)
        return mine * self.t.rounds

    def _tile(self, i: jax.Array) -> jax.Array:
        return lax.axis_index("sm") + i * self._round

    def _units_of_block(self) -> jax.Array:
        total = self.width // WIDE * self.t.split
        return (total - lax.axis_index("sm") + self.sms - 1) // self.sms

    def _unit(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Column tile and K split."""
        unit, tiles = lax.axis_index("sm") + i * self.sms, jnp.int32(self.width // WIDE)
        return lax.rem(unit, tiles), unit // tiles

    @property
    def _down_steps(self) -> int:
        return self.hidden // DEPTH // self.t.split

    def _down_expands(self, active: jax.Array, s: jax.Array) -> jax.Array:
        """Expand steps of a unit: K splits take chunks of pages in turn."""
        return lax.max(cdiv(self.down.expands(active) - s, self.t.split), 0)

    # The warpgroup that streams. Whatever it waits for, the stream of w waits for too.

    def _produce(
        self, stages: tuple[str, ...], ring: Ring, r: Any, active: jax.Array, counters: Any
    ) -> None:
        n = jnp.int32(0)
        if "gate_up" in stages:
            n = self._produce_gate_up(ring, r, active, counters)
        if "down" in stages:
            n = self._produce_down(ring, r, active, counters, n)
        ring.drain(n)

    def _produce_gate_up(self, ring: Ring, r: Any, active: jax.Array, counters: Any) -> jax.Array:
        steps, tail = self.width // DEPTH, self.t.tail

        def tile(i: jax.Array, carry: Any) -> Any:
            n, waited = carry
            starts = [part * self.hidden + self._tile(i) * HALF for part in (0, 1)]
            columns = [pl.ds(start, HALF) for start in starts]
            ids = self.gate_up.page_ids(r.pages, 0) if self.pages else []

            def load(k: jax.Array, n: jax.Array) -> jax.Array:
                self._load(ring, n, r.x, r.w1, k * DEPTH, columns)
                return n + 1

            def expand(e: jax.Array, carry: Any) -> Any:
                n, *ids = carry
                ranks = pl.ds(e * DEPTH, DEPTH)
                us = [r.u1.at[part, :, ranks] for part in (0, 1)]
                first = (e == 0) & (waited == 0)
                self._expand(ring, n, r.b1, ids, columns, us, r.u1_there, first, counters)
                return n + self.expand_slots, *self.gate_up.page_ids(r.pages, e + 1)

            n = lax.fori_loop(0, steps - tail, load, n)
            if self.pages:
                expands = self.gate_up.expands(active)
                n, *_ = lax.fori_loop(0, expands, expand, (n, *ids))
                waited = waited | (expands > 0).astype(jnp.int32)
            return lax.fori_loop(steps - tail, steps, load, n), waited

        zero = jnp.int32(0)
        return lax.fori_loop(0, self._tiles_of_block(), tile, (zero, zero))[0]

    def _produce_down(
        self, ring: Ring, r: Any, active: jax.Array, counters: Any, n: jax.Array
    ) -> jax.Array:
        steps, tail = self._down_steps, self.t.tail
        early = steps * (self.t.rounds - 1) // self.t.rounds
        split = self.t.split

        def unit(i: jax.Array, carry: Any) -> Any:
            n, waited = carry
            c, s = self._unit(i)
            columns = [pl.ds(c * WIDE + HALF * j, HALF) for j in (0, 1)]
            ids = self.down.page_ids(r.pages, s) if self.pages else []

            def load(k: jax.Array, n: jax.Array) -> jax.Array:
                # Of a split's rows, those of the rounds that are through come first.
                late = k >= early
                first = lax.select(late, early * split + s * (steps - early) - early, s * early)
                self._load(ring, n, r.h, r.w2, (first + k) * DEPTH, columns)
                return n + 1

            def expand(e: jax.Array, carry: Any) -> Any:
                n, *ids = carry
                us = [r.u2.at[0, :, pl.ds((s + e * split) * DEPTH, DEPTH)]] * 2
                first = (e == 0) & (waited == 0)
                self._expand(ring, n, r.b2, ids, columns, us, r.u2_there, first, counters)
                return n + self.expand_slots, *self.down.page_ids(r.pages, s + (e + 1) * split)

            for part, (start, end) in enumerate(((0, early), (early, steps - tail))):
                if counters:
                    pl.when(i == 0)(partial(self._wait_for_hidden, r, counters, part))
                n = lax.fori_loop(start, end, load, n)
            if self.pages:
                expands = self._down_expands(active, s)
                n, *_ = lax.fori_loop(0, expands, expand, (n, *ids))
                waited = waited | (expands > 0).astype(jnp.int32)
            return lax.fori_loop(steps - tail, steps, load, n), waited

        units = self._units_of_block()
        n, _ = lax.fori_loop(0, units, unit, (n, jnp.int32(0)))
        if counters and not self.pages:  # every block counts
            for part in (0, 1):
                pl.when(units == 0)(partial(self._wait_for_hidden, r, counters, part))
        return n

    def _wait_for_hidden(self, r: Any, counters: Counters, part: int) -> None:
        """Where a warpgroup shrinks, it polls the counter; else the one that streams does."""
        if self.pages:
            plgpu.barrier_wait(r.h_there.at[part])
        else:
            counters.wait(HIDDEN[part])
            counters.signal(HIDDEN[part])

    def _load(
        self, ring: Ring, n: jax.Array, x: Any, w: Any, row: jax.Array, columns: list[Any]
    ) -> None:
        """A tile of x and two of w into slot n."""
        x_tile, w_tiles, slot = ring.acquire(n)
        depth = pl.ds(row, DEPTH)
        for j, half in enumerate(columns):
            plgpu.copy_gmem_to_smem(w.at[depth, half], w_tiles.at[j], ring.full.at[slot])
        there = x_tile.at[pl.ds(0, self.rows)]
        plgpu.copy_gmem_to_smem(x.at[:, depth], there, ring.full.at[slot])

    def _expand(
        self, ring: Ring, n: jax.Array, b: Any, ids: list[Any], columns: list[Any], us: list[Any],
        there: Any, first: jax.Array, counters: Any,
    ) -> None:  # fmt: skip
        """B and u of a chunk of pages for either half of a tile, into slot n (and n + 1)."""
        slots = [ring.acquire(n + j) for j in range(self.expand_slots)]
        halves = []
        for which in (0, 1):
            x_tile, w_tiles, slot = slots[which % self.expand_slots]
            place = which if self.expand_slots == 1 else 0
            x_tile = x_tile.at[pl.ds(place * self.rows, self.rows)]
            halves.append((x_tile, w_tiles.at[place], ring.full_expand.at[slot]))
        for (_, w_tile, barrier), half in zip(halves, columns, strict=True):
            for j, page in enumerate(ids):
                ranks = w_tile.at[pl.ds(PAGE * j, PAGE)]
                plgpu.copy_gmem_to_smem(b.at[page, :, half], ranks, barrier)
        if counters:
            pl.when(first)(lambda: plgpu.barrier_wait(there))
        for (x_tile, _, barrier), u in zip(halves, us, strict=True):
            plgpu.copy_gmem_to_smem(u, x_tile, barrier)

    # The warpgroup that shrinks, and waits for the grid

    def _shrink(self, stages: tuple[str, ...], r: Any, active: jax.Array, counters: Any) -> None:
        def one(name: str, x: Any, own: tuple[Any, ...], full: Any, there: Any) -> None:
            shrink, meet = {"gate_up": (self.gate_up, GATE_UP), "down": (self.down, DOWN)}[name]
            a, p, u = own
            if f"{name} slices" in stages:
                shrink.slice(x, a, p, u, r.pages, r.mask, active, r.sx, r.sa, r.us, full)
            if counters:
                pl.when(active > 0)(partial(counters.meet, meet[0]))
            if f"{name} sum" in stages and not shrink.single:
                shrink.sum(p, u, r.us, active)
                if counters:
                    pl.when(active > 0)(partial(counters.meet, meet[1]))
            if counters:
                pl.when(active > 0)(lambda: plgpu.barrier_arrive(there))

        one("gate_up", r.x, (r.a1, r.p1, r.u1), r.full_shrink1, r.u1_there)
        if counters:
            for part, counter in enumerate(HIDDEN):
                counters.wait(counter)
                counters.signal(counter)
                plgpu.barrier_arrive(r.h_there.at[part])
        one("down", r.h, (r.a2, r.p2, r.u2), r.full_shrink2, r.u2_there)
