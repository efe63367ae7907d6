"""Where every array lives: the mesh, the table from logical axes to mesh axes, and the row layout.

Tensor parallelism runs under `jax.shard_map`, so the decoder sees local shapes. A checkpoint whose
heads, mlp or vocab do not divide by the number of devices is padded with zero rows (or, where
there are fewer kv heads than devices, kv heads are repeated): `Layout` says which checkpoint row
sits where. Invariant: every device holds the same shape, and padding never changes a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.errors import ParameterError
from jlora.models.config import (
    ADDED,
    ALL_GROUPS,
    EXPERT_GROUPS,
    NORM_GROUPS,
    VECTOR_GROUPS,
    ModelConfig,
)

AXIS = "model"
"""Name of the only mesh axis: tensor parallelism."""

RULES: dict[str, str | None] = {
    "embed": None,
    "norm": None,
    "vocab": AXIS,
    "heads": AXIS,  # query heads · head_dim: the input of `o`
    "qkv": AXIS,  # fused output of q, k and v, in device order
    "gate_up": AXIS,  # fused output of gate and up, in device order
    "mlp": AXIS,  # the input of `down`
    "expert": None,
    "kv_heads": AXIS,
    "page": None,
    "rank": None,
}

GROUP_AXES: dict[str, tuple[str, str]] = {
    "qkv": ("embed", "qkv"),
    "o": ("heads", "embed"),
    "gate_up": ("embed", "gate_up"),
    "down": ("mlp", "embed"),
    "router": ("embed", "expert"),
    "expert_gate_up": ("embed", "gate_up"),
    "expert_down": ("mlp", "embed"),
    "embed": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "norms": ("norm", "norm"),
    "norm": ("norm", "norm"),
    "added": ("norm", "norm"),
}
"""Logical axes (input, output) of each group's weight."""


def spec(*axes: str | None) -> P:
    """PartitionSpec of an array whose dimensions have these logical axes (None: not sharded)."""
    return P(*(None if axis is None else RULES[axis] for axis in axes))


