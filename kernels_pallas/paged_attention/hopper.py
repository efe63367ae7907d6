"""Paged attention for Hopper (Mosaic GPU): which kernel serves which rows, and what is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import hopper_plan, xla
from kernels_pallas.paged_attention.hopper_decode import Decode, top_rows

SHARED_BYTES = 227 * 1024
"""Shared memory of one SM that blocks can have, less 1 KiB each."""


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
    out = []
    if decode:
        mine = (q[:decode], keys, values, tables[:decode], positions[:decode])
        out.append(decode_rows(*mine, **options))
    if q.shape[0] > decode:
        theirs = (q[decode:], keys, values, tables[decode:], positions[decode:])
        out.append(xla.paged_attention(*theirs, decode=0, block=block, **options))
    return out[0] if len(out) == 1 else jnp.concatenate(out)


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
    if page % 8 or (64 % page and page % 64):
        raise NotImplementedError(
            f"pages of {page} tokens: 8, 16, 32 or multiples of 64 are supported"
        )


def decode_rows(
    q: Float[Array, "B N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "B"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    blocks: int | None = None,
    interpret: bool = False,
    workers: int | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row. `blocks`: warpgroups of an SM, each a block."""
    rows, heads, width = q.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    blocks = blocks or (2 if width <= 128 else 1)
    workers = workers or blocks * device_sms()
    top = top_rows(heads // kv_heads)
    stages = (SHARED_BYTES // blocks - 4096 - 2 * top * width) // (2 * width * (top + 128))
    layout = hopper_plan.Layout(
        span=hopper_plan.Span(window), kv_heads=kv_heads, page=page, workers=workers,
        stages=min(stages, 8),
    )  # fmt: skip
    kernel = Decode(
        rows=rows, heads=heads, width=width, layout=layout, scale=scale, softcap=softcap,
        dtype=jnp.dtype(q.dtype), interpret=interpret,
    )  # fmt: skip
    plan = hopper_plan.plan(positions, tables, layout)
    flat = q.reshape(rows * heads, width)
    # The card fills with zeros what is beyond the end, but wants whole eights; the interpreter does not.
    extra = top if interpret else -flat.shape[0] % 8
    if extra:
        flat = jnp.pad(flat, ((0, extra), (0, 0)))
    return _launch(
        kernel, flat, keys, values, tables, positions, plan.work, plan.rows, plan.tickets
    )


@partial(jax.jit, static_argnums=0)
def _launch(kernel: Decode, *args: jax.Array) -> jax.Array:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


def device_sms() -> int:
    """SMs of the device that is compiled for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    count = abstract.num_cores if abstract else jax.devices()[0].core_count
    return count or 132
