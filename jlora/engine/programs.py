"""Every compiled program of an engine: steps by shape, prompt scoring, and the copies of active pages.

All are lowered and compiled by `compile_all`; asking for one that was not compiled is a KeyError,
so nothing ever compiles while requests wait. All run under `jax.shard_map` and see local shapes.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.batch import Batch, unpack
from jlora.engine import sampler
from jlora.models.config import GROUPS
from jlora.models.decoder import Decoder, Pools, forward, logits
from jlora.ops import KV
from jlora.shape import Shape
from jlora.sharding import GROUP_AXES, Layout, sharding, spec
from kernels_pallas.lora_matmul import ActivePages, active_pages

KV_AXES = ("page", "kv_heads", None, None)
SCORE_ROWS = 32
"""Prompt tokens whose log-probabilities one scoring call computes."""


class Programs:
    """Compiled programs, and the model's weights in the form in which they take them."""

    def __init__(
        self, model: Decoder, layout: Layout, mesh: Mesh, max_logprobs: int, *, copy_pages: bool
    ):
        """`copy_pages`: steps take copies of the active rank pages instead of the pools. On a CPU
        gathering them in every step costs as much as the matmuls that read them."""
        self.layout, self.mesh, self.max_logprobs = layout, mesh, max_logprobs
        self.copy_pages = copy_pages
        self.dtype = model.norm[...].dtype
        self._graph, state = nnx.split(model)
        specs = jax.tree.map(
            lambda leaf: spec(*leaf.axes), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        self._weight_specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
        # A flat list: jit's fast path walks it in a tenth of the time of nested modules.
        self.weights, self._tree = jax.tree.flatten(state)
        self._steps: dict[Shape, Callable[..., Any]] = {}
        self._scores: dict[int, Callable[..., Any]] = {}
        self._copies: dict[int, Callable[..., Any]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def step(self, shape: Shape) -> Callable[..., Any]:
        """(weights, adapters, kv, slots, packed) -> (kv, slots, sampled, hidden). DONATES kv, slots."""
        return self._steps[shape]

    def score(self, tokens: int) -> Callable[..., Any]:
        """(weights, hidden [tokens, D], rows, targets) -> Sampled, for SCORE_ROWS rows."""
        return self._scores[tokens]

    def copy(self, rank_pages: int) -> Callable[..., Any]:
        """(pools, pages [rank_pages]) -> the active pages of every layer and group."""
        return self._copies[rank_pages]

    def compile_all(
        self,
        shapes: Sequence[Shape],
        pools: Pools,
        kv: list[KV],
        slots: sampler.Slots,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles the steps of all shapes and what goes with them; `progress(done, total)`."""
        counts = sorted({shape.rank_pages for shape in shapes} - {0}) if self.copy_pages else []
        scored = sorted({shape.tokens for shape in shapes if shape.prefill})
        total = len(counts) + len(shapes) + len(scored)
        jobs: list[tuple[dict, Any, Any]] = []
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as workers:

            def start(table: dict, key: Any, lowered: Any) -> None:
                jobs.append((table, key, workers.submit(lowered.compile)))

            try:
                # Lowering holds the interpreter's lock, compiling does not.
                for count in counts:
                    start(self._copies, count, self._lower_copy(count, pools))
                for shape in shapes:
                    start(self._steps, shape, self._lower_step(shape, pools, kv, slots))
                for tokens in scored:
                    start(self._scores, tokens, self._lower_score(tokens))
                for done, (table, key, future) in enumerate(jobs, start=1):
                    table[key] = future.result()
                    if progress is not None:
                        progress(done, total)
            except BaseException:  # Ctrl-C: don't compile the rest of the queue first
                workers.shutdown(wait=False, cancel_futures=True)
                raise

    def _model(self, weights: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))

    def _map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _lower_step(
        self, shape: Shape, pools: Pools, kv: list[KV], slots: sampler.Slots
    ) -> jax.stages.Lowered:
        lora = shape.rank_pages > 0

        def step(weights: list, adapters: Any, kv: list, slots: sampler.Slots, packed: jax.Array):
            model = self._model(weights)
            batch = unpack(shape, packed)
            tokens = _resolve(batch, slots, shape.decode)
            hidden, kv = forward(model, adapters, kv, batch, shape, tokens)
            scores = logits(model, hidden[batch.last])
            sampled, slots = sampler.sample(scores, slots, batch, self.max_logprobs)
            return kv, slots, sampled, hidden if shape.prefill else None

        adapter_specs, adapters = P(), None
        if lora and self.copy_pages:
            adapter_specs = self._active_specs()
            adapters = jax.eval_shape(self._mapped_copy(pools), pools, _ints(shape.rank_pages))
            adapters = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=jax.NamedSharding(self.mesh, place)
                ),
                adapters,
                adapter_specs,
            )
        elif lora:
            adapter_specs, adapters = _specs(pools), pools
        mapped = self._map(
            step,
            (self._weight_specs, adapter_specs, spec(*KV_AXES), P(), P()),
            (spec(*KV_AXES), P(), P(), P()),
        )
        packed = jax.ShapeDtypeStruct((shape.words,), jnp.int32, sharding=sharding(self.mesh))
        jitted = jax.jit(mapped, donate_argnums=(2, 3))
        return jitted.lower(self.weights, adapters, kv, slots, packed)

    def _lower_score(self, tokens: int) -> jax.stages.Lowered:
        def score(weights: list, hidden: jax.Array, rows: jax.Array, targets: jax.Array):
            return sampler.describe(
                logits(self._model(weights), hidden[rows]), targets, self.max_logprobs
            )

        mapped = self._map(score, (self._weight_specs, P(), P(), P()), P())
        replicated = sharding(self.mesh)
        size = (tokens, self.layout.cfg.embed)
        hidden = jax.ShapeDtypeStruct(size, self.dtype, sharding=replicated)
        rows = jax.ShapeDtypeStruct((SCORE_ROWS,), jnp.int32, sharding=replicated)
        return jax.jit(mapped).lower(self.weights, hidden, rows, rows)

    def _mapped_copy(self, pools: Pools) -> Callable:
        def copy(pools: Pools, pages: jax.Array) -> list[dict[str, ActivePages]]:
            return [
                {
                    group: active_pages(pool, pages, part_sizes=self.layout.part_sizes(group))
                    for group, pool in groups.items()
                }
                for groups in pools
            ]

        return self._map(copy, (_specs(pools), P()), self._active_specs())

    def _lower_copy(self, count: int, pools: Pools) -> jax.stages.Lowered:
        pages = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharding(self.mesh))
        return jax.jit(self._mapped_copy(pools)).lower(pools, pages)

    def _active_specs(self) -> list[dict[str, ActivePages]]:
        groups = {
            group: ActivePages(
                a=spec(None, "rank", rows),  # type: ignore[arg-type]
                b=tuple(spec("rank", columns) for _ in GROUPS[group]),  # type: ignore[arg-type]
            )
            for group, (rows, columns) in GROUP_AXES.items()
        }
        return [groups] * self.layout.cfg.layers


def _specs(arrays: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding.spec, arrays)


def _ints(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.int32)


def _resolve(batch: Batch, slots: sampler.Slots, decode: int) -> jax.Array:
    """Input ids with -1 replaced by what the row's slot sampled last."""
    if not decode:
        return jnp.maximum(batch.tokens, 0)
    rows = batch.tokens[:decode]
    known = jnp.where(rows < 0, slots.last[batch.slots[:decode]], rows)
    return jnp.concatenate([known, jnp.maximum(batch.tokens[decode:], 0)])
