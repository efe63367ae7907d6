"""Fills a `Decoder` from safetensors: every parameter says which checkpoint rows it is made of.

Parameters are built one device shard at a time, in blocks of checkpoint rows, so that host memory
never holds more than the sharded model and one tensor. Invariant: every tensor of the checkpoint
is used, is a known harmless extra, or the load is refused with a list.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jlora.models.checkpoint import Checkpoint, Read
from jlora.models.config import GROUPS, ExpertsConfig, ModelConfig
from jlora.models.decoder import Decoder
from jlora.sharding import GROUP_AXES, Layout, sharding

Progress = Callable[[str, int, int], None]
"""Called with (parameter, bytes done, bytes in all) after each parameter."""

_BLOCK = 256
"""Checkpoint rows that are transposed at a time; measured: more rows spill the cache."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one parameter is made of checkpoint tensors."""

    path: tuple[str | int, ...]
    """Where it sits in the Decoder."""
    axes: tuple[str, ...]
    """Logical axes of the parameter."""
    parts: tuple[tuple[str, np.ndarray], ...]
    """(tensor name, its rows; -1: zeros), one after the other along the output axis."""
    columns: np.ndarray | None = None
    """Columns of the tensors in device order, -1: zeros; None: all, as they come."""
    tensor_shape: tuple[int, ...]
    """Shape of each tensor in the checkpoint ([out, in]); its length may differ by part: -1."""
    transposed: bool = False
    """The parameter is [in, out] where the checkpoint has [out, in]."""

    @property
    def name(self) -> str:
        """The parameter's name in messages."""
        return ".".join(map(str, self.path))

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the parameter."""
        rows = sum(len(index) for _, index in self.parts)
        if len(self.tensor_shape) == 1:
            return (rows,)
        columns = self.tensor_shape[1] if self.columns is None else len(self.columns)
        return (columns, rows) if self.transposed else (rows, columns)

    def fill(self, out: np.ndarray, index: tuple[slice, ...], read: Read) -> None:
        """Writes the part of the parameter that `index` selects into `out`."""
        rows_axis = 1 if self.transposed else 0
        first, last, _ = index[rows_axis].indices(self.shape[rows_axis])
        columns = self.columns
        if len(index) == 2:
            axis = 1 - rows_axis
            start, stop, _ = index[axis].indices(self.shape[axis])
            columns = np.arange(start, stop) if columns is None else columns[start:stop]
        target = out.T if self.transposed else out  # a view: [rows, columns] like the checkpoint
        at = 0
        for tensor, rows in self.parts:
            mine = rows[max(first - at, 0) : max(last - at, 0)]
            here = max(at - first, 0)
            for start in range(0, len(mine), _BLOCK):
                block = mine[start : start + _BLOCK]
                target[here + start : here + start + len(block)] = read(tensor, block, columns)
            at += len(rows)


def sources(cfg: ModelConfig, layout: Layout, copy_head: bool = True) -> list[Source]:
    """The table: one entry for each parameter of `Decoder(layout, dtype, copy_head)`."""
    vocab = layout.vocab_index
    embed = "model.embed_tokens.weight"
    table = [
        Source(
            path=("embed",),
            axes=("vocab", "embed"),
            parts=((embed, vocab),),
            tensor_shape=(cfg.vocab, cfg.embed),
        ),
        _norm(("norm",), norm_name(-1, "norm"), cfg.embed),
    ]
    if copy_head or not cfg.tied:
        table.append(
            Source(
                path=("head", "kernel"),
                axes=("embed", "vocab"),
                parts=((embed if cfg.tied else "lm_head.weight", vocab),),
                tensor_shape=(cfg.vocab, cfg.embed),
                transposed=True,
            )
        )
    for layer in range(cfg.layers):
        table += _layer(cfg, layout, layer)
    return table


def _norm(path: tuple[str | int, ...], tensor: str, width: int) -> Source:
    return Source(
        path=path,
        axes=("norm",),
        parts=((tensor, np.arange(width)),),
        tensor_shape=(width,),
    )


def tensor_name(layer: int, projection: str, kind: str = "weight") -> str:
    """The checkpoint's name of a projection's (or another module's) weight or bias."""
    if "." in projection:  # of a sparse MLP: the name in full
        return f"model.layers.{layer}.{projection}.{kind}"
    attention = projection in ("qkv_proj", *GROUPS["qkv"], *GROUPS["o"])
    return f"model.layers.{layer}.{'self_attn' if attention else 'mlp'}.{projection}.{kind}"


def norm_name(layer: int, norm: str) -> str:
    """The checkpoint's name of a norm's weight; "norm" is the last one, in no layer."""
    if norm == "norm":
        return "model.norm.weight"
    return (
        f"model.layers.{layer}.{'self_attn.' if norm in ('q_norm', 'k_norm') else ''}{norm}.weight"
    )


def _layer(cfg: ModelConfig, layout: Layout, layer: int) -> Iterator[Source]:
    here = ("layers", layer)
    for name, (own, width) in cfg.norms.items():
        yield _norm((*here, own), norm_name(layer, name), width)
    if cfg.experts is not None and cfg.is_sparse(layer):
        yield from _experts(cfg, cfg.experts, layout, layer)
    for group in cfg.groups(layer):
        runs, axes = layout.output_index(group), GROUP_AXES[group]
        yield Source(
            path=(*here, group, "weight", "kernel"),
            axes=axes,
            parts=tuple(_stored(cfg, layer, part, rows) for part, rows in runs),
            columns=layout.input_index(group),
            tensor_shape=(-1, cfg.shape(GROUPS[group][0])[0]),
            transposed=True,
        )
        if cfg.bias(group):
            yield Source(
                path=(*here, group, "bias"),
                axes=axes[1:],
                parts=tuple(_stored(cfg, layer, part, rows, "bias") for part, rows in runs),
                tensor_shape=(-1,),
            )


def _experts(
    cfg: ModelConfig, facts: ExpertsConfig, layout: Layout, layer: int
) -> Iterator[Source]:
    here, prefix = ("layers", layer, "experts"), f"model.layers.{layer}.{facts.module}"
    gate, up, down = (
        [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(facts.count)]
        for part in facts.parts
    )
    yield Source(
        path=(*here, "router"),
        axes=("embed", "expert"),
        parts=((f"{prefix}.gate.weight", np.arange(facts.count)),),
        tensor_shape=(facts.count, cfg.embed),
        transposed=True,
    )
    yield Source(
        path=(*here, "gate_up"),
        axes=("gate_up", "embed"),
        parts=tuple(
            (tensor, rows)
            for rows in np.split(layout.expert_index, layout.tp)
            for pair in zip(gate, up, strict=True)
            for tensor in pair
        ),
        tensor_shape=(facts.mlp, cfg.embed),
    )
    yield Source(
        path=(*here, "down"),
        axes=("expert", "mlp"),
        parts=tuple((tensor, np.arange(cfg.embed)) for tensor in down),
        columns=layout.expert_index,
        tensor_shape=(cfg.embed, facts.mlp),
    )


def _stored(
    cfg: ModelConfig, layer: int, part: str, rows: np.ndarray, kind: str = "weight"
) -> tuple[str, np.ndarray]:
    """(tensor, its rows) that hold these rows of a projection."""
    module, first = cfg.stored_in(part)
    return tensor_name(layer, module, kind), np.where(rows < 0, -1, rows + first)


def tensor_shapes(cfg: ModelConfig, table: list[Source]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in table:
        for tensor, _ in source.parts:
            rows = source.tensor_shape[0]
            if rows < 0:  # a projection: the tensor's name says which
                rows = cfg.shape(tensor.split(".")[-2])[1]
            shapes[tensor] = (rows, *source.tensor_shape[1:])
    return shapes


def load_weights(
    folder: str | Path,
    layout: Layout,
    mesh: Mesh,
    dtype: Any,
    *,
    copy_head: bool = True,
    progress: Progress | None = None,
) -> Decoder:
    """A Decoder with the weights of the checkpoint in `folder`, sharded over `mesh`.

    Raises ModelError that lists what is missing, extra or mis-shaped before anything is read.
    """
    cfg = layout.cfg
    table = sources(cfg, layout, copy_head)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(tensor_shapes(cfg, table), tied=cfg.tied, multimodal=cfg.multimodal)

    def make(source: Source, dtype: np.dtype) -> jax.Array:
        place = sharding(mesh, *source.axes)
        shards: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}
        arrays = []
        with checkpoint.reader(dtype) as read:
            for device, index in place.addressable_devices_indices_map(source.shape).items():
                assert index is not None
                spans = tuple(s.indices(n) for s, n in zip(index, source.shape, strict=True))
                if spans not in shards:  # replicas share the host's copy
                    shards.clear()
                    shards[spans] = _empty([len(range(*span)) for span in spans], dtype)
                    source.fill(shards[spans], index, read)
                arrays.append(jax.device_put(shards[spans], device))
                arrays[-1].block_until_ready()  # the host's copy may go before the next is made
        return jax.make_array_from_single_device_arrays(source.shape, place, arrays)

    return _build(layout, table, make, dtype, copy_head, progress)


def abstract_decoder(layout: Layout, dtype: Any, *, copy_head: bool = True) -> Decoder:
    """A Decoder with the shapes and types of its weights in their places: enough to compile for."""
    return nnx.eval_shape(lambda: Decoder(layout, jnp.dtype(dtype), copy_head))


def dummy_weights(
    layout: Layout, mesh: Mesh, dtype: Any, seed: int = 0, *, copy_head: bool = True
) -> Decoder:
    """A Decoder with random weights, made on the devices: for benchmarks without a checkpoint."""
    table = sources(layout.cfg, layout, copy_head)
    keys = iter(jax.random.split(jax.random.key(seed), len(table)))

    def make(source: Source, dtype: np.dtype) -> jax.Array:
        place, key = sharding(mesh, *source.axes), next(keys)
        if source.axes == ("norm",):
            fill = np.zeros if layout.cfg.norm_plus_one else np.ones
            return jax.device_put(fill(source.shape, dtype), place)
        fan_in = source.shape[0] if source.transposed else source.shape[1]
        fan_in = 1 if source.path == ("embed",) else fan_in
        return _random(source.shape, fan_in, dtype, place)(key)

    return _build(layout, table, make, dtype, copy_head, None)


@cache  # one program per kind of parameter
def _random(
    shape: tuple[int, ...], fan_in: int, dtype: np.dtype, place: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    def normal(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return jax.jit(normal, out_shardings=place)


def _build(
    layout: Layout,
    table: list[Source],
    make: Callable[[Source, np.dtype], jax.Array],
    dtype: Any,
    copy_head: bool,
    progress: Progress | None,
) -> Decoder:
    """A Decoder whose every parameter comes from `make`; nothing else is allocated."""
    dtype = np.dtype(dtype)
    graph, state = nnx.split(abstract_decoder(layout, dtype, copy_head=copy_head))
    params = dict(nnx.to_flat_state(state))
    by_path = {source.path: source for source in table}
    assert by_path.keys() == params.keys(), by_path.keys() ^ params.keys()
    total = sum(int(np.prod(source.shape)) for source in table) * dtype.itemsize
    done, filled = 0, []
    for path, source in by_path.items():
        want = tuple(params[path].get_value().shape)
        assert want == source.shape, (source.name, want, source.shape)
        filled.append((path, params[path].replace(make(source, dtype))))
        done += int(np.prod(source.shape)) * dtype.itemsize
        if progress is not None:
            progress(source.name, done, total)
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a multiple of 64 bytes: jax on a CPU takes it over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
