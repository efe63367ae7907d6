"""How much an adapter changes each weight: `describe`, or without the base `unbound`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora.adapters.adapter import NO_LAYER, Adapter, LoraWeights, is_norm, shown_module
from jlora.adapters.lora_config import LoraConfig
from jlora.adapters.peft import open_weights
from jlora.adapters.tensors import TensorInfo, read_tensor
from jlora.export.changes import LoraChange
from jlora.export.svd import Pair
from jlora.models.base import BaseWeights
from jlora.models.config import MODULES, NORMS, VOCAB_GROUPS

NAMES = (*MODULES, *(part for parts in VOCAB_GROUPS.values() for part in parts), *NORMS)
"""All that an adapter may change, in the model's order."""

_HALF = re.compile(
    r"(?P<module>[^\n]+)\.lora_(?P<table>embedding_)?(?P<half>[AB])(?:\.(?!weight$)[A-Za-z0-9_-]+)?(?:\.weight)?"
)
_STACK = re.compile(r"([^\n]+\.experts)(?:\.base_layer)?")
_LAYER = re.compile(r"\.([0-9]{1,6})\.")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of all layers."""

    name: str
    """The experts of a layer count as one."""
    layers: int
    modules: int
    """In all layers; more than these where there are experts."""
    numbers: tuple[int, ...]
    """The layers, ascending; -1 for what is in none."""
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    parameters: int
    """Of the pairs, or of a norm."""
    norms: tuple[float, ...]
    """Frobenius norm of the change of the weight, by layer."""
    shares: tuple[float, ...]
    """The same as a share of the base weight's norm; empty if the base is not known."""
    dora: bool
    """Outputs are scaled."""
    biases: int
    """Layers in which its bias changes."""


def describe(adapter: Adapter, base: BaseWeights) -> list[Projection]:
    """One entry for each projection that the adapter touches, in the model's order."""
    rows, named = [], dict[str, list[tuple[int, str]]]()
    for place in sorted(adapter.touched):
        named.setdefault(shown_module(place[1]), []).append(place)
    for name in sorted(named, key=_order):
        places = named[name]
        pairs = [adapter.weights[place] for place in places if place in adapter.weights]
        own = [adapter.vectors[place] for place in places if place in adapter.vectors]
        sizes = _by_layer([(place[0], *_sizes(adapter, place, base)) for place in places])
        trained_norm = is_norm(name)
        rows.append(
            Projection(
                name=name,
                layers=len(sizes),
                modules=len(places),
                numbers=tuple(sizes),
                ranks=tuple(sorted({pair.rank for pair in pairs})),
                scalings=tuple(sorted({pair.scaling for pair in pairs})),
                parameters=sum(pair.a.size + pair.b.size for pair in pairs)
                + sum(one.offset.size for one in own if trained_norm and one.offset is not None),
                norms=tuple(change for change, _ in sizes.values()),
                shares=tuple(change / whole if whole else 0.0 for change, whole in sizes.values()),
                dora=any(vectors.scale is not None for vectors in own),
                biases=0 if trained_norm else sum(one.offset is not None for one in own),
            )
        )
    return rows


def _order(name: str) -> tuple[int, str]:
    """The model's order; routers and experts come last."""
    return (NAMES.index(name) if name in NAMES else len(NAMES)), name


def _by_layer(sizes: Sequence[tuple[int, float, float]]) -> dict[int, tuple[float, float]]:
    """(layer, norm of the change, of the weight) of modules -> both of each layer's modules together."""
    squares: dict[int, tuple[float, float]] = {}
    for layer, change, whole in sizes:
        before = squares.get(layer, (0.0, 0.0))
        squares[layer] = before[0] + change**2, before[1] + whole**2
    return {layer: (change**0.5, whole**0.5) for layer, (change, whole) in squares.items()}


