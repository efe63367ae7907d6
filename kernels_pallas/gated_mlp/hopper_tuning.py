"""Tile sizes of the gated MLP's launch by shape."""

import dataclasses

from kernels_pallas.lora_matmul.hopper_tuning import SHARED_BYTES, slices_for
from kernels_pallas.lora_matmul.types import PAGE

DEPTH, WIDE = 64, 128
"""Rows and columns of w in a slot of the ring, of both products."""

HALF = WIDE // 2
"""Columns of gate, and of up, in a tile of the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkTuning:
    """Of one product's shrink."""

    slices: int
    """Parts of K."""
    group: int
    """Rank pages that share a read of x."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tile sizes. Both shrinks use the same shared memory: `down.group` is up to twice `gate_up.group`."""

    slots: int
    """Slots of the ring: more in flight are not better (see `lora_matmul.hopper_tuning`)."""
    rounds: int
    """In which the blocks take the tiles of the first product. The second begins with what all but
    the last have given, so that nobody waits for the last."""
    split: int
    """Parts of K in the second product."""
    tail: int
    """Tiles of w after the expand steps."""
    shrink_stages: int
    """64-column steps in flight in a shrink."""
    gate_up: ShrinkTuning
    down: ShrinkTuning
    single: bool = False
    """At most one rank page is active: see `single_page`."""


def for_pages(t: Tuning, pages: int, sms: int) -> Tuning:
    """The same for steps with room for so many rank pages (see `lora_matmul.hopper_tuning`)."""
    if pages == 1:
        return single_page(t)

    def fewer(s: ShrinkTuning) -> ShrinkTuning:
        return dataclasses.replace(s, slices=slices_for(s.slices, s.group, pages, sms))

    return dataclasses.replace(t, gate_up=fewer(t.gate_up), down=fewer(t.down))


def single_page(t: Tuning) -> Tuning:
    """The same for steps of at most one rank page: slices of u are not summed, if they fill expand
    steps. A tile of the first product has one such step, and takes longer than its shrink."""
    chunk = DEPTH // PAGE
    if t.gate_up.slices % chunk or t.down.slices % chunk:
        return t
    own = {
        name: ShrinkTuning(slices=n, group=1)
        for name, n in (("gate_up", chunk), ("down", t.down.slices))
    }
    return dataclasses.replace(t, single=True, **own)


def tuning(rows: int, width: int, hidden: int, sms: int, *, lora: bool) -> Tuning:
    """For [rows, width], up to 64 rows, and a hidden state of [rows, hidden]; NotImplementedError if
    none fits."""
    if width % WIDE or hidden % WIDE:
        raise NotImplementedError(f"widths {width} and {hidden}: multiples of {WIDE} are supported")
    rounds = _rounds(hidden, sms)
    splits = [
        s for s in (1, 2, 4, 8)
        if width // WIDE * s <= sms and hidden % (DEPTH * rounds * s) == 0
    ]  # fmt: skip
    made = Tuning(
        slots=5 if lora else 6,
        rounds=rounds,
        split=max(splits, default=1),
        tail=1,
        shrink_stages=4,
        gate_up=ShrinkTuning(slices=_slices(width), group=2),
        down=ShrinkTuning(slices=_slices(hidden), group=4),
    )
    while made.slots > 4 and shared_bytes(made, rows, lora) > SHARED_BYTES:
        made = dataclasses.replace(made, slots=made.slots - 1)
    if shared_bytes(made, rows, lora) > SHARED_BYTES:
        raise NotImplementedError(f"{rows} rows, widths {width} and {hidden}: no tile fits")
    return made


def _rounds(hidden: int, sms: int) -> int:
    """As few as there are tiles for, but two."""
    tiles = hidden // HALF
    return next(n for n in range(2, tiles + 1) if tiles % n == 0 and tiles // n <= sms)


def _slices(width: int) -> int:
    return max(s for s in (1, 2, 4, 8, 16) if width % (64 * s) == 0)


def expand_slots(rows: int) -> int:
    """Slots of an expand step. Its halves multiply different u: one slot has room for two of up to
    32 rows."""
    return 1 if rows <= 32 else 2


def slot_rows(rows: int, lora: bool) -> int:
    """Rows for x in a slot."""
    return rows * (2 if lora and expand_slots(rows) == 1 else 1)


def shared_bytes(t: Tuning, rows: int, lora: bool) -> int:
    """Shared memory of a block."""
    over = 64 - rows
    ring = 2 * (t.slots * (slot_rows(rows, lora) * DEPTH + DEPTH * WIDE) + over * DEPTH)
    out = 2 * 64 * HALF + 4 * 2 * 64 * 32
    shrink = 128 * (t.shrink_stages * (rows + 2 * t.gate_up.group * PAGE) + over)
    us = 2 * 2 * 64 * PAGE if t.single else 2 * rows * PAGE
    return ring + out + (shrink + us if lora else 0)
