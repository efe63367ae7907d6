"""What PEFT says relative to the base, turned into pairs, scales and offsets.

DoRA (Liu et al. 2024): scale = magnitude / norm of each output row of W + sBA. Replaced biases and
weights and new token rows: the difference from the base's own. PiSSA (Meng et al. 2024) and OLoRA
(Buyukakyuz 2024) saved raw: their start values come off again as a second pair.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from jlora.adapters.adapter import LoraWeights
from jlora.adapters.keys import VOCABULARY, Place


class Base(Protocol):
    """The base's weights (see `jlora.models.base.BaseWeights`)."""

    def blocks(self, layer: int, projection: str) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values) of a weight: [out, in], for embed_tokens [vocab, embed]."""
        ...

    def weight(self, layer: int, projection: str) -> np.ndarray:
        """The whole weight."""
        ...

    def rows(self, layer: int, projection: str, index: np.ndarray) -> np.ndarray:
        """Some rows of a weight."""
        ...

    def norm(self, layer: int, name: str) -> np.ndarray:
        """The weight of a norm."""
        ...

    def bias(self, layer: int, projection: str) -> np.ndarray | None:
        """The bias, if there is one."""
        ...


def dora_scale(
    base: Base, place: Place, pair: LoraWeights, magnitude: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """magnitude over the norm of W + sBA, taken for each output over all inputs."""
    a, b = pair.a.astype(np.float32), pair.b.astype(np.float32) * np.float32(pair.scaling)
    table = place[1] == VOCABULARY[0]  # embed_tokens is stored [in, out]
    squares = np.zeros(b.shape[0], np.float64)
    for rows, block in base.blocks(*place):
        if table:
            merged = block + a[:, rows].T @ b.T
            squares += np.sum(np.square(merged, dtype=np.float64), axis=0)
        else:
            merged = block + b[rows] @ a
            squares[rows] = np.sum(np.square(merged, dtype=np.float64), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude.astype(np.float64) / np.sqrt(squares)).astype(np.float32)


def replaced_weight(
    base: Base, place: Place, new: Float[np.ndarray, "rows columns"]
) -> LoraWeights:
    """A whole new weight as a pair of full rank: the difference, and an identity."""
    delta: np.ndarray = np.empty(new.shape, np.float32)
    for rows, block in base.blocks(*place):
        delta[rows] = new[rows].astype(np.float32) - block
    out_in: np.ndarray = delta.T if place[1] == VOCABULARY[0] else delta
    n, k = out_in.shape
    eye = np.eye(min(n, k), dtype=np.float32)
    a, b = (eye, out_in) if k <= n else (out_in, eye)
    return LoraWeights(a=np.ascontiguousarray(a), b=b, rank=len(eye), scaling=1.0)


def is_copy(base: Base, place: Place, new: np.ndarray) -> bool:
    """Whether a stored weight is the base's own, as far as the stored type can tell."""
    return all(
        np.array_equal(new[rows], block.astype(new.dtype)) for rows, block in base.blocks(*place)
    )


def token_rows(
    base: Base, place: Place, index: Sequence[int], new: Float[np.ndarray, "n D"], vocab: int
) -> LoraWeights:
    """New rows of embed_tokens or lm_head as a pair: one rank for each token."""
    delta = new.astype(np.float32) - base.rows(*place, np.asarray(index))
    hot = np.zeros((len(index), vocab), np.float32)
    hot[np.arange(len(index)), index] = 1
    if place[1] == VOCABULARY[0]:
        a, b = hot, delta.T
    else:
        a, b = delta, hot.T
    return LoraWeights(a=a, b=b, rank=len(index), scaling=1.0)


def start_values(base: Base, place: Place, init: str, pair: LoraWeights) -> LoraWeights:
    """Minus what PiSSA or OLoRA took out of the base before training, at the pair's rank."""
    weight = base.weight(*place).astype(np.float64)
    rank = pair.rank
    if init == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        a, b = right[:rank].astype(np.float32), left[:, :rank] * -values[:rank]
        return LoraWeights(a=a, b=b.astype(np.float32), rank=rank, scaling=1.0)
    assert init == "olora", init
    q, r = np.linalg.qr(weight)
    a, b = r[:rank].astype(np.float32), -q[:, :rank].astype(np.float32)
    return LoraWeights(a=a, b=b, rank=rank, scaling=pair.scaling)


def joined(pairs: Sequence[LoraWeights]) -> LoraWeights:
    """The sum of several pairs as one, their scalings folded in where they differ."""
    if len(pairs) == 1:
        return pairs[0]
    scalings = {pair.scaling for pair in pairs}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    factors = [np.float32(pair.scaling / scaling) if scaling else np.float32(1) for pair in pairs]
    a = np.concatenate([pair.a.astype(np.float32) for pair in pairs])
    b = [pair.b.astype(np.float32) * f for pair, f in zip(pairs, factors, strict=True)]
    return LoraWeights(a=a, b=np.concatenate(b, axis=1), rank=len(a), scaling=scaling)
