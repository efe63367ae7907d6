"""What merging does to each tensor of a checkpoint: the one place to add a kind of adapter.

A `Change` turns rows of a base tensor (float32) into rows of the result. LoRA adds a product;
DoRA would scale the rows of W + BA, a trained bias or a module of modules_to_save would take the
rows' place, LoRA on embeddings is a `LoraChange` on EMBED or HEAD (a tied base is untied for it by
`checkpoint.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from numpy import ndarray

from jlora.export.combine import Place
from jlora.export.svd import Pair
from jlora.models.weights import tensor_name

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Change(Protocol):
    """Of one tensor."""

    def rows(self, weight: Float[ndarray, "n ..."], start: int) -> Float[ndarray, "n ..."]:
        """The new rows from `start` on, given the base's."""
        ...


Changes = Mapping[str, Callable[[], Change]]
"""Tensor name -> what makes its change when the tensor's turn comes: one is in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LoraChange:
    """W + B A."""

    pair: Pair

    def rows(self, weight: Float[ndarray, "n K"], start: int) -> Float[ndarray, "n K"]:
        """The sum, for rows from `start` on."""
        return weight + self.pair.b[start : start + len(weight)] @ self.pair.a


def lora_changes(pairs: Mapping[Place, Callable[[], Pair]]) -> Changes:
    """The changes of a combined delta (`combine.combine`)."""

    def maker(make: Callable[[], Pair]) -> Callable[[], Change]:
        return lambda: LoraChange(pair=make())

    return {tensor_name(layer, name): maker(make) for (layer, name), make in pairs.items()}
