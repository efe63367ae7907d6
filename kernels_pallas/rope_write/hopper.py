"""Rope and K/V write for Hopper (Mosaic GPU): a block of 128 threads a token.

The heads of q, of k and of v pass through registers as a tile each, in two halves, so that the two
numbers that rope mixes are one thread's own.
"""

import dataclasses
import itertools
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
    *,
    norms: Norms | None,
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.rope_write`."""
    if not interpret and jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernel needs jax 0.11, this is {jax.__version__}")
    if qkv.dtype not in (jnp.bfloat16, jnp.float16) or {keys.dtype, values.dtype} != {qkv.dtype}:
        raise NotImplementedError(
            f"qkv {qkv.dtype}, keys {keys.dtype}, values {values.dtype}: all must be bfloat16 or float16"
        )
    weights = () if norms is None else (norms.q, norms.k)
    if any(weight.ndim != 1 or weight.dtype != qkv.dtype for weight in weights):
        raise NotImplementedError(f"norms of q and k: one weight for all rows, {qkv.dtype}")
    kv_heads, width = keys.shape[1], keys.shape[3]
    if 2 * cos.shape[1] != width:
        raise NotImplementedError(
            f"rope of {2 * cos.shape[1]} of {width} dimensions: all must turn"
        )
    kernel = RopeWrite(
        heads=qkv.shape[1] - 2 * kv_heads, kv_heads=kv_heads, half=width // 2,
        interpret=interpret, **({} if norms is None else {"eps": norms.eps, "plus_one": norms.plus_one}),
    )  # fmt: skip
    return _launch(kernel, qkv, cos, sin, pages, offsets, *weights, keys, values)


@partial(jax.jit, static_argnums=0)
def _launch(kernel: "RopeWrite", *args: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return kernel.call(*args)  # a jit of its own: layers share one lowering


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeWrite:
    """Static facts of one launch, and its body."""

    heads: int
    kv_heads: int
    half: int
    eps: float = 0.0
    """Of the norms of q and k, if there are any; and so `plus_one`."""
    plus_one: bool = False
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.half not in (32, 64, 128) or self.heads % self.kv_heads or not self.vector:
            raise NotImplementedError(
                f"{self.heads} heads and {self.kv_heads} kv heads of {2 * self.half}: 2, 4, 8 ... of 64, "
                "1, 2, 4 ... of 128 or 256 are supported"
            )

    @property
    def vector(self) -> int:
        """Numbers that a thread loads at once; 0: no tile fits."""
        fits = [n for n in (8, 4, 2) if self._warps(n) in (1, 2, 4)]
        return max(fits, key=self._warps, default=0)

    def _warps(self, vector: int) -> int:
        """Warps that a tile keeps busy; 0: it does not fit."""
        lanes = self.half // vector  # of a head
        rows = LANES // lanes if lanes <= LANES else 0  # heads of a warp
        if not rows or self.kv_heads % rows:
            return 0
        warps = self.kv_heads // rows
        return min(warps, WARPS) if warps < WARPS or warps % WARPS == 0 else 0

    @property
    def layout(self) -> Any:
        """K heads' halves over the threads: heads over warps, then over the lanes of one. Warps beyond
        the last head do what another does."""
        warps, rows = self._warps(self.vector), LANES * self.vector // self.half
        tiles = [(warps * rows, self.half), (rows, self.half), (self.vector,)]
        if 1 in (warps, rows):  # the same tile twice
            del tiles[1]
        lanes = (-3, -2) if rows > 1 else (-2,)
        busy = (-3 - 2 * (rows > 1),) if warps > 1 else ()  # the dimension of the first tile's rows
        idle = (plgpu.Replicated(WARPS // warps),) if warps < WARPS else ()
        return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), (*busy, *idle), lanes, -1)

    def call(self, *args: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Launch. The pools, which come last, become refs: they are changed in place."""
        qkv, pools = args[0], (jax.new_ref(args[-2]), jax.new_ref(args[-1]))
        kernel = plgpu.kernel(
            self.body,
            kernel_name="rope_write",
            out_type=jax.ShapeDtypeStruct((qkv.shape[0], self.heads, 2 * self.half), qkv.dtype),
            grid=(qkv.shape[0],),
            grid_names=("token",),
            # Nobody reads what another thread of the launch has written.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            **({"interpret": interpreter()} if self.interpret else {}),
        )
        q = kernel(*args[:-2], *pools)
        return q, jax.freeze(pools[0]), jax.freeze(pools[1])

    def body(self, qkv: Any, cos: Any, sin: Any, pages: Any, offsets: Any, *refs: Any) -> None:
        """What the block of a token runs: all loads first, so that all are in flight at once."""
        *weights, keys, values, q = refs
        token = lax.axis_index("token")
        page, offset = pages[token], offsets[token]
        turn = [self._row(part, (token,)) for part in (cos, sin)]
        norms = [[self._row(part, (half,)) for half in self._halves] for part in weights]
        starts = (0, self.heads, self.heads + self.kv_heads, self.heads + 2 * self.kv_heads)
        tiles = [
            [
                load(qkv, (token, pl.ds(first, end - first), half), self.layout).astype(jnp.float32)
                for half in self._halves
            ]
            for first, end in itertools.pairwise(starts)
        ]
        if norms:
            tiles[:2] = map(partial(self._normed, qkv.dtype), tiles[:2], norms)
        places = (q.at[token], keys.at[page, :, offset], values.at[page, :, offset])
        limit = float(jnp.finfo(qkv.dtype).max)
        for i, (first, second) in enumerate(tiles):
            if i == 2:  # V
                parts = [jnp.where(jnp.abs(x) <= limit, x, 0.0) for x in (first, second)]
            else:
                cosine, sine = (self._for_each(row, first.shape[0]) for row in turn)
                parts = [first * cosine - second * sine, second * cosine + first * sine]
            for half, part in zip(self._halves, parts, strict=True):
                places[i][:, half] = part.astype(qkv.dtype)

    def _normed(self, dtype: Any, parts: list[jax.Array], own: list[jax.Array]) -> list[jax.Array]:
        """RMSNorm of each head, rounded as `rms_norm` does."""
        total = jnp.sum(parts[0] * parts[0] + parts[1] * parts[1], axis=1)
        scale = lax.rsqrt(total * (0.5 / self.half) + self.eps)
        parts = [part * lax.broadcast_in_dim(scale, part.shape, [0]) for part in parts]
        own = [self._for_each(weight, parts[0].shape[0]) for weight in own]
        if self.plus_one:
            parts = [part * (1 + weight) for part, weight in zip(parts, own, strict=True)]
        else:
            parts = [
                part.astype(dtype).astype(jnp.float32) * weight
                for part, weight in zip(parts, own, strict=True)
            ]
        return [part.astype(dtype).astype(jnp.float32) for part in parts]

    def _row(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """ref[index], half a head's numbers."""
        return load(ref, index, self.layout.reduce(0)).astype(jnp.float32)

    def _for_each(self, row: jax.Array, heads: int) -> jax.Array:
        return lax.broadcast_in_dim(row, (heads, self.half), [1])

    @property
    def _halves(self) -> tuple[Any, Any]:
        return pl.ds(0, self.half), pl.ds(self.half, self.half)
