"""Rank pages on the device: `RankPages` holds the pools, stages adapters for them and writes pages.

`stage` is numpy only and runs on any thread; `write` belongs to the thread that owns jax. Page 0
is the padding page, all zeros, and is never written. Nothing compiles after `warm_up`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jlora.adapters.adapter import Adapter
from jlora.errors import AdapterError
from jlora.models.config import GROUPS, ModelConfig
from jlora.sharding import GROUP_AXES, RULES, Layout, sharding
from kernels_pallas.lora_matmul import PAGE, RankPool

HostPage = dict[str, RankPool]
"""One page of all layers, by group, in numpy: a [L, parts*page, K], b [L, page, N]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedAdapter:
    """An adapter in the pools' layout, scaling folded in: ready to be copied to its pages."""

    uid: str
    base_model: str | None
    rank: int
    modules: tuple[str, ...]
    chat_template: str | None
    host_pages: tuple[HostPage, ...]
    bound: int
    """Modules (layer and projection) that it changes."""
    scalings: tuple[float, ...]
    """Different scalings of its modules, in ascending order."""
    nbytes: int
    """Host bytes; groups that the adapter does not touch share one array of zeros and are free."""

    @property
    def pages(self) -> int:
        """Rank pages that it needs on the device."""
        return len(self.host_pages)


def page_bytes(layout: Layout, dtype: np.typing.DTypeLike, page_rows: int = PAGE) -> int:
    """Bytes that one rank page takes on one device, all layers and groups together."""
    width = 0
    for group, parts in GROUPS.items():
        (rows, columns), (rows_axis, columns_axis) = layout.group_shape(group), GROUP_AXES[group]
        rows //= layout.tp if RULES[rows_axis] else 1
        columns //= layout.tp if RULES[columns_axis] else 1
        width += len(parts) * rows + columns
    return layout.cfg.layers * page_rows * width * np.dtype(dtype).itemsize


