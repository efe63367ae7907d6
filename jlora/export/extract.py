"""The way back: the difference of two checkpoints as a low-rank pair for each linear.

One tensor of both is in memory at a time. What differs and is no linear is counted, not taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora.errors import ModelError, ParameterError
from jlora.export.changes import EMBED, HEAD
from jlora.export.checkpoint import expected_shapes, open_base
from jlora.export.combine import Place
from jlora.export.folder import DTYPES
from jlora.export.svd import Pair, of_matrix
from jlora.models.checkpoint import Checkpoint
from jlora.models.config import ModelConfig
from jlora.models.weights import tensor_name

Progress = Callable[[int, int], None]

_SETTINGS = (
    "heads",
    "kv_heads",
    "head_dim",
    "norm_eps",
    "rope",
    "windows",
    "qk_norm",
    "activation",
    "experts",
)
"""Facts that the adapter's base must share: no adapter carries them."""


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What the difference holds, and how well the pairs give it."""

    cfg: ModelConfig
    """The base's."""
    pairs: dict[Place, Pair]
    """Of the linears that differ."""
    errors: dict[Place, float]
    """Frobenius norm of difference - b a, as a share of the difference's."""
    shares: dict[Place, float]
    """Frobenius norm of the difference as a share of the base weight's."""
    others: dict[str, float]
    """The same for tensors that differ and that no LoRA pair can give: norms, embeddings, biases."""
    settings: tuple[str, ...]
    """Facts of config.json that differ and change results, by their names in ModelConfig."""


def extract(
    base: Path, tuned: Path, rank: int, *, dtype: str = "auto", progress: Progress | None = None
) -> Extracted:
    """The best pairs of `rank` for tuned - base, rounded to `dtype` (auto: float32).

    Raises ModelError where a tensor is missing, extra or of another shape, by name, and where
    nothing differs.
    """
    if rank < 1:
        raise ParameterError(f"--rank must be at least 1, got {rank}", "rank")
    cfg, before = open_base(base)
    shapes = expected_shapes(cfg)
    tuned_cfg, after = open_base(tuned)
    sources = _sources(before, after, shapes, tied=cfg.tied)
    places = {
        tensor_name(layer, projection): (layer, projection)
        for layer in range(cfg.layers)
        for projection in (*cfg.modules_of(layer), *cfg.sparse_modules(layer))
    }
    kind = DTYPES["float32" if dtype == "auto" else dtype][0]
    settings = tuple(
        field for field in _SETTINGS if getattr(cfg, field) != getattr(tuned_cfg, field)
    )
    found = Extracted(cfg=cfg, pairs={}, errors={}, shares={}, others={}, settings=settings)
    for done, (name, source) in enumerate(sources.items(), start=1):
        difference, whole = _difference(before, after, name, source)
        size = float(np.linalg.norm(difference))
        if not np.isfinite(size):
            raise ModelError(f"{name}: {base} or {tuned} holds NaN or infinite values")
        share = size / whole if whole else float(size > 0)
        if size and name in places:
            place = places[name]
            pair = _rounded(of_matrix(difference, rank), kind)
            found.pairs[place] = pair
            difference -= pair.b @ pair.a
            found.errors[place] = float(np.linalg.norm(difference)) / size
            found.shares[place] = share
        elif size:
            found.others[name] = share
        if progress is not None:
            progress(done, len(sources))
    if not found.pairs:
        what = f", only {', '.join(list(found.others)[:5])}" if found.others else ""
        raise ModelError(
            f"no linear of {tuned} differs from {base}{what}: there is no adapter in it"
        )
    return found


def _sources(
    before: Checkpoint, after: Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, tied: bool
) -> dict[str, str]:
    """Each tensor of `after` that is compared, with the one of `before` that it came from."""
    missing = [name for name in shapes if name not in after.tensors]
    shaped = [
        f"{name} is {list(after.tensors[name].shape)}, the base's is {list(shape)}"
        for name, shape in shapes.items()
        if name in after.tensors and after.tensors[name].shape != shape
    ]
    extra = [n for n in after.tensors if n not in before.tensors and not (tied and n == HEAD)]
    problems = {"missing": missing, "of another shape": shaped, "not in the base": extra}
    texts = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if texts:
        raise ModelError(
            f"{after.folder} is no tuned version of {before.folder}: {'; '.join(texts)}"
        )
    # Of a model that also sees, the other parts too: they may have been tuned.
    same = [n for n in before.tensors if n in shapes or n in after.tensors]
    untied = {HEAD: EMBED} if tied and HEAD in after.tensors else {}
    return {name: name for name in same} | untied


def _difference(
    before: Checkpoint, after: Checkpoint, name: str, source: str
) -> tuple[np.ndarray, float]:
    """tuned - base in float32, and the norm of the base's tensor."""
    rows = np.arange(before.tensors[source].shape[0])
    with before.reader(np.dtype(np.float32)) as read:
        old = read(source, rows, None)
    whole = float(np.linalg.norm(old))
    with after.reader(np.dtype(np.float32)) as read:
        new = read(name, rows, None)
    return new - old, whole


def _rounded(pair: Pair, kind: np.dtype) -> Pair:
    """As it will be stored: the error that is told is that of the file."""
    return Pair(a=pair.a.astype(kind).astype(np.float32), b=pair.b.astype(kind).astype(np.float32))
