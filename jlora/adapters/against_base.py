"""What PEFT says relative to the base, turned into pairs, scales and offsets.

DoRA (Liu et al. 2024): scale = magnitude / norm of each output row of W + sBA. Replaced biases and
weights and new token rows: the difference from the base's own. PiSSA (Meng et al. 2024) and OLoRA
(Buyukakyuz 2024) saved raw: their start values come off again as a second pair.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    """A whole new weight of a layer as a pair of full rank: the difference, and an identity."""
    delta: np.ndarray = np.empty(new.shape, np.float32)
    for rows, block in base.blocks(*place):
        delta[rows] = new[rows].astype(np.float32) - block
    return _of_full_rank(delta)


def _of_full_rank(out_in: Float[np.ndarray, "N K"]) -> LoraWeights:
    n, k = out_in.shape
    eye = np.eye(min(n, k), dtype=np.float32)
    a, b = (eye, out_in) if k <= n else (out_in, eye)
    return LoraWeights(a=np.ascontiguousarray(a), b=b, rank=len(eye), scaling=1.0)


def replaced_rows(
    base: Base, place: Place, new: Float[np.ndarray, "vocab D"], *, rounded: bool = False
) -> LoraWeights | None:
    """The rows of a whole embedding or head that are not the base's, as a pair: of one rank for each,
    or of full rank if that is less; None where all are the base's. Rows beyond the base's are new.

    `rounded`: a row is the base's own if it is so in the stored type."""
    delta, changed = new.astype(np.float32), np.ones(len(new), bool)
    for rows, block in base.blocks(*place):
        delta[rows] -= block
        old = block.astype(new.dtype) if rounded else block
        changed[rows] = (new[rows] != old).any(axis=1)
    index = np.flatnonzero(changed)
    if len(index) >= min(new.shape):
        return _of_full_rank(delta.T if place[1] == VOCABULARY[0] else delta)
    return rows_pair(place, index, delta[index], len(new)) if len(index) else None


class Resized:
    """A base with the rows that an adapter brings for tokens of its own."""

    def __init__(self, base: Base, vocab: int, rows: Mapping[str, Float[np.ndarray, "n D"]]):
        """`rows` of embed_tokens and lm_head, from the base's `vocab` on."""
        self._base, self._vocab, self._rows = base, vocab, rows

    def blocks(self, layer: int, projection: str) -> Iterator[tuple[slice, np.ndarray]]:
        yield from self._base.blocks(layer, projection)
        if (more := self._rows.get(projection)) is not None:
            yield slice(self._vocab, self._vocab + len(more)), more

    def weight(self, layer: int, projection: str) -> np.ndarray:
        return np.concatenate([block for _, block in self.blocks(layer, projection)])

    def rows(self, layer: int, projection: str, index: np.ndarray) -> np.ndarray:
        more, known = self._rows.get(projection), index < self._vocab
        if more is None or known.all():
            return self._base.rows(layer, projection, index)
        found = np.empty((len(index), more.shape[1]), np.float32)
        if known.any():
            found[known] = self._base.rows(layer, projection, index[known])
        found[~known] = more[index[~known] - self._vocab]
        return found

    def norm(self, layer: int, name: str) -> np.ndarray:
        return self._base.norm(layer, name)

    def bias(self, layer: int, projection: str) -> np.ndarray | None:
        return self._base.bias(layer, projection)


def token_rows(
    base: Base, place: Place, index: Sequence[int], new: Float[np.ndarray, "n D"], vocab: int
) -> LoraWeights:
    """New rows of embed_tokens or lm_head as a pair: one rank for each token."""
    delta = new.astype(np.float32) - base.rows(*place, np.asarray(index))
    return rows_pair(place, np.asarray(index), delta, vocab)


def rows_pair(
    place: Place, index: np.ndarray, delta: Float[np.ndarray, "n D"], vocab: int
) -> LoraWeights:
    """What is added to some rows of embed_tokens or lm_head, as a pair."""
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