def make_mesh(size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `size` devices for tensor parallelism. Raises ParameterError if there are fewer."""
    devices = list(devices if devices is not None else jax.devices())
    if len(devices) < size:
        kind = devices[0].platform
        hint = (
            "; XLA_FLAGS=--xla_force_host_platform_device_count makes more, before jax is imported"
        )
        raise ParameterError(
            f"--mesh {size} needs {size} devices, this process sees {len(devices)} ({kind})"
            f"{hint if kind == 'cpu' else ''}",
            "mesh",
        )
    return Mesh(np.array(devices[:size]), (AXIS,), axis_types=(AxisType.Auto,))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """NamedSharding on `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, spec(*axes))


def _pad(count: int, multiple: int) -> np.ndarray:
    """[0, 1, ... count-1, -1, ...] up to the next multiple."""
    size = -(-count // multiple) * multiple
    rows = np.arange(size)
    return np.where(rows < count, rows, -1)


def _rows(blocks: np.ndarray, width: int) -> np.ndarray:
    """Row numbers of blocks of `width` rows; block -1 gives -1 rows."""
    rows = blocks[:, None] * width + np.arange(width)
    return np.where(blocks[:, None] < 0, -1, rows).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """Which checkpoint row sits where on a mesh of `tp` devices. -1 marks a row of zeros.

    Example, 3 kv heads with 3 query heads each on 2 devices: one kv head and its three query
    heads of zeros are added, so that each device holds 2 kv heads and 6 query heads.
    """

    cfg: ModelConfig
    tp: int = 1

    @cached_property
    def _heads(self) -> tuple[np.ndarray, np.ndarray]:
        """Query heads and kv heads in device order: ([kv slots · group], [kv slots])."""
        cfg, tp = self.cfg, self.tp
        group = cfg.heads // cfg.kv_heads
        if tp > cfg.kv_heads and tp % cfg.kv_heads == 0:
            copies = tp // cfg.kv_heads  # a kv head is repeated, its query heads are dealt out
            per_slot = -(-group // copies)
            kv = np.repeat(np.arange(cfg.kv_heads), copies)
            first = np.tile(np.arange(copies) * per_slot, cfg.kv_heads)
        else:
            per_slot = group
            kv = _pad(cfg.kv_heads, tp)
            first = np.zeros(len(kv), int)
        member = first[:, None] + np.arange(per_slot)
        real = (kv[:, None] >= 0) & (member < group)
        query = np.where(real, kv[:, None] * group + member, -1)
        return query.reshape(-1), kv

    @property
    def heads(self) -> int:
        """Query heads on all devices, padding included."""
        return len(self._heads[0])

    @property
    def kv_heads(self) -> int:
        """Kv heads on all devices, padding and repeats included."""
        return len(self._heads[1])

    @cached_property
    def mlp_index(self) -> np.ndarray:
        """Source row of each mlp unit."""
        return _pad(self.cfg.mlp, self.tp)

    @cached_property
    def expert_index(self) -> np.ndarray:
        """Source row of each unit of an expert."""
        assert self.cfg.experts is not None
        return _pad(self.cfg.experts.mlp, self.tp)

    @cached_property
    def vocab_index(self) -> np.ndarray:
        """Source row of each vocabulary entry; tokens that adapters may add have none."""
        rows = self._adapters_vocab
        return np.where(rows < self.cfg.vocab, rows, -1)

    @cached_property
    def _adapters_vocab(self) -> np.ndarray:
        """The same for an adapter's rows."""
        return _pad(self.cfg.vocab_rows, self.tp)

    @cached_property
    def _part_index(self) -> dict[str, np.ndarray]:
        query, kv = self._heads
        q, k = _rows(query, self.cfg.head_dim), _rows(kv, self.cfg.head_dim)
        mlp, embed = self.mlp_index, np.arange(self.cfg.embed)
        return {
            "q_proj": q,
            "k_proj": k,
            "v_proj": k,
            "o_proj": embed,
            "gate_proj": mlp,
            "up_proj": mlp,
            "down_proj": embed,
            "embed_tokens": embed,
            "lm_head": self._adapters_vocab,
            **self._sparse_index(embed),
        }

    def _sparse_index(self, embed: np.ndarray) -> dict[str, np.ndarray]:
        facts = self.cfg.experts
        if facts is None:
            return {}
        ((router,), (gate, up), (down,)) = EXPERT_GROUPS.values()
        units = self.expert_index
        return {router: np.arange(facts.count), gate: units, up: units, down: embed}

    def input_index(self, group: str) -> np.ndarray | None:
        """Source column of each input column of a group; None: the checkpoint's own order."""
        if group in VECTOR_GROUPS:
            return np.arange(0)
        index = {
            "o": self._part_index["q_proj"],
            "down": self.mlp_index,
            "embed": self._adapters_vocab,
            "expert_down": self.expert_index if self.cfg.experts is not None else None,
        }.get(group)
        if index is None:
            return None
        source = self.cfg.shape(ALL_GROUPS[group][0])[0]
        return None if np.array_equal(index, np.arange(source)) else index

    def output_index(self, group: str) -> list[tuple[str, np.ndarray]]:
        """Runs of (projection, source rows); their concatenation is the fused output.

        For a column group: device 0's rows of every part, then device 1's, and so on.
        """
        if group == ADDED:
            return [(ADDED, np.arange(self.cfg.extra_vocab))]
        if group in NORM_GROUPS:
            widths = [(name, self.cfg.norm_width(name)) for name in self.cfg.parts(group)]
            return [(name, np.arange(width or 0)) for name, width in widths]
        parts = ALL_GROUPS[group]
        if len(parts) == 1:
            return [(parts[0], self._part_index[parts[0]])]
        split = {part: np.split(self._part_index[part], self.tp) for part in parts}
        return [(part, split[part][device]) for device in range(self.tp) for part in parts]

    def part_sizes(self, group: str) -> tuple[int, ...]:
        """Output width of each part of a group on one device; all norms are one part."""
        if group in VECTOR_GROUPS:
            return (self.group_shape(group)[1],)
        devices = self.tp if RULES[GROUP_AXES[group][1]] else 1
        return tuple(len(self._part_index[part]) // devices for part in ALL_GROUPS[group])

    def group_shape(self, group: str) -> tuple[int, int]:
        """(input, output) of a group's fused weight over all devices, padding included; for experts,
        of one of them."""
        index = self.input_index(group)
        width = self.cfg.shape(ALL_GROUPS[group][0])[0] if index is None else len(index)
        return width, sum(len(rows) for _, rows in self.output_index(group))
