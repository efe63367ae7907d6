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
    rotate: bool = True
    """Whether tiles that shrink begin with the part of K that they shrink: u is there in time, but the
    tiles of a row block read x at different places. Else it comes in order, and u at the end."""
    overlap: bool = False
    """Whether a tile is stored during the first K steps of the next."""
    quarters: int = 1
    """Up to so many pages x split, the shrinks of four parts of K stay apart: each is a page more to
    expand, but four blocks share the shrink."""
    halves: int = 4
    """The same for two parts of K."""


def tuning(rows: int, width: int, part_sizes: tuple[int, ...], sms: int) -> Tuning:
    """Tile sizes for [rows, width] @ [width, sum(part_sizes)]; NotImplementedError if none fit."""
    parts = len(part_sizes)
    fits = [bn for bn in (256, 128, 64) if all(size % bn == 0 for size in part_sizes)]
    if not fits or width % 256:
        raise NotImplementedError(
            f"parts {part_sizes} and K={width}: every part must be a multiple of 64, K of 256"
        )
    made = Tuning(bn=fits[0], stages=4)
    while made.stages > 2 and shared_bytes(made, parts) > SHARED_BYTES:
        made = dataclasses.replace(made, stages=made.stages - 1)
    return made


def shared_bytes(t: Tuning, parts: int) -> int:
    """Shared memory of one block of threads."""
    tiles = 2 * t.stages * (BM + t.bn) * BK
    shrink = 2 * t.a_stages * t.group * parts * PAGE * BK
    out = WGS * t.out_buffers * 64 * t.out_columns * (2 if t.split == 1 else 4)
    shared = t.split == 1 and t.out_columns == BK and shrink <= out
    return tiles + (out if shared else shrink + out)
