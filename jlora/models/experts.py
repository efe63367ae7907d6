"""The sparse MLP: a router picks a few experts for each token, and their outputs add up.

Tokens are sorted by expert and cut into blocks of rows that share one, so that each expert's
weights are read once for its rows and not at all if nobody chose it; so are the rank pages that
adapters have for that expert.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import ops
from jlora.batch import Batch
from jlora.models.config import STACKED_GROUPS, ModelConfig
from jlora.quant import matmul
from jlora.sharding import Layout
from kernels_pallas.lora_matmul import (
    ActivePages,
    RankPool,
    Segments,
    lora_delta,
    pair_of_stacks,
)

Pools = Mapping[str, RankPool | ActivePages]
"""A layer's rank pools by group; those of `EXPERT_GROUPS` may not be there."""


class Delta(Protocol):
    """What adapters add to one projection group of one expert."""

    def __call__(
        self, x: Float[Array, "M in"], rows: Int[Array, "M"], expert: Int[Array, ""]
    ) -> Float[Array, "M out"]:
        """For inputs that belong to these rows of the step."""
        ...


class Experts(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, layout: Layout, dtype: jnp.dtype):
        cfg, facts = layout.cfg, layout.cfg.experts
        assert facts is not None
        self.tp = layout.tp
        self.parts = tuple(layout.part_sizes(group) for group in STACKED_GROUPS)
        width = len(layout.expert_index)

        def param(rows: int, columns: int, *axes: str) -> nnx.Param:
            return nnx.Param(jnp.zeros((rows, columns), dtype), axes=axes)

        self.router = param(cfg.embed, facts.count, "embed", "expert")
        # [2 · mlp, D] of each expert below each other, device by device
        self.gate_up = param(facts.count * 2 * width, cfg.embed, "gate_up", "embed")
        self.down = param(facts.count * cfg.embed, width, "expert", "mlp")

    def __call__(
        self, x: Float[Array, "T D"], cfg: ModelConfig, batch: Batch, pools: Pools
    ) -> Float[Array, "T D"]:
        """The weighted sum of the chosen experts' outputs, float32."""
        assert cfg.experts is not None
        count, embed = cfg.experts.count, x.shape[1]
        scores = matmul(x, self.router[...])
        if "router" in pools:
            sizes = scores.shape[1:]
            scores += _delta(x, pools["router"], batch.segments, sizes)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), cfg.experts.per_token)
        if cfg.experts.normalised:
            weights /= weights.sum(axis=-1, keepdims=True)
        # Padding rows choose an expert that is not there.
        chosen = jnp.where(batch.positions[:, None] < 0, count, chosen)
        gate_up = self.gate_up[...].reshape(count, -1, embed)
        down = self.down[...].reshape(count, embed, -1)
        deltas = None
        if pools.keys() >= set(STACKED_GROUPS):
            deltas = tuple(
                _delta_of_expert(pools[group], batch.segments, sizes, count)
                for group, sizes in zip(STACKED_GROUPS, self.parts, strict=True)
            )
        activation = ops.ACTIVATIONS[cfg.activation]
        y = _sum_of_experts(x, chosen, weights, gate_up, down, activation, deltas)
        return ops.all_reduce(y, self.tp)


def _delta(
    x: Float[Array, "M in"],
    pool: RankPool | ActivePages,
    segments: Segments,
    sizes: tuple[int, ...],
) -> Float[Array, "M out"]:
    return lora_delta(x, pool, segments, part_sizes=sizes, out_dtype=jnp.float32)


def _delta_of_expert(
    pool: RankPool | ActivePages, segments: Segments, sizes: tuple[int, ...], count: int
) -> Delta:
    def delta(x: Array, rows: Array, expert: Array) -> Array:
        own = pair_of_stacks(pool, segments, expert, part_sizes=sizes, pairs=count)
        here = Segments(pages=segments.pages, owner=segments.owner, adapter=segments.adapter[rows])
        return _delta(x, own, here, sizes)

    return delta


def _sum_of_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: Float[Array, "E 2*F D"],
    down: Float[Array, "E D F"],
    activation: ops.Activation,
    deltas: tuple[Delta, ...] | None = None,
) -> Float[Array, "T D"]:
    """y[t] = sum over j of weights[t, j] · expert(chosen[t, j])(x[t]); chosen E: nothing.

    Example, blocks of 2 rows, chosen [[0], [2], [0], [0]]: rows in order of their expert 0 2 3 1,
    blocks (expert 0: 0 2), (expert 0: 3), (expert 2: 1). `deltas`: what adapters add to gate_up and
    to down.
    """
    experts, per_token = gate_up.shape[0], chosen.shape[1]
    picks = chosen.size
    rows = min(128, max(8, 1 << (picks // experts).bit_length()))
    order = jnp.argsort(chosen.reshape(-1))  # stable
    token, weight = order // per_token, weights.reshape(-1)[order]
    counts = jnp.bincount(chosen.reshape(-1), length=experts + 1)[:experts]
    last_block = jnp.cumsum(-(-counts // rows))
    last_pick = jnp.cumsum(counts)

    def block(index: Array, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
        expert = jnp.searchsorted(last_block, index, side="right")
        ahead = last_block[expert] - index  # blocks of this expert from here on
        at = last_pick[expert] - counts[expert]
        at += (-(-counts[expert] // rows) - ahead) * rows + jnp.arange(rows)
        real, at = at < last_pick[expert], jnp.minimum(at, picks - 1)
        own = token[at]
        hidden, wide = x[own], matmul(x[own], gate_up[expert].T)
        if deltas is not None:
            wide += deltas[0](hidden, own, expert)
        gate, up = jnp.split(wide, 2, axis=1)
        hidden = (activation(gate) * up).astype(x.dtype)
        out = matmul(hidden, down[expert].T)
        if deltas is not None:
            out += deltas[1](hidden, own, expert)
        return y.at[own].add(out * jnp.where(real, weight[at], 0)[:, None])

    def turn(index: Array, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return jax.lax.cond(index < last_block[-1], block, lambda _, y: y, index, y)

    # As many turns as there can be blocks: a number that is known makes the loop differentiable.
    most = picks // rows + min(experts, picks)
    return jax.lax.fori_loop(0, most, turn, jnp.zeros(x.shape, jnp.float32))
