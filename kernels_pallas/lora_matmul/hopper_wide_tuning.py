"""Tile sizes of the Hopper kernel for many rows, by shape (kernels_pallas/README.md)."""

import dataclasses

from kernels_pallas.lora_matmul.types import PAGE

BM = 128
"""Rows of x in a tile: 64 for each of two multiplying warpgroups."""
WGS = 2
BK = 64
"""Rows of w in a tile: 128 bytes, a line of swizzled shared memory."""
CHUNK = BK // PAGE
"""Rank pages of one expand step."""
SHARED_BYTES = 227 * 1024 - 2048  # of one block, less barriers and alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tile sizes and the order of tiles."""

    bn: int
    """Columns of w in a tile."""
    stages: int
    """Tiles in flight."""
    cluster: int = 1
    """Blocks of threads, one above the other, that load each tile of w together."""
    split: int = 1
    """Parts of K that are summed outside (by XLA, in the next elementwise kernel)."""
    span: int = 16
    """Row blocks that a tile of w passes by before the next."""
    tail: int = 4
    """K steps after the expand steps: they hide that u and B come late."""
    early: int = 8
    """K steps before the expand steps after which u is waited for."""
    group: int = 1
    """Rank pages of one pass of the shrink."""
    a_stages: int = 4
    """Tiles of A in flight."""
    out_columns: int = 64
    """Columns of y that are stored at once."""
    out_buffers: int = 2
    """Stores in flight for each warpgroup."""
    overlap: bool = False
    """Whether a tile is stored during the first K steps of the next."""
    quarters: int = 1
    """Up to so many pages, the shrinks of four parts of K stay apart: each is a page more to expand,
    but four blocks of threads share the shrink."""
    halves: int = 4
    """The same for two parts of K."""


def tuning(rows: int, width: int, part_sizes: tuple[int, ...], sms: int) -> Tuning:
    """Tile sizes for [rows, width] @ [width, sum(part_sizes)]; NotImplementedError if none fit."""
    parts, total = len(part_sizes), sum(part_sizes)
    fits = [bn for bn in (256, 128, 64) if all(size % bn == 0 for size in part_sizes)]
    if not fits or width % BK:
        raise NotImplementedError(
            f"parts {part_sizes} and K={width}: every part and K must be multiples of 64"
        )
    blocks = -(-rows // BM)
    if rows > 256:
        bn = max(fits, key=lambda bn: _efficiency(rows, total, bn, sms))
        far = width > 8192  # x of a span does not stay in L2
        made = Tuning(
            bn=bn, stages=4 if bn == 256 else 6, overlap=width // BK >= 16,
            cluster=2 if far else 1, quarters=2 if parts == 1 else 1,
        )  # fmt: skip
        made = dataclasses.replace(made, span=_span(made, blocks, total // made.bn, sms))
    elif fits[0] == 256 and blocks * total // 256 >= 0.75 * sms:
        made = Tuning(bn=256, stages=4, cluster=2, group=max(1, 3 - parts))
    else:
        bn = min(128, fits[0])
        tiles = blocks * total // bn
        steps = width // BK
        split = max(s for s in (1, 2, 4) if s == 1 or (tiles * s <= sms and steps % (16 * s) == 0))
        made = Tuning(bn=bn, stages=6, split=split, group=max(1, 3 - parts))
        if split > 1:
            made = dataclasses.replace(made, out_columns=32, a_stages=3)
    while made.stages > 2 and shared_bytes(made, parts) > SHARED_BYTES:
        made = dataclasses.replace(made, stages=made.stages - 1)
    return made


def worth_it(rows: int, part_sizes: tuple[int, ...], sms: int) -> bool:
    """Whether the kernel is expected to beat XLA's matmuls with LoRA (0.84 of those without), from
    how full the last round of tiles is. Measured at 256 and 2048 rows only."""
    fits = [bn for bn in (256, 128, 64) if all(size % bn == 0 for size in part_sizes)]
    most = max((_efficiency(rows, sum(part_sizes), bn, sms) for bn in fits), default=0.0)
    return rows <= 256 or most > 0.83


def _efficiency(rows: int, total: int, bn: int, sms: int) -> float:
    """The share of a launch in which the multiplying warpgroups are busy."""
    tiles = -(-rows // BM) * total // bn
    return tiles / (-(-tiles // sms) * sms) * {256: 1.0, 128: 0.87, 64: 0.6}[bn]


def _span(t: Tuning, blocks: int, columns: int, sms: int) -> int:
    """Row blocks of a group, about 16 x 128 rows, such that at least four tiles of every row block
    come in the round in which it first occurs (see Wide.tile): they share its shrink."""
    blocks, workers = -(-blocks // t.cluster), sms // t.cluster

    def fewest(span: int) -> int:
        least = columns
        for m in range(blocks):
            group = m // span
            begin = group * span * columns + m - group * span
            left = workers - begin % workers
            least = min(least, -(-left // min(span, blocks - group * span)))
        return min(4, least)

    wanted = 16 // t.cluster
    near = sorted(range(wanted // 2, 2 * wanted + 1), key=lambda span: abs(span - wanted))
    return max(near, key=fewest)


def shared_bytes(t: Tuning, parts: int) -> int:
    """Shared memory of one block of threads."""
    tiles = 2 * t.stages * (BM + t.bn) * BK
    shrink = 2 * t.a_stages * t.group * parts * PAGE * BK
    out = WGS * t.out_buffers * 64 * t.out_columns * (2 if t.split == 1 else 4)
    shared = t.split == 1 and t.out_columns == BK and shrink <= out
    return tiles + (out if shared else shrink + out)
