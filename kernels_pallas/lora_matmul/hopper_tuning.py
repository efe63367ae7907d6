"""Tile sizes of the Hopper kernel for few rows, by shape (kernels_pallas/README.md)."""

import dataclasses

from kernels_pallas.lora_matmul.types import PAGE

SHARED_BYTES = 227 * 1024 - 2048  # of one block, less barriers and alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tile sizes. More bytes in flight are not better: every load of an adapter page queues
    behind them (64 to 100 KiB an SM was best on an H100)."""

    bn: int
    """Columns of w in a tile."""
    bk: int
    """Rows of w in a tile."""
    split: int
    """Parts of K that are summed outside (by XLA, in the next elementwise kernel)."""
    stages: int
    """Tiles in flight."""
    slices: int
    """Parts of K in the shrink."""
    group: int
    """Rank pages that share a read of x in the shrink."""
    shrink_stages: int
    """64-column steps in flight in the shrink."""
    tail: int
    """Tiles of w that are taken after the expand steps: they hide that B and u come late. More leave
    the shrink less time (of qkv with one adapter: 8 17.1 us, 2 16.2, 1 16.1 on an H200)."""
    single: bool = False
    """At most one rank page is active: see `single_page`."""


def tuning(rows: int, width: int, part_sizes: tuple[int, ...], sms: int) -> Tuning:
    """Tile sizes for [rows, width] @ [width, sum(part_sizes)], up to 64 rows; NotImplementedError if
    none fit."""
    parts, total = len(part_sizes), sum(part_sizes)
    fits = [bn for bn in (256, 128, 64) if all(size % bn == 0 for size in part_sizes)]
    if not fits or width % 128:
        raise NotImplementedError(
            f"parts {part_sizes} and K={width}: every part must be a multiple of 64, K of 128"
        )
    wide = [bn for bn in fits if total // bn >= 0.75 * sms]
    bn = wide[0] if wide else fits[-1]
    bk = 64 if bn == 256 else 128
    splits = [s for s in (1, 2, 4) if total // bn * s <= sms and width % (bk * s) == 0]
    split = max(splits, default=1)
    most = 16 if parts < 3 else 8
    slices = max(s for s in (1, 2, 4, 8, 16) if s <= most and width % (64 * s) == 0)
    group = 2 if parts > 2 else 4
    shrink_stages = 3 if bn == 256 else 4
    stages = 3 if bn == 256 else 5 if split == 1 else 4
    made = Tuning(
        bn=bn, bk=bk, split=split, stages=stages, slices=slices, group=group,
        shrink_stages=shrink_stages, tail=1,
    )  # fmt: skip
    while made.stages > 2 and _shared_bytes(made, rows, parts) > SHARED_BYTES:
        made = dataclasses.replace(made, stages=made.stages - 1)
    if _shared_bytes(made, rows, parts) > SHARED_BYTES:
        raise NotImplementedError(f"{rows} rows, K={width}, parts {part_sizes}: no tile fits")
    return made


def for_pages(t: Tuning, pages: int, sms: int) -> Tuning:
    """The same for steps with room for so many rank pages."""
    if pages == 1:
        return single_page(t)
    return dataclasses.replace(t, slices=slices_for(t.slices, t.group, pages, sms))


def slices_for(most: int, group: int, pages: int, sms: int) -> int:
    """So many that half the room gives a block one unit of the shrink at most: a second follows after
    the first, and slices of u are written and read (64 pages on an H200: a step takes 3% less)."""
    while most > 1 and -(-pages // 2 // group) * most > sms:
        most //= 2
    return most


def single_page(t: Tuning) -> Tuning:
    """The same for steps of at most one rank page: its slices of u are not summed, if they fill
    expand steps."""
    return t if t.slices % (t.bk // PAGE) else dataclasses.replace(t, group=1, single=True)


def base_tuning(rows: int, width: int, part_sizes: tuple[int, ...], sms: int) -> Tuning:
    """The same for the product alone: no adapter's load queues behind what is in flight, so narrow
    tiles have one more (qkv 22.3 -> 20.0 us on an H200, down 42.2 -> 41.2; wide ones lost 4%)."""
    made = tuning(rows, width, part_sizes, sms)
    more = dataclasses.replace(made, stages=made.stages + 1)
    return more if made.bn < 256 and _shared_bytes(more, rows, 0) <= SHARED_BYTES else made


def _shared_bytes(t: Tuning, rows: int, parts: int) -> int:
    over = 64 - rows
    tiles = 2 * t.stages * (rows * t.bk + t.bk * t.bn) + 2 * over * t.bk
    shrink = parts and 128 * (t.shrink_stages * (rows + t.group * parts * PAGE) + over)
    out = min(2, t.bn // 64) * 64 * 64 * (2 if t.split == 1 else 4)
    return tiles + shrink + out + 64 * PAGE * 2 * (parts if t.single else 1)
