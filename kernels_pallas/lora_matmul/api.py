"""The public functions: shape checks, then one of the implementations.

`implementation` names one ("reference", "xla") and never falls back; None picks the best for the
default backend.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul import reference, xla
from kernels_pallas.lora_matmul.types import PAGE, ActivePages, RankPool, Segments

IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "xla": xla}


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
    _check(x, pool, segments, part_sizes)
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
) -> Float[Array, "T N"]:
    """`x @ w + bias` plus the LoRA part. Without pool or segments: the base matmul alone."""
    if w.shape != (x.shape[1], sum(part_sizes)):
        raise ValueError(
            f"w has shape {w.shape}, expected (K, sum(part_sizes)) = "
            f"{(x.shape[1], sum(part_sizes))} for x {x.shape} and part_sizes {part_sizes}"
        )
    module = _module(implementation)
    y = module.base_matmul(x, w)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if pool is not None and segments is not None:
        _check(x, pool, segments, part_sizes)
        y = y + module.lora_delta(x, pool, segments, part_sizes=part_sizes)
    return y.astype(out_dtype or x.dtype)


def _module(implementation: str | None) -> ModuleType:
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise NotImplementedError(
            f"implementation {name!r} of lora_matmul; there are {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name]


def _check(
    x: jax.Array,
    pool: RankPool | ActivePages,
    segments: Segments,
    part_sizes: tuple[int, ...],
) -> None:
    if isinstance(pool, RankPool):
        want_a = (len(part_sizes) * PAGE, x.shape[1])
        want_b = (PAGE, sum(part_sizes))
        if pool.a.shape[1:] != want_a or pool.b.shape[1:] != want_b:
            raise ValueError(
                f"pool pages have shapes a {pool.a.shape[1:]}, b {pool.b.shape[1:]}, expected "
                f"(parts*16, K) = {want_a} and (16, N) = {want_b} for part_sizes {part_sizes}"
            )
    if segments.adapter.shape != x.shape[:1] or segments.pages.shape != segments.owner.shape:
        raise ValueError(
            f"segments have adapter {segments.adapter.shape}, pages {segments.pages.shape}, owner "
            f"{segments.owner.shape}; expected ({x.shape[0]},) and two of one length"
        )
    if not jnp.issubdtype(segments.pages.dtype, jnp.integer):
        raise ValueError(f"segments.pages is {segments.pages.dtype}, expected int32")
