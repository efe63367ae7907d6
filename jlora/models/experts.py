"""The sparse MLP: a router picks a few experts for each token, and their outputs add up.

Tokens are sorted by expert and cut into blocks of rows that share one, so that each expert's
weights are read once for its rows and not at all if nobody chose it.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import ops
from jlora.batch import Batch
from jlora.models.config import ModelConfig
from jlora.quant import matmul
from jlora.sharding import Layout


class Experts(nnx.Module):
    """Router and experts of one layer. Adapters do not reach them."""

    def __init__(self, layout: Layout, dtype: jnp.dtype):
        cfg, facts = layout.cfg, layout.cfg.experts
        assert facts is not None
        self.tp = layout.tp
        width = len(layout.expert_index)

        def param(rows: int, columns: int, *axes: str) -> nnx.Param:
            return nnx.Param(jnp.zeros((rows, columns), dtype), axes=axes)

        self.router = param(cfg.embed, facts.count, "embed", "expert")
        # [2 · mlp, D] of each expert below each other, device by device
        self.gate_up = param(facts.count * 2 * width, cfg.embed, "gate_up", "embed")
        self.down = param(facts.count * cfg.embed, width, "expert", "mlp")

    def __call__(
        self, x: Float[Array, "T D"], cfg: ModelConfig, batch: Batch
    ) -> Float[Array, "T D"]:
        """The weighted sum of the chosen experts' outputs, float32."""
        assert cfg.experts is not None
        count, embed = cfg.experts.count, x.shape[1]
        weights, chosen = jax.lax.top_k(
            jax.nn.softmax(matmul(x, self.router[...])), cfg.experts.per_token
        )
        if cfg.experts.normalised:
            weights /= weights.sum(axis=-1, keepdims=True)
        # Padding rows choose an expert that is not there.
        chosen = jnp.where(batch.positions[:, None] < 0, count, chosen)
        gate_up = self.gate_up[...].reshape(count, -1, embed)
        down = self.down[...].reshape(count, embed, -1)
        y = _sum_of_experts(x, chosen, weights, gate_up, down, ops.ACTIVATIONS[cfg.activation])
        return ops.all_reduce(y, self.tp)


def _sum_of_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: Float[Array, "E 2*F D"],
    down: Float[Array, "E D F"],
    activation: ops.Activation,
) -> Float[Array, "T D"]:
    """y[t] = sum over j of weights[t, j] · expert(chosen[t, j])(x[t]); chosen E: nothing.

    Example, blocks of 2 rows, chosen [[0], [2], [0], [0]]: rows in order of their expert 0 2 3 1,
    blocks (expert 0: 0 2), (expert 0: 3), (expert 2: 1).
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
        gate, up = jnp.split(matmul(x[own], gate_up[expert].T), 2, axis=1)
        out = matmul((activation(gate) * up).astype(x.dtype), down[expert].T)
        return y.at[own].add(out * jnp.where(real, weight[at], 0)[:, None])

    def turn(index: Array, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return jax.lax.cond(index < last_block[-1], block, lambda _, y: y, index, y)

    # As many turns as there can be blocks: a number that is known makes the loop differentiable.
    most = picks // rows + min(experts, picks)
    return jax.lax.fori_loop(0, most, turn, jnp.zeros(x.shape, jnp.float32))
