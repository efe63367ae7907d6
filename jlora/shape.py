"""Static sizes of a step: what is compiled, and how its arrays are laid out. No jax here."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod

ALIGN = 64
"""int32 words. XLA hands parts of a packed array to kernels as they lie, and a Mosaic GPU kernel
takes no input that is not aligned to 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes of a step. Every distinct one is a compiled program."""

    decode: int
    """Decode rows."""
    prefill: int
    """Prefill tokens, a multiple of `block`."""
    rank_pages: int
    """Rank pages active in the step; 0: the variant without LoRA."""
    block: int
    """Prefill tokens in a block."""
    table: int
    """Entries of a sequence's page table: max_model_len / page_size."""

    @property
    def tokens(self) -> int:
        """T: token rows of the step."""
        return self.decode + self.prefill

    @property
    def blocks(self) -> int:
        """Prefill blocks."""
        return self.prefill // self.block

    @property
    def rows(self) -> int:
        """B: rows that may sample, one per decode row and one per prefill block."""
        return self.decode + self.blocks

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each array of a `Batch`, in the order in which they are packed."""
        return {
            "tokens": (self.tokens,),
            "positions": (self.tokens,),
            "slots": (self.rows,),
            "last": (self.rows,),
            "samples": (self.rows,),
            "tables": (self.rows, self.table),
            "adapter": (self.tokens if self.rank_pages else 0,),
            "pages": (self.rank_pages,),
            "owner": (self.rank_pages,),
        }

    def starts(self) -> dict[str, int]:
        """Where each array begins in the packed one, at multiples of ALIGN words."""
        sizes = self.sizes().values()
        return dict(zip(self.sizes(), accumulate(map(_padded, sizes), initial=0), strict=False))

    @property
    def words(self) -> int:
        """Length of the packed array."""
        return sum(map(_padded, self.sizes().values()))


def _padded(size: tuple[int, ...]) -> int:
    return -(-prod(size) // ALIGN) * ALIGN
