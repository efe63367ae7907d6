"""Residual add and RMSNorm for Hopper (Mosaic GPU): a block of 128 threads a row, its numbers in registers."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load

THREADS = 128
MOST = 16384
"""Numbers of a row that fit the registers of a block."""


def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    plus_one: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """See `kernels_pallas.add_norm`."""
    width = x.shape[1]
    if {x.dtype, y.dtype, weight.dtype} not in (
        {jnp.dtype(jnp.bfloat16)},
        {jnp.dtype(jnp.float16)},
    ):
        raise NotImplementedError(
            f"x {x.dtype}, y {y.dtype}, weight {weight.dtype}: all must be bfloat16 or float16"
        )
    if weight.ndim != 1:
        raise NotImplementedError("a weight for each row: one for all is supported")
    if width % (2 * THREADS) or width > MOST:
        raise NotImplementedError(
            f"rows of {width}: multiples of {2 * THREADS} up to {MOST} are supported"
        )
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")
    kernel = AddNorm(width=width, eps=eps, plus_one=plus_one, interpret=interpret)
    return _launch(kernel, x, y, weight)


@partial(jax.jit, static_argnums=0)
def _launch(kernel: "AddNorm", *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddNorm:
    """Static facts of one launch, and its body."""

    width: int
    eps: float
    plus_one: bool
    interpret: bool = False

    def call(self, x: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Launch."""
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        kernel = plgpu.kernel(
            self.body,
            out_type=(out, out),
            grid=(x.shape[0],),
            grid_names=("row",),
            # Nobody reads what another thread of the launch has written.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(x, y, weight)

    def body(self, x: Any, y: Any, weight: Any, total: Any, normed: Any) -> None:
        """What the block of a row runs."""
        row = lax.axis_index("row")
        vector = next(n for n in (8, 4, 2) if self.width % (n * THREADS) == 0)
        layout = plgpu.Layout.WG_STRIDED((self.width,), vec_size=vector)
        own = load(weight, (), layout)
        ours, theirs = load(x, (row,), layout), load(y, (row,), layout)
        rounded = (ours.astype(jnp.float32) + theirs.astype(jnp.float32)).astype(x.dtype)
        total[row] = rounded
        wide = rounded.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(wide * wide) * (1 / self.width) + self.eps)
        if self.plus_one:
            out = wide * scale * (1 + own.astype(jnp.float32))
        else:
            own = own.astype(jnp.float32)
            out = (wide * scale).astype(x.dtype).astype(jnp.float32) * own
        normed[row] = out.astype(x.dtype)
