"""Every compiled program of an engine: steps by shape, sampling, prompt scoring, copies of pages.

`compile_all` compiles them all, or loads them from a cache; asking for another is a KeyError, so
nothing ever compiles while requests wait. All run under `jax.shard_map` and see local shapes.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.engine import sampler
from jlora.engine.flat_model import FlatModel
from jlora.engine.program_cache import ProgramCache, abstract
from jlora.engine.sampler import Kind
from jlora.engine.steps import Adapters, Part, Steps
from jlora.models.config import STACKED_GROUPS
from jlora.models.decoder import Decoder, Pools, ends, logits
from jlora.ops import KV
from jlora.shape import Shape
from jlora.sharding import GROUP_AXES, Layout, sharding, spec
from kernels_pallas.lora_matmul import ActivePages, RankPool, Segments, active_pages, active_stacks

SCORE_ROWS = 32
"""Prompt tokens whose log-probabilities one scoring call computes."""


@dataclass(frozen=True)
class _Job:
    """A program to be had."""

    table: dict[Any, Any]
    """Where it goes, at `key`."""
    key: Any
    name: str
    """Says what `lower` lowers, beside what all programs of the engine have in common."""
    lower: Callable[[], jax.stages.Lowered]


class Programs:
    """Compiled programs, and the model's weights in the form in which they take them.

    They compile for the shapes of an abstract model; `load` brings the weights.
    """

    def __init__(
        self,
        model: Decoder,
        layout: Layout,
        mesh: Mesh,
        max_logprobs: int,
        *,
        copy_pages: bool,
        split: bool,
        kinds: Sequence[Kind],
        folder: Path | None,
    ):
        """`kinds` of sampling are compiled, ANY among them. `copy_pages`: steps take copies of the
        active rank pages instead of the pools: on a CPU gathering them in every step costs as much
        as the matmuls that read them. `split`: a step is several programs where the layers allow
        it, see steps.py. `folder` keeps programs between runs."""
        self.layout, self.mesh, self.max_logprobs = layout, mesh, max_logprobs
        self.copy_pages, self.kinds = copy_pages, sorted(kinds)
        self.dtype = model.norm.get_value().dtype
        self.flat = FlatModel(model, mesh)
        self._split, self._folder = split, folder
        self._lowering = Steps(self.flat, layout.cfg, mesh, split=split)
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
        self.weights = self.flat.leaves(model)

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
        """Compiles or loads the steps of all shapes and what goes with them; `progress(done, total)`."""
        counts = sorted({shape.rank_pages for shape in shapes} - {0}) if self.copy_pages else []
        scored = sorted({shape.tokens for shape in shapes if shape.prefill})
        most = max(shape.rank_pages for shape in shapes)
        parts = {shape: self._lowering.parts(shape, pools) for shape in shapes}
        programs: dict[Part, Callable[..., Any]] = {}

        def lower_part(part: Part) -> jax.stages.Lowered:
            adapters = self._adapters(pools, part[1].rank_pages)
            return self._lowering.lower(part, adapters, kv, slots.last)

        cfg = replace(self.layout.cfg, name="")
        model = f"{cfg} {self.dtype} {self.copy_pages} {self._split} {abstract(self.flat.abstract)}"
        pages, memory, state = map(
            str, (abstract(pools), abstract((kv, slots.last)), abstract(slots))
        )
        jobs: list[_Job] = []
        for count in counts:
            lower = partial(self._lower_copy, count, pools)
            jobs.append(_Job(self._copies, count, f"copy {count} {cfg} {pages}", lower))
        for part in dict.fromkeys(part for own in parts.values() for part in own):
            name = f"step {part} {model} {pages} {memory}"
            jobs.append(_Job(programs, part, name, partial(lower_part, part)))
        for rows in sorted({shape.rows for shape in shapes}):
            for kind in self.kinds:
                name = f"sample {rows} {kind} {self.max_logprobs} {cfg.vocab_rows} {state}"
                lower = partial(self._lower_sample, rows, kind, slots)
                jobs.append(_Job(self._samples, (rows, kind), name, lower))
        for tokens in scored:
            name = f"score {tokens} {most} {self.max_logprobs} {model} {pages}"
            lower = partial(self._lower_score, tokens, pools, most)
            jobs.append(_Job(self._scores, tokens, name, lower))
        self._run_all(jobs, progress)
        for shape, own in parts.items():
            self._steps[shape] = self._lowering.join(own, programs)

    def _run_all(self, jobs: Sequence[_Job], progress: Callable[[int, int], None] | None) -> None:
        """Puts every job's program where it belongs."""
        cache = ProgramCache(self._folder, self.mesh)
        futures: list[Any] = []

        def tell() -> None:
            if progress is not None:
                progress(sum(future.done() for future in futures), len(jobs))

        with cache.compiling(), ThreadPoolExecutor(os.cpu_count() or 2) as workers:
            try:
                for job in jobs:
                    if cache.has(job.name):
                        futures.append(workers.submit(cache.load, job.name, job.lower))
                    else:  # lowering holds the interpreter's lock, compiling does not
                        futures.append(workers.submit(cache.compile, job.name, job.lower()))
                    tell()
                for _ in as_completed(futures):
                    tell()
                for job, future in zip(jobs, futures, strict=True):
                    job.table[job.key] = future.result()
            except BaseException:  # Ctrl-C: don't compile the rest of the queue first
                workers.shutdown(wait=False, cancel_futures=True)
                raise
        cache.prune()

    def _map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _adapters(self, pools: Pools, rank_pages: int) -> Adapters:
        """What a step of so many rank pages takes."""
        if not rank_pages:
            return Adapters(abstract=None, specs=P())
        if self.copy_pages:
            copies = self._copied(rank_pages, pools)
            return Adapters(abstract=copies, specs=self._active_specs(pools))
        return Adapters(abstract=pools, specs=_specs(pools))

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
        every = list(range(len(self.flat.abstract)))

        def score(
            weights: list, pools: Any, hidden: jax.Array, rows: Any, targets: Any, pages: Any
        ):
            owner = jnp.where(pages > 0, 0, -1)  # the rows are of one sequence
            adapter = jnp.full(SCORE_ROWS, owner[0] if full else -1, jnp.int32)
            segments = Segments(pages=pages, owner=owner, adapter=adapter)
            own = ends(self.layout.cfg, pools)
            scores = logits(self.flat.merge(weights, every), hidden[rows], own, segments)
            return sampler.describe(scores, targets, self.max_logprobs)

        head = pools if full else None
        specs = (self.flat.specs, _specs(head), P(), P(), P(), P())
        replicated = sharding(self.mesh)
        size = (tokens, self.layout.cfg.embed)
        hidden = jax.ShapeDtypeStruct(size, self.dtype, sharding=replicated)
        rows = jax.ShapeDtypeStruct((SCORE_ROWS,), jnp.int32, sharding=replicated)
        pages = jax.ShapeDtypeStruct((rank_pages if full else 0,), jnp.int32, sharding=replicated)
        jitted = jax.jit(self._map(score, specs, P()))
        return jitted.lower(self.flat.abstract, head, hidden, rows, rows, pages)

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
        return jax.jit(self._mapped_copy(pools)).lower(pools, pages)

    def _copied(self, count: int, pools: Pools) -> list[dict[str, ActivePages]]:
        """What copies of so many pages look like."""
        if count not in self._copy_shapes:
            pages = jax.ShapeDtypeStruct((count,), jnp.int32)
            self._copy_shapes[count] = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=jax.NamedSharding(self.mesh, place)
                ),
                jax.eval_shape(self._mapped_copy(pools), pools, pages),
                self._active_specs(pools),
            )
        return self._copy_shapes[count]

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
