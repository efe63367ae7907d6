"""Rank pages on the device: `RankPages` holds the pools, stages adapters for them and writes pages.

`stage` is numpy only; it and `upload`, which waits for a transfer, run on any thread; `write` belongs
to the thread that owns jax. Page 0 is the padding page, all zeros, and is never written. Nothing
compiles after `warm_up`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jlora.adapters.adapter import (
    EVERY,
    LEVELS,
    NO_LAYER,
    Adapter,
    OutputVectors,
    Support,
    Targets,
    by_projection,
    level_of,
    targets_of,
    widened,
)
from jlora.adapters.groups import groups_by_level, groups_of, in_layers, page_bytes
from jlora.cast import narrowed
from jlora.errors import AdapterError
from jlora.models.config import ADDED, EXPERT_GROUPS, VECTOR_GROUPS, ModelConfig
from jlora.sharding import GROUP_AXES, Layout, sharding
from kernels_pallas.lora_matmul import PAGE, RankPool

HostPage = dict[str, RankPool]
"""One page of all layers, by group, in numpy: a [L, parts*page, K], b [L, page, N], scale and
offset [L, N] if adapters may have them. L is 1 for groups in no layer. VECTOR_GROUPS have offsets
alone, groups of experts as much for each expert, one after the other, and no scale or offset."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedAdapter:
    """An adapter in the pools' layout, scaling folded in: ready to be copied to its pages."""

    uid: str
    base_model: str | None
    rank: int
    modules: tuple[str, ...]
    chat_template: str | None
    added_tokens: int
    host_pages: tuple[HostPage, ...]
    device_pages: tuple[Any, ...] | None = None
    """The same as jax arrays, if they are on the device already (`RankPages.upload`)."""
    bound: int
    """Modules (layer and projection) that it changes."""
    scalings: tuple[float, ...]
    """Different scalings of its modules, in ascending order."""
    tokenizer: Any | None = None
    """Its own tokenizer, where it needs one."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end its generations beside the base's."""
    nbytes: int
    """Host bytes; groups that the adapter does not touch share one array of zeros and are free."""

    @property
    def pages(self) -> int:
        """Rank pages that it needs on the device."""
        return len(self.host_pages)


_WORDS: dict[str, str] = {
    "vocabulary": "embed_tokens or lm_head",
    "experts": "routers or experts",
    "norms": "norms",
    "vectors": "DoRA or biases",
}
"""What an engine was not started for."""


