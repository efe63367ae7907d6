"""The device's view of one step: `Batch`, and how it travels as a single int32 array.

Tokens are flat. The first `decode` tokens are decode rows (one token of one sequence each); the
rest are prefill blocks of `block` tokens, each block of one sequence, its tail padded. Rows of one
adapter are contiguous in either region. Invariant: a padding token has position -1, writes its
K/V to the trash page 0 and belongs to no adapter; a padding row uses the trash slot.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jlora.shape import Shape
from kernels_pallas.lora_matmul import Segments


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """All that a step needs to know about its rows. Row r < decode is token r; row decode + j is
    prefill block j, tokens decode + j·block and on."""

    tokens: Int[Array, "T"]
    """Input ids; -1: the token that the row's slot sampled in the step before."""
    positions: Int[Array, "T"]
    """Position of each token in its sequence; -1: padding."""
    slots: Int[Array, "B"]
    """Sequence slot of each row (device state of sampling); padding rows use the trash slot."""
    last: Int[Array, "B"]
    """Index into T of the token whose logits row b samples from."""
    samples: Int[Array, "B"]
    """1 where the row's sampled token counts (a prefill block inside a prompt samples nothing)."""
    tables: Int[Array, "B W"]
    """KV page of each `page_size` positions of the row's sequence; unused entries are page 0."""
    adapter: Int[Array, "T"]
    """Batch-local adapter number of each token; -1: base. Empty without LoRA."""
    pages: Int[Array, "Pa"]
    """Rank pages active in this step, padded with page 0."""
    owner: Int[Array, "Pa"]
    """Batch-local adapter number of each active rank page; -1: padding."""

    @property
    def segments(self) -> Segments:
        """The LoRA part, as the kernels take it."""
        return Segments(pages=self.pages, owner=self.owner, adapter=self.adapter)

    @property
    def sampled_segments(self) -> Segments:
        """The same for the B rows that may sample."""
        adapter = self.adapter[self.last] if self.adapter.shape[0] else self.adapter
        return Segments(pages=self.pages, owner=self.owner, adapter=adapter)


def empty(shape: Shape, trash_slot: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A step of padding only, as one int32 array (a step makes one host-to-device transfer), and
    its parts by name: views, for the runner to fill in place."""
    packed = np.zeros(shape.words, np.int32)
    arrays = {}
    for (name, size), start in zip(shape.sizes().items(), shape.starts().values(), strict=True):
        arrays[name] = packed[start : start + prod(size)].reshape(size)
    arrays["positions"][:] = -1
    arrays["adapter"][:] = -1
    arrays["owner"][:] = -1
    arrays["slots"][:] = trash_slot
    return packed, arrays


def unpack(shape: Shape, packed: Int[Array, "words"]) -> Batch:
    """The parts of `empty`'s array, inside the compiled step."""
    starts = shape.starts()
    arrays: dict[str, Any] = {
        name: jnp.reshape(packed[starts[name] : starts[name] + prod(size)], size)
        for name, size in shape.sizes().items()
    }
    assert set(arrays) == {field.name for field in fields(Batch)}
    return Batch(**arrays)
