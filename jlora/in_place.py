"""One adapter merged into the weights on the device, and taken out again bit for bit.

While it is merged its requests run the steps without LoRA, at no cost; the base and the other
adapters cannot be served meanwhile. What it changed is kept in host memory.
"""

import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jlora.adapters.adapter import NO_LAYER
from jlora.adapters.entry import AdapterEntry
from jlora.adapters.groups import groups_of, in_layers
from jlora.adapters.pool import HostPage, RankPages, StagedAdapter
from jlora.adapters.store import AdapterStore
from jlora.cast import narrowed
from jlora.engine.engine import Engine
from jlora.engine.programs import Programs
from jlora.errors import AdapterError, ConflictError
from jlora.models.config import ADDED, NORM_GROUPS, STACKED_GROUPS
from jlora.sharding import Layout

Path = tuple[str | int, ...]


class InPlace:
    """Merges and unmerges at a moment when no request runs. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        programs: Programs,
        layout: Layout,
        rank_pages: RankPages,
        store: AdapterStore[StagedAdapter],
    ):
        self._engine, self._programs, self._layout = engine, programs, layout
        self._rank_pages, self._store = rank_pages, store
        self._lock = threading.Lock()
        # Leaf number -> the base's own values and where they lie.
        self._kept: dict[int, tuple[np.ndarray, jax.sharding.Sharding]] = {}

    def merge(self, entry: AdapterEntry) -> None:
        """Waits until running requests have ended, then merges. New ones wait meanwhile.

        Raises ConflictError if one is merged already, AdapterError for what the base's weights
        have no place for (a bias where the base has none, one end of a tied model).
        """
        with self._lock:
            if self._engine.merged is not None:
                raise ConflictError(
                    f"the adapter '{self._engine.merged.name}' is merged; unmerge it first"
                )
            if entry.added_tokens:
                raise AdapterError(
                    f"the adapter '{entry.name}' cannot be merged in place: it adds {entry.added_tokens} "
                    "tokens; python -m jlora.merge writes a checkpoint that has them"
                )
            staged = self._store.read(entry)
            changes = dict(_changes(staged, self._layout, self._rank_pages))
            leaves = self._programs.flat.numbers
            self._check(entry, changes, leaves)

            def swap() -> None:
                try:
                    for path, change in changes.items():
                        self._replace(leaves[path], change, entry)
                except BaseException:  # before anybody else runs: what was changed goes back
                    self._restore()
                    raise
                self._engine.merged = entry

            self._engine.exclusive(swap)

    def unmerge(self, entry: AdapterEntry) -> None:
        """Waits until running requests have ended, then puts the base's own weights back.

        Raises ConflictError if it is not merged.
        """
        with self._lock:
            if self._engine.merged is None or self._engine.merged.name != entry.name:
                raise ConflictError(f"the adapter '{entry.name}' is not merged")
            self._engine.exclusive(self._restore)

    def _restore(self) -> None:
        for number in list(self._kept):
            self._put(number, self._kept[number][0])
            del self._kept[number]
        self._engine.merged = None

    def _replace(self, number: int, change: "_Change", entry: AdapterEntry) -> None:
        weight = self._programs.weights[number]
        old = np.asarray(weight)
        what = f"the adapter '{entry.name}' cannot be merged"
        new = narrowed(change.applied(old.astype(np.float32)), old.dtype, what, AdapterError)
        self._kept[number] = old, weight.sharding
        del weight  # else `_put` could not free it
        self._put(number, new)

    def _put(self, number: int, values: np.ndarray) -> None:
        weights, place = self._programs.weights, self._kept[number][1]
        weights[number] = None  # frees the array that lies there first
        weights[number] = jax.device_put(values, place)

    def _check(
        self, entry: AdapterEntry, changes: dict[Path, "_Change"], leaves: dict[Path, int]
    ) -> None:
        missing = sorted(".".join(map(str, path)) for path in changes.keys() - leaves.keys())
        if missing:
            raise AdapterError(
                f"the adapter '{entry.name}' cannot be merged: the base has no {missing[0]}"
            )
        head = ("head", "kernel")
        if head not in leaves and ("embed",) in changes:
            raise AdapterError(
                f"the adapter '{entry.name}' cannot be merged: it changes one end of tied embeddings"
            )


class _Change:
    """What happens to one parameter: a low-rank sum in pieces, then a scale; or an offset."""

    def __init__(self) -> None:
        self.pieces: list[tuple[np.ndarray, np.ndarray, slice]] = []
        """(A [r, K], B [r, columns], columns)."""
        self.rows: list[tuple[np.ndarray, np.ndarray, slice]] = []
        """(A [r, K], B [r, rows], rows) of a weight that is stored [out, in]."""
        self.scale: np.ndarray | None = None
        self.offset: np.ndarray | None = None

    def applied(self, weight: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The new values; `weight` is changed in place."""
        for a, b, columns in self.pieces:
            weight[:, columns] += a.T @ b
        for a, b, rows in self.rows:
            weight[rows] += b.T @ a
        if self.scale is not None:
            weight *= self.scale
        return weight if self.offset is None else weight + self.offset


