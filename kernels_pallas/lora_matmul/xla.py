"""The LoRA delta as plain XLA dots over the active pages: for CPUs and for GPUs without a kernel.

All active pages are one matrix: shrink every row by every page in one dot, zero what is not the
row's own, expand in one dot a part. Work grows with rows x active pages, which is right while
the active pages are few beside the width of the weight.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.lora_matmul.types import ActivePages, RankPool, Segments


@partial(jax.jit, static_argnames="part_sizes")  # traced once for all layers of a model
def active_pages(
    pool: RankPool, pages: Int[Array, " Pa"], *, part_sizes: tuple[int, ...]
) -> ActivePages:
    """Copy the pages of a step out of the pool.

    On a CPU the copy costs as much as the dots that read it, and the pages of a batch rarely
    change from one step to the next: an engine may call this when they do, and pass the result
    to `lora_delta` in the pool's place.
    """
    parts, (page, width) = len(part_sizes), (pool.b.shape[1], pool.a.shape[-1])
    count = pages.shape[0]
    a = pool.a[pages].reshape(count, parts, page, width).swapaxes(0, 1)
    ends = [sum(part_sizes[: j + 1]) for j in range(parts)]
    b = jnp.split(pool.b[pages], ends[:-1], axis=2)
    return ActivePages(
        a=a.reshape(parts, count * page, width),
        b=tuple(p.reshape(count * page, p.shape[-1]) for p in b),
        scale=None if pool.scale is None else pool.scale[pages],
        offset=None if pool.offset is None else pool.offset[pages],
    )


@partial(jax.jit, static_argnames=("part_sizes", "pairs"))
def active_stacks(
    pool: RankPool, pages: Int[Array, " Pa"], *, part_sizes: tuple[int, ...], pairs: int
) -> ActivePages:
    """`active_pages` of a pool whose pages hold `pairs` low-rank pairs one after the other (one for
    each expert): all arrays have an axis of pairs before the others."""
    parts, page, width = len(part_sizes), pool.b.shape[1] // pairs, pool.a.shape[-1]
    a = pool.a[pages].reshape(-1, pairs, parts, page, width).transpose(1, 2, 0, 3, 4)
    b = pool.b[pages].reshape(-1, pairs, page, pool.b.shape[-1]).swapaxes(0, 1)
    b = b.reshape(pairs, -1, b.shape[-1])
    ends = [sum(part_sizes[: j + 1]) for j in range(parts)]
    return ActivePages(
        a=a.reshape(pairs, parts, -1, width),
        b=tuple(jnp.split(b, ends[:-1], axis=2)),
    )


def pair_of_stacks(
    pool: RankPool | ActivePages,
    segments: Segments,
    pair: Int[Array, ""],
    *,
    part_sizes: tuple[int, ...],
    pairs: int,
) -> ActivePages:
    """The active pages of one of the `pairs`, for `lora_delta`. Of a pool nothing else is read."""
    if isinstance(pool, ActivePages):
        return ActivePages(a=pool.a[pair], b=tuple(b[pair] for b in pool.b))
    a = pool.a.reshape(pool.a.shape[0], pairs, -1, pool.a.shape[-1])[segments.pages, pair]
    b = pool.b.reshape(pool.b.shape[0], pairs, -1, pool.b.shape[-1])[segments.pages, pair]
    one = RankPool(a=a, b=b)
    return active_pages(one, jnp.arange(a.shape[0]), part_sizes=part_sizes)


def lora_delta(
    x: Float[Array, "T K"],
    pool: RankPool | ActivePages,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
) -> Float[Array, "T N"]:
    """The LoRA part of the output, in float32."""
    out = _deltas(x, pool, segments, part_sizes)
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _deltas(
    x: jax.Array, pool: RankPool | ActivePages, segments: Segments, part_sizes: tuple[int, ...]
) -> list[jax.Array]:
    """The LoRA part of each part of the output, in float32."""
    if isinstance(pool, RankPool):
        pool = active_pages(pool, segments.pages, part_sizes=part_sizes)
    rows, parts = x.shape[0], len(part_sizes)
    u = _dot(x, pool.a.reshape(-1, x.shape[1]), (1, 1)).reshape(rows, parts, -1)
    u = jnp.where(_own(segments, u.shape[-1])[:, None], u, 0.0).astype(pool.a.dtype)
    return [_dot(u[:, j], b, (1, 0)) for j, b in enumerate(pool.b)]


def lora_embedding(
    tokens: Int[Array, " T"], pool: RankPool | ActivePages, segments: Segments
) -> Float[Array, "T N"]:
    """The LoRA part of an embedding's rows, in float32: the delta for one-hot inputs, whose shrink
    is a look-up of A's columns."""
    if isinstance(pool, RankPool):
        u = pool.a[segments.pages[:, None], :, tokens].swapaxes(0, 1)  # [T, Pa, page]
        u = u.reshape(tokens.shape[0], -1)
        b = pool.b[segments.pages].reshape(-1, pool.b.shape[-1])
    else:
        u, (b,) = pool.a[0][:, tokens].T, pool.b
    return _dot(jnp.where(_own(segments, u.shape[-1]), u, 0), b, (1, 0))


