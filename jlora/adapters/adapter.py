"""An adapter in host memory: what it adds to each projection that it touches.

All that PEFT can write comes down to three things: a low-rank pair, a scale and an offset of a
projection's output. Frozen. Its identity is its content: `uid` hashes what changes a result,
never a name or a path.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float

from jlora.models.config import GROUPS, PROJECTIONS, ModelConfig, group_of

NO_LAYER = -1
"""The layer of what is in none: embed_tokens, lm_head and the last norm."""

Feature = Literal["vectors", "norms", "vocabulary", "experts"]
"""What adapters may hold beside pairs on the projections of layers. vectors: scales and offsets of
their outputs (DoRA, biases). norms: trained norms. vocabulary: embed_tokens and lm_head. experts:
pairs on routers and experts of sparse layers."""

Support = frozenset[Feature]
"""What an engine is compiled for: every step with adapters pays for each."""

Level = Literal["plain", "vectors", "norms", "full", "experts"]

LEVELS: dict[Level, Support] = {
    "plain": frozenset(),
    "vectors": frozenset({"vectors"}),
    "norms": frozenset({"vectors", "norms"}),
    "full": frozenset({"vectors", "norms", "vocabulary"}),
    "experts": frozenset({"vectors", "norms", "vocabulary", "experts"}),
}
"""What a user asks for, each with what comes before it."""


Targets = frozenset[str]
"""The groups of dense projections, keys of GROUPS, that adapters may change."""

EVERY: Targets = frozenset(GROUPS)


def targets_of(modules: Iterable[str], cfg: ModelConfig) -> Targets:
    """The groups that adapters of these modules change; others than dense projections are in none."""
    projections = (part for module in modules for part in cfg.fused_rows(module) or (module,))
    return frozenset(group_of(name) for name in projections if name in PROJECTIONS)


def level_of(support: Support) -> Level:
    """The least level that has all of it."""
    return next(level for level, has in LEVELS.items() if support <= has)


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """One projection's pair: `delta W = scaling · b @ a`. `scaling` is not folded in here.

    embed_tokens is the map from one-hot tokens: `a` is [R, vocab], `b` [embed, R]."""

    a: Float[np.ndarray, "R K"]
    """float32, bfloat16 or float16, as it was stored."""
    b: Float[np.ndarray, "N R"]
    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class OutputVectors:
    """What happens to a projection's output after its pair: `y · scale + offset`, before the base's
    bias. float32; None: nothing."""

    scale: Float[np.ndarray, " N"] | None = None
    offset: Float[np.ndarray, " N"] | None = None

    def rows(self, rows: slice) -> "OutputVectors":
        """The same for some of the outputs."""
        both = (None if vector is None else vector[rows] for vector in (self.scale, self.offset))
        return OutputVectors(**dict(zip(("scale", "offset"), both, strict=True)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """All that a PEFT LoRA folder says that matters at inference."""

    uid: str
    """sha256 over scaling and tensors (see `content_hash`)."""
    path: str
    base_model: str | None
    """base_model_name_or_path of adapter_config.json."""
    rank: int
    """The largest rank of any projection."""
    weights: dict[tuple[int, str], LoraWeights]
    """Keyed by (layer, module of the checkpoint): (3, "q_proj"), (3, "qkv_proj") where it is fused,
    (NO_LAYER, "lm_head")."""
    vectors: dict[tuple[int, str], OutputVectors] = field(default_factory=dict)
    """Keyed likewise; a projection may have vectors without a pair. A norm's offset is added to
    its weight: (3, "input_layernorm"), (NO_LAYER, "norm")."""
    added_tokens: int = 0
    """Tokens beyond the base's vocabulary; pairs of embed_tokens and lm_head have so many more columns
    and rows."""
    chat_template: str | None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored in host memory."""
        return sum(tensor.nbytes for _, tensor in _tensors(self.weights, self.vectors))

    @cached_property
    def touched(self) -> frozenset[tuple[int, str]]:
        """(layer, projection) of all that it changes."""
        return frozenset(self.weights.keys() | self.vectors.keys())

    @cached_property
    def modules(self) -> list[str]:
        """Names of the projections that it touches in any layer, sorted."""
        return sorted({projection for _, projection in self.touched})

    @property
    def support(self) -> Support:
        """The least that an engine must support to serve it."""
        return support_of(self.touched, {name for _, name in self.vectors})


