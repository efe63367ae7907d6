"""The fused LoRA matmul for Hopper: base GEMM, shrink and expand in ONE launch (Mosaic GPU).

One persistent block an SM. A producer warpgroup streams tiles of w through shared memory to the
multiplying warpgroup; beside them a shrink warpgroup computes u = x A^T of the active pages:
slices of K first (`p`), summed in a second pass after a grid-wide wait. Expanding is then nothing
but a few more K steps of the base GEMM, [x | u] @ [w ; B], taken before the last tiles of w so
that nothing waits for them. No shape depends on how many pages are active. That is for up to 64
rows; hopper_wide has the launch for more.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.lora_matmul import hopper_wide, hopper_wide_tuning, xla
from kernels_pallas.lora_matmul.hopper_kernel import Kernel
from kernels_pallas.lora_matmul.hopper_sync import counters
from kernels_pallas.lora_matmul.hopper_tuning import Tuning, base_tuning, for_pages, tuning
from kernels_pallas.lora_matmul.types import RankPool, Segments

NARROW_ROWS = 64
"""With more, hopper_wide serves: from there on it is faster."""

BASE_ROWS = (9, 64)
"""Fewest and most rows of which the product alone is ours: at 8 and 256 XLA's is faster."""

BASE_BUSY = 0.7
"""The share of SMs that must have a tile then: llama-3.1-8b's are between 0.73 and 0.97."""


def matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    pool: RankPool,
    segments: Segments,
    *,
    part_sizes: tuple[int, ...],
    config: Tuning | hopper_wide_tuning.Tuning | None = None,
    sms: int | None = None,
    interpret: bool = False,
) -> Float[Array, "parts T N"]:
    """`x @ w` plus the delta in x's dtype; where K was split, parts in float32 that are to be summed.

    Calls that share `segments` must depend on one another, as the projections of a decoder do:
    they share two counters, which every call leaves at zero.
    """
    refuse(x, w, pool, interpret)
    sms = sms or device_sms()
    rows = padded_rows(x.shape[0])
    tiles = tuning if rows <= NARROW_ROWS else hopper_wide_tuning.tuning
    if config is None:
        config = tiles(rows, x.shape[1], part_sizes, sms)
        if isinstance(config, Tuning):
            config = for_pages(config, segments.pages.shape[0], sms)
    if isinstance(config, Tuning):
        refuse_many_rows(x)
        refuse_several_pages(config.single, segments)
    return _matmul(part_sizes, config, sms, interpret, x, w, pool, segments)


def base_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    *,
    part_sizes: tuple[int, ...],
    config: Tuning | None = None,
    sms: int | None = None,
    interpret: bool = False,
) -> Float[Array, "parts T N"]:
    """`x @ w` alone, as `matmul` gives it: the same launch without a shrink. A decoder's step of 32
    rows is 2% faster with it than with XLA's matmuls, which split K of three projections in four."""
    refuse(x, w, None, interpret)
    refuse_many_rows(x)
    sms = sms or device_sms()
    config = config or base_tuning(padded_rows(x.shape[0]), x.shape[1], part_sizes, sms)
    return _matmul(part_sizes, config, sms, interpret, x, w, None, None)


def base_worth_it(x: jax.Array, w: jax.Array, part_sizes: tuple[int, ...]) -> bool:
    """Whether `base_matmul` is expected to be faster than XLA. NotImplementedError where there is none."""
    least, most = BASE_ROWS
    if not least <= x.shape[0] <= most:
        return False
    sms = device_sms()
    t = base_tuning(padded_rows(x.shape[0]), w.shape[0], part_sizes, sms)
    return w.shape[1] // t.bn * t.split >= BASE_BUSY * sms


def worth_it(x: jax.Array, part_sizes: tuple[int, ...]) -> bool:
    """Whether the kernel is faster than XLA for these shapes, as far as it was measured."""
    return hopper_wide_tuning.worth_it(x.shape[0], part_sizes, device_sms())


def refuse(x: jax.Array, w: jax.Array, pool: RankPool | None, interpret: bool) -> None:
    """NotImplementedError for types and versions that no fused launch takes."""
    kinds = {x.dtype, w.dtype} | (set() if pool is None else {pool.a.dtype})
    if len(kinds) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16):
        pages = "" if pool is None else f", pool {pool.a.dtype}"
        raise NotImplementedError(
            f"x {x.dtype}, w {w.dtype}{pages}: all must be bfloat16 or float16"
        )
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")


def refuse_many_rows(x: jax.Array) -> None:
    """NotImplementedError for more than the launch for few rows takes."""
    if x.shape[0] > NARROW_ROWS:
        raise NotImplementedError(f"{x.shape[0]} rows: up to {NARROW_ROWS} are supported")


def refuse_several_pages(single: bool, segments: Segments | None) -> None:
    """ValueError for tiles of a single rank page where more may be active: all but one would be lost."""
    if single and segments is not None and segments.pages.shape[0] > 1:
        raise ValueError(
            f"these tiles serve one rank page, {segments.pages.shape[0]} may be active"
        )


