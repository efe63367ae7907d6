"""Weighted mixes of adapters: `"a*0.7+b*0.3"` in a request's `model`.

A mix is the exact sum of its adapters' deltas: their pairs one after the other, each with its
weight. Scales (DoRA) do not add up; a mix of such adapters is refused.
"""

import hashlib
import math
import re
from collections.abc import Collection, Sequence

import numpy as np

from jlora.adapters.adapter import Adapter, LoraWeights, OutputVectors
from jlora.adapters.against_base import joined
from jlora.errors import AdapterError

MAX_TERMS = 16

_NUMBER = r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?"
_WEIGHTED = re.compile(rf"(?P<name>.+?)\*(?P<weight>{_NUMBER})")


def looks_like_mix(model: str) -> bool:
    """Whether a model's name may be a mix rather than a name."""
    return "*" in model or "+" in model


def parse_mix(model: str, known: Collection[str]) -> tuple[tuple[str, float], ...] | None:
    """(adapter, weight) of each term; None where it is no mix of known adapters.

    A term is `name*weight` or `name` alone, which weighs 1. AdapterError for weights that are not
    finite, more than MAX_TERMS terms, or a name that comes twice.
    """
    terms: list[tuple[str, float]] = []
    for text in re.split(r"(?<![eE*])\+", model):
        match = _WEIGHTED.fullmatch(text.strip())
        name, weight = (
            (match["name"].strip(), float(match["weight"])) if match else (text.strip(), 1.0)
        )
        if name not in known:
            return None
        terms.append((name, weight))
    if len(terms) > MAX_TERMS:
        raise AdapterError(f"a mix has at most {MAX_TERMS} adapters, got {len(terms)}")
    if len({name for name, _ in terms}) < len(terms):
        raise AdapterError(f"the mix {model[:200]!r} names an adapter twice")
    if not all(math.isfinite(weight) and abs(weight) <= 1e6 for _, weight in terms):
        raise AdapterError(f"the weights of {model[:200]!r} must lie between -1e6 and 1e6")
    return tuple(terms)


def canonical(terms: Sequence[tuple[str, float]]) -> str:
    """One spelling of a mix."""
    return "+".join(f"{name}*{weight:g}" for name, weight in terms)


def mixed(name: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum. Raises AdapterError where one of them scales outputs (DoRA)."""
    pairs: dict[tuple[int, str], list[LoraWeights]] = {}
    offsets: dict[tuple[int, str], np.ndarray] = {}
    digest = hashlib.sha256(b"jlora mix 1\n")
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.added_tokens:
            raise AdapterError(
                f"{adapter.path} adds {adapter.added_tokens} tokens, which mean nothing to the others: "
                "it cannot be mixed"
            )
        digest.update(f"{adapter.uid} {float(weight).hex()}\n".encode())
        for place, pair in adapter.weights.items():
            scaled = LoraWeights(a=pair.a, b=pair.b, rank=pair.rank, scaling=pair.scaling * weight)
            pairs.setdefault(place, []).append(scaled)
        for place, own in adapter.vectors.items():
            if own.scale is not None:
                raise AdapterError(
                    f"{adapter.path} is a DoRA adapter, which scales {place[1]}: scales do not add up, "
                    "so it cannot be mixed"
                )
            if own.offset is not None:
                offsets[place] = offsets.get(place, np.float32(0)) + np.float32(weight) * own.offset
    weighed = {place: joined(own) for place, own in pairs.items()}
    return Adapter(
        uid=digest.hexdigest(),
        path=name,
        base_model=adapters[0].base_model,
        rank=max((pair.rank for pair in weighed.values()), default=0),
        weights=weighed,
        vectors={place: OutputVectors(offset=offset) for place, offset in offsets.items()},
        chat_template=None,
    )