def lora_epilogue(
    y: Float[Array, "T N"], pool: RankPool | ActivePages, segments: Segments
) -> Float[Array, "T N"]:
    """y times its row's `scale` plus its `offset`; base rows as they are. y itself for a pool
    without them. Under tensor parallelism it comes after the sum over devices."""
    if pool.scale is None or pool.offset is None:
        return y
    page, mine = _page(pool, segments)
    scale, offset = pool.scale[page].astype(y.dtype), pool.offset[page].astype(y.dtype)
    return jnp.where(mine, y * scale + offset, y)


def lora_vectors(pool: RankPool | ActivePages, segments: Segments) -> Float[Array, "T N"]:
    """The `offset` of each row's adapter, zeros for base rows: what is added to weights that are
    vectors, such as a norm's."""
    assert pool.offset is not None, "a pool of vectors has offsets"
    page, mine = _page(pool, segments)
    return jnp.where(mine, pool.offset[page], 0)


def _page(pool: RankPool | ActivePages, segments: Segments) -> tuple[jax.Array, jax.Array]:
    """(any page of each row's adapter, whether it has one: [T, 1])."""
    own = _owners(segments)
    page = jnp.argmax(own, axis=1)
    if isinstance(pool, RankPool):
        page = segments.pages[page]
    return page, own.any(axis=1)[:, None]


def matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    pool: RankPool | ActivePages,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
) -> Float[Array, "T N"]:
    """`x @ w` plus the delta, in float32; on a GPU in bfloat16 in x's dtype (see `_accumulate`)."""
    if jax.default_backend() == "gpu" and x.dtype != jnp.float32 and isinstance(pool, RankPool):
        return _accumulate(x, w, pool, segments, part_sizes)
    y, deltas = base_matmul(x, w), _deltas(x, pool, segments, part_sizes)
    if len(deltas) == 1:
        return y + deltas[0]
    # Part by part: who reads one part of the sum then reads no concatenation.
    ends = [sum(part_sizes[: j + 1]) for j in range(len(part_sizes))]
    parts = jnp.split(y, ends[:-1], axis=1)
    return jnp.concatenate([own + delta for own, delta in zip(parts, deltas, strict=True)], axis=1)


def _accumulate(
    x: jax.Array, w: jax.Array, pool: RankPool, segments: Segments, part_sizes: tuple[int, ...]
) -> jax.Array:
    """All parts' expand as one matmul with B laid out block by block, so that XLA can make the
    sum its epilogue: y is read and written once more, and nothing in float32 reaches memory."""
    active = active_pages(pool, segments.pages, part_sizes=part_sizes)
    part = np.repeat(np.arange(len(part_sizes)), part_sizes)  # the part of each column
    b = jnp.concatenate(active.b, axis=1)  # [Pa*page, N]
    blocks = jnp.where(part == np.arange(len(part_sizes))[:, None, None], b, 0)
    u = _dot(x, active.a.reshape(-1, x.shape[1]), (1, 1)).reshape(x.shape[0], len(part_sizes), -1)
    u = jnp.where(_own(segments, u.shape[-1])[:, None], u, 0.0).astype(x.dtype)
    return x @ w + u.reshape(x.shape[0], -1) @ blocks.reshape(-1, w.shape[1])


def _own(segments: Segments, ranks: int) -> jax.Array:
    """Whether rank row i is the row's own: [T, ranks], all pages' rank rows."""
    own = _owners(segments)
    return jnp.repeat(own, ranks // own.shape[1], axis=1)


def _owners(segments: Segments) -> jax.Array:
    """Whether active page i is the row's own: [T, Pa]."""
    return (segments.adapter[:, None] == segments.owner) & (segments.adapter[:, None] >= 0)


def base_matmul(
    x: Float[Array, "T K"], w: Float[Array, "K N"], out_dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "T N"]:
    """`x @ w`, accumulated in float32."""
    if jax.default_backend() == "gpu" and jnp.dtype(out_dtype) == x.dtype != jnp.float32:
        return x @ w  # converted as it is written: XLA makes a conversion a kernel of its own
    return _dot(x, w, (1, 0)).astype(out_dtype)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    # float32 operands mean float32 arithmetic, also where a GPU would default to tf32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