def padded_rows(rows: int) -> int:
    """With what the launch adds to make tiles."""
    return -(-rows // 8) * 8


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul(
    part_sizes: tuple[int, ...],
    config: Tuning | hopper_wide_tuning.Tuning,
    sms: int,
    interpret: bool,
    x: jax.Array,
    w: jax.Array,
    pool: RankPool | None,
    segments: Segments | None,
) -> jax.Array:
    """Without pool and segments: the product alone."""
    rows = x.shape[0]
    padded, lora = padded_rows(rows), ()
    if pool is not None and segments is not None:
        if isinstance(config, hopper_wide_tuning.Tuning):
            own: dict[str, Any] = {"config": config, "sms": sms, "interpret": interpret}
            return hopper_wide.matmul(x, w, pool, segments, part_sizes=part_sizes, **own)
        lora = (pool.a, pool.b, *meta(segments, padded))
    assert isinstance(config, Tuning)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    y = _launch(x, w, *lora, part_sizes=part_sizes, t=config, sms=sms, interpret=interpret)
    return y[:, :rows]


def _matmul_forward(
    part_sizes: tuple[int, ...], config: Any, sms: int, interpret: bool, *args: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _matmul(part_sizes, config, sms, interpret, *args), args


def _matmul_backward(
    part_sizes: tuple[int, ...], config: Any, sms: int, interpret: bool, saved: Any, dy: Any
) -> tuple[Any, ...]:
    """Gradients of x, w, A and B by XLA: training batches are large, where its matmuls win."""
    x, w, pool, segments = saved
    dy = dy[0]  # parts are only ever summed: all have the same

    def plain(x: jax.Array, w: jax.Array, pool: RankPool | None) -> jax.Array:
        return product_by_xla(x, w, pool, segments, part_sizes).astype(dy.dtype)

    return (*jax.vjp(plain, x, w, pool)[1](dy), None)


def product_by_xla(
    x: jax.Array,
    w: jax.Array,
    pool: RankPool | None,
    segments: Segments | None,
    part_sizes: tuple[int, ...],
) -> jax.Array:
    """What gradients are taken of: base and delta as matmuls of their own."""
    y = xla.base_matmul(x, w)
    if pool is not None and segments is not None:
        y = y + xla.lora_delta(x, pool, segments, part_sizes=part_sizes)
    return y


_matmul.defvjp(_matmul_forward, _matmul_backward)


def device_sms() -> int:
    """Streaming multiprocessors of the device that is compiled for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    count = abstract.num_cores if abstract else jax.devices()[0].core_count
    return count or 132


def meta(segments: Segments, rows: int) -> tuple[jax.Array, ...]:
    """pages, owner and count of active pages, the mask [Pa, rows], and counters that are zero.

    The same for all layers: XLA computes it once a step."""
    extra = -segments.pages.shape[0] % 8
    pages = jnp.pad(segments.pages, (0, extra))
    owner = jnp.pad(segments.owner, (0, extra), constant_values=-1)
    over = -(-rows // 64) * 64 - segments.adapter.shape[0]
    adapter = jnp.pad(segments.adapter, (0, over), constant_values=-1)
    count = jnp.sum(owner >= 0).astype(jnp.int32)[None]
    mask = ((owner[:, None] == adapter) & (adapter >= 0)).astype(jnp.float32)
    return pages, count, mask, counters(count)


@partial(jax.jit, static_argnames=("part_sizes", "t", "sms", "interpret"))
def _launch(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"],
    a: Float[Array, "P R K"] | None = None,
    b: Float[Array, "P 16 N"] | None = None,
    pages: Int[Array, " Pa"] | None = None,
    count: Int[Array, " 1"] | None = None,
    mask: Float[Array, "Pa rows"] | None = None,
    sync: Int[Array, " words"] | None = None,
    *,
    part_sizes: tuple[int, ...],
    t: Tuning,
    sms: int,
    interpret: bool,
) -> Float[Array, "split T N"]:
    k = Kernel(
        rows=x.shape[0], width=x.shape[1], part_sizes=part_sizes,
        pages=0 if pages is None else pages.shape[0], t=t, sms=sms, dtype=jnp.dtype(x.dtype),
    )  # fmt: skip
    y, u, *slices = k.out_types()
    if pages is None:
        return k.call("multiply", (y,), (x, w), interpret)[0]
    args: tuple[Any, ...] = (x, w, a, b, pages, count, mask, sync)
    if not interpret:
        return k.call("all", (y, u, *slices), args)[0]
    # The interpreter has no counters that blocks can wait on: one launch a phase.
    (u_or_slices,) = k.call("slices", (*slices, u)[:1], args, interpret)
    if slices:
        (u_or_slices,) = k.call("sum", (u,), (*args, u_or_slices), interpret)
    return k.call("multiply", (y,), (*args, u_or_slices), interpret)[0]
