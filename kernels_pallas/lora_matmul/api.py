"""The public functions: shape checks, then one of the implementations.

"reference" and "xla" run everywhere; "hopper" is one fused launch (bfloat16, H100 or H200). A
named implementation never falls back: what it cannot do is a NotImplementedError. None picks the
best for the default backend, and says once in the log what it picked where that is no kernel.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.hardware import is_hopper, say_once
from kernels_pallas.lora_matmul import reference, xla
from kernels_pallas.lora_matmul.types import PAGE, ActivePages, RankPool, Segments

IMPLEMENTATIONS = ("reference", "xla", "hopper")
FUSED_ROWS = 8192
"""With more rows the fused kernel serves only who names it: nothing larger was measured."""


def lora_delta(
    x: Float[Array, "T K"],
    pool: RankPool | ActivePages,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
    implementation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "T N"]:
    """The LoRA part alone. `out_dtype` is x's unless given; see the package for Semantics."""
    check(x, pool, segments, part_sizes)
    delta = _module(implementation).lora_delta(x, pool, segments, part_sizes=part_sizes)
    return delta.astype(out_dtype or x.dtype)


def lora_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    pool: RankPool | ActivePages | None = None,
    segments: Segments | None = None,
    *,
    part_sizes: tuple[int, ...],
    bias: Float[Array, " N"] | None = None,
    implementation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    summed: bool = True,
) -> Float[Array, "*parts T N"]:
    """`x @ w + bias` plus the LoRA part. Without pool or segments: the base matmul alone.

    `summed` false: the result has an axis of parts before the others, one or more in float32 (or
    one in `out_dtype`), for a reader that sums them on its way, such as `add_norm`.
    """
    if w.shape != (x.shape[1], sum(part_sizes)):
        raise ValueError(
            f"w has shape {w.shape}, expected (K, sum(part_sizes)) = "
            f"{(x.shape[1], sum(part_sizes))} for x {x.shape} and part_sizes {part_sizes}"
        )
    y = parts = None
    if pool is not None and segments is not None:
        check(x, pool, segments, part_sizes)
        parts = _fused(x, w, pool, segments, part_sizes, implementation)
        if parts is None:
            y = _module(implementation).matmul(x, w, pool, segments, part_sizes=part_sizes)
    else:
        product = jnp.float32 if bias is not None else out_dtype or x.dtype
        if implementation is None and jnp.dtype(product) == x.dtype:
            parts = _base(x, w, part_sizes)
        if parts is None:
            module = _module(None if implementation == "hopper" else implementation)
            y = module.base_matmul(x, w, product)
    if parts is not None and len(parts) > 1 and not summed and bias is None:
        return parts
    if parts is not None:
        y = parts[0] if len(parts) == 1 else parts.sum(0)
    assert y is not None
    if bias is not None:
        y = y + bias.astype(y.dtype)
    y = y.astype(out_dtype or x.dtype)
    return y if summed else y[None]


def _fused(
    x: jax.Array,
    w: jax.Array,
    pool: RankPool | ActivePages,
    segments: Segments,
    part_sizes: tuple[int, ...],
    implementation: str | None,
) -> jax.Array | None:
    """The fused kernel's parts of the result; None where another implementation is to be taken."""
    automatic = implementation is None
    if implementation not in (None, "hopper"):
        return None
    if automatic and (not is_hopper("lora_matmul") or x.shape[0] > FUSED_ROWS):
        return None
    if not isinstance(pool, RankPool):
        raise NotImplementedError("the fused kernel takes a RankPool: it copies no pages out")
    if pool.b.shape[1] != PAGE:
        if automatic:
            return None
        raise NotImplementedError(f"the fused kernel takes pages of {PAGE} ranks")
    from kernels_pallas.lora_matmul import hopper  # imports Mosaic GPU: only where it is used

    if automatic and not hopper.worth_it(x, part_sizes):
        return None
    try:
        return hopper.matmul(x, w, pool, segments, part_sizes=part_sizes)
    except NotImplementedError as reason:
        if not automatic:
            raise
        say_once(f"lora_matmul: no fused kernel, XLA instead ({reason})")
        return None


def _base(x: jax.Array, w: jax.Array, part_sizes: tuple[int, ...]) -> jax.Array | None:
    """The kernel's parts of the product alone; None where XLA's is to be taken."""
    if not is_hopper("lora_matmul"):
        return None
    from kernels_pallas.lora_matmul import hopper  # imports Mosaic GPU: only where it is used

    try:
        if hopper.base_worth_it(x, w, part_sizes):
            return hopper.base_matmul(x, w, part_sizes=part_sizes)
    except NotImplementedError:
        pass
    return None


def _module(implementation: str | None) -> ModuleType:
    if implementation == "hopper":
        raise NotImplementedError(
            "implementation 'hopper' is one fused launch: lora_matmul with a pool and segments"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"implementation {implementation!r} of lora_matmul; there are {IMPLEMENTATIONS}"
        )
    return reference if implementation == "reference" else xla


def check(
    x: jax.Array | jax.ShapeDtypeStruct,
    pool: RankPool | ActivePages,
    segments: Segments,
    part_sizes: tuple[int, ...],
) -> None:
    """ValueError for a pool or segments that do not fit x and its projections."""
    if isinstance(pool, RankPool):
        page = pool.b.shape[1]
        want_a = (len(part_sizes) * page, x.shape[1])
        want_b = (page, sum(part_sizes))
        if pool.a.shape[1:] != want_a or pool.b.shape[1:] != want_b:
            raise ValueError(
                f"pool pages have shapes a {pool.a.shape[1:]}, b {pool.b.shape[1:]}, expected "
                f"(parts*page, K) = {want_a} and (page, N) = {want_b} for part_sizes {part_sizes}"
            )
    if segments.adapter.shape != x.shape[:1] or segments.pages.shape != segments.owner.shape:
        raise ValueError(
            f"segments have adapter {segments.adapter.shape}, pages {segments.pages.shape}, owner "
            f"{segments.owner.shape}; expected ({x.shape[0]},) and two of one length"
        )
    if not jnp.issubdtype(segments.pages.dtype, jnp.integer):
        raise ValueError(f"segments.pages is {segments.pages.dtype}, expected int32")
