"""The gated MLP for Hopper in ONE launch (Mosaic GPU): gate, up, activation, down and their LoRA.

One persistent block an SM. A tile of the first product has as many columns of gate as of up, so
that the activation is its epilogue; the hidden state goes to L2. Blocks take these tiles in rounds.
The second product begins with the rows of w that all rounds but the last have given an input for,
and waits for the rest when it comes to them: then the grid is long there. So the ring of tiles in
shared memory never runs dry, where separate launches leave memory idle for as long as one ends,
the activation runs and the next begins. LoRA as in `kernels_pallas.lora_matmul.hopper`, for both.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.act_mul.xla import act_mul
from kernels_pallas.gated_mlp.hopper_kernel import STAGES, GatedMLP
from kernels_pallas.gated_mlp.hopper_tuning import HALF, WIDE, Tuning, for_pages, tuning
from kernels_pallas.lora_matmul.hopper import (
    BASE_ROWS,
    device_sms,
    meta,
    padded_rows,
    product_by_xla,
    refuse,
    refuse_many_rows,
    refuse_several_pages,
)
from kernels_pallas.lora_matmul.hopper_sync import counters
from kernels_pallas.lora_matmul.types import PAGE, ActivePages, RankPool, Segments

BUSY = 0.7
"""The share of SMs that must have work in either product."""

Pools = tuple[RankPool, RankPool]


def gated_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "D twice"],
    down: Float[Array, "F D"],
    pools: tuple[RankPool | ActivePages, RankPool | ActivePages] | None,
    segments: Segments | None,
    rows: Int[Array, "..."] | None,
    *,
    activation: str,
    config: Tuning | None = None,
    sms: int | None = None,
    interpret: bool = False,
) -> Float[Array, "parts T D"]:
    """See `kernels_pallas.gated_mlp`."""
    own = [pool for pool in pools or () if isinstance(pool, RankPool)]
    if len(own) != len(pools or ()):
        raise NotImplementedError("copies of pages are not supported: the kernel copies none out")
    if any(pool.b.shape[1] != PAGE for pool in own):
        raise NotImplementedError(f"pages of {PAGE} ranks are supported")
    for w, pool in zip((gate_up, down), own or (None, None), strict=True):
        refuse(x, w, pool, interpret)
    refuse_many_rows(x)
    sms = sms or device_sms()
    hidden, width = down.shape
    if config is None:
        config = tuning(padded_rows(x.shape[0]), width, hidden, sms, lora=pools is not None)
        if segments is not None:
            config = for_pages(config, segments.pages.shape[0], sms)
    refuse_several_pages(config.single, segments)
    static = activation, config, sms, interpret
    return _gated_mlp(static, x, gate_up, down, pools, segments, rows)


def worth_it(x: jax.Array, hidden: int, *, lora: bool) -> bool:
    """Whether the launch is expected to be faster than two products and an activation."""
    least, most = BASE_ROWS
    if not (1 if lora else least) <= x.shape[0] <= most:
        return False
    sms = device_sms()
    t = tuning(padded_rows(x.shape[0]), x.shape[1], hidden, sms, lora=lora)
    tiles, units = hidden // HALF // t.rounds, x.shape[1] // WIDE * t.split
    return all(count >= BUSY * sms for count in (tiles, units))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_mlp(
    static: tuple[str, Tuning, int, bool],
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    pools: Pools | None,
    segments: Segments | None,
    rows: jax.Array | None,
) -> jax.Array:
    tokens = x.shape[0]
    padded, args = padded_rows(tokens), {"w1": gate_up, "w2": down}
    if pools is not None and segments is not None:
        first, second = pools
        pages, count, mask, sync = meta(segments, padded)
        args |= {"a1": first.a, "b1": first.b, "a2": second.a, "b2": second.b}
        args |= {"pages": pages, "count": count, "mask": mask}
    else:
        assert rows is not None, "grid-wide waits need counters, which are made of rows"
        sync = counters(jnp.sum(rows >= 0).astype(jnp.int32))
    x = jnp.pad(x, ((0, padded - tokens), (0, 0)))
    return _launch(static, {"x": x, **args, "sync": sync})[:, :tokens]


def _forward(static: Any, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _gated_mlp(static, *args), args


def _backward(static: Any, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    """Gradients of x, the weights and the pools by XLA."""
    *arrays, pools, segments, _ = saved

    def plain(x: jax.Array, gate_up: jax.Array, down: jax.Array, pools: Pools | None) -> jax.Array:
        first, second = pools or (None, None)
        both = product_by_xla(x, gate_up, first, segments, (down.shape[0],) * 2)
        h = act_mul(both, activation=static[0]).astype(x.dtype)
        return product_by_xla(h, down, second, segments, down.shape[1:])

    return (*jax.vjp(plain, *arrays, pools)[1](dy[0]), None, None)  # parts have all the same


_gated_mlp.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)
def _launch(static: tuple[str, Tuning, int, bool], args: dict[str, jax.Array]) -> jax.Array:
    activation, config, sms, interpret = static
    (rows, width), hidden = args["x"].shape, args["w2"].shape[0]
    pages = args["pages"].shape[0] if "pages" in args else 0
    kernel = GatedMLP(
        rows=rows, width=width, hidden=hidden, activation=activation, pages=pages, t=config,
        sms=sms, dtype=jnp.dtype(args["x"].dtype),
    )  # fmt: skip
    if not interpret:
        return kernel.call(STAGES, tuple(kernel.out_types()), args)["y"]
    # The interpreter has no counters that blocks can wait on: one launch a stage.
    outs = ("p1", "u1", "h", "p2", "u2", "y")
    if config.single:
        outs = ("u1", None, "h", "u2", None, "y")
    for stage, out in zip(STAGES, outs, strict=True):
        if out is not None and (pages or out in "hy"):
            args |= kernel.call((stage,), (out,), args, interpret)
    return args["y"]
