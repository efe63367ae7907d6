"""A step as compiled programs: a single one, or (on a CPU) three, one of them called several times.

XLA:CPU takes time in proportion to matmuls x instructions to load a program from the cache, and in
proportion to its layers to compile one. So there a step is `first` (embedding), `layers`, a stretch
of like layers that is called several times, and `last` (norm and head). A GPU takes a step whole:
one CUDA graph, no gaps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.batch import Batch, unpack
from jlora.engine import sampler
from jlora.engine.flat_model import FlatModel
from jlora.models.config import ModelConfig
from jlora.models.decoder import Decoder, Pools, embed, ends, finish, logits, through_layers
from jlora.ops import KV
from jlora.shape import Shape
from jlora.sharding import sharding, spec

KV_AXES = ("page", "kv_heads", None, None)

STRETCHES = (3, 4, 2)
"""Into how many stretches the layers may be cut; the first that the model's layers allow."""

Step = Callable[..., Any]
"""(weights, adapters, kv, last, packed) -> (kv, logits, rows, hidden). DONATES kv."""

Part = tuple[str, Shape]
"""A program by what it computes and for which shape."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What a step of some number of rank pages takes of the adapters."""

    abstract: list[Any] | None
    """By layer, then the ends'. None: the variant without LoRA."""
    specs: Any
    """Their PartitionSpecs."""


class Steps:
    """Lowers the programs of steps, and joins what was compiled to callable steps."""

    def __init__(self, flat: FlatModel, cfg: ModelConfig, mesh: Mesh, *, split: bool):
        self._flat, self._cfg, self._mesh = flat, cfg, mesh
        self._every = list(range(len(flat.abstract)))
        self._ends = flat.ends()
        count = next((n for n in STRETCHES if split and _alike(flat, cfg, n)), 1)
        size = cfg.layers // count
        self.stretches = [range(start, start + size) for start in range(0, cfg.layers, size)]
        """The layers of each call of `layers`."""
        self._leaves = [
            [number for index in stretch for number in flat.layer(index).values()]
            for stretch in self.stretches
        ]
        # Collectives of CPU devices may deadlock with programs queued behind each other.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._wait = jax.block_until_ready if on_cpu and mesh.size > 1 else lambda x: x

    def parts(self, shape: Shape, pools: Pools) -> list[Part]:
        """The programs of a step, in the order in which they run. Several shapes may share one."""
        if len(self.stretches) == 1:
            return [("whole", shape)]
        # The ends know nothing of rank pages unless adapters reach them. The packed array of a
        # shape without LoRA is the beginning of all others of its rows and tokens.
        outer = shape if ends(self._cfg, pools) else replace(shape, rank_pages=0)
        return [("first", outer), ("layers", shape), ("last", outer)]

    def lower(
        self, part: Part, adapters: Adapters, kv: list[KV], last: jax.Array
    ) -> jax.stages.Lowered:
        """One of these programs, for compiling."""
        name, shape = part
        if name == "first":
            return self._lower_first(shape, adapters, last)
        if name == "layers":
            return self._lower_layers(shape, adapters, kv)
        if name == "last":
            return self._lower_last(shape, adapters)
        return self._lower_whole(shape, adapters, kv, last)

    def join(self, parts: list[Part], programs: dict[Part, Step]) -> Step:
        """The step from its compiled programs."""
        if len(parts) == 1:
            return programs[parts[0]]
        first, layers, last = (programs[part] for part in parts)
        words, cut = parts[0][1].words, self._cfg.layers

        def step(weights: list, adapters: Any, kv: list, tokens: jax.Array, packed: np.ndarray):
            own = adapters[cut:] if adapters is not None else []
            end_weights = [weights[number] for number in self._ends]
            x = self._wait(first(end_weights, own, tokens, packed[:words]))
            stored: list[KV] = []
            for stretch, numbers in zip(self.stretches, self._leaves, strict=True):
                here = slice(stretch.start, stretch.stop)
                pools = adapters[here] if adapters is not None else None
                mine = [weights[number] for number in numbers]
                x, written = self._wait(layers(mine, pools, kv[here], x, packed))
                stored += written
            return stored, *self._wait(last(end_weights, own, x, packed[:words]))

        return step

    def _lower_whole(
        self, shape: Shape, adapters: Adapters, kv: list[KV], last: jax.Array
    ) -> jax.stages.Lowered:
        def step(weights: list, adapters: Any, kv: list, last: jax.Array, packed: jax.Array):
            model = self._flat.merge(weights, self._every)
            batch = _apart(unpack(shape, packed), last)
            own = ends(self._cfg, adapters)
            x = embed(model, own, batch, _resolve(batch, last, shape.decode))
            x, kv = through_layers(model, adapters, kv, batch, shape, x)
            return kv, *_scores(model, own, batch, shape, x)

        specs = (self._flat.specs, adapters.specs, spec(*KV_AXES), P(), P())
        mapped = self._map(step, specs, (spec(*KV_AXES), P(), P(), P()))
        return jax.jit(mapped, donate_argnums=2).lower(
            self._flat.abstract, adapters.abstract, kv, last, self._packed(shape)
        )

    def _lower_first(self, shape: Shape, adapters: Adapters, last: jax.Array) -> jax.stages.Lowered:
        def first(weights: list, own: list, last: jax.Array, packed: jax.Array):
            model, batch = self._flat.merge(weights, self._ends), unpack(shape, packed)
            return embed(model, _only(own), batch, _resolve(batch, last, shape.decode))

        weights, specs = self._of(self._ends)
        own, own_specs = self._own(adapters)
        mapped = self._map(first, (specs, own_specs, P(), P()), P())
        return jax.jit(mapped).lower(weights, own, last, self._packed(shape))

    def _lower_layers(self, shape: Shape, adapters: Adapters, kv: list[KV]) -> jax.stages.Lowered:
        def layers(weights: list, adapters: Any, kv: list, x: jax.Array, packed: jax.Array):
            model = self._flat.merge(weights, self._leaves[0])
            return through_layers(model, adapters, kv, unpack(shape, packed), shape, x)

        weights, specs = self._of(self._leaves[0])
        size = len(self.stretches[0])
        pools, pool_specs = adapters.abstract, adapters.specs
        if pools is not None:
            pools, pool_specs = pools[:size], pool_specs[:size]
        mapped = self._map(
            layers, (specs, pool_specs, spec(*KV_AXES), P(), P()), (P(), spec(*KV_AXES))
        )
        return jax.jit(mapped, donate_argnums=2).lower(
            weights, pools, kv[:size], self._hidden(shape), self._packed(shape)
        )

    def _lower_last(self, shape: Shape, adapters: Adapters) -> jax.stages.Lowered:
        def finished(weights: list, own: list, x: jax.Array, packed: jax.Array):
            model, batch = self._flat.merge(weights, self._ends), unpack(shape, packed)
            return _scores(model, _only(own), batch, shape, x)

        weights, specs = self._of(self._ends)
        own, own_specs = self._own(adapters)
        mapped = self._map(finished, (specs, own_specs, P(), P()), (P(), P(), P()))
        return jax.jit(mapped).lower(weights, own, self._hidden(shape), self._packed(shape))

    def _map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _of(self, numbers: list[int]) -> tuple[list[jax.ShapeDtypeStruct], list[P]]:
        flat = self._flat
        return [flat.abstract[n] for n in numbers], [flat.specs[n] for n in numbers]

    def _own(self, adapters: Adapters) -> tuple[list[Any], Any]:
        """What adapters have for the ends: a list of one or none."""
        if adapters.abstract is None:
            return [], P()
        cut = self._cfg.layers
        return adapters.abstract[cut:], adapters.specs[cut:]

    def _packed(self, shape: Shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.words,), jnp.int32, sharding=sharding(self._mesh))

    def _hidden(self, shape: Shape) -> jax.ShapeDtypeStruct:
        dtype = self._flat.abstract[self._flat.numbers["norm",]].dtype
        size = (shape.tokens, self._cfg.embed)
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding(self._mesh))