def _sizes(adapter: Adapter, place: tuple[int, str], base: BaseWeights) -> tuple[float, float]:
    """Norm of a weight's change, and of the weight."""
    pair, own = adapter.weights.get(place), adapter.vectors.get(place)
    if is_norm(place[1]):
        assert own is not None
        assert own.offset is not None
        return float(np.linalg.norm(own.offset)), float(np.linalg.norm(base.norm(*place)))
    scale = own.scale if own is not None else None
    folded = None
    if pair is not None and scale is not None:
        b = pair.b.astype(np.float32) * np.float32(pair.scaling)
        folded = Pair(a=pair.a.astype(np.float32), b=b)
    change = LoraChange(pair=folded, scale=scale, table=place[1] == "embed_tokens")
    whole = moved = 0.0
    for rows, block in base.blocks(*place):
        whole += float(np.sum(np.square(block, dtype=np.float64)))
        if scale is not None:  # not of low rank: there is no way around the whole weight
            difference = change.rows(block, rows.start) - block
            moved += float(np.sum(np.square(difference, dtype=np.float64)))
    if scale is None:
        return (delta_norm(pair) if pair is not None else 0.0), whole**0.5
    return moved**0.5, whole**0.5


def delta_norm(pair: LoraWeights) -> float:
    """Frobenius norm of scaling · B A, from two rank x rank products: B A is never made."""
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    square = float(np.sum((a @ a.T) * (b.T @ b)))
    return abs(pair.scaling) * max(square, 0.0) ** 0.5


def unbound(folder: Path, config: LoraConfig) -> list[Projection]:
    """What can be said without the base, or of an adapter that is refused: its whole pairs, by the
    last word of their modules' names."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    found: dict[str, list[tuple[int, LoraWeights]]] = {}
    with open_weights(folder) as (file, path, header):
        for key, info in header.items():
            match = _HALF.fullmatch(key)
            if match is not None and len(info.shape) == 2:
                halves.setdefault(match["module"], {})[match["half"]] = info
        for module, pair in halves.items():
            if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
                continue
            a, b = (read_tensor(file, path, pair[half]) for half in "AB")
            name, experts = module.removeprefix("base_model.model."), 1
            if stacked := _STACK.fullmatch(name):
                name = f"{stacked[1]}.{_parameter(module, halves, config)}"
                experts = max(1, len(a) // config.rank_of(name))
            rank = len(a) // experts
            scaling = config.scaling_of(name, rank)
            number = _LAYER.search(module)
            layer, short = int(number[1]) if number else NO_LAYER, name.rsplit(".", 1)[-1]
            for expert in range(experts):
                own = a[expert * rank : (expert + 1) * rank]
                pair_of_one = LoraWeights(
                    a=own, b=b[:, expert::experts], rank=rank, scaling=scaling
                )
                found.setdefault(short, []).append((layer, pair_of_one))
    return [_unbound(name, pairs) for name, pairs in sorted(found.items())]


def _parameter(module: str, halves: Mapping[str, object], config: LoraConfig) -> str:
    """The parameter that a stack of all experts' pairs is of (see adapters/stacked.py)."""
    if module.endswith(".base_layer") or f"{module}.base_layer" in halves:
        return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"
    named = (name.rpartition(".")[2] for name in config.parameters)
    return next((name for name in named if name in ("gate_up_proj", "down_proj")), "experts")


def _unbound(name: str, pairs: Sequence[tuple[int, LoraWeights]]) -> Projection:
    ordered = sorted(pairs, key=lambda item: item[0])
    sizes = _by_layer([(layer, delta_norm(pair), 0.0) for layer, pair in ordered])
    return Projection(
        name=name,
        layers=len(sizes),
        modules=len(ordered),
        numbers=tuple(sizes),
        ranks=tuple(sorted({pair.rank for _, pair in ordered})),
        scalings=tuple(sorted({pair.scaling for _, pair in ordered})),
        parameters=sum(pair.a.size + pair.b.size for _, pair in ordered),
        norms=tuple(change for change, _ in sizes.values()),
        shares=(),
        dora=False,
        biases=0,
    )