def support_of(touched: Iterable[tuple[int, str]], vectors: Iterable[str]) -> Support:
    """What these places need, and names with vectors."""
    features: set[Feature] = set()
    for layer, name in touched:
        if is_norm(name):
            features.add("norms")
        elif "." in name:  # the name in full: a router's, or that of a linear of an expert
            features.add("experts")
        elif layer == NO_LAYER:
            features.add("vocabulary")
    if any(not is_norm(name) for name in vectors):
        features.add("vectors")
    return frozenset(features)


def is_norm(module: str) -> bool:
    """Whether a module of a decoder is a norm, by the last word of its name."""
    return module.endswith("norm")


def shown_module(module: str) -> str:
    """A module's name without its block and the expert's number: "experts.w1", "gate", "q_proj"."""
    words = module.split(".")
    return ".".join(word for word in words[min(1, len(words) - 1) :] if not word.isdigit())


def by_projection(adapter: Adapter, cfg: ModelConfig) -> Adapter:
    """The same adapter with fused modules cut up: the parts share A, each has its rows of the rest."""
    if not cfg.fused:
        return adapter
    weights: dict[tuple[int, str], LoraWeights] = {}
    vectors: dict[tuple[int, str], OutputVectors] = {}
    for layer, module in adapter.touched:
        pair, own = adapter.weights.get((layer, module)), adapter.vectors.get((layer, module))
        for part, rows in (cfg.fused_rows(module) or {module: slice(None)}).items():
            if pair is not None:
                weights[layer, part] = replace(pair, b=pair.b[rows])
            if own is not None:
                vectors[layer, part] = own.rows(rows)
    return replace(adapter, weights=weights, vectors=vectors)


def widened(adapter: Adapter, vocab: int) -> Adapter:
    """The same adapter with `vocab` tokens in its pairs and vectors of embed_tokens and lm_head."""
    embed, head = (NO_LAYER, "embed_tokens"), (NO_LAYER, "lm_head")
    weights, vectors = dict(adapter.weights), dict(adapter.vectors)
    if (pair := weights.get(embed)) is not None and (more := vocab - pair.a.shape[1]):
        weights[embed] = replace(pair, a=np.pad(pair.a, ((0, 0), (0, more))))
    if (pair := weights.get(head)) is not None and (more := vocab - pair.b.shape[0]):
        weights[head] = replace(pair, b=np.pad(pair.b, ((0, more), (0, 0))))
    if (own := vectors.get(head)) is not None:
        scale, offset = own.scale, own.offset
        if scale is not None:
            scale = np.pad(scale, (0, vocab - len(scale)), constant_values=1)
        if offset is not None:
            offset = np.pad(offset, (0, vocab - len(offset)))
        vectors[head] = OutputVectors(scale=scale, offset=offset)
    return replace(adapter, weights=weights, vectors=vectors)


def content_hash(
    weights: Mapping[tuple[int, str], LoraWeights],
    vectors: Mapping[tuple[int, str], OutputVectors] = MappingProxyType({}),
) -> str:
    """The uid of an adapter with these weights: equal exactly when results are equal."""
    digest = hashlib.sha256(b"jlora adapter 2\n")
    for facts, tensor in _tensors(weights, vectors):
        digest.update(f"{facts} {tensor.dtype.name} {tensor.shape}\n".encode())
        # A contiguous view of bytes: hashlib takes no bfloat16, and tobytes() would copy.
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


def _tensors(
    weights: Mapping[tuple[int, str], LoraWeights],
    vectors: Mapping[tuple[int, str], OutputVectors],
) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors with what tells them apart."""
    for (layer, projection), pair in sorted(weights.items()):
        facts = f"{layer} {projection} {float(pair.scaling).hex()}"
        yield f"{facts} a", pair.a
        yield f"{facts} b", pair.b
    for (layer, projection), own in sorted(vectors.items()):
        for name, vector in (("scale", own.scale), ("offset", own.offset)):
            if vector is not None:
                yield f"{layer} {projection} {name}", vector
