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
from kernels_pallas.prefetch import HELPERS, Fetch, Prefetch

THREADS = 128


def act_mul(
    x: Float[Array, "T twice"],
    *,
    activation: str,
    prefetch: Prefetch | None = None,
    interpret: bool = False,
) -> Float[Array, "T F"]:
    """See `kernels_pallas.act_mul`."""
    width = x.shape[1] // 2
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x {x.dtype}: bfloat16 and float16 are supported")
    if width % (2 * THREADS):
        raise NotImplementedError(f"{width} columns: multiples of {2 * THREADS} are supported")
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")
    # The interpreter knows no caches.
    ahead = None if interpret else prefetch
    kernel = ActMul(
        rows=x.shape[0], width=width, activation=activation, interpret=interpret,
        fetch=None if ahead is None else ahead.facts,
    )  # fmt: skip
    return _launch(kernel, x, *(() if ahead is None else ahead.arrays))


@partial(jax.jit, static_argnums=0)
def _launch(kernel: "ActMul", *args: jax.Array) -> jax.Array:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActMul:
    """Static facts of one launch, and its body."""

    rows: int
    width: int
    activation: str
    fetch: Fetch | None = None
    interpret: bool = False

    @property
    def stretch(self) -> int:
        """Columns of a block of threads: up to 16 for each thread."""
        return next(n * THREADS for n in (16, 8, 4, 2) if self.width % (n * THREADS) == 0)

    @property
    def blocks(self) -> int:
        """Blocks of threads with a stretch each."""
        return self.rows * self.width // self.stretch

    def call(self, *args: jax.Array) -> jax.Array:
        """Launch."""
        x = args[0]
        kernel = plgpu.kernel(
            self.body,
            out_type=jax.ShapeDtypeStruct((self.rows, self.width), x.dtype),
            grid=(self.blocks + (HELPERS if self.fetch else 0),),
            grid_names=("block",),
            # Nobody reads what another thread of the launch has written.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        return kernel(*args)

    def body(self, x: Any, *refs: Any) -> None:
        """What a block runs."""
        *ahead, out = refs
        block = lax.axis_index("block")
        if self.fetch is None:
            self.multiply(x, out, block)
            return
        pl.when(block < self.blocks)(partial(self.multiply, x, out, block))

        @pl.when(block >= self.blocks)
        def _() -> None:
            self.fetch.issue(ahead, block - self.blocks, HELPERS)

    def multiply(self, x: Any, out: Any, block: jax.Array) -> None:
        """One stretch of a row."""
        each = jnp.int32(self.width // self.stretch)
        row, first = block // each, lax.rem(block, each) * self.stretch
        vector = min(8, self.stretch // THREADS)
        layout = plgpu.Layout.WG_STRIDED((self.stretch,), vec_size=vector)

        def half(start: int) -> jax.Array:
            columns = pl.ds(start + first, self.stretch)
            return load(x, (row, columns), layout).astype(jnp.float32)

        gate, up = half(0), half(self.width)
        out[row, pl.ds(first, self.stretch)] = (ACTIVATIONS[self.activation](gate) * up).astype(
            x.dtype
        )
