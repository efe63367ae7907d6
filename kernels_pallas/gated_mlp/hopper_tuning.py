"""Tile sizes of the gated MLP's launch by shape."""

import dataclasses

from kernels_pallas.lora_matmul import hopper_tuning
from kernels_pallas.lora_matmul.hopper_tuning import SHARED_BYTES
from kernels_pallas.lora_matmul.types import PAGE

DEPTH, WIDE = 64, 128
"""Rows and columns of w in a slot of the ring, of both products."""

HALF = WIDE // 2
"""Columns of gate, and of up, in a tile of the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Slots in flight, and the parts of either product that are chosen by shape. `down.group` is
    twice `gate_up.group`: both shrinks use the same shared memory."""

    slots: int
    rounds: int
    """In which the blocks take the tiles of the first product. The second begins with what all but
    the last have given, so that nobody waits for the last."""
    gate_up: hopper_tuning.Tuning
    down: hopper_tuning.Tuning


def tuning(rows: int, width: int, hidden: int, sms: int, *, lora: bool) -> Tuning:
    """For [rows, width] and a hidden state of [rows, hidden]; NotImplementedError if none fits."""
    if rows > 64:
        raise NotImplementedError(f"{rows} rows: up to 64 are supported")
    if width % WIDE or hidden % WIDE:
        raise NotImplementedError(f"widths {width} and {hidden}: multiples of {WIDE} are supported")
    rounds = _rounds(hidden, sms)
    splits = [
        s for s in (1, 2, 4, 8)
        if width // WIDE * s <= sms and hidden % (DEPTH * rounds * s) == 0
    ]  # fmt: skip
    split = max(splits, default=1)
    common = {"bn": WIDE, "bk": DEPTH, "stages": 0, "shrink_stages": 4, "tail": 1}
    made = Tuning(
        slots=5 if lora else 6,
        rounds=rounds,
        gate_up=hopper_tuning.Tuning(
            **common, split=1, slices=_slices(width), group=2,
        ),
        down=hopper_tuning.Tuning(
            **common, split=split, slices=_slices(hidden), group=4,
        ),
    )  # fmt: skip
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


def shared_bytes(t: Tuning, rows: int, lora: bool) -> int:
    """Shared memory of a block."""
    over = 64 - rows
    x_rows = 2 * rows if lora and rows <= 32 else rows
    ring = 2 * (t.slots * (x_rows * DEPTH + DEPTH * WIDE) + over * DEPTH)
    out = 2 * 64 * HALF + 4 * 2 * 64 * 32
    shrink = 128 * (t.gate_up.shrink_stages * (rows + 2 * t.gate_up.group * PAGE) + over)
    return ring + out + (shrink + 2 * rows * PAGE if lora else 0)
