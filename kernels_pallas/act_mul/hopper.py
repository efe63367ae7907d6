"""The gate of an MLP for Hopper (Mosaic GPU): a block of 128 threads takes a stretch of a row."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.act_mul.xla import ACTIVATIONS
from kernels_pallas.lora_matmul.hopper_sync import interpreter, load

THREADS = 128


def act_mul(
    x: Float[Array, "T twice"], *, activation: str, interpret: bool = False
) -> Float[Array, "T F"]:
    """See `kernels_pallas.act_mul`."""
    width = x.shape[1] // 2
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x {x.dtype}: bfloat16 and float16 are supported")
    if width % (2 * THREADS):
        raise NotImplementedError(f"{width} columns: multiples of {2 * THREADS} are supported")
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")
    kernel = ActMul(width=width, activation=activation, interpret=interpret)
    return _launch(kernel, x)


@partial(jax.jit, static_argnums=0)
def _launch(kernel: "ActMul", x: jax.Array) -> jax.Array:
    return kernel.call(x)  # a jit of its own: layers share one lowering


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActMul:
    """Static facts of one launch, and its body."""

    width: int
    activation: str
    interpret: bool = False

    @property
    def stretch(self) -> int:
        """Columns of a block of threads: up to 16 for each thread."""
        return next(n * THREADS for n in (16, 8, 4, 2) if self.width % (n * THREADS) == 0)

    def call(self, x: jax.Array) -> jax.Array:
        """Launch."""
        kernel = plgpu.kernel(
            self.body,
            kernel_name="act_mul",
            out_type=jax.ShapeDtypeStruct((x.shape[0], self.width), x.dtype),
            grid=(x.shape[0], self.width // self.stretch),
            grid_names=("row", "stretch"),
            # Nobody reads what another thread of the launch has written.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(x)

    def body(self, x: Any, out: Any) -> None:
        """What a block runs."""
        row, first = lax.axis_index("row"), lax.axis_index("stretch") * self.stretch
        vector = min(8, self.stretch // THREADS)
        layout = plgpu.Layout.WG_STRIDED((self.stretch,), vec_size=vector)

        def half(start: int) -> jax.Array:
            columns = pl.ds(start + first, self.stretch)
            return load(x, (row, columns), layout).astype(jnp.float32)

        gate, up = half(0), half(self.width)
        result = ACTIVATIONS[self.activation](gate) * up
        out[row, pl.ds(first, self.stretch)] = result.astype(x.dtype)
