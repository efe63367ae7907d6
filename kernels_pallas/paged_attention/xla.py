"""Plain-XLA paged attention: online softmax over chunks of pages, for CPU and as a fallback.

The number of chunks is dynamic (the longest row of the step decides), so cost follows the true
lengths and one compiled step serves every context length.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK = {"cpu": 128, "gpu": 512}
"""K/V positions that one turn of the loop looks at: on a GPU a turn costs a look of the host."""

MASKED = -1e30


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "T"],
    *,
    decode: int,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Float[Array, "T N H"]:
    """See `kernels_pallas.paged_attention`."""
    tokens, heads, width = q.shape
    out = []
    if decode:
        rows = q[:decode].reshape(decode, 1, heads, width)
        at = positions[:decode, None]
        out.append(_rows(rows, keys, values, tables[:decode], at, scale, window, softcap))
    if tokens > decode:
        blocks = (tokens - decode) // block
        rows = q[decode:].reshape(blocks, block, heads, width)
        at = positions[decode:].reshape(blocks, block)
        out.append(_rows(rows, keys, values, tables[decode:], at, scale, window, softcap))
    return jnp.concatenate([part.reshape(-1, heads, width) for part in out])


def _rows(
    q: Float[Array, "b t N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "b W"],
    positions: Int[Array, "b t"],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "b t N H"]:
    """Attention of t query tokens in each of b rows; a row's tokens share its page table."""
    b, t, heads, width = q.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    positions_a_turn = CHUNK.get(jax.default_backend(), CHUNK["gpu"])
    per_chunk = max(1, min(positions_a_turn // page, tables.shape[1]))
    chunk = per_chunk * page
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_chunk)))
    # [b, K, t·G, H]: one matmul per row and kv head
    grouped = q.reshape(b, t, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(b, kv_heads, t * group, width)
    query_at = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [b, 1, t·G, 1]

    # float32 operands mean float32 arithmetic, also where a GPU would default to tf32
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)

    def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, acc = carry
        ids = lax.dynamic_slice_in_dim(tables, i * per_chunk, per_chunk, axis=1)
        k, v = keys[ids], values[ids]  # [b, pages, K, page, H]
        score = dot("bkqh,bpkch->bkqpc", grouped, k)
        score = score.reshape(*score.shape[:3], chunk) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        at = i * chunk + jnp.arange(chunk)
        seen = at <= query_at
        if window is not None:
            seen &= at > query_at - window
        score = jnp.where(seen, score, MASKED)
        new_peak = jnp.maximum(peak, score.max(-1, keepdims=True))
        weight = jnp.exp(score - new_peak) * seen
        fade = jnp.exp(peak - new_peak)
        total = total * fade + weight.sum(-1, keepdims=True)
        weight = weight.astype(v.dtype).reshape(*weight.shape[:3], per_chunk, page)
        acc = acc * fade + dot("bkqpc,bpkch->bkqh", weight, v)
        return new_peak, total, acc

    rows = (b, kv_heads, t * group)
    start = (
        jnp.full((*rows, 1), MASKED, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    first = jnp.int32(0)
    if window is not None:
        lowest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min()
        first = jnp.maximum(lowest - window + 1, 0) // chunk
    if (
        tables.shape[1] == per_chunk
    ):  # one turn sees all: no loop, which a CUDA graph could not hold
        _, total, acc = turn(jnp.int32(0), start)
    else:
        _, total, acc = lax.fori_loop(first, positions.max() // chunk + 1, turn, start)
    out = acc / jnp.maximum(total, 1e-30)
    out = out.reshape(b, kv_heads, t, group, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, t, heads, width).astype(q.dtype)


def write_kv(
    pool: Float[Array, "P K page H"],
    rows: Float[Array, "T K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
) -> Float[Array, "P K page H"]:
    """`pool` with row t stored in pages[t] at offsets[t]."""
    return pool.at[pages, :, offsets].set(rows.astype(pool.dtype))
