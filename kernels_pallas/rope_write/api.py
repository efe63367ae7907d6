"""The public function: one of the implementations.

"xla" runs everywhere; "hopper" is a Mosaic GPU kernel for bfloat16 and float16 on an H100 or H200. A
named implementation never falls back: what it cannot do is a NotImplementedError.
"""

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.hardware import is_hopper, say_once
from kernels_pallas.rope_write import xla
from kernels_pallas.rope_write.types import Norms

IMPLEMENTATIONS = ("xla", "hopper")


def rope_write(
    qkv: Float[Array, "T heads H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    *,
    norms: Norms | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """(rotated q, keys, values) as the package's Semantics say. DONATES keys and values where a
    caller's jit does: they are changed in place.

    Args:
        qkv: heads of q, then of k, then of v, side by side.
        pages, offsets: where each token's K and V go; padding tokens may share a place.
        norms: of q and k, before they turn.
        implementation: "xla", "hopper" or None (chosen by the platform).

    Raises:
        ValueError: for shapes that do not fit each other.
        NotImplementedError: for an implementation that does not exist, or cannot do this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"rope_write has no implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    args = (qkv, cos, sin, pages, offsets, keys, values)
    _check(*args)
    if implementation == "hopper" or (implementation is None and is_hopper("rope_write")):
        from kernels_pallas.rope_write import hopper  # imports Mosaic GPU: only where used

        try:
            return hopper.rope_write(*args, norms=norms)
        except NotImplementedError as reason:
            if implementation is not None:
                raise
            say_once(f"rope_write: no kernel, XLA instead ({reason})")
    return xla.rope_write(*args, norms=norms)


def _check(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> None:
    tokens, heads, width = qkv.shape
    kv_heads = keys.shape[1]
    each = {cos.shape[:1], sin.shape[:1], pages.shape, offsets.shape} == {(tokens,)}
    pools = keys.shape == values.shape and keys.shape[3] == width and heads > 2 * kv_heads
    if not each or not pools or cos.shape != sin.shape:
        raise ValueError(
            f"qkv {qkv.shape}, cos {cos.shape}, sin {sin.shape}, pages {pages.shape}, offsets "
            f"{offsets.shape}, keys {keys.shape}, values {values.shape}; expected [T, N + 2 K, H], two "
            "[T, half], two [T] and two [P, K, page, H]"
        )
