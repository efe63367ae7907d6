"""Several adapters to one delta for each linear, with the names and the maths of peft.

`cat` is exact: the weighted sum of the deltas. `svd` is the best approximation of that sum by a
rank. The others change values on purpose: on the factors A and B, each with the root of its weight
(`linear`, `ties`, `dare_*`, `magnitude_prune`: quick, needs equal ranks, and the product of sums is
not the sum of products), or on the delta itself (`*_svd`: as the papers have it, then cut to a rank).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Float

from jlora.adapters.adapter import Adapter, LoraWeights
from jlora.errors import AdapterError, ParameterError
from jlora.export.svd import Pair, of_matrix, of_product
from jlora.models.config import FUSED, PROJECTIONS, VOCAB_GROUPS

Combination = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Majority = Literal["total", "frequency"]
Place = tuple[int, str]
"""(layer, projection); NO_LAYER for embed_tokens and lm_head."""
_NAMES = (*PROJECTIONS, *(part for parts in VOCAB_GROUPS.values() for part in parts), *FUSED)
Tensor = Float[np.ndarray, "..."]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How adapters are joined."""

    combination: Combination = "cat"
    density: float | None = None
    """Share of values that pruning keeps."""
    majority: Majority | None = None
    """What elects the sign of a value in ties: the sum of values, or the count of signs. None: total."""
    svd_rank: int | None = None
    """Rank after an SVD. None: the largest of the adapters'."""
    seed: int = 0
    """Of DARE's random choice."""

    def __post_init__(self) -> None:
        kind = self.combination
        if kind not in get_args(Combination):
            raise ParameterError(
                f"combination-type must be one of {', '.join(get_args(Combination))}, got {kind!r}",
                "combination_type",
            )
        if self.prunes and self.density is None:
            raise ParameterError(
                f"combination-type {kind} needs --density, the share of values that it keeps: 0.5",
                "density",
            )
        if not self.prunes and self.density is not None:
            raise ParameterError(
                f"combination-type {kind} keeps all values: no --density", "density"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ParameterError(
                f"--density must be above 0 and at most 1, got {self.density}", "density"
            )
        if self.majority is not None and "ties" not in kind:
            raise ParameterError(
                f"combination-type {kind} elects no signs: no --majority-sign-method",
                "majority_sign_method",
            )
        if self.svd_rank is not None and not kind.endswith("svd"):
            raise ParameterError(f"combination-type {kind} makes no SVD: no --svd-rank", "svd_rank")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ParameterError(f"--svd-rank must be at least 1, got {self.svd_rank}", "svd_rank")

    @property
    def prunes(self) -> bool:
        """Whether values are thrown away."""
        return self.combination.startswith(("ties", "dare", "magnitude_prune"))

    @property
    def on_factors(self) -> bool:
        """Whether A's and B's are joined, each on its own."""
        return self.combination != "cat" and not self.combination.endswith("svd")


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> dict[Place, Callable[[], Pair]]:
    """The combined delta of each (layer, projection) that an adapter touches, made when it is asked for.

    Only adapters that touch a projection count there. Raises AdapterError where factors are to be
    joined and ranks differ.
    """
    made: dict[Place, Callable[[], Pair]] = {}
    rank = recipe.svd_rank or max(adapter.rank for adapter in adapters)
    for key in sorted({key for adapter in adapters for key in adapter.weights}):
        here = [
            (adapter.weights[key], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if key in adapter.weights
        ]
        ranks = {pair.rank for pair, _ in here}
        if recipe.on_factors and len(ranks) > 1:
            raise AdapterError(
                f"combination-type {recipe.combination} needs adapters of one rank: layer {key[0]} "
                f"{key[1]} has ranks {sorted(ranks)}; cat, svd and the types that end in _svd take any"
            )
        made[key] = _maker(here, recipe, rank, key)
    return made


def _maker(
    here: list[tuple[LoraWeights, float]], recipe: Recipe, rank: int, key: Place
) -> Callable[[], Pair]:
    def make() -> Pair:
        # Of the place, not of the order: the same choice whatever else is merged in the run.
        number = _NAMES.index(key[1]) if key[1] in _NAMES else crc32(key[1].encode())
        rng = np.random.default_rng([recipe.seed, key[0] + 1, number])
        if recipe.combination == "cat":
            return _concatenated(here)
        if recipe.combination == "svd":
            return of_product(_concatenated(here), rank)
        if recipe.on_factors:
            return _factors(here, recipe, rng)
        return of_matrix(_delta(here, recipe, rng), rank)

    return make


def _concatenated(here: list[tuple[LoraWeights, float]]) -> Pair:
    a = [pair.a.astype(np.float32) for pair, _ in here]
    b = [pair.b.astype(np.float32) * np.float32(weight * pair.scaling) for pair, weight in here]
    return Pair(a=np.concatenate(a), b=np.concatenate(b, axis=1))


def _factors(
    here: list[tuple[LoraWeights, float]], recipe: Recipe, rng: np.random.Generator
) -> Pair:
    products = [weight * pair.scaling for pair, weight in here]
    roots = [abs(product) ** 0.5 for product in products]
    # The sign goes to A alone: on both sides it would vanish.
    signed = [-r if product < 0 else r for r, product in zip(roots, products, strict=True)]
    return Pair(
        a=join([pair.a.astype(np.float32) for pair, _ in here], signed, recipe, rng),
        b=join([pair.b.astype(np.float32) for pair, _ in here], roots, recipe, rng),
    )


def _delta(
    here: list[tuple[LoraWeights, float]], recipe: Recipe, rng: np.random.Generator
) -> Float[np.ndarray, "N K"]:
    deltas = [
        (pair.b.astype(np.float32) @ pair.a.astype(np.float32)) * np.float32(pair.scaling)
        for pair, _ in here
    ]
    return join(deltas, [weight for _, weight in here], recipe, rng)


def join(
    tasks: Sequence[Tensor], weights: Sequence[float], recipe: Recipe, rng: np.random.Generator
) -> Tensor:
    """Prunes each tensor, then sums them with their weights or, in ties, takes the mean of those
    values whose sign is the elected one.

    The sign is elected before the weights are applied, and weights need not sum to 1: as in peft.
    """
    kind, density = recipe.combination, recipe.density
    if density is not None and density < 1:
        if kind.startswith("dare"):
            tasks = [task * (chosen(task, density, rng) / np.float32(density)) for task in tasks]
        else:
            tasks = [task * largest(task, density) for task in tasks]
    scaled = [task * np.float32(weight) for task, weight in zip(tasks, weights, strict=True)]
    if "ties" not in kind:
        return np.sum(scaled, axis=0)
    votes = [np.sign(task) for task in tasks] if recipe.majority == "frequency" else tasks
    elected = np.where(np.sum(votes, axis=0) >= 0, np.float32(1), np.float32(-1))
    agree = [np.sign(task) == elected for task in tasks]
    total = np.sum([task * mask for task, mask in zip(scaled, agree, strict=True)], axis=0)
    return total / np.maximum(np.sum(agree, axis=0), 1).astype(np.float32)


def largest(task: Tensor, density: float) -> Bool[np.ndarray, "..."]:
    """True for the `int(density · size)` values of largest size; among equal ones, the first."""
    size, count = np.abs(task).reshape(-1), int(density * task.size)
    mask = np.zeros(task.size, bool)
    if count:
        border = np.partition(size, task.size - count)[task.size - count]
        mask = size > border
        mask[np.flatnonzero(size == border)[: count - int(mask.sum())]] = True
    return mask.reshape(task.shape)


def chosen(task: Tensor, density: float, rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
    """True for each value with the probability `density`."""
    return rng.random(task.shape, dtype=np.float32) < density
