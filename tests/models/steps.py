"""Runs the decoder on steps that a test spells out: which tokens of which text, under which adapter.

A stand-in for the engine without scheduler or sampler; gives the logits of every token.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jlora.adapters.adapter import LEVELS
from jlora.adapters.peft import read_adapter
from jlora.adapters.pool import RankPages
from jlora.batch import empty, unpack
from jlora.models.base import BaseWeights
from jlora.models.config import ModelConfig
from jlora.models.decoder import ends, forward, logits
from jlora.models.weights import load_weights
from jlora.shape import Shape
from jlora.sharding import Layout, make_mesh, sharding, spec
from kernels_pallas.lora_matmul import PAGE

KV_AXES = ("page", "kv_heads", None, None)


@dataclass(frozen=True)
class Piece:
    """Tokens `start` and on of text number `text`; adapter 0 is the first one, -1 the base."""

    text: int
    start: int
    tokens: Sequence[int]
    adapter: int = -1


class Steps:
    """A loaded model with its K/V pages. Every step has the same compiled shape."""

    def __init__(
        self,
        folder: Path,
        tp: int,
        *,
        decode: int,
        prefill: int,
        adapters: Sequence[Path] = (),
        block: int = 16,
        page: int = 8,
        max_len: int = 96,
        texts: int = 8,
        dtype: str = "float32",
        copy_head: bool = True,
    ):
        cfg = ModelConfig.from_folder(folder).for_context(max_len)
        mesh = make_mesh(tp)
        base = BaseWeights(folder, cfg)
        layouts = [read_adapter(path, cfg, base) for path in adapters]
        extra = max((a.added_tokens for a in layouts), default=0)
        cfg = dataclasses.replace(cfg, extra_vocab=extra)
        layout = Layout(cfg, tp)
        self.vocab, self.page = cfg.vocab, page
        model = load_weights(folder, layout, mesh, dtype, copy_head=copy_head)
        graph, state = nnx.split(model)
        specs = [
            spec(*leaf.axes)
            for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        ]
        self.leaves, treedef = jax.tree.flatten(state)
        self.pools, self.owned = None, []
        pool_specs = P()
        if adapters:
            staged = []
            count = 1 + sum(-(-max(a.rank, 1) // PAGE) for a in layouts)
            support = LEVELS["plain"].union(*(a.support for a in layouts))
            pages = RankPages(cfg, layout, mesh, count, dtype, support=support)
            free = list(range(pages.num_pages, 0, -1))  # not in order, and one stays unused
            for adapter in layouts:
                staged.append(pages.stage(adapter))
                self.owned.append([free.pop(0) for _ in range(staged[-1].pages)])
                pages.write(staged[-1], self.owned[-1])
            self.pools = pages.pools
            pool_specs = jax.tree.map(lambda pool: pool.sharding.spec, pages.pools)
        self.shape = Shape(
            decode=decode,
            prefill=prefill,
            rank_pages=sum(map(len, self.owned)) + 1 if adapters else 0,
            block=block,
            table=-(-max_len // page),
        )
        pool = (1 + texts * self.shape.table, layout.kv_heads, page, cfg.head_dim)
        place = sharding(mesh, *KV_AXES)
        self.kv = [
            tuple(jax.device_put(np.zeros(pool, dtype), place) for _ in range(2))
            for _ in range(cfg.layers)
        ]

        def step(leaves, pools, kv, packed):
            model = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
            batch = unpack(self.shape, packed)
            tokens = jnp.maximum(batch.tokens, 0)
            hidden, kv = forward(model, pools, kv, batch, self.shape, tokens)
            return logits(model, hidden, ends(cfg, pools), batch.segments), kv

        self._step = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(specs, pool_specs, spec(*KV_AXES), P()),
                out_specs=(P(), spec(*KV_AXES)),
                check_vma=False,
            ),
            # halves the compile time; the engine's own tests run fully optimised programs
            compiler_options={"xla_backend_optimization_level": 0},
        )

    def run(
        self, decodes: Sequence[Piece] = (), prefills: Sequence[Piece] = ()
    ) -> list[np.ndarray]:
        """One step; the logits [length, vocab] of each piece, decodes first, in the order given."""
        shape = self.shape
        packed, arrays = empty(shape, 0)
        for at, (number, page) in enumerate(
            (number, page) for number, own in enumerate(self.owned) for page in own
        ):
            arrays["pages"][at], arrays["owner"][at] = page, number
        spans: dict[int, tuple[int, int]] = {}
        token = row = 0
        for pieces, block in ((decodes, 1), (prefills, shape.block)):
            if pieces is prefills:
                token = row = shape.decode
            # rows of one adapter are together, base rows last: what the engine does
            for piece in sorted(pieces, key=lambda p: p.adapter if p.adapter >= 0 else 99):
                length, blocks = len(piece.tokens), -(-len(piece.tokens) // block)
                here = slice(token, token + length)
                arrays["tokens"][here] = piece.tokens
                arrays["positions"][here] = piece.start + np.arange(length)
                first = 1 + piece.text * shape.table
                arrays["tables"][row : row + blocks] = np.arange(first, first + shape.table)
                if self.owned:
                    arrays["adapter"][here] = piece.adapter
                spans[id(piece)] = (token, token + length)
                token, row = token + blocks * block, row + blocks
            assert token <= (shape.decode if pieces is decodes else shape.tokens)
        out, self.kv = self._step(self.leaves, self.pools, self.kv, packed)
        scores = np.asarray(out)
        return [scores[slice(*spans[id(piece)])] for piece in (*decodes, *prefills)]