def _changes(
    staged: StagedAdapter, layout: Layout, pages: RankPages
) -> Iterator[tuple[Path, _Change]]:
    """The changed parameters of a Decoder, from the pages as they would lie on the device."""
    for group, parts in groups_of(layout.cfg, pages.support, pages.targets).items():
        layers = range(layout.cfg.layers) if in_layers(group) else [0]
        for index in layers:
            if group == ADDED:
                continue
            if group in NORM_GROUPS:
                yield from _norms(staged, layout, group, index)
                continue
            if group in STACKED_GROUPS:
                yield from _experts(staged, layout, group, index, pages.page_rows)
                continue
            change, runs, at = _Change(), [], 0
            for projection, source in layout.output_index(group):
                runs.append((parts.index(projection), slice(at, at + len(source))))
                at += len(source)
            for page in staged.host_pages:
                change.pieces += _pieces(page, group, index, pages.page_rows, runs)
            own = staged.host_pages[0][group]
            scale, offset = _vector(own.scale, index), _vector(own.offset, index)
            if scale is not None and (scale != 1).any():
                change.scale = scale
            layer = index if in_layers(group) else NO_LAYER
            if change.pieces or change.scale is not None:
                yield _path(layer, group, "kernel"), change
            if offset is not None and offset.any():
                bias = _Change()
                bias.offset = offset
                yield _path(layer, group, "bias"), bias


def _norms(
    staged: StagedAdapter, layout: Layout, group: str, index: int
) -> Iterator[tuple[Path, _Change]]:
    """The norms of a layer, or the last one."""
    offsets = _vector(staged.host_pages[0][group].offset, index)
    assert offsets is not None
    at = 0
    for name, source in layout.output_index(group):
        change, at = _Change(), at + len(source)
        change.offset = offsets[at - len(source) : at]
        if change.offset.any():
            norm = group == "norm"
            yield ("norm",) if norm else ("layers", index, layout.cfg.norms[name][0]), change


def _experts(
    staged: StagedAdapter, layout: Layout, group: str, index: int, page_rows: int
) -> Iterator[tuple[Path, _Change]]:
    """One of the two stacked weights of a layer's experts: [out, in] of each expert below each other,
    device by device where the outputs are sharded."""
    change, runs = _Change(), layout.output_index(group)
    parts, count = len(layout.cfg.parts(group)), layout.cfg.pairs_of(group)
    width = sum(len(source) for _, source in runs[:parts])  # an expert's outputs on a device
    for page in staged.host_pages:
        a, b = np.asarray(page[group].a)[index], np.asarray(page[group].b)[index]
        if not (a.any() and b.any()):
            continue
        for expert in range(count):
            own, at = slice(expert * page_rows, (expert + 1) * page_rows), 0
            for run, (_, source) in enumerate(runs):
                device, part = divmod(run, parts)
                columns, at = slice(at, at + len(source)), at + len(source)
                first = (expert * parts + part) * page_rows
                start = columns.start + (device * (count - 1) + expert) * width
                piece_a, piece_b = a[first : first + page_rows], b[own, columns]
                if piece_a.any() and piece_b.any():
                    rows = slice(start, start + len(source))
                    values = piece_a.astype(np.float32), piece_b.astype(np.float32)
                    change.rows.append((*values, rows))
    if change.rows:
        yield ("layers", index, "experts", group.removeprefix("expert_")), change


def _pieces(
    page: HostPage, group: str, index: int, rows: int, runs: list[tuple[int, slice]]
) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
    for part, columns in runs:
        a = np.asarray(page[group].a)[index, part * rows : (part + 1) * rows]
        b = np.asarray(page[group].b)[index, :, columns]
        if a.any() and b.any():
            yield a.astype(np.float32), b.astype(np.float32), columns


def _vector(values: Any, index: int) -> np.ndarray | None:
    return None if values is None else np.asarray(values)[index]


def _path(layer: int, group: str, what: str) -> Path:
    if group == "embed":
        return ("embed",) if what == "kernel" else ("embed", what)
    if group == "head":
        return "head", what
    if group == "router":
        return "layers", layer, "experts", "router"
    return ("layers", layer, group, *(("weight", what) if what == "kernel" else (what,)))
