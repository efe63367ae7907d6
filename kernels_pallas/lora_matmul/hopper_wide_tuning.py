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
MOST_SLICES = 32
"""Parts of K in the shrink: each is read again for the sum."""
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
    early: int = 1
    """K steps before the expand steps after which u is waited for."""
    alone: int = 3
    """K steps of a block's first tile before its units of the shrink, or the sums of slices of u: reads
    that depend on one another, and others' slices, are under way meanwhile."""
    out_columns: int = 64
    """Columns of y that are stored at once."""
    out_buffers: int = 2
    """Stores in flight for each warpgroup."""
    overlap: bool = False
    """Whether a tile is stored during the first K steps of the next."""

    def group(self, parts: int) -> int:
        """Rank pages that share a read of x in the shrink: their A fits into a tile of w."""
        return max(g for g in (1, 2, CHUNK) if g == 1 or g * parts * PAGE <= min(self.bn, 128))


def tuning(rows: int, width: int, part_sizes: tuple[int, ...], sms: int) -> Tuning:
    """Tile sizes for [rows, width] @ [width, sum(part_sizes)]; NotImplementedError if none fit."""
    total = sum(part_sizes)
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
            cluster=2 if far else 1, span=8 if far else 16,
        )  # fmt: skip
    elif fits[0] == 256 and blocks * total // 256 >= 0.75 * sms:
        made = Tuning(bn=256, stages=4, cluster=1 + (blocks % 2 == 0))
    else:
        bn = min(128, fits[0])
        tiles, steps = blocks * total // bn, width // BK
        splits = [s for s in (2, 4) if tiles * s <= sms and not steps % s and steps // s >= 32]
        # What follows a product of one part sums on its way (add_norm).
        split = max(splits, default=1) if len(part_sizes) == 1 else 1
        made = Tuning(bn=bn, stages=6, split=split, out_columns=64 if split == 1 else 32)
    while made.stages > 2 and shared_bytes(made) > SHARED_BYTES:
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


def shared_bytes(t: Tuning) -> int:
    """Shared memory of one block of threads."""
    out = WGS * t.out_buffers * 64 * t.out_columns * (2 if t.split == 1 else 4)
    return 2 * t.stages * (BM + t.bn) * BK + out
