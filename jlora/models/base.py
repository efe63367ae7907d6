"""The base's own weights as an adapter's reader needs them: `BaseWeights`, blocks from the files.

DoRA's norms, replaced biases and embeddings, PiSSA and OLoRA are all relative to the base. Read
on the loading thread from the checkpoint, never from the device. No jax arrays here.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jlora.models.checkpoint import Checkpoint
from jlora.models.config import ALL_GROUPS, FUSED, ModelConfig
from jlora.models.weights import Source, norm_name, sources, tensor_name
from jlora.sharding import Layout

_BLOCK = 1024
"""Rows that are read at a time."""


class BaseWeights:
    """The tensors of a checkpoint by (layer, projection), in float32. Files are opened when asked."""

    def __init__(self, folder: Path, cfg: ModelConfig):
        self.folder, self.cfg = folder, cfg

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    @cached_property
    def _sources(self) -> dict[tuple[str | int, ...], Source]:
        return {source.path: source for source in sources(self.cfg, Layout(self.cfg, 1))}

    def blocks(
        self, layer: int, projection: str
    ) -> Iterator[tuple[slice, Float[np.ndarray, "rows columns"]]]:
        """(rows, their values) of a weight as the checkpoint has it: [out, in]; [vocab, embed]."""
        tensor, rows = self._part(layer, projection, "weight")
        with self._checkpoint.reader(np.dtype(np.float32)) as read:
            for start in range(0, len(rows), _BLOCK):
                block = rows[start : start + _BLOCK]
                yield slice(start, start + len(block)), read(tensor, block, None)

    def weight(self, layer: int, projection: str) -> Float[np.ndarray, "out in"]:
        """The whole weight."""
        return np.concatenate([block for _, block in self.blocks(layer, projection)])

    def rows(self, layer: int, projection: str, index: np.ndarray) -> Float[np.ndarray, "n in"]:
        """Some rows of a weight."""
        tensor, rows = self._part(layer, projection, "weight")
        with self._checkpoint.reader(np.dtype(np.float32)) as read:
            return read(tensor, rows[index], None)

    def norm(self, layer: int, name: str) -> Float[np.ndarray, " width"]:
        """The weight of a norm; "norm" is the last one."""
        width = self.cfg.norm_width(name)
        assert width is not None
        with self._checkpoint.reader(np.dtype(np.float32)) as read:
            return read(norm_name(layer, name), np.arange(width), None).reshape(-1)

    def bias(self, layer: int, projection: str) -> Float[np.ndarray, " out"] | None:
        """The bias; None where the base has none."""
        if projection not in _GROUP or layer < 0 or not self.cfg.bias(_GROUP[projection]):
            return None
        tensor, rows = self._part(layer, projection, "bias")
        with self._checkpoint.reader(np.dtype(np.float32)) as read:
            return read(tensor, rows, None).reshape(-1)

    def _part(self, layer: int, projection: str, what: str) -> tuple[str, np.ndarray]:
        """(tensor, its rows) of a projection's weight or bias."""
        if projection in FUSED or "." in projection:
            return tensor_name(layer, projection), np.arange(self.cfg.shape(projection)[1])
        group = _GROUP[projection]
        if group == "embed":
            path: tuple[str | int, ...] = ("embed",)
        elif group == "head":
            path = ("head", "kernel")
        elif what == "bias":
            path = ("layers", layer, group, "bias")
        else:
            path = ("layers", layer, group, "weight", "kernel")
        return self._sources[path].parts[ALL_GROUPS[group].index(projection)]


_GROUP = {part: group for group, parts in ALL_GROUPS.items() for part in parts}
