"""The public function: one of the implementations.

"xla" runs everywhere; "hopper" is made of Mosaic GPU kernels for bfloat16 and float16 on an H100 or H200.
A named implementation never falls back: what it cannot do is a NotImplementedError. None picks
for the default backend, and says once in the log why it is no kernel on a GPU.
"""

from jaxtyping import Array, Float, Int

from kernels_pallas.hardware import is_hopper, say_once
from kernels_pallas.paged_attention import xla

IMPLEMENTATIONS = ("xla", "hopper")


def paged_attention(
    q: Float[Array, "T N H"],
    keys: Float[Array, "P K page H"],
    values: Float[Array, "P K page H"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "T"],
    *,
    decode: int,
    block: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attention as the package's Semantics say. K/V of the step's own tokens are in the pool already.

    Args:
        decode: how many of the T tokens are decode rows; the rest are prefill blocks.
        block: tokens in a prefill block; `T - decode` is a multiple of it.
        scale: factor on the scores, usually H ** -0.5.
        window: sliding window in tokens, the query's own included; None: full attention.
        softcap: scores are squeezed into -softcap..softcap by tanh; None: they are not.
        implementation: "xla", "hopper" or None (chosen by the platform).

    Raises:
        NotImplementedError: for an implementation that does not exist, or cannot do this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(
            f"paged_attention has no implementation {implementation!r}; there are {IMPLEMENTATIONS}"
        )
    args = (q, keys, values, tables, positions)
    if implementation == "hopper" or (implementation is None and is_hopper("paged_attention")):
        from kernels_pallas.paged_attention import hopper  # imports Mosaic GPU: only where used

        try:
            return hopper.paged_attention(
                *args, decode=decode, block=block, scale=scale, window=window, softcap=softcap
            )
        except NotImplementedError as reason:
            if implementation is not None:
                raise
            say_once(f"paged_attention: no kernel, XLA instead ({reason})")
    return xla.paged_attention(
        *args, decode=decode, block=block, scale=scale, window=window, softcap=softcap
    )
