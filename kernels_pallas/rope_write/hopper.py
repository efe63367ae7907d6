"""Rope and K/V write for Hopper (Mosaic GPU): a block of 128 threads a token.

All heads of a token pass through registers as tiles of K heads, each in two halves, so that the two
numbers that rope mixes are one thread's own.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.lora_matmul.hopper_sync import interpreter, load
from kernels_pallas.rope_write.types import Norms

WARPS, LANES = 4, 32


def rope_write(
    qkv: Float[Array, "T heads H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    norms: Norms | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.rope_write`."""
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")
    if qkv.dtype not in (jnp.bfloat16, jnp.float16) or {keys.dtype, values.dtype} != {qkv.dtype}:
        raise NotImplementedError(
            f"qkv {qkv.dtype}, keys {keys.dtype}, values {values.dtype}: all must be bfloat16 or float16"
        )
    if norms is not None:
        raise NotImplementedError("norms of q and k")
    kv_heads, width = keys.shape[1], keys.shape[3]
    if 2 * cos.shape[1] != width:
        raise NotImplementedError(
            f"rope of {2 * cos.shape[1]} of {width} dimensions: all must turn"
        )
    kernel = RopeWrite(
        heads=qkv.shape[1] - 2 * kv_heads, kv_heads=kv_heads, half=width // 2, interpret=interpret
    )
    return _launch(kernel, qkv, cos, sin, pages, offsets, keys, values)


@partial(jax.jit, static_argnums=0)
def _launch(kernel: "RopeWrite", *args: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeWrite:
    """Static facts of one launch, and its body."""

    heads: int
    kv_heads: int
    half: int
    interpret: bool = False

    def __post_init__(self) -> None:
        size = self.kv_heads * self.half
        if self.heads % self.kv_heads or size % (self.vector * WARPS * LANES) or self.vector < 2:
            raise NotImplementedError(
                f"{self.kv_heads} kv heads of {2 * self.half}: 4, 8, 16 ... heads of 64, 128 or 256"
            )

    @property
    def vector(self) -> int:
        """Numbers that a thread loads at once."""
        return min(8, self.kv_heads * self.half // (WARPS * LANES))

    @property
    def layout(self) -> Any:
        """K heads' halves over the threads: rows over warps, then lanes along a row."""
        rows = LANES * self.vector // self.half  # of a warp
        if rows == 1:
            tiles = ((WARPS, self.half), (self.vector,))
            return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-3,), (-2,), -1)
        tiles = ((WARPS * rows, self.half), (rows, self.half), (self.vector,))
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)

    def call(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        pages: jax.Array,
        offsets: jax.Array,
        keys: jax.Array,
        values: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Launch. The pools are refs: they are changed in place."""
        pools = jax.new_ref(keys), jax.new_ref(values)
        kernel = plgpu.kernel(
            self.body,
            out_type=jax.ShapeDtypeStruct((qkv.shape[0], self.heads, 2 * self.half), qkv.dtype),
            grid=(qkv.shape[0],),
            grid_names=("token",),
            # Nobody reads what another thread of the launch has written.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        q = kernel(qkv, cos, sin, pages, offsets, *pools)
        return q, jax.freeze(pools[0]), jax.freeze(pools[1])

    def body(
        self,
        qkv: Any,
        cos: Any,
        sin: Any,
        pages: Any,
        offsets: Any,
        keys: Any,
        values: Any,
        q: Any,
    ) -> None:
        """What the block of a token runs: all loads first, so that all are in flight at once."""
        token, layout = lax.axis_index("token"), self.layout
        shape, halves = (
            (self.kv_heads, self.half),
            (pl.ds(0, self.half), pl.ds(self.half, self.half)),
        )
        page, offset = pages[token], offsets[token]
        turn = [
            lax.broadcast_in_dim(load(part, (token,), layout.reduce(0)), shape, [1])
            for part in (cos, sin)
        ]
        groups = self.heads // self.kv_heads
        tiles = [
            [
                load(qkv, (token, self._heads(i), half), layout).astype(jnp.float32)
                for half in halves
            ]
            for i in range(groups + 2)
        ]
        for i, (first, second) in enumerate(tiles):
            if i <= groups:
                first, second = (
                    first * turn[0] - second * turn[1],
                    second * turn[0] + first * turn[1],
                )
            for half, numbers in zip(halves, (first, second), strict=True):
                if i > groups:
                    limit = float(jnp.finfo(qkv.dtype).max)
                    numbers = jnp.where(jnp.abs(numbers) <= limit, numbers, 0.0)
                numbers = numbers.astype(qkv.dtype)
                if i < groups:
                    q[token, self._heads(i), half] = numbers
                else:
                    (keys, values)[i - groups][page, :, offset, half] = numbers

    def _heads(self, i: int) -> Any:
        return pl.ds(i * self.kv_heads, self.kv_heads)