def _alike(flat: FlatModel, cfg: ModelConfig, count: int) -> bool:
    """Whether the layers are `count` times the same stretch, but for the values of weights."""
    if cfg.layers % count:
        return False
    size = cfg.layers // count

    def facts(index: int) -> tuple[Any, ...]:
        of = flat.layer(index).items()
        leaves = [(path, flat.abstract[number], flat.specs[number]) for path, number in of]
        return cfg.windows[index], [(p, leaf.shape, leaf.dtype, s) for p, leaf, s in leaves]

    return all(facts(index) == facts(index % size) for index in range(cfg.layers))


def _only(own: list[Any]) -> Any:
    return own[0] if own else {}


def _scores(
    model: Decoder, own: Any, batch: Batch, shape: Shape, x: jax.Array
) -> tuple[jax.Array, sampler.Rows, jax.Array | None]:
    hidden = finish(model, own, batch, x)
    rows = sampler.Rows(batch.slots, batch.positions[batch.last] + 1, batch.samples)
    scores = logits(model, hidden[batch.last], own, batch.sampled_segments)
    return scores, rows, hidden if shape.prefill else None


def _apart(batch: Batch, last: jax.Array) -> Batch:
    """The same in arrays of its own, for a CUDA graph. The packed array comes at another address in
    every step, and the host must change each node of the graph that reads it: now the few that
    copy. XLA neither folds the zero nor moves the copies past the barrier."""
    zero = jnp.minimum(last[0], 0)
    return jax.lax.optimization_barrier(jax.tree.map(lambda array: array + zero, batch))


def _resolve(batch: Batch, last: jax.Array, decode: int) -> jax.Array:
    """Input ids with -1 replaced by what the row's slot sampled last."""
    if not decode:
        return jnp.maximum(batch.tokens, 0)
    rows = batch.tokens[:decode]
    known = jnp.where(rows < 0, last[batch.slots[:decode]], rows)
    return jnp.concatenate([known, jnp.maximum(batch.tokens[decode:], 0)])
