"""Paged attention for Hopper (Mosaic GPU): which kernel serves which rows, and what is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import hopper_plan, xla
from kernels_pallas.paged_attention.hopper_decode import Decode, top_rows
from kernels_pallas.paged_attention.hopper_prefill import ROWS, Prefill

SHARED_BYTES = 228 * 1024
"""Shared memory of one SM; each block takes 1 KiB beside what it asks for."""


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
    softcap: float | None,
) -> Float[Array, "T N H"]:
    """See `kernels_pallas.paged_attention`."""
    _refuse(q, keys, values)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    decoded = None
    if decode:
        decoded = decode_rows(q, keys, values, tables, positions, rows=decode, **options)
    if decode == q.shape[0]:
        assert decoded is not None
        return decoded
    if block % ROWS:
        theirs = (q[decode:], keys, values, tables[decode:], positions[decode:])
        blocks = xla.paged_attention(*theirs, decode=0, block=block, **options)
        return blocks if decoded is None else jnp.concatenate([decoded, blocks])
    args = (q, keys, values, tables, positions)
    return prefill_blocks(*args, decoded, decode=decode, block=block, **options)


def _refuse(q: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernels need jax 0.11, this is {jax.__version__}")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {keys.dtype, values.dtype} != {q.dtype}:
        raise NotImplementedError(
            f"q {q.dtype}, keys {keys.dtype}, values {values.dtype}: all must be bfloat16 or float16"
        )
    page, width, group = keys.shape[2], q.shape[2], q.shape[1] // keys.shape[1]
    if width not in (64, 128, 256) or top_rows(group) > 64:
        raise NotImplementedError(
            f"heads of {width} in groups of {group}: 64, 128 or 256, and at most 57, are supported"
        )
    if q.shape[1] * width % 128:
        raise NotImplementedError(f"{q.shape[1]} head of {width}: 128 or more numbers are needed")
    if page % 8 or (64 % page and page % 64):
        raise NotImplementedError(
            f"pages of {page} tokens: 8, 16, 32 or multiples of 64 are supported"
        )


def decode_rows(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "rows W"],
    positions: Int[Array, "T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    rows: int | None = None,
    blocks: int | None = None,
    workers: int | None = None,
    own: bool = True,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of the first `rows` tokens (all, unless given), one of a row each. Arrays come
    whole: XLA would wrap a slice and the launch into something that CUDA graphs don't like.
    `blocks`: warpgroups of an SM, each a block. `own`: see `Decode`."""
    tokens, heads, width = q.shape
    rows = tokens if rows is None else rows
    kv_heads, page = keys.shape[1], keys.shape[2]
    blocks = blocks or (2 if width <= 128 else 1)
    workers = workers or blocks * device_sms()
    top = top_rows(heads // kv_heads)
    room = SHARED_BYTES // blocks - 1024 - 5 * 1024 - 2 * top * hopper_plan.TILE
    stages = room // (2 * width * (top + 2 * hopper_plan.TILE))
    layout = hopper_plan.Layout(
        span=hopper_plan.Span(window), kv_heads=kv_heads, page=page, workers=workers,
        stages=min(stages, 8),
    )  # fmt: skip
    kernel = Decode(
        rows=rows, heads=heads, width=width, layout=layout, scale=scale, softcap=softcap,
        dtype=jnp.dtype(q.dtype), own=own and not interpret, interpret=interpret,
    )  # fmt: skip
    plan = hopper_plan.plan(positions[:rows], tables[:rows], layout)
    flat = q.reshape(tokens * heads, width)
    # The card fills with zeros what is beyond the end, but wants whole eights; the interpreter does not.
    extra = top if interpret else -flat.shape[0] % 8
    if extra:
        flat = jnp.pad(flat, ((0, extra), (0, 0)))
    args = (flat, keys, values, tables, positions, plan.work, plan.rows, plan.tickets)
    return _launch(kernel, *args)


def prefill_blocks(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "T"],
    decoded: Float[Array, "decode N H"] | None = None,
    *,
    decode: int,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: int | None = None,
    stages: int = 2,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attention of the tokens from `decode` on, below what `decoded` says of those before: without
    it, they are not written. `tile`: K/V positions that are multiplied at once."""
    tokens, heads, width = q.shape
    if decode % 8 and not interpret:  # the copy engine moves whole eights of rows
        extra = -decode % 8
        front = ((extra, 0), (0, 0))
        out = prefill_blocks(
            jnp.pad(q, (*front, (0, 0))), keys, values, jnp.pad(tables, front),
            jnp.pad(positions, front[0]), decoded, decode=decode + extra, block=block, scale=scale,
            window=window, softcap=softcap, tile=tile, stages=stages,
        )  # fmt: skip
        return out[extra:]
    tile = tile or (128 if width <= 128 else 64)
    kernel = Prefill(
        decode=decode, block=block, copied=0 if decoded is None else decoded.shape[0], tokens=tokens, heads=heads, kv_heads=keys.shape[1],
        width=width, page=keys.shape[2], span=hopper_plan.Span(window, tile), stages=stages,
        scale=scale, softcap=softcap, dtype=jnp.dtype(q.dtype), interpret=interpret,
    )  # fmt: skip
    at = positions[decode:].reshape(-1, ROWS)
    ends = jnp.stack([at[:, 0], at.max(1)])
    return _launch(kernel, q, keys, values, tables, ends, q if decoded is None else decoded)


@partial(jax.jit, static_argnums=0)
def _launch(kernel: Decode | Prefill, *args: jax.Array) -> jax.Array:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


def device_sms() -> int:
    """SMs of the device that is compiled for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    count = abstract.num_cores if abstract else jax.devices()[0].core_count
    return count or 132
