"""What merging does to each tensor of a checkpoint: the one place to add a kind of adapter.

A `Change` turns rows of a base tensor (float32) into rows of the result. Places in layers and the
two ends of the model become tensor names here; a tied base is untied by `checkpoint.py` where one
end changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from jlora.adapters.adapter import NO_LAYER, Adapter, OutputVectors, is_norm
from jlora.errors import AdapterError
from jlora.export.combine import Place, Recipe, combine
from jlora.export.svd import Pair
from jlora.models.weights import norm_name, tensor_name

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}

Rows = Float[np.ndarray, "n ..."]


class Change(Protocol):
    """Of one tensor."""

    def rows(self, weight: Rows, start: int) -> Rows:
        """The new rows from `start` on, given the base's."""
        ...


Changes = Mapping[str, Callable[[], Change]]
"""Tensor name -> what makes its change when the tensor's turn comes: one is in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LoraChange:
    """(W + B A), each output times its scale. In a table (embed_tokens: [in, out]) outputs are columns."""

    pair: Pair | None
    scale: Float[np.ndarray, " N"] | None = None
    """DoRA's."""
    table: bool = False

    def rows(self, weight: Rows, start: int) -> Rows:
        """The product's rows are those of B, in a table those of A transposed."""
        here, merged = slice(start, start + len(weight)), weight
        if self.pair is not None:
            a, b = self.pair.a, self.pair.b
            merged = weight + (a[:, here].T @ b.T if self.table else b[here] @ a)
        if self.scale is None:
            return merged
        return merged * (self.scale if self.table else self.scale[here, None])


@dataclass(frozen=True, kw_only=True)
class SumChange:
    """The base and the weighted sum of what several changes make of it."""

    changes: Sequence[Change]
    weights: Sequence[float]

    def rows(self, weight: Rows, start: int) -> Rows:
        """W + sum of weight · (change(W) - W)."""
        total = weight.copy()
        for change, share in zip(self.changes, self.weights, strict=True):
            total += np.float32(share) * (change.rows(weight, start) - weight)
        return total


@dataclass(frozen=True, kw_only=True)
class OffsetChange:
    """A bias or a norm, and what is added to it."""

    offset: Float[np.ndarray, " N"]

    def rows(self, weight: Rows, start: int) -> Rows:
        """The sum."""
        return weight + self.offset[start : start + len(weight)]


def name_of(place: Place, kind: str = "weight") -> str:
    """The checkpoint's name of a place's weight or bias; a norm has the one tensor."""
    layer, projection = place
    if is_norm(projection):
        return norm_name(layer, projection)
    if layer == NO_LAYER:
        return f"{_ENDS[projection]}.{kind}"
    return tensor_name(layer, projection, kind)


def lora_changes(pairs: Mapping[Place, Callable[[], Pair]]) -> dict[str, Callable[[], Change]]:
    """The changes of a combined delta (`combine.combine`)."""

    def maker(place: Place, make: Callable[[], Pair]) -> Callable[[], Change]:
        return lambda: LoraChange(pair=make(), table=place[1] == "embed_tokens")

    return {name_of(place): maker(place, make) for place, make in pairs.items()}


def changes(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> dict[str, Callable[[], Change]]:
    """What the adapters together do to the base. Scales (DoRA) and offsets (biases) join in `cat`
    alone: the weighted sum of what each adapter changes. AdapterError otherwise."""
    made = lora_changes(combine(adapters, weights, recipe))
    for place in sorted({place for adapter in adapters for place in adapter.vectors}):
        if recipe.combination != "cat":
            raise AdapterError(
                f"{name_of(place)} is changed by DoRA, a bias or a trained norm, which combination-type "
                f"{recipe.combination} cannot join; cat can"
            )
        here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True)]
        vectors = [adapter.vectors.get(place) or OutputVectors() for adapter in adapters]
        if any(own.scale is not None for own in vectors):
            made[name_of(place)] = _scaled(here, place)
        offsets = [
            (own.offset, w)
            for own, w in zip(vectors, weights, strict=True)
            if own.offset is not None
        ]
        if offsets:
            made[name_of(place, "bias")] = _offset(offsets)
    return made


def _scaled(here: Sequence[tuple[Adapter, float]], place: Place) -> Callable[[], Change]:
    def make() -> Change:
        parts = []
        for adapter, _ in here:
            alone = combine([adapter], [1.0], Recipe()).get(place)
            own = adapter.vectors.get(place) or OutputVectors()
            pair = alone() if alone is not None else None
            table = place[1] == "embed_tokens"
            parts.append(LoraChange(pair=pair, scale=own.scale, table=table))
        return SumChange(changes=parts, weights=[weight for _, weight in here])

    return make


def _offset(
    offsets: Sequence[tuple[Float[np.ndarray, " N"], float]],
) -> Callable[[], Change]:
    total = np.sum([np.float32(weight) * offset for offset, weight in offsets], axis=0)
    return lambda: OffsetChange(offset=total)
