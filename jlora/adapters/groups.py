"""Which groups adapters may change for a given `Support` and `Targets`, in which order they lie, and
what a page costs."""

import numpy as np

from jlora.adapters.adapter import EVERY, LEVELS, Support, Targets
from jlora.models.config import (
    ADDED,
    EXPERT_GROUPS,
    LAYER_GROUPS,
    NORM_GROUPS,
    VECTOR_GROUPS,
    VOCAB_GROUPS,
    ModelConfig,
)
from jlora.sharding import GROUP_AXES, RULES, Layout
from kernels_pallas.lora_matmul import PAGE


def in_layers(group: str) -> bool:
    """Whether every layer may have a group of this name."""
    return group in LAYER_GROUPS or group == NORM_GROUPS[0]


def groups_of(
    cfg: ModelConfig, support: Support, targets: Targets = EVERY
) -> dict[str, tuple[str, ...]]:
    """The groups that adapters may change: those of any layer, and what else is supported."""
    mine = {group for level in groups_by_level(cfg, support, targets) for group in level}
    groups = [group for group in LAYER_GROUPS if group in mine]
    groups += VOCAB_GROUPS if "vocabulary" in support else ()
    groups += NORM_GROUPS if "norms" in support else ()
    groups += (ADDED,) if cfg.extra_vocab else ()
    return {group: cfg.parts(group) for group in groups}


def groups_by_level(
    cfg: ModelConfig, support: Support, targets: Targets = EVERY
) -> list[tuple[str, ...]]:
    """The groups of each layer, then, if there are any, those in no layer."""
    norms = NORM_GROUPS if "norms" in support else ()
    levels = [
        (
            *(group for group in cfg.groups(layer) if group in targets),
            *_expert_groups(cfg, support, layer),
            *norms[:1],
        )
        for layer in range(cfg.layers)
    ]
    added = (ADDED,) if cfg.extra_vocab else ()
    ends = (*(VOCAB_GROUPS if "vocabulary" in support else ()), *norms[1:], *added)
    return [*levels, ends] if ends else levels


def _expert_groups(cfg: ModelConfig, support: Support, layer: int) -> tuple[str, ...]:
    return tuple(EXPERT_GROUPS) if "experts" in support and cfg.is_sparse(layer) else ()


def page_bytes(
    layout: Layout,
    dtype: np.typing.DTypeLike,
    page_rows: int = PAGE,
    support: Support = LEVELS["plain"],
    targets: Targets = EVERY,
) -> int:
    """Bytes that one rank page takes on one device, all layers and groups together."""
    total, cfg = 0, layout.cfg
    for group, parts in groups_of(cfg, support, targets).items():
        (rows, columns), (rows_axis, columns_axis) = layout.group_shape(group), GROUP_AXES[group]
        if group in VECTOR_GROUPS:
            layers = cfg.layers if in_layers(group) else 1
            total += layers * columns * np.dtype(np.float32).itemsize
            continue
        rows //= layout.tp if RULES[rows_axis] else 1
        columns //= layout.tp if RULES[columns_axis] else 1
        each = page_rows * (len(parts) * rows + columns) * np.dtype(dtype).itemsize
        each *= cfg.pairs_of(group)
        if "vectors" in support and group not in EXPERT_GROUPS:
            each += 2 * columns * np.dtype(np.float32).itemsize
        levels = groups_by_level(cfg, support, targets)
        total += each * sum(group in level for level in levels)
    return total