class RankPages:
    """The rank pools of every layer and group, and the only code that changes them.

    In: an adapter of rank 24, q_proj and o_proj only, on pages 5 and 2. Out: rank rows 0 to 15 on
    page 5, 16 to 23 on page 2 (its last 8 rows zero); rows of k, v, gate, up and down zero; its
    scales and offsets on both pages.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        mesh: Mesh,
        num_pages: int,
        dtype: np.typing.DTypeLike,
        page_rows: int = PAGE,
        support: Support = LEVELS["plain"],
        targets: Targets = EVERY,
    ):
        """Allocates `num_pages` usable pages of `page_rows` ranks, ids 1 to `num_pages`, and the
        padding page 0. Every LoRA step pays for what `support` adds and for every group of
        `targets`, whoever uses it."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, at least 1 rank page is needed")
        self.cfg, self.layout, self.num_pages = cfg, layout, num_pages
        self.page_rows = page_rows
        self.support: Support = support
        self.targets: Targets = targets
        self.dtype = np.dtype(dtype)
        self.pools: list[dict[str, RankPool]]
        """By layer and group, then the groups of the vocabulary if they are supported: a
        [P, parts*page, K], b [P, page, N], scale and offset [P, N], P = num_pages + 1."""

        self._shapes = {
            group: (
                (self._rows(group) * len(parts), layout.group_shape(group)[0]),
                (self._rows(group), layout.group_shape(group)[1]),
            )
            for group, parts in groups_of(cfg, support, targets).items()
        }
        self._levels = groups_by_level(cfg, support, targets)
        self._page_shardings = {group: self._shardings(mesh, group) for group in self._shapes}
        self._zeros: HostPage = {group: self._host_page(group) for group in self._shapes}

        def allocate() -> list[dict[str, RankPool]]:
            return [{group: self._pool(group) for group in groups} for groups in self._levels]

        pool_shardings = [
            {group: self._shardings(mesh, group, "page") for group in groups}
            for groups in self._levels
        ]
        self.pools = jax.jit(allocate, out_shardings=pool_shardings)()
        # A GPU writes all layers in one call. On a CPU one program for all layers compiles 30 times
        # as long (18 s for 30 layers) and takes no less time to run than a call for each.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        step = 1 if on_cpu else len(self._levels)
        self._stretches = [
            range(start, start + step) for start in range(0, len(self._levels), step)
        ]
        self._write = {
            self._groups_in(levels): jax.jit(
                _write_levels,
                donate_argnums=0,
                out_shardings=pool_shardings[levels.start : levels.stop],
            )
            for levels in self._stretches
        }

    def _groups_in(self, levels: range) -> tuple[tuple[str, ...], ...]:
        return tuple(self._levels[level] for level in levels)

    def _rows(self, group: str) -> int:
        return 0 if group in VECTOR_GROUPS else self.page_rows * self.cfg.pairs_of(group)

    def _has(self, group: str) -> tuple[bool, bool]:
        """Whether a group has a scale, and an offset."""
        vectors = "vectors" in self.support and group not in EXPERT_GROUPS
        return vectors and group not in VECTOR_GROUPS, vectors or group in VECTOR_GROUPS

    def _shardings(self, mesh: Mesh, group: str, first: str | None = None) -> RankPool:
        (rows, columns), (scale, offset) = GROUP_AXES[group], self._has(group)
        vector = sharding(mesh, first, columns)
        return RankPool(
            a=sharding(mesh, first, "rank", rows),  # type: ignore[arg-type]
            b=sharding(mesh, first, "rank", columns),  # type: ignore[arg-type]
            scale=vector if scale else None,  # type: ignore[arg-type]
            offset=vector if offset else None,  # type: ignore[arg-type]
        )

    def _pool(self, group: str) -> RankPool:
        """The empty pool of one group of one layer."""
        pages, (a, b), (scale, offset) = self.num_pages + 1, self._shapes[group], self._has(group)
        return RankPool(
            a=jnp.zeros((pages, *a), self.dtype),
            b=jnp.zeros((pages, *b), self.dtype),
            scale=jnp.ones((pages, b[1]), jnp.float32) if scale else None,
            offset=jnp.zeros((pages, b[1]), jnp.float32) if offset else None,
        )

    def _host_page(self, group: str) -> RankPool:
        """One group of a page that changes nothing."""
        layers, (a, b), (scale, offset) = self._layers(group), self._shapes[group], self._has(group)
        return RankPool(
            a=np.zeros((layers, *a), self.dtype),  # type: ignore[arg-type]
            b=np.zeros((layers, *b), self.dtype),  # type: ignore[arg-type]
            scale=np.ones((layers, b[1]), np.float32) if scale else None,  # type: ignore[arg-type]
            offset=np.zeros((layers, b[1]), np.float32) if offset else None,  # type: ignore[arg-type]
        )

    def _layers(self, group: str) -> int:
        return self.cfg.layers if in_layers(group) else 1

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page on one device, all layers and groups together."""
        return page_bytes(self.layout, self.dtype, self.page_rows, self.support, self.targets)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages on one device, the padding page included."""
        return self.bytes_per_page * (self.num_pages + 1)

    def stage(self, adapter: Adapter) -> StagedAdapter:
        """Lays an adapter out in pages. Thread-safe. AdapterError if it needs more than `support` or
        `targets`, or if a value overflows the dtype."""
        if adapter.added_tokens > self.cfg.extra_vocab:
            raise AdapterError(
                f"{adapter.path} adds {adapter.added_tokens} tokens, this engine has room for "
                f"{self.cfg.extra_vocab}: start it with --lora-extra-vocab-size "
                f"{adapter.added_tokens}, or with such an adapter in --lora-modules"
            )
        if missing := adapter.support - self.support:
            what = next(words for feature, words in _WORDS.items() if feature in missing)
            raise AdapterError(
                f"{adapter.path} changes {what}, for which this engine was not started: start it "
                f"with --lora-support {level_of(adapter.support | self.support)}, or with such an "
                "adapter in --lora-modules"
            )
        if others := targets_of(adapter.modules, self.cfg) - self.targets:
            names = [name for name in adapter.modules if targets_of([name], self.cfg) & others]
            raise AdapterError(
                f"{adapter.path} changes {', '.join(names)}, for which this engine's rank pages have no "
                "room: start it with these in --lora-target-modules too, or with all"
            )
        whole = adapter
        adapter = widened(by_projection(adapter, self.cfg), self.cfg.vocab_rows)
        changed = {self.cfg.part_of(module)[1] for module in adapter.modules}
        touched = {
            group
            for group, parts in groups_of(self.cfg, self.support, self.targets).items()
            if not changed.isdisjoint(parts)
        }
        pages = tuple(
            {
                group: self._host_page(group) if group in touched else self._zeros[group]
                for group in self._shapes
            }
            for _ in range(-(-max(adapter.rank, 1) // self.page_rows))
        )
        for group in touched:
            for index in range(self._layers(group)):
                self._stage_group(adapter, index, group, pages)
        for page in pages if whole.added_tokens else ():
            page[ADDED] = self._host_page(ADDED)
            own = page[ADDED].offset
            assert isinstance(own, np.ndarray)
            own[:, : whole.added_tokens] = 1
        nbytes = sum(
            leaf.nbytes
            for page in pages
            for group in touched
            for leaf in jax.tree.leaves(page[group])
        )
        return StagedAdapter(
            uid=adapter.uid,
            base_model=adapter.base_model,
            rank=adapter.rank,
            modules=tuple(sorted({self.cfg.part_of(module)[1] for module in whole.modules})),
            chat_template=adapter.chat_template,
            added_tokens=adapter.added_tokens,
            host_pages=pages,
            bound=len(whole.touched),
            scalings=tuple(sorted({pair.scaling for pair in adapter.weights.values()})),
            nbytes=nbytes,
        )

    def _stage_group(
        self, adapter: Adapter, index: int, group: str, pages: Sequence[HostPage]
    ) -> None:
        """Fills one layer of one group of all pages, in place."""
        layer = index if in_layers(group) else NO_LAYER
        experts = self.cfg.experts if group in EXPERT_GROUPS else None
        for number in range(self.cfg.pairs_of(group)):
            expert = None if group == "router" else number
            names = {
                part: part if experts is None else experts.name_of(part, expert)
                for part in self.cfg.parts(group)
            }
            self._stage_pair(adapter, layer, (index, group, number), names, pages)

    def _stage_pair(
        self,
        adapter: Adapter,
        layer: int,
        place: tuple[int, str, int],
        names: Mapping[str, str],
        pages: Sequence[HostPage],
    ) -> None:
        """One expert's pairs, or the group's only ones; `names` are the parts' in the adapter."""
        index, group, number = place
        page_rows, columns = self.page_rows, self.layout.input_index(group)
        for part, projection in enumerate(names.values(), start=number * len(names)):
            pair = adapter.weights.get((layer, projection))
            if pair is None:
                continue
            a = pair.a if columns is None else _take(pair.a, columns)
            for page, start in zip(pages, range(0, pair.rank, page_rows), strict=False):
                rows = self._cast(a[start : start + page_rows], adapter, projection)
                page[group].a[index, part * page_rows : part * page_rows + len(rows)] = rows
        at = 0
        for part, source in self.layout.output_index(group):
            projection = names[part]
            here = slice(at, at + len(source))
            at += len(source)
            pair = adapter.weights.get((layer, projection))
            if pair is not None:
                with np.errstate(over="ignore", invalid="ignore"):  # _cast says where
                    b = _take(pair.b.T, source).astype(np.float32) * np.float32(pair.scaling)
                for page, start in zip(pages, range(0, pair.rank, page_rows), strict=False):
                    rows = self._cast(b[start : start + page_rows], adapter, projection)
                    first = number * page_rows
                    page[group].b[index, first : first + len(rows), here] = rows
            own = adapter.vectors.get((layer, projection))
            if own is not None:
                for page in pages:
                    _put_vectors(page[group], own, index, here, source)

    def _cast(self, values: np.ndarray, adapter: Adapter, projection: str) -> np.ndarray:
        return narrowed(values, self.dtype, f"{adapter.path}, {projection}", AdapterError)

    def upload(self, staged: StagedAdapter) -> StagedAdapter:
        """The same with its pages copied to the device, beside the pools: a `write` then moves nothing
        between host and device. Waits for the copy; thread-safe."""
        pages = tuple(jax.device_put(page, self._page_shardings) for page in staged.host_pages)
        return replace(staged, device_pages=jax.block_until_ready(pages))

    def write(self, staged: StagedAdapter | None, page_ids: Sequence[int]) -> None:
        """DONATES `self.pools`: puts page i of `staged` on the device's page `page_ids[i]`.

        Only queued: it runs after the steps that were dispatched before it. None: nothing to do.
        """
        if staged is None:
            return
        if len(page_ids) != staged.pages or len(set(page_ids)) != staged.pages:
            raise ValueError(f"{staged.pages} pages to write, but page ids {list(page_ids)}")
        if not all(1 <= page <= self.num_pages for page in page_ids):
            raise ValueError(f"page ids {list(page_ids)} must lie in 1..{self.num_pages}")
        pages = staged.device_pages or tuple(
            jax.device_put(page, self._page_shardings) for page in staged.host_pages
        )
        for page, values in zip(page_ids, pages, strict=True):
            self._put(page, values)

    def _put(self, page: int, on_device: Any) -> None:
        for levels in self._stretches:
            groups = self._groups_in(levels)
            values = {group: on_device[group] for level in groups for group in level}
            layers = np.array([level % self.cfg.layers for level in levels], np.int32)
            here = slice(levels.start, levels.stop)
            self.pools[here] = self._write[groups](self.pools[here], values, layers, np.int32(page))

    def warm_up(self) -> None:
        """Compiles the writes, by writing zeros to the padding page."""
        self._put(0, jax.device_put(self._zeros, self._page_shardings))
        jax.block_until_ready(self.pools)


def _write_levels(
    pools: list[dict[str, RankPool]], page: HostPage, layers: jax.Array, index: jax.Array
) -> list[dict[str, RankPool]]:
    """All groups of some layers of one page; `layers` are their places in `page`."""

    def put(layer: jax.Array, pool: jax.Array, values: jax.Array) -> jax.Array:
        rows = lax.dynamic_index_in_dim(values, layer, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(pool, rows, index, 0)

    return [
        jax.tree.map(partial(put, layers[n]), level, {group: page[group] for group in level})
        for n, level in enumerate(pools)
    ]


def _put_vectors(
    page: RankPool, own: OutputVectors, index: int, here: slice, source: np.ndarray
) -> None:
    """Scale and offset of one run of a group's outputs; padding outputs keep 1 and 0."""
    real = source >= 0
    for target, values in ((page.scale, own.scale), (page.offset, own.offset)):
        if values is not None:
            assert isinstance(target, np.ndarray), "stage() checked the support"
            target[index, here][real] = values[source[real]]


def _take(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`values[:, columns]`, with zeros where the column is -1."""
    taken = values[:, columns]
    taken[:, columns < 0] = 0
    return taken
