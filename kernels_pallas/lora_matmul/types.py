"""The two device pytrees of a LoRA matmul: rank pages in memory, and which rows use which pages.

Both are built on the host. `Segments` is made once a step and shared by every layer and group.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

PAGE = 16
"""Rank rows of one page unless a pool says otherwise: the depth of one tensor-core step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankPool:
    """Rank pages of one layer and one projection group. Page 0 is all zeros: padding points at it."""

    a: Float[Array, "P parts*page K"]
    """Rows `page*j:page*(j+1)` of a page shrink for part j. `page` is 16 for the Hopper kernel and
    any number for the other implementations."""

    b: Float[Array, "P page N"]
    """Columns of part j expand part j's values. Scaling (alpha/r ...) is folded in."""

    scale: Float[Array, "P N"] | None = None
    """What `lora_epilogue` multiplies the rows of a page's owner with (DoRA): the same on all pages
    of an adapter. None: nothing; this pool's users never need it."""

    offset: Float[Array, "P N"] | None = None
    """What `lora_epilogue` adds then (biases); there where `scale` is. Alone, with empty a and b: a
    pool of vectors (`lora_vectors`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivePages:
    """A copy of the pages that a step uses, laid out for plain dots (see `xla.active_pages`)."""

    a: Float[Array, "parts Pa*page K"]
    b: tuple[Float[Array, "Pa*page part"], ...]
    scale: Float[Array, "Pa N"] | None = None
    offset: Float[Array, "Pa N"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """Which rank pages are active in a step, whose they are, and which adapter each row uses.

    Rows of one adapter are contiguous within each of two regions (decode rows, then prefill
    rows), in adapter order within a region; pages are in adapter order. A backend may use that
    order for speed: results do not depend on it.
    """

    pages: Int[Array, " Pa"]
    """Pool pages active in this step; padding comes last and is 0, the all-zero page."""

    owner: Int[Array, " Pa"]
    """The batch-local adapter number of each page; -1 for padding."""

    adapter: Int[Array, " T"]
    """The batch-local adapter number of each row; -1 for a base row."""