class RankPages:
    """The rank pools of every layer and group, and the only code that changes them.

    In: an adapter of rank 24, q_proj and o_proj only, on pages 5 and 2. Out: rank rows 0 to 15 on
    page 5, 16 to 23 on page 2 (its last 8 rows zero); rows of k, v, gate, up and down zero.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        mesh: Mesh,
        num_pages: int,
        dtype: np.typing.DTypeLike,
        page_rows: int = PAGE,
    ):
        """Allocates `num_pages` usable pages of `page_rows` ranks, ids 1 to `num_pages`, and the
        padding page 0."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, at least 1 rank page is needed")
        self.cfg, self.layout, self.num_pages = cfg, layout, num_pages
        self.page_rows = page_rows
        self.dtype = np.dtype(dtype)
        self.pools: list[dict[str, RankPool]]
        """By layer and group: a [P, parts*page, K], b [P, page, N], P = num_pages + 1."""

        def per_group(first: str | None) -> dict[str, RankPool]:
            return {
                group: RankPool(
                    a=sharding(mesh, first, "rank", rows),  # type: ignore[arg-type]
                    b=sharding(mesh, first, "rank", columns),  # type: ignore[arg-type]
                )
                for group, (rows, columns) in GROUP_AXES.items()
            }

        pool_shardings = [per_group("page") for _ in range(cfg.layers)]
        self._page_shardings = per_group(None)
        self._shapes = {
            group: (
                (len(parts) * page_rows, layout.group_shape(group)[0]),
                (page_rows, layout.group_shape(group)[1]),
            )
            for group, parts in GROUPS.items()
        }
        self._zeros: HostPage = {
            group: RankPool(a=self._host_zeros(a), b=self._host_zeros(b))  # type: ignore[arg-type]
            for group, (a, b) in self._shapes.items()
        }

        def allocate() -> list[dict[str, RankPool]]:
            return [
                {
                    group: RankPool(
                        a=jnp.zeros((num_pages + 1, *a), self.dtype),
                        b=jnp.zeros((num_pages + 1, *b), self.dtype),
                    )
                    for group, (a, b) in self._shapes.items()
                }
                for _ in range(cfg.layers)
            ]

        self.pools = jax.jit(allocate, out_shardings=pool_shardings)()
        self._write = jax.jit(_write_layer, donate_argnums=0, out_shardings=pool_shardings[0])

    def _host_zeros(self, shape: tuple[int, int]) -> np.ndarray:
        return np.zeros((self.cfg.layers, *shape), self.dtype)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page on one device, all layers and groups together."""
        return page_bytes(self.layout, self.dtype, self.page_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages on one device, the padding page included."""
        return self.bytes_per_page * (self.num_pages + 1)

    def stage(self, adapter: Adapter) -> StagedAdapter:
        """Lays an adapter out in pages. Thread-safe. AdapterError if a value overflows the dtype."""
        touched = {
            group for group, parts in GROUPS.items() if not set(parts).isdisjoint(adapter.modules)
        }
        pages = tuple(
            {
                group: replace(
                    self._zeros[group],
                    **{
                        name: self._host_zeros(shape)
                        for name, shape in zip("ab", shapes, strict=True)
                    },
                )
                if group in touched
                else self._zeros[group]
                for group, shapes in self._shapes.items()
            }
            for _ in range(-(-adapter.rank // self.page_rows))
        )
        for group in touched:
            for layer in range(self.cfg.layers):
                self._stage_group(adapter, layer, group, pages)
        nbytes = sum(
            page[group].a.nbytes + page[group].b.nbytes for page in pages for group in touched
        )
        return StagedAdapter(
            uid=adapter.uid,
            base_model=adapter.base_model,
            rank=adapter.rank,
            modules=tuple(adapter.modules),
            chat_template=adapter.chat_template,
            host_pages=pages,
            bound=len(adapter.weights),
            scalings=tuple(sorted({pair.scaling for pair in adapter.weights.values()})),
            nbytes=nbytes,
        )

    def _stage_group(
        self, adapter: Adapter, layer: int, group: str, pages: Sequence[HostPage]
    ) -> None:
        """Fills one layer of one group of all pages, in place."""
        page_rows, columns = self.page_rows, self.layout.input_index(group)
        for part, projection in enumerate(GROUPS[group]):
            pair = adapter.weights.get((layer, projection))
            if pair is None:
                continue
            a = pair.a if columns is None else _take(pair.a, columns)
            for page, start in zip(pages, range(0, pair.rank, page_rows), strict=False):
                rows = self._cast(a[start : start + page_rows], adapter, projection)
                page[group].a[layer, part * page_rows : part * page_rows + len(rows)] = rows
        at = 0
        for projection, source in self.layout.output_index(group):
            pair = adapter.weights.get((layer, projection))
            if pair is not None:
                b = _take(pair.b.T, source).astype(np.float32) * np.float32(pair.scaling)
                for page, start in zip(pages, range(0, pair.rank, page_rows), strict=False):
                    rows = self._cast(b[start : start + page_rows], adapter, projection)
                    page[group].b[layer, : len(rows), at : at + len(source)] = rows
            at += len(source)

    def _cast(self, values: np.ndarray, adapter: Adapter, projection: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(self.dtype)
        if self.dtype != np.float32 and not np.isfinite(cast).all():
            raise AdapterError(
                f"{adapter.path}: values of {projection} up to {float(np.abs(values).max()):.3g} "
                f"overflow {self.dtype.name}; serve with --dtype bfloat16 or float32"
            )
        return cast

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
        for page, host_page in zip(page_ids, staged.host_pages, strict=True):
            self._put(page, host_page)

    def _put(self, page: int, host_page: HostPage) -> None:
        on_device = jax.device_put(host_page, self._page_shardings)
        # A call per layer: one program for all layers compiles 30 times as long (18 s for a
        # 30-layer model on CPU) and takes no less time to run.
        for layer, pools in enumerate(self.pools):
            self.pools[layer] = self._write(pools, on_device, np.int32(layer), np.int32(page))

    def warm_up(self) -> None:
        """Compiles the write, by writing zeros to the padding page."""
        self._put(0, self._zeros)
        jax.block_until_ready(self.pools)


def _write_layer(
    pools: dict[str, RankPool], page: HostPage, layer: jax.Array, index: jax.Array
) -> dict[str, RankPool]:
    """All groups of one layer of one page."""

    def put(pool: jax.Array, values: jax.Array) -> jax.Array:
        rows = lax.dynamic_index_in_dim(values, layer, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(pool, rows, index, 0)

    return {
        group: RankPool(a=put(pool.a, page[group].a), b=put(pool.b, page[group].b))
        for group, pool in pools.items()
    }


def _take(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`values[:, columns]`, with zeros where the column is -1."""
    taken = values[:, columns]
    taken[:, columns < 0] = 0
    return taken
