"""Every compiled program of an engine: steps by shape, sampling, prompt scoring, copies of pages.

All are lowered and compiled by `compile_all`; asking for one that was not compiled is a KeyError,
so nothing ever compiles while requests wait. All run under `jax.shard_map` and see local shapes.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.batch import Batch, unpack
from jlora.engine import sampler
from jlora.engine.sampler import Kind
from jlora.models.config import STACKED_GROUPS
from jlora.models.decoder import Decoder, Pools, forward, logits
from jlora.ops import KV
from jlora.shape import Shape
from jlora.sharding import GROUP_AXES, Layout, sharding, spec
from kernels_pallas.lora_matmul import ActivePages, RankPool, Segments, active_pages, active_stacks

KV_AXES = ("page", "kv_heads", None, None)
SCORE_ROWS = 32
"""Prompt tokens whose log-probabilities one scoring call computes."""


class Programs:
    """Compiled programs, and the model's weights in the form in which they take them.

    They compile for the shapes of an abstract model; `load` brings the weights.
    """

    def __init__(
        self,
        abstract: Decoder,
        layout: Layout,
        mesh: Mesh,
        max_logprobs: int,
        *,
        copy_pages: bool,
        kinds: Sequence[Kind],
    ):
        """`kinds` of sampling are compiled, ANY among them. `copy_pages`: steps take copies of the active rank pages instead of the pools. On a CPU
        gathering them in every step costs as much as the matmuls that read them."""
        self.layout, self.mesh, self.max_logprobs = layout, mesh, max_logprobs
        self.copy_pages, self.kinds = copy_pages, sorted(kinds)
        self.dtype = abstract.norm.get_value().dtype
        self._graph, state = nnx.split(abstract)
        specs = jax.tree.map(
            lambda leaf: spec(*leaf.axes), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        self._weight_specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
        # A flat list: jit's fast path walks it in a tenth of the time of nested modules.
        leaves, self._tree = jax.tree.flatten(state)
        self._abstract_weights = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, place))
            for leaf, place in zip(leaves, self._weight_specs, strict=True)
        ]
        self.weights: list[Any] = []
        self._steps: dict[Shape, Callable[..., Any]] = {}
        self._samples: dict[tuple[int, Kind], Callable[..., Any]] = {}
        self._scores: dict[int, Callable[..., Any]] = {}
        self._copies: dict[int, Callable[..., Any]] = {}
        self._copy_shapes: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def load(self, model: Decoder) -> None:
        """Takes over the weights of a model of the same shapes."""
        self.weights, tree = jax.tree.flatten(nnx.split(model)[1])
        assert tree == self._tree

    def numbered(self) -> dict[tuple[Any, ...], int]:
        """The place of each of the model's parameters in `weights`."""
        numbers = jax.tree.unflatten(self._tree, range(len(self._abstract_weights)))
        return {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(numbers)}

    def step(self, shape: Shape) -> Callable[..., Any]:
        """(weights, adapters, kv, last, packed) -> (kv, logits, rows, hidden). DONATES kv."""
        return self._steps[shape]

    def sample(self, rows: int, kind: Kind) -> Callable[..., Any]:
        """(logits [rows, V], slots, rows) -> (sampled, slots), at least of this kind. DONATES slots."""
        return self._samples[rows, next(known for known in self.kinds if known >= kind)]

    def score(self, tokens: int) -> Callable[..., Any]:
        """(weights, pools, hidden [tokens, D], rows, targets, pages) -> Sampled, for SCORE_ROWS rows of
        a sequence whose adapter has these rank pages. Without lm_head in adapters: None, none."""
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
        sampled = [
            (n, kind) for n in sorted({shape.rows for shape in shapes}) for kind in self.kinds
        ]
        scored = sorted({shape.tokens for shape in shapes if shape.prefill})
        most = max(shape.rank_pages for shape in shapes)
        total = len(counts) + len(shapes) + len(sampled) + len(scored)
        jobs: list[tuple[dict, Any, Any]] = []
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as workers:

            def start(table: dict, key: Any, lowered: Any) -> None:
                jobs.append((table, key, workers.submit(lowered.compile)))
                tell()

            def tell() -> None:
                if progress is not None:
                    progress(sum(future.done() for _, _, future in jobs), total)

            try:
                # Lowering holds the interpreter's lock, compiling does not.
                for count in counts:
                    start(self._copies, count, self._lower_copy(count, pools))
                for shape in shapes:
                    start(self._steps, shape, self._lower_step(shape, pools, kv, slots.last))
                for rows, kind in sampled:
                    start(self._samples, (rows, kind), self._lower_sample(rows, kind, slots))
                for tokens in scored:
                    start(self._scores, tokens, self._lower_score(tokens, pools, most))
                for _ in as_completed([future for _, _, future in jobs]):
                    tell()
                for table, key, future in jobs:
                    table[key] = future.result()
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
        self, shape: Shape, pools: Pools, kv: list[KV], last: jax.Array
    ) -> jax.stages.Lowered:
        lora = shape.rank_pages > 0

        def step(weights: list, adapters: Any, kv: list, last: jax.Array, packed: jax.Array):
            model = self._model(weights)
            batch = unpack(shape, packed)
            tokens = _resolve(batch, last, shape.decode)
            hidden, kv = forward(model, adapters, kv, batch, shape, tokens)
            rows = sampler.Rows(batch.slots, batch.positions[batch.last] + 1, batch.samples)
            scores = logits(model, hidden[batch.last], adapters, batch.sampled_segments)
            return kv, scores, rows, hidden if shape.prefill else None

        adapter_specs, adapters = P(), None
        if lora and self.copy_pages:
            adapter_specs = self._active_specs(pools)
            adapters = self._copy_shapes[shape.rank_pages]
        elif lora:
            adapter_specs, adapters = _specs(pools), pools
        mapped = self._map(
            step,
            (self._weight_specs, adapter_specs, spec(*KV_AXES), P(), P()),
            (spec(*KV_AXES), P(), P(), P()),
        )
        packed = jax.ShapeDtypeStruct((shape.words,), jnp.int32, sharding=sharding(self.mesh))
        jitted = jax.jit(mapped, donate_argnums=2)
        return jitted.lower(self._abstract_weights, adapters, kv, last, packed)

    def _lower_sample(self, count: int, kind: Kind, slots: sampler.Slots) -> jax.stages.Lowered:
        def sample(scores: jax.Array, slots: sampler.Slots, rows: sampler.Rows):
            return sampler.sample(scores, slots, rows, kind, self.max_logprobs)

        replicated = sharding(self.mesh)
        ints = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=replicated)
        size = (count, self.layout.cfg.vocab_rows)
        scores = jax.ShapeDtypeStruct(size, jnp.float32, sharding=replicated)
        mapped = self._map(sample, (P(), P(), P()), P())
        jitted = jax.jit(mapped, donate_argnums=1)
        return jitted.lower(scores, slots, sampler.Rows(ints, ints, ints))  # type: ignore[arg-type]

    def _lower_score(self, tokens: int, pools: Pools, rank_pages: int) -> jax.stages.Lowered:
        full = "head" in pools[-1]

        def score(
            weights: list, pools: Any, hidden: jax.Array, rows: Any, targets: Any, pages: Any
        ):
            owner = jnp.where(pages > 0, 0, -1)  # the rows are of one sequence
            adapter = jnp.full(SCORE_ROWS, owner[0] if full else -1, jnp.int32)
            segments = Segments(pages=pages, owner=owner, adapter=adapter)
            scores = logits(self._model(weights), hidden[rows], pools, segments)
            return sampler.describe(scores, targets, self.max_logprobs)

        head = pools if full else None
        specs = (self._weight_specs, _specs(head), P(), P(), P(), P())
        replicated = sharding(self.mesh)
        size = (tokens, self.layout.cfg.embed)
        hidden = jax.ShapeDtypeStruct(size, self.dtype, sharding=replicated)
        rows = jax.ShapeDtypeStruct((SCORE_ROWS,), jnp.int32, sharding=replicated)
        pages = jax.ShapeDtypeStruct((rank_pages if full else 0,), jnp.int32, sharding=replicated)
        jitted = jax.jit(self._map(score, specs, P()))
        return jitted.lower(self._abstract_weights, head, hidden, rows, rows, pages)

    def _mapped_copy(self, pools: Pools) -> Callable:
        def copy(pools: Pools, pages: jax.Array) -> list[dict[str, ActivePages]]:
            return [
                {group: self._active(group, pool, pages) for group, pool in groups.items()}
                for groups in pools
            ]

        return self._map(copy, (_specs(pools), P()), self._active_specs(pools))

    def _active(self, group: str, pool: RankPool, pages: jax.Array) -> ActivePages:
        sizes, pairs = self.layout.part_sizes(group), self.layout.cfg.pairs_of(group)
        if group in STACKED_GROUPS:
            return active_stacks(pool, pages, part_sizes=sizes, pairs=pairs)
        return active_pages(pool, pages, part_sizes=sizes)

    def _lower_copy(self, count: int, pools: Pools) -> jax.stages.Lowered:
        pages = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharding(self.mesh))
        lowered = jax.jit(self._mapped_copy(pools)).lower(pools, pages)
        self._copy_shapes[count] = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.NamedSharding(self.mesh, place)
            ),
            lowered.out_info,
            self._active_specs(pools),
        )
        return lowered

    def _active_specs(self, pools: Pools) -> list[dict[str, ActivePages]]:
        return [
            {
                group: _active_spec(group, pool, len(self.layout.part_sizes(group)))
                for group, pool in level.items()
            }
            for level in pools
        ]


def _active_spec(group: str, pool: RankPool, parts: int) -> ActivePages:
    rows, columns = GROUP_AXES[group]
    vector, stack = spec(None, columns), (None,) if group in STACKED_GROUPS else ()
    return ActivePages(
        a=spec(*stack, None, "rank", rows),  # type: ignore[arg-type]
        b=tuple(spec(*stack, "rank", columns) for _ in range(parts)),  # type: ignore[arg-type]
        scale=None if pool.scale is None else vector,  # type: ignore[arg-type]
        offset=None if pool.offset is None else vector,  # type: ignore[arg-type]
    )


def _specs(arrays: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding.spec, arrays)


def _resolve(batch: Batch, last: jax.Array, decode: int) -> jax.Array:
    """Input ids with -1 replaced by what the row's slot sampled last."""
    if not decode:
        return jnp.maximum(batch.tokens, 0)
    rows = batch.tokens[:decode]
    known = jnp.where(rows < 0, last[batch.slots[:decode]], rows)
    return jnp.concatenate([known, jnp.maximum(batch.tokens[decode:], 0)])
