"""Random steps over a paged pool, for tests and benchmarks, and what attention gives in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Shapes of a model's attention."""

    heads: int = 32
    kv_heads: int = 8
    width: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The arguments of `paged_attention`."""

    q: jax.Array
    keys: jax.Array
    values: jax.Array
    tables: jax.Array
    positions: jax.Array
    decode: int
    block: int

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """q, keys, values, tables, positions."""
        return self.q, self.keys, self.values, self.tables, self.positions


def step(
    decode: list[int],
    prompts: list[tuple[int, int]] | None = None,
    *,
    shape: Heads,
    page: int = 16,
    block: int = 64,
    table: int | None = None,
    dtype: Any = jnp.bfloat16,
    poison: bool = False,
    seed: int = 0,
) -> Step:
    """Decode rows with contexts of the given lengths (0: padding) and prompts of (positions before,
    tokens), each as many prefill blocks as it takes (tokens 0: a block of padding). With `poison`
    page 0, which is nobody's, is NaN, and so is K beyond a row's end."""
    prompts = prompts or []
    rng = np.random.default_rng(seed)
    ends = decode + [first + tokens if tokens else 0 for first, tokens in prompts]
    needs = [-(-end // page) for end in ends]
    table = max(1, *needs) if table is None else table
    total = sum(needs) + 1
    free = iter(rng.permutation(total - 1) + 1)
    owned = np.zeros((len(ends), table), np.int32)
    for row, need in enumerate(needs):
        owned[row, :need] = [next(free) for _ in range(need)]
    positions = [np.array([end - 1 for end in decode], np.int32)]
    rows = list(range(len(decode)))
    for i, (first, tokens) in enumerate(prompts):
        blocks = max(1, -(-tokens // block))
        at = np.full(blocks * block, -1, np.int32)
        at[:tokens] = first + np.arange(tokens)
        positions.append(at)
        rows += [len(decode) + i] * blocks
    tables = owned[rows]
    at = np.concatenate(positions)
    key = jax.random.key(seed)

    def random(i: int, size: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), size, dtype)

    pool = (total, shape.kv_heads, page, shape.width)
    q = random(0, (len(at), shape.heads, shape.width)) * 2
    keys, values = random(1, pool), random(2, pool)
    if poison:
        keys, values = keys.at[0].set(jnp.nan), values.at[0].set(jnp.nan)
        for row, end in enumerate(ends):
            if end % page:
                keys = keys.at[int(owned[row, end // page]), :, end % page :].set(jnp.nan)
    return Step(
        q=q, keys=keys, values=values, tables=jnp.asarray(tables), positions=jnp.asarray(at),
        decode=len(decode), block=block,
    )  # fmt: skip


def exact(
    step: Step, *, scale: float, window: int | None = None, softcap: float | None = None
) -> np.ndarray:
    """The package's Semantics in float64; zeros for padding."""
    q, keys, values = (np.asarray(v.astype(jnp.float32), np.float64) for v in step.arrays[:3])
    tables, positions = np.asarray(step.tables), np.asarray(step.positions)
    group, page = q.shape[1] // keys.shape[1], keys.shape[2]
    out = np.zeros_like(q)
    for t, p in enumerate(positions):
        if p < 0:
            continue
        row = t if t < step.decode else step.decode + (t - step.decode) // step.block
        at = np.arange(0 if window is None else max(0, p - window + 1), p + 1)
        k = keys[tables[row, at // page], :, at % page].repeat(group, 1)  # [positions, N, H]
        v = values[tables[row, at // page], :, at % page].repeat(group, 1)
        score = np.einsum("nh,jnh->nj", q[t], k) * scale
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        weight = np.exp(score - score.max(1, keepdims=True))
        out[t] = np.einsum("nj,jnh->nh", weight / weight.sum(1, keepdims=True), v)
    return out
